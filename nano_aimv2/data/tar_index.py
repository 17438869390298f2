"""Tar index: where the members of every sample lie, for a whole folder of tars in one file.

A tar has no table of contents. Each is read once from end to end, by one of the ranks; what was
found goes into a single file beside the tars, and later runs map it into memory. One open file
serves any number of tars, memory does not grow with the data, and a data worker receives the file's
name instead of its content. A tar that changed is read again, the others are not.

The file: a line of JSON (the tars, the caption kinds), then the arrays of `Index`.

Pipeline: tars -> **Index** -> shards. Lesson: 08.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import tarfile
from collections import Counter, defaultdict
from dataclasses import astuple, dataclass, replace
from uuid import uuid4

import numpy as np
from tqdm import tqdm

from nano_aimv2.files import is_lfs_pointer, replacing

IMAGE_EXTENSIONS = ("jpg", "jpeg", "jfif", "png", "webp")
COLUMNS = {**dict.fromkeys(IMAGE_EXTENSIONS, 1), "txt": 3, "json": 5}  # of Index.members
REASONS = ("image without caption", "caption without image", "duplicate key", "unreadable .json",
           "tar cut short", "bytes not read")
VERSION = 4  # of the index file
BLOCK = 512  # bytes: a tar consists of blocks
GROUP = 4096  # samples between two entries of Index.before
MAX_KINDS = 64  # bits of a mask


@dataclass
class Tar:
    """One tar of an index. `counts`: {reason of REASONS: number}; `note`: why nothing was read."""

    name: str  # relative to the folder of the index
    size: int  # bytes
    mtime: int  # ns
    samples: int
    counts: dict
    note: str = ""

    @property
    def address(self):
        return self.name, self.size, self.mtime


@dataclass
class Index:
    """Where the members of N samples lie, and which of K caption kinds each sample has.

    members: i64[N, 7]: number of the tar; offset and size of the image, the .txt and the .json (0:
        absent).
    masks: u64[N]: bit k says whether the sample has kinds[k].
    before: i64[K, G + 1]: how many of the first g * GROUP samples have each kind; last: of all.
    """

    tars: list
    kinds: list
    members: np.ndarray
    masks: np.ndarray
    before: np.ndarray
    file: str = ""  # where it is mapped from; empty: it is in memory

    def __reduce__(self):
        """Another process maps the file itself."""
        if self.file:
            return reopen, (self.file, self.fingerprint)
        return Index, (self.tars, self.kinds, self.members, self.masks, self.before)

    @property
    def fingerprint(self):
        """16 hexadecimal digits that change with the tars' names, bytes and numbers of samples."""
        content = [(os.path.basename(tar.name), tar.size, tar.samples) for tar in self.tars]
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def count(self, kind):
        """Samples with captions of a kind."""
        return int(self.before[self.kinds.index(kind), -1]) if kind in self.kinds else 0

    def nth(self, kind, i):
        """The i-th of the samples that have captions of a kind."""
        k = self.kinds.index(kind)
        if self.before[k, -1] == len(self.masks):  # all have
            return i
        group = int(np.searchsorted(self.before[k, :-1], i, side="right")) - 1
        masks = self.masks[group * GROUP : (group + 1) * GROUP]
        here = np.flatnonzero(masks >> np.uint64(k) & np.uint64(1))
        return group * GROUP + int(here[i - self.before[k, group]])


def open_index(folder, names, file, gather=None):
    """The index of some tars, from its file or made now; new tars are shared out over the ranks.

    Args: names: of the tars, relative to `folder`; file: of the index; gather: value -> [value of
        each rank], called by all ranks alike; None: this process is alone.
    Raises: ValueError if the ranks do not see the same tars.
    """
    gather = gather or (lambda value: [value])
    stats = [os.stat(os.path.join(folder, name)) for name in names]
    wanted = [(name, s.st_size, s.st_mtime_ns) for name, s in zip(names, stats, strict=True)]
    old = read_index(file)
    known = {tar.address for tar in old.tars} if old else ()
    ticket, sizes = uuid4().hex, [address[:2] for address in wanted]
    missing = [address[0] for address in wanted if address not in known]
    answers = gather((ticket, sizes, missing, is_index_of(old, wanted)))
    tickets, all_sizes, all_missing, are_current = zip(*answers, strict=True)
    if any(other != sizes for other in all_sizes):
        raise ValueError(f"the ranks see different tars in {folder} ({list(map(len, all_sizes))}): "
                         "give every machine the same files, whole before a run starts")
    if all(are_current):
        return old
    missing = sorted(set().union(*all_missing))
    rank, world = tickets.index(ticket), len(tickets)
    mine = tqdm(missing[rank::world], desc=f"indexing {folder}", unit="tar",
                disable=True if rank or len(missing) < 2 else None)
    parts = parts_of(old) if old else {}
    for of_rank in gather([walk(folder, name) for name in mine]):
        parts |= {part.tars[0].name: part for part in of_rank}
    index = join([parts[name] for name in names])
    index.tars = [replace(tar, mtime=address[2])  # two machines may have copies of other ages
                  for tar, address in zip(index.tars, wanted, strict=True)]
    for is_turn in (rank == 0, rank > 0):  # on a disk that all ranks share, rank 0 writes for all
        if is_turn and not is_index_of(read_index(file), wanted):
            write_index(index, file)
        gather(None)
    found = read_index(file)
    return found if is_index_of(found, wanted) else index


def is_index_of(index, wanted):
    return bool(index) and [tar.address for tar in index.tars] == wanted


def join(parts):
    """The Index of several tars, from those of each."""
    totals = Counter()
    for part in parts:
        totals.update({kind: part.count(kind) for kind in part.kinds})
    kinds = sorted(totals, key=lambda kind: (-totals[kind], kind))[:MAX_KINDS]
    members, masks = [], []
    for i, part in enumerate(parts):
        members.append(part.members.copy())
        members[-1][:, 0] = i
        mask = np.zeros(len(part.masks), np.uint64)
        for k, kind in enumerate(part.kinds):
            if kind in kinds:
                bit = part.masks >> np.uint64(k) & np.uint64(1)
                mask |= bit << np.uint64(kinds.index(kind))
        masks.append(mask)
    tars = [tar for part in parts for tar in part.tars]
    return make_index(tars, kinds, np.concatenate(members), np.concatenate(masks))


def parts_of(index):
    """{name of a tar: the Index of this tar alone}."""
    parts, first = {}, 0
    for tar in index.tars:
        rows = slice(first, first + tar.samples)
        parts[tar.name] = make_index([tar], index.kinds, index.members[rows], index.masks[rows])
        first = rows.stop
    return parts


def make_index(tars, kinds, members, masks):
    """An Index in memory."""
    starts = np.arange(0, len(masks), GROUP)
    before = np.zeros((len(kinds), len(starts) + 1), np.int64)
    for k in range(len(kinds)):
        has = (masks >> np.uint64(k) & np.uint64(1)).astype(np.int64)
        if len(starts):
            before[k, 1:] = np.add.reduceat(has, starts).cumsum()
    return Index(tars, list(kinds), members, masks, before)


def write_index(index, file):
    """Write an index file as a whole. Where the disk refuses, the index stays in memory."""
    header = {"version": VERSION, "tars": [astuple(tar) for tar in index.tars],
              "kinds": index.kinds, "samples": len(index.masks)}
    header = json.dumps(header).encode()
    header += b" " * (-(len(header) + 1) % 64) + b"\n"  # numbers behind it are aligned
    with (contextlib.suppress(OSError), replacing(file) as temporary,
          open(temporary, "wb") as out):
        for data in (header, index.members, index.masks, index.before):
            out.write(data)


def read_index(file):
    """The Index in a file, mapped into memory; None if there is none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(file, "rb") as opened:
        line = opened.readline()
        header = json.loads(line)
        N, K = header["samples"], len(header["kinds"])
        shapes = (N, 7), (N,), (K, -(-N // GROUP) + 1)
        types = np.int64, np.uint64, np.int64
        if header["version"] != VERSION:
            return None
        content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        arrays, at = [], len(line)
        for shape, dtype in zip(shapes, types, strict=True):
            size = math.prod(shape)
            arrays.append(np.frombuffer(content, dtype, size, at).reshape(shape))
            at += 8 * size
        if at == len(content):
            return Index([Tar(*tar) for tar in header["tars"]], header["kinds"], *arrays, file)
    return None


def reopen(file, fingerprint):
    """The Index that another process has mapped from `file`."""
    index = read_index(file)
    if not index or index.fingerprint != fingerprint:
        raise ValueError(f"{file} was replaced while a run started, because tars were added or "
                         "changed: start again")
    return index


# One tar


def walk(folder, name):
    """Read one tar from end to end: its Index. What cannot be read is counted, in bytes."""
    path = os.path.join(folder, name)
    status, counts, end = os.stat(path), dict.fromkeys(REASONS, 0), 0
    samples = {}  # name up to the last dot -> (row of members, names of its caption kinds)
    note = why_not_a_tar(path)
    with open(path, "rb") as headers, open(path, "rb") as contents:
        for member in () if note else read_members(headers, status.st_size):
            counts["bytes not read"] += member.offset - end
            end = member.offset_data + -(-member.size // BLOCK) * BLOCK
            note_member(member, contents, samples, counts)
        unread, zeros = measure_tail(contents, end)
    counts["bytes not read"] += status.st_size if note else unread
    counts["tar cut short"] += not note and (zeros < BLOCK or status.st_size % BLOCK > 0)
    whole = []
    for row, kinds in join_members(samples):
        if not row[1]:
            counts["caption without image"] += 1
        elif not (row[3] or row[5]):
            counts["image without caption"] += 1
        else:
            if "caption" in kinds and "alt" not in kinds:  # no .txt, or an empty one
                kinds.append("alt")
            whole.append((row, kinds))
    names = [name for name, _ in Counter(
        kind for _, kinds in whole for kind in kinds).most_common(MAX_KINDS)]
    masks = [sum(1 << names.index(kind) for kind in kinds if kind in names) for _, kinds in whole]
    members = np.array([row for row, _ in whole], np.int64).reshape(-1, 7)
    tar = Tar(name, status.st_size, status.st_mtime_ns, len(whole), counts, note)
    return make_index([tar], names, members, np.array(masks, np.uint64))


def why_not_a_tar(path):
    """What a file is that is named .tar and is none; empty if it may be one."""
    if is_lfs_pointer(path):
        return "a Git LFS pointer: run `git lfs pull`"
    with open(path, "rb") as file:
        is_packed = file.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd",
                                             b"PK\x03\x04"))
    return "compressed: unpack it to a plain tar" if is_packed else ""


def read_members(file, size):
    """Yields the whole members of an open tar of `size` bytes, and those behind a damage."""
    at = 0
    while at < size:
        file.seek(at)
        try:
            with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
                while member := tar.next():
                    tar.members.clear()  # it would keep all of them
                    at = member.offset + BLOCK
                    if not 0 <= member.size <= size - member.offset_data:
                        break
                    at = member.offset_data + member.size
                    yield member
                else:
                    return
        except OSError:
            raise
        except Exception:  # tarfile fails in many ways on a damaged header
            at = max(at + BLOCK, file.tell())
        at = -(-at // BLOCK) * BLOCK


def note_member(member, contents, samples, counts):
    """Enter one member of a tar into `samples`; `contents` is the open tar."""
    key, _, extension = member.name.rpartition(".")
    extension = extension.lower()
    is_fork = key.rpartition("/")[2].startswith("._")  # what a Mac adds to a file
    if extension not in COLUMNS or is_fork or not member.isfile():
        return
    if member.issparse():  # it does not lie in one piece
        counts["bytes not read"] += member.size
        return
    row, kinds = samples.setdefault(key, ([0] * 7, []))
    column = COLUMNS[extension]
    if row[column]:
        counts["duplicate key"] += 1
        return
    row[column : column + 2] = member.offset_data, member.size
    if extension == "txt" and member.size:
        kinds.append("alt")
    elif extension == "json":
        contents.seek(member.offset_data)
        try:
            kinds += caption_keys(read_object(contents.read(member.size)))
        except ValueError:
            counts["unreadable .json"] += 1


def join_members(samples):
    """Yields the (row, caption kinds) of each sample: names that agree up to the first dot of the
    base name are one, `x.input` and `x.outputs`, if no two members of it have the same type.

    Args: samples: {name up to the last dot: (row of members, caption kinds)}.
    """
    groups = defaultdict(list)
    for name in samples:
        dot = name.find(".", name.rfind("/") + 2)  # a name may begin with a dot
        groups[name[:dot] if dot > 0 else name].append(samples[name])
    for parts in groups.values():
        columns = list(zip(*(row for row, _ in parts), strict=True)) if len(parts) > 1 else ()
        if columns and all(sum(map(bool, column)) <= 1 for column in columns):
            yield list(map(sum, columns)), [kind for _, kinds in parts for kind in kinds]
        else:
            yield from parts


def measure_tail(file, end):
    """(bytes up to the last that is not zero, zeros behind it) of an open file from `end` on."""
    unread, total = 0, 0
    file.seek(end)
    while chunk := file.read(1 << 20):
        filled = len(chunk.rstrip(b"\0"))
        unread = total + filled if filled else unread
        total += len(chunk)
    return unread, total - unread


def read_object(data):
    """The bytes of a .json as a dict. Raises ValueError if they are anything else."""
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError) as error:  # broken JSON or UTF-8; nested too deep
        raise ValueError(f"unreadable JSON ({error})") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"JSON holds a {type(metadata).__name__}, not an object")
    return metadata


def caption_keys(metadata):
    """The keys of a .json that hold captions."""
    return [key for key, value in metadata.items() if captions_in(value) and key != "alt"]


def captions_in(value):
    """The captions in one value of a .json: a string is one, a list of strings several."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return []
    return [text for text in texts if text.strip()]
