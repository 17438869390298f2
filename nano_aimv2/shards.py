"""Shards: thousands of image-text pairs in one tar file, read at random.

WebDataset's layout: members of one sample share a name and differ in the ending, `cat.jpg`, `cat.txt` (alt-text) and
optionally `cat.json` ({"synthetic": ["...", ...], "label": 3, ...}). img2dataset writes the same, so its output is read
as it is. A tar is read once from end to end to find where its members lie; the offsets go into a small sidecar beside it,
which later runs map into memory: any sample is then two or three reads away, and memory does not grow with the data.

Way: **tar -> (image bytes, caption)** -> data. Lesson: 07.
"""

import contextlib
import glob
import io
import json
import os
import tarfile
from collections import OrderedDict
from pathlib import Path

import numpy as np

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
OPEN_FILES = 64
VERSION = 2  # of the sidecar


def find_shards(path):
    """The tar files that `path` names: a folder, a single tar, or a pattern with * or ?. Sorted.

    Raises: ValueError if there are none.
    """
    if os.path.isdir(path):
        found = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
    else:
        found = sorted(p for p in glob.glob(path) if os.path.isfile(p))
    if not found:
        why = "has no .tar files" if os.path.isdir(path) else "does not exist"
        raise ValueError(f"data path {path!r} {why}; give a folder of WebDataset shards, made by "
                         "`python data/pack.py IMAGES --out=FOLDER` or by img2dataset")
    return found


class Shards:
    """Random access to the samples of one or many tars: `len(shards)`, `shards.image(i)`, `.alt_text(i)`, `.metadata(i)`.

    `report` says what the tars hold that is no sample: {reason: count}.
    """

    def __init__(self, path):
        self.paths = find_shards(path)
        self.indexes = [load_index(p) for p in self.paths]
        self.ends = np.cumsum([len(index) - 1 for index in self.indexes])
        self.report = {reason: int(sum(index[0, 2 + i] for index in self.indexes)) for i, reason in enumerate(REASONS)}
        self.files = OrderedDict()
        if not len(self):
            raise ValueError(f"data path {path!r} holds {len(self.paths)} tar files but no sample: {self.report}; a sample "
                             "is an image (.jpg .png .webp) and a .txt or .json of the same name")

    def __len__(self):
        return int(self.ends[-1])

    def __getstate__(self):  # open files do not travel to data workers
        return {**self.__dict__, "files": OrderedDict()}

    def locate(self, i):
        """Sample i as (path, row of the index)."""
        shard = int(np.searchsorted(self.ends, i, side="right"))
        first = int(self.ends[shard - 1]) if shard else 0
        return self.paths[shard], self.indexes[shard][1 + i - first]

    def image(self, i):
        """The image file of sample i, as bytes."""
        path, row = self.locate(i)
        return self.read(path, row[0], row[1])

    def alt_text(self, i):
        """The .txt of sample i. Raises ValueError if it has none."""
        path, row = self.locate(i)
        if not row[2]:
            raise ValueError("no alt-text (.txt)")
        return decode_text(self.read(path, row[2], row[3]))

    def metadata(self, i):
        """The .json of sample i as a dict, empty if it has none. Raises ValueError if it cannot be read."""
        path, row = self.locate(i)
        try:
            metadata = json.loads(self.read(path, row[4], row[5])) if row[4] else {}
        except ValueError as error:  # broken JSON or broken UTF-8
            raise ValueError(f"unreadable JSON ({error})") from error
        if not isinstance(metadata, dict):
            raise ValueError(f"JSON holds a {type(metadata).__name__}, not an object")
        return metadata

    def name(self, i):
        """Where sample i lies, for messages: tar and member."""
        path, row = self.locate(i)
        member = self.read(path, row[0] - 512, 100).split(b"\0")[0].decode("utf-8", "replace")
        return f"{path}:{member}"

    def read(self, path, offset, size):
        key = (os.getpid(), path)  # a forked data worker must not share a file position with its parent
        if key not in self.files:
            if len(self.files) >= OPEN_FILES:
                self.files.popitem(last=False)[1].close()
            self.files[key] = open(path, "rb")  # noqa: SIM115  (stays open until it falls out of the table)
        file = self.files[key]
        self.files.move_to_end(key)
        file.seek(int(offset))
        return file.read(int(size))


REASONS = ("image without caption", "caption without image", "duplicate key", "tar cut short")


def load_index(path):
    """The index of a tar, from its sidecar or made now: i64[1 + samples, 6].

    Row 0: tar size, tar mtime in ns, then counts of REASONS. Other rows: offset and size of image, text, json (0: absent).
    """
    status = os.stat(path)
    sidecar = f"{path}.v{VERSION}.idx.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # absent or broken: make it again
        index = np.load(sidecar, mmap_mode="r")
        if index.dtype == np.int64 and index.shape[1:] == (6,) and tuple(index[0, :2]) == (status.st_size, status.st_mtime_ns):
            return index
    index = make_index(path, status)
    temporary = f"{sidecar}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            np.save(file, index)
        os.replace(temporary, sidecar)
    except OSError:  # a read-only or full disk: the index then lives in memory
        with contextlib.suppress(OSError):
            os.remove(temporary)
    return index


def make_index(path, status):
    """Walk a tar from end to end. A tar that is cut short gives the samples before the cut."""
    samples, counts = {}, dict.fromkeys(REASONS, 0)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, ending = member.name.rpartition(".")
                ending = ending.lower()
                column = 0 if ending in IMAGE_ENDINGS else {"txt": 2, "json": 4}.get(ending)
                if column is None or not member.isfile():
                    continue
                if member.offset_data + member.size > status.st_size:
                    raise tarfile.ReadError("unexpected end of data")
                row = samples.setdefault(key, [0] * 6)
                if row[column]:
                    counts["duplicate key"] += 1
                    continue
                row[column : column + 2] = member.offset_data, member.size
    except tarfile.ReadError:
        counts["tar cut short"] += 1
    rows = []
    for row in samples.values():
        if not row[0]:
            counts["caption without image"] += 1
        elif not (row[2] or row[4]):
            counts["image without caption"] += 1
        else:
            rows.append(row)
    return np.array([[status.st_size, status.st_mtime_ns, *counts.values()], *rows], dtype=np.int64)


def decode_text(data):
    """Caption bytes to text: UTF-8, else Latin-1 (which every byte string is)."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


class ShardWriter:
    """Write samples into numbered tars of `samples_per_shard`; a tar has its final name only when it is whole.

        with ShardWriter("out/train") as writer:
            writer.write("000001", image_bytes, "png", "a caption", {"synthetic": ["a longer caption"]})
    """

    def __init__(self, folder, samples_per_shard=5000):
        self.folder, self.samples_per_shard = Path(folder), samples_per_shard
        self.folder.mkdir(parents=True, exist_ok=True)
        self.count, self.tar = 0, None

    def write(self, key, image, ending, text, metadata):
        if self.tar is None:
            self.path = self.folder / f"{self.count // self.samples_per_shard:05d}.tar"
            self.tar = tarfile.open(f"{self.path}.tmp", "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        parts = ((ending, image), ("txt", text.encode()), ("json", json.dumps(metadata, ensure_ascii=False).encode()))
        for name, content in parts:
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size = len(content)
            self.tar.addfile(info, io.BytesIO(content))
        self.count += 1
        if self.count % self.samples_per_shard == 0:
            self.finish()

    def finish(self):
        if self.tar is not None:
            self.tar.close()
            os.replace(f"{self.path}.tmp", self.path)
            self.tar = None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.finish()
        elif self.tar is not None:
            self.tar.close()
            os.remove(f"{self.path}.tmp")
