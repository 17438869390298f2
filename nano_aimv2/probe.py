"""Probe: what frozen features know, measured the way the paper does.

The encoder stays as it is and runs once, bidirectionally, over every image; its last features, after the final norm, go
to disk. Three readers then try to name what is in the picture:

- *attentive*: one learned query attends over the patches, a linear classifier names what it gathered (the paper's probe);
- *linear*: a linear classifier on the mean of the patches, standardised;
- *k-NN*: the k most similar training images vote. Nothing is learned.

The paper trains its probe once for each learning rate and weight decay. All of them read the same features, so here they
are trained side by side in one pass, every weight with a leading axis H. Which one counts is decided on a tenth of the
*training* images; the test images are met once. Every table also shows the same encoder with random weights, and pixels.

    python -m nano_aimv2.probe --run=runs/toy                    # toy scenes: the attributes of single objects
    python -m nano_aimv2.probe --run=runs/photos --seed=1        # packed photographs: their label
    python -m nano_aimv2.probe --weights=aimv2-large --data=data/photos

Way: images -> frozen features -> **right or wrong**. Source: paper section 4.1, Table A2. Lesson: 10.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nano_aimv2.checkpoint import load_model
from nano_aimv2.data import evaluation_pixels, fixed_grid, parse_mixture, to_patches
from nano_aimv2.distributed import choose_device, keep_memory
from nano_aimv2.encoder import Encoder
from nano_aimv2.images import open_image
from nano_aimv2.layers import init_linear_layers
from nano_aimv2.patchify import pixels_to_float, unpatchify
from nano_aimv2.shards import Shards

LEARNING_RATES = (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3)
WEIGHT_DECAYS = (0.05, 0.1)
GRID = [(lr, decay) for lr in LEARNING_RATES for decay in WEIGHT_DECAYS]
BETA_1, BETA_2, EPS, MIN_LR, CLIP = 0.9, 0.999, 1e-8, 1e-5, 3.0
HELD_OUT = 0.1  # of the training images choose the winner of the grid
KNN_TEMPERATURE = 0.07
ATTRIBUTES = ("place", "size", "colour", "shape")  # of an entry of `objects` in the toy set
PIXEL_SIDE = 64  # flattened pixels of larger pictures are shrunk to this
CHUNK = 256  # images that are worked on at once
VERSION = 1  # of the cached features


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


@dataclasses.dataclass
class Labelled:
    """Images in memory (147 KiB each at 224 px) and what is in them."""

    patches: np.ndarray  # u8[N, n, P]
    grid: tuple  # (rows, cols), the same for all
    labels: dict  # {attribute: [N names]}


def read_labelled(path, view, limit):
    """The first `limit` labelled images of a folder of shards, centre-cropped.

    Toy scenes give place, size, colour and shape of those that hold one object; other images `label`: the label_name, or
    label, of their .json. Returns: (Labelled, line that says what was passed over).
    Raises: ValueError if no sample has a label.
    """
    shards = Shards(str(path))
    patches, rows, unlabelled, broken = [], [], 0, []
    for i in range(len(shards)):
        if len(rows) == limit:
            break
        try:
            metadata = shards.metadata(i)
            objects = metadata.get("objects")
            if objects is not None:
                found = dict(zip(ATTRIBUTES, objects[0], strict=True)) if len(objects) == 1 else {}
            else:
                name = metadata.get("label_name", metadata.get("label"))
                found = {} if name is None else {"label": str(name)}
            if not found:
                unlabelled += 1
                continue
            pixels = to_patches(evaluation_pixels(open_image(shards.image(i)), view), view.patch_size)
        except Exception as error:  # decoders fail in many ways: named, and the probe goes on
            broken.append(f"{shards.name(i)}: {type(error).__name__}: {error}")
            continue
        patches.append(pixels)
        rows.append(found)
    if not rows:
        raise ValueError(f"{path}: none of its {len(shards)} samples has a label: a sample's .json needs \"label\" or "
                         '"label_name", or one entry in "objects" (toy scenes)'
                         + (f"; unreadable: {broken[0]}" if broken else ""))
    if len({tuple(row) for row in rows}) > 1:
        raise ValueError(f"{path} mixes toy scenes and labelled images: probe them apart")
    note = f"{path}: {len(rows):,} labelled images" + (f", {unlabelled:,} without one label passed over" if unlabelled else "")
    note += f", {len(broken)} unreadable, the first: {broken[0]}" if broken else ""
    return Labelled(np.stack(patches), fixed_grid(view), {k: [row[k] for row in rows] for k in rows[0]}), note


def label_ids(train, test):
    """Names to numbers: {attribute: [names]} twice -> {attribute: (train i64[N], test i64[N'], names of the classes)}.

    Raises: ValueError where there is too little to learn from: one class, a class that only the test images have, fewer
    than two training images a class on average.
    """
    if train.keys() != test.keys():
        raise ValueError(f"training images are labelled with {', '.join(train)}, test images with {', '.join(test)}")
    out = {}
    for name in train:
        known = sorted(set(train[name]))
        classes, alone = sorted({*known, *test[name]}), sorted({*test[name]} - {*known})
        if len(train[name]) < 2 * len(classes):
            raise ValueError(f"{name}: {len(train[name])} training images are too few for {len(classes)} classes, at least two "
                             "for each: give more with --data")
        if alone:
            raise ValueError(f"{name}: {len(alone)} classes are among the test images only, the first {alone[0]!r}: nothing "
                             "could learn them; split the data anew")
        if len(classes) == 1:
            raise ValueError(f"{name}: all images are {known[0]!r}; a probe needs at least two classes")
        number = {c: i for i, c in enumerate(classes)}
        out[name] = *(torch.tensor([number[c] for c in names]) for names in (train[name], test[name])), classes
    return out


def random_twin(encoder, seed):
    """The same encoder with fresh weights, drawn as at the start of training: the baseline."""
    with torch.random.fork_rng(devices=[]):
        twin = Encoder(encoder.config)
        torch.manual_seed(seed)
        init_linear_layers(twin)
    return twin


@torch.no_grad()
def encode(encoder, images, view, device="cpu", cache=None):
    """Frozen features of every image: bidirectional, after the final norm.

    Args: encoder; images: Labelled; view: has pixel_mean and pixel_std; cache: a path without ending, or None for memory.
    Returns: f16[N, n, D], mapped from disk where there is a cache (512 KiB an image for L at 224 px; in memory one chunk).
    The cache's name holds a hash of weights, pixels and settings, so other ones never read it; it replaces older ones.
    """
    D, mapped = encoder.proj.out_features, None
    if cache:
        key = hashlib.sha256(repr((VERSION, view.pixel_mean, view.pixel_std, images.grid, images.patches.shape,
                                   [block.attn.num_heads for block in encoder.trunk.blocks])).encode())
        for name, weight in encoder.state_dict().items():
            key.update(name.encode())
            key.update(weight.float().cpu().numpy().tobytes())
        key.update(images.patches)
        path = Path(f"{cache}-{key.hexdigest()[:16]}.npy")
        if path.exists():
            return np.load(path, mmap_mode="r")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = f"{path}.{os.getpid()}.tmp"
        mapped = np.lib.format.open_memmap(temporary, "w+", np.float16, (*images.patches.shape[:2], D))
    features = np.empty((*images.patches.shape[:2], D), np.float16) if mapped is None else mapped
    encoder = encoder.to(device).eval()
    for i in range(0, len(features), CHUNK):
        patches = torch.from_numpy(images.patches[i : i + CHUNK]).to(device)
        grid = torch.tensor([images.grid] * len(patches), device=device)
        features[i : i + CHUNK] = encoder(pixels_to_float(patches, view.pixel_mean, view.pixel_std), grid).half().cpu().numpy()
    if mapped is None:
        return features
    mapped.flush()
    for old in path.parent.glob(f"{Path(cache).name}-*.npy"):
        old.unlink()
    os.replace(temporary, path)
    return np.load(path, mmap_mode="r")


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


def mean_features(tokens):
    """f16[N, n, D] -> f32[N, D], in memory."""
    means = [tokens[i : i + CHUNK].astype(np.float32).mean(axis=1) for i in range(0, len(tokens), CHUNK)]
    return torch.from_numpy(np.concatenate(means))


def probe_encoder(encoder, train, test, view, settings, cache=None):
    """The three probes of a frozen encoder: train and test Labelled -> {"attentive" | "linear" | "k-NN": {attribute: score}}."""
    labels = label_ids(train.labels, test.labels)
    parts = [encode(encoder, images, view, settings.device, cache and f"{cache}-{name}")
             for name, images in (("train", train), ("test", test))]
    return three_probes(*parts, *map(mean_features, parts), labels, encoder.trunk.blocks[0].attn.num_heads, settings)


def probe_pixels(train, test, view, settings, num_heads):
    """The same without an encoder: the attentive probe reads raw patches, the two others all pixels of the picture."""
    labels = label_ids(train.labels, test.labels)
    num_heads = next(h for h in range(num_heads, 0, -1) if train.patches.shape[2] % h == 0)
    return three_probes(train.patches, test.patches, *(flat_pixels(images, view) for images in (train, test)), labels, num_heads,
                        settings)


def three_probes(train, test, flat_train, flat_test, labels, num_heads, settings):
    as_tokens = [flat.half()[:, None].numpy() for flat in (flat_train, flat_test)]
    return {"attentive": probe_tokens(train, test, labels, num_heads, settings),
            "linear": probe_tokens(*as_tokens, labels, 0, settings),
            "k-NN": knn(flat_train, flat_test, labels, settings)}


def flat_pixels(images, view):
    """All pixels of each picture, at most 64 x 64: f32[N, 3*side*side], normalised by colour."""
    out = []
    for i in range(0, len(images.patches), CHUNK):
        patches = pixels_to_float(torch.from_numpy(images.patches[i : i + CHUNK]), view.pixel_mean, view.pixel_std)
        out.append(F.adaptive_avg_pool2d(unpatchify(patches, images.grid, view.patch_size), min(PIXEL_SIDE, view.image_size)))
    return torch.cat(out).flatten(1)


def score(right):
    """bool[N] -> {"top1", "low", "high", "images"}."""
    low, high = wilson(int(right.sum()), len(right))
    return {"top1": float(right.float().mean()), "low": low, "high": high, "images": len(right)}


def wilson(right, count, z=1.959964):
    """Wilson's interval (95%) of a share: unlike mean +- 2 deviations it stays within 0..1 and is right near both ends."""
    share, spread = right / count, z**2 / count
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, (share + spread / 2 - half) / (1 + spread)), min(1.0, (share + spread / 2 + half) / (1 + spread))


def table(rows, chance):
    """The results as text: {row: {method: {attribute: score}}}, {attribute: share} -> lines."""
    lines = [f"{'top-1 [95%]':<32}" + "".join(f"{name:>22}" for name in chance)]
    for method in ("attentive", "linear", "k-NN"):
        for row, found in rows.items():
            cells = "".join("{:>22}".format(f"{s['top1']:.3f} [{s['low']:.3f} {s['high']:.3f}]") for s in found[method].values())
            lines.append(f"{method:<10}{row[:21]:<22}{cells}")
    return [*lines, f"{'always the commonest class':<32}" + "".join(f"{share:>22.3f}" for share in chance.values())]


def load_frozen(run, weights):
    """(encoder, what tells how to feed it: image_size, patch_size, pixel_mean, pixel_std) of a run or of other weights."""
    if weights:
        from nano_aimv2.hub import load_encoder
        encoder = load_encoder(weights)
        return encoder, encoder.config
    model, config, _ = load_model(run)
    return model.encoder, config


def main(argv):
    parser = argparse.ArgumentParser(prog="probe", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/toy", help="a trained run; also where the results go")
    parser.add_argument("--weights", default="", help="weights of Apple or transformers instead: a folder")
    parser.add_argument("--data", default="", help="a folder with train/ and the test folder; empty: the run's data")
    parser.add_argument("--test", default="val", help="name of the test folder")
    parser.add_argument("--out", default="", help="where the results go; empty: the run, or runs/probe-WEIGHTS")
    parser.add_argument("--max_images", type=int, default=50_000, help="labelled images of each folder that are read")
    parser.add_argument("--device", default="auto")
    for name in ("epochs", "batch_size", "k", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings, name))
    given = parser.parse_args(argv)
    settings = Settings(given.epochs, given.batch_size, given.k, given.seed, choose_device(given.device).type)
    if settings.device == "cpu":
        keep_memory()
    encoder, view = load_frozen(given.run, given.weights)
    data = given.data or (not given.weights and max(parse_mixture(view.data), key=lambda source: source.weight).path)
    if not data:
        raise ValueError("--weights alone does not say what to classify: give --data=FOLDER with train/ and val/ in it")
    train, test = (read_labelled(Path(data) / split, view, given.max_images) for split in ("train", given.test))
    print(train[1], test[1], sep="\n")
    train, test = train[0], test[0]
    out = Path(given.out or (f"runs/probe-{Path(given.weights).name}" if given.weights else given.run))
    name = "this run" if not given.weights else Path(given.weights).name
    rows = {name: probe_encoder(encoder, train, test, view, settings, out / "features/trained"),
            "random weights": probe_encoder(random_twin(encoder, settings.seed), train, test, view, settings,
                                            out / "features/random"),
            "raw pixels": probe_pixels(train, test, view, settings, encoder.trunk.blocks[0].attn.num_heads)}
    chance = {attribute: Counter(names).most_common(1)[0][1] / len(names) for attribute, names in test.labels.items()}
    print(*table(rows, chance), sep="\n")
    result = {**dataclasses.asdict(settings), "data": str(data), "train_images": len(train.patches), "chance": chance,
              "rows": rows}
    (out / "probe.json").write_text(json.dumps(result, indent=1) + "\n")
    from nano_aimv2.plots import probe_bars
    probe_bars(rows, chance, out / "probe.png")
    print(f"written: {out}/probe.json, {out}/probe.png")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"probe: {error}")
