"""The contrastive baseline: its loss, its two towers, and whole runs."""

import math

import numpy as np
import pytest
import torch
from conftest import random_batch, tiny_config

from nano_aimv2 import contrastive
from nano_aimv2.checkpoint import load_model
from nano_aimv2.contrastive import CLIP, contrastive_loss, negatives_and_own, train_step
from nano_aimv2.distributed import Runtime
from nano_aimv2.metrics import read_metrics
from nano_aimv2.model import AIMv2
from nano_aimv2.optim import make_optimizer

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
    images.requires_grad_()
    loss = contrastive_loss(images, texts, 10.0, is_compared)
    assert float(loss) == pytest.approx(info_nce(images.detach(), texts, 10.0, {(0, 2), (2, 0)}), rel=1e-5)
    all_equal = contrastive_loss(images, texts, 10.0, negatives_and_own(tokens[[0, 0, 0, 0]], torch.full((4,), 2)))
    assert float(all_equal) == 0, "nothing to tell apart, nothing to lose"


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
    assert math.exp(-float(ours.log_scale)) == pytest.approx(0.07)


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
    assert float(model.log_scale.exp()) == pytest.approx(100)


# Runs


@pytest.fixture(scope="module")
def clip_flags(tiny_flags):
    changed = ("--steps", "--lr", "--eval_images", "--eval_every")
    return [flag for flag in tiny_flags if not flag.startswith(changed)] + [
        "--steps=60", "--lr=3e-3", "--eval_images=24", "--eval_every=40"]


@pytest.fixture(scope="module")
def clip_run(clip_flags, tmp_path_factory):
    """A finished run: its folder."""
    folder = tmp_path_factory.mktemp("runs") / "clip"
    contrastive.main([*clip_flags, f"--run={folder}"])
    return folder


def test_a_run_learns_and_leaves_what_is_promised(clip_run):
    rows = read_metrics(clip_run / "metrics.jsonl")
    train, val = [row for row in rows if "loss" in row], [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in train] == list(range(1, 61)) and [row["step"] for row in val] == [40, 60]
    assert set(train[0]) == {"step", "loss", "lr", "grad_norm", "step_ms", "img_per_s"}
    print(train[0]["loss"], np.mean([row["loss"] for row in train[-10:]]), val)
    model, config, tokenizer = load_model(clip_run, kind=CLIP)
    assert config.batch_size == 12 and tokenizer.eos < config.vocab_size and not model.training
