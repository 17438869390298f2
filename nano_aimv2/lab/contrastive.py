"""Contrastive: CLIP, the baseline for AIMv2. Which caption of the batch belongs to which image?

    python -m nano_aimv2.lab.contrastive --preset=toy --run_dir=runs/toy-clip
    python -m nano_aimv2.lab.contrastive --init=runs/toy --lock=true --run_dir=runs/toy-lit
    model, config, tokenizer = load_model("runs/toy-clip", kind=CLIP)

Two towers turn an image and a caption into one vector of unit length each. In a batch of B pairs,
all B x B dot products times a scale (1 / temperature) are logits. Each image must find its caption
among the B captions, and each caption its image among the B images:

    B = 4, captions "dog" "cat" "dog" "car"    x  right answer, one per row and column
       text      0  1  2  3                    .  negative
    image 0      x  .  -  .                    -  the same caption again: left out of the loss
          1      .  x  .  .
          2      -  .  x  .                    loss = (cross-entropy of rows + of columns) / 2
          3      .  .  .  x

Pairs with equal captions, token for token, are not negatives of each other. With captions that all
differ this is CLIP's loss. The encoder is AIMv2's, bidirectional; the text tower has the shape of
AIMv2's decoder. Flags, data, optimizer and schedule are train.py's, so step k sees the same samples
as there.

With --lock=true it is LiT: the encoder is that of --init (a run, or published weights) and stays as
it is. The text tower learns to name what a frozen encoder sees, and one learned query pools its
features by attention, as in Apple's `-lit` model. search.py uses the result.

The loss needs its whole batch in one place: one process, no micro-batches. Runs take minutes, so
there are no checkpoints: an interrupted run starts again from step 0, and a finished one is left as
it is. The run folder (without --run_dir: runs/PRESET-clip, -lit) holds config.json, the tokenizer,
metrics.jsonl and model.safetensors. The data must exist already; train.py draws the toy scenes.

Pipeline: images, captions -> **two vectors** -> loss. Source: CLIP (arXiv 2103.00020); LiT (arXiv
2111.07991); AIMv2 paper, Table 9b.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nano_aimv2.config import Config, presets_text
from nano_aimv2.data.batches import TrainingData, describe, make_loader
from nano_aimv2.data.tokenizer import tokenizer_of
from nano_aimv2.encoder import Encoder
from nano_aimv2.flags import read_flags, run_command
from nano_aimv2.layers import Trunk, attend, init_linear_layers, mask_to_bias
from nano_aimv2.losses import text_targets
from nano_aimv2.training import checkpoint, distributed
from nano_aimv2.training.evaluate import describe_held_out, held_out_sets
from nano_aimv2.training.init import adopt_init, describe_init, load_init
from nano_aimv2.training.metrics import FiniteCheck, Progress
from nano_aimv2.training.optim import lr_at, make_optimizer, set_lr

TEMPERATURE = 0.07  # at the start; it is learned
MAX_SCALE = 100.0


@dataclass
class Options:
    lock: bool = False  # LiT: keep the encoder of --init as it is, and train what reads it


def comparison_mask(tokens, num_tokens):
    """Which texts each image is compared with: its own, and all whose captions differ from it.

    Args: tokens: i64[B, T]; num_tokens: i64[B], ids that count; what follows them is ignored.
    Returns: bool[B, B], symmetric, True on the diagonal.
    """
    tokens = text_targets(tokens, num_tokens)  # equal captions are equal rows
    _, caption = tokens.unique(dim=0, return_inverse=True)  # i64[B]: equal number, equal caption
    is_own = torch.eye(len(caption), dtype=torch.bool, device=caption.device)
    return (caption[:, None] != caption) | is_own


def contrastive_loss(images, texts, scale, is_compared):
    """Symmetric cross-entropy in nats.

    Args:
        images, texts: f32[B, D] of unit length, one pair per row.
        scale: a number above 0.
        is_compared: bool[B, B], of `comparison_mask`.
    Returns: f32[]; ln B for an untrained model, if all captions differ.
    """
    logits = scale * images @ texts.T  # [B, B], rows: images
    logits = logits.masked_fill(~is_compared, float("-inf"))
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def valid_patches(grid, A):
    """Grids i64[B, 2] -> bool[B, A]: False where a row of patches is padding."""
    return torch.arange(A, device=grid.device) < grid.prod(dim=1)[:, None]


def mean_of_valid(features, is_valid):
    """Features f[B, A, D], is_valid bool[B, A] -> their mean f[B, D] over the valid patches."""
    total = features.masked_fill(~is_valid[..., None], 0).sum(dim=1)
    return total / is_valid.sum(dim=1, keepdim=True)


class AttentionPool(nn.Module):
    """One learned query attends to the valid patches. Source: the head of Apple's `-lit` model,
    whose output projection is here `CLIP.image_proj`."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(0.02 * torch.randn(dim))
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, features, is_valid):
        """features f[B, A, D], is_valid bool[B, A] -> f[B, D]."""
        k, v = self.k_proj(features), self.v_proj(features)
        q = self.query.to(k.dtype).expand(len(k), 1, -1)
        q, k, v = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        bias = mask_to_bias(is_valid[:, None, None], k.dtype)  # [B, 1, 1, A]
        return attend(q, k, v, bias, causal=False).flatten(1)  # [B, heads, 1, hd] -> [B, D]


class CLIP(nn.Module):
    """`CLIP(config)`; `.encoder` is what you keep. The vectors have D = `decoder_dim` values.

    With `encoder_lr` = 0 it is LiT: the encoder is frozen, and attention pools its features.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.decoder_dim
        self.encoder = Encoder(config)
        self.token_embed = nn.Embedding(config.vocab_size, D)
        self.text_positions = nn.Parameter(torch.empty(config.max_tokens, D))
        self.text_trunk = Trunk(D, config.decoder_blocks, config.decoder_heads,
                                config.decoder_mlp_hidden_dim, config.recompute)
        self.image_proj = nn.Linear(config.embed_dim, D, bias=False)
        self.text_proj = nn.Linear(D, D, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(TEMPERATURE)))
        self.is_locked = config.encoder_lr == 0
        if self.is_locked:
            self.encoder.requires_grad_(False)
            self.pool = AttentionPool(config.embed_dim, config.num_heads)
        init_linear_layers(self)
        nn.init.normal_(self.text_positions, std=0.01)  # tables as in AIMv2
        nn.init.normal_(self.token_embed.weight, std=0.02)

    def image_vectors(self, patches, grid):
        """patches u8[B, A, P], grid i64[B, 2] -> f32[B, D] of unit length.

        The features of the valid patches are averaged. Unlike pooling by attention this has no
        weights, so everything that is learned must be in the features. A frozen encoder learns
        nothing: there attention pools.
        """
        is_valid = valid_patches(grid, patches.shape[1])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_locked):
            features = self.encoder(patches, grid).float()  # [B, A, De]
        pool = self.pool if self.is_locked else mean_of_valid
        return F.normalize(self.image_proj(pool(features, is_valid)).float(), dim=-1)

    def text_vectors(self, tokens, num_tokens):
        """tokens i64[B, T], num_tokens i64[B], EOS included -> f32[B, D] of unit length.

        The state at EOS, which has read the whole caption (a caption that was cut has no EOS: the
        state at its last token).
        """
        tokens = tokens[:, : self.config.max_tokens]  # batches round T up; the rest is padding
        x = self.token_embed(tokens) + self.text_positions[: tokens.shape[1]]
        x = self.text_trunk(x, causal=True)  # f[B, T, D]
        last = x[torch.arange(len(x), device=x.device), num_tokens - 1]
        return F.normalize(self.text_proj(last).float(), dim=-1)

    def forward(self, batch):
        """Batch -> (image vectors, text vectors), f32[B, D] each."""
        return (self.image_vectors(batch.patches, batch.grid),
                self.text_vectors(batch.tokens, batch.num_tokens))


def train_step(model, optimizer, batch, clip_grad, runtime):
    """One step on a batch that is on the device already.

    Returns: (loss, gradient norm before clipping), tensors on the device.
    """
    with runtime.autocast():
        images, texts = model(batch)
    is_compared = comparison_mask(batch.tokens, batch.num_tokens)
    loss = contrastive_loss(images, texts, model.log_scale.exp(), is_compared)
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        model.log_scale.clamp_(max=math.log(MAX_SCALE))
    return loss.detach(), grad_norm


@torch.no_grad()
def retrieval_scores(model, evaluation, runtime):
    """Held-out loss, and how often an image finds its caption (or an equal one) within its batch.

    Both depend on the number of captions to choose from, so a smaller last batch is left out.
    Returns: {"val_loss", "val_retrieval" (top-1), "val_batch" (pairs per batch)}.
    """
    size = len(evaluation.batches[0].patches)
    losses, is_right = [], []
    for batch in evaluation.batches:
        if len(batch.patches) < size:
            continue
        batch = batch.to(runtime.device)
        with runtime.autocast():
            images, texts = model(batch)
        is_compared = comparison_mask(batch.tokens, batch.num_tokens)
        losses.append(contrastive_loss(images, texts, model.log_scale.exp(), is_compared))
        similarity = (images @ texts.T).masked_fill(~is_compared, float("-inf"))
        is_right.append(similarity.argmax(dim=1) == torch.arange(size, device=similarity.device))
    return {"val_loss": float(torch.stack(losses).mean()),
            "val_retrieval": float(torch.cat(is_right).float().mean()), "val_batch": size}


def read_config(argv):
    """train.py's flags -> Config. Raises ValueError for settings that do not suit this loss."""
    given, options = read_flags(argv, Config, Options, doc=__doc__, epilog=presets_text())
    lock = Options(**options).lock
    if lock and not given.get("init"):
        raise ValueError("lock=true trains a text tower for an encoder that has been trained: name "
                         "it, --init=runs/toy, or a folder or repository of published weights")
    if given.get("init") and not lock:
        raise ValueError(f"init={given['init']!r}: the contrastive baseline starts from random "
                         "weights; leave --init out, or keep this encoder with --lock=true")
    encoder_lr = 0.0 if lock else 1.0
    if given.get("encoder_lr", encoder_lr) != encoder_lr:
        raise ValueError(f"encoder_lr={given['encoder_lr']}: a contrastive run trains its encoder "
                         "like everything else, or keeps it with --lock=true: leave --encoder_lr "
                         "out")
    if not given.get("run_dir"):
        given["run_dir"] = f"runs/{given.get('preset', 'toy')}-{'lit' if lock else 'clip'}"
    config = Config.from_preset(**adopt_init(given | {"encoder_lr": encoder_lr}))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        raise ValueError(f"{world} processes: the contrastive baseline trains in one; start it "
                         "without torchrun")
    if config.grad_accum > 1:
        raise ValueError(f"grad_accum={config.grad_accum}: a contrastive loss needs its whole "
                         "batch at once; use --grad_accum=1")
    if config.batch_size < 2:
        raise ValueError(f"batch_size={config.batch_size}: a contrastive loss compares pairs with "
                         "each other; use at least --batch_size=2")
    return config


def is_finished(config):
    """Whether the run folder holds this run, finished. Raises ValueError if it holds another."""
    folder = Path(config.run_dir)
    if (folder / "checkpoints").exists():
        raise ValueError(f"run folder {folder} holds a run of train.py: choose another --run_dir")
    if not (folder / "model.safetensors").exists():
        return False
    checkpoint.check_run(config)
    checkpoint.load_model(folder, kind=CLIP)
    return True


def main(argv):
    # Settings
    config = checkpoint.recorded(read_config(argv))
    runtime = distributed.start(config.device, config.dtype, "none", config.compile)
    if runtime.dtype == torch.float16:
        raise ValueError("dtype=float16 would need a loss scaler, which the contrastive baseline "
                         "does not have: use --dtype=float32")
    if is_finished(config):
        print(f"{config.run_dir} is finished: nothing to train; delete the folder to start again")
        return

    # Data
    tokenizer = tokenizer_of(config)
    data = TrainingData(config, tokenizer)
    held_out = held_out_sets(config, tokenizer, config.eval_images)
    for line in (*describe_init(config), *describe(data), *describe_held_out(held_out)):
        print(line)

    # Model and optimizer
    torch.manual_seed(config.seed)
    model = CLIP(config)
    if model.is_locked:
        load_init(model, config, encoder_only=True)
    checkpoint.begin_run(config, data, runtime)
    model = distributed.parallelize(model, runtime)
    optimizer = make_optimizer(model, config.lr, config.weight_decay, config.betas)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{config.run_dir}: {parameters:,} parameters to learn on {runtime.device.type}, step 0 "
          f"of {config.steps}")

    # The loop
    progress, finite = Progress(config, runtime, 0, flops=None), FiniteCheck(data)
    loader = make_loader(data, 0, config.num_workers, runtime.is_cuda)
    for step in range(config.steps):
        [batch] = progress.wait_for([next(loader)])
        lr = lr_at(step, config.lr, config.min_lr, config.warmup_steps, config.steps)
        set_lr(optimizer, lr)
        loss, grad_norm = train_step(
            model, optimizer, batch.to(runtime.device), config.clip_grad, runtime)
        finite.add(step, loss=loss, gradient_norm=grad_norm)
        progress.step(step, [batch], lr, grad_norm, lambda: {"loss": float(loss)})
        done = step + 1
        if done == config.steps or (config.eval_every and done % config.eval_every == 0):
            finite.read()
            row = {}
            with progress.paused():
                for split, evaluation in held_out.items():
                    suffix = "" if split == "val" else f"_{split}"
                    scores = retrieval_scores(model, evaluation, runtime)
                    row |= {name + suffix: value for name, value in scores.items()}
                if row:
                    progress.evaluation(done, row)
    progress.close()
    checkpoint.save_model(config.run_dir, model, runtime)


if __name__ == "__main__":
    run_command(main)
