"""Budget: what a run will take, before it starts: memory per rank, FLOPs and days.

    python train.py --preset=3b --dry_run                       # for 1 to 512 ranks
    python train.py --preset=3b --dry_run --world=64 --parallel=fsdp --img_per_s=9000

Parameters are counted on torch's meta device, which gives tensors a shape and no memory. FLOPs are
those of metrics.py. Memory is a sum of two parts. The state: float32 weights, gradients and Adam's
two moments, divided by the ranks that share them. The activations: what the forward pass keeps for
the backward pass, divided by grad_accum.

Lesson: 10.
"""

from dataclasses import dataclass

import torch

from nano_aimv2.model import AIMv2
from nano_aimv2.training.metrics import PEAK_FLOPS, train_flops

WORLDS = (1, 8, 16, 32, 64, 128, 256, 512)
MODES = ("ddp", "fsdp", "hybrid")
GPUS_PER_NODE = 8
MATMUL_BYTES = 2  # bf16
CARD_BYTES = 80e9 * 0.9  # of an 80 GB card, what a plan may use
GIB = 2**30
DAY = 86400  # seconds


def block_bytes(tokens, dim, hidden_dim, matmul_bytes, recompute):
    """Bytes that autograd keeps of one block for one sequence, with the fused kernels of a GPU.

    In float32: the inputs of the two norms. In the precision of the matmuls: two normalised inputs,
    q, k, v and the attention's output (6 D in all), and in the MLP fc1, fc3, silu(fc1) and their
    product (4 hidden). With recompute: the block's input only.
    """
    if recompute:
        return 4 * tokens * dim
    return tokens * (2 * 4 * dim + matmul_bytes * (6 * dim + 4 * hidden_dim))


def activation_bytes(config, images):
    """Bytes kept of `images` image-text pairs of full length: both trunks and the heads' logits."""
    A, T = (config.image_size // config.patch_size) ** 2, config.max_tokens
    encoder = A, config.embed_dim, config.mlp_hidden_dim
    decoder = A + T, config.decoder_dim, config.decoder_mlp_hidden_dim
    kept = 0
    if config.encoder_lr:  # a frozen encoder keeps nothing
        kept += config.num_blocks * block_bytes(*encoder, MATMUL_BYTES, config.recompute)
    kept += config.decoder_blocks * block_bytes(*decoder, MATMUL_BYTES, config.recompute)
    kept += MATMUL_BYTES * A**2  # the bias of the encoder's mask, once for all blocks
    if config.recompute:  # the block that is being recomputed is kept whole
        kept += max(block_bytes(*shape, MATMUL_BYTES, False) for shape in (encoder, decoder))
    num_logits = T * config.vocab_size + A // 2 * config.patch_dim
    per_logit = 4 + 4 + MATMUL_BYTES  # in float32, its gradient, and as the matmul wrote it
    return images * (kept + per_logit * num_logits)


def memory_per_rank(config, parameters, largest_block, world, parallel, frozen=0):
    """(bytes of the state, bytes of the activations) on each of `world` ranks.

    Args:
        parameters: how many the model has; frozen: how many of them are not trained.
        largest_block: how many its largest block has; FSDP gathers two whole blocks at a time.
    """
    shards = {"none": 1, "ddp": 1, "fsdp": world, "hybrid": min(world, GPUS_PER_NODE)}[parallel]
    state = (16 * parameters - 12 * frozen) / shards  # float32 weights, gradients, two moments
    if shards > 1:
        # Gathered weights, and gradients before they are scattered
        state += 2 * largest_block * (MATMUL_BYTES + 4)
        if config.grad_accum > 1:
            state += 4 * (parameters - frozen)  # whole gradients until the last micro-batch
    else:
        state += MATMUL_BYTES * parameters  # autocast's copies of the weights
    return state, activation_bytes(config, images_per_rank(config, world))


def images_per_rank(config, world):
    """Images of one micro-batch on one rank, at most."""
    return -(-config.batch_size // (world * config.grad_accum))


def least_accumulation(config, state, world):
    """The smallest grad_accum at which a rank fits on an 80 GB card beside its `state`, or None."""
    images = int((CARD_BYTES - state) // activation_bytes(config, 1))
    return -(-config.batch_size // (world * images)) if images > 0 else None


def count_parameters(config):
    """(parameters of the model, of its encoder, of its largest block), without allocating any."""
    with torch.device("meta"):
        model = AIMv2(config)
    blocks = [*model.encoder.trunk.blocks, *model.decoder.trunk.blocks]
    total, encoder, *of_blocks = (sum(p.numel() for p in part.parameters())
                                  for part in (model, model.encoder, *blocks))
    return total, encoder, max(of_blocks)


def report(config, world=None, img_per_s=None):
    """What the run will take, as lines of text.

    Args: world: number of ranks, None for each of WORLDS; img_per_s: measured, for the days.
    """
    parameters, encoder, largest_block = count_parameters(config)
    A, T = (config.image_size // config.patch_size) ** 2, config.max_tokens
    flops = train_flops(config, A, T, A / 2, T)  # per image
    images = config.steps * config.batch_size
    return [
        f"{config.preset}: {parameters / 1e6:,.1f}M parameters, {encoder / 1e6:,.1f}M of them the "
        "encoder",
        f"{flops / 1e9:,.1f} GFLOP per image and step ({A} patches, {T} tokens)",
        f"{config.steps:,} steps of {config.batch_size:,} images = {images / 1e6:,.1f}M images, "
        f"{flops * images:.2e} FLOP",
        "",
        *memory_table(config, parameters, largest_block, world,
                      0 if config.encoder_lr else encoder),
        "",
        *durations(flops, images, world or 64, img_per_s),
    ]


def memory_table(config, parameters, largest_block, world, frozen):
    """Lines of the table of memory per rank, for `world` ranks or for each of WORLDS; `frozen`: how
    many parameters are not trained."""
    lines = [
        "GiB per rank, computed and not measured: bf16 matmuls, recompute "
        f"{str(config.recompute).lower()}, grad_accum {config.grad_accum};",
        "last column: the smallest grad_accum that fits an 80 GB card with a tenth of it left free",
        f"{'ranks':>7} {'mode':>7} {'images':>7} {'state':>8} {'kept':>8} {'sum':>8} {'80 GB':>6}",
    ]
    modes = MODES if config.parallel in ("auto", "none") else (config.parallel,)
    for ranks in [world] if world else WORLDS:
        if config.batch_size < ranks * config.grad_accum:
            lines.append(f"{ranks:7}         batch_size={config.batch_size} is less than ranks x "
                         f"grad_accum={config.grad_accum}")
            continue
        for mode in modes if ranks > 1 else ("none",):
            state, kept = memory_per_rank(config, parameters, largest_block, ranks, mode, frozen)
            sizes = " ".join(f"{size / GIB:8.1f}" for size in (state, kept, state + kept))
            least = least_accumulation(config, state, ranks) or "none"
            images = images_per_rank(config, ranks)
            lines.append(f"{ranks:7} {mode:>7} {images:7} {sizes} {least:>6}")
    return lines


def durations(flops, images, ranks, img_per_s):
    """Lines that say how many days `images` images of `flops` FLOP each take."""
    lines = []
    if img_per_s:
        lines.append(f"at {img_per_s:,.0f} images/s: {images / img_per_s / DAY:,.1f} days")
    peak = PEAK_FLOPS["H100"]
    for mfu in (0.4, 0.5):
        rate = ranks * mfu * peak / flops
        lines.append(f"projection, {ranks} x H100 at {mfu:.0%} of {peak / 1e12:.0f} TFLOP/s: "
                     f"{rate:,.0f} images/s, {images / rate / DAY:,.1f} days")
    return lines


@dataclass
class Plan:
    """Flags of train.py that ask for the report instead of a run."""

    dry_run: bool = False  # print what the run will take and train nothing
    world: int = 0  # with --dry_run: number of ranks; 0: 1 to 512
    img_per_s: float = 0.0  # with --dry_run: measured images per second, for the days


def main(config, dry_run=False, **given):
    """Print the report; `given` holds the other flags of `Plan` that were set on the command line.

    Raises: ValueError if one of them is not above 0, or --dry_run is missing.
    """
    for name, value in given.items():
        if not value > 0:
            raise ValueError(f"--{name}={value} must be a number above 0")
    if not dry_run:
        raise ValueError("--world and --img_per_s need --dry_run: add it, or leave all three out "
                         "to train")
    print("\n".join(report(config, **given)))
