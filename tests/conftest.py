import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from nano_aimv2.config import Config  # noqa: E402
from nano_aimv2.data import Batch  # noqa: E402

torch.set_num_threads(2)

# All sizes different, so that a swapped axis cannot hide.
TINY = dict(image_size=20, patch_size=4, embed_dim=24, num_blocks=2, num_heads=3, decoder_dim=32, decoder_blocks=2,
            decoder_heads=4, mlp_multiple=8, max_tokens=24, num_workers=0, device="cpu", dtype="float32")


def tiny_config(**overrides):
    return Config.from_preset("toy", **{**TINY, **overrides})


def random_batch(config, size=3, num_tokens=(7, 4, 9), grids=None):
    """Random pixels and captions; `grids` (rows, cols) of at most as many patches as the config's square."""
    generator = torch.Generator().manual_seed(1)
    side = config.image_size // config.patch_size
    grid = torch.tensor(grids or [(side, side)] * size)
    area = int(grid.prod(dim=1).max())
    patches = torch.randint(256, (size, area, config.patch_dim), generator=generator, dtype=torch.uint8)
    for row, n in zip(patches, grid.prod(dim=1).tolist(), strict=True):
        row[n:] = 0
    tokens = torch.randint(config.vocab_size, (size, max(num_tokens)), generator=generator)
    return Batch(patches, grid, tokens, torch.tensor(num_tokens), slice(0, size), size)


def run_script(*args, cwd=ROOT, check=True, env=None, timeout=300):
    """Run a Python script of the project; returns the completed process with its output as text."""
    import os

    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
    if check and done.returncode:
        raise AssertionError(f"{args} exited {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return done


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
        f"--data={scenes}:synthetic:3,{scenes}:alt:1", "--steps=20", "--batch_size=12", "--lr=1e-3", "--warmup_steps=4",
        "--log_every=1", "--eval_every=0", "--save_every=0", "--eval_images=16"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_flags):
    """A finished run: (folder, what train.py printed)."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    done = run_script("train.py", *tiny_flags, f"--run={folder}")
    return folder, done.stdout + done.stderr
