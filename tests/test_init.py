"""Init: runs that start from the weights of a run, or of an encoder in anybody's files."""

import math

import pytest
import torch
from helpers import TORCHRUN, as_run, curve, random_batch, run_script, tiny_config
from safetensors.torch import load_file

from nano_aimv2.config import POST_TRAINING, PRESETS, Config
from nano_aimv2.hub import load_encoder, save_encoder
from nano_aimv2.losses import Losses
from nano_aimv2.model import AIMv2
from nano_aimv2.positions import resize_table
from nano_aimv2.training import distributed
from nano_aimv2.training.init import (
    DECODER,
    ENCODER,
    GRID,
    TABLE,
    adopt_init,
    describe_init,
    load_init,
    open_run,
)
from nano_aimv2.training.metrics import train_flops
from nano_aimv2.training.optim import SAMPLER_LR, clipped_parameters, make_optimizer, set_lr

slow = pytest.mark.slow


def test_init_keeps_the_table_of_an_equal_grid_and_all_weights(learned):
    folder, parent = learned
    model = AIMv2(tiny_config(positions="learned", init=str(folder)))
    load_init(model, model.config)
    for name, weight in parent.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_init_resizes_a_table_and_a_ramp_stays_a_ramp(learned):
    folder, _ = learned
    # From 5 x 5 patches to 10 x 10
    model = AIMv2(tiny_config(positions="learned", init=str(folder), image_size=40))
    load_init(model, model.config)
    table = model.encoder.positions.table.detach().reshape(10, 10, 24)
    inside = table[4:6, 4:6] - torch.arange(24.0)  # away from the border
    old = (torch.arange(4.0, 6.0) + 0.5) / 2 - 0.5  # place k of the new table on the old one
    error = (inside - (old[:, None] + 10 * old)[..., None]).abs().max()
    assert error < 1e-4, float(error)


def test_a_native_run_drops_the_table_and_keeps_everything_else(learned):
    folder, parent = learned
    model = AIMv2(tiny_config(init=str(folder), native_area=(2.0, 4.0)))
    load_init(model, model.config)
    assert parent.state_dict().keys() - model.state_dict().keys() == {TABLE}
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, parent.state_dict()[name]), name


@pytest.mark.parametrize("settings, message", [
    ({"num_heads": 4}, "num_heads=4 must be as in .*: use --num_heads=3"),
    ({"patch_size": 5}, "--patch_size=4"),
    ({"decoder_dim": 64}, "--decoder_dim=32"),
    ({"pixel_mean": (0.5, 0.5, 0.5)}, "pixel_mean=0.5,0.5,0.5 .*--pixel_mean=0.485,0.456,0.406"),
    ({"tokenizer": "README.md"}, "tokenizer.tiktoken"),
    ({"init": "/nowhere"}, "/nowhere is neither a folder nor a repository id"),
])
def test_settings_that_contradict_the_weights_are_named_with_the_fix(learned, tmp_path, settings,
                                                                     message):
    with pytest.raises(ValueError, match=message):
        adopt_init({"init": str(learned[0]), "run_dir": str(tmp_path), **settings})


def test_what_the_weights_settle_is_taken_from_them(learned, tmp_path):
    folder, parent = learned
    given = {"init": str(folder), "run_dir": str(tmp_path), "lr": 0.1, "image_size": 40}
    config = Config.from_preset(**adopt_init(given))
    for name in (*ENCODER, *DECODER, *GRID):
        expected = 40 if name == "image_size" else getattr(parent.config, name)
        assert getattr(config, name) == expected, name
    assert config.lr == 0.1 and config.steps == Config.steps
    AIMv2(config).load_state_dict(parent.state_dict() | {
        TABLE: AIMv2(config).encoder.positions.table})
    (line,) = describe_init(config)
    assert "patch_size=4 (preset: 12)" in line and "lr=" not in line, line


def test_post_training_presets_keep_their_grid(learned, tmp_path):
    as_run(tmp_path / "parent")
    given = {"init": str(tmp_path / "parent"), "run_dir": str(tmp_path / "run")}
    config = Config.from_preset(**adopt_init({"preset": "toy-native", **given}))
    assert config.native_area == (3, 6) and config.patch_size == 4
    config = Config.from_preset(**adopt_init({"preset": "toy-highres", **given}))
    assert config.image_size == 72 and config.embed_dim == 24


def test_an_unknown_preset_is_named(learned):
    with pytest.raises(ValueError, match="preset='toyy' must be one of .*did you mean toy"):
        adopt_init({"preset": "toyy", "init": str(learned[0])})


def test_a_resumed_run_needs_its_parent_no_more(tmp_path):
    config = tiny_config(init="/gone", run_dir=str(tmp_path))
    config.save(tmp_path / "config.json")
    adopted = adopt_init({"run_dir": str(tmp_path), "steps": 7})
    assert Config.from_preset(**adopted).embed_dim == config.embed_dim == 24
    assert adopted["steps"] == 7 and "init" not in adopted


def test_a_table_cannot_come_from_a_run_without_one(tmp_path):
    as_run(tmp_path / "parent")
    with pytest.raises(ValueError, match="--positions=sincos"):
        adopt_init({"init": str(tmp_path / "parent"), "positions": "learned",
                        "run_dir": str(tmp_path / "run")})


def test_post_training_presets_ask_for_init(tmp_path):
    assert [name for name in PRESETS if "-" in name] == list(POST_TRAINING)
    for preset in POST_TRAINING:
        with pytest.raises(ValueError, match=rf"--init=runs/{preset.split('-')[0]}"):
            open_run(Config.from_preset(preset, run_dir=str(tmp_path)))
    assert Config.from_preset("large-448").weight_decay == 0
    assert "synthetic" not in Config.from_preset("large-336").data
    assert Config.from_preset("large-native").native_area == (7, 12)


# From an encoder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder in transformers' layout, the encoder) with a table, other widths and pixels than the
    toy's."""
    torch.manual_seed(5)
    encoder = AIMv2(tiny_config(positions="learned", pixel_mean=(0.5, 0.4, 0.3))).encoder.eval()
    torch.nn.init.normal_(encoder.positions.table)
    folder = tmp_path_factory.mktemp("exported") / "encoder"
    save_encoder(encoder, folder)
    return folder, encoder


def test_an_encoder_that_went_out_comes_back_through_init_with_its_features(exported, tmp_path):
    folder, encoder = exported
    given = {"init": str(folder), "run_dir": str(tmp_path), "seed": 3}
    config = Config.from_preset(**adopt_init(given))
    assert (config.patch_size, config.image_size, config.positions) == (4, 20, "learned")
    assert config.pixel_mean == (0.5, 0.4, 0.3) and config.mlp_hidden_dim == 64
    torch.manual_seed(config.seed)
    model, fresh = AIMv2(config), AIMv2(config).decoder
    torch.manual_seed(config.seed)
    decoder = {name: w.clone() for name, w in AIMv2(config).decoder.state_dict().items()}
    load_init(model, config)
    batch = random_batch(config)
    with torch.inference_mode():
        difference = (model.encoder(batch.patches, batch.grid)
                      - encoder(batch.patches, batch.grid)).abs().max()
    assert float(difference) < 1e-6
    for name, weight in model.decoder.state_dict().items():
        assert torch.equal(weight, decoder[name]), name  # a new decoder, as drawn
    assert not torch.equal(model.decoder.bos, fresh.bos)


def test_an_encoder_may_change_its_grid_and_nothing_else(exported, tmp_path):
    given = {"init": str(exported[0]), "run_dir": str(tmp_path)}
    config = Config.from_preset(**adopt_init(given | {"image_size": 40, "decoder_dim": 48}))
    model = AIMv2(config)
    load_init(model, config)
    table = resize_table(exported[1].positions.table, (5, 5), (10, 10))
    assert torch.equal(model.encoder.positions.table, table)
    native = {"native_area": (2.0, 4.0), "positions": "sincos"}
    load_init(AIMv2(Config.from_preset(**adopt_init(given | native))),
              Config.from_preset(**adopt_init(given | native)))
    with pytest.raises(ValueError, match="embed_dim=48 must be as in .*use --embed_dim=24"):
        adopt_init(given | {"embed_dim": 48})
    with pytest.raises(ValueError, match="mlp_multiple=100 must be as in .*use --mlp_multiple="):
        adopt_init(given | {"mlp_multiple": 100})


@slow
def test_train_starts_from_an_encoder_and_says_what_gave_way(exported, scenes, tmp_path):
    run = tmp_path / "run"
    flags = [f"--init={exported[0]}", f"--data={scenes}:synthetic:1", "--steps=4", "--batch_size=8",
             "--eval_images=8", "--decoder_dim=32", "--decoder_heads=4", "--encoder_lr=0",
             "--save_every=2", "--dtype=float32", f"--run_dir={run}"]
    done = run_script("train.py", *flags)
    assert f"starts from {exported[0]}: patch_size=4 (preset: 12)" in done.stdout, done.stdout
    weights = load_file(run / "model.safetensors")
    for name, weight in load_encoder(exported[0]).state_dict().items():
        assert torch.equal(weight, weights[f"encoder.{name}"]), name  # frozen
    (run / "model.safetensors").unlink()
    (run / "checkpoints/latest").write_text("step-00000002")
    run_script("train.py", *flags[1:])  # resumed without --init
    again = load_file(run / "model.safetensors")
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


@slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_with_a_frozen_encoder_train_like_one(mode, tiny_flags, tmp_path):
    flags = [*tiny_flags, "--encoder_lr=0", "--steps=6", "--grad_accum=2"]
    run_script("train.py", *flags, f"--run_dir={tmp_path}/one")
    run_script(*TORCHRUN, "train.py", *flags, f"--parallel={mode}", f"--run_dir={tmp_path}/two")
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert one[1:] == pytest.approx(two[1:], abs=1e-4)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one if name.startswith("encoder."))


@slow
def test_what_init_cannot_start_from_is_one_line(exported, tmp_path):
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    for flags, message in [
            (["--init=nobody/nothing-here"], "nobody/nothing-here is not a folder here"),
            ([f"--init={other}"], "model_type='bert'"),
            ([f"--init={exported[0]}", "--num_blocks=9"], "use --num_blocks=2"),
            (["--encoder_lr=-1"], "encoder_lr=-1.0 must be at least 0")]:
        done = run_script("train.py", *flags, f"--run_dir={tmp_path}/run", check=False,
                          env={"HF_HUB_OFFLINE": "1"})
        assert done.returncode == 1 and message in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


# The encoder's learning rate


def test_the_encoder_learns_at_a_multiple_of_the_rate():
    model = AIMv2(tiny_config(encoder_lr=0.1))
    optimizer = make_optimizer(model, 1e-3, 0.0, (0.9, 0.95), encoder_lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    set_lr(optimizer, 5e-4)
    optimizer.step()  # Adam's first step is as long as the rate
    for name, p in model.named_parameters():
        part = name.split(".")[0]
        rate = 5e-4 * {"encoder": 0.1, "decoder": 1, "sampler": SAMPLER_LR / 1e-3}[part]
        assert torch.allclose(before[name] - p, torch.tensor(rate), rtol=1e-2), name


def test_a_frozen_encoder_costs_no_gradient():
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config(encoder_lr=0)
    model, batch, M = AIMv2(config), random_batch(config), torch.tensor([3, 8, 2])
    with FlopCounterMode(display=False) as counter:
        losses: Losses = model(batch, M)
        losses.total(0.4, losses.image_count, losses.text_count).backward()
    targets = int(losses.image_count) / 3, int(losses.text_count) / 3
    assert 3 * train_flops(config, 25, 9, *targets) == pytest.approx(
        counter.get_total_flops(), rel=1e-3)
    assert all(p.grad is None for p in model.encoder.parameters())
    clipped = clipped_parameters(model)
    norm = distributed.clip_gradients(clipped, 1.0, distributed.single_process())
    assert math.isfinite(norm) and len(clipped) == len(
        list(model.decoder.parameters()))
