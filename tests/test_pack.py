import io
import json
import zipfile

import pytest
from conftest import run_script
from PIL import Image

from data.pack import in_val, key_of, pack
from nano_aimv2.shards import Shards


def picture(size=(30, 20), kind="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 10)).save(file, kind)
    return file.getvalue()


def all_samples(folder):
    found = []
    for split in ("train", "val"):
        if list((folder / split).glob("*.tar")):
            shards = Shards(str(folder / split))
            found += [(shards.alt_text(i), shards.metadata(i), shards.image(i)) for i in range(len(shards))]
    return found


@pytest.fixture
def photos(tmp_path):
    """A folder as people have them: some good, some broken."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for i in range(6):
        (folder / f"cat {i}.jpg").write_bytes(picture())
        (folder / f"cat {i}.txt").write_text(f" cat number {i}\n")
    (folder / "deep/dog.v2.png").write_bytes(picture(kind="PNG"))
    (folder / "deep/dog.v2.txt").write_bytes("café dog".encode("latin-1"))
    (folder / "alone.jpg").write_bytes(picture())
    (folder / "orphan.txt").write_text("no picture")
    (folder / "blank.jpg").write_bytes(picture())
    (folder / "blank.txt").write_text("  ")
    (folder / "broken.jpg").write_bytes(picture()[:200])
    (folder / "broken.txt").write_text("half a picture")
    return folder


def test_a_folder_with_texts_is_packed_and_the_rest_is_counted(photos, tmp_path):
    manifest = pack(photos, tmp_path / "out", val=0.3)
    assert manifest["train"] + manifest["val"] == 7 and manifest["val"] > 0
    assert manifest["skipped"] == {"no caption": 1, "caption without picture": 1, "empty caption": 1, "OSError": 1}
    assert any("broken.jpg" in line for line in manifest["skipped_names"])
    captions = {text for text, _, _ in all_samples(tmp_path / "out")}
    assert captions == {f"cat number {i}" for i in range(6)} | {"café dog"}
    assert json.loads((tmp_path / "out/manifest.json").read_text())["train"] == manifest["train"]


def test_a_zip_with_captions_jsonl_keeps_synthetic_captions_and_labels(tmp_path):
    rows = [{"file": f"images/{i}.jpg", "captions": [f"alt {i}", f"long {i}"], "label": i, "label_name": "x"} for i in range(4)]
    lines = [json.dumps(row) for row in rows] + ["{broken", '{"nofile": 1}', json.dumps(rows[0]),
                                                 '{"file": "images/gone.jpg", "caption": "a"}']
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as file:
        for i in range(4):
            file.writestr(f"images/{i}.jpg", picture())
        file.writestr("captions.jsonl", "\n".join(lines))
    manifest = pack(tmp_path / "p.zip", tmp_path / "out", val=0)
    assert manifest["train"] == 4
    assert manifest["skipped"] == {"unreadable row": 2, "named twice": 1, "caption without picture": 1}
    text, metadata, data = all_samples(tmp_path / "out")[2]
    assert (text, metadata, data) == ("alt 2", {"synthetic": ["long 2"], "label": 2, "label_name": "x"}, picture())


def test_a_csv_outside_the_source_is_read(photos, tmp_path):
    (tmp_path / "c.csv").write_text("file,caption,synthetic,label\ncat 1.jpg,\"a cat, sitting\",long one|long two,3\n")
    pack(photos, tmp_path / "out", captions=str(tmp_path / "c.csv"), val=0)
    ((text, metadata, _),) = all_samples(tmp_path / "out")
    assert text == "a cat, sitting" and metadata == {"synthetic": ["long one", "long two"], "label": 3}


def test_pictures_are_shrunk_on_request_and_never_enlarged(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, size in (("large", (90, 60)), ("small", (12, 40))):
        (folder / f"{name}.jpg").write_bytes(picture(size))
        (folder / f"{name}.txt").write_text(name)
    pack(folder, tmp_path / "out", size=30, val=0)
    sizes = {text: Image.open(io.BytesIO(data)).size for text, _, data in all_samples(tmp_path / "out")}
    assert sizes == {"large": (45, 30), "small": (12, 40)}


def test_the_split_is_a_function_of_the_name():
    shares = [in_val(f"{i}.jpg", 0.1) for i in range(5000)]
    assert 400 < sum(shares) < 600 and shares == [in_val(f"{i}.jpg", 0.1) for i in range(5000)]
    assert key_of("a/b.c/d.jpg") == "a_b_c_d" and len(key_of("x" * 300 + ".jpg")) == 40


def test_an_interrupted_pack_leaves_nothing_of_that_name(photos, tmp_path, monkeypatch):
    import data.pack as module

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "key_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack(photos, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("source, message", [("nowhere", "does not exist"), ("photos/alone.jpg", "neither a folder nor a zip")])
def test_a_source_that_is_none_is_refused(photos, tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        pack(tmp_path / source, tmp_path / "out")


def test_nothing_to_pack_and_an_existing_folder_are_refused(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/alone.jpg").write_bytes(picture())
    with pytest.raises(ValueError, match="nothing to pack.*no caption"):
        pack(tmp_path / "empty", tmp_path / "out")
    done = run_script("data/pack.py", photos, f"--out={photos}", check=False)
    assert done.returncode != 0 and "exists: choose another --out" in done.stderr


def test_a_packed_folder_trains_and_is_validated(photos, tmp_path, tiny_flags):
    out = run_script("data/pack.py", photos, f"--out={tmp_path}/packed", "--val=0.3").stdout
    assert "packed" in out and "left out 4" in out
    flags = [flag for flag in tiny_flags if not flag.startswith(("--data=", "--steps="))]
    done = run_script("train.py", *flags, f"--data={tmp_path}/packed:alt:1", "--steps=3", f"--run={tmp_path}/run")
    assert "val_loss_text" in done.stdout + done.stderr
    assert (tmp_path / "run/samples.png").exists()
