"""Shards: thousands of image-text pairs in one tar file, read at random.

WebDataset's layout: the members of one sample share a name and differ in the extension, `cat.jpg`,
`cat.txt` (alt-text) and optionally `cat.json` ({"synthetic": ["...", ...], "label": 3, ...}).
img2dataset writes the same, so its output is read as it is. Each tar is read once from end to end
to find where its members lie. The offsets go into a small index file beside it, which later runs
map into
memory: any sample is then two or three reads away, and memory does not grow with the data.

Pipeline: **tar -> (image bytes, caption)** -> batches. Lesson: 07.
"""

import contextlib
import glob
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np

from nano_aimv2.files import replacing

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
VERSION = 2  # of the index files


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
    """Random access to the samples of one or many tars: `len(shards)`, `shards.image(i)`,
    `.alt_text(i)`, `.metadata(i)`.

    `report` counts what the tars hold besides whole samples: {reason: count}.
    """

    def __init__(self, path):
        self.paths = find_shards(path)
        self.indexes = [load_index(p) for p in self.paths]
        self.ends = np.cumsum([len(index) - 1 for index in self.indexes])
        self.report = {reason: int(sum(index[0, 2 + i] for index in self.indexes))
                       for i, reason in enumerate(REASONS)}
        if not len(self):
            raise ValueError(f"data path {path!r} holds {len(self.paths)} tar files but no sample: "
                             f"{self.report}; a sample is an image (.jpg .png .webp) and a .txt or "
                             ".json of the same name")

    def __len__(self):
        return int(self.ends[-1])

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
        """The .json of sample i as a dict, {} if it has none. Raises ValueError if unreadable."""
        path, row = self.locate(i)
        try:
            metadata = json.loads(self.read(path, row[4], row[5])) if row[4] else {}
        except ValueError as error:  # broken JSON or broken UTF-8
            raise ValueError(f"unreadable JSON ({error})") from error
        if not isinstance(metadata, dict):
            raise ValueError(f"JSON holds a {type(metadata).__name__}, not an object")
        return metadata

    def name(self, i):
        """Tar and member of sample i, for messages."""
        path, row = self.locate(i)
        header = self.read(path, row[0] - 512, 100)
        return f"{path}:{header.split(bytes(1))[0].decode('utf-8', 'replace')}"

    def read(self, path, offset, size):
        """Some bytes of a tar. It is opened anew each time: a read at random among thousands of
        tars would seldom find its own among those that can be kept open."""
        with open(path, "rb", buffering=0) as file:
            file.seek(int(offset))
            return file.read(int(size))


REASONS = ("image without caption", "caption without image", "duplicate key", "tar cut short")


def load_index(path):
    """The index of a tar, from its index file or made now: i64[1 + samples, 6].

    Row 0: tar size, tar mtime in ns, then counts of REASONS. Other rows: offset and size of image,
    text and json (0: absent).
    """
    status = os.stat(path)
    saved = f"{path}.v{VERSION}.idx.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # absent or damaged: make it again
        index = np.load(saved, mmap_mode="r")
        is_index = index.dtype == np.int64 and index.shape[1:] == (6,)
        if is_index and tuple(index[0, :2]) == (status.st_size, status.st_mtime_ns):
            return index
    index = make_index(path, status)
    # A read-only or full disk: the index then lives in memory.
    with contextlib.suppress(OSError), replacing(saved) as temporary, open(temporary, "wb") as file:
        np.save(file, index)
    return index


def make_index(path, status):
    """Read a tar from end to end. A tar that is cut short gives the samples before the cut."""
    samples, counts = {}, dict.fromkeys(REASONS, 0)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                add_member(member, samples, counts, status.st_size)
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


def add_member(member, samples, counts, tar_size):
    """Note where one member of a tar lies: `samples` is {key: row of the index}."""
    key, _, extension = member.name.rpartition(".")
    extension = extension.lower()
    column = 0 if extension in IMAGE_EXTENSIONS else {"txt": 2, "json": 4}.get(extension)
    if column is None or not member.isfile():
        return
    if member.offset_data + member.size > tar_size:
        raise tarfile.ReadError("unexpected end of data")
    row = samples.setdefault(key, [0] * 6)
    if row[column]:
        counts["duplicate key"] += 1
    else:
        row[column : column + 2] = member.offset_data, member.size


def decode_text(data):
    """Caption bytes to text: UTF-8, else Latin-1 (which any byte string is)."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


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
