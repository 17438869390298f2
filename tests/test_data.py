import io
import json
import os
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image

from nano_aimv2 import shards
from nano_aimv2.data import TrainingData, deal, describe, open_sources, parse_mixture, permuted, read_in_order
from nano_aimv2.evaluate import Evaluation
from nano_aimv2.loader import make_loader
from nano_aimv2.native_res import best_grid, draw_areas
from nano_aimv2.shards import Shards, ShardWriter, find_shards
from nano_aimv2.tokenizer import Tokenizer


def png(value=7, size=(20, 20)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, 100, 200)).save(file, "PNG")
    return file.getvalue()


def noise_png():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members):
    """A tar of (name, bytes), in order: what other tools write."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def simple_shards(folder, count, label="a"):
    with ShardWriter(folder, samples_per_shard=7) as writer:
        for i in range(count):
            writer.write(f"{label}{i:04d}", png(i % 256), "png", f"alt {label} {i}", {"synthetic": [f"long {label} {i}"]})
    return folder


def training_data(scenes, rank=0, world=1, **overrides):
    config = tiny_config(data=f"{scenes}:synthetic:3,{scenes}:alt:1", batch_size=12, steps=20, **overrides)
    return TrainingData(config, Tokenizer(config.tokenizer), rank, world)


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("patches", "grid", "num_tokens")) and all(
        torch.equal(x[:n], y[:n]) for x, y, n in zip(a.tokens, b.tokens, a.num_tokens, strict=True))


def joined(batches):
    rows = [(p, t[:n].tolist()) for b in batches for p, t, n in zip(b.patches, b.tokens, b.num_tokens, strict=True)]
    return [p for p, _ in rows], [t for _, t in rows]


# A batch is a pure function of (seed, step)


def test_a_batch_is_the_same_from_any_reader_and_after_any_resume(scenes):
    data = training_data(scenes, crop_scale=0.5, flip=True)
    expected = [data[k] for k in range(6)]
    assert all(same(a, b) for a, b in zip(expected, (training_data(scenes, crop_scale=0.5, flip=True)[k] for k in range(6)),
                                          strict=True))
    resumed = make_loader(training_data(scenes, crop_scale=0.5, flip=True), 3, 0, False)
    assert all(same(a, next(resumed)) for a in expected[3:])
    assert not same(expected[0], expected[1])
    assert not same(expected[0], training_data(scenes, crop_scale=0.5, flip=True, seed=1)[0])


def test_workers_change_nothing(scenes):
    expected = training_data(scenes, crop_scale=0.5)
    for k, batch in zip(range(5), make_loader(training_data(scenes, crop_scale=0.5), 0, 2, False), strict=False):
        assert same(batch, expected[k]), k


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
    which, nth = deal(data.sources, 0, np.arange(4000))
    assert Counter(which.tolist()) == {0: 3000, 1: 1000}
    for k, size in ((0, 30), (1, 10)):
        samples = [data.address(0, k, int(i), 0)[0] for i in nth[which == k]]
        epochs = [samples[i : i + size] for i in range(0, len(samples), size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs), "each epoch is a permutation"
        assert epochs[0] != epochs[1], "and another one each time"


def test_permuted_is_a_permutation():
    for size in (1, 2, 3, 17, 64, 1000):
        assert sorted(permuted(i, size, 12345) for i in range(size)) == list(range(size))
    assert [permuted(i, 1000, 1) for i in range(20)] != [permuted(i, 1000, 2) for i in range(20)]
    first = [permuted(i, 1000, 1) for i in range(1000)]
    assert abs(np.corrcoef(range(1000), first)[0, 1]) < 0.1


def test_a_mixture_keeps_its_shares_in_every_round(tmp_path):
    folder = simple_shards(tmp_path / "a", 5)
    sources = open_sources(f"{folder}:alt:30,{folder}:synthetic:30,{folder}:alt:9,{folder}:alt:28,{folder}:synthetic:3")
    which, _ = deal(sources, 0, np.arange(1000))
    assert np.bincount(which).tolist() == [300, 300, 90, 280, 30]
    assert np.bincount(deal(sources, 0, np.arange(0, 100))[0]).min() > 0, "shuffled within the round"
    third = parse_mixture("a:alt:1,b:alt:1,c:alt:1")
    assert np.bincount(deal(third, 0, np.arange(1000))[0]).tolist() in ([334, 333, 333], [333, 334, 333], [333, 333, 334])
    assert sum(s.weight for s in third) == pytest.approx(1)


@pytest.mark.parametrize("text, message", [
    ("a:dense:1", "alt, synthetic"), ("a:alt:x", "weight 'x'"), ("a:alt:0", "weight above 0"), ("a:alt:-1", "weight above 0"),
    ("", "names no source"), ("a:long", "caption kind 'long'")])
def test_a_mixture_that_cannot_be_read_says_how(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mixture(text)


def test_the_description_counts_epochs_and_shares(tmp_path):
    folder = simple_shards(tmp_path / "a", 10)
    config = tiny_config(data=f"{folder}:alt:1,{folder}:synthetic:3", batch_size=8, steps=10)
    lines = describe(TrainingData(config, Tokenizer(config.tokenizer)))
    assert "scaled to sum to 1" in lines[0]
    assert "25.0%" in lines[1] and "2.0 epochs" in lines[1] and "6.0 epochs" in lines[2]


# Shards as other tools write them, and as they break


def test_img2dataset_output_is_read_as_it_is(tmp_path):
    members = []
    for i in range(3):
        members += [(f"00000000{i}.jpg", png(i)), (f"00000000{i}.json", json.dumps({"url": "x", "status": "success"}).encode()),
                    (f"00000000{i}.txt", f"caption {i}".encode())]
    write_tar(tmp_path / "00000.tar", members)
    (tmp_path / "00000.parquet").write_bytes(b"x")
    (tmp_path / "00000_stats.json").write_text("{}")
    found = Shards(str(tmp_path))
    assert len(found) == 3 and found.alt_text(2) == "caption 2" and found.image(1) == png(1) and not any(found.report.values())


def test_what_is_no_sample_is_counted(tmp_path):
    members = [("a.png", png(1)), ("a.txt", b"first"), ("a.png", png(2)), ("b.png", png(3)), ("c.txt", b"no image"),
               ("d.png", png(4)), ("d.json", b'{"synthetic": ["only long"]}'), ("folder/e.f.png", png(5)), ("notes.md", b"x")]
    write_tar(tmp_path / "x.tar", members)
    for _ in range(2):  # made, then from the sidecar
        found = Shards(str(tmp_path / "x.tar"))
        assert len(found) == 2 and found.image(0) == png(1) and found.metadata(1) == {"synthetic": ["only long"]}
        assert found.report == {"image without caption": 2, "caption without image": 1, "duplicate key": 1, "tar cut short": 0}


def test_a_tar_cut_in_the_middle_gives_what_is_whole(tmp_path):
    simple_shards(tmp_path, 7)
    path = tmp_path / "00000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: 3 * 3072 + 600])
    found = Shards(str(path))
    assert len(found) == 3 and found.report["tar cut short"] == 1
    assert all(found.image(i) == png(i) for i in range(len(found)))


def test_an_empty_tar_among_others_is_counted_and_alone_is_an_error(tmp_path):
    simple_shards(tmp_path, 7)
    (tmp_path / "00001.tar").write_bytes(b"")
    found = Shards(str(tmp_path))
    assert len(found) == 7 and found.report["tar cut short"] == 1
    with pytest.raises(ValueError, match="no sample"):
        Shards(str(tmp_path / "00001.tar"))


@pytest.mark.parametrize("path, message", [("nowhere", "'.*nowhere' does not exist"), (".", "has no .tar files")])
def test_a_missing_path_says_what_to_give(tmp_path, path, message):
    with pytest.raises(ValueError, match=message):
        find_shards(str(tmp_path / path))


def test_a_sidecar_older_than_its_tar_is_made_again(tmp_path):
    simple_shards(tmp_path, 5)
    assert len(Shards(str(tmp_path))) == 5
    simple_shards(tmp_path, 7)
    assert len(Shards(str(tmp_path))) == 7
    sidecar = next(tmp_path.glob("*.idx.npy"))
    sidecar.write_bytes(sidecar.read_bytes()[:50])
    assert len(Shards(str(tmp_path))) == 7


def test_a_folder_that_cannot_be_written_is_read_all_the_same(tmp_path, monkeypatch):
    simple_shards(tmp_path, 5)

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(shards.os, "replace", refuse)
    assert len(Shards(str(tmp_path))) == 5 and not list(tmp_path.glob("*.npy*"))


def test_the_index_is_mapped_not_loaded(tmp_path):
    simple_shards(tmp_path, 5)
    Shards(str(tmp_path))
    assert isinstance(Shards(str(tmp_path)).indexes[0], np.memmap)


def test_captions_in_latin_1_are_read(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.png", png()), ("a.txt", "café".encode("latin-1"))])
    assert Shards(str(tmp_path / "x.tar")).alt_text(0) == "café"


def test_damaged_members_are_named_and_replaced_and_the_batch_stays_full(tmp_path):
    members = []
    for i in range(40):
        members += [(f"{i:02d}.png", png(i)), (f"{i:02d}.txt", f"caption {i}".encode())]
    members += [("zero.jpg", b""), ("zero.txt", b"x"), ("cut.png", noise_png()[:500]), ("cut.txt", b"x"), ("blank.png", png(1)),
                ("blank.txt", b"  \n"), ("broken.png", png(1)), ("broken.txt", b"x"), ("broken.json", b"{oops"),
                ("text.png", b"not a picture"), ("text.txt", b"x")]
    write_tar(tmp_path / "x.tar", members)
    config = tiny_config(data=f"{tmp_path}:alt:1", batch_size=15, steps=3)
    data = TrainingData(config, Tokenizer(config.tokenizer))
    batches = [data[k] for k in range(3)]  # 45 rows: one epoch
    assert all(len(batch.patches) == 15 for batch in batches)
    skipped = [line for batch in batches for line in batch.skipped]
    for name in ("zero.jpg", "cut.png", "blank.png", "text.png"):
        assert any(f"x.tar:{name}" in line for line in skipped), (name, skipped)
    assert any("empty caption" in line for line in skipped)
    assert not any("broken.png" in line for line in skipped), "alt-text does not need the JSON"
    again = TrainingData(config, Tokenizer(config.tokenizer))
    assert same(batches[0], again[0]), "the replacement too is a function of the address"


def test_a_damaged_json_is_skipped_where_it_is_needed(tmp_path):
    texts = {"a": b'{"synthetic": ["long"]}', "b": b"{oops", "c": b"[1]", "d": b'{"synthetic": "one"}'}
    members = [((f"{key}.png", png()), (f"{key}.json", text)) for key, text in texts.items()]
    write_tar(tmp_path / "x.tar", [member for pair in members for member in pair])
    config = tiny_config(data=f"{tmp_path}:synthetic:1", batch_size=4, steps=1)
    batch = TrainingData(config, Tokenizer(config.tokenizer))[0]
    assert len(batch.patches) == 4
    assert any("b.png: ValueError: unreadable JSON" in line for line in batch.skipped)
    assert any("c.png: ValueError: JSON holds a list" in line for line in batch.skipped)


def test_a_source_without_the_captions_asked_for_stops_with_the_reason(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.png", png()), ("a.txt", b"x")])
    config = tiny_config(data=f"{tmp_path}:synthetic:1", batch_size=2)
    with pytest.raises(ValueError, match="in a row.*no synthetic caption"):
        TrainingData(config, Tokenizer(config.tokenizer))[0]


def test_evaluation_reads_in_order_leaves_out_the_damaged_and_names_them(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.png", png(1)), ("a.txt", b"one"), ("b.png", b"?"), ("b.txt", b"two"),
                                   ("c.png", png(3, (40, 30))), ("c.txt", b"three")])
    config = tiny_config()
    (source,) = open_sources(f"{tmp_path}:alt")
    images, ids, samples, skipped = read_in_order(source, config, Tokenizer(config.tokenizer), 10)
    assert samples == [0, 2] and [image.shape for image in images] == [(20, 20, 3)] * 2 and len(ids) == 2
    assert len(skipped) == 1 and "b.png" in skipped[0]
    assert read_in_order(source, config, Tokenizer(config.tokenizer), 1)[2] == [0]


def test_a_held_out_sample_with_a_broken_json_is_left_out_and_the_run_goes_on(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.png", png(1)), ("a.txt", b"one"), ("b.png", png(2)), ("b.txt", b"two"),
                                   ("b.json", b"{oops")])
    config = tiny_config()
    evaluation = Evaluation(open_sources(f"{tmp_path}:alt")[0], config, Tokenizer(config.tokenizer), 10)
    assert evaluation.captions == ["one"] and "b.png: ValueError: unreadable JSON" in evaluation.skipped[0]


def test_an_interrupted_writer_leaves_no_shard_that_looks_whole(tmp_path):
    def interrupted():
        with ShardWriter(tmp_path, samples_per_shard=3) as writer:
            for i in range(5):
                writer.write(f"{i}", png(), "png", "x", {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(os.listdir(tmp_path)) == ["00000.tar"] and len(Shards(str(tmp_path))) == 3


# The toy set


def test_scenes_are_the_same_from_the_same_seed_and_captions_match_the_objects():
    from data.scenes import make_scene

    first, again, other = make_scene("train", 3), make_scene("train", 3), make_scene("train", 4)
    assert np.array_equal(first[0], again[0]) and first[1:] == again[1:] and not np.array_equal(first[0], other[0])
    pixels, _, dense, objects = first
    assert pixels.shape == (48, 48, 3) and pixels.dtype == np.uint8
    assert dense == ", ".join(f"{p} a {s} {c} {k}" for p, s, c, k in objects) and 1 <= len(objects) <= 3


def test_novel_pairs_never_occur_in_training_and_always_in_novel():
    from data.scenes import NOVEL_PAIRS, draw_objects

    assert len(set(NOVEL_PAIRS)) == 8 and len({s for s, _ in NOVEL_PAIRS}) == 8 == len({c for _, c in NOVEL_PAIRS})
    for split, expected in (("train", False), ("val", False), ("novel", True)):
        for i in range(300):
            objects = draw_objects(split, np.random.default_rng(i))
            assert any((shape, colour) in NOVEL_PAIRS for *_, colour, shape in objects) == expected


def test_no_patch_of_a_scene_is_flat():
    from data.scenes import make_scene
    from nano_aimv2.data import to_patches

    for i in range(50):
        assert to_patches(make_scene("train", i)[0], 12).astype(float).std(axis=1).min() > 1


def test_the_toy_shards_hold_all_splits_with_both_captions(scenes):
    for split, count in (("train", 96), ("val", 24), ("novel", 16)):
        found = Shards(str(scenes / split))
        assert len(found) == count and found.metadata(0)["synthetic"][0].count(" a ") >= 1 and found.alt_text(0)


# Native resolution


def test_areas_follow_the_papers_distribution_and_do_not_depend_on_the_number_of_steps():
    areas = draw_areas(0, 50_000, 7, 12)
    assert areas.min() >= 128 and areas.max() <= 4096
    assert abs(areas.mean() - 1088) < 20 and abs(np.median(areas) - 723) < 15
    assert np.array_equal(draw_areas(0, 10, 7, 12), areas[:10])


@pytest.mark.parametrize("width, height", [(640, 480), (480, 640), (500, 500), (1920, 1080), (1, 4000), (4000, 1), (1, 1),
                                           (9000, 7000)])
@pytest.mark.parametrize("area", [2, 128, 729, 4096])
def test_the_best_grid_fits_and_keeps_the_proportions(width, height, area):
    rows, cols = best_grid(width, height, area)
    assert 2 <= rows * cols <= area
    ratio = (cols / rows) / (width / height)
    if 1 / 3 < width / height < 3 and area > 100:
        assert rows * cols >= 0.85 * area and 0.85 < ratio < 1 / 0.85, (rows, cols)


def test_the_best_grid_misses_no_better_one():
    def score(rows, cols, aspect, area):
        q = cols / rows / aspect
        return rows * cols / area * min(q, 1 / q)

    rng = np.random.default_rng(0)
    for width, height, area in rng.integers((20, 20, 2), (1000, 1000, 300), (400, 3)).tolist():
        force = max(score(rows, area // rows, width / height, area) for rows in range(1, area + 1))  # more columns never lower it
        assert score(*best_grid(width, height, area), width / height, area) == pytest.approx(force), (width, height, area)


def test_native_batches_share_one_area_and_hold_constant_work(tmp_path):
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path) as writer:
        for i in range(40):
            writer.write(f"{i}", png(i, (int(rng.integers(20, 60)), int(rng.integers(20, 60)))), "png", f"number {i}", {})
    config = tiny_config(data=f"{tmp_path}:alt:1", native_area=(3.0, 6.0), positions="sincos", batch_size=12, steps=30)
    tokenizer = Tokenizer(config.tokenizer)
    data = TrainingData(config, tokenizer)
    constant = 12 * 25
    for k in range(8):
        batch = data[k]
        B, A, _ = batch.patches.shape
        assert data.areas[k] == A and constant // A == B and int(batch.grid.prod(dim=1).max()) <= A
        for image, n in zip(batch.patches, batch.grid.prod(dim=1).tolist(), strict=True):
            assert image[n:].sum() == 0
    split = [TrainingData(config, tokenizer, rank, 2)[5] for rank in range(2)]
    patches, tokens = joined([data[5]])
    assert joined(split)[1] == tokens and all(torch.equal(a, b) for a, b in zip(patches, joined(split)[0], strict=True))
