"""Rows of caption files: each is packed or counted, and none changes its neighbour."""

import json

import pytest

from data.pack import Files, captions_beside, check_row, lines_of, parse_rows, read_samples

COUNT = 12
NAMES = [f"{i:02}.jpg" for i in range(COUNT)]
CAPTIONS = [f"caption {chr(97 + i) * 6}" for i in range(COUNT)]


def files_of(contents):
    return Files(sorted(contents), contents.__getitem__)


def read_rows(name, data):
    """(rows that were seen, {name: caption} of those to pack, what was skipped)."""
    skipped = []
    files = files_of({**dict.fromkeys(NAMES, b"image"), name: data})
    samples = list(read_samples(files, "", skipped))
    rows = list(parse_rows(name, lines_of(data), set(files.names)))
    return len(rows), {s.name: s.fields["caption"] for s in samples}, skipped


CSV = ("file,caption,label\n" + "".join(
    f'{n},"{c}, quoted",{i}\n' if i % 3 == 0 else f"{n},{c},{i}\n"
    for i, (n, c) in enumerate(zip(NAMES, CAPTIONS, strict=True)))).encode()


@pytest.mark.parametrize("line", [
    '05.jpg,"no closing quote,5', "05.jpg,one,two,three", "05.jpg", '05.jpg,"closed" too early,5',
    '"05.jpg,no end'])
def test_a_malformed_row_of_a_csv_is_counted_and_the_others_stay(line):
    lines = CSV.decode().splitlines()
    lines[6] = line
    seen, found, skipped = read_rows("captions.csv", "\n".join(lines).encode())
    assert seen == COUNT and len(found) == COUNT - 1 and "05.jpg" not in found
    assert skipped == [("captions.csv line 7", "unreadable row")]
    assert found["06.jpg"] == "caption gggggg, quoted" and found["07.jpg"] == "caption hhhhhh"


def test_a_caption_in_quotes_may_go_over_lines_and_have_any_length():
    long = "word " * 50_000
    data = f'file,caption\r\n00.jpg,"two\r\nlines, here"\r\n01.jpg,{long}\r\n\r\n02.jpg,x\r\n'
    _, found, skipped = read_rows("captions.csv", data.encode("utf-8-sig"))
    assert found == {"00.jpg": "two\nlines, here", "01.jpg": long.strip(), "02.jpg": "x"}
    assert not skipped


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("name", ["captions.jsonl", "captions.csv"])
def test_caption_files_of_editors_and_excel_are_read(name, encoding):
    text = ('{"file": "00.jpg", "caption": "café"}\n' if name.endswith("jsonl")
            else "file,caption\n00.jpg,café\n")
    assert read_rows(name, text.encode(encoding))[1] == {"00.jpg": "café"}


def test_a_line_separator_within_a_caption_does_not_split_its_row():
    row = json.dumps({"file": "00.jpg", "caption": "one\u2028two\x85three"}, ensure_ascii=False)
    rows, found, _ = read_rows("captions.jsonl", row.encode())
    assert rows == 1 and found == {"00.jpg": "one\u2028two\x85three"}


@pytest.mark.parametrize("header", ["file;caption", "file\tcaption", "name,caption", "file,label",
                                    "", "file,caption,file"])
def test_a_csv_without_the_columns_is_refused_and_says_which(header):
    with pytest.raises(ValueError, match="must name the columns.*file,caption"):
        read_rows("captions.csv", f"{header}\n00.jpg,x\n".encode())


@pytest.mark.parametrize("row, captions", [
    ({"caption": "one"}, ["one"]), ({"captions": "one"}, ["one"]),
    ({"captions": ["one", "two"]}, ["one", "two"]),
    ({"caption": "one", "synthetic": "two"}, ["one", "two"]),
    ({"caption": " one\n", "synthetic": [" two ", ""]}, ["one", "two"]),
    ({"synthetic": ["two"]}, ["", "two"])])
def test_a_string_is_one_caption_and_a_list_several(row, captions):
    name, fields = check_row({"file": "./a.jpg", **row})
    assert name == "a.jpg"
    assert [fields["caption"], *fields.get("synthetic", [])] == captions


@pytest.mark.parametrize("row", [
    {"caption": 7}, {"captions": {"a": "b"}}, {"captions": 7}, {"captions": ["a", 7]},
    {"caption": "a", "synthetic": {"a": "b"}}, {"caption": "a", "synthetic": [None]},
    {"caption": "\ud800"}, {"caption": "a\0b"}, {"caption": "a", "label": [1]},
    {"caption": "a", "label": float("nan")}, {"caption": "a", "label_name": ["x"]},
    {"caption": "a", "label_name": "\udfff"}, {"caption": "a", "file": 7},
    {"caption": "a", "file": None}])
def test_a_value_of_another_type_makes_an_unreadable_row(row):
    assert check_row({"file": "a.jpg", **row}) is None


@pytest.mark.parametrize("row", ["[]", "7", "null", '"x"', "[" * 100_000,
                                 '{"file": "00.jpg", "label": ' + "9" * 5000 + "}"])
def test_json_that_is_no_row_is_counted(row):
    rows, found, skipped = read_rows("captions.jsonl", row.encode())
    assert (rows, found) == (1, {}) and skipped == [("captions.jsonl line 1", "unreadable row")]


def test_any_other_text_of_a_row_is_a_kind_of_captions():
    _, fields = check_row({"file": "a.jpg", "caption": "x", "tone": " dark ", "n": 7, "empty": "",
                           "half": "\ud800", "\ud800": "half", "list": ["x"], "objects": "a cat"})
    assert fields == {"caption": "x", "synthetic": [], "tone": "dark"}


def test_a_numeric_label_name_becomes_text():
    _, fields = check_row({"file": "a.jpg", "caption": "x", "label": "3", "label_name": 7})
    assert fields["label"] == 3 and fields["label_name"] == "7"


def test_texts_beside_images_are_found_in_any_case_and_encoding_or_counted():
    def fail(name):
        if name == "locked.txt":
            raise RuntimeError("encrypted")
        return contents[name]

    contents = {"A.JPG": b"", "A.TXT": b"one", "b.jfif": b"", "b.txt": "zwei“".encode("cp1252"),
                "c.png": b"", "c.txt": "трі".encode("utf-16"), "d.png": b"", "d.txt": b"\x01\0\x02",
                "locked.webp": b"", "locked.txt": b"", "alone.jpg": b"", "orphan.txt": b"x",
                "notes.md": b"x"}
    skipped = []
    found = dict(captions_beside(Files(sorted(contents), fail), skipped))
    assert {name: fields["caption"] for name, fields in found.items()} == {
        "A.JPG": "one", "b.jfif": "zwei“", "c.png": "трі"}
    assert sorted(skipped) == [
        ("alone.jpg", "no caption"), ("d.txt", "unreadable caption"),
        ("locked.txt", "RuntimeError"), ("orphan.txt", "caption without image")]
