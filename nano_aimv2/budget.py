"""Budget: what a run will cost, before it starts.

    python train.py --preset=3b --dry_run                                   # memory a rank for 1 to 512 ranks
    python train.py --preset=3b --dry_run --world=64 --parallel=fsdp --img_per_s=9000

Parameters are counted on torch's meta device, which gives tensors shapes and no memory. FLOPs are those of metrics.py.
Memory is a sum that one can follow: float32 weights, gradients and Adam's two moments, divided by the ranks that share
them; and what the forward pass keeps for the backward pass, which is divided by grad_accum.

Lesson: 08.
"""

import torch

from nano_aimv2.config import Config
from nano_aimv2.metrics import train_flops
from nano_aimv2.model import AIMv2

WORLDS = (1, 8, 16, 32, 64, 128, 256, 512)
MODES = ("ddp", "fsdp", "hybrid")
GPUS_A_NODE = 8
H100_PEAK = 989e12  # bf16 FLOP/s, dense
CARD = 80e9 * 0.9  # bytes of an 80 GB card that a plan may use
GIB = 2**30


def block_bytes(tokens, dim, hidden_dim, matmul_bytes, recompute):
    """Bytes that autograd keeps of one block for one sequence.

    Float32: two inputs of the norms. As wide as the matmuls: two normed inputs, q, k, v and the attention's output (10 D
    in all with its float32 log-sums), and in the MLP fc1, fc3, silu(fc1) and their product. Recomputed: one input.
    """
    if recompute:
        return 4 * tokens * dim
    return tokens * (2 * 4 * dim + matmul_bytes * (6 * dim + 4 * hidden_dim))


def activation_bytes(config, images, matmul_bytes=2):
    """Bytes kept of `images` image-text pairs at full length, both trunks and the heads' float32 logits."""
    A, T = (config.image_size // config.patch_size) ** 2, config.max_tokens
    encoder = A, config.embed_dim, config.mlp_hidden_dim
    decoder = A + T, config.decoder_dim, config.decoder_mlp_hidden_dim
    kept = sum(blocks * block_bytes(*shape, matmul_bytes, config.recompute)
               for blocks, shape in ((config.num_blocks, encoder), (config.decoder_blocks, decoder)))
    if config.recompute:  # one block at a time is whole again
        kept += max(block_bytes(*shape, matmul_bytes, False) for shape in (encoder, decoder))
    logits = (4 + 4 + matmul_bytes) * (T * config.vocab_size + A // 2 * config.patch_dim)  # float32, its gradient, matmul's
    return images * (kept + logits)


def memory_per_rank(config, parameters, largest_block, world, parallel, matmul_bytes=2):
    """(bytes of weights, gradients and moments; bytes of activations) on each of `world` ranks.

    Args: parameters: of the model; largest_block: parameters of its largest block, which FSDP gathers whole, two at a time.
    """
    shared = {"none": 1, "ddp": 1, "fsdp": world, "hybrid": min(world, GPUS_A_NODE)}[parallel]
    state = 16 * parameters / shared
    if shared > 1:
        state += 2 * largest_block * (matmul_bytes + 4)  # gathered weights, and gradients before they are scattered
        state += 4 * parameters if config.grad_accum > 1 else 0  # whole gradients until the last micro-batch
    else:
        state += matmul_bytes * parameters if matmul_bytes < 4 else 0  # autocast's copies of the weights
    images = -(-config.batch_size // (world * config.grad_accum))
    return state, activation_bytes(config, images, matmul_bytes)


def least_accumulation(config, state, world, matmul_bytes=2):
    """The least grad_accum with which a rank's share fits a card of 80 GB beside `state` bytes, or None."""
    images = int((CARD - state) // activation_bytes(config, 1, matmul_bytes))
    return -(-config.batch_size // (world * images)) if images > 0 else None


def report(config, world=None, img_per_s=None, matmul_bytes=2):
    """Lines that say what the run will cost. Nothing of the model's size is allocated."""
    with torch.device("meta"):
        model = AIMv2(config)
    parameters, encoder = (sum(p.numel() for p in m.parameters()) for m in (model, model.encoder))
    blocks = [*model.encoder.trunk.blocks, *model.decoder.trunk.blocks]
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    A, T = (config.image_size // config.patch_size) ** 2, config.max_tokens
    flops = train_flops(config, A, T, A / 2, T)
    images = config.steps * config.batch_size
    peak_rate = H100_PEAK / flops
    lines = [f"{config.preset}: {parameters / 1e6:,.1f}M parameters, {encoder / 1e6:,.1f}M of them the encoder",
             f"{flops / 1e9:,.1f} GFLOP an image and step ({A} patches, {T} tokens)",
             f"{config.steps:,} steps of {config.batch_size:,} images = {images / 1e6:,.1f}M images, {flops * images:.2e} FLOP",
             "", f"GiB a rank, computed and not measured: bf16 matmuls, recompute {str(config.recompute).lower()}, grad_accum "
             f"{config.grad_accum};", "last column: the least grad_accum that fits a card of 80 GB with a tenth left free",
             f"{'ranks':>7} {'mode':>7} {'images':>7} {'state':>8} {'kept':>8} {'sum':>8} {'80 GB':>6}"]
    for ranks in [world] if world else WORLDS:
        if config.batch_size < ranks * config.grad_accum:
            lines.append(f"{ranks:7}         batch_size={config.batch_size} is less than ranks x grad_accum={config.grad_accum}")
            continue
        modes = ("none",) if ranks == 1 else MODES if config.parallel in ("auto", "none") else (config.parallel,)
        for mode in modes:
            state, kept = memory_per_rank(config, parameters, largest, ranks, mode, matmul_bytes)
            share = -(-config.batch_size // (ranks * config.grad_accum))
            least = least_accumulation(config, state, ranks, matmul_bytes) or "none"
            sizes = " ".join(f"{size / GIB:8.1f}" for size in (state, kept, state + kept))
            lines.append(f"{ranks:7} {mode:>7} {share:7} {sizes} {least:>6}")
    lines.append("")
    if img_per_s:
        lines.append(f"at {img_per_s:,.0f} images/s: {images / img_per_s / 86400:,.1f} days")
    for mfu in (0.4, 0.5):
        ranks = world or 64
        rate = ranks * mfu * peak_rate
        lines.append(f"projection, {ranks} x H100 at {mfu:.0%} of {H100_PEAK / 1e12:.0f} TFLOP/s: {rate:,.0f} images/s, "
                     f"{images / rate / 86400:,.1f} days")
    return lines


def main(argv):
    """`--dry_run` of train.py: print the report for the run's own flags, `--world=RANKS` and `--img_per_s=RATE`.

    Raises: ValueError on a flag that is none, or a number that is not above 0.
    """
    own = {"world": int, "img_per_s": float}
    given, rest = {}, []
    for flag in argv:
        name, _, value = flag.removeprefix("--").partition("=")
        if name in own:
            try:
                given[name] = own[name](value)
                assert given[name] > 0
            except (ValueError, AssertionError):
                raise ValueError(f"--{name}={value} must be a number above 0") from None
        elif flag not in ("--dry_run", "--dry_run=true"):
            rest.append(flag)
    print("\n".join(report(Config.from_flags(rest), **given)))
