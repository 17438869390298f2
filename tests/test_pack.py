"""A folder of images and texts becomes shards: what is packed, skipped, refused."""

import io
import json
import zipfile

import pytest
from damage import damaged
from helpers import full_disk, run_script
from PIL import Image

import data.pack as pack_file
from data.pack import (
    Sample,
    in_parallel,
    in_val,
    key_of,
    main,
    open_source,
    pack,
    read_samples,
)
from nano_aimv2.data.shards import Shards


def encoded_image(size=(30, 20), kind="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 10)).save(file, kind)
    return file.getvalue()


def all_samples(folder):
    found = []
    for split in ("train", "val"):
        if list((folder / split).glob("*.tar")):
            shards = Shards(str(folder / split))
            found += [(shards.alt_text(i), shards.metadata(i), shards.image(i))
                      for i in range(len(shards))]
    return found


@pytest.fixture
def photos(tmp_path):
    """A folder as people have them: some good, some broken."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for i in range(6):
        (folder / f"cat {i}.jpg").write_bytes(encoded_image())
        (folder / f"cat {i}.txt").write_text(f" cat number {i}\n")
    (folder / "deep/dog.v2.png").write_bytes(encoded_image(kind="PNG"))
    (folder / "deep/dog.v2.txt").write_bytes("café dog".encode("latin-1"))
    (folder / "alone.jpg").write_bytes(encoded_image())
    (folder / "orphan.txt").write_text("no image")
    (folder / "blank.jpg").write_bytes(encoded_image())
    (folder / "blank.txt").write_text("  ")
    (folder / "broken.jpg").write_bytes(encoded_image()[:200])
    (folder / "broken.txt").write_text("half an image")
    return folder


def test_a_folder_with_texts_is_packed_and_the_rest_is_counted(photos, tmp_path):
    manifest = pack(photos, tmp_path / "out", val=0.3)
    assert manifest["train"] + manifest["val"] == 7 and manifest["val"] > 0
    assert manifest["skipped"] == {"no caption": 1, "caption without image": 1,
                                   "empty caption": 1, "OSError": 1}
    assert any("broken.jpg" in line for line in manifest["skipped_names"])
    captions = {text for text, _, _ in all_samples(tmp_path / "out")}
    assert captions == {f"cat number {i}" for i in range(6)} | {"café dog"}
    assert json.loads((tmp_path / "out/manifest.json").read_text())["train"] == manifest["train"]


def test_a_zip_with_captions_jsonl_keeps_synthetic_captions_and_labels(tmp_path):
    rows = [{"file": f"images/{i}.jpg", "captions": [f"alt {i}", f"long {i}"], "label": i,
             "label_name": "x"} for i in range(4)]
    lines = [json.dumps(row) for row in rows]
    lines += ["{broken", '{"nofile": 1}', '{"file": "images/0.jpg", "captions": "again"}',
              json.dumps(rows[0]), '{"file": "images/gone.jpg", "caption": "a"}']
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as file:
        for i in range(4):
            file.writestr(f"images/{i}.jpg", encoded_image())
        file.writestr("captions.jsonl", "\n".join(lines))
    manifest = pack(tmp_path / "p.zip", tmp_path / "out", val=0)
    assert manifest["train"] == 4
    assert manifest["skipped"] == {"unreadable row": 2, "named twice": 2,
                                   "caption without image": 1}
    assert manifest["train"] + sum(manifest["skipped"].values()) == len(lines)
    text, metadata, data = all_samples(tmp_path / "out")[2]
    assert metadata == {"synthetic": ["long 2"], "label": 2, "label_name": "x"}
    assert (text, data) == ("alt 2", encoded_image())


def test_a_damaged_member_of_a_zip_is_skipped_and_named(tmp_path):
    path = tmp_path / "p.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("good", "damaged"):
            file.writestr(f"{name}.jpg", encoded_image())
            file.writestr(f"{name}.txt", name)
        offset = file.getinfo("damaged.jpg").header_offset
    content = bytearray(path.read_bytes())
    content[offset + 300] ^= 255
    path.write_bytes(content)
    manifest = pack(path, tmp_path / "out", val=0)
    assert manifest["train"] == 1 and manifest["skipped_names"] == ["damaged.jpg: BadZipFile"]


def test_an_encrypted_zip_is_counted_and_not_a_crash(tmp_path):
    path = tmp_path / "p.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("open", "locked"):
            file.writestr(f"{name}.jpg", encoded_image())
            file.writestr(f"{name}.txt", name)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        at = file.getinfo("locked.txt").header_offset
    content[at + 6] |= 1  # "encrypted", here and in the directory at the end
    content[content.rindex(b"locked.txt") - 46 + 8] |= 1
    path.write_bytes(content)
    manifest = pack(path, tmp_path / "out", val=0)
    assert manifest["train"] == 1 and manifest["skipped"] == {"RuntimeError": 1}
    assert manifest["skipped_names"] == ["locked.txt: RuntimeError"]


def test_no_damage_to_a_zip_is_a_crash(tmp_path):
    path = tmp_path / "p.zip"
    with zipfile.ZipFile(path, "w") as file:
        for i in range(3):
            file.writestr(f"{i}.jpg", b"image")
            file.writestr(f"{i}.txt", f"number {i}")
    whole, refused = path.read_bytes(), 0
    for _, content in damaged(whole, 210):
        path.write_bytes(content)
        try:
            files, skipped = open_source(path), []
            found = list(read_samples(files, "", skipped))
        except ValueError:
            refused += 1
            continue
        assert len(found) <= 3
    assert refused < 150


def test_what_is_in_memory_is_bounded_by_bytes_and_by_number(monkeypatch):
    """Photographs of a camera: few at a time; thumbnails: many."""
    sizes = []

    class Pool:
        def imap(self, function, block, chunksize):
            sizes.append(len(block))
            return map(function, block)

    def samples(count, size):
        return (Sample(f"{i}", bytes(size), {}) for i in range(count))

    monkeypatch.setattr(pack_file, "IN_FLIGHT", (10, 1000))
    assert len(list(in_parallel(Pool(), len_of, samples(25, 300)))) == 25
    assert max(sizes) == 4 and sum(sizes) == 25
    sizes.clear()
    assert len(list(in_parallel(Pool(), len_of, samples(25, 1)))) == 25
    assert max(sizes) == 10 and sum(sizes) == 25


def len_of(sample):
    return len(sample.image)


def test_a_full_disk_leaves_nothing_and_says_so(photos, tmp_path):
    with full_disk(room=100), pytest.raises(OSError, match="[Tt]oo large"):
        pack(photos, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_case_of_a_file_extension_does_not_matter(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/CAT.JPG").write_bytes(encoded_image())
    (tmp_path / "in/CAT.txt").write_text("a cat")
    manifest = pack(tmp_path / "in", tmp_path / "out", val=0)
    assert manifest["train"] == 1 and manifest["skipped"] == {}


def test_a_csv_outside_the_source_is_read(photos, tmp_path):
    (tmp_path / "c.csv").write_text(
        'file,caption,synthetic,label\ncat 1.jpg,"a cat, sitting",long one|long two,3\n')
    pack(photos, tmp_path / "out", captions=str(tmp_path / "c.csv"), val=0)
    ((text, metadata, _),) = all_samples(tmp_path / "out")
    assert text == "a cat, sitting"
    assert metadata == {"synthetic": ["long one", "long two"], "label": 3}


def test_images_are_shrunk_on_request_and_never_enlarged(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, size in (("large", (90, 60)), ("small", (12, 40))):
        (folder / f"{name}.jpg").write_bytes(encoded_image(size))
        (folder / f"{name}.txt").write_text(name)
    pack(folder, tmp_path / "out", size=30, val=0)
    sizes = {text: Image.open(io.BytesIO(data)).size
             for text, _, data in all_samples(tmp_path / "out")}
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


@pytest.mark.parametrize("source, message", [
    ("nowhere", "does not exist"), ("photos/alone.jpg", "neither a folder nor a whole zip")])
def test_a_source_that_is_neither_folder_nor_zip_is_refused(photos, tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        pack(tmp_path / source, tmp_path / "out")


def test_nothing_to_pack_and_an_existing_folder_are_refused(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/alone.jpg").write_bytes(encoded_image())
    with pytest.raises(ValueError, match="nothing to pack.*no caption"):
        pack(tmp_path / "empty", tmp_path / "out")
    done = run_script("data/pack.py", photos, f"--out={photos}", check=False)
    assert done.returncode != 0 and "exists: choose another --out" in done.stderr


@pytest.mark.parametrize("argv, message", [
    (["--out=x"], "0 folders or zips given, exactly one"),
    (["a", "b", "--out=x"], "2 folders or zips given, exactly one"),
    (["a"], "no --out"),
    (["a", "--out=x", "--samples-per-shard", "0"], "samples_per_shard=0 must be at least 1"),
    (["a", "--out=x", "--shards=3"], "unknown flag --shards")])
def test_a_command_line_that_cannot_be_meant_is_refused(argv, message):
    with pytest.raises(ValueError, match=message):
        main(argv)


@pytest.mark.slow
def test_a_packed_folder_trains_and_is_validated(photos, tmp_path, tiny_flags):
    out = run_script("data/pack.py", photos, f"--out={tmp_path}/packed", "--val=0.3").stdout
    assert "packed" in out and "skipped 4" in out
    flags = [flag for flag in tiny_flags if not flag.startswith(("--data=", "--steps="))]
    done = run_script("train.py", *flags, f"--data={tmp_path}/packed:alt:1", "--steps=3",
                      f"--run_dir={tmp_path}/run")
    assert "val_loss_text" in done.stdout + done.stderr
    assert (tmp_path / "run/samples.png").exists()
