"""Whole runs, in processes of their own: what a user types."""

import json
import math
import os
import shutil
import signal
import time

import pytest
import torch
from helpers import (
    ROOT,
    assert_one_line,
    colour_shares,
    curve,
    full_disk,
    random_batch,
    run_script,
    run_together,
    start_script,
    tiny_config,
    training_rows,
)
from PIL import Image

from data.scenes import make_scene
from nano_aimv2.config import Config
from nano_aimv2.data.batches import TrainingData
from nano_aimv2.data.tokenizer import Tokenizer
from nano_aimv2.model import AIMv2
from nano_aimv2.training import checkpoint, distributed
from nano_aimv2.training.checkpoint import load_model
from nano_aimv2.training.metrics import MetricsLog, Progress, read_metrics
from nano_aimv2.training.optim import lr_at, make_optimizer

RUNTIME = distributed.single_process()
# The colours of the two loss curves, and of the patches that were not given.
BLUE, ORANGE, HIDDEN = (43, 108, 176), (221, 107, 32), (128, 128, 128)
slow = pytest.mark.slow


def weights(folder):
    return load_model(folder)[0].state_dict()


def assert_same_weights(folder, other):
    ours, theirs = weights(folder), weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def assert_close_curves(run, other):
    for one, two in zip(curve(run), curve(other), strict=True):
        tolerance = 1e-4 if one[0] > 5 else 1e-5
        assert one[1:] == pytest.approx(two[1:], abs=tolerance), (other, one, two)


# One run


def test_a_run_leaves_everything_that_is_promised(trained):
    folder, output = trained
    for name in ("config.json", "metrics.jsonl", "checkpoints/latest", "model.safetensors",
                 "tokenizer.tiktoken", "loss.png", "samples.png"):
        assert (folder / name).stat().st_size > 0, name
    rows = read_metrics(folder / "metrics.jsonl")
    train = [row for row in rows if "loss" in row]
    assert [row["step"] for row in train] == list(range(1, 21))
    for name in ("loss_text", "loss_image", "loss_sampler", "lr", "grad_norm", "step_ms", "data_ms",
                 "img_per_s"):
        assert math.isfinite(train[-1][name]), name
    total = train[-1]["loss_text"] + 0.4 * train[-1]["loss_image"]
    assert train[-1]["loss"] == pytest.approx(total)
    for name in ("val_loss_text", "val_loss_image", "caption_exact", "val_loss_text_novel",
                 "caption_exact_novel"):
        assert math.isfinite(rows[-1][name]), name
    assert "parameters" in output and "75.0% of the mixture" in output
    assert "Warning" not in output, output


def test_a_run_draws_both_loss_curves_and_completed_images(trained):
    curves, samples = (colour_shares(trained[0] / name) for name in ("loss.png", "samples.png"))
    assert curves[BLUE] > 5e-4 and curves[ORANGE] > 5e-4 and 0.7 < curves[255, 255, 255] < 0.99
    assert samples[HIDDEN] > 0.01, "no image is shown with patches that were not given"
    assert len(samples) > 1000, "no image is shown"


def test_the_golden_curve(trained):
    """The first 20 losses of a tiny run, from when it was seen to be right: the text loss falls
    from chance, the image loss from one."""
    found = curve(trained[0])
    golden = json.loads((ROOT / "tests/golden_curve.json").read_text())
    for (step, *losses), expected in zip(found, golden, strict=True):
        assert losses == pytest.approx(expected, abs=2e-3), step
    assert abs(found[0][1] - math.log(768)) < 0.3 and 0.9 < found[0][2] < 1.4


def test_the_same_flags_give_the_same_losses_bit_for_bit(trained, tiny_flags, tmp_path):
    run_script("train.py", *tiny_flags, f"--run_dir={tmp_path}/again")
    assert curve(tmp_path / "again") == curve(trained[0])
    assert_same_weights(tmp_path / "again", trained[0])


@slow
def test_data_workers_change_nothing_and_another_seed_does(trained, tiny_flags, tmp_path):
    run_script("train.py", *tiny_flags, "--num_workers=2", f"--run_dir={tmp_path}/workers")
    assert curve(tmp_path / "workers") == curve(trained[0])
    run_script("train.py", *tiny_flags, "--seed=1", "--steps=2", f"--run_dir={tmp_path}/seed")
    assert curve(tmp_path / "seed")[0] != curve(trained[0])[0]


# Kill and resume


@slow
def test_a_killed_run_resumes_bit_for_bit(trained, tiny_flags, tmp_path):
    folder = tmp_path / "killed"
    flags = [*tiny_flags, "--save_every=3", f"--run_dir={folder}"]
    process = start_script("train.py", *flags)
    wait_for(folder / "checkpoints/latest", process)
    time.sleep(0.05)
    process.kill()
    process.wait()
    done = run_script("train.py", *flags)
    assert "step 0 of 20" not in done.stdout + done.stderr, "it did not resume from a checkpoint"
    assert curve(folder) == curve(trained[0])
    assert_same_weights(folder, trained[0])


def wait_for(path, process):
    while not path.exists() and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=slow)])
def test_sigterm_or_ctrl_c_to_all_its_processes_saves_and_exits_0(number, workers, tiny_flags,
                                                                  tmp_path):
    folder = tmp_path / "stopped"
    flags = [*tiny_flags, "--steps=5000", "--save_every=100000", f"--num_workers={workers}"]
    process = start_script("train.py", *flags, f"--run_dir={folder}")
    wait_for(folder / "metrics.jsonl", process)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "asked to stop" in output, output
    assert "Traceback" not in output, output
    step = int((folder / "checkpoints/latest").read_text().removeprefix("step-"))
    assert step >= 1


@slow
def test_ctrl_c_before_the_first_step_is_one_line(tiny_flags, tmp_path):
    folder = tmp_path / "run"
    process = start_script("train.py", *tiny_flags, f"--run_dir={folder}")
    wait_for(folder, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "Traceback" not in output, output


@slow
def test_short_runs_in_half_precision_learn_and_float16_resumes_bit_for_bit(trained, tiny_flags,
                                                                            tmp_path):
    """In float16 the gradient scaler has been changed by overflows when the run is resumed."""
    flags = [*tiny_flags, "--save_every=10", "--keep=9"]
    for dtype in ("bfloat16", "float16"):
        folder = tmp_path / dtype
        done = run_script("train.py", *flags, f"--dtype={dtype}", f"--run_dir={folder}")
        assert f"{dtype} matmuls" in done.stdout and "Warning" not in done.stdout + done.stderr
        whole = curve(folder)
        assert whole[-1][1] < whole[0][1] - 0.5 and whole[-1][2] < whole[0][2], whole
        for exact, rough in zip(curve(trained[0]), whole, strict=True):
            assert rough[1:] == pytest.approx(exact[1:], rel=0.03)
    (folder / "checkpoints/latest").write_text("step-00000010")
    done = run_script("train.py", *flags, "--dtype=auto", f"--run_dir={folder}")
    assert "float16 matmuls" in done.stdout and "step 10 of 20" in done.stdout
    assert curve(folder) == whole


@slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")),
                    reason="torch.compile needs a C++ compiler on a CPU")
def test_a_short_run_under_torch_compile_has_the_same_losses(scenes, tiny_flags, tmp_path):
    """Without held-out images, whose captions would be compiled, too."""
    flags = [*tiny_flags, "--num_blocks=1", "--decoder_blocks=1", "--steps=2",
             "--max_tokens=8", f"--data={scenes}/train:alt"]
    for name in ("true", "false"):
        run_script("train.py", *flags, f"--compile={name}", f"--run_dir={tmp_path}/{name}")
    assert_close_curves(tmp_path / "true", tmp_path / "false")
    assert Config.load(tmp_path / "true/config.json").compile == "true"


@slow
def test_a_finished_run_started_again_only_draws_its_images_again(trained, tiny_flags, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run/samples.png").unlink()
    run_script("train.py", *tiny_flags, f"--run_dir={tmp_path}/run")
    assert colour_shares(tmp_path / "run/samples.png")[HIDDEN] > 0.01
    assert curve(tmp_path / "run") == curve(trained[0])


def test_another_configuration_does_not_enter_a_run_folder(trained, tiny_flags):
    done = run_script("train.py", *tiny_flags, "--lr=0.5", f"--run_dir={trained[0]}", check=False)
    assert_one_line(done, "lr=0.001 there, 0.5 asked for")
    assert "another --run_dir" in done.stderr
    assert curve(trained[0])[-1][0] == 20


@slow
def test_finished_weights_without_a_checkpoint_are_not_trained_over(trained, tiny_flags, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained[0], run, ignore=shutil.ignore_patterns("checkpoints"))
    done = run_script("train.py", *tiny_flags, f"--run_dir={run}", check=False)
    assert_one_line(done, "holds finished weights, and no checkpoint")
    before = (trained[0] / "model.safetensors").read_bytes()
    assert (run / "model.safetensors").read_bytes() == before


def model_and_optimizer():
    model = AIMv2(tiny_config())
    return model, make_optimizer(model, 1e-3, 1e-4, (0.9, 0.95))


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    model, optimizer = model_and_optimizer()
    checkpoint.save(tmp_path, 1, model, optimizer, RUNTIME, keep=2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        model.decoder.bos.add_(1)
    with full_disk(), pytest.raises(OSError, match="earlier ones are whole") as error:
        checkpoint.save(tmp_path, 2, model, optimizer, RUNTIME, keep=2)
    assert len(str(error.value).splitlines()) == 1, error.value
    assert checkpoints(tmp_path) == ["latest", "step-00000001"]
    assert checkpoint.restore(tmp_path, model, optimizer, RUNTIME) == 1
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_a_full_disk_leaves_the_earlier_weights(tmp_path):
    model, _ = model_and_optimizer()
    checkpoint.save_model(tmp_path, model, RUNTIME)
    before = (tmp_path / "model.safetensors").read_bytes()
    with full_disk(), pytest.raises(OSError, match="model.safetensors could not be written"):
        checkpoint.save_model(tmp_path, model, RUNTIME)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_the_newest_checkpoints_are_kept(tmp_path):
    model, optimizer = model_and_optimizer()
    for step in (5, 9, 10, 100):
        checkpoint.save(tmp_path, step, model, optimizer, RUNTIME, keep=2)
    assert checkpoints(tmp_path) == ["latest", "step-00000010", "step-00000100"]


# Many processes, many micro-batches, other data


@slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_train_like_one(mode, trained, tiny_flags, tmp_path):
    done = run_script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                      "train.py", *tiny_flags, f"--parallel={mode}", f"--run_dir={tmp_path}/run")
    assert_close_curves(trained[0], tmp_path / "run")
    assert colour_shares(tmp_path / "run/loss.png")[BLUE] > 0
    if mode == "ddp":
        assert colour_shares(tmp_path / "run/samples.png")[HIDDEN] > 0.01
    else:  # the model may be too large for one rank
        assert not (tmp_path / "run/samples.png").exists()
        assert f"python sample.py --run_dir={tmp_path}/run\n" in done.stdout


@slow
def test_accumulated_micro_batches_train_like_the_whole(trained, tiny_flags, tmp_path):
    run_script("train.py", *tiny_flags, "--grad_accum=4", f"--run_dir={tmp_path}/accumulated")
    assert_close_curves(trained[0], tmp_path / "accumulated")


@slow
def test_a_run_without_held_out_data_says_so(scenes, tiny_flags, tmp_path):
    flags = [flag for flag in tiny_flags if not flag.startswith("--data=")]
    done = run_script("train.py", *flags, f"--data={scenes}/train:alt", "--steps=2",
                      f"--run_dir={tmp_path}/run")
    assert "nothing is held out" in done.stdout + done.stderr
    assert colour_shares(tmp_path / "run/loss.png")[BLUE] > 0
    assert not (tmp_path / "run/samples.png").exists()


def test_a_native_run_logs_its_padding(tiny_flags, tmp_path):
    """Rows of 1 step each: their padding is that of the step's batch, to the last patch."""
    run_script("train.py", *tiny_flags, "--native_area=3,5", "--crop_scale=0.5", "--steps=4",
               f"--run_dir={tmp_path}/native")
    config = Config.load(tmp_path / "native/config.json")
    batches = list(map(TrainingData(config, Tokenizer(config.tokenizer)).__getitem__, range(4)))
    valid = [int(batch.grid.prod(dim=1).sum()) for batch in batches]
    places = [batch.patches.shape[0] * batch.patches.shape[1] for batch in batches]
    assert len(set(places)) > 1, "areas differ between steps"
    assert any(n < m for n, m in zip(valid, places, strict=True)), "and some batch is padded"
    expected = [1 - n / m for n, m in zip(valid, places, strict=True)]
    assert [row["padding"] for row in training_rows(tmp_path / "native")] == expected
    assert max(expected) < 0.4


# Bad input


def assert_train_refuses(wrong, scenes, folder):
    """Each of `wrong`, (flags, message), ends train.py in one line and claims no run folder."""
    common = ("train.py", f"--data={scenes}:alt:1", "--device=cpu", f"--run_dir={folder}/x")
    found = run_together(*((*common, *flags) for flags, _ in wrong))
    for done, (flags, message) in zip(found, wrong, strict=True):
        assert_one_line(done, message)
        assert not (folder / "x").exists(), f"{flags}: a start that fails claims no run folder"


def test_train_says_what_is_wrong_in_one_line(scenes, tmp_path):
    assert_train_refuses([(["--vocab_size=100"], "use --vocab_size=768")], scenes, tmp_path)


@slow
def test_train_says_of_each_mistake_what_is_wrong_in_one_line(scenes, tmp_path):
    wrong = [(["--stepz=3"], "did you mean --steps"),
             (["--data=/nowhere:alt:1"], "'/nowhere' does not exist"),
             (["--tokenizer=nothing"], "neither a file nor one of"),
             (["--init=/nowhere"], "/nowhere")]
    if not torch.cuda.is_available():
        wrong.append((["--parallel=none", "--device=cuda"], "device=cuda is not available"))
    assert_train_refuses(wrong, scenes, tmp_path)


def test_weights_of_another_shape_are_listed(trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    config = Config.load(folder / "config.json")
    Config(**{**config.__dict__, "decoder_blocks": 3, "patch_size": 5}).save(folder / "config.json")
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert "missing decoder.trunk.blocks.2" in str(error.value), error.value
    Config(**{**config.__dict__, "patch_size": 5}).save(folder / "config.json")
    with pytest.raises(ValueError, match=r"encoder\.proj\.weight is \(24, 48\)"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(folder)


# Optimizer and log


def test_the_learning_rate_warms_up_and_ends_at_its_minimum():
    rates = [lr_at(step, 1e-3, 1e-5, 10, 100) for step in range(101)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == pytest.approx(1e-3) == rates[10]
    assert rates[100] == pytest.approx(1e-5)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[55] == pytest.approx((1e-3 + 1e-5) / 2)


def test_weight_decay_is_fully_decoupled_and_spares_vectors_positions_and_the_sampler():
    model = AIMv2(tiny_config(positions="learned"))
    optimizer = make_optimizer(model, 2e-3, 1e-4, (0.9, 0.95))
    names = {id(p): name for name, p in model.named_parameters()}
    spared = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"]
              for p in group["params"]}
    assert {"encoder.positions.table", "decoder.text_positions", "decoder.bos",
            "encoder.proj.bias"} <= spared
    sampler = {name for name in names.values() if name.startswith("sampler.")}
    assert sampler and sampler <= spared
    assert not any("weight" in name and "norm" not in name for name in spared - sampler)
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


def test_skipped_samples_are_shown_ten_between_two_rows_and_counted_all(tmp_path, capsys):
    config = tiny_config(run_dir=str(tmp_path), log_every=2, steps=5)
    progress, batch = Progress(config, RUNTIME, 0), random_batch(config)
    losses = dict.fromkeys(("loss", "loss_text", "loss_image"), 1.0)
    for step, count in enumerate((7, 6, 0, 1, 2)):
        batch.skipped = [f"{step}.{i}: broken" for i in range(count)]
        progress.step(step, [batch], 1e-3, 1.0, lambda: losses)
    lines = [line for line in capsys.readouterr().out.splitlines() if "oss" not in line]
    assert lines == [*(f"step 0: skipped 0.{i}: broken" for i in range(7)),
                     *(f"step 1: skipped 1.{i}: broken" for i in range(3)), "... and 3 more",
                     "step 3: skipped 3.0: broken",
                     *(f"step 4: skipped 4.{i}: broken" for i in range(2))]
    assert [row["skipped"] for row in training_rows(tmp_path)] == [13, 14, 16]


def test_bf16_matmuls_stay_close_to_float32():
    torch.manual_seed(0)
    config = tiny_config()
    model, batch, M = AIMv2(config), random_batch(config), torch.tensor([3, 8, 2])
    exact = model(batch, M)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(batch, M)
    assert rough.text_sum.dtype == torch.float32
    assert rough.text_sum.item() == pytest.approx(exact.text_sum.item(), rel=0.01)
    assert rough.image_sum.item() == pytest.approx(exact.image_sum.item(), rel=0.03)


# sample.py


@pytest.fixture(scope="module")
def two_images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    files = [folder / f"{i}.png" for i in range(2)]
    for i, file in enumerate(files):
        Image.fromarray(make_scene("val", i)[0]).save(file)
    return files


def sample(run, *flags):
    done = run_script("sample.py", f"--run_dir={run}", *flags)
    assert not done.stderr, done.stderr
    return done.stdout


def test_sample_captions_images(trained, two_images):
    lines = sample(trained[0], f"--image={two_images[0]},{two_images[1]}").splitlines()
    assert len(lines) == 2
    for line, file in zip(lines, two_images, strict=True):
        assert line.startswith(f"{file}: ") and "log-probability -" in line


@slow
def test_sample_repeats_with_its_seed_and_continues_a_prompt(trained, two_images):
    flags = ["--temperature=1", "--top_k=9", "--top_p=0.9", "--seed=3", "--prompt=top left a",
             "--max_tokens=8", f"--image={two_images[0]},{two_images[1]}"]
    first, second = (sample(trained[0], *flags) for _ in range(2))
    assert first == second and f"{two_images[0]}: top left a" in first


@slow
def test_sample_ranks_captions(trained, two_images):
    lines = sample(trained[0], f"--image={two_images[0]}",
                   "--choices=a red ring|zebra zebra").splitlines()
    assert lines[0] == str(two_images[0]) and len(lines) == 3
    ranked = [line.split()[0] for line in lines[1:]]
    assert "a red ring" in lines[1] + lines[2] and all(share.endswith("%") for share in ranked)
    shares = [float(share[:-1]) for share in ranked]
    assert shares[0] >= shares[1] and sum(shares) == pytest.approx(100, abs=0.11)


@slow
def test_sample_completes_images(trained, two_images, tmp_path):
    sample(trained[0], f"--image={two_images[0]},{two_images[1]}", "--complete=0.5",
           f"--out={tmp_path}/c.png")
    colours = colour_shares(tmp_path / "c.png")
    assert colours[HIDDEN] > 0.01 and len(colours) > 500
    assert Image.open(tmp_path / "c.png").width > 500


@slow
def test_sample_draws_held_out_images(trained, tmp_path):
    sample(trained[0], f"--out={tmp_path}/s.png")
    assert Image.open(tmp_path / "s.png").width > 500
    assert colour_shares(tmp_path / "s.png")[HIDDEN] > 0.01


def assert_sample_refuses(run_dir, *wrong):
    """Each of `wrong`, (flag, message), ends sample.py in one line."""
    found = run_together(*(("sample.py", f"--run_dir={run_dir}", flag) for flag, _ in wrong))
    for done, (_, message) in zip(found, wrong, strict=True):
        assert_one_line(done, message)
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_sample_says_what_is_wrong_in_one_line(trained):
    assert_sample_refuses(trained[0], ("--image=README.md", "README.md' cannot be read"))


@slow
def test_sample_says_of_each_mistake_what_is_wrong_in_one_line(trained):
    assert_sample_refuses(
        trained[0], ("--image=/nowhere.png", "'/nowhere.png' does not exist"),
        ("--imag=x", "did you mean --image"), ("--run_dir=/nowhere", "not a trained run"),
        ("--complete=2", "--complete=2.0 must be a fraction"),
        ("--temperature=warm", "must be a number"))
