"""Pack a folder or a zip of captioned images into shards that `train.py --data=FOLDER` reads.

    python data/pack.py photos/ --out=data/photos      # photos/cat.jpg and photos/cat.txt, ...
    python data/pack.py photos.zip --out=data/photos --size=256    # shorter sides of at most 256 px

Captions come from the first of these that exists: the file of `--captions=FILE`, a `captions.jsonl`
or `captions.csv` at the top of the folder or zip, a .txt of the same name beside each image. A row
of a caption file has

    file        the image, relative to the folder or zip
    caption     its alt-text; or `captions`, a list: first the alt-text, then synthetic captions
    synthetic   optional: longer captions, a list (in a csv: with | between); a string is one
    label       optional: a class number, and `label_name`, for probes
    (others)    optional: any other text is a caption of a kind of that name

Whether an image goes into train/ or val/ depends only on a hash of its file name, so it stays there
when images are added. Images that cannot be read or have no caption, and rows that are not as
above, are skipped; manifest.json counts them by reason and names the first hundred. Every row is
packed or counted.
"""

import codecs
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the script finds the package
from nano_aimv2.data.images import STILL_FORMATS, open_image, to_rgb  # noqa: E402
from nano_aimv2.data.shards import ShardWriter, decode_text  # noqa: E402
from nano_aimv2.files import replacing  # noqa: E402
from nano_aimv2.flags import check_at_least, read_flags, run_command  # noqa: E402

csv.field_size_limit(2**31 - 1)  # 131,072 characters are too few for some captions
NAMED = 100  # skipped images that the manifest names
CAPTION_FILES = ("captions.jsonl", "captions.csv")
# Pillow's format: the extension in the shard. Other formats are packed as JPEG.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
# What a row says about its image. "objects" marks a toy scene and is left out.
FIELDS = {"file", "caption", "captions", "synthetic", "label", "label_name", "objects"}
MOST_LINES = 50  # of one row of a csv
IN_FLIGHT = 1024, 2**28  # images and bytes that are in memory at a time


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
    fields: dict  # caption, synthetic, label, label_name, other kinds of captions
    extension: str = ""
    error: str = ""  # why the image cannot be packed


def open_source(path):
    """The Files of a folder or zip, without what a Mac adds (__MACOSX, ._name).

    Raises: ValueError if `path` is neither, or a damaged zip.
    """
    if os.path.isdir(path):
        folder = Path(path)
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        return Files(wanted(names), lambda name: (folder / name).read_bytes())
    if zipfile.is_zipfile(path):
        try:
            archive = zipfile.ZipFile(path)
            names = [i.filename for i in archive.infolist() if not i.is_dir()]
        except Exception as error:  # zipfile fails in many ways
            raise ValueError(f"source {str(path)!r} is a damaged zip ({error}): copy or download "
                             "it again") from error
        return Files(wanted(names), archive.read)
    why = "is neither a folder nor a whole zip" if os.path.exists(path) else "does not exist"
    raise ValueError(f"source {str(path)!r} {why}: give a folder or a .zip of images")


def wanted(names):
    """The names sorted, without what a Mac adds."""
    return sorted(name for name in names
                  if not name.startswith("__MACOSX") and not Path(name).name.startswith("._"))


def read_captions(files, captions, skipped):
    """What is written about each image: yields (name, {"caption", "synthetic", "label", ...})."""
    name = captions or next((n for n in CAPTION_FILES if n in files.names), None)
    if name is None:
        yield from captions_beside(files, skipped)
        return
    try:
        data = Path(captions).read_bytes() if captions else files.read(name)
    except Exception as error:  # a damaged or encrypted zip, a name misspelt
        raise ValueError(f"{name} cannot be read ({error}): give a .jsonl or .csv of captions "
                         "that can, --captions=FILE") from error
    for number, row in parse_rows(str(name), lines_of(data), set(files.names)):
        checked = check_row(row)
        if checked:
            yield checked
        else:
            skipped.append((f"{name} line {number}", "unreadable row"))


def captions_beside(files, skipped):
    """Captions from the .txt beside each image: yields (name, {"caption"})."""
    stems = {name: name.rpartition(".")[0] for name in files.names}
    texts = {stems[name]: name for name in files.names if name.lower().endswith(".txt")}
    used = set()
    for name in filter(is_image, files.names):
        used.add(stems[name])
        if stems[name] not in texts:
            skipped.append((name, "no caption"))
            continue
        try:
            text = clean_text(decode_text(files.read(texts[stems[name]])))
        except Exception as error:  # a damaged or encrypted zip, a file without read permission
            skipped.append((texts[stems[name]], type(error).__name__))
            continue
        if text is None:
            skipped.append((texts[stems[name]], "unreadable caption"))
        else:
            yield name, {"caption": text}
    skipped += [(text, "caption without image") for stem, text in texts.items() if stem not in used]


def lines_of(data):
    """The lines of a caption file. Each is decoded alone: a damaged byte changes no other line."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return decode_text(data).split("\n")
    return [decode_text(line) for line in data.split(b"\n")]


def parse_rows(name, lines, existing):
    """(line number, row) of each row of a caption file; the row is None if it cannot be read.

    Args: name: says the format, JSON lines or csv; existing: names of the images.
    Raises: ValueError if a csv does not begin with the names of its columns.
    """
    if not name.lower().endswith(("json", "jsonl")):
        yield from parse_csv(name, lines, existing)
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def parse_csv(name, lines, existing):
    """`parse_rows` of a csv: a row that cannot be read changes no other.

    A caption in quotes may go over several lines. So may, by mistake, one whose closing quote is
    missing: a line within it that names an image is taken for a row of its own.
    """
    columns = [column.strip() for column in csv_cells(lines[:1]) or []]
    named = [column for column in columns if column]
    if ("file" not in named or not {"caption", "captions", "synthetic"} & set(named)
            or len(set(named)) < len(named)):
        raise ValueError(f"{name}: its first line, {lines[0][:60]!r}, must name the columns, each "
                         "once and with commas between: file,caption and perhaps "
                         "synthetic,label,label_name")
    where, first = columns.index("file"), 1
    while first < len(lines):
        end, cells = first + 1, None
        while end <= min(len(lines), first + MOST_LINES):
            cells = csv_cells(lines[first:end])
            if cells is not None or (end < len(lines)
                                     and names_image(lines[end], where, existing)):
                break
            end += 1
        if cells is None:  # not even over several lines
            end = first + 1
        row = None
        if cells is not None and len(cells) == len(columns):
            row = {column: cell for column, cell in zip(columns, cells, strict=True) if cell}
            if "synthetic" in row:
                row["synthetic"] = row["synthetic"].split("|")
        if cells is None or any(cell.strip() for cell in cells):  # not an empty line
            yield first + 1, row
        first = end


def csv_cells(lines):
    """The cells of one csv record, over one or several lines; None if it is not exactly one."""
    try:
        (cells,) = csv.reader([line.removesuffix("\r") + "\n" for line in lines], strict=True) \
            if any(line.strip() for line in lines) else [[]]
    except (csv.Error, ValueError):
        return None
    return cells


def names_image(line, where, existing):
    """Whether cell `where` of a line of a csv, taken alone, is the name of an image."""
    name = "".join(line.split(",")[where : where + 1]).strip().strip('"').removeprefix("./")
    return name in existing or is_image(name)


def check_row(row):
    """A row of a caption file as (name, fields); None if it is not as the top of this file says."""
    if not isinstance(row, dict) or not clean_text(row.get("file")):
        return None
    given = [row[k] for k in ("captions", "caption") if row.get(k) not in (None, "", [])]
    texts = [*as_list(given[0] if given else ""), *as_list(row.get("synthetic"))]
    texts = [clean_text(text) for text in texts]
    label, label_name = row.get("label"), row.get("label_name")
    if isinstance(label, str):  # from a csv
        with contextlib.suppress(ValueError):
            label = int(label)
    if type(label_name) in (int, float) and abs(label_name) < math.inf:
        label_name = str(label_name)
    label_name = clean_text("" if label_name is None else label_name)
    if None in (*texts, label_name) or not (label is None or type(label) is int):
        return None
    alt_text, *longer = texts
    fields = {"synthetic": [text for text in longer if text], "label": label,
              "label_name": label_name}
    fields |= {key: clean_text(value) for key, value in row.items()
               if key not in FIELDS and clean_text(key) and clean_text(value)}
    return row["file"].removeprefix("./"), {
        "caption": alt_text, **{k: v for k, v in fields.items() if v not in (None, "")}}


def as_list(value):
    """A list of captions: one that is not in a list is the only one; None stands for no caption."""
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


def clean_text(value):
    """A text without blanks around it; None if it is not one, or cannot be stored as UTF-8."""
    if not isinstance(value, str) or "\0" in value:
        return None
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return None
    return value.strip()


def is_image(name):
    """Whether the extension of a file is that of an image which can be packed."""
    extension = os.path.splitext(name)[1].lower()
    return Image.registered_extensions().get(extension) in STILL_FORMATS


def read_samples(files, captions, skipped):
    """Yields each Sample to pack; the names of others go into `skipped`, with the reason."""
    existing, seen = set(files.names), set()
    for name, fields in read_captions(files, captions, skipped):
        if name not in existing:
            skipped.append((name, "caption without image"))
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
        image = open_image(sample.image, STILL_FORMATS)
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


def in_parallel(pool, function, samples):
    """`function` of each Sample, in order; only those of IN_FLIGHT are in memory at a time."""
    block, size = [], 0
    for sample in samples:
        block.append(sample)
        size += len(sample.image)
        if len(block) == IN_FLIGHT[0] or size >= IN_FLIGHT[1]:
            yield from pool.map(function, block, chunksize=16)
            block, size = [], 0
    yield from pool.map(function, block, chunksize=16)


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
    return key if len(key.encode(errors="replace")) <= 80 and clean_text(key) else sha1(name)


def in_val(name, share):
    """Whether an image belongs to the validation split: a fixed function of its name."""
    return int(sha1(name)[:8], 16) / 2**32 < share


def sha1(name):
    return hashlib.sha1(name.encode(errors="surrogateescape")).hexdigest()


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
        # An executor, not a Pool: that would wait forever for a worker that is killed
        with ProcessPoolExecutor(min(16, os.cpu_count() or 1), get_context("spawn")) as pool:
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
