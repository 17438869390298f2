"""What several tests share: tiny configs, batches and shards, scripts run as a user would."""

import contextlib
import io
import os
import socket
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the suite also runs where the package is not installed

from nano_aimv2.config import Config  # noqa: E402
from nano_aimv2.data.batches import Batch  # noqa: E402
from nano_aimv2.data.shards import ShardWriter  # noqa: E402
from nano_aimv2.data.tokenizer import Tokenizer  # noqa: E402
from nano_aimv2.generate import choose, draw_patches  # noqa: E402
from nano_aimv2.model import AIMv2  # noqa: E402
from nano_aimv2.patch_sampler import STEPS  # noqa: E402
from nano_aimv2.prefix_mask import prefix_mask  # noqa: E402
from nano_aimv2.training.metrics import read_metrics  # noqa: E402

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
# All sizes different, so that a swapped axis cannot hide.
TINY = dict(image_size=20, patch_size=4, embed_dim=24, num_blocks=2, num_heads=3, decoder_dim=32,
            decoder_blocks=2, decoder_heads=4, mlp_multiple=8, max_tokens=24, num_workers=0,
            device="cpu", dtype="float32")


def tiny_config(**overrides):
    return Config.from_preset("toy", **{**TINY, **overrides})


def random_batch(config, size=3, num_tokens=(7, 4, 9), grids=None):
    """Random pixels and captions; `grids`: (rows, cols) of each image, else the config's square."""
    generator = torch.Generator().manual_seed(1)
    side = config.image_size // config.patch_size
    grid = torch.tensor(grids or [(side, side)] * size)
    area = int(grid.prod(dim=1).max())
    patches = torch.randint(256, (size, area, config.patch_dim), generator=generator,
                            dtype=torch.uint8)
    for row, n in zip(patches, grid.prod(dim=1).tolist(), strict=True):
        row[n:] = 0
    tokens = torch.randint(config.vocab_size, (size, max(num_tokens)), generator=generator)
    return Batch(patches, grid, tokens, torch.tensor(num_tokens), slice(0, size), size)


def liven_sampler(model):
    """Move the patch sampler away from its start, where it predicts zeros."""
    with torch.no_grad():
        for layer in (model.sampler.modulation, model.sampler.final):
            layer.weight.normal_(std=0.1)


def png(value=7, size=(20, 20)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, 100, 200)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members):
    """A tar of (name, bytes), in order: what other tools write."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def as_run(folder, **overrides):
    """A finished run of random weights; returns its model."""
    model = AIMv2(tiny_config(**overrides))
    folder.mkdir(exist_ok=True)
    model.config.save(folder / "config.json")
    Tokenizer("toy.tiktoken").save(folder)
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


def simple_shards(folder, count, label="a"):
    with ShardWriter(folder, samples_per_shard=7) as writer:
        for i in range(count):
            writer.write(f"{label}{i:04d}", png(i % 256), "png", f"alt {label} {i}",
                         {"synthetic": [f"long {label} {i}"]})
    return folder


def environment(more=None):
    """The environment of a script that a test starts: one thread, so that its numbers repeat."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **(more or {})}


def run_script(*args, cwd=ROOT, check=True, env=None, timeout=300):
    """Run a Python script of the project; returns the completed process with its output as text."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=environment(env),
                          capture_output=True, text=True, timeout=timeout)
    if check and done.returncode:
        raise AssertionError(f"{args} exited {done.returncode}:\n{done.stdout[-2000:]}\n"
                             f"{done.stderr[-3000:]}")
    return done


def start_script(*args, cwd=ROOT, env=None):
    """Start a script in a process group of its own, as a terminal does, and return at once."""
    return subprocess.Popen([sys.executable, *map(str, args)], cwd=cwd, env=environment(env),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def free_port():
    """A port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(*args, world=2, timeout=120):
    """Run a script as `world` ranks without a launcher, so that all output is the ranks' own.

    Returns: [(exit code, stdout and stderr as one text)] in the order of the ranks.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    address |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    ranks = [start_script(*args, env={**address, "RANK": str(rank), "LOCAL_RANK": str(rank)})
             for rank in range(world)]
    try:
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


def assert_one_line(done, message):
    """A command ended because of a user's mistake, and said so in one line."""
    assert done.returncode != 0 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def run_together(*commands):
    """Run scripts that may fail two at a time: [(script, *flags), ..] -> completed processes."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda command: run_script(*command, check=False), commands))


@contextlib.contextmanager
def full_disk(room=4096):
    """Inside the block, no file of this process grows beyond `room` bytes: writes fail as on a
    full disk, for an administrator too."""
    resource = pytest.importorskip("resource", reason="this system cannot limit the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def colour_shares(path):
    """What an image file shows: {(r, g, b): share of its pixels}. A figure that holds a curve holds
    that curve's colour."""
    with Image.open(path) as image:
        image = image.convert("RGB")
    counted = image.getcolors(maxcolors=image.width * image.height)
    return {colour: count / (image.width * image.height) for count, colour in counted}


def training_rows(run_dir):
    """The rows of a run's metrics.jsonl that report training steps."""
    return [row for row in read_metrics(Path(run_dir) / "metrics.jsonl") if "loss" in row]


def curve(run_dir):
    """[(step, text loss, image loss)] of a run."""
    return [(row["step"], row["loss_text"], row["loss_image"]) for row in training_rows(run_dir)]


@torch.inference_mode()
def caption_without_caches(model, patches, grid, tokenizer, prompt="", temperature=0.0, top_k=0,
                           top_p=1.0, seed=0, max_tokens=None):
    """What `generate.caption` must equal: everything is computed again for each token.

    Returns: [(ids, log-probability)] in the order of the images.
    """
    generator, results = torch.Generator().manual_seed(seed), [None] * len(patches)
    num_patches = grid.prod(dim=1)
    for n in num_patches.unique().tolist():
        rows = (num_patches == n).nonzero()[:, 0]
        ids = torch.tensor([tokenizer.encode_prompt(prompt)] * len(rows), dtype=torch.long)
        log_prob, done = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.bool)
        while ids.shape[1] < (max_tokens or model.config.max_tokens) and not done.all():
            features = model.encoder(patches[rows, :n], grid[rows])
            _, states = model.decoder(features, num_patches[rows], ids)
            logits = model.decoder.text_head(states[:, -1])[:, : tokenizer.vocab_size]
            token = choose(logits, temperature, top_k, top_p, generator)
            token = token.masked_fill(done, tokenizer.eos)
            chosen = logits.log_softmax(dim=-1).gather(1, token[:, None])[:, 0]
            log_prob += chosen.masked_fill(done, 0.0)
            done |= token == tokenizer.eos
            ids = torch.cat([ids, token[:, None]], dim=1)
        for i, row in enumerate(rows.tolist()):
            results[row] = (ids[i].tolist(), float(log_prob[i]))
    return results


@torch.inference_mode()
def complete_without_caches(model, patches, grid, num_given):
    """What `generate.complete` must equal: everything is computed again for each patch."""
    encoder, decoder, n = model.encoder, model.decoder, patches.shape[1]
    pixels, prefix_len = patches[:, :num_given], torch.full((len(patches),), num_given)
    positions = encoder.positions(grid, n)
    while pixels.shape[1] < n:
        length = pixels.shape[1]
        x = encoder.embed(pixels) + positions[:, :length]
        features = encoder.trunk(x, can_attend=prefix_mask(prefix_len, length))
        states = decoder.trunk(decoder.connector(features), causal=True)
        drawn = draw_patches(model, states[:, -1:], pixels, grid, length, seed=0, steps=STEPS)
        pixels = torch.cat([pixels, drawn], dim=1)
    return pixels
