"""Fixtures: one small toy set and one finished run, shared by the whole session."""

import pytest
import torch
from helpers import TINY, as_run, run_script
from safetensors.torch import save_file

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it computes
torch.set_warn_always(True)  # else a warning fails only the first test that causes it


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A small toy set of 20-pixel scenes."""
    from data.scenes import make_scenes

    folder = tmp_path_factory.mktemp("data") / "scenes"
    make_scenes(folder, train=96, val=24, novel=16, size=20)
    return folder


@pytest.fixture(scope="session")
def tiny_flags(scenes):
    """Flags of a run that takes seconds."""
    return [f"--{k}={v}" for k, v in TINY.items()] + [
        f"--data={scenes}:synthetic:3,{scenes}:alt:1", "--steps=20", "--batch_size=12", "--lr=1e-3",
        "--warmup_steps=4", "--log_every=1", "--eval_every=0", "--save_every=0", "--eval_images=16"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_flags):
    """A finished run: (folder, what train.py printed)."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    done = run_script("train.py", *tiny_flags, f"--run_dir={folder}")
    return folder, done.stdout + done.stderr


@pytest.fixture(scope="session")
def learned(tmp_path_factory):
    """(folder, model) of a run with a learned table on 5 x 5 patches that grows evenly in both
    directions."""
    folder = tmp_path_factory.mktemp("runs") / "learned"
    model = as_run(folder, positions="learned")
    row, col = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij")
    with torch.no_grad():
        model.encoder.positions.table.copy_((row + 10 * col).reshape(25, 1) + torch.arange(24.0))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder, model
