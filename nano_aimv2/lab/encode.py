"""Encode: features of images, as numbers and as an image.

    python -m nano_aimv2.lab.encode --weights=runs/toy cat.png dog.jpg  # features/cat.npz, .png, ..
    python -m nano_aimv2.lab.encode --weights=apple/aimv2-large-patch14-native photos/ --area=1024
    python -m nano_aimv2.lab.encode --weights=runs/toy photos/ --joint=true --draw=false

Weights: a run, a folder of published weights, or a repository id (hub.py). Images: files, or
folders of files. Each `.npz` holds `features` f32[rows, cols, D], `grid` i64[2], `mean` f32[D] (of
all patches) and `pixels` u8[H, W, 3] as the model saw them. Each `.png` shows the first three
principal components of the patch features as red, green and blue: patches that look alike to the
encoder have similar colours.

Pipeline: images -> encoder -> **features**. Source of the view: PCA of dense features, as in DINOv2
(arXiv 2304.07193). Lesson: 13.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nano_aimv2.data.batches import evaluation_pixels, pad_patches
from nano_aimv2.data.images import STILL_FORMATS, open_image, read_or_skip, resize, upright_size
from nano_aimv2.flags import check_at_least, read_flags, run_command
from nano_aimv2.hub import load_encoder
from nano_aimv2.lab.plots import components_page
from nano_aimv2.native_res import best_grid
from nano_aimv2.training.distributed import choose_device

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LEAST_AREA = 16  # patches: smaller images are enlarged to this
DEFAULT_AREA = 1024  # patches per image with native weights, without --area
SHEET = 16  # images on the joint sheet, at most


@dataclass
class Options:
    files: tuple = ()  # images, or folders of images
    weights: str = ""  # a run, a folder of published weights, or a repository id
    out: str = "features"  # folder to write to
    area: int = 0  # native weights: at most this many patches per image; 0: as trained, up to 1024
    batch_size: int = 8  # images of one grid that are encoded together
    draw: bool = True  # write NAME.png too
    joint: bool = False  # write joint.png too: one principal component analysis over all images
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        if not self.weights:
            raise ValueError("no weights: give --weights=RUN, a folder of published weights, or a "
                             "repository id")
        if not self.files:
            raise ValueError("no images: name files, or folders of files, behind the flags")
        if self.area < 0 or self.area == 1:
            raise ValueError(f"--area={self.area} must be at least 2 patches (or 0: the default)")
        check_at_least(self, batch_size=1)


def find_images(names):
    """Files, and the image files of folders, as {output name: path}.

    Raises: ValueError if a folder has none, or if two would be written under one name.
    """
    found = {}
    for name in map(Path, names):
        paths = [name]
        if name.is_dir():
            paths = sorted(path for path in name.iterdir() if path.suffix.lower() in EXTENSIONS)
        if not paths:
            raise ValueError(f"folder {name} has no image files: give files that end in "
                             f"{', '.join(EXTENSIONS)}")
        for path in paths:
            if found.setdefault(path.stem, path) != path:
                raise ValueError(f"{found[path.stem]} and {path} would both be written as "
                                 f"{path.stem}.npz: encode each with an --out of its own")
    return found


def default_area(config):
    """The `area` of `read_pixels` that suits weights: as trained, up to DEFAULT_AREA, or 0."""
    return min(DEFAULT_AREA, int(2 ** config.native_area[1])) if config.native_area else 0


def read_pixels(path, config, area):
    """An image as the model sees it: the fixed view, or (area > 0) the whole image at its own
    aspect ratio within `area` patches.

    Returns: u8[rows*p, cols*p, 3]. An image of fewer patches is not enlarged beyond LEAST_AREA.
    """
    image = open_image(path, STILL_FORMATS)
    if not area:
        return evaluation_pixels(image, config)
    p, (width, height) = config.patch_size, upright_size(image)
    own_area = max(LEAST_AREA, width * height // p**2)
    rows, cols = best_grid(width, height, max(2, min(area, own_area)))
    return resize(image, (cols * p, rows * p))


@torch.inference_mode()
def encode(encoder, images, device="cpu"):
    """Features of images of one size: list of u8[H, W, 3] -> f32[B, rows, cols, D]."""
    patches, grid = pad_patches(images, encoder.config.patch_size)
    features = encoder(patches.to(device), grid.to(device))
    return features.float().unflatten(1, grid[0].tolist()).cpu().numpy()


class Components:
    """The first three principal components of vectors that come in parts: `add(f[n, D])` for each
    part, then `projection()`."""

    def __init__(self):
        self.count, self.sum, self.products = 0, 0.0, 0.0

    def add(self, features):
        x = features.reshape(-1, features.shape[-1]).astype(np.float64)
        self.count += len(x)
        self.sum = self.sum + x.sum(axis=0)
        self.products = self.products + x.T @ x

    def fit(self):
        """(mean f64[D], axes f64[D, 3] of length 1). An axis has no sign of its own: here its entry
        of the largest magnitude is positive."""
        mean = self.sum / self.count
        covariance = self.products / self.count - np.outer(mean, mean)
        axes = np.linalg.eigh(covariance)[1][:, :-4:-1]  # eigenvalues ascend: the last three
        largest = np.abs(axes).argmax(axis=0)[None]
        return mean, axes * np.sign(np.take_along_axis(axes, largest, axis=0))

    def projection(self):
        """The function f[..., D] -> f[..., 3]."""
        mean, axes = self.fit()
        return lambda features: (features - mean) @ axes


def to_colours(projected):
    """Projections of one or more images, each f[rows, cols, 3] -> the same in 0..1: percentiles 1
    and 99 of all of them become 0 and 1."""
    flat = np.concatenate([one.reshape(-1, 3) for one in projected])
    low, high = np.percentile(flat, (1, 99), axis=0)
    return [((one - low) / np.maximum(high - low, 1e-12)).clip(0, 1) for one in projected]


def encode_files(encoder, files, options, area, device):
    """Write the .npz of every readable image.

    Args: files: {output name: path}; area: see `read_pixels`.
    Returns: (output names written, lines that name each skipped file and the reason).
    """
    waiting, written, skipped = {}, set(), []  # waiting: {shape: [(name, pixels)]}

    def write(group):
        found = encode(encoder, [pixels for _, pixels in group], device)
        for (name, pixels), features in zip(group, found, strict=True):
            np.savez(Path(options.out, f"{name}.npz"), features=features, pixels=pixels,
                     grid=np.array(features.shape[:2]), mean=features.mean(axis=(0, 1)))
            written.add(name)

    readable = read_or_skip(files.items(), lambda item: read_pixels(item[1], encoder.config, area),
                            lambda item: item[1], skipped)
    for (name, _), pixels in readable:
        group = waiting.setdefault(pixels.shape, [])
        group.append((name, pixels))
        if len(group) == options.batch_size:
            write(waiting.pop(pixels.shape))
    for group in waiting.values():
        write(group)
    return [name for name in files if name in written], skipped


def read_features(folder, name):
    """(pixels, features) of one .npz."""
    with np.load(Path(folder, f"{name}.npz")) as file:
        return file["pixels"], file["features"]


def draw_components(names, options):
    """Draw the images that `options` asks for, beside the .npz files."""
    out, joint = Path(options.out), Components()
    for name in names:
        pixels, features = read_features(out, name)
        if options.joint:
            joint.add(features)
        if options.draw:
            own = Components()
            own.add(features)
            colours = to_colours([own.projection()(features)])[0]
            components_page([(pixels, colours, name)], out / f"{name}.png")
    if options.joint:
        names, project = names[:SHEET], joint.projection()
        pixels, features = zip(*(read_features(out, name) for name in names), strict=True)
        colours = to_colours([project(one) for one in features])
        components_page(list(zip(pixels, colours, names, strict=True)), out / "joint.png")


def main(argv):
    options = Options(**read_flags(argv, Options, doc=__doc__, words="files")[0])
    files = find_images(options.files)
    device = choose_device(options.device)
    encoder = load_encoder(options.weights).to(device)
    config = encoder.config
    if options.area and config.positions == "learned":
        raise ValueError(f"--area={options.area}: {options.weights} has learned positions, which "
                         f"fit images of {config.image_size} px only: leave --area out, or use "
                         "native weights")
    area = options.area or default_area(config)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    written, skipped = encode_files(encoder, files, options, area, device)
    for line in skipped:
        print(f"encode: skipped {line}", file=sys.stderr)
    if not written:
        raise ValueError(f"none of {len(files)} images could be read: give whole JPEG, PNG or WebP "
                         "files")
    draw_components(written, options)
    plural, note = "s" * (len(written) > 1), f", {len(skipped)} skipped" if skipped else ""
    print(f"{len(written)} image{plural} encoded into {options.out}{note}")


if __name__ == "__main__":
    run_command(main)
