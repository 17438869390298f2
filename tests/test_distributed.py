"""However a step is split, and whatever happens to a process: the same numbers."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, random_batch, run_script, tiny_config
from safetensors.torch import load_file
from test_train import curve

from nano_aimv2 import budget, distributed
from nano_aimv2.bench import attend_in_two_calls
from nano_aimv2.config import PRESETS, Config
from nano_aimv2.layers import WRITTEN_OUT, Block
from nano_aimv2.model import AIMv2
from nano_aimv2.prefix_mask import prefix_mask

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def whole_gradients(tiny_flags, tmp_path_factory):
    """The first step's gradients of one process and one micro-batch."""
    path = tmp_path_factory.mktemp("gradients") / "whole.safetensors"
    run_script("tests/first_gradients.py", path, *tiny_flags)
    return load_file(path)


@pytest.mark.parametrize("how, launcher, flags", [
    ("four micro-batches", (), ["--grad_accum=4"]),
    ("recomputed blocks", (), ["--recompute=true"]),
    ("two ranks, DDP, two micro-batches each", TORCHRUN, ["--parallel=ddp", "--grad_accum=2"]),
    ("two ranks, FSDP2, two micro-batches each, recomputed", TORCHRUN, ["--parallel=fsdp", "--grad_accum=2", "--recompute=true"]),
    ("two ranks of one node, hybrid", TORCHRUN, ["--parallel=hybrid"]),
])
def test_the_first_gradients_do_not_depend_on_the_split(how, launcher, flags, whole_gradients, tiny_flags, tmp_path):
    path = tmp_path / "split.safetensors"
    run_script(*launcher, *(["--"] if launcher else []), "tests/first_gradients.py", path, *tiny_flags, *flags)
    split = load_file(path)
    assert split.keys() == whole_gradients.keys()
    for name, gradient in whole_gradients.items():
        largest = float(gradient.abs().max())
        if "stats_head.0" in name:  # its second layer starts at zero, so nothing comes back to it in the first step
            assert largest == 0 == float(split[name].abs().max())
            continue
        difference = float((split[name] - gradient).abs().max()) / largest
        assert difference < 1e-6, f"{how}: {name} differs by {difference:.1e} of its largest gradient"


def test_hybrid_sharding_over_two_nodes_trains_like_one_process(trained, tiny_flags, tmp_path):
    """Two launchers of one rank each stand for two nodes: whole copies between them, slices within."""
    folder = tmp_path / "hybrid"
    nodes = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={node}",
         "--master_addr=127.0.0.1", "--master_port=29611", "--", "train.py", *tiny_flags, "--parallel=hybrid", f"--run={folder}"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for node in range(2)]
    for node in nodes:
        output, _ = node.communicate(timeout=120)
        assert node.returncode == 0, output
    for one, two in zip(curve(trained[0]), curve(folder), strict=True):
        assert one[1:] == pytest.approx(two[1:], abs=1e-4 if one[0] > 5 else 1e-5)


def test_a_checkpoint_of_two_ddp_ranks_goes_on_under_fsdp_and_alone(trained, tiny_flags, tmp_path):
    folder, flags = tmp_path / "run", [*tiny_flags, "--save_every=10", "--keep=9"]
    run_script(*TORCHRUN, "--", "train.py", *flags, "--parallel=ddp", f"--run={folder}")
    for launcher, mode in ((TORCHRUN, "fsdp"), ((), "none")):
        copy = shutil.copytree(folder, tmp_path / mode)
        (copy / "checkpoints/latest").write_text("step-00000010")
        done = run_script(*launcher, *(["--"] if launcher else []), "train.py", *flags, f"--parallel={mode}", f"--run={copy}")
        assert "step 10 of 20" in done.stdout + done.stderr
        for one, two in zip(curve(trained[0]), curve(copy), strict=True):
            assert one[1:] == pytest.approx(two[1:], abs=1e-4), (mode, one, two)


def children(pid):
    """Process ids of the Python processes that `pid` started, from /proc."""
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks through Linux's /proc")
def test_a_killed_rank_ends_the_others_and_max_restarts_brings_all_back(trained, tiny_flags, tmp_path):
    folder = tmp_path / "run"
    launcher = subprocess.Popen(
        [sys.executable, *TORCHRUN, "--max-restarts=1", "--", "train.py", *tiny_flags, "--save_every=3", "--parallel=ddp",
         f"--run={folder}"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (folder / "checkpoints/latest").exists() and launcher.poll() is None:
        time.sleep(0.02)
    os.kill(children(launcher.pid)[-1], signal.SIGKILL)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, output
    starts = [line for line in output.splitlines() if "parameters on 2 x cpu" in line]
    assert len(starts) == 2 and "step 0 of 20" in starts[0] and "step 0 of 20" not in starts[1], output
    for one, two in zip(curve(trained[0]), curve(folder), strict=True):
        assert one[1:] == pytest.approx(two[1:], abs=1e-4)


def test_ranks_of_a_start_agree_on_its_name_whatever_the_store_holds_from_an_earlier_one():
    store, names = dist.HashStore(), []
    for _ in range(3):
        with ThreadPoolExecutor(4) as ranks:
            names.append(set(ranks.map(lambda rank: distributed.name_of_start(store, rank, 4), range(4))))
    assert [len(name) for name in names] == [1, 1, 1] and len(set.union(*names)) == 3


def test_a_loss_that_is_not_finite_names_step_term_and_samples(tiny_flags, tmp_path):
    flags = [*tiny_flags, "--lr=1e30", "--save_every=1", f"--run={tmp_path}/run"]
    done = run_script("train.py", *flags, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert "FloatingPointError: step 1: not finite: " in message and "gradient norm" in message, message
    assert "00000.tar" in message and "lower --lr (now 1e+30)" in message, message
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000001", "the step that failed was not saved"


def test_targets_counted_ahead_change_nothing():
    config = tiny_config()
    model, batch, M = AIMv2(config), random_batch(config), torch.tensor([3, 8, 2])
    counted = model(batch, M)
    image, text = int((batch.grid.prod(dim=1) - M).sum()), int(batch.num_tokens.sum())
    given = model(batch, M, (image, text))
    assert (int(counted.image_count), int(counted.text_count)) == (image, text)
    for name in ("image_sum", "text_sum", "stats_sum"):
        assert torch.equal(getattr(counted, name), getattr(given, name)), name


def test_numbers_read_later_are_those_of_then():
    numbers = torch.tensor([1.0, float("nan")])
    later = distributed.ReadLater(numbers.clone())
    numbers += 1
    assert later.read()[0] == 1 and math.isnan(later.read()[1])


# The budget


def test_the_bytes_that_a_block_keeps_are_those_that_autograd_saves():
    B, N, D, hidden = 2, WRITTEN_OUT + 31, 96, 160
    torch.manual_seed(0)
    block, x = Block(D, 3, hidden), torch.randn(B, N, D, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = block(x, causal=True)
    counted = sum(kept.values())
    assert B * budget.block_bytes(N, D, hidden, 4, False) == pytest.approx(counted, rel=0.1), counted
    assert out.shape == x.shape


def test_every_preset_of_the_paper_has_a_budget_and_shards_divide_it():
    for preset in ("large", "huge", "1b", "3b"):
        config = Config.from_preset(preset)
        assert config.batch_size == 8192 and config.weight_decay == 1e-4 and config.steps == 1_500_000
    encoder = {"large": 309.20, "huge": 680.85, "1b": 1234.96, "3b": 2720.66}
    for preset, millions in encoder.items():
        lines = budget.report(Config.from_preset(preset), world=64, img_per_s=10_000)
        assert f"{millions:,.1f}M of them the encoder" in lines[0], lines[0]
        assert any("at 10,000 images/s: 14.2 days" in line for line in lines), lines
    config = Config.from_preset("large")
    ddp, fsdp = (budget.memory_per_rank(config, 500e6, 10e6, 64, mode)[0] for mode in ("ddp", "fsdp"))
    assert ddp == pytest.approx(18 * 500e6) and fsdp == pytest.approx(16 * 500e6 / 64 + 12 * 10e6)
    recomputed = budget.activation_bytes(Config.from_preset("large", recompute=True), 8)
    assert recomputed < 0.3 * budget.activation_bytes(config, 8)
    assert set(encoder) < set(PRESETS)


def test_a_dry_run_prints_and_trains_nothing(tmp_path):
    done = run_script("train.py", "--preset=3b", "--dry_run", "--world=16", "--img_per_s=5000", f"--run={tmp_path}/x")
    assert "2,982.7M parameters" in done.stdout and "days" in done.stdout and not (tmp_path / "x").exists()
    for flags, message in ((["--world=0"], "--world=0 must be a number above 0"), (["--wrld=8"], "unknown flag --wrld")):
        done = run_script("train.py", "--dry_run", *flags, check=False)
        assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_prefix_attention_in_two_calls_is_prefix_attention_under_a_mask():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, 2, 11, 8)
    M = torch.tensor([1, 4, 11])
    masked = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=prefix_mask(M, 11))
    difference = float((attend_in_two_calls(q, k, v, M.tolist()) - masked).abs().max())
    assert difference < 1e-6, difference
