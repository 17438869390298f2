"""The settings: presets, rules, help, and the file that keeps them."""

import dataclasses

import pytest

from nano_aimv2.config import PRESETS, Config, swiglu_hidden
from nano_aimv2.flags import field_notes


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
    (["--preset=larg"], r"unknown preset 'larg' \(did you mean large\?\)"),
    (["--steps=ten"], "--steps=ten must be a whole number"),
    (["--steps=1.5"], "--steps=1.5 must be a whole number"),
    (["--lr=fast"], "--lr=fast must be a number"),
    (["--flip=maybe"], "--flip=maybe must be true or false"),
    (["--batch_size=0"], "batch_size=0 must be at least 1"),
    (["--lr=0"], "lr=0.0 must be a number above 0"),
    (["--lr=nan"], "lr=nan"),
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
