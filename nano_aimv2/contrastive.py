"""Contrastive: CLIP, the baseline that AIMv2 is compared with. Which caption of the batch belongs to which picture?

Two towers give one vector of unit length each. In a batch of B pairs, the scale (1 / temperature) times all B x B dot
products are logits, and every picture must find its caption among the B, every caption its picture:

    B = 4, captions "dog" "cat" "dog" "car"        x  right answer, one a row and column
       text      0  1  2  3                        .  negative
    image 0      x  .  -  .                        -  the same caption again: left out, neither right nor wrong
          1      .  x  .  .
          2      -  .  x  .                        loss = (cross-entropy of the rows + of the columns) / 2
          3      .  .  .  x

Pairs whose captions are equal, token for token, are no negatives of each other; with captions all different this is CLIP's
loss. The encoder is AIMv2's, bidirectional; the text tower has the shape of AIMv2's decoder; data, optimizer and schedule
are train.py's, so step k sees the very samples that AIMv2 sees.

    python -m nano_aimv2.contrastive --preset=toy --run=runs/toy-clip     # train.py's flags; --help lists them
    model, config, tokenizer = load_model("runs/toy-clip", kind=CLIP)     # model.encoder is what you keep

One process, one batch: other captions are all there is to learn from, and they must be in one place. There are no checkpoints,
as runs take minutes: an interrupted run starts again from step 0, a finished one is left as it is. The run folder (without
--run: runs/PRESET-clip) holds config.json, the tokenizer, metrics.jsonl and model.safetensors. The data must be there;
train.py draws the toy scenes.

Way: pictures, captions -> **two vectors** -> loss. Source: CLIP (arXiv 2103.00020); AIMv2's paper, Table 9b.
"""

import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nano_aimv2 import checkpoint, distributed
from nano_aimv2.config import Config
from nano_aimv2.data import TrainingData, describe
from nano_aimv2.encoder import Encoder
from nano_aimv2.evaluate import held_out_sets
from nano_aimv2.layers import Trunk, init_linear_layers
from nano_aimv2.loader import make_loader
from nano_aimv2.losses import text_targets
from nano_aimv2.metrics import MetricsLog
from nano_aimv2.optim import lr_at, make_optimizer
from nano_aimv2.patchify import pixels_to_float
from nano_aimv2.tokenizer import tokenizer_of

TEMPERATURE = 0.07  # at the start; learned
MAX_SCALE = 100.0


def negatives_and_own(tokens, num_tokens):
    """Which texts a picture is compared with: tokens i64[B, T], num_tokens i64[B] -> bool[B, B], symmetric.

    True on the diagonal and wherever two captions differ before their padding.
    """
    _, caption = text_targets(tokens, num_tokens).unique(dim=0, return_inverse=True)  # i64[B]: equal number, equal caption
    return (caption[:, None] != caption) | torch.eye(len(caption), dtype=torch.bool, device=caption.device)


def contrastive_loss(images, texts, scale, is_compared):
    """Symmetric cross-entropy in nats.

    Args: images, texts: f32[B, D] of unit length, a pair a row; scale: number above 0; is_compared: bool[B, B] as above.
    Returns: f32[]; ln B where nothing is known and all captions differ.
    """
    logits = (scale * images @ texts.T).masked_fill(~is_compared, float("-inf"))  # [B, B], rows: images
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class CLIP(nn.Module):
    """`CLIP(config)`; `.encoder` is what you keep. Vectors are as wide as the text tower, `decoder_dim`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.decoder_dim
        self.encoder = Encoder(config)
        self.token_embed = nn.Embedding(config.vocab_size, D)
        self.text_positions = nn.Parameter(torch.empty(config.max_tokens, D))
        self.text_trunk = Trunk(D, config.decoder_blocks, config.decoder_heads, config.decoder_mlp_hidden_dim, config.recompute)
        self.image_proj = nn.Linear(config.embed_dim, D, bias=False)
        self.text_proj = nn.Linear(D, D, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(TEMPERATURE)))
        init_linear_layers(self)
        nn.init.normal_(self.text_positions, std=0.01)  # tables as in AIMv2
        nn.init.normal_(self.token_embed.weight, std=0.02)

    def image_vectors(self, patches, grid):
        """patches u8[B, A, P], grid i64[B, 2] -> f32[B, D] of unit length.

        Pooled by the mean over valid patches: unlike an attending query it has nothing to learn, so all must be in the features.
        """
        num_patches = grid.prod(dim=1)[:, None]  # n, [B, 1]
        features = self.encoder(pixels_to_float(patches, self.config.pixel_mean, self.config.pixel_std), grid)  # [B, A, De]
        is_padding = torch.arange(features.shape[1], device=grid.device) >= num_patches  # [B, A]
        pooled = features.float().masked_fill(is_padding[..., None], 0).sum(dim=1) / num_patches
        return F.normalize(self.image_proj(pooled).float(), dim=-1)

    def text_vectors(self, tokens, num_tokens):
        """tokens i64[B, T], num_tokens i64[B], EOS included -> f32[B, D] of unit length: the state at EOS, which has read all.

        (A caption that was cut has no EOS: the state at its last token.)
        """
        tokens = tokens[:, : self.config.max_tokens]  # T is rounded up; what is beyond is padding
        x = self.text_trunk(self.token_embed(tokens) + self.text_positions[: tokens.shape[1]], causal=True)  # f[B, T, D]
        last = x[torch.arange(len(x), device=x.device), num_tokens - 1]
        return F.normalize(self.text_proj(last).float(), dim=-1)

    def forward(self, batch):
        """Batch -> (image vectors, text vectors), f32[B, D] each."""
        return self.image_vectors(batch.patches, batch.grid), self.text_vectors(batch.tokens, batch.num_tokens)


def train_step(model, optimizer, batch, lr, clip_grad, runtime):
    """One step on a batch that lies on the device. Returns: (loss, gradient norm before clipping), tensors of the device."""
    with runtime.autocast():
        images, texts = model(batch)
    loss = contrastive_loss(images, texts, model.log_scale.exp(), negatives_and_own(batch.tokens, batch.num_tokens))
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        model.log_scale.clamp_(max=math.log(MAX_SCALE))
    return loss.detach(), grad_norm


@torch.no_grad()
def evaluate(model, evaluation, runtime):
    """Held-out loss, and how often a picture finds its caption (or one of the same words) among those of its batch.

    Both depend on how many there are to choose from, so a last batch that is smaller is left out.
    Returns: {"val_loss", "val_retrieval" (top-1), "val_batch" (pairs in each batch)}.
    """
    size = len(evaluation.batches[0].patches)
    losses, right = [], []
    for batch in (batch.to(runtime.device) for batch in evaluation.batches if len(batch.patches) == size):
        with runtime.autocast():
            images, texts = model(batch)
        is_compared = negatives_and_own(batch.tokens, batch.num_tokens)
        losses.append(contrastive_loss(images, texts, model.log_scale.exp(), is_compared))
        best = (images @ texts.T).masked_fill(~is_compared, float("-inf")).argmax(dim=1)
        right.append(best == torch.arange(size, device=best.device))
    return {"val_loss": float(torch.stack(losses).mean()), "val_retrieval": float(torch.cat(right).float().mean()),
            "val_batch": size}


def read_config(argv):
    """train.py's flags -> Config. Raises ValueError on what this file does not do."""
    config = Config.from_flags(argv)
    if not any(flag.startswith("--run=") for flag in argv):
        config = replace(config, run=f"{config.run}-clip")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        raise ValueError(f"{world} processes: the contrastive baseline trains in one, start it without torchrun")
    if config.grad_accum > 1:
        raise ValueError(f"grad_accum={config.grad_accum}: a contrastive loss needs its whole batch at once, use --grad_accum=1")
    if config.batch_size < 2:
        raise ValueError(f"batch_size={config.batch_size}: a pair needs another to be told from, use at least --batch_size=2")
    if config.init:
        raise ValueError(f"init={config.init!r}: the contrastive baseline starts from random weights, leave --init out")
    return config


def main(argv):
    # Settings
    config = read_config(argv)
    folder = Path(config.run)
    if (folder / "checkpoints").exists():
        raise ValueError(f"run folder {folder} holds a run of train.py: choose another --run")
    runtime = distributed.start(config.device, config.dtype, "none", config.compile)
    if runtime.dtype == torch.float16:
        raise ValueError("dtype=float16 would need a loss scaler, which this file does not have: use --dtype=float32")
    if (folder / "model.safetensors").exists():
        checkpoint.claim_run(config)  # a ValueError if its settings are others
        checkpoint.load_model(folder, kind=CLIP)  # a ValueError if it holds something else
        print(f"{folder} is finished: nothing to train; delete the folder to start again")
        return

    # Data, run folder, model, optimizer
    tokenizer = tokenizer_of(config)
    data = TrainingData(config, tokenizer)
    held_out = held_out_sets(config, tokenizer, config.eval_images)
    checkpoint.claim_run(config)
    tokenizer.save(folder)
    torch.manual_seed(config.seed)
    model = distributed.parallelize(CLIP(config), runtime)
    optimizer = make_optimizer(model, config.lr, config.weight_decay, (config.beta_1, config.beta_2))
    print(*describe(data), *(f"left out: {line}" for e in held_out.values() for line in e.skipped), sep="\n")
    size = sum(p.numel() for p in model.parameters())
    print(f"{folder}: {size:,} parameters on {runtime.device.type}, step 0 of {config.steps}")

    # The loop
    log = MetricsLog(folder / "metrics.jsonl", first_step=0)
    begin, images, steps = time.perf_counter(), 0, 0  # since the last row, pauses for evaluation left out
    for step, batch in enumerate(make_loader(data, 0, config.num_workers, pin=runtime.device.type == "cuda")):
        for line in batch.skipped:
            print(f"step {step}: skipped {line}")
        lr = lr_at(step, config.lr, config.min_lr, config.warmup_steps, config.steps)
        loss, grad_norm = train_step(model, optimizer, batch.to(runtime.device), lr, config.clip_grad, runtime)
        images, steps = images + len(batch.patches), steps + 1
        done, last = step + 1, step + 1 == config.steps
        if done % config.log_every == 0 or last:
            row = dict(step=done, loss=float(loss), lr=lr, grad_norm=float(grad_norm))
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                raise FloatingPointError(f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}: lower --lr (now "
                                         f"{config.lr}), or look at the samples: {', '.join(data.names(step)[:16])}")
            seconds = time.perf_counter() - begin
            log.write(**row, step_ms=1e3 * seconds / steps, img_per_s=images / seconds)
            if done % (10 * config.log_every) == 0:
                print(f"step {done} of {config.steps}: loss {row['loss']:.3f}, {images / seconds:.0f} images/s")
            begin, images, steps = time.perf_counter(), 0, 0
        if held_out and (last or (config.eval_every and done % config.eval_every == 0)):
            pause = time.perf_counter()
            row = {name + ("" if split == "val" else f"_{split}"): value for split, evaluation in held_out.items()
                   for name, value in evaluate(model, evaluation, runtime).items()}
            log.write(step=done, **row)
            print(f"step {done}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items()))
            begin += time.perf_counter() - pause
    checkpoint.save_model(folder, model, runtime)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"contrastive: {type(error).__name__}: {error}")
