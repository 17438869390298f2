"""Shards and their index: any number of tars, as other tools write them and as disks spoil them."""

import gzip
import json
import multiprocessing
import os
import pickle
import re
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from damage import damaged
from helpers import ROOT, full_disk, png, run_script, simple_shards, write_tar

from nano_aimv2.data import tar_index
from nano_aimv2.data.mixture import open_sources
from nano_aimv2.data.shards import Shards, ShardWriter, decode_text, expand_braces, find_shards
from nano_aimv2.data.tar_index import open_index, read_index

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10240\n"

# Shards as other tools write them, and as they break


def test_img2dataset_output_is_read_as_it_is(tmp_path):
    members = []
    metadata = json.dumps({"url": "x", "status": "success"}).encode()
    for i in range(3):
        members += [(f"00000000{i}.jpg", png(i)), (f"00000000{i}.json", metadata),
                    (f"00000000{i}.txt", f"caption {i}".encode())]
    write_tar(tmp_path / "00000.tar", members)
    (tmp_path / "00000.parquet").write_bytes(b"x")
    (tmp_path / "00000_stats.json").write_text("{}")
    found = Shards(str(tmp_path))
    assert len(found) == 3 and found.alt_text(2) == "caption 2" and found.image(1) == png(1)
    assert not any(found.report.values())


@pytest.mark.parametrize("names, samples, left", [
    ("photo.v2.jpg photo.v2.txt", "photo.v2.jpg", {}),
    ("x.input.jpg x.outputs.txt x.json", "x.input.jpg", {}),
    ("x.outputs.txt x.input.jpg a.b/x.jpg a.b/x.seg.txt", "x.input.jpg a.b/x.jpg", {}),
    ("2024.01.02.jpg 2024.01.02.txt 2024.01.03.jpg 2024.01.03.txt",
     "2024.01.02.jpg 2024.01.03.jpg", {}),
    ("x.jpg x.seg.png x.json", "x.jpg", {"image without caption": 1}),
    ("x.a.jpg x.b.jpg x.a.txt", "x.a.jpg", {"image without caption": 1}),
    ("x.a.jpg x.b.jpg x.txt y.jpg y.txt", "y.jpg",
     {"image without caption": 2, "caption without image": 1}),
    ("x.jpg x.txt x.jpg", "x.jpg", {"duplicate key": 1}),
    ("a/.x.jpg a/.y.txt z.jpg z.txt", "z.jpg",
     {"image without caption": 1, "caption without image": 1}),
    ("a.b/x.jpg a.b/y.txt z.jpg z.txt", "z.jpg",
     {"image without caption": 1, "caption without image": 1})])
def test_names_with_several_dots_are_one_sample_only_where_no_two_images_or_texts_meet(
        names, samples, left, tmp_path):
    """A caption holds the name of its member, and an image a number of its own."""
    names = names.split()
    write_tar(tmp_path / "x.tar", [
        (name, b"{}" if "json" in name else name.encode() if "txt" in name else png(i))
        for i, name in enumerate(names)])
    found = Shards(str(tmp_path / "x.tar"))
    assert [found.name(i).rpartition("tar:")[2] for i in range(len(found))] == samples.split()
    assert {reason: n for reason, n in found.report.items() if n} == left
    for i, name in enumerate(samples.split()):
        assert found.image(i) == png(names.index(name))
        text = found.alt_text(i)
        assert text == "" or text.partition(".")[0] == name.partition(".")[0]
        assert text.count(".v2") == name.count(".v2") and text.count("3.txt") == name.count("3.jpg")


def test_what_is_not_a_sample_is_counted(tmp_path):
    members = [("a.png", png(1)), ("a.txt", b"first"), ("a.png", png(2)), ("b.png", png(3)),
               ("c.txt", b"no image"), ("d.png", png(4)),
               ("d.json", b'{"synthetic": ["only long"]}'), ("folder/e.f.png", png(5)),
               ("notes.md", b"x")]
    write_tar(tmp_path / "x.tar", members)
    for _ in range(2):  # made, then from the index file
        found = Shards(str(tmp_path / "x.tar"))
        assert len(found) == 2 and found.image(0) == png(1)
        assert found.metadata(1) == {"synthetic": ["only long"]}
        assert {reason: n for reason, n in found.report.items() if n} == {
            "image without caption": 2, "caption without image": 1, "duplicate key": 1}
        assert not found.damaged


def test_extensions_in_capitals_and_jfif_count_and_forks_of_a_mac_do_not(tmp_path):
    write_tar(tmp_path / "x.tar", [
        ("a.PNG", png(1)), ("a.TXT", b"one"), ("._a.png", b"fork"), ("._a.txt", b"fork"),
        ("in/b.jfif", png(2)), ("in/b.txt", b"two"), ("in/._b.txt", b"fork"),
        ("c.JPEG", png(3)), ("c.Json", b'{"synthetic": "three"}')])
    found = Shards(str(tmp_path))
    assert [found.name(i).rpartition(":")[2] for i in range(len(found))] == [
        "a.PNG", "in/b.jfif", "c.JPEG"]
    assert [found.alt_text(0), found.alt_text(1)] == ["one", "two"]
    assert not any(found.report.values())


@pytest.mark.parametrize("data, text", [
    ("café, naïve", "utf-8"), ("café", "utf-8-sig"), ("café", "utf-16"), ("“café” €", "cp1252"),
    ("\x81\xe9", "latin-1"), ("日本", "utf-16-be")])
def test_captions_are_decoded_from_what_editors_write(data, text, tmp_path):
    content = data.encode(text)
    content = b"\xfe\xff" + content if text == "utf-16-be" else content
    assert decode_text(content) == data
    write_tar(tmp_path / "x.tar", [("a.png", png()), ("a.txt", content)])
    assert Shards(str(tmp_path / "x.tar")).alt_text(0) == data


def test_the_index_knows_every_key_that_holds_captions(tmp_path):
    values = [{"caption": "x", "url": "http"}, {"caption": ["x", "y"], "label": 3},
              {"caption": [], "re": " "}, {"re": {"a": "b"}, "caption": [1]}, {"re": ["", "z"]}]
    with ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for i, metadata in enumerate(values):
            writer.write(f"{i}", png(), "png", "alt" if i != 3 else "", metadata)
    index = Shards(str(tmp_path)).index
    assert {kind: index.count(kind) for kind in index.kinds} == {
        "alt": 4, "caption": 2, "re": 1, "url": 1}
    assert [index.nth("alt", i) for i in range(4)] == [0, 1, 2, 4]
    assert [index.nth("caption", i) for i in range(2)] == [0, 1] and index.nth("re", 0) == 4
    assert index.count("unknown") == 0


def test_more_keys_than_an_index_has_room_for_leave_the_commonest(tmp_path):
    with ShardWriter(tmp_path, samples_per_shard=3) as writer:
        for i in range(7):
            keys = {f"key {k:02}": "text" for k in range(i * 12, i * 12 + 12)}
            writer.write(f"{i}", png(), "png", "alt", {**keys, "synthetic": "long"})
    index = Shards(str(tmp_path)).index
    assert len(index.kinds) == 64 and index.count("alt") == index.count("synthetic") == 7


def test_the_nth_sample_of_a_kind_is_found_among_many(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index, "GROUP", 8)
    rng = np.random.default_rng(0)
    has = rng.random(203) < 0.3
    has[40:90] = False  # whole groups without
    with ShardWriter(tmp_path, samples_per_shard=50) as writer:
        for i in range(len(has)):
            writer.write(f"{i}", b"x", "png", "a", {"synthetic": "b"} if has[i] else {})
    for _ in range(2):  # made, then mapped
        index = Shards(str(tmp_path)).index
        assert index.count("synthetic") == has.sum()
        found = [index.nth("synthetic", i) for i in range(has.sum())]
        assert found == np.flatnonzero(has).tolist()


# Damaged tars


def folder_with(path, content):
    path.mkdir(exist_ok=True)
    (path / "00000.tar").write_bytes(content)
    return str(path)


def test_no_damage_to_a_tar_loses_a_sample_in_silence(tmp_path):
    """Headers have a checksum: a sample is whole, or the report says that something is missing."""
    simple_shards(tmp_path / "whole", 4)
    whole = (tmp_path / "whole/00000.tar").read_bytes()
    images = {png(i) for i in range(4)}
    for what, content in damaged(whole, 210):
        part = tar_index.walk(folder_with(tmp_path / "damaged", content), "00000.tar")
        (tar,) = part.tars
        assert tar.samples <= 4 and tar.samples == len(part.masks), what
        assert tar.samples == 4 or any(tar.counts.values()) or tar.note, what
        offsets = part.members[:, 1].tolist()
        sizes = part.members[:, 2].tolist()
        found = [content[at : at + size] for at, size in zip(offsets, sizes, strict=True)]
        if "flipped" not in what:  # a single bit inside an image stays unseen here
            assert len(images & set(found)) >= tar.samples - 1, f"{what}: images not at their place"


def test_no_damage_to_long_names_loses_a_sample_in_silence(tmp_path):
    """Names beyond 100 bytes lie in members of their own (GNU and pax)."""
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "x.tar"
        with tarfile.open(path, "w", format=form) as tar:
            for i in range(3):
                for end in (".png", ".txt"):
                    info = tarfile.TarInfo("ö" * 120 + f"{i}{end}")
                    content = tmp_path / "content"
                    content.write_bytes(png(i) if end == ".png" else b"text")
                    info.size = content.stat().st_size
                    with open(content, "rb") as file:
                        tar.addfile(info, file)
        whole = path.read_bytes()
        assert tar_index.walk(str(tmp_path), "x.tar").tars[0].samples == 3
        for what, content in damaged(whole, 100, seed=1):
            (tar,) = tar_index.walk(folder_with(tmp_path / "bad", content), "00000.tar").tars
            named = re.fullmatch(r".*: (flipped bit|noise|zeros), .*", what)  # a name may change
            assert tar.samples == 3 or any(tar.counts.values()) or named, what
            assert tar.samples <= 3, what


@pytest.mark.parametrize("at, samples, unread", [
    ("a header", 3, 1024), ("between members", 2, 0), ("inside a header", 2, 0),
    ("inside an image", 2, 0)])
def test_what_is_behind_a_damage_is_read_and_the_gap_is_counted(at, samples, unread, tmp_path):
    """Each member takes two blocks here: its header and its content."""
    simple_shards(tmp_path / "a", 4)
    content = bytearray((tmp_path / "a/00000.tar").read_bytes())
    third = 2 * 3 * 1024  # where the third sample begins: image, text, json
    if at == "a header":
        content[third] ^= 1
    else:
        del content[third + {"between members": 0, "inside a header": 100,
                             "inside an image": 600}[at] :]
    found = Shards(folder_with(tmp_path / "bad", bytes(content)))
    assert len(found) == samples
    if at == "a header":
        assert found.report["bytes not read"] == unread
        assert found.report["caption without image"] == 1
    else:
        assert found.report["tar cut short"] == 1
    assert "00000.tar: damaged" in found.damaged[0] and "bytes not read" in found.damaged[0]
    assert found.image(len(found) - 1) == png(3 if at == "a header" else 1)


def test_a_hole_of_zeros_does_not_end_a_tar(tmp_path):
    simple_shards(tmp_path / "a", 4)
    content = bytearray((tmp_path / "a/00000.tar").read_bytes())
    content[1024 : 1024 + 2048] = bytes(2048)
    found = Shards(folder_with(tmp_path / "bad", bytes(content)))
    assert len(found) == 3 and found.report["bytes not read"] == 2048


@pytest.mark.parametrize("content, why", [
    (gzip.compress(bytes(2000)), "compressed: unpack"), (LFS_POINTER, "a Git LFS pointer"),
    (b"hello " * 500, "damaged"), (b"", "damaged")])
def test_a_file_that_is_no_tar_is_called_what_it_is(content, why, tmp_path):
    simple_shards(tmp_path, 7)
    (tmp_path / "00001.tar").write_bytes(content)
    found = Shards(str(tmp_path))
    assert len(found) == 7 and len(found.damaged) == 1
    assert f"00001.tar: {why}" in found.damaged[0]
    assert found.report["bytes not read"] == len(content)
    with pytest.raises(ValueError, match=f"no sample: .*{why}"):
        Shards(str(tmp_path / "00001.tar"))


def test_a_disk_that_fails_while_a_tar_is_read_is_no_damage_of_the_tar(tmp_path, monkeypatch):
    simple_shards(tmp_path, 3)

    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(tar_index.tarfile, "open", fail)
    with pytest.raises(OSError, match="Input/output"):
        Shards(str(tmp_path))
    assert not list(tmp_path.glob("*.idx"))


# Where shards lie, and the index file


@pytest.mark.parametrize("path, message", [
    ("nowhere", "'.*nowhere' does not exist"), (".", "has no .tar files")])
def test_a_missing_path_says_what_to_give(tmp_path, path, message):
    with pytest.raises(ValueError, match=message):
        find_shards(str(tmp_path / path))


def test_a_pattern_names_tars_of_several_folders(tmp_path):
    for name in ("a", "b"):
        simple_shards(tmp_path / name, 9, name)
    found = Shards(str(tmp_path / "*" / "00001.tar"))
    assert [found.alt_text(i) for i in range(len(found))] == [
        "alt a 7", "alt a 8", "alt b 7", "alt b 8"]
    assert len(Shards(str(tmp_path / "?" / "*.tar"))) == 18
    assert len(list(tmp_path.glob("*.idx"))) == 2, "one for each pattern"


def test_the_tars_of_subfolders_are_read_where_a_folder_has_none(tmp_path):
    for name in ("b", "a/deep", "a/.cache", "val", "a/test"):
        simple_shards(tmp_path / "data" / name, 8, name[0])
    (tmp_path / "data/b/._00000.tar").write_bytes(b"fork")
    names = ["a/deep/00000.tar", "a/deep/00001.tar", "b/00000.tar", "b/00001.tar"]
    assert find_shards(f"{tmp_path}/data") == [f"{tmp_path}/data/{name}" for name in names]
    for _ in range(2):  # made, then mapped
        found = Shards(f"{tmp_path}/data")
        assert len(found) == 16 and found.alt_text(15) == "alt b 7" and found.index.file
    simple_shards(tmp_path / "data", 3, "top")
    assert find_shards(f"{tmp_path}/data/") == [f"{tmp_path}/data/00000.tar"]


def test_what_is_validated_on_is_not_trained_on_where_a_folder_holds_nothing_else(tmp_path):
    simple_shards(tmp_path / "val", 3)
    with pytest.raises(ValueError, match="no .tar files outside of subfolders named train, val"):
        find_shards(str(tmp_path))
    (tmp_path / "val").rename(tmp_path / "train")
    with pytest.raises(ValueError, match="no .tar files outside"):
        open_sources(f"{tmp_path}:alt", "val")


@pytest.mark.parametrize("pattern, names", [
    ("{00000..00002}.tar", "00000 00001 00002"), ("{9..11}.tar", "9 10 11"),
    ("{08..11}.tar", "08 09 10 11"), ("{0..0}.tar", "0"), ("{00..100}.tar", "000 099 100"),
    ("{b,a}.tar", "a b"), ("a-{0..1}-{x,y}.tar", "a-0-x a-0-y a-1-x a-1-y"), ("x.tar", "x")])
def test_braces_are_expanded_as_by_a_shell(pattern, names):
    found = expand_braces(pattern)
    expected = [f"{name}.tar" for name in names.split()]
    if pattern == "{00..100}.tar":
        assert len(found) == 101 and [found[0], found[99], found[100]] == expected
    else:
        assert sorted(found) == sorted(expected)


def test_a_pattern_with_braces_reads_the_tars_that_its_folder_does(tmp_path):
    simple_shards(tmp_path, 30)
    whole = Shards(str(tmp_path))
    for path in ("{00000..00004}.tar", "0000{4,2,3,0,1}.tar", "{*1,*[0234]}.tar"):
        path = f"{tmp_path}/{path}"
        found = Shards(path)
        assert found.fingerprint == whole.fingerprint and found.alt_text(29) == "alt a 29"
    few = Shards(f"{tmp_path}/{{00001..00002}}.tar")
    assert [few.alt_text(i) for i in (0, 13)] == ["alt a 7", "alt a 20"]
    (source,) = open_sources(f"{tmp_path}/{{00000,00002}}.tar:synthetic:1")
    assert len(source) == 14
    (tmp_path / "00000.tar").rename(tmp_path / "{odd.tar")
    assert len(Shards(f"{tmp_path}/{{odd.tar")) == 7, "a file of this very name"


@pytest.mark.parametrize("pattern, message", [
    ("{00000..0124.tar", "^'{00000..0124.tar' in a .* has no closing brace: write {00000"),
    ("{00012..00003}.tar", "^'{00012..00003}' in .* neither a range that counts up.* nor a list"),
    ("{..5}.tar", "'{..5}'"), ("{5..}.tar", "'{5..}'"), ("{}.tar", "'{}'"), ("{a}.tar", "'{a}'"),
    ("{a,{b,c}}.tar", "^'{a,{b,c}'"), ("{0..9999999999999}.tar", "at most 1,000,000 numbers"),
    ("{0..9..2}.tar", "^'{0..9..2}'"), ("a{0..1}{.tar", "^'{.tar' .* no closing brace"),
    ("{a,b.tar", "^'{a,b.tar' .* no closing brace"),
    ("{00000..00007}.tar", "'.*7}.tar': 3 of its 8 names match no tar, the first: .*/00005.tar, "
                           ".*/00006.tar, .*/00007.tar; name only tars that exist"),
    ("{1..3}/*.tar", "3 of its 3 names match no tar"), ("{7..7}.tar", "'.*7}.tar' does not exist")])
def test_braces_that_name_no_tars_say_how_to_write_them(pattern, message, tmp_path):
    simple_shards(tmp_path, 35)
    with pytest.raises(ValueError, match=message) as caught:
        find_shards(f"{tmp_path}/{pattern}")
    assert "\n" not in str(caught.value)


def walked(monkeypatch):
    """The names of the tars that are walked from here on."""
    names, walk = [], tar_index.walk
    monkeypatch.setattr(tar_index, "walk",
                        lambda folder, name: names.append(name) or walk(folder, name))
    return names


def test_only_tars_that_are_new_or_changed_are_read_again(tmp_path, monkeypatch):
    simple_shards(tmp_path, 16)
    names = walked(monkeypatch)
    assert len(Shards(str(tmp_path))) == 16 and names == ["00000.tar", "00001.tar", "00002.tar"]
    names.clear()
    assert len(Shards(str(tmp_path))) == 16 and names == []
    shutil.copy(tmp_path / "00002.tar", tmp_path / "00000a.tar")
    os.utime(tmp_path / "00001.tar", (1, 1))
    (tmp_path / "00000.tar").unlink()
    found = Shards(str(tmp_path))
    assert names == ["00000a.tar", "00001.tar"]
    assert [found.alt_text(i) for i in range(len(found))] == [
        f"alt a {i}" for i in (14, 15, *range(7, 14), 14, 15)]
    simple_shards(tmp_path, 7)
    assert Shards(str(tmp_path)).image(0) == png(0)


def test_a_damaged_index_file_is_made_again(tmp_path):
    simple_shards(tmp_path, 5)
    Shards(str(tmp_path))
    (path,) = tmp_path.glob("*.idx")
    whole = path.read_bytes()
    for content in (b"", whole[:50], whole[:-1], whole + b"x", b"{}\n", b"[]\n", b"\xff" * 99):
        path.write_bytes(content)
        assert read_index(path) is None
        assert len(Shards(str(tmp_path))) == 5 and path.read_bytes() == whole


def test_a_full_disk_leaves_no_index_file_and_the_shards_are_read_all_the_same(tmp_path):
    simple_shards(tmp_path, 5)
    with full_disk(room=100):
        assert len(Shards(str(tmp_path))) == 5 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_is_read_all_the_same(tmp_path):
    simple_shards(tmp_path, 5)
    with open(tmp_path / "00000.tar", "rb") as file:
        found = Shards(f"/dev/fd/{file.fileno()}")
        assert len(found) == 5 and found.image(3) == png(3)
        assert pickle.loads(pickle.dumps(found)).image(3) == png(3)


def test_any_number_of_tars_takes_one_open_file(tmp_path):
    """A second start over 120 tars, and its workers, under a limit of 60 open files."""
    with ShardWriter(tmp_path / "many", samples_per_shard=1) as writer:
        for i in range(120):
            writer.write(f"{i}", png(i), "png", f"number {i}", {})
    code = ("import resource, sys\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))\n"
            "from helpers import tiny_config\n"
            "from nano_aimv2.data.batches import TrainingData, make_loader\n"
            "from nano_aimv2.data.tokenizer import Tokenizer\n"
            "config = tiny_config(data=sys.argv[1], batch_size=60, steps=2)\n"
            "for _ in range(2):\n"
            "    data = TrainingData(config, Tokenizer(config.tokenizer))\n"
            "    for workers in (0, 2):\n"
            "        assert [len(b.patches) for b in make_loader(data, 0, workers, False)]"
            " == [60, 60]\n")
    pytest.importorskip("resource", reason="this system cannot limit the number of open files")
    run_script("-c", code, tmp_path / "many",
               env={"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])})


def test_a_spawned_worker_maps_the_index_instead_of_receiving_it(tmp_path):
    simple_shards(tmp_path, 300)
    found = Shards(str(tmp_path))
    sent = pickle.dumps(found)
    assert len(sent) < 1000
    assert pickle.loads(sent).image(299) == found.image(299)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(Shards.alt_text, (found, 299)) == "alt a 299"


def test_a_worker_does_not_read_by_the_index_of_other_tars(tmp_path):
    simple_shards(tmp_path, 5)
    sent = pickle.dumps(Shards(str(tmp_path)))
    simple_shards(tmp_path, 7)
    Shards(str(tmp_path))
    with pytest.raises(ValueError, match=r"idx was replaced.*start again"):
        pickle.loads(sent)


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    first = Shards(str(simple_shards(tmp_path / "a", 16))).fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "moved/far", copy_function=shutil.copyfile)
    assert Shards(str(tmp_path / "moved/far")).fingerprint == first
    assert Shards(str(tmp_path / "moved/far/*.tar")).fingerprint == first
    assert Shards(str(simple_shards(tmp_path / "b", 17))).fingerprint != first


# Many ranks


def on_ranks(world, function):
    """function(rank, gather) on `world` threads: [what each returned]."""
    values, barrier = [None] * world, Barrier(world, timeout=20)

    def run(rank):
        def gather(value):
            values[rank] = value
            barrier.wait()
            found = list(values)
            barrier.wait()
            return found

        return function(rank, gather)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


def test_the_ranks_share_the_reading_of_new_tars(tmp_path, monkeypatch):
    simple_shards(tmp_path / "data", 65)
    names = walked(monkeypatch)
    text = f"{tmp_path}/data:alt:1,{tmp_path}/data:synthetic:2"
    found = on_ranks(4, lambda rank, gather: open_sources(text, gather=gather))
    assert sorted(names) == [f"{i:05}.tar" for i in range(10)], "each once"
    for sources in found:
        assert [source.shards.image(64) for source in sources] == [png(64)] * 2
        assert sources[0].shards.index.file, "mapped on every rank"
    names.clear()
    on_ranks(3, lambda rank, gather: open_sources(text, gather=gather))
    assert not names


def test_ranks_on_a_disk_that_cannot_be_written_share_all_the_same(tmp_path, monkeypatch):
    simple_shards(tmp_path, 20)
    names = walked(monkeypatch)
    monkeypatch.setattr(tar_index, "write_index", lambda index, file: None)
    found = on_ranks(2, lambda rank, gather: Shards(str(tmp_path), gather))
    assert len(names) == 3 and [len(shards) for shards in found] == [20, 20]


def test_machines_with_copies_of_their_own_have_an_index_each(tmp_path, monkeypatch):
    simple_shards(tmp_path / "0", 20)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    os.utime(tmp_path / "1/00000.tar", (1, 1))
    names = walked(monkeypatch)
    for expected in (3, 0):
        found = on_ranks(2, lambda rank, gather: Shards(str(tmp_path / str(rank)), gather))
        assert len(names) == expected and [len(shards) for shards in found] == [20, 20]
        names.clear()


def test_ranks_that_see_different_tars_stop(tmp_path):
    simple_shards(tmp_path / "0", 8)
    simple_shards(tmp_path / "1", 20)

    def open_shards(rank, gather):
        with pytest.raises(ValueError, match="ranks see different tars.*same files"):
            Shards(str(tmp_path / str(rank)), gather)

    on_ranks(2, open_shards)


def test_an_index_in_memory_equals_the_one_from_its_file(tmp_path):
    simple_shards(tmp_path, 20)
    names = sorted(p.name for p in tmp_path.glob("*.tar"))
    made = open_index(str(tmp_path), names, str(tmp_path / "missing/x.idx"))
    read = open_index(str(tmp_path), names, str(tmp_path / "x.idx"))
    assert not made.file and read.file
    assert made.tars == read.tars and made.kinds == read.kinds
    for field in ("members", "masks", "before"):
        assert np.array_equal(getattr(made, field), getattr(read, field)), field
