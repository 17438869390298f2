"""Evaluate: losses on held-out pairs under prefixes from a fixed seed, and how many greedy captions are right.

With full attention no image target is left (and a released trainer reports 0/0): validation draws prefixes like training
does, always the same ones.

As a command it measures finished runs over resolutions and aspect ratios, all on the same pixels:

    python -m nano_aimv2.evaluate --run=runs/toy,runs/toy-native --sizes=36,48,72,96 --data=data/scenes_native:synthetic

Source: paper Table 6. Lessons: 08, 11.
"""

import argparse
import itertools
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

from nano_aimv2 import distributed
from nano_aimv2.checkpoint import load_model
from nano_aimv2.data import collate, open_sources, parse_mixture, pick_caption, read_in_order
from nano_aimv2.generate import caption
from nano_aimv2.images import open_image, upright_size
from nano_aimv2.prefix_mask import step_prefix_len

EVAL_SEED = 20_241_121
# Longer side to shorter side, above the first bound and up to the second
SHAPES = {"up to 4:3": (0, 4 / 3), "4:3 to 2:1": (4 / 3, 2), "beyond 2:1": (2, math.inf)}


class Evaluation:
    """Held-out images in memory, `count` of a source, read once.

    `batches` of Batch; `captions` as they are written; `label_names` from the metadata (None where there are none).
    accept: passes over images, see `read_in_order`. one_grid: sort the images, so that each batch has a single grid, which
    is all that a learned position table can be resized to.
    """

    def __init__(self, source, config, tokenizer, count, batch_size=64, accept=None, one_grid=False):
        self.config, self.tokenizer = config, tokenizer
        images, ids, samples, self.skipped = read_in_order(source, config, tokenizer, count, accept)
        if not samples:
            raise ValueError(f"{source.path}: none of its {len(source.shards)} samples has a readable image and a "
                             f"{source.kind} caption" + (f", the last: {self.skipped[-1]}" if self.skipped else "")
                             + "; for another caption kind write --data=PATH:alt:1 or PATH:synthetic:1")
        grids = [(pixels.shape[0] // config.patch_size, pixels.shape[1] // config.patch_size) for pixels in images]
        order = sorted(range(len(images)), key=grids.__getitem__) if one_grid else range(len(images))
        self.batches = []
        for _, group in itertools.groupby(order, key=lambda k: one_grid and grids[k]):
            group = list(group)
            for i in range(0, len(group), batch_size):
                part = group[i : i + batch_size]
                area = max(math.prod(grids[k]) for k in part)
                self.batches.append(collate([images[k] for k in part], [ids[k] for k in part], area, config.patch_size,
                                            slice(0, len(part)), len(part)))
        self.captions = [pick_caption(source, samples[k]) for k in order]
        self.label_names = [source.shards.metadata(samples[k]).get("label_name") for k in order]

    @torch.no_grad()
    def losses(self, model, runtime):
        """(text loss in nats a token, image loss) of the whole set, every rank doing its rows of every batch."""
        sums = [0.0] * 4
        for i, batch in enumerate(self.batches):
            prefix_len = step_prefix_len(batch.grid.prod(dim=1), EVAL_SEED, i, batch.rows, batch.global_size)
            mine = rows_of_rank(batch, runtime)
            with runtime.autocast():
                out = model(batch.map(lambda t, mine=mine: t[mine]).to(runtime.device), prefix_len[mine].to(runtime.device))
            for k, value in enumerate((out.text_sum, out.text_count, out.image_sum, out.image_count)):
                sums[k] += float(value)
        text_sum, text_count, image_sum, image_count = runtime.sum(*sums)
        return text_sum / text_count, image_sum / image_count

    @torch.no_grad()
    def greedy(self, model, runtime):
        """The greedy caption of every image, as text, by one process alone."""
        texts = []
        for batch in self.batches:
            with runtime.autocast():
                found = caption(model, batch.patches.to(runtime.device), batch.grid.to(runtime.device), self.tokenizer)
            texts += [c.text for c in found]
        return texts

    def caption_scores(self, model, runtime):
        """How the greedy captions compare with what is known about the images.

        Returns: {"caption_exact": share that is the written caption letter for letter}, and where images have a
        label_name {"caption_names_label": share of their captions that have it as a word}.
        """
        texts = self.greedy(model, runtime)
        scores = {"caption_exact": mean(a == b for a, b in zip(texts, self.captions, strict=True))}
        named = [(text, name) for text, name in zip(texts, self.label_names, strict=True) if name]
        if named:
            scores["caption_names_label"] = mean(bool(re.search(rf"\b{re.escape(name)}\b", text)) for text, name in named)
        return scores


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def rows_of_rank(batch, runtime):
    """This rank's rows of an evaluation batch, as a slice. Batches smaller than the world are read by every rank."""
    size = len(batch.patches)
    if size < runtime.world:
        return slice(0, size)
    return slice(size * runtime.rank // runtime.world, size * (runtime.rank + 1) // runtime.world)


def held_out_sources(config):
    """What to validate on: {name: Source}, empty if there is nothing.

    `val_data` if it is given, else the folder `val` (and `novel`, which the toy set has) of the source with the largest
    weight, with captions of its kind.
    """
    if config.val_data:
        return {"val": open_sources(config.val_data, "val")[0]}
    heaviest = max(parse_mixture(config.data), key=lambda source: source.weight)
    return {split: open_sources(f"{heaviest.path}:{heaviest.kind}:1", split)[0]
            for split in ("val", "novel") if (Path(heaviest.path) / split).is_dir()}


def held_out_sets(config, tokenizer, count):
    """{name: Evaluation} of `count` images of each of the `held_out_sources`."""
    return {split: Evaluation(source, config, tokenizer, count) for split, source in held_out_sources(config).items()}


def across_sizes(runs, sizes, source, count, device="cpu"):
    """Measure finished runs on images of many sizes and shapes. Every run sees the same pixels: each image whole, at its own
    aspect ratio, on the grid that fills the area of a square of `size` pixels best; a learned table is resized to it.

    Args: runs: folders; sizes: pixels; source: held-out Source; count: images of each shape in SHAPES, if there are so many.
    Returns: [{run, size, shape, images, loss_text, loss_image, caption_exact, ...}].
    Raises: ValueError if a size is no multiple of a run's patch size.
    """
    shapes = [longer_side(open_image(source.shards.image(i))) for i in range(len(source.shards))]
    here = {name: bounds for name, bounds in SHAPES.items() if any(bounds[0] < shape <= bounds[1] for shape in shapes)}
    rows = []
    for run in runs:
        model, config, tokenizer = load_model(run, device)
        runtime = distributed.alone(device)
        for size, (name, (low, high)) in itertools.product(sizes, here.items()):
            view = replace(config, image_size=size, native_area=(1.0, 16.0), positions="sincos")  # of the data, not the model
            evaluation = Evaluation(source, view, tokenizer, count, one_grid=True,
                                    accept=lambda image, low=low, high=high: low < longer_side(image) <= high)
            text, image = evaluation.losses(model, runtime)
            rows.append(dict(run=Path(run).name, size=size, shape=name, images=len(evaluation.captions), loss_text=text,
                             loss_image=image, **evaluation.caption_scores(model, runtime)))
    return rows


def longer_side(image):
    """Longer side of a picture divided by its shorter one."""
    width, height = upright_size(image)
    return max(width, height) / min(width, height)


def as_table(rows):
    """Rows of `across_sizes` as a Markdown table."""
    columns = [name for name in rows[0] if name not in ("run", "size", "shape", "images")]
    lines = ["| run | size, px | shape | images | " + " | ".join(columns) + " |", "|---" * (4 + len(columns)) + "|"]
    for row in rows:
        lines.append(f"| {row['run']} | {row['size']} | {row['shape']} | {row['images']} | "
                     + " | ".join(f"{row[name]:.3f}" for name in columns) + " |")
    return "\n".join(lines)


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m nano_aimv2.evaluate", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True, help="finished runs, with commas between")
    parser.add_argument("--sizes", required=True, help="pixels: an image is given the area of such a square; 48,72,96")
    parser.add_argument("--data", default="", help="held-out pictures as path:caption-kind; the first run's own if left out")
    parser.add_argument("--images", type=int, default=256, help="pictures of each shape")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="", help="where to write .json, .md and .png; FIRST-RUN/sizes if left out")
    options = parser.parse_args(argv)
    runs = [run for part in options.run for run in part.split(",") if run]
    try:
        sizes = [int(size) for size in options.sizes.split(",")]
    except ValueError:
        raise ValueError(f"--sizes={options.sizes} must be whole numbers with commas between, such as 48,72,96") from None
    configs = [load_model(run)[1] for run in runs]
    sources = {"val": open_sources(options.data, "val")[0]} if options.data else held_out_sources(configs[0])
    if not sources:
        raise ValueError(f"{configs[0].data} has no val folder: give pictures with --data=PATH:KIND")
    rows = across_sizes(runs, sizes, sources["val"], options.images, distributed.choose_device(options.device))
    out = options.out or f"{runs[0]}/sizes"
    table = as_table(rows)
    print(table)
    Path(f"{out}.md").write_text(table + "\n")
    Path(f"{out}.json").write_text(json.dumps(rows, indent=1) + "\n")
    from nano_aimv2.plots import size_curves

    fixed = {Path(run).name: config.image_size for run, config in zip(runs, configs, strict=True) if not config.native_area}
    size_curves(rows, fixed, f"{out}.png")
    print(f"written: {out}.md, {out}.json, {out}.png")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate: {error}")
