"""Encode: features of pictures, as numbers and as a picture.

    python -m nano_aimv2.encode --weights=runs/toy cat.png dog.jpg            # features/cat.npz and features/cat.png, ...
    python -m nano_aimv2.encode --weights=apple/aimv2-large-patch14-native photos/ --area=1024 --joint=true
    python -m nano_aimv2.encode --weights=runs/toy photos/ --out=features --pictures=false

Weights: a run of ours, a folder of published weights, or a repository id (hub.py). Pictures: files, or folders of files.
Each `.npz` holds `features` f32[rows, cols, D], `grid` i64[2], `mean` f32[D] (pooled over the patches) and `pixels`
u8[H, W, 3] as the model saw them. Each `.png` shows the first three principal components of the patch features as red,
green and blue: patches of one colour look alike to the encoder.

Way: pictures -> encoder -> **features**. Source of the view: PCA of dense features, as in DINOv2 (arXiv 2304.07193).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nano_aimv2 import distributed
from nano_aimv2.config import read_flags
from nano_aimv2.data import evaluation_pixels, to_patches
from nano_aimv2.hub import load_encoder
from nano_aimv2.images import open_image, resize, upright_size
from nano_aimv2.native_res import best_grid
from nano_aimv2.patchify import pixels_to_float

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LEAST_AREA = 16  # patches: a smaller picture is enlarged to it
DEFAULT_AREA = 1024  # patches of a picture in native weights, unless --area says otherwise
SHEET = 16  # pictures on the joint sheet, at most


@dataclass
class Options:
    weights: str = ""  # a run, a folder of published weights, or a repository id
    out: str = "features"  # folder to write into
    area: int = 0  # native weights: patches of a picture, at most; 0: 1024, or what the weights were trained on
    batch_size: int = 8  # pictures of one grid that are encoded together
    pictures: bool = True  # write NAME.png too
    joint: bool = False  # write joint.png too: one principal component analysis over all pictures
    device: str = "auto"  # auto, cpu, cuda or mps


def read_options(argv):
    """`--key=value` flags and picture names -> (Options, names). Raises ValueError on anything else."""
    options, names = read_flags(Options, argv)
    if not options.weights:
        raise ValueError("no weights: give --weights=RUN, a folder of published weights, or a repository id")
    if not names:
        raise ValueError("no pictures: name files or folders of files behind the flags")
    if options.area < 0 or options.area == 1:
        raise ValueError(f"--area={options.area} must be at least 2 patches (or 0: as the weights were trained)")
    if options.batch_size < 1:
        raise ValueError(f"--batch_size={options.batch_size} must be at least 1")
    return options, names


def find_pictures(names):
    """Files and the picture files of folders, as {output name: path}.

    Raises: ValueError if a folder has none, or if two would be written under one name.
    """
    found = {}
    for name in map(Path, names):
        paths = sorted(p for p in name.iterdir() if p.suffix.lower() in ENDINGS) if name.is_dir() else [name]
        if not paths:
            raise ValueError(f"folder {name} holds no picture ({', '.join(ENDINGS)})")
        for path in paths:
            if found.setdefault(path.stem, path) != path:
                raise ValueError(f"{found[path.stem]} and {path} would both be written as {path.stem}.npz: encode them apart, "
                                 "each with its own --out")
    return found


def read_pixels(path, config, area):
    """A picture as the model sees it: the fixed view, or (area > 0) its own proportions within `area` patches.

    Returns: u8[rows*p, cols*p, 3]. A picture smaller than `area` patches is not enlarged beyond LEAST_AREA.
    """
    image = open_image(path)
    if not area:
        return evaluation_pixels(image, config)
    p, (width, height) = config.patch_size, upright_size(image)
    rows, cols = best_grid(width, height, max(2, min(area, max(LEAST_AREA, width * height // p**2))))
    return resize(image, (cols * p, rows * p))


@torch.inference_mode()
def encode(encoder, pixels, device="cpu"):
    """Features of pictures of one size: list of u8[H, W, 3] -> f32[B, rows, cols, D]."""
    config = encoder.config
    rows, cols = (side // config.patch_size for side in pixels[0].shape[:2])
    patches = torch.from_numpy(np.stack([to_patches(one, config.patch_size) for one in pixels])).to(device)
    grid = torch.tensor([(rows, cols)] * len(pixels), device=device)
    features = encoder(pixels_to_float(patches, config.pixel_mean, config.pixel_std), grid)
    return features.float().unflatten(1, (rows, cols)).cpu().numpy()


class Components:
    """The first three principal components of vectors that come in parts: `add(f[n, D])`, then `projection()`."""

    def __init__(self):
        self.count, self.sum, self.products = 0, 0.0, 0.0

    def add(self, features):
        x = features.reshape(-1, features.shape[-1]).astype(np.float64)
        self.count, self.sum, self.products = self.count + len(x), self.sum + x.sum(0), self.products + x.T @ x

    def fit(self):
        """mean f64[D], axes f64[D, 3], of unit length, the largest entry of each positive: no sign is left to chance."""
        mean = self.sum / self.count
        axes = np.linalg.eigh(self.products / self.count - np.outer(mean, mean))[1][:, :-4:-1]
        return mean, axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0))

    def projection(self):
        """The function f[..., D] -> f[..., 3]."""
        mean, axes = self.fit()
        return lambda features: (features - mean) @ axes


def to_colours(projected):
    """Projections of one or many pictures, each f[rows, cols, 3] -> the same in 0..1: percentiles 1 and 99 become 0 and 1."""
    flat = np.concatenate([one.reshape(-1, 3) for one in projected])
    low, high = np.percentile(flat, (1, 99), axis=0)
    return [((one - low) / np.maximum(high - low, 1e-12)).clip(0, 1) for one in projected]


def encode_files(encoder, pictures, options, area, device):
    """Write the .npz of every readable picture; returns (names written, names with the reason left out)."""
    out, waiting, written, skipped = Path(options.out), {}, [], {}

    def flush(shape):
        names, pixels = zip(*waiting.pop(shape), strict=True)
        for name, one, features in zip(names, pixels, encode(encoder, pixels, device), strict=True):
            np.savez(out / f"{name}.npz", features=features, grid=np.array(features.shape[:2]), mean=features.mean((0, 1)),
                     pixels=one)
            written.append(name)

    for name, path in pictures.items():
        try:
            pixels = read_pixels(path, encoder.config, area)
        except FileNotFoundError:
            skipped[str(path)] = "there is no such file"
            continue
        except Exception as error:  # decoders fail in many ways
            skipped[str(path)] = f"cannot be read ({type(error).__name__}: {error})"
            continue
        waiting.setdefault(pixels.shape, []).append((name, pixels))
        if len(waiting[pixels.shape]) == options.batch_size:
            flush(pixels.shape)
    for shape in list(waiting):
        flush(shape)
    return sorted(written, key=list(pictures).index), skipped


def draw(out, names, options):
    """The pictures beside the .npz files."""
    from nano_aimv2.plots import components_page

    def read(name):
        with np.load(out / f"{name}.npz") as file:
            return file["pixels"], file["features"]

    joint = Components()
    for name in names:
        pixels, features = read(name)
        if options.joint:
            joint.add(features)
        if options.pictures:
            own = Components()
            own.add(features)
            components_page([(pixels, to_colours([own.projection()(features)])[0], name)], out / f"{name}.png")
    if options.joint:
        project = joint.projection()
        shown = [(*read(name), name) for name in names[:SHEET]]
        colours = to_colours([project(features) for _, features, _ in shown])
        components_page([(pixels, colour, name) for (pixels, _, name), colour in zip(shown, colours, strict=True)],
                        out / "joint.png")


def main(argv):
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
        return
    options, names = read_options(argv)
    pictures = find_pictures(names)
    device = distributed.choose_device(options.device)
    encoder = load_encoder(options.weights).to(device)
    config = encoder.config
    if options.area and config.positions == "learned":
        raise ValueError(f"--area={options.area}: {options.weights} knows one size, {config.image_size} px (learned "
                         "positions): leave --area out, or take native weights")
    area = options.area or (min(DEFAULT_AREA, int(2 ** config.native_area[1])) if config.native_area else 0)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    written, skipped = encode_files(encoder, pictures, options, area, device)
    for path, reason in skipped.items():
        print(f"encode: left out: {path} {reason}", file=sys.stderr)
    if not written:
        raise ValueError(f"no picture could be read of {len(pictures)} asked for: give whole JPEG, PNG or WebP files")
    draw(out, written, options)
    left_out = f", {len(skipped)} left out" if skipped else ""
    print(f"{len(written)} picture{'s' * (len(written) > 1)} encoded into {out}{left_out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"encode: {error}")
