"""Pack a folder or a zip of captioned images into shards that `train.py --data=FOLDER` reads.

    python data/pack.py photos/ --out=data/photos      # photos/cat.jpg and photos/cat.txt, ...
    python data/pack.py photos.zip --out=data/photos --size=256    # shorter sides of at most 256 px

Captions come from the first of these that exists: the file of `--captions=FILE`, a `captions.jsonl`
or `captions.csv` at the top of the folder or zip, a .txt of the same name beside each image. A row
of a caption file has

    file        the image, relative to the folder or zip
    caption     its alt-text; or `captions`, a list: first the alt-text, then synthetic captions
    synthetic   optional: longer captions, a list (in a csv: with | between)
    label       optional: a class number, and `label_name`, for probes

Whether an image goes into train/ or val/ depends only on a hash of its file name, so it stays there
when images are added. Images that cannot be read or have no caption are skipped; manifest.json
counts them by reason and names the first hundred.
"""

import csv
import hashlib
import io
import json
import multiprocessing
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the script finds the package
from nano_aimv2.data.images import open_image, to_rgb  # noqa: E402
from nano_aimv2.data.shards import IMAGE_EXTENSIONS, ShardWriter, decode_text  # noqa: E402
from nano_aimv2.files import replacing  # noqa: E402
from nano_aimv2.flags import check_at_least, read_flags, run_command  # noqa: E402

NAMED = 100  # skipped images that the manifest names
CAPTION_FILES = ("captions.jsonl", "captions.csv")
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # other formats are packed as JPEG


@dataclass
class Options:
    photos: tuple = ()  # the word that is not a flag: one folder or zip
    out: str = ""  # folder to write; must not exist yet
    captions: str = ""  # a .jsonl or .csv of captions that is not inside the folder or zip
    size: int = 0  # shrink images whose shorter side has more pixels than this; 0: keep the files
    val: float = 0.05  # share of the images for validation
    samples_per_shard: int = 5000  # images per tar file

    def __post_init__(self):
        if len(self.photos) != 1:
            raise ValueError(f"{len(self.photos)} folders or zips given, exactly one is packed: "
                             "python data/pack.py PHOTOS --out=FOLDER")
        if not self.out:
            raise ValueError("no --out: name the folder to write, --out=FOLDER")
        check_at_least(self, size=0, samples_per_shard=1)


@dataclass
class Files:
    """The files of a folder or zip."""

    names: list  # sorted
    read: Callable  # name -> bytes


@dataclass
class Sample:
    """One image with its captions, on its way into a shard."""

    name: str
    image: bytes
    fields: dict  # caption, synthetic, label, label_name
    extension: str = ""
    error: str = ""  # why the image cannot be packed


def open_source(path):
    """The Files of a folder or zip. Raises ValueError if `path` is neither."""
    if os.path.isdir(path):
        folder = Path(path)
        paths = (p for p in folder.rglob("*") if p.is_file())
        return Files(sorted(p.relative_to(folder).as_posix() for p in paths),
                     lambda name: (folder / name).read_bytes())
    if zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        names = (i.filename for i in archive.infolist() if not i.is_dir())
        return Files(sorted(n for n in names if not n.startswith("__MACOSX")), archive.read)
    why = "is neither a folder nor a zip" if os.path.exists(path) else "does not exist"
    raise ValueError(f"source {str(path)!r} {why}: give a folder or a .zip of images")


def read_captions(files, captions, skipped):
    """What is written about each image: yields (name, {"caption", "synthetic", "label", ...})."""
    name = captions or next((n for n in CAPTION_FILES if n in files.names), None)
    if name is None:
        yield from captions_beside(files, skipped)
        return
    text = decode_text(Path(captions).read_bytes() if captions else files.read(name))
    for number, row in parse_rows(str(name), text):
        checked = check_row(row)
        if checked:
            yield checked
        else:
            skipped.append((f"{name} line {number}", "unreadable row"))


def captions_beside(files, skipped):
    """Captions from the .txt beside each image: yields (name, {"caption"})."""
    texts = {name: name.rpartition(".")[0] + ".txt" for name in files.names if is_image(name)}
    existing, wanted = set(files.names), set(texts.values())
    for name in files.names:
        if name in texts and texts[name] in existing:
            yield name, {"caption": decode_text(files.read(texts[name])).strip()}
        elif name in texts:
            skipped.append((name, "no caption"))
        elif name.endswith(".txt") and name not in wanted:
            skipped.append((name, "caption without picture"))


def parse_rows(name, text):
    """(line number, row) of each row of a caption file; the row is None if it is not valid JSON."""
    if name.endswith(".csv"):
        for number, cells in enumerate(csv.DictReader(io.StringIO(text)), 2):
            row = {column: cell for column, cell in cells.items() if column and cell}
            if "synthetic" in row:
                row["synthetic"] = row["synthetic"].split("|")
            yield number, row
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError:
                yield number, None


def check_row(row):
    """A row of a caption file as (name, fields); None if it is not as the top of this file says."""
    if not isinstance(row, dict) or not isinstance(row.get("file"), str):
        return None
    captions = row.get("captions") or [row.get("caption") or ""]
    synthetic = row.get("synthetic") or []
    if not are_texts(captions) or not are_texts(synthetic):
        return None
    alt_text, *longer = [caption.strip() for caption in captions + synthetic]
    fields = {k: row[k] for k in ("label", "label_name") if k in row}
    if isinstance(fields.get("label"), str) and fields["label"].isdigit():
        fields["label"] = int(fields["label"])
    return row["file"].removeprefix("./"), {
        "caption": alt_text, "synthetic": [caption for caption in longer if caption], **fields}


def are_texts(values):
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def is_image(name):
    return name.lower().rpartition(".")[2] in IMAGE_EXTENSIONS


def read_samples(files, captions, skipped):
    """Yields each Sample to pack; the names of others go into `skipped`, with the reason."""
    existing, seen = set(files.names), set()
    for name, fields in read_captions(files, captions, skipped):
        if name not in existing:
            skipped.append((name, "caption without picture"))
        elif name in seen:
            skipped.append((name, "named twice"))
        elif not fields["caption"] and not fields.get("synthetic"):
            skipped.append((name, "empty caption"))
        else:
            seen.add(name)
            try:
                yield Sample(name, files.read(name), fields)
            except Exception as error:  # a damaged or encrypted zip, a file without read permission
                skipped.append((name, type(error).__name__))


def prepare(sample, size):
    """The Sample with its image as it will be packed and the extension, or with the error.

    Every image is decoded, to be sure that it can be. Its bytes stay as they are unless it is
    shrunk or its format is not among EXTENSIONS.
    """
    try:
        image = open_image(sample.image)
        extension = EXTENSIONS.get(image.format)
        is_large = size and min(image.size) > size
        if extension and not is_large:
            image.load()
            return replace(sample, extension=extension)
        image = to_rgb(image)
        if is_large:
            scale = size / min(image.size)
            image = image.resize([max(size, round(side * scale)) for side in image.size])
        file = io.BytesIO()
        image.save(file, "JPEG", quality=92)
        return replace(sample, image=file.getvalue(), extension="jpg")
    except Exception as error:  # decoders fail in many ways; the reason goes into the manifest
        return replace(sample, image=b"", error=type(error).__name__)


def in_parallel(pool, function, items, block=1024):
    """`function` of each item, in order; only a block of items is in memory at a time."""
    items = iter(items)
    while some := list(islice(items, block)):
        yield from pool.imap(function, some, chunksize=16)


def write_shards(folder, samples, val, samples_per_shard, skipped):
    """Write samples into the shards folder/train and folder/val. Returns {split: how many}."""
    keys = set()
    with (ShardWriter(folder / "train", samples_per_shard) as train,
          ShardWriter(folder / "val", samples_per_shard) as held_out):
        for sample in samples:
            if sample.error:
                skipped.append((sample.name, sample.error))
                continue
            key = key_of(sample.name)
            if key in keys:
                key = sha1(sample.name)
            keys.add(key)
            caption = sample.fields.pop("caption")
            writer = held_out if in_val(sample.name, val) else train
            writer.write(key, sample.image, sample.extension, caption, sample.fields)
    return {"train": train.count, "val": held_out.count}


def key_of(name):
    """The name of a sample's members, without extension: no dots or slashes, at most 80 bytes."""
    key = name.rpartition(".")[0].replace("/", "_").replace(".", "_")
    return key if len(key.encode()) <= 80 else sha1(name)


def in_val(name, share):
    """Whether an image belongs to the validation split: a fixed function of its name."""
    return int(sha1(name)[:8], 16) / 2**32 < share


def sha1(name):
    return hashlib.sha1(name.encode()).hexdigest()


def pack(source, out, captions="", size=0, val=0.05, samples_per_shard=5000):
    """Pack a folder or zip into the new folder `out`, and return the manifest as a dict.

    A run that fails or is interrupted leaves nothing under the name `out`.

    Raises: ValueError if there is nothing to pack, or `out` exists.
    """
    if not 0 <= val < 1:
        raise ValueError(f"val={val} must be at least 0 and below 1: the share of the images for "
                         "validation")
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: choose another --out, or delete it first")
    files, skipped = open_source(source), []
    with replacing(out) as temporary:
        with multiprocessing.get_context("spawn").Pool(min(16, os.cpu_count() or 1)) as pool:
            samples = in_parallel(pool, partial(prepare, size=size),
                                  read_samples(files, captions, skipped))
            samples = tqdm(samples, total=sum(map(is_image, files.names)), unit="image",
                           desc=f"packing {out}", disable=None)
            counts = write_shards(temporary, samples, val, samples_per_shard, skipped)
        reasons = dict(Counter(reason for _, reason in skipped))
        if not any(counts.values()):
            raise ValueError(f"nothing to pack in {source}: {reasons}; captions come from "
                             "captions.jsonl, captions.csv or a .txt beside each image")
        manifest = {**counts, "skipped": reasons,
                    "skipped_names": [f"{name}: {reason}" for name, reason in skipped[:NAMED]],
                    "bytes": sum(p.stat().st_size for p in temporary.rglob("*.tar")),
                    "source": Path(source).name, "size": size, "val_share": val}
        text = json.dumps(manifest, indent=1) + "\n"
        (temporary / "manifest.json").write_text(text, encoding="utf-8")
    return manifest


def main(argv):
    options = Options(**read_flags(argv, Options, doc=__doc__, words="photos")[0])
    manifest = pack(options.photos[0], options.out, options.captions, options.size, options.val,
                    options.samples_per_shard)
    print(f"packed {manifest['train']:,} for training, {manifest['val']:,} for validation, "
          f"{manifest['bytes'] / 1e6:.1f} MB; skipped {sum(manifest['skipped'].values()):,} "
          f"{manifest['skipped'] or ''}")


if __name__ == "__main__":
    run_command(main)
