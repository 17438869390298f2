"""Bench: how fast, in numbers that can be compared.

    python -m nano_aimv2.bench                 # training steps of two models, float32 and default precision, and captioning
    python -m nano_aimv2.bench --data          # the data loader against a bare Pillow loop over the same files
    python -m nano_aimv2.bench --native        # native-resolution batches against fixed ones, and how much of them is padding
    python -m nano_aimv2.bench --index         # shards of a million samples: bytes and seconds before the first batch
    python -m nano_aimv2.bench --encoder       # the encoder's forward pass against transformers, where that is installed
    python -m nano_aimv2.bench --attention     # prefix attention three ways, at 256, 1024 and 4096 patches
    python -m nano_aimv2.bench --step --preset=large --batch_size=64 --device=cuda      # any preset: eager and compiled,
        # images/s, MFU and peak memory; --compile=false, --recompute=true, --dtype=float32 and every other setting

Times of shared machines drift, so a step is also printed in the time of one 1536 x 1536 x 1536 float32 matmul taken in
the same process ("in matmuls"), and everything that is compared is measured in one run.
"""

import io
import multiprocessing
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from nano_aimv2 import distributed
from nano_aimv2.config import Config
from nano_aimv2.data import Batch, TrainingData
from nano_aimv2.generate import decode_words
from nano_aimv2.images import crop_box
from nano_aimv2.layers import mask_to_bias
from nano_aimv2.loader import make_loader
from nano_aimv2.metrics import peak_flops, train_flops
from nano_aimv2.model import AIMv2
from nano_aimv2.native_res import best_grid, draw_areas
from nano_aimv2.optim import make_optimizer
from nano_aimv2.patchify import patchify
from nano_aimv2.prefix_mask import prefix_mask, step_prefix_len
from nano_aimv2.shards import Shards, ShardWriter
from nano_aimv2.tokenizer import Tokenizer

# The small model on which Apple's released training code takes 30 matmuls a step in float32 and 22 in bf16 (Zen 4, 2 cores).
SMALL = dict(image_size=64, patch_size=8, embed_dim=192, num_blocks=6, num_heads=3, decoder_dim=192, decoder_blocks=4,
             decoder_heads=3, vocab_size=512, max_tokens=33, batch_size=64, positions="learned")
# And the one on which it takes 92 and 53.
MEDIUM = dict(image_size=224, patch_size=14, embed_dim=384, num_blocks=12, num_heads=6, decoder_dim=384, decoder_blocks=6,
              decoder_heads=6, vocab_size=32000, max_tokens=78, batch_size=8, positions="learned")


def seconds(action, device, repeats=10, warm_up=2):
    """Median seconds of `action()`."""
    times = []
    for i in range(warm_up + repeats):
        wait(device)
        begin = time.perf_counter()
        action()
        wait(device)
        if i >= warm_up:
            times.append(time.perf_counter() - begin)
    return median(times)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_seconds():
    """The unit: one 1536 x 1536 x 1536 float32 matmul on the CPU."""
    a = torch.randn(1536, 1536)
    return seconds(lambda: a @ a, torch.device("cpu"))


def full_batch(config, grid, area):
    """Random pixels on grids i64[B, 2] of at most `area` patches, and captions that fill their length."""
    size, T = len(grid), config.max_tokens
    return Batch(torch.randint(256, (size, area, config.patch_dim), dtype=torch.uint8), grid,
                 torch.randint(config.vocab_size, (size, T)), torch.full((size,), T), slice(0, size), size)


def bench_step(config, settings):
    """Forward, losses, backward, clip and AdamW: prints ms, matmuls, images/s, GFLOP/s and peak memory."""
    runtime = distributed.start(**settings)
    torch.manual_seed(0)
    model = AIMv2(config)
    trained = distributed.parallelize(model, runtime)
    optimizer = make_optimizer(model, config.lr, config.weight_decay, (config.beta_1, config.beta_2))
    side = config.image_size // config.patch_size
    batch = full_batch(config, torch.full((config.batch_size, 2), side), side * side)
    num_patches = batch.grid.prod(dim=1)
    prefix_len = step_prefix_len(num_patches, 0, 0, batch.rows, batch.global_size)
    image_count, text_count = int((num_patches - prefix_len).sum()), int(batch.num_tokens.sum())
    batch, prefix_len = batch.to(runtime.device), prefix_len.to(runtime.device)

    def step():
        with runtime.autocast():
            loss = trained(batch, prefix_len, (image_count, text_count)).total(config.alpha, image_count, text_count)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    s = seconds(step, runtime.device, repeats=10 if len(batch.patches) * side**2 > 3000 else 30)
    size, area, length = *batch.patches.shape[:2], batch.tokens.shape[1]
    flops = size * train_flops(config, area, length, image_count / size, text_count / size)
    parameters = sum(p.numel() for p in model.parameters())
    if runtime.device.type == "cuda":
        memory, unit = torch.cuda.max_memory_allocated() / 2**30, ""
        peak = peak_flops(runtime.device)
        speed = f"{flops / s / 1e12:.1f} TFLOP/s" + (f", MFU {flops / s / peak:.1%}" if peak else "")
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
        unit, speed = f"{s / matmul_seconds():6.1f} matmuls ", f"{flops / s / 1e9:.0f} GFLOP/s"
    name = f"{str(runtime.dtype).removeprefix('torch.')}{', compiled' if runtime.compile else ''}"
    print(f"  {parameters / 1e6:8.2f}M {name:19s} {s * 1e3:8.1f} ms {unit}{size / s:8.1f} images/s  {flops / 1e9:.1f} GFLOP, "
          f"{speed}  {memory:.2f} GiB", flush=True)


def bench_attention(settings):
    """Prefix attention of AIMv2-L (8 heads of 128), forward and backward, 2^14 patches a batch: ms and the ratio to the first.

    Attention is 4% of a block's arithmetic at 256 patches, 14% at 1,024 and 39% at 4,096: that is all there is to gain.
    """
    runtime = distributed.start(**settings)
    on_gpu = runtime.device.type == "cuda"
    for N in (256, 1024, 4096):
        B = max(1, (2**14 if on_gpu else 2**12) // N)
        q, k, v = (torch.randn(B, 8, N, 128, device=runtime.device, dtype=runtime.dtype, requires_grad=True) for _ in range(3))
        prefix_len = step_prefix_len(torch.full((B,), N), 0, 0, slice(0, B), B)
        bias = mask_to_bias(prefix_mask(prefix_len.to(runtime.device), N)).to(runtime.dtype)
        lengths = prefix_len.tolist()
        ways = {"mask": lambda q, k, v, bias=bias: F.scaled_dot_product_attention(q, k, v, attn_mask=bias),
                "two calls": lambda q, k, v, lengths=lengths: attend_in_two_calls(q, k, v, lengths),
                "causal only (a bound)": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)}
        if on_gpu:  # its backward pass exists on GPUs only
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            M = prefix_len.to(runtime.device)
            block_mask = create_block_mask(lambda b, h, i, j, M=M: (j <= i) | (j < M[b]), B, None, N, N, runtime.device)
            flex = torch.compile(flex_attention, dynamic=False)
            ways["FlexAttention"] = lambda q, k, v, block_mask=block_mask, flex=flex: flex(q, k, v, block_mask=block_mask)
        times = {name: seconds(lambda way=way: way(q, k, v).sum().backward(), runtime.device, 5) for name, way in ways.items()}
        print(f"prefix attention, {B} x {N} patches: " + ", ".join(
            f"{name} {s * 1e3:.2f} ms ({s / times['mask']:.2f})" for name, s in times.items()), flush=True)


def attend_in_two_calls(q, k, v, lengths):
    """Prefix attention without a mask: causal for all, then each prefix sees itself freely. q, k, v f[B, heads, N, hd]."""
    causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return torch.stack([torch.cat([F.scaled_dot_product_attention(*(t[b : b + 1, :, :M] for t in (q, k, v)))[0],
                                   causal[b, :, M:]], dim=1) for b, M in enumerate(lengths)])


def bench_captions(settings):
    """Greedy decoding after 65 positions (64 patches and BOS), 64 new tokens, decoder 4 x 192: tokens/s."""
    runtime = distributed.start(**settings)
    config = Config.from_preset("toy", **{**SMALL, "max_tokens": 64})
    model = AIMv2(config).to(runtime.device).eval()

    class NeverEnds:  # a tokenizer for random weights: no id is EOS
        eos, vocab_size = -1, config.vocab_size

    print("captioning, decoder 4 x 192, 65 positions read, 64 tokens written: tokens/s")
    for size in (1, 8):
        features = torch.randn(size, 64, config.embed_dim, device=runtime.device)

        def run(cached, features=features):
            with torch.inference_mode():
                decode_words(model.decoder, features, [], 64, NeverEnds, cached, lambda logits: logits.argmax(dim=-1))

        rates = {"bare loop": lambda f=features: bare_loop(model.decoder, f, 64), "cached": lambda: run(True),
                 "uncached": lambda: run(False)}
        rates = {name: 64 * size / seconds(action, runtime.device, 5, 1) for name, action in rates.items()}
        print(f"  batch {size}: bare loop {rates['bare loop']:.0f}, cached {rates['cached']:.0f} ("
              f"{rates['cached'] / rates['bare loop']:.2f} of the bare loop), uncached {rates['uncached']:.0f} "
              f"(cached is {rates['cached'] / rates['uncached']:.1f} times faster)", flush=True)


@torch.inference_mode()
def bare_loop(decoder, features, count):
    """The least that greedy decoding needs, as a yardstick: functional calls on a preallocated cache, nothing checked."""
    blocks, heads = decoder.trunk.blocks, decoder.trunk.blocks[0].attn.num_heads
    B, n, D = features.shape
    hd = D // heads
    cache = torch.empty(len(blocks), 2, B, heads, n + 1 + count, hd)

    def norm(x, layer):
        return F.rms_norm(x, (D,), layer.weight, 1e-5)

    def trunk(x, start):
        N = x.shape[1]
        for i, block in enumerate(blocks):
            q, k, v = block.attn.qkv(norm(x, block.norm_1)).view(B, N, 3, heads, hd).permute(2, 0, 3, 1, 4)
            cache[i, 0, :, :, start : start + N], cache[i, 1, :, :, start : start + N] = k, v
            a = F.scaled_dot_product_attention(q, cache[i, 0, :, :, : start + N], cache[i, 1, :, :, : start + N],
                                               is_causal=N > 1)
            x = x + block.attn.proj(a.transpose(1, 2).reshape(B, N, D))
            h = norm(x, block.norm_2)
            x = x + block.mlp.fc2(F.silu(block.mlp.fc1(h)) * block.mlp.fc3(h))
        return decoder.text_head(norm(x[:, -1], decoder.trunk.post_trunk_norm)).argmax(dim=-1)

    bos = (decoder.bos + decoder.text_positions[0]).expand(B, 1, D)
    token = trunk(torch.cat([decoder.connector(features), bos], dim=1), 0)
    for t in range(1, count):
        token = trunk((decoder.token_embed(token) + decoder.text_positions[t])[:, None], n + t)
    return token


def bench_data(count=1200, workers=2):
    """The loader alone, 500 x 375 JPEGs to 224 px crops, against a bare decode-and-resize loop in as many processes."""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        with ShardWriter(Path(folder) / "train") as writer:
            for i in range(count):
                small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
                file = io.BytesIO()
                small.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
                writer.write(f"{i:06d}", file.getvalue(), "jpg", "a picture of coloured clouds", {})
                (Path(folder) / f"{i:06d}.jpg").write_bytes(file.getvalue())
        config = Config.from_preset("toy", data=f"{folder}:alt:1", image_size=224, patch_size=14, crop_scale=0.4, batch_size=40,
                                    steps=count // 40)
        files = sorted(map(str, Path(folder).glob("*.jpg")))
        rates = {"bare loop": [], "loader": []}
        for _ in range(3):
            begin = time.perf_counter()
            with multiprocessing.get_context("fork").Pool(workers) as pool:
                for _ in pool.imap_unordered(bare_decode, files, chunksize=40):
                    pass
            rates["bare loop"].append(count / (time.perf_counter() - begin))
            data = TrainingData(config, Tokenizer(config.tokenizer))
            begin = time.perf_counter()
            for _ in make_loader(data, 0, workers, pin=False):
                pass
            rates["loader"].append(count / (time.perf_counter() - begin))
    bare, loader = median(rates["bare loop"]), median(rates["loader"])
    print(f"data, {count} JPEGs of 500 x 375 to 224 px crops, {workers} processes: bare Pillow loop {bare:.0f} images/s, "
          f"loader {loader:.0f} ({loader / bare:.2f} of it)")


def bare_decode(path):
    """What no loader can do without: decode, cut, resize."""
    rng = np.random.default_rng(int(Path(path).stem))
    image = Image.open(path)
    box = crop_box(*image.size, 0.4, rng)
    return np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC, box=box)).sum()


def bench_native(config, settings):
    """Training steps on native batches against fixed ones of the same patches a batch, and the padding of real proportions."""
    rng = np.random.default_rng(0)
    shapes = np.array([(4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16), (1, 1), (5, 4)])[rng.integers(8, size=4000)]
    shapes = shapes * rng.uniform(0.9, 1.1, shapes.shape)  # cropped by hand
    for low, high in ((7, 12), (5, 8)):
        areas = draw_areas(0, len(shapes), low, high)
        filled = [np.prod(best_grid(*shape, int(area))) for shape, area in zip(shapes, areas, strict=True)]
        print(f"native, areas 2^{low} .. 2^{high}: {1 - sum(filled) / areas.sum():.1%} of the patches of a long run are padding "
              f"({1 - np.mean(filled / areas):.1%} on the mean image)")
    runtime = distributed.start(**settings)
    torch.manual_seed(0)
    model = AIMv2(replace(config, positions="sincos"))
    optimizer = make_optimizer(model, config.lr, config.weight_decay, (config.beta_1, config.beta_2))
    side = config.image_size // config.patch_size
    constant = config.batch_size * side * side

    def step(area, shapes):
        grid = torch.tensor([best_grid(*shape, area) for shape in shapes])
        batch = full_batch(config, grid, area)
        prefix_len = step_prefix_len(grid.prod(dim=1), 0, 0, batch.rows, batch.global_size)
        begin = time.perf_counter()
        with runtime.autocast():
            losses = model(batch, prefix_len)
            loss = losses.total(config.alpha, losses.image_count, losses.text_count)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - begin, int(grid.prod(dim=1).sum()), len(grid)

    totals = {"fixed": np.zeros(3), "native": np.zeros(3)}
    for i, area in enumerate(draw_areas(1, 26, 5, 8)):
        fixed = step(side * side, [(1, 1)] * config.batch_size)
        native = step(int(area), shapes[rng.integers(len(shapes), size=constant // area)])
        if i >= 2:
            totals["fixed"] += fixed
            totals["native"] += native
    rates = {name: patches / s for name, (s, patches, _) in totals.items()}
    captions = totals["native"][2] / totals["fixed"][2]
    print(f"  training, {constant} patches a batch: fixed {rates['fixed']:.0f} valid patches/s, native (areas 2^5 .. 2^8) "
          f"{rates['native']:.0f} ({rates['native'] / rates['fixed']:.2f} of it), with {captions:.2f} times as many captions")


def bench_index(shards=100, samples=10_000):
    """A million samples in 100 tars (links to one file): the first start makes the sidecars, later ones map them."""
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(folder, samples) as writer:
            for i in range(samples):
                writer.write(f"{i:06d}", b"image", "jpg", "caption", {})
        for k in range(1, shards):
            Path(folder, f"{k:05d}.tar").hardlink_to(Path(folder, "00000.tar"))
        seconds_of = []
        for _ in range(2):
            begin = time.perf_counter()
            found = Shards(folder)
            seconds_of.append(time.perf_counter() - begin)
        size = sum(p.stat().st_size for p in Path(folder).glob("*.npy"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in np.random.default_rng(0).integers(len(found), size=2000):
            assert found.image(int(i)) == b"image"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"index, {len(found):,} samples in {shards} tars: {size / len(found):.0f} bytes a sample on disk, first start "
          f"{seconds_of[0]:.1f} s, later starts {seconds_of[1] * 1e3:.0f} ms; 2,000 random reads grew memory by {grown:.1f} MiB")


def bench_encoder(dtype, D, num_blocks, num_heads, repeats):
    """Features of 8 images of 224 px, patch 14, against transformers with its fused attention: the same weights, in turns."""
    from nano_aimv2.hub import TRANSFORMERS, views

    torch.manual_seed(0)
    config = Config.from_preset("base", embed_dim=D, num_blocks=num_blocks, num_heads=num_heads, decoder_blocks=1)
    dtype = getattr(torch, dtype)
    encoder = AIMv2(config).encoder.eval()
    grid = torch.tensor([[16, 16]] * 8)
    pixels = torch.randn(8, 3, 224, 224)
    inputs = patchify(pixels, 14).to(dtype)
    what = f"encoder forward, {D} x {num_blocks}, 8 images of 224 px, {torch.get_num_threads()} threads, {str(dtype)[6:]}"
    try:
        from transformers import Aimv2VisionConfig, Aimv2VisionModel
    except ImportError:
        encoder = encoder.to(dtype)
        with torch.inference_mode():
            print(f"{what}: {1e3 * seconds(lambda: encoder(inputs, grid), pixels.device, repeats):.0f} ms (transformers is not "
                  "installed: nothing to compare with)")
        return
    theirs = Aimv2VisionModel(Aimv2VisionConfig(
        hidden_size=D, intermediate_size=config.mlp_hidden_dim, num_hidden_layers=num_blocks, num_attention_heads=num_heads,
        use_head=False, attn_implementation="sdpa")).eval()
    theirs.load_state_dict(views(encoder, TRANSFORMERS))
    with torch.inference_mode():
        error = float((encoder(patchify(pixels, 14), grid) - theirs(pixels).last_hidden_state).abs().max())
        encoder, theirs, pixels = encoder.to(dtype), theirs.to(dtype), pixels.to(dtype)
        times = [[seconds(call, pixels.device, 1, i == 0) for call in (lambda: encoder(inputs, grid), lambda: theirs(pixels))]
                 for i in range(repeats)]
    ours, other = (median(column) for column in zip(*times, strict=True))
    ratios = [a / b for a, b in times]
    print(f"{what}: {1e3 * ours:.0f} ms, transformers {1e3 * other:.0f} ms, ratio {median(ratios):.2f} "
          f"({min(ratios):.2f} .. {max(ratios):.2f}); largest difference in float32 {error:.1e}")


def apart(function, *args):
    """Run in a process of its own: its peak memory and its allocator are then nobody else's."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


def main(argv):
    if "--help" in argv:
        print(__doc__)
        return
    known = ("--step", "--captions", "--data", "--native", "--index", "--attention", "--encoder")
    modes = [flag for flag in argv if flag in known]
    rest = [flag for flag in argv if flag not in modes]
    bases = [{}] if any(flag.startswith("--preset=") for flag in rest) else [SMALL, MEDIUM]
    configs = [Config.from_flags([*(f"--{k}={v}" for k, v in base.items()), *rest]) for base in bases]
    config = configs[0]
    settings = {"device": config.device, "compile": config.compile}
    if not modes or "--step" in modes:
        for config in configs:
            print(f"training step, encoder {config.embed_dim} x {config.num_blocks}, decoder {config.decoder_dim} x "
                  f"{config.decoder_blocks}, {config.image_size} px, patch {config.patch_size}, batch {config.batch_size}, "
                  f"{torch.get_num_threads()} threads", flush=True)
            on_gpu = distributed.choose_device(config.device).type == "cuda"
            compiled = {"false": ["false"], "true": ["false", "true"], "auto": ["false", "true"][: 1 + on_gpu]}[config.compile]
            for dtype in dict.fromkeys(("bfloat16" if on_gpu else "float32", config.dtype)):
                for compile in compiled:
                    apart(bench_step, config, {**settings, "dtype": dtype, "compile": compile})
        config = configs[0]
    if not modes or "--captions" in modes:
        apart(bench_captions, {**settings, "dtype": "float32"})
    if "--data" in modes:
        bench_data()
    if "--native" in modes:
        apart(bench_native, config, {**settings, "dtype": config.dtype})
    if "--attention" in modes:
        apart(bench_attention, {**settings, "dtype": config.dtype})
    if "--index" in modes:
        bench_index()
    if "--encoder" in modes:
        for size in ((192, 12, 3, 11), (1024, 24, 8, 5)):
            for dtype in ("float32", "bfloat16"):
                apart(bench_encoder, dtype, *size)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"bench: {error}")
