"""The doctor: it knows right numbers, and names the first stage of wrong ones."""

import sys

import pytest
import torch
from helpers import run_script

from nano_aimv2.config import PRESETS
from nano_aimv2.lab import bench, budget, doctor
from nano_aimv2.lab.doctor import STAGES, TOLERANCES, Setting, differences, golden_steps


@pytest.fixture(scope="module")
def golden():
    return golden_steps(Setting())


def changed(golden, stage, name, factor):
    """A copy of the golden step in which one tensor is wrong."""
    tensors = {**golden[stage], name: golden[stage][name] * factor}
    return {**golden, stage: tensors}


def test_this_cpu_computes_the_recorded_numbers(golden):
    assert doctor.is_as_recorded(golden)
    assert not any(value for value, _ in differences(golden, golden).values())


def test_a_cpu_with_other_numbers_is_called_out(golden, capsys):
    wrong = changed(golden, "losses", "text loss", 1.001)
    assert not doctor.is_as_recorded(wrong)
    assert "text loss 5.720" in capsys.readouterr().out


@pytest.mark.parametrize("stage, name", [
    ("features", "encoder"), ("losses", "image loss"),
    ("gradients", "decoder.trunk.blocks.1.mlp.fc1.weight"), ("weights", "encoder.proj.bias")])
def test_the_first_stage_beyond_its_tolerance_is_named(stage, name, golden, monkeypatch, capsys):
    """A device with one wrong tensor, and everything behind it wrong as well."""
    wrong = changed(golden, stage, name, 1.5)
    for later in STAGES[STAGES.index(stage) + 1 :]:
        wrong = changed(wrong, later, next(iter(golden[later])), 3)
    monkeypatch.setattr(doctor, "settings_to_try", lambda device: [Setting(), Setting("cuda")])
    monkeypatch.setattr(doctor, "measured",
                        lambda setting, folder: wrong if setting.device == "cuda" else golden)
    assert not doctor.check_numbers(torch.device("cpu"), "")
    printed = capsys.readouterr().out
    assert f"FIRST BEYOND ITS TOLERANCE: {stage} ({name})" in printed
    assert printed.count("FIRST BEYOND") == 1


def test_a_nan_is_beyond_every_tolerance(golden, monkeypatch, capsys):
    wrong = changed(golden, "features", "encoder", float("nan"))
    monkeypatch.setattr(doctor, "settings_to_try", lambda device: [Setting(), Setting("mps")])
    monkeypatch.setattr(doctor, "measured",
                        lambda setting, folder: wrong if setting.device == "mps" else golden)
    assert not doctor.check_numbers(torch.device("cpu"), "")
    assert "BEYOND ITS TOLERANCE: features (encoder): nan" in capsys.readouterr().out


def test_a_setting_that_fails_makes_the_doctor_fail(golden, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "settings_to_try",
                        lambda device: [Setting(), Setting(parallel="fsdp")])
    monkeypatch.setattr(doctor, "measured",
                        lambda setting, folder: None if setting.parallel == "fsdp" else golden)
    assert not doctor.check_numbers(torch.device("cpu"), "")
    assert "cpu float32 fsdp x 2       FAILED" in capsys.readouterr().out


def test_settings_change_one_factor_at_a_time():
    settings = list(doctor.settings_to_try(torch.device("cpu")))
    assert settings[0] == Setting()
    for setting in settings[1:]:
        factors = [getattr(setting, name) != getattr(settings[0], name)
                   for name in ("device", "dtype", "compile", "parallel")]
        assert sum(factors) == 1, setting
        assert setting.dtype in TOLERANCES
    assert {setting.parallel for setting in settings} == {"none", "ddp", "fsdp", "hybrid"}


class Card:
    """A GPU of some size, as far as the choice of a preset looks at it."""

    def __init__(self, gib):
        self.total_memory = gib * 2**30


@pytest.mark.parametrize("gib, preset", [(2, "photos"), (10, "base"), (16, "large"), (24, "huge"),
                                         (80, "3b")])
def test_the_largest_preset_that_fits_is_measured(gib, preset, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card(gib))
    config, expected = doctor.largest_that_fits(torch.device("cuda"))
    assert config.preset == preset and preset in PRESETS
    if preset != "photos":
        assert expected <= 0.9 * gib * 2**30 and config.batch_size in range(8, 65, 8)
        more = expected + 8 * budget.activation_bytes(config, 1)
        assert config.batch_size == 64 or more > 0.9 * gib * 2**30
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    if preset == "large":
        line = doctor.launch_line(config, torch.device("cuda"))
        assert line.startswith("torchrun --nproc_per_node=8 train.py --preset=large --grad_accum=")
        assert int(line.rpartition("=")[2]) * 8 * config.batch_size >= 8192


@pytest.mark.slow
def test_the_doctor_prints_one_page_and_finds_this_machine_well(monkeypatch, tmp_path):
    done = run_script("-m", "nano_aimv2.lab.doctor",
                      env={"CXX": "none"})  # torch.compile takes half a minute: see test_train.py
    lines = done.stdout.splitlines()
    assert lines[0] == lines[-1] == "```" and lines[-2] == "the numbers are right"
    assert len(lines) < 40 and max(map(len, lines)) <= 110
    for expected in ("cpu bfloat16", "cpu float16", "ddp x 2", "fsdp x 2", "hybrid x 2",
                     "images/s", "peak memory", "attention:", "reads/s", "to train it: python"):
        assert expected in done.stdout, expected
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_the_doctor_fails_where_the_numbers_are_wrong(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_numbers", lambda device, folder: False)
    monkeypatch.setattr(doctor, "expect_step", lambda *args: 100.0)
    monkeypatch.setattr(bench, "write_jpegs", lambda *args: None)
    monkeypatch.setattr(doctor, "expect_data", lambda *args: None)
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--device=cpu"])
    assert stopped.value.code == 1
    assert "THE NUMBERS ARE NOT RIGHT" in capsys.readouterr().out
    assert "nano_aimv2.lab.doctor" in sys.modules
