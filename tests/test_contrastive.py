"""The contrastive baseline: its loss, its two towers, and whole runs."""

import math

import numpy as np
import pytest
import torch
from conftest import random_batch, tiny_config

from nano_aimv2 import contrastive
from nano_aimv2.checkpoint import load_model
from nano_aimv2.contrastive import CLIP, contrastive_loss, evaluate, negatives_and_own, train_step
from nano_aimv2.data import Batch
from nano_aimv2.distributed import Runtime
from nano_aimv2.evaluate import Evaluation, held_out_sources
from nano_aimv2.metrics import read_metrics
from nano_aimv2.model import AIMv2
from nano_aimv2.optim import make_optimizer
from nano_aimv2.probe import encode, read_labelled
from nano_aimv2.tokenizer import Tokenizer


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small are only slowed down by a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


RUNTIME = Runtime(0, 1, torch.device("cpu"), torch.float32, "none", False)


def close(a, b, tolerance=1e-5):
    difference = float((a - b).detach().abs().max())
    assert difference <= tolerance, f"largest difference {difference:.3g}, tolerance {tolerance:.3g}"


def unit_vectors(rows, width, seed):
    x = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True))


def info_nce(images, texts, scale, left_out=()):
    """By the formula, in float64: both directions' mean of -log of the own pair's share; `left_out` pairs (i, j) are skipped."""
    similarity, total = scale * images.double().numpy() @ texts.double().numpy().T, 0.0
    for s in (similarity, similarity.T):
        for i in range(len(s)):
            rivals = [math.exp(s[i, j]) for j in range(len(s)) if (i, j) not in left_out]
            total -= math.log(math.exp(s[i, i]) / sum(rivals))
    return total / (2 * len(similarity))


# Loss


def test_the_loss_is_info_nce_both_ways():
    images, texts = unit_vectors(5, 7, seed=1), unit_vectors(5, 7, seed=2)
    found = float(contrastive_loss(images, texts, 14.0, torch.ones(5, 5, dtype=torch.bool)))
    assert found == pytest.approx(info_nce(images, texts, 14.0), rel=1e-5)


def test_pairs_of_equal_captions_are_neither_right_nor_wrong_for_each_other():
    tokens = torch.tensor([[5, 6, 0, 9], [5, 7, 0, 9], [5, 6, 3, 1], [5, 6, 0, 0]])
    is_compared = negatives_and_own(tokens, torch.tensor([2, 2, 2, 3]))  # 0 and 2 are equal before padding; 3 is longer
    expected = torch.ones(4, 4, dtype=torch.bool)
    expected[0, 2] = expected[2, 0] = False
    assert torch.equal(is_compared, expected)
    images, texts = unit_vectors(4, 6, seed=3), unit_vectors(4, 6, seed=4)
    loss = contrastive_loss(images, texts, 10.0, is_compared)
    assert loss.item() == pytest.approx(info_nce(images, texts, 10.0, {(0, 2), (2, 0)}), rel=1e-5)
    all_equal = contrastive_loss(images, texts, 10.0, negatives_and_own(tokens[[0, 0, 0, 0]], torch.full((4,), 2)))
    assert all_equal.item() == 0, "nothing to tell apart, nothing to lose"


# Towers


def test_a_text_vector_depends_on_its_caption_up_to_eos_alone():
    config = tiny_config()
    model, batch = CLIP(config), random_batch(config, num_tokens=(7, 4, 9))
    found = model.text_vectors(batch.tokens, batch.num_tokens)
    close(found.norm(dim=1), torch.ones(3))
    other = batch.tokens.clone()
    other[0, 7:], other[1, 4:] = 1, 2
    close(model.text_vectors(other, batch.num_tokens), found)
    close(model.text_vectors(batch.tokens[1:2, :4], batch.num_tokens[1:2]), found[1:2])
    longer = torch.cat([batch.tokens, torch.ones(3, 32, dtype=torch.int64)], dim=1)  # wider than the position table
    close(model.text_vectors(longer, batch.num_tokens), found)
    for place in (0, 3):  # the first token and EOS itself do count
        other = batch.tokens.clone()
        other[1, place] = (other[1, place] + 1) % config.vocab_size
        assert (model.text_vectors(other, batch.num_tokens)[1] - found[1]).abs().max() > 1e-3


def test_an_image_vector_depends_on_its_valid_patches_alone():
    config = tiny_config()
    model, batch = CLIP(config), random_batch(config, grids=[(5, 5), (2, 3), (4, 3)])
    found = model.image_vectors(batch.patches, batch.grid)
    close(found.norm(dim=1), torch.ones(3))
    other = batch.patches.clone()
    other[1, 6:] = 255
    close(model.image_vectors(other, batch.grid), found)
    close(model.image_vectors(batch.patches[1:2, :6], batch.grid[1:2]), found[1:2])
    other = batch.patches.clone()
    other[1, 5] = 255 - other[1, 5]
    assert (model.image_vectors(other, batch.grid)[1] - found[1]).abs().max() > 1e-3


def test_the_encoder_and_the_text_trunk_are_shaped_like_aimv2s():
    config = tiny_config(positions="learned")
    ours, theirs = CLIP(config), AIMv2(config)
    for a, b in ((ours.encoder, theirs.encoder), (ours.text_trunk, theirs.decoder.trunk)):
        assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}
    assert math.exp(-ours.log_scale.item()) == pytest.approx(0.07)


def test_every_weight_learns_and_the_scale_stays_below_its_cap():
    torch.manual_seed(0)
    config = tiny_config()
    model, batch = CLIP(config), random_batch(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_step(model, make_optimizer(model, 1e-2, 0.0, (0.9, 0.95)), batch, 1e-2, 1.0, RUNTIME)
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still, f"{still} did not move"
    model.log_scale.data.fill_(math.log(500))
    train_step(model, make_optimizer(model, 1e-2, 0.0, (0.9, 0.95)), batch, 1e-2, 1.0, RUNTIME)
    assert model.log_scale.exp().item() == pytest.approx(100)


# Runs


@pytest.fixture(scope="module")
def clip_flags(tiny_flags):
    changed = ("--steps", "--eval_images", "--eval_every")
    return [flag for flag in tiny_flags if not flag.startswith(changed)] + ["--steps=120", "--eval_images=18", "--eval_every=80"]


@pytest.fixture(scope="module")
def clip_run(clip_flags, tmp_path_factory):
    """A finished run: its folder."""
    folder = tmp_path_factory.mktemp("runs") / "clip"
    contrastive.main([*clip_flags, f"--run={folder}"])
    return folder


def test_a_run_learns_and_leaves_what_is_promised(clip_run):
    rows = read_metrics(clip_run / "metrics.jsonl")
    train, val = [row for row in rows if "loss" in row], [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in train] == list(range(1, 121)) and [row["step"] for row in val] == [80, 120]
    assert set(train[0]) == {"step", "loss", "lr", "grad_norm", "step_ms", "img_per_s"}
    last = sum(row["loss"] for row in train[-10:]) / 10
    assert last < 0.7 * math.log(12), f"loss {last:.2f}, chance {math.log(12):.2f}"
    assert val[-1]["val_batch"] == 18 and val[-1]["val_batch_novel"] == 16 and 0 <= val[-1]["val_retrieval"] <= 1
    model, config, tokenizer = load_model(clip_run, kind=CLIP)
    assert config.batch_size == 12 and tokenizer.eos < config.vocab_size and not model.training
    assert (clip_run / "tokenizer.tiktoken").exists()


def test_a_runs_encoder_can_be_probed(clip_run, scenes):
    model, config, _ = load_model(clip_run, kind=CLIP)
    train, test = (read_labelled(scenes / split, config, 40)[0] for split in ("train", "val"))
    features = encode(model.encoder, test, config)
    assert features.shape == (len(test.patches), 25, 24) and len(train.patches) > 0


def test_retrieval_is_right_where_the_own_caption_beats_all_different_ones(scenes):
    config = tiny_config(data=f"{scenes}:alt:1")
    evaluation = Evaluation(held_out_sources(config)["val"], config, Tokenizer(config.tokenizer), 10, batch_size=4)
    assert [len(batch.patches) for batch in evaluation.batches] == [4, 4, 2]
    firsts = [int(batch.patches.sum()) for batch in evaluation.batches]

    class Told(CLIP):
        """Knows the first batch's pairs, and takes every picture of the others for the first."""

        def forward(self, batch):
            eye = torch.eye(len(batch.patches), config.decoder_dim)
            return (eye, eye) if int(batch.patches.sum()) == firsts[0] else (eye[:1].expand_as(eye), eye)

    for batch in evaluation.batches:
        batch.tokens[:, 0] = torch.arange(len(batch.tokens))  # all different
    assert evaluate(Told(config), evaluation, RUNTIME)["val_retrieval"] == 5 / 8  # 4 of 4 and 1 of 4; the batch of 2 is left out
    evaluation.batches[1].tokens[:], evaluation.batches[1].num_tokens[:] = 7, 3  # all equal: none can be wrong
    assert evaluate(Told(config), evaluation, RUNTIME)["val_retrieval"] == 1


def test_it_sees_the_very_samples_that_train_py_sees(clip_flags, tmp_path, monkeypatch):
    import train

    class Seen(Exception):
        pass

    def recorder(seen):
        def record(*args):
            batch = next(arg for arg in (a[0] if isinstance(a, list) else a for a in args) if isinstance(arg, Batch))
            seen.append(batch)
            if len(seen) == 2:
                raise Seen
            return real[len(args)](*args)
        return record

    real = {8: train.backward, 6: train_step}
    ours, theirs = [], []
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    monkeypatch.setattr(train, "backward", recorder(theirs))
    monkeypatch.setattr(contrastive, "train_step", recorder(ours))
    for main, name in ((train.main, "theirs"), (contrastive.main, "ours")):
        with pytest.raises(Seen):
            main([*clip_flags, "--crop_scale=0.5", "--seed=3", f"--run={tmp_path / name}"])
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.patches, b.patches) and torch.equal(a.tokens, b.tokens)
    assert not torch.equal(ours[0].patches, ours[1].patches)


def test_a_finished_run_is_left_as_it_is_and_an_interrupted_one_starts_again(clip_run, clip_flags, tmp_path, capsys):
    log = (clip_run / "metrics.jsonl").read_text()
    contrastive.main([*clip_flags, f"--run={clip_run}"])
    assert "is finished" in capsys.readouterr().out and (clip_run / "metrics.jsonl").read_text() == log
    with pytest.raises(ValueError, match="lr=0.001 there, 0.5 asked for"):
        contrastive.main([*clip_flags, "--lr=0.5", f"--run={clip_run}"])
    folder, flags = tmp_path / "run", [*clip_flags, "--steps=4", f"--run={tmp_path / 'run'}"]
    contrastive.main(flags)
    losses = [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    (folder / "model.safetensors").unlink()  # as after a kill
    contrastive.main(flags)
    assert [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row] == losses and len(losses) == 4


@pytest.mark.parametrize("flag, message", [
    ("--grad_accum=2", "use --grad_accum=1"), ("--batch_size=1", "least --batch_size=2"), ("--init=runs/x", "leave --init out"),
    ("--dtype=float16", "use --dtype=float32"), ("--vocab_size=700", "use --vocab_size=768"), ("--data=none", "does not exist"),
    ("--stepz=3", "did you mean --steps")])
def test_what_it_does_not_do_is_refused_before_anything_is_written(flag, message, clip_flags, tmp_path):
    with pytest.raises(ValueError, match=message):
        contrastive.main([*clip_flags, flag, f"--run={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists(), "the folder is free for the corrected flags"


def test_many_processes_and_a_folder_of_train_py_are_refused(clip_flags, trained, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds a run of train.py"):
        contrastive.main([*clip_flags, f"--run={trained[0]}"])
    with pytest.raises(ValueError, match="does not fit"):
        load_model(trained[0], kind=CLIP)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes.*without torchrun"):
        contrastive.main([*clip_flags, f"--run={tmp_path}"])


def test_without_a_run_flag_it_stays_out_of_train_pys_folder():
    assert contrastive.read_config(["--preset=photos"]).run == "runs/photos-clip"
    assert contrastive.read_config(["--run=runs/here"]).run == "runs/here"
