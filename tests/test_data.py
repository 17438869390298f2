"""Shards, mixtures and batches: the data of a run is a pure function of seed and step."""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import full_disk, png, simple_shards, tiny_config, write_tar
from PIL import Image

import train
from data.scenes import (
    ATTRIBUTES,
    COLOURS,
    NOVEL_PAIRS,
    PLACES,
    SETS,
    SHAPES,
    SIZES,
    SPLITS,
    draw_objects,
    encoded_scene,
    make_scene,
    make_scenes,
    subset_captions,
)
from nano_aimv2.config import PRESETS, Config
from nano_aimv2.data import batches
from nano_aimv2.data.batches import (
    TrainingData,
    capped,
    describe,
    make_loader,
    read_in_order,
    to_patches,
)
from nano_aimv2.data.mixture import deal, open_sources, parse_mixture, permuted, pick_caption
from nano_aimv2.data.shards import Shards, ShardWriter
from nano_aimv2.data.tokenizer import Tokenizer
from nano_aimv2.native_res import best_grid, draw_areas
from nano_aimv2.training.distributed import TIMEOUT_MINUTES, single_process
from nano_aimv2.training.evaluate import Evaluation


def noise_png():
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def training_data(scenes, rank=0, world=1, **overrides):
    config = tiny_config(data=f"{scenes}:synthetic:3,{scenes}:alt:1", batch_size=12, steps=20,
                         **overrides)
    return TrainingData(config, Tokenizer(config.tokenizer), rank, world)


def same(a, b):
    """Whether two batches are equal, padding of the captions aside."""
    tensors = ("patches", "grid", "num_tokens")
    if not all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors):
        return False
    rows = zip(a.tokens, b.tokens, a.num_tokens, strict=True)
    return all(torch.equal(x[:n], y[:n]) for x, y, n in rows)


def joined(batches):
    """(patches of each image, token ids of each caption) of some batches."""
    patches, tokens = [], []
    for batch in batches:
        patches += batch.patches
        tokens += [ids[:n].tolist() for ids, n in zip(batch.tokens, batch.num_tokens, strict=True)]
    return patches, tokens


# A batch is a pure function of (seed, step)


def test_a_batch_is_the_same_from_any_reader_and_after_any_resume(scenes):
    augment = dict(crop_scale=0.5, flip=True)
    data = training_data(scenes, **augment)
    expected = [data[k] for k in range(6)]
    assert all(same(expected[k], training_data(scenes, **augment)[k]) for k in range(6))
    resumed = make_loader(training_data(scenes, **augment), 3, 0, False)
    assert all(same(a, next(resumed)) for a in expected[3:])
    assert not same(expected[0], expected[1])
    assert not same(expected[0], training_data(scenes, **augment, seed=1)[0])


def test_workers_change_nothing(scenes):
    expected = training_data(scenes, crop_scale=0.5)
    loader = make_loader(training_data(scenes, crop_scale=0.5), 0, 2, False)
    for k in range(5):
        assert same(next(loader), expected[k]), k


class Numbers(torch.utils.data.Dataset):
    """Micro-batch k is the number k; `damaged` cannot be read. There are more than can be read."""

    def __init__(self, damaged=None):
        self.damaged = damaged

    def __len__(self):
        return 10**9

    def __getitem__(self, k):
        if k == self.damaged:
            raise ValueError(f"micro-batch {k} is damaged")
        return k


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_loader_keeps_the_order_and_hands_on_an_error_where_it_happens(num_workers):
    found = []
    try:
        found.extend(make_loader(Numbers(damaged=8), 3, num_workers, pin=False))
    except (ValueError, OSError) as error:
        found.append(str(error))
        error.__traceback__ = None  # it refers to the loader, whose worker would live on
    assert "\n" not in found[-1], "without the worker's traceback"
    assert found[:-1] == [3, 4, 5, 6, 7] and "micro-batch 8 is damaged" in found[-1]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("first", [0, 18, 19, 20])
def test_the_loader_ends_with_the_run(scenes, first, num_workers):
    loader = make_loader(training_data(scenes), first, num_workers, pin=False)
    assert len(list(loader)) == 20 - first


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_that_is_abandoned_early_ends_its_thread_or_processes(num_workers):
    before = threading.enumerate() + multiprocessing.active_children()
    loader = make_loader(Numbers(), 0, num_workers, pin=False)
    assert next(loader) == 0
    running = threading.enumerate() + multiprocessing.active_children()
    started = [reader for reader in running if reader not in before]
    assert started
    del loader
    for reader in started:
        reader.join(timeout=10)
        assert not reader.is_alive(), reader


@pytest.mark.parametrize("world, accum", [(2, 1), (1, 4), (3, 2), (5, 1)])
def test_ranks_and_micro_batches_together_are_the_global_batch(scenes, world, accum):
    patches, tokens = joined([training_data(scenes)[4]])
    parts = [training_data(scenes, rank, world, grad_accum=accum)[4 * accum + part]
             for rank in range(world) for part in range(accum)]
    assert [part.rows.start for part in parts] == sorted(part.rows.start for part in parts)
    split_patches, split_tokens = joined(parts)
    assert len(split_patches) == 12 and split_tokens == tokens
    assert all(torch.equal(a, b) for a, b in zip(patches, split_patches, strict=True))


def test_every_sample_comes_once_an_epoch_of_its_source(tmp_path):
    a, b = simple_shards(tmp_path / "a", 30, "a"), simple_shards(tmp_path / "b", 10, "b")
    config = tiny_config(data=f"{a}:alt:3,{b}:alt:1", batch_size=8, steps=10)
    tokenizer = Tokenizer(config.tokenizer)
    data = TrainingData(config, tokenizer)
    source, index = deal(data.sources, 0, np.arange(4000))
    assert Counter(source.tolist()) == {0: 3000, 1: 1000}
    for k, size in ((0, 30), (1, 10)):
        samples = [data.address(0, k, int(i), 0)[0] for i in index[source == k]]
        epochs = [samples[i : i + size] for i in range(0, len(samples), size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs), "a permutation each"
        assert epochs[0] != epochs[1], "another one in each epoch"


def test_permuted_is_a_permutation():
    for size in (1, 2, 3, 17, 64, 1000):
        assert sorted(permuted(i, size, 12345) for i in range(size)) == list(range(size))
    assert [permuted(i, 1000, 1) for i in range(20)] != [permuted(i, 1000, 2) for i in range(20)]
    first = [permuted(i, 1000, 1) for i in range(1000)]
    assert abs(np.corrcoef(range(1000), first)[0, 1]) < 0.1


def test_a_mixture_keeps_its_shares_in_every_round(tmp_path):
    folder = simple_shards(tmp_path / "a", 5)
    parts = ("alt:30", "synthetic:30", "alt:9", "alt:28", "synthetic:3")
    sources = open_sources(",".join(f"{folder}:{part}" for part in parts))
    source, _ = deal(sources, 0, np.arange(1000))
    assert np.bincount(source).tolist() == [300, 300, 90, 280, 30]
    tenth, _ = deal(sources, 0, np.arange(0, 100))
    assert np.bincount(tenth).min() > 0, "shuffled within the round"
    thirds = parse_mixture("a:alt:1,b:alt:1,c:alt:1")
    counts = np.bincount(deal(thirds, 0, np.arange(1000))[0])
    assert sorted(counts.tolist()) == [333, 333, 334]
    assert sum(s.weight for s in thirds) == pytest.approx(1)


@pytest.mark.parametrize("text, message", [
    ("a:2", "kind '2' must be names, and the weight comes third: write path:kind:weight"),
    ("a:alt:x", "weight 'x'"), ("a:alt:-1", "'-1' must"), (r"C:\a:1.5", "caption kind '1.5'"),
    ("a:alt:0", "'0' must be a number above 0"), ("a:alt:", "weight ''"), ("", "names no source"),
    (":alt:1", "path:kind:weight"), ("a::1", "caption kind ''"), ("a:alt:nan", "above 0"),
    ("a:b:alt", "weight 'alt'"), ("a:alt:1,,b:x:y", "part 'b:x:y': weight 'y'")])
def test_a_mixture_that_cannot_be_read_says_how(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mixture(text)


@pytest.mark.parametrize("text, path, kind", [
    (r"C:\photos:synthetic:2", r"C:\photos", "synthetic"), ("d:/a b:alt", "d:/a b", "alt"),
    (r"C:\photos", r"C:\photos", "alt"), ("a:b:alt:1", "a:b", "alt"),
    ("/disk/x", "/disk/x", "alt"), ("d:alt", "d", "alt"), ("d:re caption", "d", "re caption"),
    ("d:2:1", "d", "2"), ("d/{0..3},", "d/{0..3}", "alt"), ("d/{a,b}.tar:c", "d/{a,b}.tar", "c"),
    ("d/{0..3.tar:alt:1", "d/{0..3.tar", "alt")])
def test_paths_with_colons_and_braces_are_read(text, path, kind):
    (source,) = parse_mixture(text)
    assert (source.path, source.kind, source.weight) == (path, kind, 1)


def test_the_description_counts_epochs_and_shares(tmp_path):
    folder = simple_shards(tmp_path / "a", 10)
    config = tiny_config(data=f"{folder}:alt:1,{folder}:synthetic:3", batch_size=8, steps=10)
    lines = describe(TrainingData(config, Tokenizer(config.tokenizer)))
    assert "scaled to sum to 1" in lines[0]
    assert "25.0%" in lines[1] and "2.0 epochs" in lines[1] and "6.0 epochs" in lines[2]


# Samples that cannot be read


def test_damaged_members_are_named_and_replaced_and_the_batch_stays_full(tmp_path):
    members = []
    for i in range(40):
        members += [(f"{i:02d}.png", png(i)), (f"{i:02d}.txt", f"caption {i}".encode())]
    members += [("zero.jpg", b""), ("zero.txt", b"x"), ("cut.png", noise_png()[:500]),
                ("cut.txt", b"x"), ("blank.png", png(1)), ("blank.txt", b"  \n"),
                ("broken.png", png(1)), ("broken.txt", b"x"), ("broken.json", b"{oops"),
                ("text.png", b"not an image"), ("text.txt", b"x")]
    write_tar(tmp_path / "x.tar", members)
    config = tiny_config(data=f"{tmp_path}:alt:1", batch_size=15, steps=3)
    data = TrainingData(config, Tokenizer(config.tokenizer))
    batches = [data[k] for k in range(3)]  # 45 rows: one epoch
    assert all(len(batch.patches) == 15 for batch in batches)
    skipped = [line for batch in batches for line in batch.skipped]
    for name in ("zero.jpg", "cut.png", "blank.png", "text.png"):
        assert any(f"x.tar:{name}" in line for line in skipped), (name, skipped)
    assert any("no alt caption, or an empty one" in line for line in skipped)
    assert not any("broken.png" in line for line in skipped), "alt-text does not need the JSON"
    again = TrainingData(config, Tokenizer(config.tokenizer))
    assert same(batches[0], again[0]), "the replacement too is a function of the address"


def shards_with_few_synthetic_captions(folder, count=50):
    with ShardWriter(folder, samples_per_shard=7) as writer:
        for i in range(count):
            captions = {"synthetic": f"long {i}"} if i % 5 == 2 else {"synthetic": []}
            writer.write(f"{i:04d}", png(i), "png", f"alt {i}", captions)
    return folder


def test_a_source_consists_of_the_samples_that_have_its_captions(tmp_path):
    """A fifth of the samples have a synthetic caption: epochs and counts are over those."""
    folder = shards_with_few_synthetic_captions(tmp_path / "thin")
    config = tiny_config(data=f"{folder}:synthetic:1,{folder}:alt:1", batch_size=20, steps=2)
    data = TrainingData(config, Tokenizer(config.tokenizer))
    assert [len(source) for source in data.sources] == [10, 50]
    epochs = [data.address(0, 0, i, 0)[0] for i in range(20)]
    assert sorted(epochs[:10]) == sorted(epochs[10:]) == list(range(2, 50, 5))
    assert not data[0].skipped and not data[1].skipped
    about = describe(data)
    assert "10 of 50 samples" in about[1] and "2.0 epochs" in about[1]
    assert ": 50 samples" in about[2]


def test_a_damaged_json_counts_when_the_shards_are_indexed_and_its_alt_text_is_read(tmp_path):
    texts = {"a": b'{"synthetic": ["long"]}', "b": b"{oops", "c": b"[1]",
             "d": b'{"synthetic": "one"}', "e": b"[" * 100_000}
    members = [((f"{key}.png", png()), (f"{key}.txt", b"short"), (f"{key}.json", text))
               for key, text in texts.items()]
    write_tar(tmp_path / "x.tar", [member for group in members for member in group])
    config = tiny_config(data=f"{tmp_path}:synthetic:1,{tmp_path}:alt:1", batch_size=8, steps=1)
    data = TrainingData(config, Tokenizer(config.tokenizer))
    assert [len(source) for source in data.sources] == [2, 5]
    assert data.sources[0].shards.report["unreadable .json"] == 3
    assert "'unreadable .json': 3" in describe(data)[1]
    assert len(data[0].patches) == 8 and not data[0].skipped


def test_a_json_that_is_damaged_later_is_skipped_and_named(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.png", png()), ("a.json", b'{"synthetic": "one"}'),
                                   ("b.png", png()), ("b.json", b'{"synthetic": "two"}')])
    (source,) = open_sources(f"{tmp_path}:synthetic")
    content = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(content.replace(b'"two"', b"'two'"))
    config = tiny_config()
    (record,), (skipped,) = read_in_order(source, config, Tokenizer(config.tokenizer), 5)
    assert record.sample == 0 and "b.png: ValueError: unreadable JSON" in skipped


def test_a_source_without_the_captions_asked_for_says_which_there_are(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.png", png()), ("a.txt", b"x"),
                                   ("a.json", b'{"re_caption": "y", "label": 3}')])
    config = tiny_config(data=f"{tmp_path}:synthetic:1", batch_size=2)
    with pytest.raises(ValueError, match=r"none of its 1 samples.*alt \(1\), re_caption \(1\)"):
        TrainingData(config, Tokenizer(config.tokenizer))


def test_an_unknown_kind_names_the_likeliest_captions_and_counts_the_other_keys(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for i in range(20):
            about = {f"key {k}": "x" for k in range(11)} | {"label": 3}
            about |= {"re_caption": "long", "TEXT": "web"} if i % 2 else {}
            about |= {"synthetic": "y"} if i % 4 == 3 else {}
            writer.write(f"{i}", png(), "png", "x", about)
    with pytest.raises(ValueError) as caught:
        open_sources(f"{tmp_path}:caption_llava:1")
    assert ("none of its 20 samples has a caption of kind 'caption_llava'; they have alt (20), "
            "TEXT (10), re_caption (10), synthetic (5), key 0 (20), key 1 (20), key 10 (20), "
            "key 2 (20), and 7 more: correct --data=PATH:KIND:WEIGHT") in str(caught.value)


def test_any_key_is_a_kind_and_each_caption_of_a_list_is_drawn(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for i in range(6):
            writer.write(f"{i}", png(), "png", f"alt {i}",
                         {"re-caption v2": f"one {i}", "dense": ["a", " ", "b"] if i < 2 else []})
    one, dense = open_sources(f"{tmp_path}:re-caption v2:1,{tmp_path}:dense:1")
    assert [pick_caption(one, one.sample(i)) for i in range(len(one))] == [
        f"one {i}" for i in range(6)]
    assert len(dense) == 2
    rng = np.random.default_rng(0)
    drawn = Counter(pick_caption(dense, dense.sample(1), rng) for _ in range(200))
    assert set(drawn) == {"a", "b"} and min(drawn.values()) > 70


def test_alt_is_the_txt_or_where_it_is_absent_or_blank_the_key_caption(tmp_path):
    about = json.dumps({"caption": "from json", "alt": "not read"}).encode()
    several = json.dumps({"caption": ["one", "two"]}).encode()
    write_tar(tmp_path / "x.tar", [
        ("a.png", png()), ("a.txt", b"from txt"), ("a.json", about),
        ("b.png", png()), ("b.json", about), ("c.png", png()), ("c.txt", b""), ("c.json", about),
        ("d.png", png()), ("d.txt", b" \n"), ("d.json", about),
        ("e.png", png()), ("e.json", several), ("f.png", png()), ("f.json", b'{"caption": " "}'),
        ("g.png", png()), ("g.txt", b"two\nlines\n")])
    for _ in range(2):  # made, then from the index file
        (source,) = open_sources(f"{tmp_path}:alt")
        assert [source.sample(i) for i in range(len(source))] == [0, 1, 2, 3, 4, 6]
        assert [pick_caption(source, i) for i in (0, 1, 2, 3, 4, 6)] == [
            "from txt", "from json", "from json", "from json", "one", "two\nlines\n"]
        assert source.shards.index.kinds == ["alt", "caption"]
        with pytest.raises(ValueError, match="no alt caption"):
            pick_caption(source, 5)


def test_images_whose_json_has_no_caption_are_left_out_and_without_others_an_error(tmp_path):
    bare = [("a.png", png(1)), ("a.json", b'{"label": 3, "boxes": [[1, 2]], "parts": [{}]}')]
    (tmp_path / "bare").mkdir()
    write_tar(tmp_path / "bare/x.tar", bare)
    for _ in range(2):  # made, then from the index file
        with pytest.raises(ValueError, match="'alt'; they have none at all: correct --data="):
            open_sources(f"{tmp_path}/bare")
    write_tar(tmp_path / "x.tar", [*bare, ("b.png", png(2)), ("b.json", b'{"caption": "b"}')])
    config = tiny_config(data=f"{tmp_path}:alt,{tmp_path}:caption", batch_size=4, steps=1)
    data = TrainingData(config, Tokenizer(config.tokenizer))
    assert len(data[0].patches) == 4 and not data[0].skipped
    assert "1 of 2 samples" in describe(data)[1]


def broken_disk(monkeypatch, works_after):
    """Reads of images fail `works_after` times; returns the pauses that were made."""
    reads, pauses, image = [], [], Shards.image

    def read(self, i):
        reads.append(i)
        if len(reads) <= works_after:
            raise OSError(5, "Input/output error")
        return image(self, i)

    monkeypatch.setattr(Shards, "image", read)
    monkeypatch.setattr(batches.time, "sleep", pauses.append)
    return pauses


def test_a_disk_that_fails_for_a_while_is_waited_for(tmp_path, monkeypatch):
    folder = simple_shards(tmp_path / "a", 9)
    config = tiny_config(data=f"{folder}:alt:1", batch_size=4, steps=1)
    pauses = broken_disk(monkeypatch, works_after=120)
    batch = TrainingData(config, Tokenizer(config.tokenizer))[0]
    assert len(batch.patches) == 4 and pauses == [1, 2]
    assert len(batch.skipped) == 120 and "Input/output error" in batch.skipped[0]


def test_a_disk_that_stays_away_ends_the_run_before_the_other_ranks_give_up(tmp_path, monkeypatch):
    folder = simple_shards(tmp_path / "a", 9)
    config = tiny_config(data=f"{folder}:alt:1", batch_size=4, steps=1)
    pauses = broken_disk(monkeypatch, works_after=10**9)
    with pytest.raises(OSError, match="500 samples in a row.*last checkpoint"):
        TrainingData(config, Tokenizer(config.tokenizer))[0]
    assert sum(pauses) < TIMEOUT_MINUTES * 60 / 2


def test_the_name_of_a_sample_that_cannot_be_read_is_no_further_error(tmp_path):
    found = Shards(str(simple_shards(tmp_path / "a", 2)))
    (tmp_path / "a/00000.tar").unlink()
    assert found.name(1).endswith("00000.tar: sample 1")


@pytest.mark.parametrize("workers, local_world, refused", [
    (0, "1", False), (1, "1", False), (64, "1", True), (8, "8", True)])
def test_workers_that_need_more_shared_memory_than_there_is_are_refused(
        workers, local_world, refused, monkeypatch, tmp_path):
    config = tiny_config(num_workers=workers)
    free = shutil.disk_usage(tmp_path)._replace(free=64e6)  # what a container has
    monkeypatch.setattr(batches.shutil, "disk_usage", lambda folder: free)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world)
    expected = pytest.raises(ValueError, match="64 MB free: use --num_workers=0")
    with expected if refused else contextlib.nullcontext():
        batches.check_shared_memory(config, 10_000, tmp_path)


def test_a_killed_worker_ends_the_run_in_one_line(scenes):
    loader = make_loader(training_data(scenes), 0, 1, pin=False)
    next(loader)
    for worker in multiprocessing.active_children():
        worker.kill()
    with pytest.raises(OSError, match="a data worker failed.*--num_workers=0") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


def test_capped_lines_say_how_many_were_left_out():
    assert capped(["a", "b"], 2) == ["a", "b"]
    assert capped(["a", "b", "c", "d"], 2) == ["a", "b", "... and 2 more"]


def test_evaluation_reads_in_order_skips_damaged_samples_and_names_them(tmp_path):
    write_tar(tmp_path / "x.tar", [
        ("a.png", png(1)), ("a.txt", b"one"), ("b.png", b"?"), ("b.txt", b"two"),
        ("c.png", png(3, (40, 30))), ("c.txt", b"three")])
    config = tiny_config()
    (source,) = open_sources(f"{tmp_path}:alt")
    records, skipped = read_in_order(source, config, Tokenizer(config.tokenizer), 10)
    assert [record.sample for record in records] == [0, 2]
    assert [record.pixels.shape for record in records] == [(20, 20, 3)] * 2
    assert len(skipped) == 1 and "b.png" in skipped[0]
    assert len(read_in_order(source, config, Tokenizer(config.tokenizer), 1)[0]) == 1


def test_a_held_out_sample_with_a_broken_json_is_skipped_and_the_run_goes_on(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.png", png(1)), ("a.txt", b"one"), ("b.png", png(2)),
                                   ("b.txt", b"two"), ("b.json", b"{oops")])
    config = tiny_config()
    (source,) = open_sources(f"{tmp_path}:alt")
    evaluation = Evaluation(source, config, Tokenizer(config.tokenizer), 10)
    assert evaluation.captions == ["one"]
    assert "b.png: ValueError: unreadable JSON" in evaluation.skipped[0]


def write_until(folder, stop):
    with ShardWriter(folder, samples_per_shard=3) as writer:
        for i in range(5):
            writer.write(f"{i}", png(), "png", "x", {})
        stop(writer)


def interrupt(_):
    raise KeyboardInterrupt


def write_a_large_image(writer):
    with full_disk(room=100_000):
        writer.write("large", bytes(200_000), "png", "x", {})


@pytest.mark.parametrize("stop, error", [
    (interrupt, KeyboardInterrupt), (write_a_large_image, OSError)])
def test_a_writer_that_is_stopped_leaves_no_shard_that_looks_whole(tmp_path, stop, error):
    with pytest.raises(error):
        write_until(tmp_path, stop)
    assert os.listdir(tmp_path) == ["00000.tar"] and len(Shards(str(tmp_path))) == 3


# The toy set


def test_scenes_are_the_same_from_the_same_seed_and_captions_match_the_objects():
    first, again, other = make_scene("train", 3), make_scene("train", 3), make_scene("train", 4)
    assert np.array_equal(first[0], again[0]) and first[1:] == again[1:]
    assert not np.array_equal(first[0], other[0])
    pixels, _, dense, objects = first
    assert pixels.shape == (48, 48, 3) and pixels.dtype == np.uint8
    assert dense == ", ".join(f"{p} a {s} {c} {k}" for p, s, c, k in objects)
    assert 1 <= len(objects) <= 3


def test_novel_pairs_never_occur_in_training_and_always_in_novel():
    shapes, colours = zip(*NOVEL_PAIRS, strict=True)
    assert len(set(NOVEL_PAIRS)) == len(set(shapes)) == len(set(colours)) == 8
    for split, expected in (("train", False), ("val", False), ("novel", True)):
        for i in range(300):
            objects = draw_objects(split, np.random.default_rng(i))
            found = any((shape, colour) in NOVEL_PAIRS for *_, colour, shape in objects)
            assert found == expected


def test_no_patch_of_a_scene_is_flat():
    for i in range(50):
        assert to_patches(make_scene("train", i)[0], 12).astype(float).std(axis=1).min() > 1


def test_the_toy_shards_hold_all_splits_with_both_captions(scenes):
    for split, count in (("train", 96), ("val", 24), ("novel", 16)):
        found = Shards(str(scenes / split))
        assert len(found) == count and found.alt_text(0)
        assert found.metadata(0)["synthetic"][0].count(" a ") >= 1


def test_each_subset_of_the_attributes_has_a_caption_that_names_these_and_no_others():
    words = dict(zip(ATTRIBUTES, (PLACES, SIZES, COLOURS, SHAPES), strict=True))
    for i in range(40):
        *_, dense, objects = make_scene("train", i)
        found = subset_captions(objects)
        assert len(found) == 16 and found["names_place_size_colour_shape"] == dense
        assert found["names_none"].split()[0] == ("one", "two", "three")[len(objects) - 1]
        for kind, text in found.items():
            named = [a for a in ATTRIBUTES if a in kind.split("_")]
            assert kind == f"names_{'_'.join(named) or 'none'}"
            for attribute, known in words.items():
                said = sorted(word for part in text.split(", ") for word in known if word in part)
                true = sorted(each[ATTRIBUTES.index(attribute)] for each in objects)
                assert said == (true if attribute in named else []), (kind, text)
            if named and "place" not in named:
                assert text == ", ".join(sorted(text.split(", "))), "the order tells no place"


def test_the_captions_of_subsets_change_nothing_else_in_a_scene(tmp_path):
    address = ("val", 5, 20, 0, 1.0)
    *plain, before = encoded_scene(address)
    *more, after = encoded_scene(address, subsets=True)
    assert plain == more and list(before) == ["synthetic", "terse", "objects"]
    assert list(after.items())[:3] == list(before.items()) and len(after) == 3 + 16
    make_scenes(tmp_path / "set", train=3, val=1, novel=1, size=20, subsets=True)
    shards = Shards(str(tmp_path / "set/train"))
    kinds = subset_captions([("top left", "large", "red", "ring")])
    assert all(shards.index.count(kind) == 3 for kind in kinds)


def test_few_scenes_drawn_alone_are_those_that_many_processes_draw(tmp_path, monkeypatch):
    make_scenes(tmp_path / "alone", train=5, val=2, novel=1, size=20)
    monkeypatch.setattr("data.scenes.FEW", 0)
    make_scenes(tmp_path / "together", train=5, val=2, novel=1, size=20)
    for split in SPLITS:
        one, other = (sorted((tmp_path / name / split).glob("*.tar"))
                      for name in ("alone", "together"))
        assert one and [tar.read_bytes() for tar in one] == [tar.read_bytes() for tar in other]


def test_a_set_that_cannot_be_drawn_whole_leaves_nothing(tmp_path):
    out = tmp_path / "scenes"
    with full_disk(), pytest.raises(OSError, match="too large"):
        make_scenes(out, train=5, val=1, novel=1, size=20)
    assert not os.listdir(tmp_path)


def test_drawing_deletes_nothing(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    for out in ("mine", "mine/thesis.txt"):
        with pytest.raises(ValueError, match="exists: choose another --out"):
            make_scenes(tmp_path / out, train=1, val=1, novel=1, size=20)
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


def test_only_the_sets_that_presets_name_are_drawn_by_a_run(tmp_path, monkeypatch):
    """data/scenes on a disk that is not mounted is missing; nothing is drawn in its place."""
    drawn = []
    monkeypatch.setattr(train, "make_scenes", lambda out, **kwargs: drawn.append(out))
    monkeypatch.chdir(tmp_path)
    named = {source.path for preset in PRESETS for source in parse_mixture(
        Config.from_preset(preset, init="x").data)}
    assert set(SETS) <= named
    for preset in ("toy", "toy-highres", "toy-native"):
        train.make_toy_data(Config.from_preset(preset, init="x"), single_process())
    assert sorted(set(drawn)) == sorted(SETS)
    drawn.clear()
    for data in ("/disk/scenes", "/disk/data/scenes", "scenes", "data/scenes/train"):
        train.make_toy_data(tiny_config(data=data), single_process())
    assert not drawn


# Native resolution


def test_areas_follow_the_papers_distribution_and_do_not_depend_on_the_number_of_steps():
    areas = draw_areas(0, 50_000, 7, 12)
    assert areas.min() >= 128 and areas.max() <= 4096
    assert abs(areas.mean() - 1088) < 20 and abs(np.median(areas) - 723) < 15
    assert np.array_equal(draw_areas(0, 10, 7, 12), areas[:10])


@pytest.mark.parametrize("width, height", [
    (640, 480), (480, 640), (500, 500), (1920, 1080), (1, 4000), (4000, 1), (1, 1), (9000, 7000)])
@pytest.mark.parametrize("area", [2, 128, 729, 4096])
def test_the_best_grid_fits_and_keeps_the_aspect_ratio(width, height, area):
    rows, cols = best_grid(width, height, area)
    assert 2 <= rows * cols <= area
    ratio = (cols / rows) / (width / height)
    if 1 / 3 < width / height < 3 and area > 100:
        assert rows * cols >= 0.85 * area and 0.85 < ratio < 1 / 0.85, (rows, cols)


def test_no_grid_is_better_than_the_best_grid():
    def score(rows, cols, aspect, area):
        q = cols / rows / aspect
        return rows * cols / area * min(q, 1 / q)

    rng = np.random.default_rng(0)
    for width, height, area in rng.integers((20, 20, 2), (1000, 1000, 300), (400, 3)).tolist():
        aspect = width / height
        # For each number of rows, the most columns: more of them never lower the score
        best = max(score(rows, area // rows, aspect, area) for rows in range(1, area + 1))
        found = score(*best_grid(width, height, area), aspect, area)
        assert found == pytest.approx(best), (width, height, area)


def test_native_batches_share_one_area_and_hold_constant_work(tmp_path):
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path) as writer:
        for i in range(40):
            size = int(rng.integers(20, 60)), int(rng.integers(20, 60))
            writer.write(f"{i}", png(i, size), "png", f"number {i}", {})
    config = tiny_config(data=f"{tmp_path}:alt:1", native_area=(3.0, 6.0), positions="sincos",
                         batch_size=12, steps=30)
    tokenizer = Tokenizer(config.tokenizer)
    data = TrainingData(config, tokenizer)
    constant = 12 * 25
    for k in range(8):
        batch = data[k]
        B, A, _ = batch.patches.shape
        assert data.areas[k] == A and constant // A == B
        assert int(batch.grid.prod(dim=1).max()) <= A
        for image, n in zip(batch.patches, batch.grid.prod(dim=1).tolist(), strict=True):
            assert image[n:].sum() == 0
    large = TrainingData(replace(config, image_size=48, native_area=(6.0, 8.0)), tokenizer)
    lengths = [large[k].patches.shape[1] for k in range(8)]
    assert lengths == [-(-area // 8) * 8 for area in large.areas[:8]] != large.areas[:8].tolist()
    split = [TrainingData(config, tokenizer, rank, 2)[5] for rank in range(2)]
    patches, tokens = joined([data[5]])
    split_patches, split_tokens = joined(split)
    assert split_tokens == tokens
    assert all(torch.equal(a, b) for a, b in zip(patches, split_patches, strict=True))
