"""Public data sets: the layouts in which they are published, and the flags that read them."""

import json
import os
import re

import pytest
from helpers import ROOT, png, tiny_config, write_tar

from nano_aimv2.data.batches import TrainingData, describe
from nano_aimv2.data.mixture import open_sources, pick_caption
from nano_aimv2.data.shards import ShardWriter
from nano_aimv2.data.tokenizer import Tokenizer


def img2dataset(path, captions, image="jpg", **columns):
    """A shard as img2dataset writes it, with the files beside it. No caption: an empty .txt."""
    members = []
    for i, caption in enumerate(captions):
        about = {"caption": caption, "url": f"http://a.b/{i}", "key": f"{i:09}", "sha256": "0f",
                 "status": "success", "error_message": None, "exif": "{}", "width": 20,
                 **{name: texts[i] for name, texts in columns.items()}}
        members += [(f"{i:09}.{image}", png(i)), (f"{i:09}.txt", (caption or "").encode()),
                    (f"{i:09}.json", json.dumps(about, indent=4).encode())]
    failed = {"url": "http://gone", "status": "failed_to_download", "error_message": "404"}
    members.append((f"{len(captions):09}.json", json.dumps(failed).encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tar(path, members)
    path.with_suffix(".parquet").write_bytes(b"PAR1")
    path.with_name(f"{path.stem}_stats.json").write_text('{"status_dict": {"success": 2}}')


def coco(data):
    with ShardWriter(data / "coco/train") as writer:  # what pack.py writes
        for i in range(3):
            writer.write(f"{i:08}", png(i), "jpg", f"short {i}",
                         {"synthetic": [f"{k} of {i}" for k in range(4)]})


def mirror(folder, name, count):
    """Shards as pixparse publishes them, all in one folder: the first is written, the others are
    the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tar(folder / f"{name}-0000.tar", [
        ("0.jpg", png()), ("0.json", b'{"key": "0"}'), ("0.txt", f"of {name}".encode())])
    for i in range(1, count):
        os.link(folder / f"{name}-0000.tar", folder / f"{name}-{i:04}.tar")


def cc3m(data):
    mirror(data / "cc3m-wds", "cc3m-train", 576)
    mirror(data / "cc3m-wds", "cc3m-validation", 16)


def cc12m_mirror(data):
    mirror(data / "cc12m-wds", "cc12m-train", 5)


def by_img2dataset(name):
    def build(data):
        for shard in ("00000", "00001"):
            img2dataset(data / name / f"train/{shard}.tar", [f"a {shard}", f"b {shard}"])
    return build


def dfn2b_captioned(data):
    img2dataset(data / "dfn2b/train/00000.tar", ["a", "b", "c"],
                synthetic=[["long a", "longer a"], "long b", []])


def datacomp(data):
    for shard in ("00000000", "00000001"):
        img2dataset(data / f"datacomp/shards/small/{shard}.tar", [f"a {shard}", None],
                    uid=["0f", "1f"])
    (data / "datacomp/metadata/small").mkdir(parents=True)
    (data / "datacomp/metadata/small/0a.parquet").write_bytes(b"PAR1")


def recap(data):
    img2dataset(data / "recap/train/00000.tar", ["a", "b", None],
                re_caption=["long a", None, "long c"])


def pairs(data):
    (data / "pairs").mkdir(parents=True)
    write_tar(data / "pairs/00000.tar", [
        (f"{key}.{name}", png() if "jpg" in name else f"of {key}".encode())
        for key in ("x", "in/y.d/x", "z") for name in ("input.jpg", "outputs.txt")])


def llava(data):
    (data / "llava/a/b").mkdir(parents=True)
    for i, key in enumerate(("x", "y")):
        about = {"caption_llava": f"of {key}"} if i == 0 else {"label": 3}
        write_tar(data / f"llava/a/b/{i}.tar", [
            (f"{key}.webp", png()), (f"{key}.json", json.dumps(about).encode())])


SHORT = [[f"short {i}"] for i in range(3)]
LONG = [[f"{k} of {i}" for k in range(4)] for i in range(3)]
TWO_SHARDS = [[f"{key} {shard}"] for shard in ("00000", "00001") for key in "ab"]
CC3M = "data/cc3m-wds/cc3m-"


SETS = [
    (coco, "--data=data/coco:alt:1,data/coco:synthetic:4", [SHORT, LONG]),
    (cc3m, f"--data={CC3M}train-{{0000..0575}}.tar:alt:1", [[["of cc3m-train"]] * 576]),
    (cc3m, f"--val_data={CC3M}validation-{{0000..0015}}.tar:alt", [[["of cc3m-validation"]] * 16]),
    (cc12m_mirror, "--data=data/cc12m-wds:alt:1", [[["of cc12m-train"]] * 5]),
    (by_img2dataset("cc12m"), "--data=data/cc12m:alt:1", [TWO_SHARDS]),
    (by_img2dataset("coyo"), "--data=data/coyo:alt:1", [TWO_SHARDS]),
    (by_img2dataset("dfn2b"), "--data=data/dfn2b:alt:1", [TWO_SHARDS]),
    (dfn2b_captioned, "--data=data/dfn2b:alt:1,data/dfn2b:synthetic:1",
     [[["a"], ["b"], ["c"]], [["long a", "longer a"], ["long b"]]]),
    (datacomp, "--data=data/datacomp:alt:1", [[["a 00000000"], ["a 00000001"]]]),
    (recap, "--data=data/recap:re_caption:2,data/recap:alt:1",
     [[["long a"], ["long c"]], [["a"], ["b"]]]),
    (pairs, "--data=data/pairs:alt:1", [[["of x"], ["of in/y.d/x"], ["of z"]]]),
    (llava, "--data=data/llava:caption_llava:1", [[["of x"]]]),
]  # (what makes the layout, the flag, the captions of each sample of each source)


def test_every_flag_that_the_page_gives_for_a_public_set_is_tested_here():
    page = (ROOT / "data/README.md").read_text().partition("## Public sets")[2]
    assert sorted(re.findall(r"`'?(--\w+=[^'`]+)'?`", page)) == sorted(flag for _, flag, _ in SETS)


@pytest.mark.parametrize("build, flag, expected", SETS, ids=[flag for _, flag, _ in SETS])
def test_each_flag_reads_the_layout_of_its_public_set(build, flag, expected, tmp_path, monkeypatch):
    build(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    name, _, mixture = flag.partition("=")
    sources = open_sources(mixture, "val" if name == "--val_data" else "train")
    assert len(sources) == len(expected)
    for source, captions in zip(sources, expected, strict=True):
        for sample, several in zip(map(source.sample, range(len(source))), captions, strict=True):
            picked = [pick_caption(source, sample, Chosen(k)) for k in range(len(several))]
            assert picked == several and pick_caption(source, sample) == several[0]
    config = tiny_config(data=mixture, batch_size=6, steps=1)
    batch = TrainingData(config, Tokenizer(config.tokenizer))[0]
    assert len(batch.patches) == 6 and not batch.skipped


class Chosen:
    """A random generator that always draws k."""

    def __init__(self, k):
        self.k = k

    def integers(self, count):
        assert self.k < count, f"{count} captions"
        return self.k


def test_failed_downloads_are_reported_and_train_nothing(tmp_path):
    img2dataset(tmp_path / "x/00000.tar", ["a", "b"])
    config = tiny_config(data=f"{tmp_path}/x:caption", batch_size=2, steps=1)
    data = TrainingData(config, Tokenizer(config.tokenizer))
    (line,) = describe(data)
    assert "2 samples" in line and "skipped: {'caption without image': 1}" in line
