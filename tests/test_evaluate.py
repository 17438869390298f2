"""Evaluation: the same numbers for any number of ranks, captions compared as they are encoded."""

import json
import math
import unicodedata
from dataclasses import replace

import pytest
import torch
from helpers import ROOT, png, run_ranks, run_script, simple_shards, tiny_config, write_tar

from nano_aimv2.data.batches import TrainingData
from nano_aimv2.data.mixture import open_sources
from nano_aimv2.data.shards import ShardWriter
from nano_aimv2.data.tokenizer import Tokenizer
from nano_aimv2.generate import Caption
from nano_aimv2.lab.sizes import across_sizes
from nano_aimv2.model import AIMv2
from nano_aimv2.native_res import batch_sizes, draw_areas
from nano_aimv2.training import evaluate as evaluation_file
from nano_aimv2.training.distributed import Runtime, parallelize, start, stop
from nano_aimv2.training.evaluate import (
    Evaluation,
    describe_held_out,
    evaluate,
    held_out_sources,
    label_text,
    names_label,
)
from nano_aimv2.training.metrics import read_metrics


class MadeUp(Runtime):
    """One of many ranks whose sums are noted instead of exchanged."""

    def sum(self, *values):
        self.noted.append([float(v) for v in values])
        return [1.0] * len(values)


def summed_over_ranks(world, measure):
    """What runtime.sum returns where `measure(runtime)` runs on `world` ranks."""
    noted = []
    for rank in range(world):
        runtime = MadeUp(rank, world, torch.device("cpu"), torch.float32, "none", False)
        object.__setattr__(runtime, "noted", noted)
        measure(runtime)
    return [sum(values) for values in zip(*noted, strict=True)]


def evaluation_of(folder, count=19, batch_size=5, **overrides):
    """19 images in batches of 5: the last has 4 rows, fewer than most worlds here."""
    if not folder.exists():
        simple_shards(folder, 19)
    config = tiny_config(**overrides)
    (source,) = open_sources(f"{folder}:alt")
    return Evaluation(source, config, Tokenizer(config.tokenizer), count, batch_size), config


WORLDS = (1, 2, 3, 4, 7, 64)


def test_held_out_losses_do_not_depend_on_the_number_of_ranks(tmp_path):
    evaluation, config = evaluation_of(tmp_path / "x")
    torch.manual_seed(0)
    model = AIMv2(config)
    sums = {world: summed_over_ranks(world, lambda r: evaluation.losses(model, r))
            for world in WORLDS}
    for world in WORLDS:
        assert sums[world] == pytest.approx(sums[1], rel=1e-6), world
        assert sums[world][1::2] == sums[1][1::2], "counts are exact"


def test_scores_of_captions_do_not_depend_on_the_number_of_ranks(tmp_path, monkeypatch):
    evaluation, config = evaluation_of(tmp_path / "x")
    evaluation.label_names = ["red" if k % 3 else None for k in range(19)]
    right = {patches.numpy().tobytes(): text for patches, text in zip(
        torch.cat([batch.patches for batch in evaluation.batches]), evaluation.captions,
        strict=True)}

    def caption(model, patches, grid, tokenizer):
        texts = [right[image.numpy().tobytes()] for image in patches]
        return [Caption(text if "1" in text else text + " red", 0.0, []) for text in texts]

    monkeypatch.setattr(evaluation_file, "caption", caption)
    expected = [19, sum("1" in text for text in evaluation.captions),
                12, sum(k % 3 > 0 and "1" not in text
                        for k, text in enumerate(evaluation.captions))]
    for world in WORLDS:
        found = summed_over_ranks(world, lambda r: evaluation.caption_scores(AIMv2(config), r))
        assert found == expected, world


def test_ranks_get_whole_batches_where_there_are_enough_and_equally_many_passes(tmp_path):
    evaluation, _ = evaluation_of(tmp_path / "x")
    for world in WORLDS:
        shares = [evaluation.share_out(Runtime(rank, world, None, None, "fsdp", False))
                  for rank in range(world)]
        assert len({len(share) for share in shares}) == 1, "a sharded model needs all ranks"
        counted = [(i, row) for share in shares for i, rows, counts in share if counts
                   for row in range(rows.start, rows.stop)]
        sizes = [len(batch.patches) for batch in evaluation.batches]
        assert sorted(counted) == [(i, row) for i, size in enumerate(sizes) for row in range(size)]
        if world <= len(sizes):
            assert all(rows == slice(0, sizes[i]) for share in shares for i, rows, _ in share)
        else:  # 4 batches of 5 rows, cut into equal pieces
            most = -(-5 // -(-world // 4))
            assert max(r.stop - r.start for share in shares for _, r, _ in share) == most, world


def evaluate_on_a_rank(folder, parallel):
    """The row of held-out results, on one of the ranks that a test has started."""
    torch.set_num_threads(1)
    runtime = start("cpu", "float32", parallel)
    evaluation, config = evaluation_of(folder)
    evaluation.label_names = ["0"] * 19
    torch.manual_seed(0)
    model = AIMv2(config)
    row = evaluate(model, parallelize(model, runtime), {"val": evaluation}, runtime)
    stop()
    return row


@pytest.mark.slow
def test_two_real_ranks_evaluate_as_one(tmp_path):
    simple_shards(tmp_path / "x", 19)
    alone = evaluate_on_a_rank(tmp_path / "x", "auto")
    assert set(alone) == {"val_loss_text", "val_loss_image", "caption_exact",
                          "caption_names_label"}
    code = ("import json, sys\nfrom pathlib import Path\n"
            f"sys.path[:0] = [{str(ROOT / 'tests')!r}]\n"
            "from test_evaluate import evaluate_on_a_rank\n"
            "from nano_aimv2.training.distributed import leave\n"
            "print(json.dumps(evaluate_on_a_rank(Path(sys.argv[1]), sys.argv[2])))\nleave()\n")
    script = tmp_path / "script.py"
    script.write_text(code)
    for parallel in ("ddp", "fsdp"):
        for code, output in run_ranks(script, tmp_path / "x", parallel):
            assert code == 0, output
            row = json.loads(output.splitlines()[-1])
            for name, value in row.items():
                assert value == pytest.approx(alone[name], rel=1e-6), (parallel, name)
            assert ("caption_exact" in row) == (parallel == "ddp")


# Captions and labels


@pytest.mark.parametrize("written", ["a red ring\n", "  a  red ring", "a red\tring", "a red ring"])
def test_a_perfect_model_scores_one_however_the_caption_is_spaced(tmp_path, written, monkeypatch):
    write_tar(tmp_path / "x.tar", [("a.png", png()), ("a.txt", written.encode())])
    (source,) = open_sources(f"{tmp_path}:alt")
    config = tiny_config()
    evaluation = Evaluation(source, config, Tokenizer(config.tokenizer), 4)
    monkeypatch.setattr(evaluation_file, "caption",
                        lambda *args: [Caption("a red ring", 0.0, [])])
    runtime = Runtime(0, 1, torch.device("cpu"), torch.float32, "none", False)
    assert evaluation.caption_scores(AIMv2(config), runtime) == {"caption_exact": 1.0}


def test_a_caption_that_was_cut_is_compared_as_it_was_cut(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.png", png()), ("a.txt", b"word " * 100)])
    (source,) = open_sources(f"{tmp_path}:alt")
    config = tiny_config(max_tokens=5)
    tokenizer = Tokenizer(config.tokenizer)
    (caption,) = Evaluation(source, config, tokenizer, 4).captions
    assert caption == tokenizer.decode(tokenizer.encode("word " * 100, 5))
    assert len(caption) < 30


@pytest.mark.parametrize("text, name, expected", [
    ("a Dog on grass", "dog", True), ("a dog", "Dog", True), ("hotdogs", "dog", False),
    ("a golden retriever", "golden_retriever", True), ("T-shirt", "t shirt", True),
    ("一只小狗在草地上", "狗", True), ("一只小狗在草地上", "猫", False),
    ("eine Löwin", "Löwe", False), ("der Löwe.", "löwe", True), ("ein Häring", "ring", False),
    ("котёл", "кот", False), ("a 3 d model", "3", True), ("33", "3", False), ("a (b)", "(b)", True),
    ("a dog", "", False), ("con mộ", "m", False),
    (unicodedata.normalize("NFD", "der Löwe"), "löwe", True),
    ("der Löwe", unicodedata.normalize("NFD", "löwe"), True)])
def test_a_caption_names_a_label_as_a_word(text, name, expected):
    assert names_label(text, name) == expected


def test_any_json_value_may_stand_where_a_label_name_is_looked_for(tmp_path):
    values = {"a": 7, "b": "cat", "c": None, "d": ["cat"], "e": True, "f": 2.5, "g": {"x": 1}}
    expected = ["7", "cat", None, None, None, "2.5", None]
    assert [label_text(value) for value in values.values()] == expected
    with ShardWriter(tmp_path) as writer:
        for key, value in values.items():
            writer.write(key, png(), "png", "a 7", {"label_name": value})
    evaluation, config = evaluation_of(tmp_path)
    assert evaluation.label_names == expected
    runtime = Runtime(0, 1, torch.device("cpu"), torch.float32, "none", False)
    scores = evaluation.caption_scores(AIMv2(config), runtime)
    assert set(scores) == {"caption_exact", "caption_names_label"}


# What is said


def test_the_run_says_how_many_images_are_held_out_and_caps_what_was_skipped(tmp_path):
    members = [(f"{i:02}.{end}", content) for i in range(15)
               for end, content in (("png", png() if i < 2 else b"?"), ("txt", b"x"))]
    write_tar(tmp_path / "x.tar", members)
    (source,) = open_sources(f"{tmp_path}:alt")
    config = tiny_config()
    lines = describe_held_out({"val": Evaluation(source, config, Tokenizer(config.tokenizer), 9)})
    assert lines[0] == "held out: 2 images of the 9 asked for (val)"
    assert len(lines) == 12 and lines[-1] == "skipped: ... and 3 more"


def test_the_run_says_how_many_captions_are_cut(tmp_path):
    """A caption that just fits, its end token included, is not."""
    texts = ("a red ring", "a blue ring", "a red star and a blue ring")
    write_tar(tmp_path / "x.tar", [(f"{i}.{end}", content) for i, text in enumerate(texts)
                                   for end, content in (("png", png()), ("txt", text.encode()))])
    (source,) = open_sources(f"{tmp_path}:alt")
    config = tiny_config(max_tokens=4)
    tokenizer = Tokenizer(config.tokenizer)
    assert len(tokenizer.encode("a red ring", 99)) == 4, "three words and the end token"
    lines = describe_held_out({"val": Evaluation(source, config, tokenizer, 3)})
    assert lines == ["held out: 3 images (val); 1 captions are longer than --max_tokens, and cut"]


def test_one_source_is_validated_on(tmp_path):
    simple_shards(tmp_path / "a", 3)
    config = tiny_config(val_data=f"{tmp_path}/a:alt,{tmp_path}/a:synthetic")
    with pytest.raises(ValueError, match="names 2 sources"):
        held_out_sources(config)


def test_runs_are_measured_over_sizes_beside_damaged_images(trained, tmp_path, capsys):
    write_tar(tmp_path / "x.tar", [
        ("a.png", png(1, (40, 40))), ("a.txt", b"one"), ("b.png", b"?"), ("b.txt", b"two"),
        ("c.png", png(3, (60, 40))), ("c.txt", b"three"),
        ("d.png", png(3, (40, 40))[:60]), ("d.txt", b"four")])
    (source,) = open_sources(f"{tmp_path}:alt")
    rows = across_sizes([trained[0]], [20], source, 10)
    assert [row["images"] for row in rows] == [1, 1]
    printed = capsys.readouterr().out
    assert printed.count("b.png") == printed.count("d.png") == 1


def test_sizes_of_a_source_without_a_readable_image_end_in_one_line(trained, tmp_path, capsys):
    write_tar(tmp_path / "x.tar", [(f"{i:02}.{end}", b"?") for i in range(12)
                                   for end in ("png", "txt")])
    (source,) = open_sources(f"{tmp_path}:alt")
    with pytest.raises(ValueError, match="none of its 12 samples has a readable image"):
        across_sizes([trained[0]], [20, 24], source, 10)
    assert capsys.readouterr().out.count("skipped") == 11, "ten samples, and how many more"


# Native batches never depend on how they are split


def native_data(folder, rank=0, world=1, **overrides):
    settings = dict(data=f"{folder}:alt:1", native_area=(3.0, 6.0), positions="sincos",
                    batch_size=12, steps=30)
    config = tiny_config(**{**settings, **overrides})
    return TrainingData(config, Tokenizer(config.tokenizer), rank, world)


def shapes_of_all_kinds(folder):
    with ShardWriter(folder) as writer:
        for i in range(40):
            writer.write(f"{i}", png(i, (20 + 7 * i % 60, 20 + 11 * i % 50)), "png",
                         f"number {i}", {})
    return folder


@pytest.mark.parametrize("world, accum", [(2, 1), (1, 4), (2, 2), (4, 1), (3, 1)])
def test_a_native_batch_is_the_same_however_it_is_split(tmp_path, world, accum):
    folder = shapes_of_all_kinds(tmp_path / "x")
    whole = native_data(folder)
    assert min(whole.sizes) == 5, "C = 12 * 25 patches, A up to 60"
    for step in range(6):
        parts = [native_data(folder, rank, world, grad_accum=accum)[step * accum + part]
                 for rank in range(world) for part in range(accum)]
        expected = whole[step]
        assert torch.equal(torch.cat([part.patches for part in parts]), expected.patches)
        assert torch.equal(torch.cat([part.grid for part in parts]), expected.grid)
        assert [part.rows.start for part in parts][0] == 0
        assert all(part.global_size == len(expected.patches) for part in parts)


def test_a_native_batch_that_cannot_be_split_is_refused_before_training(tmp_path):
    folder = shapes_of_all_kinds(tmp_path / "x")
    with pytest.raises(ValueError, match=r"has 4 images \(batch_size=12, native_area=3,6\), fewer "
                                         "than 5 ranks x grad_accum=1"):
        native_data(folder, 0, 5)
    with pytest.raises(ValueError, match="fewer than 2 ranks x grad_accum=3"):
        native_data(folder, 0, 2, grad_accum=3)
    assert batch_sizes(torch.tensor([8, 64, 500]).numpy(), 300).tolist() == [37, 4, 1]


@pytest.mark.parametrize("high", [5.5, math.log2(60), math.log2(50)])
def test_a_native_batch_is_refused_exactly_where_the_smallest_one_cannot_be_split(tmp_path, high):
    folder = shapes_of_all_kinds(tmp_path / "x")
    largest = max(draw_areas(0, 100_000, 3.0, high))
    smallest = 300 // int(largest)
    settings = dict(native_area=(3.0, high), steps=100_000)
    assert min(native_data(folder, 0, smallest, **settings).sizes) == smallest
    with pytest.raises(ValueError, match=f"smallest batch has {smallest} images.* a lower native"):
        native_data(folder, 0, smallest + 1, **settings)


@pytest.mark.slow
def test_a_native_run_resumed_on_two_ranks_with_other_micro_batches_goes_on(tmp_path, tiny_flags):
    folder = shapes_of_all_kinds(tmp_path / "x")
    flags = [*tiny_flags, f"--data={folder}:alt", "--native_area=3,6", "--steps=6"]
    run_script("train.py", *flags, f"--run_dir={tmp_path}/whole")
    split = [*flags, f"--run_dir={tmp_path}/split"]
    run_script("train.py", *split, "--save_every=3", "--grad_accum=3")
    (tmp_path / "split/checkpoints/latest").write_text("step-00000003")
    (tmp_path / "split/model.safetensors").unlink()
    run_script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
               "train.py", *split, "--grad_accum=2")
    whole, split = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "split"))
    assert [row["step"] for row in split] == [row["step"] for row in whole]
    for a, b in zip(whole, split, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), a["step"]


@pytest.mark.parametrize("world, accum", [(2, 2), (3, 1), (1, 5)])
def test_an_uneven_split_gives_the_gradient_of_the_whole_batch(scenes, world, accum):
    def gradient(world, accum):
        torch.manual_seed(0)
        total, counts = AIMv2(tiny_config()), [0, 0]
        for rank in range(world):
            config = tiny_config(data=f"{scenes}:alt", batch_size=7, steps=2, grad_accum=accum)
            data = TrainingData(config, Tokenizer(config.tokenizer), rank, world)
            for part in range(accum):
                batch = data[part]
                losses = total(batch, 3 + torch.arange(7)[batch.rows])
                counts = [counts[0] + int(losses.image_count), counts[1] + int(losses.text_count)]
                losses.total(0.4, 7 * 25 - 42, 50).backward()
        return counts, [p.grad for p in total.parameters()]

    (expected_counts, expected), (counts, found) = gradient(1, 1), gradient(world, accum)
    assert counts == expected_counts
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-4), float((a - b).abs().max())


def compiled_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of Dynamo itself
def test_evaluation_uses_up_no_recompilation_of_the_training_that_follows(tmp_path, monkeypatch):
    """The shapes of five held-out batches and of captions; Dynamo compiles at most eight."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self: compile_module(self, backend="eager"))
    evaluation, config = evaluation_of(tmp_path / "x")
    batch = evaluation.batches[0]
    evaluation.batches = [
        replace(batch.map(lambda tensor, n=n: tensor[:n]), rows=slice(0, n), global_size=n)
        for n in (1, 2, 3, 4, 5)] * 2
    evaluation.captions = evaluation.label_names = [None] * 30
    runtime = Runtime(0, 1, torch.device("cpu"), torch.float32, "none", True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = AIMv2(config)
    trained = parallelize(model, runtime)
    evaluate(model, trained, {"val": evaluation, "novel": evaluation}, runtime)
    assert compiled_graphs() == 0
    trained(batch, torch.full((5,), 3)).total(0.4, 100, 20).backward()
    assert compiled_graphs() == 2, "one block of the encoder, one of the decoder"
    torch._dynamo.reset()
