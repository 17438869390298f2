"""Data: the batch of a step, as a pure function of (seed, step).

Which samples, which of their captions, which crop, which native area: each is computed from the address (seed, step, row
of the global batch). So a run resumes by asking for the next step; one process or sixty-four, with any number of data
workers, see the same global batch; and there is no loader state to lose.

- A *mixture* of sources is dealt in rounds of 1,000 rows, each with its exact share of every source, shuffled.
- The k-th row of a source is entry k of its *epochs*: seeded permutations of all its samples, evaluated one index at a
  time, so that nothing has to be shuffled in memory and every sample comes once an epoch.
- A sample that cannot be read is named, counted and replaced by another of its source: the batch stays full.

Way: shards -> **Batch** -> encoder and decoder. Source: paper Table 2 (mixture), Table A1 (crops). Lesson: 07.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

from nano_aimv2.images import centre_box, crop_box, open_image, resize, upright_size
from nano_aimv2.native_res import batch_sizes, best_grid, draw_areas
from nano_aimv2.shards import Shards
from nano_aimv2.tokenizer import pad_tokens

ROUND = 1000  # rows in which every source gets its exact share
TRIES = 50  # samples in a row that may be unreadable
KINDS = ("alt", "synthetic")


@dataclass
class Batch:
    """Some rows of the global batch of one step."""

    patches: torch.Tensor  # u8[B, A, P] raw pixels, zero patches at the end of small images
    grid: torch.Tensor  # i64[B, 2] (rows, cols) of the valid patches
    tokens: torch.Tensor  # i64[B, T] ids with EOS, padded at the end
    num_tokens: torch.Tensor  # i64[B] ids that count
    rows: slice  # which rows of the global batch these are
    global_size: int  # rows of the global batch
    skipped: list = field(default_factory=list)  # names and reasons of samples that were replaced

    def to(self, device):
        """The batch on another device; copies of pinned memory do not wait."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):
        return self.map(torch.Tensor.pin_memory)

    def map(self, function):
        """The batch with `function` applied to each of its tensors."""
        tensors = [f.name for f in fields(self) if f.type is torch.Tensor]
        return replace(self, **{name: function(getattr(self, name)) for name in tensors})


@dataclass
class Source:
    """One part of a mixture: `shards` read for captions of `kind`, with `weight`."""

    path: str
    kind: str
    weight: float
    shards: Shards = None


def parse_mixture(text):
    """'path:kind:weight,path:kind:weight' -> [Source]; kind (alt) and weight (1) may be left out. Weights sum to 1 after.

    Raises: ValueError naming the part that cannot be read.
    """
    sources = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        path, *rest = part.rsplit(":", 2)
        if len(rest) == 1 and rest[0] not in KINDS:
            raise ValueError(f"data part {part!r}: caption kind {rest[0]!r} must be one of {', '.join(KINDS)}; write "
                             "path:kind:weight")
        kind, weight = (rest + ["alt", "1"][len(rest):])[:2]
        try:
            weight = float(weight)
        except ValueError:
            raise ValueError(f"data part {part!r}: weight {weight!r} must be a number above 0") from None
        if kind not in KINDS or not 0 < weight < float("inf"):
            raise ValueError(f"data part {part!r}: write path:kind:weight, kind one of {', '.join(KINDS)} and weight above 0")
        sources.append(Source(path, kind, weight))
    if not sources:
        raise ValueError(f"data={text!r} names no source; write --data=path:kind:weight,...")
    total = sum(source.weight for source in sources)
    return [replace(source, weight=source.weight / total) for source in sources]


def open_sources(text, split="train"):
    """A mixture with its shards opened. A folder that has a subfolder `split` (as data/pack.py writes) means that one."""
    opened, sources = {}, []
    for source in parse_mixture(text):
        inside = Path(source.path) / split
        path = str(inside) if inside.is_dir() else source.path
        if path not in opened:
            opened[path] = Shards(path)
        sources.append(replace(source, path=path, shards=opened[path]))
    return sources


def deal(sources, seed, rows):
    """Which source, and the how-manieth of it, each row is: rows i64[R], counted from step 0 -> two i64[R]."""
    shares = np.array([source.weight for source in sources]) * ROUND
    counts = np.maximum(np.floor(shares).astype(int), 1)  # every source comes up
    for k in np.argsort(counts - shares)[: max(0, ROUND - counts.sum())]:  # the largest remainders round up
        counts[k] += 1
    counts[np.argmax(counts)] += ROUND - counts.sum()
    which, nth = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.int64)
    for r in np.unique(rows // ROUND):
        hand = np.random.default_rng([seed, 1, r]).permutation(np.repeat(np.arange(len(sources)), counts))
        turn = np.empty(ROUND, dtype=np.int64)  # the how-manieth of its source in this round
        for k, count in enumerate(counts):
            turn[hand == k] = np.arange(count)
        here = rows // ROUND == r
        which[here] = hand[rows[here] % ROUND]
        nth[here] = turn[rows[here] % ROUND] + r * counts[which[here]]
    return which, nth


def permuted(i, size, key):
    """Entry i of a seeded permutation of range(size), without making the permutation.

    A four-round Feistel network permutes the next power of four; indexes that land outside are permuted again.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for turn in range(4):
            mixed = (right * 0x9E3779B1 + key + turn * 0x85EBCA77) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 32) & mask
        i = left << half | right
        if i < size:
            return i


class TrainingData(torch.utils.data.Dataset):
    """`data[k]` is micro-batch k of this rank: step k // grad_accum, part k % grad_accum. The same for every reader.

    Args: config; tokenizer; rank and world: which part of the global batch this process takes.
    """

    def __init__(self, config, tokenizer, rank=0, world=1):
        self.config, self.tokenizer = config, tokenizer
        self.rank, self.world = rank, world
        self.sources = open_sources(config.data)
        parts = world * config.grad_accum
        self.area = (config.image_size // config.patch_size) ** 2
        if config.native_area:
            self.areas = draw_areas(config.seed, config.steps, *config.native_area)
            self.sizes = batch_sizes(self.areas, self.area * config.batch_size, parts)
        else:
            self.areas, self.sizes = None, np.full(config.steps, config.batch_size)
        if config.batch_size < parts:
            raise ValueError(f"batch_size={config.batch_size} is less than {world} ranks x grad_accum={config.grad_accum}; "
                             "every rank needs an image in every micro-batch")
        self.starts = np.cumsum(self.sizes) - self.sizes  # row, counted from step 0, that begins each step

    def __len__(self):
        return self.config.steps * self.config.grad_accum

    def __getitem__(self, k):
        return self.read(*self.place(k))

    def names(self, k):
        """The samples of micro-batch k by shard and key (what replaced a damaged one is not looked up)."""
        start, rows, _, _ = self.place(k)
        return [self.sources[s].shards.name(self.address(row, s, i, 0)[0]) for row, s, i in self.dealt(start, rows)]

    def dealt(self, start, rows):
        """[(row of the run, source, the how-manieth of it)] of the rows `rows` behind row `start`."""
        absolute = np.arange(start + rows.start, start + rows.stop)
        which, nth = deal(self.sources, self.config.seed, absolute)
        return list(zip(absolute.tolist(), which.tolist(), nth.tolist(), strict=True))

    def place(self, k):
        """Micro-batch k in the run: the row that begins its step, its rows of that step, the step's rows and area."""
        step, part = divmod(k, self.config.grad_accum)
        parts, mine = self.world * self.config.grad_accum, self.rank * self.config.grad_accum + part
        size = int(self.sizes[step])
        rows = slice(size * mine // parts, size * (mine + 1) // parts)
        area = self.area if self.areas is None else int(self.areas[step])
        return int(self.starts[step]), rows, size, area

    def read(self, start, rows, size, area):
        """Rows of the global batch of `size` rows that begins at row `start` of the run, as a Batch of `area` patches."""
        images, ids, skipped = [], [], []
        for row, k, i in self.dealt(start, rows):
            source = self.sources[k]
            for attempt in range(TRIES):
                sample, rng = self.address(row, k, i, attempt)
                try:
                    caption = pick_caption(source, sample, rng)
                    token_ids = self.tokenizer.encode(caption, self.config.max_tokens)
                    pixels = self.pixels(open_image(source.shards.image(sample)), area, rng)
                except Exception as error:  # decoders fail in many ways, and no damaged file may stop a run
                    skipped.append(f"{source.shards.name(sample)}: {type(error).__name__}: {error}")
                    continue
                images.append(pixels)
                ids.append(token_ids)
                break
            else:
                raise ValueError(f"{TRIES} samples in a row of {source.path} ({source.kind}) could not be read, the last: "
                                 f"{skipped[-1]}; check the shards, and the caption kind in --data=PATH:KIND:WEIGHT")
        return collate(images, ids, area, self.config.patch_size, rows, size, skipped)

    def address(self, row, k, i, attempt):
        """The sample that row number i of source k means, and the generator for its crop and caption."""
        seed, size = self.config.seed, len(self.sources[k].shards)
        rng = np.random.default_rng([seed, 2, row, attempt])
        if attempt:  # a replacement: any sample of the source
            return int(rng.integers(size)), rng
        epoch, position = divmod(i, size)
        return permuted(position, size, int(np.random.SeedSequence([seed, 3, k, epoch]).generate_state(1, np.uint64)[0])), rng

    def pixels(self, image, area, rng):
        """A training view: random crop, resized to the batch's grid, perhaps mirrored -> u8[H, W, 3]."""
        config, p = self.config, self.config.patch_size
        width, height = upright_size(image)
        native = self.areas is not None
        box = crop_box(width, height, config.crop_scale, rng, aspect=width / height if native else 1.0)
        grid = best_grid(box[2] - box[0], box[3] - box[1], area) if native else fixed_grid(config)
        pixels = resize(image, (grid[1] * p, grid[0] * p), box)
        return pixels[:, ::-1] if config.flip and rng.random() < 0.5 else pixels


def fixed_grid(config):
    return (config.image_size // config.patch_size,) * 2


def pick_caption(source, sample, rng=None):
    """The caption of a sample: its alt-text, or one of its synthetic captions (the first without `rng`)."""
    if source.kind == "alt":
        return source.shards.alt_text(sample)
    captions = source.shards.metadata(sample).get("synthetic") or []
    captions = [captions] if isinstance(captions, str) else captions
    if not captions:
        raise ValueError("no synthetic caption in its .json")
    return captions[int(rng.integers(len(captions))) if rng else 0]


def evaluation_pixels(image, config):
    """The evaluation view of a PIL image -> u8[H, W, 3], both sides multiples of the patch size.

    Fixed resolution: the centre square, image_size pixels wide. Native: the whole image at its own aspect ratio, on the grid
    that fills the area of such a square best.
    """
    if not config.native_area:
        return resize(image, (config.image_size,) * 2, centre_box(*upright_size(image), 1.0))
    rows, cols = best_grid(*upright_size(image), (config.image_size // config.patch_size) ** 2)
    return resize(image, (cols * config.patch_size, rows * config.patch_size))


def to_patches(pixels, p):
    """Pixels u8[H, W, 3] -> patches u8[n, P] in the layout of `patchify`, by numpy."""
    rows, cols = pixels.shape[0] // p, pixels.shape[1] // p
    return pixels.reshape(rows, p, cols, p, 3).swapaxes(1, 2).reshape(rows * cols, p * p * 3)


def collate(images, ids, area, p, rows, size, skipped=()):
    """Pixels of each image and ids of each caption -> Batch of `area` patches an image."""
    patches = np.zeros((len(images), area, p * p * 3), dtype=np.uint8)
    grid = np.array([(pixels.shape[0] // p, pixels.shape[1] // p) for pixels in images], dtype=np.int64)
    for row, pixels in zip(patches, images, strict=True):
        image = to_patches(pixels, p)
        row[: len(image)] = image
    tokens, num_tokens = pad_tokens(ids)
    return Batch(*map(torch.from_numpy, (patches, grid, tokens, num_tokens)), rows, size, list(skipped))


def read_in_order(source, config, tokenizer, count, accept=None):
    """The first `count` readable samples of a source in order, in the evaluation view; `accept(image)` may pass some over.

    Returns: (pixels of each u8[H, W, 3], token ids of each, their indexes in `source.shards`, names of those left out).
    """
    images, ids, kept, skipped = [], [], [], []
    for sample in range(len(source.shards)):
        if len(kept) == count:
            break
        try:
            source.shards.metadata(sample)  # holds the label's name: a broken .json is met here and not by who asks for it
            token_ids = tokenizer.encode(pick_caption(source, sample), config.max_tokens)
            image = open_image(source.shards.image(sample))
            if accept and not accept(image):
                continue
            pixels = evaluation_pixels(image, config)
        except Exception as error:  # as in training: named, and the run goes on
            skipped.append(f"{source.shards.name(sample)}: {type(error).__name__}: {error}")
            continue
        images.append(pixels)
        ids.append(token_ids)
        kept.append(sample)
    return images, ids, kept, skipped


def describe(data):
    """Lines that say what will be read: sources, shares, epochs, and what the shards hold that is no sample."""
    rows, lines = int(data.sizes.sum()), []
    if len(data.sources) > 1:
        lines.append(f"a mixture of {len(data.sources)} sources, their weights scaled to sum to 1:")
    for source in data.sources:
        epochs = rows * source.weight / len(source.shards)
        bad = {reason: n for reason, n in source.shards.report.items() if n}
        lines.append(f"{source.path} ({source.kind}): {len(source.shards):,} samples, {source.weight:.1%} of the mixture, "
                     f"{epochs:.1f} epochs" + (f"; passed over: {bad}" if bad else ""))
    return lines
