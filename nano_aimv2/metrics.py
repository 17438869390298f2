"""Metrics: what a step costs in matmul FLOPs, how fast it was, and the log that says so.

FLOPs are counted from the matrix multiplications alone, 2 m k n each, attention as if nothing were masked, backward twice
forward: the convention behind "MFU" (model FLOPs over the device's peak).

Lesson: 08.
"""

import json
import time
from pathlib import Path

import torch

# Dense bf16 peaks in FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12, "V100": 125e12}


def peak_flops(device):
    """The device's bf16 peak, or None if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def trunk_flops(tokens, dim, num_blocks, hidden_dim):
    """Forward matmul FLOPs of a trunk over one sequence: qkv, proj, three MLP matrices, scores and their sum of values."""
    return num_blocks * tokens * (2 * (4 * dim**2 + 3 * dim * hidden_dim) + 4 * tokens * dim)


def encoder_flops(config, num_patches):
    """Forward matmul FLOPs of the encoder for one image."""
    embed = 2 * num_patches * config.patch_dim * config.embed_dim
    return embed + trunk_flops(num_patches, config.embed_dim, config.num_blocks, config.mlp_hidden_dim)


def forward_flops(config, num_patches, text_length, image_targets, text_targets):
    """Forward matmul FLOPs of one image-text pair: A patches, T text inputs, and the rows that reach the two heads."""
    D = config.decoder_dim
    decoder = trunk_flops(num_patches + text_length, D, config.decoder_blocks, config.decoder_mlp_hidden_dim)
    heads = 2 * D * (image_targets * (config.patch_dim + D + 2) + text_targets * config.vocab_size)
    return encoder_flops(config, num_patches) + 2 * num_patches * config.embed_dim * D + decoder + heads


def train_flops(config, num_patches, text_length, image_targets, text_targets):
    """Forward and backward of one pair. The backward pass costs twice the forward one, less what nobody needs: gradients
    with respect to the pixels, and those that would leave the statistics head."""
    forward = forward_flops(config, num_patches, text_length, image_targets, text_targets)
    unused = 2 * num_patches * config.patch_dim * config.embed_dim + 2 * config.decoder_dim**2 * image_targets
    return 3 * forward - unused


class Window:
    """What happened since the last report: images, FLOPs and seconds, without pauses for evaluation."""

    def __init__(self, config, device):
        self.config, self.device = config, device
        self.images = self.flops = self.data_s = self.steps = self.places = self.patches = 0
        self.begin = time.perf_counter()

    def add(self, batches, data_s):
        """Note one step of this rank: its micro-batches, and the seconds that it waited for them."""
        for batch in batches:
            size, area, length = *batch.patches.shape[:2], batch.tokens.shape[1]
            self.images += size
            self.places += size * area
            self.patches += int(batch.grid.prod(dim=1).sum())
            self.flops += size * train_flops(self.config, area, length, area / 2, float(batch.num_tokens.sum()) / size)
        self.data_s += data_s
        self.steps += 1

    def rates(self, runtime):
        """step_ms, data_ms, img_per_s of all ranks together; padding (its share of the patches) in native batches; mfu where
        the device's peak is known."""
        seconds = time.perf_counter() - self.begin
        images, flops, places, patches = runtime.sum(self.images, self.flops, self.places, self.patches)
        rates = {"step_ms": 1e3 * seconds / self.steps, "data_ms": 1e3 * self.data_s / self.steps, "img_per_s": images / seconds}
        if self.config.native_area:
            rates["padding"] = 1 - patches / places
        peak = peak_flops(self.device)
        return rates | ({"mfu": flops / seconds / (peak * runtime.world)} if peak else {})


class MetricsLog:
    """`metrics.jsonl`: a row a report. When a run resumes at a step, rows of later steps are dropped first."""

    def __init__(self, path, first_step):
        self.path = Path(path)
        if self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] <= first_step]
            self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))

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
