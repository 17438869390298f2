"""Metrics: what a step costs in matmul FLOPs, how fast it was, and the log that says so.

FLOPs are counted from the matrix multiplications alone, 2 m k n each, attention as if nothing were
masked, backward twice forward: the convention behind "MFU" (model FLOPs over the device's peak).

Lesson: 10.
"""

import contextlib
import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from nano_aimv2.data.batches import capped
from nano_aimv2.files import write_text
from nano_aimv2.patch_sampler import DRAWS, MAX_COEFFICIENTS, NUM_BLOCKS, TIME_FEATURES, WIDTH
from nano_aimv2.training.distributed import ReadLater

# Dense bf16 peaks in FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
              "4090": 165e12, "V100": 125e12}


def peak_flops(device):
    """The device's bf16 peak in FLOP/s, or None if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def trunk_flops(tokens, dim, num_blocks, hidden_dim):
    """Forward matmul FLOPs of a trunk over one sequence: qkv, proj, the three MLP matrices, and in
    attention the scores and the weighted sum of values."""
    return num_blocks * tokens * (2 * (4 * dim**2 + 3 * dim * hidden_dim) + 4 * tokens * dim)


def encoder_flops(config, num_patches):
    """Forward matmul FLOPs of the encoder for one image."""
    embed = 2 * num_patches * config.patch_dim * config.embed_dim
    return embed + trunk_flops(num_patches, config.embed_dim, config.num_blocks,
                               config.mlp_hidden_dim)


def sampler_flops(config):
    """Matmul FLOPs of the patch sampler for one patch: (forward, what its backward pass saves,
    since nothing before it is trained by it)."""
    C = min(MAX_COEFFICIENTS, config.patch_dim)
    seen = config.decoder_dim + C + 6 * config.patch_size + 2
    frequencies = 2 * C * config.patch_dim * 3  # of the patch, back, and of the predicted one
    once = 2 * WIDTH * (2 * seen + WIDTH + C)  # the two networks of what is seen
    draw = 2 * WIDTH * (2 * C + TIME_FEATURES + (3 + 2 * NUM_BLOCKS) * WIDTH)
    unused = frequencies * 2 + 2 * WIDTH * (2 * seen + DRAWS * (C + TIME_FEATURES))
    return frequencies + once + DRAWS * draw, unused


def train_flops(config, num_patches, text_length, image_targets, text_targets):
    """Matmul FLOPs of forward and backward of one image-text pair.

    Args: A patches, T text inputs, and the numbers of rows that reach the two heads.

    The backward pass costs twice the forward pass, minus gradients that nobody needs: those of the
    pixels (with a frozen encoder all of its own and those of its features), and those of the patch
    sampler's inputs.
    """
    D, patch_dim, encoder = config.decoder_dim, config.patch_dim, encoder_flops(config, num_patches)
    connector = 2 * num_patches * config.embed_dim * D
    forward = encoder + connector
    forward += trunk_flops(num_patches + text_length, D, config.decoder_blocks,
                           config.decoder_mlp_hidden_dim)
    forward += 2 * D * (image_targets * patch_dim + text_targets * config.vocab_size)
    sampler, saved = sampler_flops(config)
    forward += image_targets * sampler
    unused = image_targets * saved + (
        2 * num_patches * patch_dim * config.embed_dim if config.encoder_lr else
        2 * encoder + connector)
    return 3 * forward - unused


class MetricsLog:
    """`metrics.jsonl`: one row per report. A resumed run first drops the rows of later steps."""

    def __init__(self, path, first_step):
        self.path = Path(path)
        if self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] <= first_step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, **row):
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path):
    """The rows of a metrics.jsonl as dicts; a last line that was cut by a kill is left out."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class Progress:
    """What a run reports: rows of metrics.jsonl, a progress bar, lines on the screen.

    Every rank has one, because rows are summed over ranks; only rank 0 writes.

    Args: flops: FLOPs of one pair, called like `train_flops`; None: no MFU.
    """

    def __init__(self, config, runtime, first_step, flops=train_flops):
        self.config, self.runtime, self.flops_of_pair = config, runtime, flops
        self.skipped, self.skipped_lines, self.log = 0, [], None
        if runtime.is_main:
            self.log = MetricsLog(Path(config.run_dir) / "metrics.jsonl", first_step)
        self.bar = tqdm(total=config.steps, initial=first_step, unit="step",
                        disable=not (runtime.is_main and sys.stderr.isatty()))
        self.restart_clock()

    def restart_clock(self):
        """Count images, FLOPs and seconds from here, for the next row."""
        self.images = self.flops = self.places = self.patches = self.steps = self.data_s = 0
        self.begin = time.perf_counter()

    @contextlib.contextmanager
    def paused(self):
        """The time of this block is not the steps': evaluation, saving."""
        begin = time.perf_counter()
        yield
        self.begin += time.perf_counter() - begin

    def wait_for(self, batches):
        """The micro-batches of a generator as a list; the time that they take is `data_ms`."""
        begin = time.perf_counter()
        batches = list(batches)
        self.data_s += time.perf_counter() - begin
        return batches

    def evaluation(self, step, row):
        """Report held-out results: a row {name: number}."""
        say(self.runtime, f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items()))
        if self.log:
            self.log.write(step=step, **row)

    def step(self, step, batches, lr, grad_norm, losses):
        """Report a training step; every `log_every` steps as a row.

        Args: batches: this rank's micro-batches; grad_norm: before clipping; losses: a function
            that returns {"loss": .., ..}, means over all ranks; called only for a row.
        """
        config, done = self.config, step + 1
        for batch in batches:
            self.count(batch)
            self.skipped_lines += [f"step {step}: skipped {line}" for line in batch.skipped]
        self.steps += 1
        self.bar.update()
        if done % config.log_every and done != config.steps:
            return
        for line in capped(self.skipped_lines):
            tqdm.write(line)  # by the rank that read it
        self.skipped_lines = []
        row = dict(step=done, **losses(), lr=lr, grad_norm=float(grad_norm), **self.rates())
        if self.log:
            self.log.write(**row)
            self.show(row)
        self.restart_clock()

    def count(self, batch):
        """Add a micro-batch of this rank to what the next row reports."""
        size, area, length = *batch.patches.shape[:2], batch.tokens.shape[1]
        self.images += size
        self.places += size * area
        self.patches += int(batch.grid.prod(dim=1).sum())
        self.skipped += len(batch.skipped)
        if self.flops_of_pair:
            targets = area / 2, float(batch.num_tokens.sum()) / size
            self.flops += size * self.flops_of_pair(self.config, area, length, *targets)

    def rates(self):
        """step_ms, data_ms; img_per_s and skipped samples of all ranks; padding (share of the
        patches) in native batches; mfu where the device's peak is known."""
        seconds = time.perf_counter() - self.begin
        images, flops, places, patches, skipped = self.runtime.sum(
            self.images, self.flops, self.places, self.patches, self.skipped)
        rates = {"skipped": int(skipped), "step_ms": 1e3 * seconds / self.steps,
                 "data_ms": 1e3 * self.data_s / self.steps, "img_per_s": images / seconds}
        if self.config.native_area:
            rates["padding"] = 1 - patches / places
        peak = peak_flops(self.runtime.device)
        if peak and flops:
            rates["mfu"] = flops / seconds / (peak * self.runtime.world)
        return rates

    def show(self, row):
        """A row on the screen: in the bar, or without a terminal every tenth row as a line."""
        names = [name for name in row if name.startswith("loss_")] or ["loss"]
        line = ", ".join(f"{name.removeprefix('loss_')} {row[name]:.3f}" for name in names)
        line += f", {row['img_per_s']:.0f} images/s"
        self.bar.set_postfix_str(line)
        if self.bar.disable and row["step"] % (10 * self.config.log_every) == 0:
            steps = self.config.steps
            minutes = (steps - row["step"]) * row["step_ms"] / 6e4
            print(f"step {row['step']} of {steps}: {line}, {minutes:.1f} min left", flush=True)

    def close(self):
        self.bar.close()


def mean_losses(config, sums, image_count, text_count):
    """{loss, loss_text, loss_image, loss_sampler} from the sums and counts of all ranks."""
    text = sums[0] / text_count
    image, sampler = (total / max(image_count, 1) for total in sums[1:])
    return dict(loss=config.text_weight * text + config.alpha * image, loss_text=text,
                loss_image=image, loss_sampler=sampler)


def say(runtime, *lines):
    """Print lines once, whatever the number of ranks."""
    if runtime.is_main:
        for line in lines:
            tqdm.write(line)


class FiniteCheck:
    """Ends a run whose losses or gradient norm are not finite.

    The numbers of a step are read one step later, so that no GPU waits for them; `read` reads them
    now (before a checkpoint, so that none is spoilt).
    """

    def __init__(self, data, scaler=None):
        self.data, self.scaler, self.pending = data, scaler, None

    def add(self, step, **numbers):
        """Check the step before this one, and keep this one's numbers, tensors f[] by name."""
        self.read()
        stacked = torch.stack([number.detach().float().reshape(()) for number in numbers.values()])
        self.pending = step, list(numbers), ReadLater(stacked)

    def read(self):
        """Raises: FloatingPointError that names the step, the term and this rank's samples."""
        if self.pending is None:
            return
        (step, names, report), self.pending = self.pending, None
        numbers = dict(zip(names, report.read(), strict=True))
        if self.scaler is not None and self.scaler.is_enabled():
            del numbers["gradient_norm"]  # float16: the scaler skips such a step
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        if not bad:
            return
        parts = self.data.config.grad_accum
        samples = [name for part in range(parts) for name in self.data.names(step * parts + part)]
        more = f" and {len(samples) - 16} more" if len(samples) > 16 else ""
        values = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        message = (f"step {step}: not finite: {', '.join(bad)} ({values}, sums of rank "
                   f"{self.data.rank})").replace("_", " ")
        raise FloatingPointError(
            f"{message}; its samples: {', '.join(samples[:16])}{more}. Earlier checkpoints are "
            f"good: lower --lr (now {self.data.config.lr}), or look at these samples")
