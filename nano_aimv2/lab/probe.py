"""Probe: what frozen features know, measured as the paper does it.

The encoder is frozen and runs once, bidirectionally, over every image; its last features, after the
final norm, are cached on disk. Three probes then classify images from these features (heads.py).
The test images are used once, and every table also shows the same encoder with random weights, and
raw pixels.

    python -m nano_aimv2.lab.probe --run_dir=runs/toy              # toy scenes with a single object
    python -m nano_aimv2.lab.probe --run_dir=runs/photos --seed=1  # packed photographs: their label
    python -m nano_aimv2.lab.probe --weights=aimv2-large --data=data/photos

Pipeline: images -> **frozen features** -> heads -> accuracy. Source: paper section 4.1, Table A2.
Lesson: 13.
"""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nano_aimv2.data.batches import evaluation_pixels, fixed_grid, to_patches
from nano_aimv2.data.images import open_image, read_or_skip
from nano_aimv2.data.mixture import largest_source
from nano_aimv2.data.shards import Shards
from nano_aimv2.encoder import Encoder
from nano_aimv2.files import replacing, write_text
from nano_aimv2.flags import check_at_least, read_flags, run_command
from nano_aimv2.hub import load_encoder
from nano_aimv2.lab.heads import CHUNK, Settings, knn, probe_tokens
from nano_aimv2.lab.plots import probe_bars
from nano_aimv2.layers import init_linear_layers
from nano_aimv2.patchify import pixels_to_float, unpatchify
from nano_aimv2.training.checkpoint import load_model
from nano_aimv2.training.distributed import keep_memory

ATTRIBUTES = ("place", "size", "colour", "shape")  # of an entry of `objects` in the toy set
METHODS = ("attentive", "linear", "k-NN")
PIXEL_SIDE = 64  # the raw pixels of larger images are shrunk to this
VERSION = 1  # of the cached features


@dataclass
class Options:
    run_dir: str = "runs/toy"  # a trained run
    weights: str = ""  # a folder of published weights, or a repository id, instead of a run
    data: str = ""  # a folder with train/ and the test folder; empty: the run's largest source
    test: str = "val"  # name of the test folder
    out: str = ""  # folder for the results; empty: the run's, or runs/probe-WEIGHTS
    max_images: int = 50_000  # how many labelled images to read from each folder

    def __post_init__(self):
        check_at_least(self, max_images=1)


@dataclass
class Labelled:
    """Images in memory (147 KiB each at 224 px) and their labels."""

    patches: np.ndarray  # u8[N, n, P]
    grid: tuple  # (rows, cols), the same for all
    labels: dict  # {attribute: [N names]}


def read_labelled(path, view, limit):
    """The first `limit` labelled images of a folder of shards, centre-cropped.

    Args: view: a config, for its image_size and patch_size.
    Returns: (Labelled, with labels as in `labels_of`; a line that says how many were skipped).
    Raises: ValueError if no sample has a label.
    """
    shards = Shards(str(path))
    view = replace(view, native_area=())  # the centre square for native weights too

    def read(i):
        labels = labels_of(shards.metadata(i))
        if not labels:
            return None
        pixels = evaluation_pixels(open_image(shards.image(i)), view)
        return labels, to_patches(pixels, view.patch_size)

    rows, patches, unlabelled, unreadable = [], [], 0, []
    for _, found in read_or_skip(range(len(shards)), read, shards.name, unreadable):
        if not found:
            unlabelled += 1
            continue
        rows.append(found[0])
        patches.append(found[1])
        if len(rows) == limit:
            break
    skipped = [f"{unlabelled:,} without exactly one label"] if unlabelled else []
    skipped += [f"{len(unreadable)} unreadable, the first: {unreadable[0]}"] if unreadable else []
    skipped = f"; skipped: {', '.join(skipped)}" if skipped else ""
    if not rows:
        raise ValueError(f"{path}: none of its {len(shards)} samples has a label: a sample's .json "
                         'needs "label" or "label_name", or one entry in "objects" (toy scenes)'
                         + skipped)
    if len({tuple(row) for row in rows}) > 1:
        raise ValueError(f"{path} mixes toy scenes and labelled images: probe them separately")
    labels = {name: [row[name] for row in rows] for name in rows[0]}
    return (Labelled(np.stack(patches), fixed_grid(view), labels),
            f"{path}: {len(rows):,} labelled images{skipped}")


def labels_of(metadata):
    """{attribute: name} of one sample, from its .json; empty if it has no label.

    A toy scene with a single object has the four ATTRIBUTES of that object; any other image has
    `label`: the .json's label_name, else its label.
    """
    objects = metadata.get("objects")
    if objects is not None:
        return dict(zip(ATTRIBUTES, objects[0], strict=True)) if len(objects) == 1 else {}
    name = metadata.get("label_name", metadata.get("label"))
    return {} if name is None else {"label": str(name)}


def label_ids(train, test):
    """Names to numbers: {attribute: [names]} of the training and of the test images
    -> {attribute: (train i64[N], test i64[N'], names of the classes)}.

    Raises: ValueError where there is too little to learn from: a single class, a class that only
        test images have, or fewer than two training images per class on average.
    """
    if train.keys() != test.keys():
        raise ValueError(f"training images are labelled with {', '.join(train)}, test images with "
                         f"{', '.join(test)}: both need the same attributes")
    out = {}
    for name in train:
        classes = sorted({*train[name], *test[name]})
        check_classes(name, train[name], classes)
        number = {c: i for i, c in enumerate(classes)}
        ids = [torch.tensor([number[c] for c in names]) for names in (train[name], test[name])]
        out[name] = (*ids, classes)
    return out


def check_classes(name, train, classes):
    """Raise ValueError unless the training labels of an attribute suffice to learn its classes."""
    if len(train) < 2 * len(classes):
        raise ValueError(f"{name}: {len(train)} training images are too few for {len(classes)} "
                         "classes; at least two per class are needed: give more with --data")
    unseen = sorted({*classes} - {*train})
    if unseen:
        raise ValueError(f"{name}: {len(unseen)} classes are among the test images only, the first "
                         f"{unseen[0]!r}; every class needs training images: split the data again")
    if len(classes) == 1:
        raise ValueError(f"{name}: all images are {classes[0]!r}; a probe needs at least two "
                         "classes: give other images with --data")


def random_twin(encoder, seed):
    """The same encoder with fresh weights, as at the start of training: the baseline."""
    with torch.random.fork_rng(devices=[]):
        twin = Encoder(encoder.config)
        torch.manual_seed(seed)
        init_linear_layers(twin)
    return twin


def frozen_features(encoder, images, device="cpu", cache=None):
    """Features of every image: bidirectional, after the final norm.

    Args: images: Labelled; cache: the path of a file, without its ending; None: in memory.
    Returns: f16[N, n, D], mapped from disk if cached (512 KiB per image for L at 224 px).

    The name of the cache file ends with a hash of weights, pixels and settings, so features of
    other weights or images are never read. A new file replaces older ones.
    """
    shape = (*images.patches.shape[:2], encoder.config.embed_dim)
    if not cache:
        return fill_features(np.empty(shape, np.float16), encoder, images, device)
    path = Path(f"{cache}-{features_hash(encoder, images)}.npy")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            mapped = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
            fill_features(mapped, encoder, images, device).flush()
            del mapped  # some systems do not rename a file that is mapped
            for old in path.parent.glob(f"{Path(cache).name}-*.npy"):
                old.unlink()
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def fill_features(features, encoder, images, device):
    """Compute features in chunks of images, into the array `features` f16[N, n, D]; returns it."""
    encoder = encoder.to(device).eval()
    for i in range(0, len(features), CHUNK):
        patches = torch.from_numpy(images.patches[i : i + CHUNK]).to(device)
        grid = torch.tensor([images.grid] * len(patches), device=device)
        features[i : i + CHUNK] = encoder(patches, grid).half().cpu().numpy()
    return features


def features_hash(encoder, images):
    """Hexadecimal digits that change with everything that the features depend on."""
    config = encoder.config
    heads = [block.attn.num_heads for block in encoder.trunk.blocks]
    settings = (VERSION, config.pixel_mean, config.pixel_std, images.grid, images.patches.shape,
                heads)
    key = hashlib.sha256(repr(settings).encode())
    for name, weight in encoder.state_dict().items():
        key.update(name.encode())
        key.update(weight.float().cpu().numpy().tobytes())
    key.update(images.patches)
    return key.hexdigest()[:16]


def mean_features(tokens):
    """f16[N, n, D] -> f32[N, D], in memory."""
    chunks = [tokens[i : i + CHUNK] for i in range(0, len(tokens), CHUNK)]
    return torch.from_numpy(np.concatenate([c.astype(np.float32).mean(axis=1) for c in chunks]))


def probe_encoder(encoder, train, test, settings, cache=None):
    """The three probes of a frozen encoder.

    Args: train, test: Labelled; cache: see `frozen_features`.
    Returns: {method of METHODS: {attribute: `accuracy`}}.
    """
    labels = label_ids(train.labels, test.labels)
    tokens = [frozen_features(encoder, images, settings.device, cache and f"{cache}-{name}")
              for name, images in (("train", train), ("test", test))]
    return three_probes(tokens, [mean_features(part) for part in tokens], labels,
                        encoder.config.num_heads, settings)


def probe_pixels(train, test, view, settings, num_heads):
    """The same without an encoder: the attentive probe gets raw patches, the two others all pixels.

    Args: view: a config, for image_size, patch_size, pixel_mean and pixel_std; num_heads: at most.
    """
    labels = label_ids(train.labels, test.labels)
    num_heads = max(h for h in range(1, num_heads + 1) if view.patch_dim % h == 0)
    vectors = [flat_pixels(images, view) for images in (train, test)]
    return three_probes([train.patches, test.patches], vectors, labels, num_heads, settings)


def three_probes(tokens, vectors, labels, num_heads, settings):
    """The results of all METHODS.

    Args:
        tokens: training and test images for the attentive probe, each u8 or f16 [N, n, D].
        vectors: the same for the two others, each f32[N, D]; labels: of `label_ids`.
    """
    one_token = [part.half()[:, None].numpy() for part in vectors]
    return {"attentive": probe_tokens(*tokens, labels, num_heads, settings),
            "linear": probe_tokens(*one_token, labels, 0, settings),
            "k-NN": knn(*vectors, labels, settings)}


def flat_pixels(images, view):
    """All pixels of each image, at most 64 x 64, standardised: f32[N, 3*side*side]."""
    side = min(PIXEL_SIDE, view.image_size)
    out = []
    for patches in torch.from_numpy(images.patches).split(CHUNK):
        patches = pixels_to_float(patches, view.pixel_mean, view.pixel_std)
        whole = unpatchify(patches, images.grid, view.patch_size)  # [B, 3, H, W]
        out.append(F.adaptive_avg_pool2d(whole, side).flatten(1))
    return torch.cat(out)


def table(rows, chance):
    """The results as lines of text.

    Args: rows: {name: {method: {attribute: `accuracy`}}}; chance: {attribute: share of the
        commonest class}.
    """
    lines = [f"{'top-1 [95%]':<32}" + "".join(f"{name:>22}" for name in chance)]
    for method in METHODS:
        for row, found in rows.items():
            line = f"{method:<10}{row[:21]:<22}"
            for s in found[method].values():
                cell = f"{s['top1']:.3f} [{s['low']:.3f} {s['high']:.3f}]"
                line += f"{cell:>22}"
            lines.append(line)
    shares = "".join(f"{share:>22.3f}" for share in chance.values())
    return [*lines, f"{'always the commonest class':<32}{shares}"]


def main(argv):
    options, settings = read_flags(argv, Options, Settings, doc=__doc__)
    options, settings = Options(**options), Settings(**settings)
    if settings.device == "cpu":
        keep_memory()
    if options.weights:
        encoder = load_encoder(options.weights)
        name = Path(options.weights).name
        data, out = options.data, Path(options.out or f"runs/probe-{name}")
    else:
        encoder = load_model(options.run_dir)[0].encoder
        name = "this run"
        data = options.data or largest_source(encoder.config.data).path
        out = Path(options.out or options.run_dir)
    if not data:
        raise ValueError("--weights alone does not say what to classify: give --data=FOLDER with "
                         f"train/ and {options.test}/ in it")
    view = encoder.config
    train, train_note = read_labelled(Path(data) / "train", view, options.max_images)
    test, test_note = read_labelled(Path(data) / options.test, view, options.max_images)
    print(train_note, test_note, sep="\n")

    twin = random_twin(encoder, settings.seed)
    rows = {name: probe_encoder(encoder, train, test, settings, out / "features/trained"),
            "random weights": probe_encoder(twin, train, test, settings, out / "features/random"),
            "raw pixels": probe_pixels(train, test, view, settings, view.num_heads)}
    chance = {attribute: Counter(names).most_common(1)[0][1] / len(names)
              for attribute, names in test.labels.items()}
    print(*table(rows, chance), sep="\n")
    result = {**asdict(settings), "data": str(data), "train_images": len(train.patches),
              "chance": chance, "rows": rows}
    write_text(out / "probe.json", json.dumps(result, indent=1) + "\n")
    probe_bars(rows, chance, out / "probe.png")
    print(f"written: {out}/probe.json, {out}/probe.png")


if __name__ == "__main__":
    run_command(main)
