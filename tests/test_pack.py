"""A folder of images and texts becomes shards: what is packed, skipped, refused."""

import csv
import io
import json
import os
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import pytest
from damage import damaged
from helpers import assert_one_line, full_disk, run_script, run_together
from PIL import Image

import data.pack as pack_file
from data.pack import (
    Files,
    Sample,
    check_row,
    in_parallel,
    in_val,
    key_of,
    lines_of,
    main,
    open_source,
    pack,
    parse_rows,
    prepare,
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


def read(files, captions=""):
    """What is packed of {name: bytes}: ({name: fields}, [(name, why it was skipped)])."""
    skipped = []
    samples = read_samples(Files(sorted(files), files.__getitem__), captions, skipped)
    return {sample.name: sample.fields for sample in samples}, skipped


def read_table(name, data, images="abc"):
    """`read` of the images a.jpg, b.jpg, ... and one caption file."""
    data = data if isinstance(data, bytes) else data.encode()
    return read({name: data} | {f"{letter}.jpg": b"" for letter in images})


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


def zip_of_pairs(folder, *names):
    """A zip with NAME.jpg and NAME.txt of each name: (its path, {file: where it begins})."""
    path = folder / "p.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(f"{name}.jpg", encoded_image())
            file.writestr(f"{name}.txt", name)
        return path, {info.filename: info.header_offset for info in file.infolist()}


def test_a_damaged_member_of_a_zip_is_skipped_and_named(tmp_path):
    path, starts = zip_of_pairs(tmp_path, "good", "damaged")
    content = bytearray(path.read_bytes())
    content[starts["damaged.jpg"] + 300] ^= 255
    path.write_bytes(content)
    manifest = pack(path, tmp_path / "out", val=0)
    assert manifest["train"] == 1 and manifest["skipped_names"] == ["damaged.jpg: BadZipFile"]


def test_an_encrypted_zip_is_counted_and_not_a_crash(tmp_path):
    path, starts = zip_of_pairs(tmp_path, "open", "locked")
    content = bytearray(path.read_bytes())
    content[starts["locked.txt"] + 6] |= 1  # "encrypted", here and in the directory at the end
    content[content.rindex(b"locked.txt") - 46 + 8] |= 1
    path.write_bytes(content)
    manifest = pack(path, tmp_path / "out", val=0)
    assert manifest["train"] == 1 and manifest["skipped"] == {"RuntimeError": 1}
    assert manifest["skipped_names"] == ["locked.txt: RuntimeError"]


def zip_of_images(path, names="abcd"):
    """A zip with a.png, a.txt, ...; returns {name: bytes} of its files."""
    files = {}
    for i, letter in enumerate(names):
        files[f"{letter}.png"] = encoded_image((20 + i, 9), "PNG")
        files[f"{letter}.txt"] = f"image {letter}".encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return files


def test_no_damage_of_a_zip_changes_what_is_packed_of_it(tmp_path):
    files = zip_of_images(tmp_path / "p.zip")
    spared = 0
    for what, data in damaged((tmp_path / "p.zip").read_bytes(), 200):
        (tmp_path / "q.zip").write_bytes(data)
        try:
            source = open_source(tmp_path / "q.zip")
        except ValueError:  # refused as a whole
            continue
        skipped = []
        samples = list(read_samples(source, "", skipped))
        for sample in samples:
            if sample.name in files:
                assert sample.image == files[sample.name] or prepare(sample, 0).error, what
            if sample.name.replace("png", "txt") in files:
                text = files[sample.name.replace("png", "txt")].decode()
                assert sample.fields == {"caption": text}, what
        images = sum(map(pack_file.is_image, source.names))
        left_out = [name for name, why in skipped if why != "caption without image"]
        assert len(samples) + len(left_out) == images, what
        spared += len(samples)
    assert spared > 200, spared


def test_a_zip_with_a_password_is_skipped_and_its_captions_file_refused(tmp_path):
    zip_of_images(tmp_path / "p.zip")
    with zipfile.ZipFile(tmp_path / "p.zip", "a") as file:
        file.writestr("captions.csv", "file,caption\na.png,a\n")
    locked = bytearray((tmp_path / "p.zip").read_bytes())
    for magic, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # the flag "encrypted"
        for at in (i for i in range(len(locked)) if locked.startswith(magic, i)):
            locked[at + offset] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    source, skipped = open_source(tmp_path / "locked.zip"), []
    with pytest.raises(ValueError, match="captions.csv cannot be read.*password"):
        list(read_samples(source, "", skipped))
    source.names.remove("captions.csv")
    assert not list(read_samples(source, "", skipped))
    assert skipped == [(f"{letter}.txt", "RuntimeError") for letter in "abcd"]


def test_a_zip_that_is_cut_or_has_a_broken_directory_is_refused(tmp_path):
    zip_of_images(tmp_path / "p.zip")
    data = (tmp_path / "p.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="neither a folder nor a whole zip"):
        open_source(tmp_path / "cut.zip")
    (tmp_path / "broken.zip").write_bytes(data.replace(b"PK\1\2", b"PK\7\7"))
    with pytest.raises(ValueError, match="is a damaged zip.*copy or download it again"):
        open_source(tmp_path / "broken.zip")


def test_a_name_that_a_zip_has_twice_is_packed_once_and_counted(tmp_path):
    zip_of_images(tmp_path / "p.zip", "ab")
    with zipfile.ZipFile(tmp_path / "p.zip", "a") as file, pytest.warns(UserWarning, match="Dupl"):
        file.writestr("a.png", encoded_image((40, 40), "PNG"))
    skipped = []
    samples = list(read_samples(open_source(tmp_path / "p.zip"), "", skipped))
    assert [sample.name for sample in samples] == ["a.png", "b.png"]
    assert skipped == [("a.png", "named twice")]


@pytest.mark.parametrize("kind, extension", [
    ("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "jpg"), ("BMP", "jpg"),
    ("TIFF", "jpg"), ("PPM", "jpg"), ("EPS", ""), ("PDF", ""), ("ICO", "")])
def test_still_images_are_packed_and_no_other_format_is_opened(kind, extension):
    sample = prepare(Sample("a.jpg", encoded_image((16, 16), kind), {}), 0)
    assert sample.extension == extension and bool(sample.error) == (not extension)


def test_what_is_in_memory_is_bounded_by_bytes_and_by_number(monkeypatch):
    """Photographs of a camera: few at a time; thumbnails: many."""
    sizes = []

    class Pool:
        def map(self, function, block, chunksize):
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


def test_a_worker_that_is_killed_ends_the_run_instead_of_hanging_it(tmp_path):
    zip_of_images(tmp_path / "p.zip", "ab")
    samples = list(read_samples(open_source(tmp_path / "p.zip"), "", []))
    with ProcessPoolExecutor(1, get_context("spawn")) as pool, pytest.raises(BrokenProcessPool):
        list(in_parallel(pool, killed, samples))


def killed(sample):
    os._exit(9)


def test_a_full_disk_leaves_nothing_and_says_so(photos, tmp_path):
    with full_disk(room=100), pytest.raises(OSError, match="[Tt]oo large"):
        pack(photos, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


# Rows


@pytest.mark.parametrize("line", [
    *(f'{{"file": "b.jpg", {rest}}}' for rest in (
        '"caption": 5', '"caption": 0', '"caption": {"en": "x"}', '"caption": true',
        '"captions": {"0": "x"}', '"captions": ["x", 5]', '"captions": ["x", null]',
        '"captions": [["x"]]', '"captions": NaN', '"caption": "x", "synthetic": {}',
        '"caption": "x", "synthetic": 7', '"caption": "x", "synthetic": [{}]',
        '"caption": "x", "label": NaN', '"caption": "x", "label": Infinity',
        '"caption": "x", "label": 3.5', '"caption": "x", "label": true',
        '"caption": "x", "label": "cat"', '"caption": "x", "label": [3]',
        '"caption": "x", "label_name": NaN', '"caption": "x", "label_name": -Infinity',
        '"caption": "x", "label_name": ["cat"]', '"caption": "x", "label_name": true',
        r'"caption": "\ud800"', r'"caption": "x", "label_name": "\udfff"', r'"caption": "\u0000"',
        '"caption": "x", "label": ' + "9" * 5000, '"caption": "x", "label": "' + "9" * 5000 + '"',
        '"caption": ' + "[" * 100_000 + "]" * 100_000)),
    '{"file": 7, "caption": "x"}', '{"file": ["b.jpg"], "caption": "x"}', '{"caption": "x"}',
    '{"file": "", "caption": "x"}', r'{"file": "\ud800.jpg", "caption": "x"}', '["b.jpg", "x"]',
    '"b.jpg"', "null", "7", "[" * 100_000, '{"a":' * 100_000, "not JSON", "\x00"],
    ids=lambda line: line[:50])
def test_a_row_of_another_kind_is_unreadable_and_named_by_its_line(line):
    rows = [json.dumps({"file": f"{letter}.jpg", "caption": letter}) for letter in "ac"]
    packed, skipped = read_table("captions.jsonl", "\n".join([rows[0], "", line, rows[1]]))
    assert {name: fields["caption"] for name, fields in packed.items()} == {
        "a.jpg": "a", "c.jpg": "c"}
    assert skipped == [("captions.jsonl line 3", "unreadable row")]


def test_a_damaged_byte_does_not_change_how_other_rows_are_decoded():
    for name, head, row in (("captions.jsonl", b"", '{{"file": "{0}.jpg", "caption": "café {0}"}}'),
                            ("captions.csv", b"file,caption\n", "{0}.jpg,café {0}")):
        lines = [row.format(letter).encode() for letter in "abc"]
        lines[1] = lines[1].replace("é".encode(), b"\xe9")  # no longer UTF-8
        packed, skipped = read_table(name, head + b"\n".join(lines))
        assert [fields["caption"] for fields in packed.values()] == ["café a", "café b", "café c"]
        assert not skipped


@pytest.mark.parametrize("line, count", [
    ("b.jpg,a cat, sitting", 1), ("b.jpg", 1), (",b", 1), ('b.jpg,"an open quote', 1),
    ('b.jpg,"cut "here" and on"', 1), ('b.jpg,"two lines\nof a caption",surplus', 1),
    ('b.jpg,"open\nand three\nlines', 3), ('"b.jpg,b', 1), ("b.jpg,nul \x00", 1),
    ("b.jpg,a\rreturn", 1), ('gone.jpg,"open\nb.jpg,12"', 2), ('b.jpg,"open\ngone.jpg,12"', 2),
    ('b.jpg,"open\n"gone.jpg",12"', 2)])
@pytest.mark.parametrize("after", ["c.jpg,c", 'c.jpg,"c"', '"c.jpg","c"', '"./c.jpg",c'])
def test_a_malformed_row_of_a_csv_is_counted_and_changes_no_other(line, count, after):
    packed, skipped = read_table("captions.csv", f"file,caption\na.jpg,a\n{line}\n{after}\n")
    found = {name: fields["caption"] for name, fields in packed.items()}
    left_out = {name: why for name, why in skipped if "line" in name}
    assert found.pop("a.jpg") == "a" and found.pop("c.jpg") == "c"
    assert len(found) + len(skipped) == count, (found, skipped)
    assert found in ({}, {"b.jpg": '12"'}) and set(left_out.values()) <= {"unreadable row"}
    assert found or "captions.csv line 3" in left_out


def test_a_csv_as_spreadsheets_write_it_is_read_whole():
    rows = [["a.jpg", 'said "hi", then\nleft', "long, one|long two", "3"],
            ["b.jpg", "x" * 200_000, "", ""], ["c.jpg", "", "long", "-1"]]
    file = io.StringIO()
    csv.writer(file).writerows([["file", " caption", "synthetic", "label"], *rows, [""] * 4])
    packed, skipped = read_table("captions.csv", file.getvalue().encode("utf-8-sig") + b"\r\n")
    assert not skipped and packed == {
        "a.jpg": {"caption": 'said "hi", then\nleft', "synthetic": ["long, one", "long two"],
                  "label": 3},
        "b.jpg": {"caption": "x" * 200_000, "synthetic": []},
        "c.jpg": {"caption": "", "synthetic": ["long"], "label": -1}}


def test_another_extension_than_that_of_json_means_a_csv(tmp_path):
    for name in ("c.tsv", "c.txt"):
        (tmp_path / name).write_text("file\tcaption\na.jpg\ta\n")
        with pytest.raises(ValueError, match="with commas between"):
            read({"a.jpg": b""}, str(tmp_path / name))
    with pytest.raises(ValueError, match="gone.csv cannot be read.*--captions=FILE"):
        read({"a.jpg": b""}, str(tmp_path / "gone.csv"))


def test_extensions_count_as_what_they_are_and_what_a_mac_adds_is_left_out(tmp_path):
    names = ["A.JPG", "B.jfif", "C.TIFF", "D.Png", "e.gif", "f.bmp", "._A.JPG", "__MACOSX/._B.jfif"]
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as file:
        for name in names:
            file.writestr(name, b"")
            file.writestr(name.rpartition(".")[0] + (".TXT" if name < "D" else ".txt"), name)
    with zipfile.ZipFile(tmp_path / "p.zip") as file:
        file.extractall(tmp_path / "p")
    for source in ("p", "p.zip"):
        skipped = []
        samples = list(read_samples(open_source(tmp_path / source), "", skipped))
        assert [(sample.name, sample.fields["caption"]) for sample in samples] == [
            (name, name) for name in names[:6]]
        assert not skipped, skipped


def test_packed_and_left_out_are_together_all_images(photos):
    skipped, files = [], open_source(photos)
    packed = [prepare(sample, 0) for sample in read_samples(files, "", skipped)]
    errors = [sample for sample in packed if sample.error]
    images = [name for name in files.names if not name.endswith(".txt")]
    about_images = [name for name, why in skipped if why != "caption without image"]
    assert len(packed) + len(about_images) == len(images) and len(errors) == 1


ROWS = [(f"{letter}.jpg", f"{letter} " + ["café", "two words", "日本語"][i % 3])
        for i, letter in enumerate("abcdefghijkl")]
EXISTING = {name for name, _ in ROWS}


def intact_rows(name, data, records):
    """[(record, what became of it)] of those whose lines are all in the file, undamaged."""
    rows = dict(parse_rows(name, lines_of(data), EXISTING))
    lines = data.split(b"\n")
    for record in records:
        own = record.encode().split(b"\n")
        for k in range(len(lines)):
            if lines[k : k + len(own)] == own:
                yield record, check_row(rows.get(k + 1))


def check_damaged_tables(name, head, records):
    """200 damages of a caption file: the rows that they spare come out, and no row is lost."""
    whole = "\n".join([*head, *records, ""]).encode()
    expected = dict(intact_rows(name, whole, records))
    assert [(file, fields["caption"].replace("\n", " ")) for file, fields in expected.values()] \
        == ROWS
    spared = 0
    for what, data in damaged(whole, 200):
        is_head_damaged = head and data.split(b"\n")[0] != head[0].encode()
        try:
            number = len(list(parse_rows(name, lines_of(data), EXISTING)))
            packed, skipped = read({name: data} | dict.fromkeys(EXISTING, b""))
        except ValueError:
            assert is_head_damaged, what
            continue
        assert len(packed) + len(skipped) == number, what
        for record, row in intact_rows(name, data, records):
            assert row == expected[record] or (is_head_damaged and row is None), (what, record, row)
            spared += 1
    assert spared > 800, spared


def test_no_damage_of_a_jsonl_changes_the_rows_that_it_spares():
    check_damaged_tables("captions.jsonl", [], [
        json.dumps({"file": name, "captions": [text, "long"]}, ensure_ascii=False)
        for name, text in ROWS])


def test_no_damage_of_a_csv_changes_the_rows_that_it_spares():
    forms = ("{},{}", '{},"{}"', '"{}","{}"')
    records = [forms[i // 2 % 3].format(*row) for i, row in enumerate(ROWS)]
    records = [record.replace("two words", "two\nwords") if '"' in record else record
               for record in records]
    assert any("\n" in record for record in records)
    check_damaged_tables("captions.csv", ["file,caption"], records)


# The pack


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
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pack_file, "key_of", interrupt)
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
    exists, refused = run_together(
        ("data/pack.py", photos, f"--out={photos}"),
        ("data/pack.py", photos, f"--out={photos}/alone.jpg/out"))  # no folder can be made there
    assert_one_line(exists, "exists: choose another --out")
    assert_one_line(refused, "Not a directory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "photos"]


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
