"""The settings: presets, rules, help, and the file that keeps them."""

import dataclasses

import pytest

from nano_aimv2.config import PRESETS, Config, swiglu_hidden
from nano_aimv2.flags import field_notes
from nano_aimv2.training.optim import lr_at


def test_presets_build_and_overrides_replace():
    assert Config.from_preset("toy", steps=7).steps == 7
    for name in PRESETS:
        config = Config.from_preset(name)
        assert config.preset == name and config.run_dir == f"runs/{name}"


def test_flags_are_read_by_type():
    config = Config.from_flags(["--preset=toy", "--steps=12", "--lr=1e-4", "--flip=true",
                                "--pixel-mean=0.1,0.2,0.3"])
    assert (config.steps, config.lr) == (12, 1e-4)
    assert (config.flip, config.pixel_mean) == (True, (0.1, 0.2, 0.3))
    assert Config.from_flags(["--flip=False"]).flip is False


@pytest.mark.parametrize("flags, message", [
    (["--stepz=3"], r"unknown flag --stepz \(did you mean --steps\?\)"),
    (["--preset=larg"], r"preset='larg' must be one of toy, .*\(did you mean large\?\)"),
    (["--steps=ten"], "--steps=ten must be a whole number"),
    (["--steps=1.5"], "--steps=1.5 must be a whole number"),
    (["--lr=fast"], "--lr=fast must be a number"),
    (["--flip=maybe"], "--flip=maybe must be true or false"),
    (["--batch_size=0"], "batch_size=0 must be at least 1"),
    (["--lr=0"], "lr=0.0 must be a number above 0"),
    (["--lr=nan"], "--lr=nan must be a number, not nan or inf"),
    (["--lr=1e-6"], "min_lr=1e-05 must be at most lr=1e-06, its peak: try --min_lr=1e-08"),
    (["--min_lr=1"], "min_lr=1.0 must be at most lr=0.0006, its peak: try --min_lr=6e-06"),
    (["--image_size=12"], "image_size=12 must be a multiple .*: try --image_size=24"),
    (["--image_size=100000"], r"image_size=100000 must be .*\(at most 256 times\).*=3072"),
    (["--dtype=bf16"], r"dtype='bf16' must be one of .*did you mean bfloat16"),
    (["--image_size=50"], "image_size=50 must be a multiple of patch_size=12.*--image_size=48"),
    (["--num_heads=5"], "embed_dim=192 must be a multiple of num_heads=5"),
    (["--grad_accum=64"], "batch_size=.* must be at least grad_accum=64"),
    (["--pixel_std=0,1,1"], "pixel_std"),
    (["--native_area=7,12", "--positions=learned"], "needs positions='sincos'"),
    (["--prefix=half"], "prefix='half' must be one of random, causal, full"),
    (["--prefix=full"], "leaves none to predict; alpha=0.4 must be 0 with it"),
    (["--alpha=0", "--text_weight=0"], "leave nothing to learn"),
    (["steps=3"], "cannot read 'steps=3'"),
    (["--steps"], "cannot read '--steps'"),
])
def test_a_wrong_flag_says_value_rule_and_fix(flags, message):
    with pytest.raises(ValueError, match=message):
        Config.from_flags(flags)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config)
                                  if field.type in (float, tuple)])
def test_no_number_may_be_nan_or_inf(name, bad):
    """However it comes in: nan passes comparisons such as `value < 0`."""
    value = getattr(Config, name)
    value = (bad, *value[1:]) if isinstance(value, tuple) else bad
    with pytest.raises(ValueError, match=f"{name}=(nan|-?inf).* not nan or inf"):
        Config.from_preset("toy", **{name: value})


@pytest.mark.parametrize("name, value", [
    ("steps", "12"), ("steps", 12.0), ("steps", True), ("flip", 1), ("lr", "1e-3"), ("lr", True),
    ("data", None), ("run_dir", 3), ("pixel_mean", [0.1, 0.2, 0.3]), ("pixel_std", ("a", "b", "c")),
    ("native_area", 3.0)])
def test_a_setting_has_the_type_of_its_field(name, value):
    with pytest.raises(ValueError, match=name):
        Config.from_preset("toy", **{name: value})
    assert Config.from_preset("toy", lr=1, pixel_mean=(0, 0, 0)).lr == 1


def test_a_run_shorter_than_its_warm_up_is_a_rising_learning_rate():
    config = Config.from_preset("toy", steps=20, warmup_steps=100)
    rates = [lr_at(step, config.lr, config.min_lr, config.warmup_steps, config.steps)
             for step in range(config.steps)]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(config.lr / 5)


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        Config.from_flags(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    notes = field_notes(Config)
    for field in dataclasses.fields(Config):
        assert f"--{field.name}=" in text
        assert notes[field.name].split()[0] in text, f"{field.name} has no help"
    assert "global gradient norm" in text
    assert "1: centre square (native: all)" in " ".join(text.split())
    for name, (about, settings) in PRESETS.items():
        assert f"  {name} " in text and about in text
        assert Config.from_preset(name).steps == settings.get("steps", Config.steps)


def test_a_config_survives_its_file(tmp_path):
    config = Config.from_preset("toy", steps=3, pixel_mean=(0.1, 0.2, 0.3))
    config.save(tmp_path / "config.json")
    assert Config.load(tmp_path / "config.json") == config


def test_a_damaged_config_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 3, "unknown": 1}')
    with pytest.raises(ValueError, match="config.json is not a config"):
        Config.load(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not a config"):
        Config.load(tmp_path / "config.json")


def test_hidden_sizes_are_the_papers():
    widths = (768, 1024, 1536, 2048, 3072)
    assert [swiglu_hidden(width, 256) for width in widths] == [2048, 2816, 4096, 5632, 8192]
