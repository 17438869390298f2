"""Evaluate: losses on held-out pairs under prefixes from a fixed seed, and how many greedy captions are right.

With full attention no image target is left (and a released trainer reports 0/0): validation draws prefixes like training
does, always the same ones.

Lesson: 08.
"""

import re
from pathlib import Path

import torch

from nano_aimv2.data import collate, open_sources, parse_mixture, pick_caption, read_in_order
from nano_aimv2.generate import caption
from nano_aimv2.prefix_mask import step_prefix_len

EVAL_SEED = 20_241_121


class Evaluation:
    """Held-out images in memory, `count` of a source, read once.

    `batches` of Batch; `captions` as they are written; `label_names` from the metadata (None where there are none).
    """

    def __init__(self, source, config, tokenizer, count, batch_size=64):
        self.config, self.tokenizer = config, tokenizer
        images, ids, samples, self.skipped = read_in_order(source, config, tokenizer, count)
        if not samples:
            raise ValueError(f"{source.path}: none of its {len(source.shards)} samples has a readable image and a "
                             f"{source.kind} caption, the last: {self.skipped[-1]}; for another caption kind write "
                             "--data=PATH:alt:1 or PATH:synthetic:1")
        self.batches = []
        for i in range(0, len(samples), batch_size):
            part, p = images[i : i + batch_size], config.patch_size
            area = max(pixels.shape[0] // p * (pixels.shape[1] // p) for pixels in part)
            self.batches.append(collate(part, ids[i : i + batch_size], area, p, slice(0, len(part)), len(part)))
        self.captions = [pick_caption(source, sample) for sample in samples]
        self.label_names = [source.shards.metadata(sample).get("label_name") for sample in samples]

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
