"""The contrastive baseline: its loss, its two towers, and whole runs."""

import math
import signal

import numpy as np
import pytest
import torch
from helpers import as_run, random_batch, tiny_config

from nano_aimv2.data.tokenizer import Tokenizer
from nano_aimv2.hub import save_encoder
from nano_aimv2.lab import contrastive
from nano_aimv2.lab.contrastive import (
    CLIP,
    comparison_mask,
    contrastive_loss,
    retrieval_scores,
    train_step,
)
from nano_aimv2.lab.probe import frozen_features, read_labelled
from nano_aimv2.model import AIMv2
from nano_aimv2.training.checkpoint import load_model
from nano_aimv2.training.distributed import single_process
from nano_aimv2.training.evaluate import Evaluation, held_out_sources
from nano_aimv2.training.metrics import read_metrics
from nano_aimv2.training.optim import make_optimizer

RUNTIME = single_process()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small are only slowed down by a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def close(a, b, tolerance=1e-5):
    difference = float((a - b).detach().abs().max())
    message = f"largest difference {difference:.3g}, tolerance {tolerance:.3g}"
    assert difference <= tolerance, message


def unit_vectors(rows, width, seed):
    x = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True))


def info_nce(images, texts, scale, left_out=()):
    """By the formula, in float64: the mean of -log(share of the own pair), both ways; the pairs
    (i, j) of `left_out` are skipped."""
    similarity = scale * images.double().numpy() @ texts.double().numpy().T
    total = 0.0
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
    # Captions 0 and 2 are equal before their padding; 3 is longer
    is_compared = comparison_mask(tokens, torch.tensor([2, 2, 2, 3]))
    expected = torch.ones(4, 4, dtype=torch.bool)
    expected[0, 2] = expected[2, 0] = False
    assert torch.equal(is_compared, expected)
    images, texts = unit_vectors(4, 6, seed=3), unit_vectors(4, 6, seed=4)
    loss = contrastive_loss(images, texts, 10.0, is_compared)
    assert loss.item() == pytest.approx(info_nce(images, texts, 10.0, {(0, 2), (2, 0)}), rel=1e-5)
    is_compared = comparison_mask(tokens[[0, 0, 0, 0]], torch.full((4,), 2))
    all_equal = contrastive_loss(images, texts, 10.0, is_compared)
    assert all_equal.item() == 0, "equal captions leave nothing to find"


# Towers


def test_a_text_vector_depends_on_nothing_but_its_caption_up_to_eos():
    config = tiny_config()
    model, batch = CLIP(config), random_batch(config, num_tokens=(7, 4, 9))
    found = model.text_vectors(batch.tokens, batch.num_tokens)
    close(found.norm(dim=1), torch.ones(3))
    other = batch.tokens.clone()
    other[0, 7:], other[1, 4:] = 1, 2
    close(model.text_vectors(other, batch.num_tokens), found)
    close(model.text_vectors(batch.tokens[1:2, :4], batch.num_tokens[1:2]), found[1:2])
    wider = torch.ones(3, 32, dtype=torch.int64)  # wider than the position table
    longer = torch.cat([batch.tokens, wider], dim=1)
    close(model.text_vectors(longer, batch.num_tokens), found)
    for place in (0, 3):  # the first token and EOS itself count
        other = batch.tokens.clone()
        other[1, place] = (other[1, place] + 1) % config.vocab_size
        changed = model.text_vectors(other, batch.num_tokens)
        assert (changed[1] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("encoder_lr", [1.0, 0.0])
def test_an_image_vector_depends_on_nothing_but_its_valid_patches(encoder_lr):
    config = tiny_config(encoder_lr=encoder_lr)
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

    def shapes(module):
        return {name: weight.shape for name, weight in module.state_dict().items()}

    assert shapes(ours.encoder) == shapes(theirs.encoder)
    assert shapes(ours.text_trunk) == shapes(theirs.decoder.trunk)
    assert math.exp(-ours.log_scale.item()) == pytest.approx(0.07)


def test_attention_pools_with_one_query_per_head_over_the_valid_patches():
    torch.manual_seed(0)
    pool, features = contrastive.AttentionPool(24, 3), torch.randn(4, 10, 24)
    is_valid = contrastive.valid_patches(torch.tensor([[2, 5], [1, 3], [3, 3], [1, 1]]), 10)
    assert is_valid.sum(dim=1).tolist() == [10, 3, 9, 1]
    pool.query.data.mul_(100)  # else all patches weigh nearly the same
    found = pool(features, is_valid)
    for x, valid, row in zip(features, is_valid, found, strict=True):
        k, v = pool.k_proj(x[valid]), pool.v_proj(x[valid])
        for head in torch.arange(24).split(8):
            weights = (k[:, head] @ pool.query[head] / 8**0.5).softmax(dim=0)
            close(row[head], weights @ v[:, head])


def test_a_locked_encoder_gets_no_gradient_and_everything_else_learns():
    torch.manual_seed(0)
    config = tiny_config(encoder_lr=0.0)
    model, batch, records = CLIP(config), random_batch(config), []
    model.encoder.register_forward_hook(lambda *_: records.append(torch.is_grad_enabled()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert not any(p.requires_grad for p in model.encoder.parameters())
    optimizer = make_optimizer(model, 1e-2, 0.1, (0.9, 0.95))
    train_step(model, optimizer, batch, 1.0, RUNTIME)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.startswith("encoder.")}
    assert records == [False], "a locked encoder needs nothing for a backward pass"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model.image_vectors(batch.patches, batch.grid)
    close(rounded, model.image_vectors(batch.patches, batch.grid), 0.05)


def test_every_weight_learns_and_the_scale_stays_below_its_cap():
    torch.manual_seed(0)
    config = tiny_config()
    model, batch = CLIP(config), random_batch(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_step(model, make_optimizer(model, 1e-2, 0.0, (0.9, 0.95)), batch, 1.0, RUNTIME)
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still, f"{still} did not move"
    model.log_scale.data.fill_(math.log(500))
    train_step(model, make_optimizer(model, 1e-2, 0.0, (0.9, 0.95)), batch, 1.0, RUNTIME)
    assert model.log_scale.exp().item() == pytest.approx(100)


# Runs


@pytest.fixture(scope="module")
def clip_flags(tiny_flags):
    changed = ("--steps", "--eval_images", "--eval_every")
    kept = [flag for flag in tiny_flags if not flag.startswith(changed)]
    return [*kept, "--steps=120", "--eval_images=18", "--eval_every=80"]


@pytest.fixture(scope="module")
def clip_run(clip_flags, tmp_path_factory):
    """A finished run: its folder."""
    folder = tmp_path_factory.mktemp("runs") / "clip"
    contrastive.main([*clip_flags, f"--run_dir={folder}"])
    return folder


def test_a_run_learns_and_leaves_what_is_promised(clip_run):
    rows = read_metrics(clip_run / "metrics.jsonl")
    train, val = ([row for row in rows if name in row] for name in ("loss", "val_loss"))
    assert [row["step"] for row in train] == list(range(1, 121))
    assert [row["step"] for row in val] == [80, 120]
    assert set(train[0]) == {"step", "loss", "lr", "grad_norm", "skipped", "step_ms", "data_ms",
                             "img_per_s"}
    last = sum(row["loss"] for row in train[-10:]) / 10
    assert last < 0.7 * math.log(12), f"loss {last:.2f}, chance {math.log(12):.2f}"
    assert val[-1]["val_batch"] == 18 and val[-1]["val_batch_novel"] == 16
    assert 0 <= val[-1]["val_retrieval"] <= 1
    model, config, tokenizer = load_model(clip_run, kind=CLIP)
    assert config.batch_size == 12 and tokenizer.eos < config.vocab_size and not model.training
    assert (clip_run / "tokenizer.tiktoken").exists()


@pytest.mark.parametrize("is_run", [True, False])
def test_a_locked_run_has_the_encoder_of_a_run_or_of_published_weights(
        is_run, scenes, tmp_path):
    torch.manual_seed(0)
    init = tmp_path / "parent"
    parent = as_run(init)
    if not is_run:
        init = tmp_path / "published"
        save_encoder(parent.encoder, init)
    folder = tmp_path / "lit"
    flags = [f"--data={scenes}:synthetic:1", "--device=cpu", "--dtype=float32", "--steps=60",
             "--lr=1e-3", "--warmup_steps=4", "--batch_size=12", "--log_every=1",
             "--eval_images=16", f"--init={init}", "--lock=true", f"--run_dir={folder}"]
    contrastive.main(flags)
    model, config, _ = load_model(folder, kind=CLIP)
    assert (config.embed_dim, config.image_size, config.patch_size) == (24, 20, 4)
    assert config.decoder_dim == (32 if is_run else 192), "published weights have no text tower"
    for name, weight in model.encoder.state_dict().items():
        assert torch.equal(weight, parent.encoder.state_dict()[name]), name
    losses = losses_of(folder)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses
    contrastive.main(flags)  # finished: left as it is
    assert losses_of(folder) == losses


def test_a_runs_encoder_can_be_probed(clip_run, scenes):
    model, config, _ = load_model(clip_run, kind=CLIP)
    train, test = (read_labelled(scenes / split, config, 40)[0] for split in ("train", "val"))
    features = frozen_features(model.encoder, test)
    assert features.shape == (len(test.patches), 25, 24) and len(train.patches) > 0


def test_retrieval_is_right_where_the_own_caption_beats_all_different_ones(scenes):
    config = tiny_config(data=f"{scenes}:alt:1")
    source = held_out_sources(config)["val"]
    evaluation = Evaluation(source, config, Tokenizer(config.tokenizer), 10, batch_size=4)
    assert [len(batch.patches) for batch in evaluation.batches] == [4, 4, 2]
    firsts = [int(batch.patches.sum()) for batch in evaluation.batches]

    class Told(CLIP):
        """Knows the pairs of the first batch, and takes every image of the others for the first."""

        def forward(self, batch):
            eye = torch.eye(len(batch.patches), config.decoder_dim)
            is_first = int(batch.patches.sum()) == firsts[0]
            return eye if is_first else eye[:1].expand_as(eye), eye

    for batch in evaluation.batches:
        batch.tokens[:, 0] = torch.arange(len(batch.tokens))  # all different
    # 4 of 4 and 1 of 4; the batch of 2 is left out
    assert retrieval_scores(Told(config), evaluation, RUNTIME)["val_retrieval"] == 5 / 8
    second = evaluation.batches[1]
    second.tokens[:], second.num_tokens[:] = 7, 3  # all equal: none can be wrong
    assert retrieval_scores(Told(config), evaluation, RUNTIME)["val_retrieval"] == 1


def test_step_k_sees_the_same_samples_as_in_train_py(clip_flags, tmp_path, monkeypatch):
    import train

    class SeenEnough(Exception):
        pass

    def record(seen, function, place):
        """`function`, but `seen` keeps its batch, argument `place`; the second ends the run."""
        def recorded(*args):
            seen.append(args[place])
            if len(seen) == 2:
                raise SeenEnough
            return function(*args)
        return recorded

    ours, theirs = [], []
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(train, "count_targets", record(theirs, train.count_targets, 0))
    monkeypatch.setattr(contrastive, "train_step", record(ours, train_step, 2))
    for main, name in ((train.main, "theirs"), (contrastive.main, "ours")):
        with pytest.raises(SeenEnough):
            main([*clip_flags, "--crop_scale=0.5", "--seed=3", f"--run_dir={tmp_path / name}"])
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.patches, b.patches) and torch.equal(a.tokens, b.tokens)
    assert not torch.equal(ours[0].patches, ours[1].patches)


def losses_of(folder):
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def test_a_finished_run_is_left_as_it_is_and_an_interrupted_one_starts_again(
        clip_run, clip_flags, tmp_path, capsys):
    log = (clip_run / "metrics.jsonl").read_text()
    contrastive.main([*clip_flags, f"--run_dir={clip_run}"])
    assert "is finished" in capsys.readouterr().out
    assert (clip_run / "metrics.jsonl").read_text() == log
    with pytest.raises(ValueError, match="lr=0.001 there, 0.5 asked for"):
        contrastive.main([*clip_flags, "--lr=0.5", f"--run_dir={clip_run}"])
    folder = tmp_path / "run"
    flags = [*clip_flags, "--steps=4", f"--run_dir={folder}"]
    contrastive.main(flags)
    losses = losses_of(folder)
    (folder / "model.safetensors").unlink()  # as after a kill
    contrastive.main(flags)
    assert losses_of(folder) == losses and len(losses) == 4


@pytest.mark.parametrize("flag, message", [
    ("--grad_accum=2", "use --grad_accum=1"),
    ("--batch_size=1", "least --batch_size=2"),
    ("--init=runs/x", "leave --init out, or keep this encoder with --lock=true"),
    ("--lock=true", "name it, --init=runs/toy"),
    ("--lock=true --init=none", "none is neither a folder nor a repository id"),
    ("--encoder_lr=0.5", "leave --encoder_lr out"),
    ("--dtype=float16", "use --dtype=float32"),
    ("--vocab_size=700", "use --vocab_size=768"),
    ("--data=none", "does not exist"),
    ("--stepz=3", "did you mean --steps"),
])
def test_bad_settings_are_refused_before_anything_is_written(flag, message, clip_flags, tmp_path):
    with pytest.raises(ValueError, match=message):
        contrastive.main([*clip_flags, *flag.split(), f"--run_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists(), "the folder is free for the corrected flags"


@pytest.mark.slow
def test_many_processes_and_a_folder_of_train_py_are_refused(
        clip_flags, trained, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds a run of train.py"):
        contrastive.main([*clip_flags, f"--run_dir={trained[0]}"])
    with pytest.raises(ValueError, match="do not fit the model"):
        load_model(trained[0], kind=CLIP)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes.*without torchrun"):
        contrastive.main([*clip_flags, f"--run_dir={tmp_path}"])


def test_without_run_dir_it_stays_out_of_train_pys_folder(learned):
    assert contrastive.read_config(["--preset=photos"]).run_dir == "runs/photos-clip"
    locked = contrastive.read_config([f"--init={learned[0]}", "--lock"])
    assert locked.run_dir == "runs/toy-lit" and locked.encoder_lr == 0
    for flags in (["--run_dir=runs/here"], ["--run-dir", "runs/here"]):
        assert contrastive.read_config(flags).run_dir == "runs/here"
