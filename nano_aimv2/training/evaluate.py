"""Evaluate: held-out losses under prefixes from a fixed seed, and the share of right captions.

Under full attention there is no image target left (and the loss would be 0/0), so validation draws
prefixes as training does, always the same ones.

Source: paper section 2.1. Lessons: 08, 11.
"""

import itertools
import math
import re
from pathlib import Path
from statistics import fmean

import torch

from nano_aimv2.data.batches import collate, read_in_order
from nano_aimv2.data.mixture import largest_source, open_sources, pick_caption
from nano_aimv2.generate import caption
from nano_aimv2.prefix_mask import step_prefix_len

EVAL_SEED = 20_241_121


class Evaluation:
    """Held-out images in memory, `count` of a source, read once.

    `batches`: [Batch]; `captions`: the written ones; `label_names`: from the metadata, None without
    one; `skipped`: samples that could not be read.

    Args: accept: see `read_in_order`; one_grid: sort the images so that each batch has a single
        grid, which is all that a learned position table can be resized to.
    """

    def __init__(self, source, config, tokenizer, count, batch_size=64, accept=None,
                 one_grid=False):
        self.config, self.tokenizer = config, tokenizer
        images, ids, samples, self.skipped = read_in_order(source, config, tokenizer, count, accept)
        if not samples:
            last = f", the last: {self.skipped[-1]}" if self.skipped else ""
            raise ValueError(f"{source.path}: none of its {len(source.shards)} samples has a "
                             f"readable image and a {source.kind} caption{last}; for another "
                             "caption kind write --data=PATH:alt:1 or PATH:synthetic:1")
        p = config.patch_size
        grids = [(pixels.shape[0] // p, pixels.shape[1] // p) for pixels in images]
        order = sorted(range(len(images)), key=lambda k: one_grid and grids[k])
        self.batches = []
        for _, group in itertools.groupby(order, key=lambda k: one_grid and grids[k]):
            group = list(group)
            for part in (group[i : i + batch_size] for i in range(0, len(group), batch_size)):
                area = max(math.prod(grids[k]) for k in part)
                pixels, token_ids = [images[k] for k in part], [ids[k] for k in part]
                rows = slice(0, len(part))
                self.batches.append(collate(pixels, token_ids, area, p, rows, len(part)))
        self.captions = [pick_caption(source, samples[k]) for k in order]
        self.label_names = [source.shards.metadata(samples[k]).get("label_name") for k in order]

    @torch.no_grad()
    def losses(self, model, runtime):
        """(text loss in nats per token, image loss); every rank does its rows of each batch."""
        sums = [0.0] * 4
        for i, batch in enumerate(self.batches):
            num_patches = batch.grid.prod(dim=1)
            prefix_len = step_prefix_len(num_patches, EVAL_SEED, i, batch.rows, batch.global_size)
            rows = rows_of_rank(batch, runtime)
            mine = batch.map(lambda tensor, rows=rows: tensor[rows]).to(runtime.device)
            with runtime.autocast():
                out = model(mine, prefix_len[rows].to(runtime.device))
            parts = (out.text_sum, out.text_count, out.image_sum, out.image_count)
            sums = [total + float(part) for total, part in zip(sums, parts, strict=True)]
        text_sum, text_count, image_sum, image_count = runtime.sum(*sums)
        return text_sum / text_count, image_sum / image_count

    def caption_scores(self, model, runtime):
        """How greedy captions, by one process alone, compare with what is known about the images.

        Returns: {"caption_exact": share that equals the written caption letter for letter} and,
            where images have a label_name, {"caption_names_label": share of captions with that
            word}.
        """
        texts = []
        for batch in self.batches:
            batch = batch.to(runtime.device)
            with runtime.autocast():
                texts += [c.text for c in caption(model, batch.patches, batch.grid, self.tokenizer)]
        exact = [text == written for text, written in zip(texts, self.captions, strict=True)]
        scores = {"caption_exact": fmean(exact)}
        named = [bool(re.search(rf"\b{re.escape(name)}\b", text))
                 for text, name in zip(texts, self.label_names, strict=True) if name]
        return scores | ({"caption_names_label": fmean(named)} if named else {})


def rows_of_rank(batch, runtime):
    """This rank's rows of an evaluation batch; a batch smaller than the world is read by all."""
    size = len(batch.patches)
    if size < runtime.world:
        return slice(0, size)
    return slice(size * runtime.rank // runtime.world, size * (runtime.rank + 1) // runtime.world)


def held_out_sources(config):
    """What to validate on: {name: Source}, empty if there is nothing.

    `val_data` if it is given, else the folder `val` (and `novel`, which the toy set has) of the
    source with the largest weight, with captions of its kind.
    """
    if config.val_data:
        return {"val": open_sources(config.val_data, "val")[0]}
    largest = largest_source(config.data)
    return {split: open_sources(f"{largest.path}:{largest.kind}:1", split)[0]
            for split in ("val", "novel") if (Path(largest.path) / split).is_dir()}


def held_out_sets(config, tokenizer, count):
    """{name: Evaluation} of `count` images of each of the `held_out_sources`."""
    return {split: Evaluation(source, config, tokenizer, count)
            for split, source in held_out_sources(config).items()}


def describe_held_out(held_out):
    """Lines that say what is missing from the held-out sets."""
    if not held_out:
        return ["nothing is held out: there is no val folder beside the training shards; give "
                "--val_data=PATH:KIND to validate"]
    return [f"skipped: {line}" for evaluation in held_out.values() for line in evaluation.skipped]


def evaluate(model, trained, held_out, runtime):
    """A row of held-out losses and, where the images' content is known, shares of right captions.

    Args: model: the bare AIMv2; trained: what `parallelize` returned; held_out: of `held_out_sets`.
    """
    row = {}
    for split, evaluation in held_out.items():
        suffix = "" if split == "val" else f"_{split}"
        text, image = evaluation.losses(trained, runtime)
        row |= {"val_loss_text" + suffix: text, "val_loss_image" + suffix: image}
        # The content is known of the toy set, and of images with labels. One rank captions alone,
        # which a sharded model does not allow.
        known = "novel" in held_out or any(evaluation.label_names)
        if known and runtime.is_main and not runtime.is_sharded:
            scores = evaluation.caption_scores(model, runtime)
            row |= {name + suffix: score for name, score in scores.items()}
    return row
