"""Sizes: finished runs measured over resolutions and aspect ratios, all on the same pixels.

    python -m nano_aimv2.lab.sizes --run_dir=runs/toy,runs/toy-native --sizes=36,48,72,96 \\
        --data=data/scenes_native:synthetic

Writes a table (.md), its rows (.json) and a figure (.png).

Source: paper Table 6. Lesson: 14.
"""

import itertools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from nano_aimv2.data.batches import capped
from nano_aimv2.data.images import upright_size
from nano_aimv2.data.mixture import open_sources
from nano_aimv2.files import write_text
from nano_aimv2.flags import read_flags, run_command
from nano_aimv2.lab.plots import size_curves
from nano_aimv2.training.checkpoint import load_model
from nano_aimv2.training.distributed import choose_device, single_process
from nano_aimv2.training.evaluate import Evaluation, held_out_sources

# Longer side to shorter side, above the first bound and up to the second
SHAPES = {"up to 4:3": (0, 4 / 3), "4:3 to 2:1": (4 / 3, 2), "beyond 2:1": (2, math.inf)}


@dataclass
class Options:
    run_dir: str = ""  # finished runs, with commas between
    sizes: str = ""  # pixels, as 48,72,96: an image gets the area of a square of this side
    data: str = ""  # held-out images as path:caption-kind; empty: the first run's own
    images: int = 256  # images of each shape
    device: str = "auto"  # auto, cpu, cuda or mps
    out: str = ""  # where to write .json, .md and .png; empty: FIRST-RUN/sizes


def across_sizes(runs, sizes, source, count, device="cpu"):
    """Measure finished runs on images of many sizes and shapes.

    Every run sees the same pixels: each image whole, at its own aspect ratio, on the grid that best
    fills the area of a square of `size` pixels; a learned position table is resized to it.

    Args: runs: folders; sizes: pixels; source: held-out Source; count: at most so many images of
        each of SHAPES.
    Returns: [{run, size, shape, images, loss_text, loss_image, caption_exact, ...}].
    Raises: ValueError if a size is not a multiple of a run's patch size, or no image is readable.
    """
    skipped, rows = {}, []  # a dict: each line is said once
    for run in runs:
        model, config, tokenizer = load_model(run, device)
        runtime = single_process(device)
        for size, (name, (low, high)) in itertools.product(sizes, SHAPES.items()):
            # A view of the data, not of the model
            view = replace(config, image_size=size, native_area=(1.0, 16.0), positions="sincos")
            evaluation = Evaluation(
                source, view, tokenizer, count, one_grid=True,
                accept=lambda image, low=low, high=high: low < side_ratio(image) <= high)
            skipped |= dict.fromkeys(evaluation.skipped)
            if not evaluation.captions:  # no image of this shape
                continue
            text, image = evaluation.losses(model, runtime)
            scores = evaluation.caption_scores(model, runtime)
            rows.append(dict(run=Path(run).name, size=size, shape=name,
                             images=len(evaluation.captions), loss_text=text, loss_image=image,
                             **scores))
    for line in capped(list(skipped)):
        print(f"skipped: {line}")
    if not rows:
        raise ValueError(f"{source.path}: none of its {len(source)} samples has a readable image: "
                         "give others with --data=PATH:KIND")
    return rows


def side_ratio(image):
    """Longer side of an image divided by its shorter side."""
    width, height = upright_size(image)
    return max(width, height) / min(width, height)


def as_table(rows):
    """Rows of `across_sizes` as a Markdown table."""
    columns = [name for name in rows[0] if name not in ("run", "size", "shape", "images")]
    lines = ["| run | size, px | shape | images | " + " | ".join(columns) + " |",
             "|---" * (4 + len(columns)) + "|"]
    for row in rows:
        numbers = " | ".join(f"{row[name]:.3f}" for name in columns)
        lines.append(f"| {row['run']} | {row['size']} | {row['shape']} | {row['images']} | "
                     f"{numbers} |")
    return "\n".join(lines)


def whole_numbers(name, text, example):
    """'48,72' -> [48, 72]. Raises ValueError that names the flag and shows an example."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name}={text} must be whole numbers with commas between, such as "
                         f"{example}") from None


def main(argv):
    options = Options(**read_flags(argv, Options, doc=__doc__)[0])
    runs = [run for run in options.run_dir.split(",") if run]
    if not runs:
        raise ValueError("no run: give --run_dir=RUN,RUN,..")
    sizes = whole_numbers("sizes", options.sizes, "48,72,96")
    configs = [load_model(run)[1] for run in runs]
    if options.data:
        sources = {"val": open_sources(options.data, "val")[0]}
    else:
        sources = held_out_sources(configs[0])
    if not sources:
        raise ValueError(f"{configs[0].data} has no val folder: give images with --data=PATH:KIND")
    rows = across_sizes(runs, sizes, sources["val"], options.images, choose_device(options.device))
    out = options.out or f"{runs[0]}/sizes"
    table = as_table(rows)
    print(table)
    write_text(f"{out}.md", table + "\n")
    write_text(f"{out}.json", json.dumps(rows, indent=1) + "\n")
    own_sizes = {Path(run).name: config.image_size
                 for run, config in zip(runs, configs, strict=True) if not config.native_area}
    size_curves(rows, own_sizes, f"{out}.png")
    print(f"written: {out}.md, {out}.json, {out}.png")


if __name__ == "__main__":
    run_command(main)
