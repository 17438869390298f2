"""However a step is split, and whatever happens to a process: the same numbers."""

import math
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import (
    ROOT,
    TORCHRUN,
    curve,
    free_port,
    random_batch,
    run_ranks,
    run_script,
    start_script,
    tiny_config,
)
from safetensors.torch import load_file

from nano_aimv2.model import AIMv2
from nano_aimv2.training import distributed

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def whole_gradients(tiny_flags, tmp_path_factory):
    """The first step's gradients of one process and one micro-batch."""
    path = tmp_path_factory.mktemp("gradients") / "whole.safetensors"
    run_script("tests/first_gradients.py", path, *tiny_flags)
    return load_file(path)


@pytest.mark.parametrize("launcher, flags", [
    pytest.param((), ["--grad_accum=4"], id="four micro-batches"),
    pytest.param((), ["--recompute=true"], id="recomputed blocks", marks=slow),
    pytest.param(TORCHRUN, ["--parallel=ddp", "--grad_accum=2"],
                 id="two ranks, DDP, two micro-batches each"),
    pytest.param(TORCHRUN, ["--parallel=fsdp", "--grad_accum=2", "--recompute=true"],
                 id="two ranks, FSDP2, two micro-batches each, recomputed"),
    pytest.param(TORCHRUN, ["--parallel=hybrid"], id="two ranks of one node, hybrid", marks=slow),
])
def test_the_first_gradients_do_not_depend_on_the_split(launcher, flags, whole_gradients,
                                                        tiny_flags, tmp_path):
    path = tmp_path / "split.safetensors"
    run_script(*launcher, "tests/first_gradients.py", path, *tiny_flags, *flags)
    split = load_file(path)
    assert split.keys() == whole_gradients.keys()
    for name, gradient in whole_gradients.items():
        largest = float(gradient.abs().max())
        if largest == 0:  # behind a layer of the patch sampler that starts at zero
            assert name.startswith("sampler.") and name.split(".")[1] != "final"
            assert float(split[name].abs().max()) == 0
            continue
        difference = float((split[name] - gradient).abs().max()) / largest
        assert difference < 1e-6, f"{name} differs by {difference:.1e} of its largest gradient"


@slow
@pytest.mark.parametrize("mode", ["fsdp", "hybrid"])
def test_two_ranks_train_sharded_in_bfloat16_on_a_cpu(mode, tiny_flags, tmp_path):
    flags = [*tiny_flags, f"--parallel={mode}", "--dtype=bfloat16", "--steps=8"]
    done = run_script(*TORCHRUN, "train.py", *flags, f"--run_dir={tmp_path}/run")
    assert "bfloat16 matmuls" in done.stdout and "Warning" not in done.stdout + done.stderr
    losses = curve(tmp_path / "run")
    assert len(losses) == 8 and all(math.isfinite(number) for row in losses for number in row)
    assert losses[-1][1] < losses[0][1] - 0.5 and losses[-1][2] < losses[0][2], losses


@slow
def test_hybrid_sharding_over_two_nodes_trains_like_one_process(trained, tiny_flags, tmp_path):
    """Two launchers of one rank each stand for two nodes: whole copies between them, slices
    within."""
    folder, port = tmp_path / "hybrid", free_port()
    nodes = [start_script("-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                          f"--node_rank={node}", "--master_addr=127.0.0.1",
                          f"--master_port={port}", "train.py", *tiny_flags, "--parallel=hybrid",
                          f"--run_dir={folder}")
             for node in range(2)]
    for node in nodes:
        output, _ = node.communicate(timeout=120)
        assert node.returncode == 0, output
    for one, two in zip(curve(trained[0]), curve(folder), strict=True):
        assert one[1:] == pytest.approx(two[1:], abs=1e-4 if one[0] > 5 else 1e-5)


@slow
def test_the_last_whole_checkpoint_of_two_ddp_ranks_resumes_under_fsdp_and_in_one_process(
        trained, tiny_flags, tmp_path):
    folder, flags = tmp_path / "run", [*tiny_flags, "--save_every=10", "--keep=9"]
    run_script(*TORCHRUN, "train.py", *flags, "--parallel=ddp", f"--run_dir={folder}")
    last = folder / "checkpoints/step-00000020/__1_0.distcp"
    last.write_bytes(last.read_bytes()[:-1] + b"x")
    for launcher, mode in ((TORCHRUN, "fsdp"), ((), "none")):
        copy = shutil.copytree(folder, tmp_path / mode)
        done = run_script(*launcher, "train.py", *flags, f"--parallel={mode}", f"--run_dir={copy}")
        named = done.stdout.count("step-00000020: missing or damaged: __1_0.distcp\n")
        assert named == 1 and "step 10 of 20" in done.stdout, done.stdout
        assert f"changed since the last start: parallel=ddp there, {mode} asked for" in done.stdout
        for one, two in zip(curve(trained[0]), curve(copy), strict=True):
            assert one[1:] == pytest.approx(two[1:], abs=1e-4), (mode, one, two)


def children(pid):
    """Process ids of the processes that `pid` started, from /proc."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in Linux's /proc")
def test_a_killed_rank_ends_the_others_and_max_restarts_brings_all_back(trained, tiny_flags,
                                                                        tmp_path):
    folder = tmp_path / "run"
    launcher = start_script(*TORCHRUN, "--max-restarts=1", "train.py", *tiny_flags,
                            "--save_every=3", "--parallel=ddp", f"--run_dir={folder}")
    while not (folder / "checkpoints/latest").exists() and launcher.poll() is None:
        time.sleep(0.02)
    os.kill(children(launcher.pid)[-1], signal.SIGKILL)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, output
    starts = [line for line in output.splitlines() if "parameters on 2 x cpu" in line]
    assert len(starts) == 2, output
    assert "step 0 of 20" in starts[0] and "step 0 of 20" not in starts[1], output
    for one, two in zip(curve(trained[0]), curve(folder), strict=True):
        assert one[1:] == pytest.approx(two[1:], abs=1e-4)


def test_the_ranks_of_a_start_agree_whatever_the_store_holds_from_an_earlier_one():
    store, prefixes = dist.HashStore(), []
    for _ in range(3):
        with ThreadPoolExecutor(4) as ranks:
            found = ranks.map(lambda rank: distributed.agree_on_store_prefix(store, rank, 4),
                              range(4))
            prefixes.append(set(found))
    assert [len(found) for found in prefixes] == [1, 1, 1] and len(set.union(*prefixes)) == 3


# A script for `run_ranks`: a rank may stand in another folder, or have another machine's traits.
RANK_SCRIPT = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
rank = int(os.environ["RANK"])
"""
TRAIN = f"""
if __name__ == "__main__":
    runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


def rank_script(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text(RANK_SCRIPT + text)
    return path


def test_every_rank_gathers_all_values_and_takes_rank_0s_precision(tmp_path):
    """Two CPUs of which one is faster in bfloat16: `auto` would differ."""
    script = rank_script(tmp_path, """
from nano_aimv2.training import distributed
distributed.bf16_speedup = lambda: 2.0 if rank == 0 else 0.5
distributed.torch.backends.mkldnn.is_available = lambda: True
runtime = distributed.start("cpu", "auto")
print(runtime.gather({"rank": runtime.rank}), runtime.dtype)
distributed.stop()
distributed.leave()
""")
    expected = "[{'rank': 0}, {'rank': 1}] torch.bfloat16\n"
    assert run_ranks(script) == [(0, expected)] * 2


@slow
def test_ranks_that_do_not_share_the_run_folder_all_stop_and_claim_nothing(tiny_flags, tmp_path):
    script = rank_script(tmp_path, f"""
from nano_aimv2.training import checkpoint
checkpoint.PATIENCE = 0.5
os.makedirs({str(tmp_path)!r} + f"/{{rank}}")
os.chdir({str(tmp_path)!r} + f"/{{rank}}")
{TRAIN}""")
    for code, output in run_ranks(script, *tiny_flags, "--run_dir=here/run"):
        assert code == 1 and "Traceback" not in output, output
        assert "run folder here/run: ranks [1] do not see what rank 0 writes there" in output
        assert "give --run_dir=/PATH on a shared disk" in output
    assert not list(tmp_path.glob("?/here/run")), "the folder is free for another start"


def test_an_error_of_one_rank_while_reading_ends_all_in_one_line_each(tiny_flags, tmp_path):
    script = rank_script(tmp_path, f"""
from nano_aimv2.data import batches
read = batches.TrainingData.read
def read_or_fail(self, start, *rest):
    if rank == 1 and start >= 60:
        raise OSError("the disk is gone")
    return read(self, start, *rest)
batches.TrainingData.read = read_or_fail
{TRAIN}""")
    (code_0, output_0), (code_1, output_1) = run_ranks(script, *tiny_flags,
                                                       f"--run_dir={tmp_path}/run")
    assert (code_0, code_1) == (1, 1), output_0 + output_1
    assert "Traceback" not in output_0 + output_1, output_0 + output_1
    assert "train.py: OSError: the disk is gone" in output_1.splitlines()
    assert "train.py: another rank has ended, and its message says why" in output_0.splitlines()


@slow
def test_ctrl_c_saves_a_run_of_two_ranks_once(tiny_flags, tmp_path):
    """A terminal sends SIGINT to torchrun and to its ranks, and torchrun passes it on."""
    folder = tmp_path / "run"
    launcher = start_script(*TORCHRUN, "train.py", *tiny_flags, "--steps=5000",
                            "--save_every=100000", f"--run_dir={folder}")
    while not (folder / "metrics.jsonl").exists() and launcher.poll() is None:
        time.sleep(0.02)
    os.killpg(launcher.pid, signal.SIGINT)
    output, _ = launcher.communicate(timeout=60)
    assert output.count("asked to stop: saving step") == 1, output
    step = int((folder / "checkpoints/latest").read_text().removeprefix("step-"))
    assert f"asked to stop: saving step {step}" in output
    assert "train.py: " not in output, output


def test_a_second_ctrl_c_ends_at_once_but_not_within_two_seconds(monkeypatch):
    now, ended, handlers = [100.0], [], {}
    monkeypatch.setattr(distributed.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(distributed.os, "_exit", ended.append)
    monkeypatch.setattr(distributed.signal, "signal", handlers.__setitem__)
    request = distributed.StopRequest()
    assert not request.asked
    for seconds, number, code in [(0, signal.SIGTERM, []), (0.5, signal.SIGINT, []),
                                  (1.9, signal.SIGINT, []), (9, signal.SIGTERM, []),
                                  (9, signal.SIGINT, [130])]:
        now[0] = 100.0 + seconds
        handlers[number](number, None)
        assert request.asked and ended == code, (seconds, number)


def test_a_loss_that_is_not_finite_names_step_term_and_samples(tiny_flags, tmp_path):
    flags = [*tiny_flags, "--lr=1e30", "--save_every=1", f"--run_dir={tmp_path}/run"]
    done = run_script("train.py", *flags, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert "FloatingPointError: step 1: not finite: " in message, message
    assert "gradient norm" in message and "00000.tar" in message, message
    assert "lower --lr (now 1e+30)" in message, message
    latest = (tmp_path / "run/checkpoints/latest").read_text()
    assert latest == "step-00000001", "the step that failed was not saved"


def test_targets_counted_ahead_change_nothing():
    config = tiny_config()
    model, batch, M = AIMv2(config), random_batch(config), torch.tensor([3, 8, 2])
    counted = model(batch, M)
    image, text = int((batch.grid.prod(dim=1) - M).sum()), int(batch.num_tokens.sum())
    given = model(batch, M, (image, text))
    assert (int(counted.image_count), int(counted.text_count)) == (image, text)
    for name in ("image_sum", "text_sum", "sampler_sum"):
        assert torch.equal(getattr(counted, name), getattr(given, name)), name


def test_numbers_read_later_are_those_of_then():
    numbers = torch.tensor([1.0, float("nan")])
    later = distributed.ReadLater(numbers.clone())
    numbers += 1
    assert later.read()[0] == 1 and math.isnan(later.read()[1])
