"""Heads: three readers of frozen features, which name what is in a picture.

- *attentive*: one learned query attends over the patches, a linear classifier names what it gathered (the paper's probe);
- *linear*: a linear classifier on the mean of the patches, standardised;
- *k-NN*: the k most similar training images vote. Nothing is learned.

The paper trains its probe once for each learning rate and weight decay. All of them read the same features, so here they
are trained side by side in one pass, every weight with a leading axis H. Which one counts is decided on a tenth of the
*training* images; the test images are met once.

Way: frozen features (probe.py) -> **right or wrong**. Source: paper section 4.1, Table A2. Lesson: 10.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

LEARNING_RATES = (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3)
WEIGHT_DECAYS = (0.05, 0.1)
GRID = [(lr, decay) for lr in LEARNING_RATES for decay in WEIGHT_DECAYS]
BETA_1, BETA_2, EPS, MIN_LR, CLIP = 0.9, 0.999, 1e-8, 1e-5, 3.0
HELD_OUT = 0.1  # of the training images choose the winner of the grid
KNN_TEMPERATURE = 0.07
CHUNK = 256  # images that are worked on at once


@dataclasses.dataclass
class Settings:
    """How to probe. `epochs` and `batch_size`: of the two trained probes; `k`: neighbours that vote."""

    epochs: int = 10
    batch_size: int = 256
    k: int = 20
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        for name, least in (("epochs", 1), ("batch_size", 2), ("k", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


class Heads(nn.Module):
    """H classifiers of the same tokens, side by side; all start alike.

    Attentive (num_heads > 0): BatchNorm without affine, keys and values without bias, one query, linear classifier.
    Linear (num_heads = 0): BatchNorm and classifier; each image has one token, its mean.

    With one query, attention needs no key of any token: q . (K x) = (K^T q) . x, and the weighted mean of values is V times
    the weighted mean of tokens. So a head costs 2 n D numbers an image and attention head, where keys and values cost 2 n D^2.
    """

    def __init__(self, dim, num_heads, num_classes, seed=0):
        """num_classes: i64[H], how many of the C = max(num_classes) outputs each of the H heads has."""
        super().__init__()
        H, C = len(num_classes), int(num_classes.max())
        self.num_heads = num_heads
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.register_buffer("no_class", torch.arange(C) >= num_classes[:, None, None])  # bool[H, 1, C]
        generator = torch.Generator().manual_seed(seed)

        def alike(std, *shape):
            return nn.Parameter((std * torch.randn(1, *shape, generator=generator)).repeat(H, *[1] * len(shape)))

        if num_heads:
            self.query = alike(0.02, num_heads, 1, dim // num_heads)
            self.k = alike(dim**-0.5, num_heads, dim // num_heads, dim)
            self.v = alike(dim**-0.5, num_heads, dim // num_heads, dim)
        self.weight = nn.Parameter(torch.zeros(H, dim, C))
        self.bias = nn.Parameter(torch.zeros(H, 1, C))

    def forward(self, tokens, is_valid):
        """tokens f[B, A, D], is_valid bool[B, A] (False: padding) -> logits f[H, B, C], -inf where a head has no class."""
        x = torch.zeros_like(tokens)
        x[is_valid] = self.norm(tokens[is_valid])
        H, heads = len(self.weight), self.num_heads
        if heads:
            read = (self.query @ self.k).reshape(H * heads, -1) * self.query.shape[-1] ** -0.5  # [H*heads, D]
            scores = (x @ read.T).masked_fill(~is_valid[..., None], float("-inf"))  # [B, A, H*heads]
            x = scores.softmax(dim=1).transpose(1, 2) @ x  # [B, H*heads, D]
            x = x.unflatten(1, (H, heads)).permute(1, 2, 0, 3) @ self.v.transpose(-2, -1)  # [H, heads, B, hd]
            x = x.transpose(1, 2).flatten(2)  # [H, B, D]
        else:
            x = x[:, 0].expand(H, -1, -1)
        return torch.baddbmm(self.bias, x, self.weight).masked_fill(self.no_class, float("-inf"))


def take(tokens, rows, device):
    """Rows of an array u8 or f16 [N, A, D] as f32 on the device, and which are valid (all: images of one size)."""
    x = torch.from_numpy(tokens[rows.numpy()]).to(device).float()
    return x, torch.ones(x.shape[:2], dtype=torch.bool, device=device)


def train_heads(heads, tokens, rows, targets, lr, decay, settings):
    """AdamW on all heads at once, each with its own learning rate, weight decay and gradient clipping.

    Args: tokens [N, A, D]; rows i64[R]: the images to train on; targets i64[H, N]; lr and decay f[H].
    """
    params = list(heads.to(settings.device).train().parameters())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    targets, lr, decay = (t.to(settings.device) for t in (targets, lr, decay))
    generator = torch.Generator().manual_seed(settings.seed)
    batches = max(1, len(rows) // settings.batch_size)
    for step in range(settings.epochs * batches):
        if step % batches == 0:
            order = rows[torch.randperm(len(rows), generator=generator)].tensor_split(batches)
        batch = order[step % batches]
        logits = heads(*take(tokens, batch, settings.device))
        loss = F.cross_entropy(logits.flatten(0, 1), targets[:, batch].flatten(), reduction="sum") / len(batch)
        grads = torch.autograd.grad(loss, params)
        norm = sum(g.flatten(1).square().sum(dim=1) for g in grads).sqrt()  # f[H]
        shrink = (CLIP / (norm + 1e-6)).clamp(max=1)
        lr_now = MIN_LR + (lr - MIN_LR) * 0.5 * (1 + math.cos(math.pi * step / (settings.epochs * batches)))
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
    """(bool[H, R]: is the likeliest class right, f[H]: mean loss) on images `rows`, with running statistics."""
    heads.eval()
    right, loss = [], 0
    for batch in rows.split(CHUNK):
        logits, target = heads(*take(tokens, batch, device)), targets[:, batch].to(device)
        right.append((logits.argmax(dim=-1) == target).cpu())
        loss = loss + F.cross_entropy(logits.transpose(1, 2), target, reduction="none").sum(dim=1).cpu()
    return torch.cat(right, dim=1), loss / len(rows)


def probe_tokens(train, test, labels, num_heads, settings):
    """Train the whole grid for every attribute in one pass; test the head that is best on held-out training images.

    Args: train, test: [N, A, D] u8 or f16; labels: of `label_ids`; num_heads: of the attention, 0 for the linear probe.
    Returns: {attribute: score}; a score has top1, low, high (95% interval), images, and the winner's lr and weight_decay.
    """
    lr, decay = torch.tensor(GRID * len(labels)).T
    num_classes = torch.tensor([len(classes) for _, _, classes in labels.values()]).repeat_interleave(len(GRID))
    ids, test_ids = (torch.stack([label[part] for label in labels.values()]).repeat_interleave(len(GRID), 0) for part in (0, 1))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.seed))
    held_out, rows = order.tensor_split([max(1, round(HELD_OUT * len(order)))])
    heads = Heads(train.shape[2], num_heads, num_classes, settings.seed)
    train_heads(heads, train, rows, ids, lr, decay, settings)
    right, loss = predict(heads, train, held_out, ids, settings.device)
    right_test, _ = predict(heads, test, torch.arange(len(test)), test_ids, settings.device)
    scores = {}
    for i, name in enumerate(labels):
        mine = range(i * len(GRID), (i + 1) * len(GRID))
        best = max(mine, key=lambda h: (int(right[h].sum()), -float(loss[h])))
        scores[name] = {**score(right_test[best]), "lr": GRID[best % len(GRID)][0], "weight_decay": GRID[best % len(GRID)][1]}
    return scores


def knn(train, test, labels, settings):
    """k-nearest neighbours: train f[N, D], test f[N', D]; the k most cosine-similar vote with exp(similarity / 0.07)."""
    if settings.k > len(train):
        raise ValueError(f"k={settings.k} neighbours, but {len(train)} training images: use a smaller --k")
    train, test = (F.normalize(x.to(settings.device), dim=1) for x in (train, test))
    near = [(part @ train.T).topk(settings.k) for part in test.split(CHUNK)]
    weights, rows = torch.cat([n.values for n in near]).cpu(), torch.cat([n.indices for n in near]).cpu()
    weights, scores = (weights / KNN_TEMPERATURE).exp(), {}
    for name, (ids, test_ids, classes) in labels.items():
        votes = torch.zeros(len(test), len(classes)).scatter_add_(1, ids[rows], weights)
        scores[name] = score(votes.argmax(dim=1) == test_ids)
    return scores


def score(right):
    """bool[N] -> {"top1", "low", "high", "images"}."""
    low, high = wilson(int(right.sum()), len(right))
    return {"top1": float(right.float().mean()), "low": low, "high": high, "images": len(right)}


def wilson(right, count, z=1.959964):
    """Wilson's interval (95%) of a share: unlike mean +- 2 deviations it stays within 0..1 and is right near both ends."""
    share, spread = right / count, z**2 / count
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, (share + spread / 2 - half) / (1 + spread)), min(1.0, (share + spread / 2 + half) / (1 + spread))
