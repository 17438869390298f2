"""Bench: how fast training, captioning, data loader and encoder are, each next to a yardstick.

    python -m nano_aimv2.lab.bench                # step and captions
    python -m nano_aimv2.lab.bench step --preset=large --batch_size=64 --device=cuda
    python -m nano_aimv2.lab.bench captions       # greedy decoding against a bare loop
    python -m nano_aimv2.lab.bench data           # the data loader against a bare Pillow loop
    python -m nano_aimv2.lab.bench encoder        # the encoder's forward pass against transformers

`step` takes train.py's flags (without --preset it measures two models, SMALL and MEDIUM) and
prints images/s, FLOP/s or MFU, and peak memory, eager and compiled in every precision unless
--dtype and --compile choose. `captions` takes --device; `data` and `encoder` run on the CPU and
take no flags.

Times on a shared machine drift. So whatever is compared is measured in one run, and on a CPU the
time of a step is also given in units of one 1536 x 1536 x 1536 float32 matmul ("matmuls").
"""

import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from nano_aimv2.config import Config, presets_text
from nano_aimv2.data.batches import Batch, TrainingData, make_loader
from nano_aimv2.data.images import crop_box
from nano_aimv2.data.shards import ShardWriter
from nano_aimv2.data.tokenizer import Tokenizer
from nano_aimv2.flags import check_choice, read_flags, run_command
from nano_aimv2.generate import decode_tokens
from nano_aimv2.hub import TRANSFORMERS, views
from nano_aimv2.layers import NORM_EPS
from nano_aimv2.model import AIMv2
from nano_aimv2.patchify import patchify
from nano_aimv2.prefix_mask import step_prefix_len
from nano_aimv2.training import distributed
from nano_aimv2.training.metrics import peak_flops, train_flops
from nano_aimv2.training.optim import clipped_parameters, make_optimizer

# A step of Apple's released training code takes 30 matmuls in float32 and 22 in bf16 on SMALL, 92
# and 53 on MEDIUM (Zen 4, 2 cores).
SMALL = dict(image_size=64, patch_size=8, embed_dim=192, num_blocks=6, num_heads=3, decoder_dim=192,
             decoder_blocks=4, decoder_heads=3, vocab_size=512, max_tokens=33, batch_size=64,
             positions="learned")
MEDIUM = dict(image_size=224, patch_size=14, embed_dim=384, num_blocks=12, num_heads=6,
              decoder_dim=384, decoder_blocks=6, decoder_heads=6, vocab_size=32000, max_tokens=78,
              batch_size=8, positions="learned")
ENCODERS = (dict(embed_dim=192, num_blocks=12, num_heads=3),
            dict(embed_dim=1024, num_blocks=24, num_heads=8))  # AIMv2-L
MODES = ("step", "captions", "data", "encoder")
PRECISIONS = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16"),
              "mps": ("float32", "bfloat16", "float16")}


@dataclass
class Options:
    modes: list = ("step", "captions")  # what to measure


def seconds(action, device, repeats=10, warm_up=2):
    """Median seconds of `action()`, until a GPU has finished its work."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(warm_up + repeats):
        wait()
        begin = time.perf_counter()
        action()
        wait()
        times.append(time.perf_counter() - begin)
    return median(times[warm_up:])


def matmul_seconds():
    """The unit: one 1536 x 1536 x 1536 float32 matmul on the CPU."""
    a = torch.randn(1536, 1536)
    return seconds(lambda: a @ a, torch.device("cpu"))


def peak_memory(device):
    """Peak memory, as text: the GPU's, or without a GPU that of this process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    try:
        import resource
    except ImportError:  # Windows
        return "memory not known"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"


def in_own_process(function, *args):
    """Run `function` in a new process, so that its peak memory and its allocator are its own."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


# The training step


def bench_steps(config, device):
    """Measure one model in each precision, eager and compiled, each in a process of its own."""
    print(f"training step, encoder {config.embed_dim} x {config.num_blocks}, decoder "
          f"{config.decoder_dim} x {config.decoder_blocks}, {config.image_size} px, patch "
          f"{config.patch_size}, batch {config.batch_size}, {torch.get_num_threads()} threads",
          flush=True)
    dtypes = PRECISIONS[device.type] if config.dtype == "auto" else (config.dtype,)
    compiled = ("false", "true")[: 1 + has_compiler()] if config.compile == "auto" else (
        config.compile,)
    for dtype in dtypes:
        for choice in compiled:
            in_own_process(bench_step, replace(config, dtype=dtype, compile=choice))


def has_compiler():
    """Whether torch.compile finds the C++ compiler that it needs."""
    names = (os.environ.get("CXX", "g++"), "clang++")
    return sys.platform != "win32" and any(map(shutil.which, names))


def bench_step(config):
    """Print the time, FLOP/s and peak memory of a training step."""
    runtime = distributed.start(config.device, config.dtype, "none", config.compile)
    area = (config.image_size // config.patch_size) ** 2
    repeats = 10 if config.batch_size * area > 3000 else 30
    s, flops, parameters = measure_step(config, runtime, repeats)
    on_gpu = runtime.device.type == "cuda"
    matmuls = "" if on_gpu else f"{s / matmul_seconds():6.1f} matmuls "
    print(f"  {parameters / 1e6:8.2f}M {mode_text(runtime):19s} {s * 1e3:8.1f} ms {matmuls}"
          f"{config.batch_size / s:8.1f} images/s  {flops / 1e9:.1f} GFLOP, "
          f"{speed_text(flops, s, runtime.device)}  {peak_memory(runtime.device)}", flush=True)


def measure_step(config, runtime, repeats):
    """Forward, losses, backward, clipping and AdamW on random images and captions of full length.

    Returns: (median seconds, matmul FLOPs, parameters of the model).
    """
    torch.manual_seed(0)
    model = AIMv2(config)
    batch = random_batch(config)
    num_patches = batch.grid.prod(dim=1)
    prefix_len = step_prefix_len(num_patches, 0, 0, batch.rows, batch.global_size)
    targets = int((num_patches - prefix_len).sum()), int(batch.num_tokens.sum())
    size, area, length = *batch.patches.shape[:2], batch.tokens.shape[1]
    step = make_step(config, runtime, model, batch, prefix_len, targets)
    flops = size * train_flops(config, area, length, targets[0] / size, targets[1] / size)
    return seconds(step, runtime.device, repeats), flops, sum(p.numel() for p in model.parameters())


def mode_text(runtime):
    """Precision of the matmuls, and whether the blocks are compiled."""
    return runtime.settings()["dtype"] + (", compiled" if runtime.compile else "")


def speed_text(flops, s, device):
    """FLOPs done in `s` seconds as a rate; with the MFU where the device's peak is known."""
    peak = peak_flops(device)
    return f"{flops / s / 1e12:.2f} TFLOP/s" + (f", MFU {flops / s / peak:.1%}" if peak else "")


def random_batch(config):
    """Random pixels on the square grid of the config, and captions of full length."""
    B, T, side = config.batch_size, config.max_tokens, config.image_size // config.patch_size
    patches = torch.randint(256, (B, side * side, config.patch_dim), dtype=torch.uint8)
    tokens = torch.randint(config.vocab_size, (B, T))
    grid, num_tokens = torch.full((B, 2), side), torch.full((B,), T)
    return Batch(patches, grid, tokens, num_tokens, slice(0, B), B, is_full=True)


def make_step(config, runtime, model, batch, prefix_len, targets):
    """A function that does with the batch what a step of train.py does."""
    trained = distributed.parallelize(model, runtime)
    optimizer = make_optimizer(model, config.lr, config.weight_decay, config.betas)
    clipped = clipped_parameters(model)
    batch, prefix_len = batch.to(runtime.device), prefix_len.to(runtime.device)

    def step():
        with runtime.autocast():
            losses = trained(batch, prefix_len, targets)
            loss = losses.total(config.alpha, *targets)
        loss.backward()
        distributed.clip_gradients(clipped, config.clip_grad, runtime)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# Captions


@torch.inference_mode()
def bench_captions(device_name):
    """Print tokens/s of greedy decoding: 64 patches and BOS are read, 64 tokens written."""
    device = distributed.start(device_name, "float32").device
    config = Config.from_preset("toy", **{**SMALL, "max_tokens": 64})
    decoder = AIMv2(config).to(device).eval().decoder
    tokenizer = SimpleNamespace(eos=-1, vocab_size=config.vocab_size)  # no caption ends early

    def ours():
        decode_tokens(decoder, features, [], 64, tokenizer, lambda logits: logits.argmax(dim=-1))

    print("captions, decoder 4 x 192, 65 positions read, 64 tokens written: tokens/s")
    for size in (1, 8):
        features = torch.randn(size, 64, config.embed_dim, device=device)
        bare = 64 * size / seconds(lambda: bare_loop(decoder, features, 64), device, 5, 1)
        rate = 64 * size / seconds(ours, device, 5, 1)
        print(f"  batch {size}: bare loop {bare:.0f}, ours {rate:.0f} ({rate / bare:.2f} of it)",
              flush=True)


def bare_loop(decoder, features, count):
    """The least that greedy decoding needs: functional calls on a preallocated cache, no checks."""
    blocks, heads = decoder.trunk.blocks, decoder.trunk.blocks[0].attn.num_heads
    B, n, D = features.shape
    cache = torch.empty(len(blocks), 2, B, heads, n + 1 + count, D // heads, device=features.device)

    def norm(x, layer):
        return F.rms_norm(x, (D,), layer.weight, NORM_EPS)

    def next_token(x, start):
        """The token after the positions x f[B, N, D], of which the first is number `start`."""
        N = x.shape[1]
        for block, (keys, values) in zip(blocks, cache, strict=True):
            qkv = block.attn.qkv(norm(x, block.norm_1)).view(B, N, 3, heads, D // heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            keys[:, :, start : start + N] = k
            values[:, :, start : start + N] = v
            past = keys[:, :, : start + N], values[:, :, : start + N]
            a = F.scaled_dot_product_attention(q, *past, is_causal=N > 1)
            x = x + block.attn.proj(a.transpose(1, 2).reshape(B, N, D))
            h = norm(x, block.norm_2)
            x = x + block.mlp.fc2(F.silu(block.mlp.fc1(h)) * block.mlp.fc3(h))
        state = norm(x[:, -1], decoder.trunk.post_trunk_norm)
        return decoder.text_head(state).argmax(dim=-1)

    bos = (decoder.bos + decoder.text_positions[0]).expand(B, 1, D)
    token = next_token(torch.cat([decoder.connector(features), bos], dim=1), 0)
    for t in range(1, count):
        x = decoder.token_embed(token) + decoder.text_positions[t]
        token = next_token(x[:, None], n + t)
    return token


# Data


def bench_data(count=1200, workers=2):
    """Print images/s of the loader, and of a bare decode-and-resize loop in as many processes."""
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder), count)
        config = Config.from_preset("toy", data=f"{folder}:alt:1", image_size=224, patch_size=14,
                                    crop_scale=0.4, batch_size=40, steps=count // 40)
        files = sorted(map(str, Path(folder).glob("*.jpg")))
        bare, loader = [], []
        for _ in range(3):
            begin = time.perf_counter()
            with multiprocessing.Pool(workers) as pool:
                for _ in pool.imap_unordered(bare_decode, files, chunksize=40):
                    pass
            bare.append(count / (time.perf_counter() - begin))
            data = TrainingData(config, Tokenizer(config.tokenizer))
            begin = time.perf_counter()
            for _ in make_loader(data, 0, workers, pin=False):
                pass
            loader.append(count / (time.perf_counter() - begin))
    bare, loader = median(bare), median(loader)
    print(f"data, {count} JPEGs of 500 x 375 to 224 px crops, {workers} processes: bare Pillow "
          f"loop {bare:.0f} images/s, loader {loader:.0f} ({loader / bare:.2f} of it)")


def write_jpegs(folder, count):
    """Clouds of 500 x 375 pixels: as a training shard in folder/train, and as files in `folder`."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "train") as writer:
        for i in range(count):
            small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            image = small.resize((500, 375), Image.Resampling.BICUBIC)
            file = io.BytesIO()
            image.save(file, "JPEG", quality=90)
            writer.write(f"{i:06d}", file.getvalue(), "jpg", "an image of coloured clouds", {})
            (folder / f"{i:06d}.jpg").write_bytes(file.getvalue())


def bare_decode(path):
    """What every loader must do: decode, crop, resize."""
    rng = np.random.default_rng(int(Path(path).stem))
    image = Image.open(path)
    box = crop_box(*image.size, 0.4, rng)
    crop = image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC, box=box)
    return np.asarray(crop).sum()


# The encoder


@torch.inference_mode()
def bench_encoder(dtype, size, repeats=7):
    """Print the time of the forward pass on 8 images of 224 px, patch 14, and that of transformers
    with fused attention: the same weights, the two in turns."""
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    torch.manual_seed(0)
    config = Config.from_preset("base", **size, decoder_blocks=1)
    ours = AIMv2(config).encoder.eval()
    theirs = Aimv2VisionModel(Aimv2VisionConfig(
        hidden_size=config.embed_dim, intermediate_size=config.mlp_hidden_dim,
        num_hidden_layers=config.num_blocks, num_attention_heads=config.num_heads, use_head=False,
        attn_implementation="sdpa")).eval()
    theirs.load_state_dict(views(ours, TRANSFORMERS))
    pixels, grid = torch.randn(8, 3, 224, 224), torch.tensor([[16, 16]] * 8)
    patches = patchify(pixels, 14)
    difference = (ours(patches, grid) - theirs(pixels).last_hidden_state).abs().max()
    ours, theirs, pixels, patches = (x.to(getattr(torch, dtype))
                                     for x in (ours, theirs, pixels, patches))
    pairs = []
    for i in range(repeats):
        pairs.append([seconds(call, pixels.device, repeats=1, warm_up=int(i == 0))
                      for call in (lambda: ours(patches, grid), lambda: theirs(pixels))])
    a, b = (1e3 * median(times) for times in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    print(f"encoder forward, {config.embed_dim} x {config.num_blocks}, 8 images of 224 px, "
          f"{torch.get_num_threads()} threads, {dtype}: {a:.0f} ms, transformers {b:.0f} ms, ratio "
          f"{median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f}); largest difference in "
          f"float32 {float(difference):.1e}", flush=True)


def main(argv):
    given, chosen = read_flags(argv, Config, Options, doc=__doc__, words="modes",
                               epilog=presets_text())
    modes = Options(**chosen).modes
    for mode in modes:
        check_choice("mode", mode, MODES)
    if given and not {"step", "captions"} & set(modes):
        raise ValueError(f"data and encoder take no flags: leave out --{next(iter(given))}")
    if "encoder" in modes and not find_spec("transformers"):
        raise ValueError("encoder compares with the package transformers, which is not installed: "
                         "pip install transformers")
    sizes = [{}] if "preset" in given else [SMALL, MEDIUM]
    configs = [Config.from_preset(**{**size, **given}) for size in sizes]
    device = distributed.choose_device(configs[0].device)
    if "step" in modes:
        for config in configs:
            bench_steps(config, device)
    if "captions" in modes:
        in_own_process(bench_captions, configs[0].device)
    if "data" in modes:
        bench_data()
    if "encoder" in modes:
        for size in ENCODERS:
            for dtype in ("float32", "bfloat16"):
                in_own_process(bench_encoder, dtype, size)


if __name__ == "__main__":
    run_command(main)
