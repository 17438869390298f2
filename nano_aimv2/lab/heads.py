"""Heads: three probes that classify images from frozen features.

- *attentive*: one learned query attends over the patches, a linear classifier reads the result
  (the paper's probe);
- *linear*: a linear classifier on the mean of the patches, standardised;
- *k-NN*: the k most similar training images vote. Nothing is learned.

The paper trains its probe once per learning rate and weight decay. All of these probes read the
same features, so here they are trained side by side in one pass: every weight has a leading axis H.
The best one is chosen on a tenth of the *training* images; the test images are used once.

Pipeline: frozen features (probe.py) -> **accuracy**. Source: paper section 4.1, Table A2.
Lesson: 13.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nano_aimv2.flags import check_at_least
from nano_aimv2.training.distributed import choose_device

LEARNING_RATES = (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3)
WEIGHT_DECAYS = (0.05, 0.1)
GRID = [(lr, decay) for lr in LEARNING_RATES for decay in WEIGHT_DECAYS]
BETA_1, BETA_2, EPS, MIN_LR, CLIP = 0.9, 0.999, 1e-8, 1e-5, 3.0
HELD_OUT = 0.1  # share of the training images that chooses from the grid
KNN_TEMPERATURE = 0.07
CHUNK = 256  # images that are processed at once


@dataclass
class Settings:
    """How to train and evaluate the probes. `device="auto"` becomes the device that was found."""

    epochs: int = 10  # passes of the attentive and the linear probe over the training images
    batch_size: int = 256  # images per step of these two
    k: int = 20  # nearest neighbours that vote in k-NN
    seed: int = 0  # random seed of the split, the probes, the shuffle order and the random encoder
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        check_at_least(self, epochs=1, batch_size=2, k=1, seed=0)
        self.device = choose_device(self.device).type


class Heads(nn.Module):
    """H classifiers of the same tokens, side by side; all start from the same weights.

    Attentive (num_heads > 0): BatchNorm without affine, keys and values without bias, one query,
    linear classifier.
    Linear (num_heads = 0): BatchNorm and classifier; each image has one token, its mean.

    With one query, attention needs no keys: q . (K x) = (K^T q) . x, and the weighted mean of
    values is V times the weighted mean of tokens. So each attention head costs 2 n D
    multiplications per image, where keys and values cost 2 n D^2.
    """

    def __init__(self, dim, num_heads, num_classes, seed=0):
        """num_classes: i64[H], how many of the C = max(num_classes) outputs each head has."""
        super().__init__()
        H, C = len(num_classes), int(num_classes.max())
        self.num_heads = num_heads
        self.norm = nn.BatchNorm1d(dim, affine=False)
        no_class = torch.arange(C) >= num_classes[:, None, None]  # bool[H, 1, C]
        self.register_buffer("no_class", no_class)
        generator = torch.Generator().manual_seed(seed)

        def same_for_all(std, *shape):
            weight = std * torch.randn(1, *shape, generator=generator)
            return nn.Parameter(weight.repeat(H, *[1] * len(shape)))

        if num_heads:
            head_dim = dim // num_heads
            self.query = same_for_all(0.02, num_heads, 1, head_dim)
            self.k = same_for_all(dim**-0.5, num_heads, head_dim, dim)
            self.v = same_for_all(dim**-0.5, num_heads, head_dim, dim)
        self.weight = nn.Parameter(torch.zeros(H, dim, C))
        self.bias = nn.Parameter(torch.zeros(H, 1, C))

    def forward(self, tokens, is_valid):
        """tokens f[B, A, D], is_valid bool[B, A] (False: padding) -> logits f[H, B, C], -inf where
        a head has no class."""
        x = torch.zeros_like(tokens)
        x[is_valid] = self.norm(tokens[is_valid])
        H, heads = len(self.weight), self.num_heads
        if heads:
            head_dim = self.query.shape[-1]
            query = (self.query @ self.k).reshape(H * heads, -1) * head_dim**-0.5  # K^T q
            scores = x @ query.T  # [B, A, D] @ [D, H*heads]
            scores = scores.masked_fill(~is_valid[..., None], float("-inf"))
            x = scores.softmax(dim=1).transpose(1, 2) @ x  # [B, H*heads, D]
            x = x.unflatten(1, (H, heads)).permute(1, 2, 0, 3) @ self.v.transpose(-2, -1)
            x = x.transpose(1, 2).flatten(2)  # [H, heads, B, head_dim] -> [H, B, D]
        else:
            x = x[:, 0].expand(H, -1, -1)
        return torch.baddbmm(self.bias, x, self.weight).masked_fill(self.no_class, float("-inf"))


def take(tokens, rows, device):
    """Rows of an array u8 or f16 [N, A, D] as f32 on the device, and which tokens are valid (all:
    the images are of one size)."""
    x = torch.from_numpy(tokens[rows.numpy()]).to(device).float()
    return x, torch.ones(x.shape[:2], dtype=torch.bool, device=device)


def train_heads(heads, tokens, rows, targets, lr, decay, settings):
    """AdamW on all heads at once, each with its own learning rate, weight decay and clipping.

    Args: tokens [N, A, D]; rows i64[R]: the images to train on; targets i64[H, N]; lr, decay f[H].
    """
    params = list(heads.to(settings.device).train().parameters())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    targets, lr, decay = (t.to(settings.device) for t in (targets, lr, decay))
    generator = torch.Generator().manual_seed(settings.seed)
    batches = max(1, len(rows) // settings.batch_size)
    steps = settings.epochs * batches
    for step in range(steps):
        if step % batches == 0:
            order = rows[torch.randperm(len(rows), generator=generator)].tensor_split(batches)
        batch = order[step % batches]
        logits = heads(*take(tokens, batch, settings.device))
        loss = F.cross_entropy(logits.flatten(0, 1), targets[:, batch].flatten(), reduction="sum")
        grads = torch.autograd.grad(loss / len(batch), params)
        norm = sum(g.flatten(1).square().sum(dim=1) for g in grads).sqrt()  # f[H]
        shrink = (CLIP / (norm + 1e-6)).clamp(max=1)
        lr_now = MIN_LR + (lr - MIN_LR) * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            for p, g, (first, second) in zip(params, grads, moments, strict=True):
                per_head = (-1, *[1] * (p.ndim - 1))
                g = g * shrink.view(per_head)
                first.lerp_(g, 1 - BETA_1)
                second.lerp_(g * g, 1 - BETA_2)
                p.mul_(1 - (lr_now * decay).view(per_head))
                root = (second / (1 - BETA_2 ** (step + 1))).sqrt_().add_(EPS)
                p.sub_(lr_now.view(per_head) / (1 - BETA_1 ** (step + 1)) * first / root)


@torch.no_grad()
def predict(heads, tokens, rows, targets, device):
    """Classify the images `rows` with BatchNorm's running statistics.

    Returns: (bool[H, R]: whether the likeliest class is the right one, f[H]: mean loss).
    """
    heads.to(device).eval()
    right, loss = [], 0
    for batch in rows.split(CHUNK):
        logits, target = heads(*take(tokens, batch, device)), targets[:, batch].to(device)
        right.append((logits.argmax(dim=-1) == target).cpu())
        losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")  # f[H, B]
        loss = loss + losses.sum(dim=1).cpu()
    return torch.cat(right, dim=1), loss / len(rows)


def probe_tokens(train, test, labels, num_heads, settings):
    """Train the whole grid for every attribute in one pass; test each attribute's head that is best
    on held-out training images.

    Args:
        train, test: [N, A, D] u8 or f16; labels: of `label_ids`.
        num_heads: attention heads of the attentive probe; 0: the linear probe.
    Returns: {attribute: `accuracy` of the best head, with its lr and weight_decay}.
    """
    size = len(GRID)
    lr, decay = torch.tensor(GRID * len(labels)).T
    train_ids, test_ids, classes = zip(*labels.values(), strict=True)
    ids = torch.stack(train_ids).repeat_interleave(size, dim=0)
    test_ids = torch.stack(test_ids).repeat_interleave(size, dim=0)
    num_classes = torch.tensor([len(names) for names in classes]).repeat_interleave(size)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.seed))
    held_out, rows = order.tensor_split([max(1, round(HELD_OUT * len(order)))])

    heads = Heads(train.shape[2], num_heads, num_classes, settings.seed)
    train_heads(heads, train, rows, ids, lr, decay, settings)
    right, loss = predict(heads, train, held_out, ids, settings.device)
    test_right, _ = predict(heads, test, torch.arange(len(test)), test_ids, settings.device)
    found = {}
    for i, name in enumerate(labels):
        own_heads = range(i * size, (i + 1) * size)
        best = max(own_heads, key=lambda h: (int(right[h].sum()), -float(loss[h])))
        best_lr, best_decay = GRID[best % size]
        found[name] = {**accuracy(test_right[best]), "lr": best_lr, "weight_decay": best_decay}
    return found


def knn(train, test, labels, settings):
    """k-nearest neighbours: the k training images of the highest cosine similarity vote with
    exp(similarity / 0.07).

    Args: train f[N, D]; test f[N', D]; labels: of `label_ids`. Returns: {attribute: `accuracy`}.
    """
    if settings.k > len(train):
        raise ValueError(f"k={settings.k} neighbours must be at most the {len(train)} training "
                         "images: use a smaller --k, or give more images")
    train, test = (F.normalize(x.to(settings.device), dim=1) for x in (train, test))
    nearest = [(part @ train.T).topk(settings.k) for part in test.split(CHUNK)]
    rows = torch.cat([top.indices for top in nearest]).cpu()
    similarity = torch.cat([top.values for top in nearest]).cpu()
    weights = (similarity / KNN_TEMPERATURE).exp()
    found = {}
    for name, (ids, test_ids, classes) in labels.items():
        votes = torch.zeros(len(test), len(classes)).scatter_add_(1, ids[rows], weights)
        found[name] = accuracy(votes.argmax(dim=1) == test_ids)
    return found


def accuracy(right):
    """bool[N] -> {"top1": share that is right, "low" and "high": its 95% interval, "images": N}."""
    low, high = wilson(int(right.sum()), len(right))
    return {"top1": float(right.float().mean()), "low": low, "high": high, "images": len(right)}


def wilson(right, count, z=1.959964):
    """Wilson's 95% interval of a share -> (low, high). Unlike mean +- 2 deviations it stays within
    0..1 and is right near both ends."""
    share, spread = right / count, z**2 / count
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    low, high = share + spread / 2 - half, share + spread / 2 + half
    return max(0.0, low / (1 + spread)), min(1.0, high / (1 + spread))
