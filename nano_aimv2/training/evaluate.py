"""Evaluate: held-out losses under prefixes from a fixed seed, and the share of right captions.

Under full attention there is no image target left (and the loss would be 0/0), so validation draws
prefixes as training does, always the same ones.

Source: paper section 2.1. Lessons: 10, 14.
"""

import itertools
import math
import re
import unicodedata
from contextlib import nullcontext
from pathlib import Path

import torch

from nano_aimv2.data.batches import capped, collate, read_in_order
from nano_aimv2.data.mixture import largest_source, open_sources
from nano_aimv2.generate import caption
from nano_aimv2.prefix_mask import step_prefix_len

EVAL_SEED = 20_241_121
# Of alphabets whose words have blanks between: Latin (with Vietnamese), Greek, Cyrillic
LETTERS = "0-9a-z\u00df-\u052f\u1e00-\u1fff"


class Evaluation:
    """Held-out images in memory, `count` of a source, read once.

    `batches`: [Batch]; `captions`: the written ones, as they are encoded; `label_names`: from the
    metadata, None without one; `skipped`: samples that could not be read; `num_cut`: captions
    longer than max_tokens.

    Args: accept: see `read_in_order`; with it there may be no image; one_grid: sort the images so
        that each batch has a single grid, which is all that a learned position table can be
        resized to.
    """

    def __init__(self, source, config, tokenizer, count, batch_size=64, accept=None,
                 one_grid=False):
        self.config, self.tokenizer, self.asked = config, tokenizer, count
        records, self.skipped = read_in_order(source, config, tokenizer, count, accept)
        if not (records or accept):
            last = f", the last: {self.skipped[-1]}" if self.skipped else ""
            raise ValueError(f"{source.path}: none of its {len(source)} samples with a "
                             f"{source.kind} caption has a readable image{last}")

        def grid_of(record):
            rows, cols, _ = record.pixels.shape
            return rows // config.patch_size, cols // config.patch_size

        def group_of(record):
            return one_grid and grid_of(record)

        records.sort(key=group_of)
        self.batches = []
        for _, group in itertools.groupby(records, key=group_of):
            group = list(group)
            for part in (group[i : i + batch_size] for i in range(0, len(group), batch_size)):
                area = max(math.prod(grid_of(record)) for record in part)
                pixels, ids, *_ = zip(*part, strict=True)
                rows = slice(0, len(part))
                self.batches.append(
                    collate(pixels, ids, area, config.patch_size, rows, len(part)))
        self.captions = [tokenizer.decode(record.token_ids) for record in records]
        self.num_cut = sum(record.token_ids[-1] != tokenizer.eos for record in records)
        self.label_names = [label_text(record.label_name) for record in records]

    def share_out(self, runtime):
        """What this rank does: [(number of a batch, some of its rows, whether they count)].

        Whole batches where there are enough for all ranks, else equal pieces of each. Every image
        counts once. All ranks get as many entries, as a sharded model needs: the last of them may
        not count.
        """
        pieces, units = -(-runtime.world // len(self.batches)), []
        for i, batch in enumerate(self.batches):
            ends = [len(batch.patches) * k // pieces for k in range(pieces + 1)]
            units += [(i, slice(*pair), True) for pair in itertools.pairwise(ends)
                      if pair[0] < pair[1]]
        units += [(*units[0][:2], False)] * (-len(units) % runtime.world)
        return units[runtime.rank :: runtime.world]

    @torch.no_grad()
    def losses(self, model, runtime):
        """(text loss in nats per token, image loss), the same for any number of ranks."""
        sums = [0.0] * 4
        for i, rows, counts in self.share_out(runtime):
            batch = self.batches[i]
            num_patches = batch.grid.prod(dim=1)
            prefix_len = step_prefix_len(num_patches, EVAL_SEED, i, batch.rows, batch.global_size)
            mine = batch.map(lambda tensor, rows=rows: tensor[rows]).to(runtime.device)
            with runtime.autocast():
                out = model(mine, runtime.move(prefix_len[rows]))
            parts = (out.text_sum, out.text_count, out.image_sum, out.image_count)
            sums = [total + counts * float(part) for total, part in zip(sums, parts, strict=True)]
        text_sum, text_count, image_sum, image_count = runtime.sum(*sums)
        return text_sum / text_count, image_sum / image_count

    def caption_scores(self, model, runtime):
        """How greedy captions, shared out over ranks, compare with what is known about the images.

        Returns: {"caption_exact": share that equals the written caption letter for letter} and,
            where images have a label_name, {"caption_names_label": share of captions with that
            name}.
        """
        starts = [0, *itertools.accumulate(len(batch.patches) for batch in self.batches)]
        count = exact = labelled = named = 0
        for i, rows, counts in self.share_out(runtime):
            if not counts:
                continue
            batch = self.batches[i].map(lambda tensor, rows=rows: tensor[rows]).to(runtime.device)
            with runtime.autocast():
                found = caption(model, batch.patches, batch.grid, self.tokenizer)
            for k, each in enumerate(found, starts[i] + rows.start):
                count += 1
                exact += each.text == self.captions[k]
                if self.label_names[k]:
                    labelled += 1
                    named += names_label(each.text, self.label_names[k])
        count, exact, labelled, named = runtime.sum(count, exact, labelled, named)
        scores = {"caption_exact": exact / count}
        return scores | ({"caption_names_label": named / labelled} if labelled else {})


def label_text(value):
    """A label_name as text: a string or a number; None if it is anything else."""
    is_label = isinstance(value, str | int | float) and not isinstance(value, bool)
    return str(value) if is_label else None


def names_label(text, name):
    """Whether a caption has a label in it, whatever its case; _ and - count as blanks.

    Not within a longer word: a "cat" is not in "cattle". Scripts without blanks have no words:
    there it may stand anywhere. An accent may be encoded in its letter or behind it.
    """
    text, name = (re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", each)).strip().casefold()
                  for each in (text, name))
    return bool(name and re.search(f"(?<![{LETTERS}]){re.escape(name)}(?![{LETTERS}])", text))


def held_out_sources(config, gather=None):
    """What to validate on: {name: Source}, empty if there is nothing.

    `val_data` if it is given, else the folder `val` (and `novel`, which the toy set has) of the
    source with the largest weight, with captions of its kind.

    Args: gather: see `tar_index.open_index`.
    """
    if config.val_data:
        sources = open_sources(config.val_data, "val", gather)
        if len(sources) > 1:
            raise ValueError(f"val_data={config.val_data!r} names {len(sources)} sources, and one "
                             "is validated on: give --val_data=PATH:KIND")
        return {"val": sources[0]}
    largest = largest_source(config.data)
    return {split: open_sources(f"{largest.path}:{largest.kind}:1", split, gather)[0]
            for split in ("val", "novel") if (Path(largest.path) / split).is_dir()}


def held_out_sets(config, tokenizer, count, gather=None):
    """{name: Evaluation} of `count` images of each of the `held_out_sources`."""
    return {split: Evaluation(source, config, tokenizer, count)
            for split, source in held_out_sources(config, gather).items()}


def describe_held_out(held_out):
    """Lines that say what is validated on, and what is missing from it."""
    if not held_out:
        return ["nothing is held out: there is no val folder beside the training shards; give "
                "--val_data=PATH:KIND to validate"]
    sizes = []
    for split, evaluation in held_out.items():
        count = len(evaluation.captions)
        fewer = f" of the {evaluation.asked} asked for" if count < evaluation.asked else ""
        sizes.append(f"{count} images{fewer} ({split})")
    skipped = [line for evaluation in held_out.values() for line in evaluation.skipped]
    num_cut = sum(evaluation.num_cut for evaluation in held_out.values())
    cut = f"; {num_cut} captions are longer than --max_tokens, and cut" if num_cut else ""
    return [f"held out: {', '.join(sizes)}{cut}", *(f"skipped: {line}" for line in capped(skipped))]


def evaluate(model, trained, held_out, runtime):
    """A row of held-out losses and, where the images' content is known, shares of right captions.

    Args: model: the bare AIMv2; trained: what `parallelize` returned; held_out: of `held_out_sets`.

    Compiled blocks run eagerly here: the many shapes of evaluation would use up the limit of
    recompilations, and training would go on uncompiled.
    """
    stance = torch.compiler.set_stance("force_eager") if runtime.compile else nullcontext()
    with stance:
        return held_out_row(model, trained, held_out, runtime)


def held_out_row(model, trained, held_out, runtime):
    """What `evaluate` returns."""
    row = {}
    for split, evaluation in held_out.items():
        suffix = "" if split == "val" else f"_{split}"
        text, image = evaluation.losses(trained, runtime)
        row |= {"val_loss_text" + suffix: text, "val_loss_image" + suffix: image}
        # The content is known of the toy set, and of images with labels. Ranks caption their shares
        # at their own pace, which a sharded model does not allow.
        known = "novel" in held_out or any(evaluation.label_names)
        if known and not runtime.is_sharded:
            scores = evaluation.caption_scores(model, runtime)
            row |= {name + suffix: score for name, score in scores.items()}
    return row
