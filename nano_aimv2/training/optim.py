"""Optimizer: AdamW on groups of parameters, and the learning rate as a pure function of the step.

The paper's weight decay is *fully decoupled*: w -= (lr_t / lr_peak) * weight_decay * w. torch's
AdamW multiplies by lr_t instead, so it gets weight_decay / lr_peak: 0.1, not 1e-4, at a peak of
1e-3. Biases, norms, position tables and BOS are not decayed; embeddings and heads are.

Source: paper Table A1. Lesson: 09.
"""

import math

import torch

SAMPLER_LR = 2e-3  # the peak of the patch sampler's learning rate, whatever the model's


def lr_at(step, lr, min_lr, warmup_steps, steps):
    """Learning rate of step 0, 1, ..: linear warm-up to `lr`, then half a cosine to `min_lr`."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))


def is_decayed(name, parameter):
    """Matrices are decayed; vectors (biases, norms, BOS), the position tables and the patch sampler
    are not."""
    return parameter.ndim >= 2 and "positions" not in name and not name.startswith("sampler.")


def make_optimizer(model, lr, weight_decay, betas, encoder_lr=1.0):
    """AdamW over the model's parameters, with `weight_decay` in the paper's sense (see above).

    encoder_lr: the learning rate of `model.encoder`, as a multiple of the others'.
    """
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            scale = {"encoder": encoder_lr, "sampler": SAMPLER_LR / lr}.get(name.split(".")[0], 1.0)
            groups.setdefault((is_decayed(name, p), scale), []).append(p)
    groups = [{"params": parameters, "lr": lr * scale, "lr_scale": scale,
               "weight_decay": weight_decay / lr * decayed}
              for (decayed, scale), parameters in groups.items()]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)


def clipped_parameters(model):
    """The parameters whose gradient norm is clipped: those of the paper's objective, without our
    patch sampler, which must not change it."""
    return [p for name, p in model.named_parameters()
            if not name.startswith("sampler.") and p.requires_grad]


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
