"""Toy scenes: small colour images with exact captions, drawn from a seed.

One to three objects (shape x colour x size) stand in different quarters of a textured two-colour
gradient. Every scene has a short noisy alt-text, like those on the web, a dense caption of
everything in it, like those of a captioning model, and the same facts in another wording:

    alt-text    "red star.jpg"
    synthetic   "top left a large red star, bottom right a small blue ring"
    terse       "star: red, large, top left; ring: blue, small, bottom right"

With `--subsets=true` a scene also has one caption for each of the 16 subsets of place, size, colour
and shape, which names these and nothing else. Its kind lists them, in this order:

    names_place_colour              "top left a red object, bottom right a blue object"
    names_shape                     "a ring, a star"
    names_none                      "two objects"
    names_place_size_colour_shape   the synthetic caption

Without places the objects come in alphabetical order, since reading order would tell where they
are.

Eight of the 64 shape-colour pairs are *novel*: they never occur in `train` and `val`, and every
scene of the split `novel` has one of them. A model that names them has composed, not remembered.

    python data/scenes.py --out=data/scenes --train=20000       # train.py does this for the toy run

Two further sets (SETS) are for post-training: the same scenes drawn larger, and drawn in mixed
sizes and shapes. The words keep their meaning: a place is a quarter of the image, and "large" and
"small" are relative to its short side. So a caption is as true of a panorama as of a square.
"""

import contextlib
import io
import itertools
import math
import multiprocessing
import os
import sys
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the script finds the package
from nano_aimv2.data.shards import ShardWriter  # noqa: E402
from nano_aimv2.files import replacing  # noqa: E402
from nano_aimv2.flags import check_at_least, read_flags, run_command  # noqa: E402

COLOURS = {"red": (220, 30, 35), "orange": (250, 140, 10), "yellow": (250, 225, 40),
           "green": (30, 160, 50), "cyan": (40, 205, 225), "blue": (30, 60, 210),
           "purple": (130, 40, 170), "pink": (250, 130, 190)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
SIZES = {"small": (0.125, 0.145), "large": (0.20, 0.225)}  # radius, as a fraction of the short side
PLACES = {"top left": (0.25, 0.25), "top right": (0.75, 0.25),
          "bottom left": (0.25, 0.75), "bottom right": (0.75, 0.75)}  # (x, y) of the centre
ATTRIBUTES = ("place", "size", "colour", "shape")  # of an object, in this order
SPLITS = ("train", "val", "novel")
# Each shape once, each colour once
NOVEL_PAIRS = tuple((shape, list(COLOURS)[(3 * i + 1) % 8]) for i, shape in enumerate(SHAPES))
SEEN_PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS
                   if (shape, colour) not in NOVEL_PAIRS)
# What train.py draws on first use: folder -> arguments of make_scenes. There are fewer of the
# larger images, to save time.
SETS = {"data/scenes": {}, "data/scenes_highres": {"train": 10_000, "size": 96},
        "data/scenes_native": {"train": 10_000, "size": 96, "aspect": 3.0}}
FEW = 1000  # scenes: about a second
OVERSAMPLING = 4  # masks are drawn this many times larger and averaged: smooth edges


@dataclass
class Options:
    out: str = "data/scenes"  # folder to write; must not exist yet
    train: int = 20_000  # training scenes
    val: int = 512  # held-out scenes
    novel: int = 512  # held-out scenes, each with a novel pair
    size: int = 48  # pixels per side
    seed: int = 0  # random seed
    aspect: float = 1.0  # above 1: mixed sizes, width / height from 1 / aspect to aspect
    subsets: bool = False  # also a caption for each subset of the attributes

    def __post_init__(self):
        check_at_least(self, train=0, val=0, novel=0, size=1, seed=0, aspect=1)


@cache
def outline(shape):
    """Corner points f64[K, 2] of a shape of about radius 1 around the origin, y downwards."""
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t) - 13 * np.cos(t)
        return np.stack([x, y], axis=1) / 15
    if shape == "cross":
        w = 0.36
        arm = np.array([(-w, -w), (-w, -1), (w, -1)])  # the arm that points up, then rotated copies
        return 1.1 * np.concatenate([rotate(arm, k * np.pi / 2) for k in range(4)])
    # Corners, radius and first angle; 40 corners look like a circle
    corners = {"square": (4, 1.1, np.pi / 4), "triangle": (3, 1.2, -np.pi / 2),
               "star": (10, 1.25, -np.pi / 2)}
    count, radius, start = corners.get(shape, (40, 1.0, 0.0))
    angle = start + np.arange(count) * 2 * np.pi / count
    radius = np.where(np.arange(count) % 2, 0.5, radius) if shape == "star" else radius
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def rotate(points, angle):
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s], [-s, c]])


def draw_background(width, height, rng):
    """A two-colour gradient with stripes and grain, muted so that objects stand out:
    f64[height, width, 3] in 0..255."""
    x, y = np.arange(width) / width - 0.5, (np.arange(height) / height - 0.5)[:, None]
    first, second = rng.uniform(60, 195, (2, 1)) + rng.uniform(-40, 40, (2, 3))
    angle, steepness = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1.1)
    t = np.clip(0.5 + steepness * (np.cos(angle) * x + np.sin(angle) * y), 0, 1)
    angle, waves, phase = rng.uniform(0, 2 * np.pi), rng.uniform(25, 60), rng.uniform(0, 2 * np.pi)
    texture = rng.uniform(0, 9) * np.sin(waves * (np.cos(angle) * x + np.sin(angle) * y) + phase)
    texture += rng.normal(0, 4, (height, width))
    return first + t[..., None] * (second - first) + texture[..., None]


def draw_object(image, place, size, colour, shape, rng):
    """Paint one object into `image` f64[H, W, 3]. Its exact position, radius, rotation and colour
    are drawn from what the words allow."""
    height, width = image.shape[:2]
    radius = rng.uniform(*SIZES[size]) * min(width, height)
    x, y = (np.array(PLACES[place]) + rng.uniform(-0.04, 0.04, 2)) * (width, height)
    angle, k = rng.uniform(-0.3, 0.3), OVERSAMPLING
    reach = int(1.4 * radius) + 1  # the mask covers a square around the object only
    left, top = int(x) - reach, int(y) - reach
    centre = np.array([x - left, y - top])
    mask = Image.new("L", (2 * reach * k,) * 2)
    pen = ImageDraw.Draw(mask)
    points = rotate(outline(shape), angle) * radius
    pen.polygon(((points + centre) * k).ravel().tolist(), fill=255)
    if shape == "ring":
        pen.polygon(((points * 0.55 + centre) * k).ravel().tolist(), fill=0)
    if shape == "moon":
        bite = rotate(np.array([[0.55, 0.0]]), angle) * radius
        pen.polygon(((points * 0.85 + bite + centre) * k).ravel().tolist(), fill=0)
    alpha = np.asarray(mask.reduce(k))[..., None] / 255.0
    rgb = np.array(COLOURS[colour]) + rng.normal(0, 12, 3)
    box = slice(max(0, top), top + 2 * reach), slice(max(0, left), left + 2 * reach)
    alpha = alpha[max(0, -top) :, max(0, -left) :][: image[box].shape[0], : image[box].shape[1]]
    image[box] += alpha * (rgb - image[box])


def draw_objects(split, rng):
    """What is in a scene: [(place, size, colour, shape)] in reading order."""
    count = rng.integers(1, 4)
    places = np.sort(rng.permutation(len(PLACES))[:count])
    pairs = [SEEN_PAIRS[i] for i in rng.integers(len(SEEN_PAIRS), size=count)]
    if split == "novel":
        pairs[rng.integers(count)] = NOVEL_PAIRS[rng.integers(len(NOVEL_PAIRS))]
    sizes = [list(SIZES)[i] for i in rng.integers(len(SIZES), size=count)]
    return [(list(PLACES)[place], size, colour, shape)
            for place, size, (shape, colour) in zip(places, sizes, pairs, strict=True)]


def dense_caption(objects):
    """A caption of every object: 'top left a large red star, bottom right a small blue ring'."""
    return ", ".join(f"{place} a {size} {colour} {shape}" for place, size, colour, shape in objects)


def terse_caption(objects):
    """The facts of the dense caption in another wording: 'star: red, large, top left; ..'."""
    return "; ".join(f"{shape}: {colour}, {size}, {place}"
                     for place, size, colour, shape in objects)


def subset_caption(objects, named):
    """A caption of the attributes in `named` and nothing else: 'top left a red object, ..'."""
    if not named:
        return ("one object", "two objects", "three objects")[len(objects) - 1]
    phrases = []
    for values in objects:
        words = {a: word for a, word in zip(ATTRIBUTES, values, strict=True) if a in named}
        place, noun = words.pop("place", ""), words.pop("shape", "object")
        thing = " ".join([*words.values(), noun])
        article = "an" if thing[0] in "aeiou" else "a"
        phrases.append(f"{place} {article} {thing}".strip())
    return ", ".join(phrases if "place" in named else sorted(phrases))


def subset_captions(objects):
    """{caption kind: caption} of all 16 subsets of ATTRIBUTES."""
    subsets = itertools.chain.from_iterable(
        itertools.combinations(ATTRIBUTES, count) for count in range(len(ATTRIBUTES) + 1))
    return {f"names_{'_'.join(named) or 'none'}": subset_caption(objects, named)
            for named in subsets}


def alt_text(objects, rng):
    """A caption like those on the web: a word or two about one object, a file name, or nothing
    useful."""
    _, size, colour, shape = objects[rng.integers(len(objects))]
    forms = (shape, f"{colour} {shape}", f"{colour} thing", f"{size} {shape}", f"{shape}.jpg",
             f"my {shape} drawing", f"IMG_{rng.integers(10000):04d}", f"{colour} and more",
             f"picture of {shape}s", "shapes :)")
    return forms[rng.integers(len(forms))]


def draw_extent(size, aspect, rng):
    """(width, height) of a scene, in pixels: size x size if aspect is 1, without using `rng`.
    Otherwise an area from a quarter of size x size to all of it, and width / height log-uniform on
    [1 / aspect, aspect]."""
    if aspect == 1:
        return size, size
    side = size * rng.uniform(0.5, 1)
    ratio = math.exp(rng.uniform(-math.log(aspect), math.log(aspect)))
    return round(side * ratio**0.5), round(side / ratio**0.5)


def make_scene(split, index, size=48, seed=0, aspect=1.0):
    """Scene `index` of a split: (pixels u8[height, width, 3], alt-text, dense caption, objects).

    The objects depend on (split, index, seed) only, so a held-out scene is held out at every size.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    objects = draw_objects(split, rng)
    image = draw_background(*draw_extent(size, aspect, rng), rng)
    for place, extent, colour, shape in objects:
        draw_object(image, place, extent, colour, shape, rng)
    pixels = image.round().clip(0, 255).astype(np.uint8)
    return pixels, alt_text(objects, rng), dense_caption(objects), objects


def encoded_scene(address, subsets=False):
    """(split, index, size, seed, aspect) -> (key, PNG bytes, alt-text, metadata).

    Args: subsets: whether the metadata has the captions of `subset_captions` too.
    """
    pixels, alt, dense, objects = make_scene(*address)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    metadata = {"synthetic": [dense], "terse": terse_caption(objects), "objects": objects}
    if subsets:
        metadata |= subset_captions(objects)
    return f"{address[0]}_{address[1]:06d}", file.getvalue(), alt, metadata


def make_scenes(out, train=20_000, val=512, novel=512, size=48, seed=0, aspect=1.0,
                subsets=False):
    """Write the three splits as shards into the new folder `out`.

    A run that fails or is interrupted leaves nothing under the name `out`. Few scenes are drawn in
    less time than other processes need to start.

    Raises: ValueError if `out` exists.
    """
    if Path(out).exists():
        raise ValueError(f"{out} exists: choose another --out, or delete it first")
    counts = dict(zip(SPLITS, (train, val, novel), strict=True))
    total = sum(counts.values())
    context, processes = multiprocessing.get_context("spawn"), min(8, os.cpu_count() or 1)
    with (replacing(Path(out)) as temporary,
          context.Pool(processes) if total > FEW else contextlib.nullcontext() as pool,
          tqdm(total=total, unit="scene", desc=f"drawing {out}", disable=None) as bar):
        for split, count in counts.items():
            with ShardWriter(temporary / split) as writer:
                addresses = ((split, i, size, seed, aspect) for i in range(count))
                encode = partial(encoded_scene, subsets=subsets)
                scenes = pool.imap(encode, addresses, 64) if pool else map(encode, addresses)
                for scene in scenes:
                    key, image, alt, metadata = scene
                    writer.write(key, image, "png", alt, metadata)
                    bar.update()


def main(argv):
    make_scenes(**vars(Options(**read_flags(argv, Options, doc=__doc__)[0])))


if __name__ == "__main__":
    run_command(main)
