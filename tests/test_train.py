"""Whole runs, in processes of their own: what a user types."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, random_batch, run_script, tiny_config

from nano_aimv2 import checkpoint, distributed
from nano_aimv2.checkpoint import load_model
from nano_aimv2.config import Config
from nano_aimv2.metrics import MetricsLog, read_metrics
from nano_aimv2.model import AIMv2
from nano_aimv2.optim import lr_at, make_optimizer

RUNTIME = distributed.Runtime(0, 1, torch.device("cpu"), torch.float32, "none", False)


def curve(folder):
    return [(row["step"], row["loss_text"], row["loss_image"]) for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def weights(folder):
    return load_model(folder)[0].state_dict()


# One run


def test_a_run_leaves_everything_that_is_promised(trained):
    folder, output = trained
    for name in ("config.json", "metrics.jsonl", "checkpoints/latest", "model.safetensors", "tokenizer.tiktoken", "loss.png",
                 "samples.png"):
        assert (folder / name).stat().st_size > 0, name
    rows = read_metrics(folder / "metrics.jsonl")
    train = [row for row in rows if "loss" in row]
    assert [row["step"] for row in train] == list(range(1, 21))
    for name in ("loss_text", "loss_image", "loss_stats", "lr", "grad_norm", "step_ms", "data_ms", "img_per_s"):
        assert math.isfinite(train[-1][name]), name
    assert train[-1]["loss"] == pytest.approx(train[-1]["loss_text"] + 0.4 * train[-1]["loss_image"])
    for name in ("val_loss_text", "val_loss_image", "caption_exact", "val_loss_text_novel", "caption_exact_novel"):
        assert math.isfinite(rows[-1][name]), name
    assert "parameters" in output and "75.0% of the mixture" in output


def test_the_golden_curve(trained):
    """The first 20 losses of a tiny run, from when it was seen to be right: text falls from chance, image from one."""
    found = curve(trained[0])
    golden = json.loads((ROOT / "tests/golden_curve.json").read_text())
    for (step, text, image), (golden_text, golden_image) in zip(found, golden, strict=True):
        assert text == pytest.approx(golden_text, abs=2e-3) and image == pytest.approx(golden_image, abs=2e-3), step
    assert abs(found[0][1] - math.log(768)) < 0.3 and 0.9 < found[0][2] < 1.4


def test_the_same_flags_give_the_same_losses_bit_for_bit(trained, tiny_flags, tmp_path):
    run_script("train.py", *tiny_flags, f"--run={tmp_path}/again")
    assert curve(tmp_path / "again") == curve(trained[0])
    ours, theirs = weights(tmp_path / "again"), weights(trained[0])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_data_workers_and_another_seed(trained, tiny_flags, tmp_path):
    run_script("train.py", *tiny_flags, "--num_workers=2", f"--run={tmp_path}/workers")
    assert curve(tmp_path / "workers") == curve(trained[0])
    run_script("train.py", *tiny_flags, "--seed=1", "--steps=2", f"--run={tmp_path}/seed")
    assert curve(tmp_path / "seed")[0] != curve(trained[0])[0]


# Kill and resume


def test_a_killed_run_resumes_bit_for_bit(trained, tiny_flags, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, "train.py", *tiny_flags, "--save_every=3", f"--run={folder}"]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while not (folder / "checkpoints/latest").exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.05)
    process.kill()
    process.wait()
    done = run_script("train.py", *tiny_flags, "--save_every=3", f"--run={folder}")
    assert "step 0 of 20" not in done.stdout + done.stderr, "it went on from a checkpoint"
    assert curve(folder) == curve(trained[0])
    ours, theirs = weights(folder), weights(trained[0])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_to_all_its_processes_saves_and_exits_0(workers, tiny_flags, tmp_path):
    folder = tmp_path / "stopped"
    flags = [flag for flag in tiny_flags if not flag.startswith("--steps")] + ["--steps=5000", "--save_every=100000"]
    process = subprocess.Popen([sys.executable, "train.py", *flags, f"--num_workers={workers}", f"--run={folder}"], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "asked to stop" in output and "Traceback" not in output, output
    step = int((folder / "checkpoints/latest").read_text().removeprefix("step-"))
    assert step >= 1


def test_a_finished_run_started_again_only_draws_its_pictures_anew(trained, tiny_flags, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run/samples.png").unlink()
    run_script("train.py", *tiny_flags, f"--run={tmp_path}/run")
    assert (tmp_path / "run/samples.png").exists() and curve(tmp_path / "run") == curve(trained[0])


def test_another_configuration_does_not_enter_a_run_folder(trained, tiny_flags):
    done = run_script("train.py", *tiny_flags, "--lr=0.5", f"--run={trained[0]}", check=False)
    assert done.returncode != 0 and "lr=0.001 there, 0.5 asked for" in done.stderr and "another --run" in done.stderr
    assert curve(trained[0])[-1][0] == 20


def test_finished_weights_without_a_checkpoint_are_not_trained_over(trained, tiny_flags, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    done = run_script("train.py", *tiny_flags, f"--run={tmp_path}/run", check=False)
    assert done.returncode != 0 and "holds finished weights, and no checkpoint" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "run/model.safetensors").read_bytes() == (trained[0] / "model.safetensors").read_bytes()


def test_a_disk_that_refuses_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    config = tiny_config(run=str(tmp_path))
    model = AIMv2(config)
    optimizer = make_optimizer(model, 1e-3, 1e-4, (0.9, 0.95))
    checkpoint.save(config.run, 1, model, optimizer, RUNTIME, keep=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model.decoder.bos.add_(1)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="earlier ones are whole"):
        checkpoint.save(config.run, 2, model, optimizer, RUNTIME, keep=2)
    monkeypatch.undo()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]
    assert checkpoint.restore(config.run, model, optimizer, RUNTIME) == 1
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_newest_checkpoints_are_kept(tmp_path):
    config = tiny_config(run=str(tmp_path))
    model = AIMv2(config)
    optimizer = make_optimizer(model, 1e-3, 1e-4, (0.9, 0.95))
    for step in (5, 9, 10, 100):
        checkpoint.save(config.run, step, model, optimizer, RUNTIME, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000010", "step-00000100"]


# Many processes


def test_two_processes_train_like_one(trained, tiny_flags, tmp_path):
    for mode in ("ddp", "fsdp"):
        folder = tmp_path / mode
        run_script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", "train.py", *tiny_flags,
                   f"--parallel={mode}", f"--run={folder}")
        for one, two in zip(curve(trained[0]), curve(folder), strict=True):
            assert one[1:] == pytest.approx(two[1:], abs=1e-4 if one[0] > 5 else 1e-5), (mode, one, two)
        assert (folder / "samples.png").exists()


def test_accumulated_micro_batches_train_like_the_whole(trained, tiny_flags, tmp_path):
    run_script("train.py", *tiny_flags, "--grad_accum=4", f"--run={tmp_path}/accumulated")
    for whole, parts in zip(curve(trained[0]), curve(tmp_path / "accumulated"), strict=True):
        assert whole[1:] == pytest.approx(parts[1:], abs=1e-4 if whole[0] > 5 else 1e-5)


def test_a_run_without_held_out_data_says_so(scenes, tiny_flags, tmp_path):
    flags = [flag for flag in tiny_flags if not flag.startswith("--data=")]
    done = run_script("train.py", *flags, f"--data={scenes}/train:alt", "--steps=2", f"--run={tmp_path}/run")
    assert "nothing is held out" in done.stdout + done.stderr and (tmp_path / "run/loss.png").exists()
    assert not (tmp_path / "run/samples.png").exists()


def test_a_native_run_logs_its_padding(tiny_flags, tmp_path):
    run_script("train.py", *tiny_flags, "--native_area=3,5", "--crop_scale=0.5", "--steps=4", f"--run={tmp_path}/native")
    rows = [row for row in read_metrics(tmp_path / "native/metrics.jsonl") if "loss" in row]
    assert len(rows) == 4 and all(0 <= row["padding"] < 0.4 for row in rows) and len({row["img_per_s"] for row in rows}) == 4


# Bad input


@pytest.mark.parametrize("flags, message", [
    (["--stepz=3"], "did you mean --steps"),
    (["--data=/nowhere:alt:1"], "'/nowhere' does not exist"),
    (["--tokenizer=nothing"], "neither a file nor one of"),
    (["--vocab_size=100"], "use --vocab_size=768"),
    (["--parallel=none", "--device=cuda"], "device=cuda is not there"),
    (["--init=/nowhere"], "/nowhere"),
])
def test_train_says_what_is_wrong_in_one_line(flags, message, scenes, tmp_path):
    done = run_script("train.py", f"--data={scenes}:alt:1", "--device=cpu", f"--run={tmp_path}/x", *flags, check=False)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "x").exists(), "a start that fails claims no run folder"


def test_weights_of_another_shape_are_listed(trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    config = Config.load(folder / "config.json")
    (folder / "config.json").unlink()
    Config(**{**config.__dict__, "decoder_blocks": 3, "patch_size": 5}).save(folder / "config.json")
    with pytest.raises(ValueError, match="missing decoder.trunk.blocks.2|encoder.proj.weight is"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(folder)


# Optimizer and log


def test_the_learning_rate_warms_up_and_ends_at_its_minimum():
    rates = [lr_at(step, 1e-3, 1e-5, 10, 100) for step in range(101)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == pytest.approx(1e-3) == rates[10]
    assert rates[100] == pytest.approx(1e-5) and all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[55] == pytest.approx((1e-3 + 1e-5) / 2)


def test_weight_decay_is_fully_decoupled_and_spares_vectors_and_positions():
    model = AIMv2(tiny_config(positions="learned"))
    optimizer = make_optimizer(model, 2e-3, 1e-4, (0.9, 0.95))
    names = {id(p): name for name, p in model.named_parameters()}
    spared = {names[id(p)] for p in optimizer.param_groups[1]["params"]}
    assert {"encoder.positions.table", "decoder.text_positions", "decoder.bos", "encoder.proj.bias"} <= spared
    assert not any("weight" in name and "norm" not in name for name in spared)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3  # half of the peak
    optimizer.step()
    for name, p in model.named_parameters():
        expected = before[name] if name in spared else before[name] * (1 - 0.5 * 1e-4)
        assert torch.allclose(p, expected, atol=1e-8), name


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2, 3):
        log.write(step=step, loss=0.5)
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    MetricsLog(path, 2)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_bf16_matmuls_stay_close_to_float32():
    torch.manual_seed(0)
    config = tiny_config()
    model, batch, M = AIMv2(config), random_batch(config), torch.tensor([3, 8, 2])
    exact = model(batch, M)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(batch, M)
    assert rough.text_sum.dtype == torch.float32
    assert float(rough.text_sum) == pytest.approx(float(exact.text_sum), rel=0.01)
    assert float(rough.image_sum) == pytest.approx(float(exact.image_sum), rel=0.03)


# The bench


def test_the_bench_counts_a_step():
    out = run_script("-m", "nano_aimv2.bench", "--step", "--preset=toy", "--batch_size=2", "--dtype=float32").stdout
    assert "encoder 192 x 3" in out and "matmuls" in out and "images/s" in out and "GiB" in out
    assert "bench: unknown flag --stepz" in run_script("-m", "nano_aimv2.bench", "--stepz=1", check=False).stderr


# sample.py


def test_sample_captions_ranks_and_completes(trained, tmp_path):
    from PIL import Image

    from data.scenes import make_scene

    files = []
    for i in range(2):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(make_scene("val", i)[0]).save(files[-1])
    names = f"--image={files[0]},{files[1]}"
    out = run_script("sample.py", f"--run={trained[0]}", names).stdout.splitlines()
    assert len(out) == 2 and out[1].startswith(str(files[1])) and "log-probability -" in out[1]
    options = ["--temperature=1", "--top_k=9", "--top_p=0.9", "--seed=3", "--prompt=top left a", "--max_tokens=8"]
    first, second = (run_script("sample.py", f"--run={trained[0]}", names, *options).stdout for _ in range(2))
    assert first == second and f"{files[0]}: top left a" in first
    ranked = run_script("sample.py", f"--run={trained[0]}", f"--image={files[0]}", "--choices=a red ring|zebra zebra").stdout
    assert "a red ring" in ranked and "%" in ranked
    run_script("sample.py", f"--run={trained[0]}", names, "--complete=0.5", f"--out={tmp_path}/c.png")
    assert Image.open(tmp_path / "c.png").width > 500
    run_script("sample.py", f"--run={trained[0]}", f"--out={tmp_path}/s.png")
    assert Image.open(tmp_path / "s.png").width > 500


@pytest.mark.parametrize("flags, message", [
    (["--image=/nowhere.png"], "'/nowhere.png' does not exist"),
    (["--image=README.md"], "README.md' cannot be read"),
    (["--imag=x"], "did you mean --image"),
    (["--run=/nowhere"], "not a trained run"),
    (["--complete=2"], "--complete=2.0 must be a fraction"),
    (["--temperature=warm"], "must be a number"),
])
def test_sample_says_what_is_wrong_in_one_line(trained, flags, message):
    done = run_script("sample.py", f"--run={trained[0]}", *flags, check=False)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
