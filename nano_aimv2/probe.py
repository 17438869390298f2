"""Probe: what frozen features know, measured the way the paper does.

The encoder stays as it is and runs once, bidirectionally, over every image; its last features, after the final norm, go
to disk. Three readers then try to name what is in the picture (heads.py). The test images are met once, and every table
also shows the same encoder with random weights, and pixels.

    python -m nano_aimv2.probe --run=runs/toy                    # toy scenes: the attributes of single objects
    python -m nano_aimv2.probe --run=runs/photos --seed=1        # packed photographs: their label
    python -m nano_aimv2.probe --weights=aimv2-large --data=data/photos

Way: images -> frozen features -> **right or wrong**. Source: paper section 4.1, Table A2. Lesson: 10.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nano_aimv2.checkpoint import load_model
from nano_aimv2.data import evaluation_pixels, fixed_grid, parse_mixture, to_patches
from nano_aimv2.distributed import choose_device, keep_memory
from nano_aimv2.encoder import Encoder
from nano_aimv2.heads import CHUNK, Settings, knn, probe_tokens
from nano_aimv2.images import open_image
from nano_aimv2.layers import init_linear_layers
from nano_aimv2.patchify import pixels_to_float, unpatchify
from nano_aimv2.shards import Shards

ATTRIBUTES = ("place", "size", "colour", "shape")  # of an entry of `objects` in the toy set
PIXEL_SIDE = 64  # flattened pixels of larger pictures are shrunk to this
VERSION = 1  # of the cached features


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
