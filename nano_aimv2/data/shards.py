"""Shards: thousands of image-text pairs in one tar file, read at random.

WebDataset's layout: the members of one sample share a name and differ in the extension, `cat.jpg`,
`cat.txt` (alt-text) and optionally `cat.json` ({"synthetic": ["...", ...], "label": 3, ...}). What
follows the last dot is the type. Names agree up to the last dot, or up to the first if that gives
at most one member of each type: `x.input.jpg` and `x.outputs.txt` are a sample, and so are
`photo.v2.jpg` and `photo.v2.txt`, beside a `photo.v1.jpg` or not. img2dataset's output is read as
it is. The index (tar_index.py) says where each member lies: any sample is two or three reads away,
however many tars there are.

Pipeline: **tar -> (image bytes, caption)** -> batches. Lesson: 08.
"""

import contextlib
import glob
import io
import json
import os
import re
import tarfile
import zlib
from pathlib import Path

from nano_aimv2.data.tar_index import IMAGE_EXTENSIONS, REASONS, VERSION, open_index, read_object
from nano_aimv2.files import replacing

NAMED = 3  # damaged or missing tars that a report names
MAX_RANGE = 1_000_000  # numbers in a range {first..last}
SPLITS = ("train", "val", "validation", "test", "novel")  # subfolders that are sets of their own


def find_shards(path):
    """The tar files that `path` names: a folder (see `tars_in`), a single tar, or a pattern with *,
    ? or braces (see `expand_braces`). Sorted.

    Raises: ValueError if there are none, or if one of the names in braces is missing.
    """
    names = [path] if os.path.exists(path) else expand_braces(path)
    found = {name: tars_in(name) if os.path.isdir(name) else
             [p for p in glob.glob(name) if os.path.isfile(p)] for name in names}
    missing = [name for name in names if not found[name]]
    if missing and len(names) > 1:
        raise ValueError(f"data path {path!r}: {len(missing):,} of its {len(names):,} names match "
                         f"no tar, the first: {', '.join(missing[:NAMED])}; name only tars that "
                         "exist, or give their folder")
    if missing:
        why = (f"has no .tar files outside of subfolders named {', '.join(SPLITS)}"
               if os.path.isdir(path) else "does not exist")
        raise ValueError(f"data path {path!r} {why}; give a folder of WebDataset shards, made by "
                         "`python data/pack.py IMAGES --out=FOLDER` or by img2dataset")
    return sorted(set().union(*found.values()))


def tars_in(folder):
    """The tars of a folder; where it has none, those of its subfolders at any depth, except in
    SPLITS, lest a run trains on what it is validated on."""
    def stop(error):  # os.walk would skip what cannot be listed
        raise error

    found = []
    for place, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        found += [os.path.join(place, name) for name in files
                  if name.endswith(".tar") and not name.startswith(".")]
        if found and place == folder:
            break
        folders[:] = [name for name in folders if name not in SPLITS and name[0] != "."]
    return found


def expand_braces(path):
    """'{08..10}.tar' -> ['08.tar', '09.tar', '10.tar'], '{a,b}.tar' -> ['a.tar', 'b.tar'], as in a
    shell. Raises ValueError on other braces."""
    head, brace, rest = path.partition("{")
    inside, closing, tail = rest.partition("}")
    if not brace:
        return [path]
    ends = re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", inside)
    first, last = map(int, ends.groups()) if ends else (0, 0)
    is_list = "," in inside and "{" not in inside
    if not closing or not (is_list or ends) or not 0 <= last - first < MAX_RANGE:
        why = (f"is neither a range that counts up, of at most {MAX_RANGE:,} numbers, nor a list"
               if closing else "has no closing brace")
        raise ValueError(f"{brace + inside + closing!r} in a data path {why}: write "
                         "{00000..01241}.tar or {a,b}.tar")
    if ends:
        is_padded = any(end != str(int(end)) for end in ends.groups())
        width = max(map(len, ends.groups())) if is_padded else 1
    choices = [f"{i:0{width}}" for i in range(first, last + 1)] if ends else inside.split(",")
    tails = expand_braces(tail)
    return [head + choice + end for choice in choices for end in tails]


def index_file(path):
    """Where the index of `path` lies: (folder, file). In the folder, or beside a single tar; one
    for each pattern."""
    name = f"shards.v{VERSION}.idx"
    if os.path.isdir(path):
        return path, os.path.join(path, name)
    if os.path.isfile(path):
        return os.path.dirname(path), f"{path}.v{VERSION}.idx"
    folder = path
    while glob.has_magic(folder) or "{" in folder:
        folder = os.path.dirname(folder)
    pattern = os.path.relpath(path, folder or ".")
    return folder, os.path.join(folder, f"{zlib.crc32(pattern.encode()):08x}.{name}")


class Shards:
    """Random access to the samples of one or many tars: `len(shards)`, `shards.image(i)`,
    `.alt_text(i)`, `.metadata(i)`.

    `report` counts what the tars hold besides whole samples: {reason: count}; `damaged` names the
    first tars that were not read to their end; `fingerprint` changes with the tars' content, not
    with their place.

    Args: path: see `find_shards`; gather: see `open_index`.
    """

    def __init__(self, path, gather=None):
        paths = find_shards(path)
        self.folder, file = index_file(path)
        names = [os.path.relpath(p, self.folder or ".") for p in paths]
        self.index = open_index(self.folder, names, file, gather)
        tars = self.index.tars
        self.fingerprint = self.index.fingerprint
        self.report = {reason: sum(tar.counts[reason] for tar in tars) for reason in REASONS}
        self.damaged = [
            f"{os.path.join(self.folder, tar.name)}: {tar.note or 'damaged'} "
            f"({tar.counts['bytes not read']:,} of {tar.size:,} bytes not read)" for tar in tars
            if tar.note or tar.counts["bytes not read"] or tar.counts["tar cut short"]]
        if not len(self):
            why = "; ".join([str(self.report), *self.damaged[:NAMED]])
            raise ValueError(f"data path {path!r} holds {len(paths)} tar files but no sample: "
                             f"{why}; a sample is an image ({', '.join(IMAGE_EXTENSIONS)}) and a "
                             ".txt or .json of the same name")

    def __len__(self):
        return len(self.index.masks)

    def locate(self, i):
        """Sample i as (path of its tar, row of the index behind the tar's number)."""
        tar, *row = self.index.members[i].tolist()
        return os.path.join(self.folder, self.index.tars[tar].name), row

    def image(self, i):
        """The image file of sample i, as bytes."""
        path, row = self.locate(i)
        return self.read(path, row[0], row[1])

    def alt_text(self, i):
        """The .txt of sample i, "" if it has none."""
        path, row = self.locate(i)
        return decode_text(self.read(path, row[2], row[3])) if row[2] else ""

    def metadata(self, i):
        """The .json of sample i as a dict, {} if it has none. Raises ValueError if unreadable."""
        path, row = self.locate(i)
        return read_object(self.read(path, row[4], row[5])) if row[4] else {}

    def name(self, i):
        """Tar and member of sample i, for messages."""
        path, row = self.locate(i)
        try:
            header = self.read(path, row[0] - 512, 100)
        except OSError:  # this may be why the name is asked for
            return f"{path}: sample {i}"
        return f"{path}:{header.split(bytes(1))[0].decode('utf-8', 'replace')}"

    def read(self, path, offset, size):
        """Some bytes of a tar. It is opened anew each time: a read at random among thousands of
        tars would seldom find its own among those that can be kept open."""
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            return file.read(size)


def decode_text(data):
    """Caption bytes to text: UTF-8, or UTF-16 with a byte-order mark, else Windows-1252."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode("utf-16")
    for encoding in ("utf-8-sig", "cp1252"):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(encoding)
    return data.decode("latin-1")  # five bytes are undefined in Windows-1252


class ShardWriter:
    """Write samples into numbered tars; a tar gets its final name when it is whole.

        with ShardWriter("out/train") as writer:
            writer.write("000001", image_bytes, "png", "a caption", {"synthetic": ["a longer one"]})
    """

    def __init__(self, folder, samples_per_shard=5000):
        self.folder, self.samples_per_shard = Path(folder), samples_per_shard
        self.folder.mkdir(parents=True, exist_ok=True)
        self.count, self.tar, self.open = 0, None, contextlib.ExitStack()

    def write(self, key, image, extension, text, metadata):
        """Add a sample: image bytes, their file extension, the alt-text, a dict for the .json."""
        if self.count % self.samples_per_shard == 0:
            self.open.close()
            path = self.folder / f"{self.count // self.samples_per_shard:05d}.tar"
            temporary = self.open.enter_context(replacing(path))
            tar = tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            self.tar = self.open.enter_context(tar)
        metadata = json.dumps(metadata, ensure_ascii=False)
        parts = ((extension, image), ("txt", text.encode()), ("json", metadata.encode()))
        for name, content in parts:
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size = len(content)
            self.tar.addfile(info, io.BytesIO(content))
        self.count += 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.open.__exit__(*error)
