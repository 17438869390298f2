"""Pack a folder or a zip of captioned pictures into shards that `train.py --data=FOLDER` reads.

    python data/pack.py photos/ --out=data/photos                    # photos/cat.jpg with photos/cat.txt beside it
    python data/pack.py photos.zip --out=data/photos --size=256      # captions.jsonl inside; shorter side at most 256 px

Captions come from, in this order: `--captions=FILE`, a `captions.jsonl` or `captions.csv` at the top of the source, or a
.txt of the same name beside each picture. A row of a caption file has

    file        the picture, relative to the source
    caption     its alt-text; or `captions`, a list: the first is the alt-text, the others are synthetic
    synthetic   optional: longer captions, a list (in a csv: with | between)
    label       optional: a class number, and `label_name`, for probes

The split into train/ and val/ follows a hash of the file's name: it does not change when pictures are added. Pictures
that cannot be read or have no caption are left out, counted by reason and named in manifest.json.
"""

import argparse
import csv
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import zipfile
from collections import Counter
from itertools import islice
from pathlib import Path, PurePosixPath

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, this file sees the package beside its folder
from nano_aimv2.images import open_image, to_rgb  # noqa: E402
from nano_aimv2.shards import IMAGE_ENDINGS, ShardWriter, decode_text  # noqa: E402

NAMED = 100  # skipped pictures that the manifest names


class FolderSource:
    """Files below a folder: `names`, `read(name)`."""

    def __init__(self, path):
        self.path = Path(path)
        self.names = sorted(p.relative_to(path).as_posix() for p in self.path.rglob("*") if p.is_file())

    def read(self, name):
        return (self.path / name).read_bytes()


class ZipSource:
    """Members of a zip: `names`, `read(name)`."""

    def __init__(self, path):
        self.zip = zipfile.ZipFile(path)
        self.names = sorted(i.filename for i in self.zip.infolist() if not i.is_dir() and not i.filename.startswith("__MACOSX"))

    def read(self, name):
        return self.zip.read(name)


def open_source(path):
    """A folder or zip. Raises ValueError if it is neither."""
    if os.path.isdir(path):
        return FolderSource(path)
    if zipfile.is_zipfile(path):
        return ZipSource(path)
    why = "is neither a folder nor a zip" if os.path.exists(path) else "does not exist"
    raise ValueError(f"source {str(path)!r} {why}: give a folder or a .zip of pictures")


def read_rows(source, captions, skipped):
    """What is said about each picture: yields (name, {"caption", "synthetic", "label", ...})."""
    if captions:
        name, text = captions, decode_text(Path(captions).read_bytes())
    else:
        name = next((n for n in ("captions.jsonl", "captions.csv") if n in source.names), None)
        text = decode_text(source.read(name)) if name else None
    if text is None:
        names = set(source.names)
        for image in source.names:
            if is_image(image):
                beside = str(PurePosixPath(image).with_suffix(".txt"))
                if beside in names:
                    yield image, {"caption": decode_text(source.read(beside)).strip()}
                else:
                    skipped.append((image, "no caption"))
            elif image.endswith(".txt") and not any(f"{image[:-4]}.{ending}" in names for ending in IMAGE_ENDINGS):
                skipped.append((image, "caption without picture"))
    elif str(name).endswith(".csv"):
        for number, row in enumerate(csv.DictReader(io.StringIO(text)), 2):
            row = {k: v for k, v in row.items() if k and v not in (None, "")}
            if isinstance(row.get("synthetic"), str):
                row["synthetic"] = row["synthetic"].split("|")
            yield from checked_row(row, f"{name} line {number}", skipped)
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    row = None
                yield from checked_row(row, f"{name} line {number}", skipped)


def checked_row(row, where, skipped):
    """A caption file's row as (name, fields), or nothing and a reason in `skipped`."""
    if not isinstance(row, dict) or not isinstance(row.get("file"), str):
        skipped.append((where, "unreadable row"))
        return
    captions = row.get("captions") or ([row["caption"]] if row.get("caption") else [])
    synthetic = [*captions[1:], *(row.get("synthetic") or [])]
    if not all(isinstance(c, str) for c in [*captions, *synthetic]):
        skipped.append((where, "unreadable row"))
        return
    fields = {k: row[k] for k in ("label", "label_name") if k in row}
    if isinstance(fields.get("label"), str) and fields["label"].isdigit():
        fields["label"] = int(fields["label"])
    yield row["file"].removeprefix("./"), {"caption": captions[0].strip() if captions else "",
                                           "synthetic": [c.strip() for c in synthetic if c.strip()], **fields}


def is_image(name):
    return name.lower().rpartition(".")[2] in IMAGE_ENDINGS


def prepare(task):
    """(name, image bytes, fields, size) -> (name, bytes, ending, fields, None), or a reason in the last place.

    The picture is decoded once, whole, to be sure that it can be; its bytes are kept unless it is made smaller.
    """
    name, data, fields, size = task
    try:
        image = open_image(data)
        ending = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}.get(image.format)
        shrink = size and min(image.size) > size
        if ending and not shrink:
            image.load()
            return name, data, ending, fields, None
        image = to_rgb(image)
        if shrink:
            scale = size / min(image.size)
            image = image.resize([max(size, round(side * scale)) for side in image.size])
        file = io.BytesIO()
        image.save(file, "JPEG", quality=92)
        return name, file.getvalue(), "jpg", fields, None
    except Exception as error:  # decoders fail in many ways; the reason goes into the manifest
        return name, None, None, fields, type(error).__name__


def tasks(source, captions, size, skipped):
    """Everything to pack, one at a time; what cannot be packed goes into `skipped` with its reason."""
    names, seen = set(source.names), set()
    for name, fields in read_rows(source, captions, skipped):
        if name not in names:
            skipped.append((name, "caption without picture"))
        elif name in seen:
            skipped.append((name, "named twice"))
        elif not fields["caption"] and not fields.get("synthetic"):
            skipped.append((name, "empty caption"))
        else:
            seen.add(name)
            yield name, source.read(name), fields, size


def in_parallel(pool, function, items, block=1024):
    """`function` of each item, in order; only a block of items is in memory at a time."""
    items = iter(items)
    while some := list(islice(items, block)):
        yield from pool.imap(function, some, chunksize=16)


def key_of(name):
    """A tar member's name without ending: no dots and slashes, at most 80 characters."""
    key = name.rpartition(".")[0].replace("/", "_").replace(".", "_")
    return key if len(key.encode()) <= 80 else hashlib.sha1(name.encode()).hexdigest()


def in_val(name, share):
    """Whether a picture belongs to the validation split: a fixed function of its name."""
    return int(hashlib.sha1(name.encode()).hexdigest()[:8], 16) / 2**32 < share


def pack(source, out, captions=None, size=0, val=0.05, samples_per_shard=5000):
    """Pack; returns the manifest as a dict. An interrupted run leaves nothing under the name `out`.

    Raises: ValueError if there is nothing to pack, or `out` exists.
    """
    if not 0 <= val < 1:
        raise ValueError(f"val={val} must be at least 0 and below 1: the share of pictures kept for validation")
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: choose another --out, or delete it first")
    opened, skipped, counts, keys = open_source(source), [], Counter(), set()
    temporary = Path(f"{out}.{os.getpid()}.tmp")
    try:
        with ShardWriter(temporary / "train", samples_per_shard) as train, ShardWriter(temporary / "val", samples_per_shard) as \
                held_out, multiprocessing.get_context("spawn").Pool(min(16, os.cpu_count() or 1)) as pool, \
                tqdm(unit="picture", desc=f"packing {out}", total=sum(map(is_image, opened.names)), disable=None) as bar:
            for name, data, ending, fields, reason in in_parallel(pool, prepare, tasks(opened, captions, size, skipped)):
                bar.update()
                if reason:
                    skipped.append((name, reason))
                    continue
                key = key_of(name)
                if key in keys:
                    key = hashlib.sha1(name.encode()).hexdigest()
                keys.add(key)
                split = "val" if in_val(name, val) else "train"
                counts[split] += 1
                caption = fields.pop("caption")
                (held_out if split == "val" else train).write(key, data, ending, caption, fields)
        if not counts:
            raise ValueError(f"nothing to pack in {source}: {dict(Counter(reason for _, reason in skipped))}; captions come from "
                             "captions.jsonl, captions.csv or a .txt beside each picture")
        manifest = {"train": counts["train"], "val": counts["val"], "skipped": dict(Counter(reason for _, reason in skipped)),
                    "skipped_names": [f"{name}: {reason}" for name, reason in skipped[:NAMED]],
                    "bytes": sum(p.stat().st_size for p in temporary.rglob("*.tar")),
                    "source": Path(source).name, "size": size, "val_share": val}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pack captioned pictures into shards.", allow_abbrev=False)
    parser.add_argument("source", help="folder or zip")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--captions", help="a .jsonl or .csv of captions that is not inside the source")
    parser.add_argument("--size", type=int, default=0, help="shrink pictures whose shorter side is longer; 0: keep the files")
    parser.add_argument("--val", type=float, default=0.05, help="share of pictures for validation")
    parser.add_argument("--samples_per_shard", type=int, default=5000)
    try:
        result = pack(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"pack.py: {error}")
    print(f"packed {result['train']:,} for training, {result['val']:,} for validation, {result['bytes'] / 1e6:.1f} MB; "
          f"left out {sum(result['skipped'].values()):,} {result['skipped'] or ''}")
