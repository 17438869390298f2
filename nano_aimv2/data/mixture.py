"""Mixture: which sample each row of a run is, by arithmetic instead of shuffling.

- A *mixture* of sources is dealt in rounds of 1,000 rows. Each round has every source's exact
  share, shuffled.
- A source consists of the samples that have captions of its kind. Row i of it is entry i of its
  *epochs*: seeded permutations of these samples, evaluated one index at a time. Nothing is shuffled
  in memory, and every sample comes once per epoch.

Pipeline: shards -> **(source, sample) of each row** -> batches. Source: paper Table 2. Lesson: 08.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nano_aimv2.data.shards import Shards
from nano_aimv2.data.tar_index import captions_in

ROUND = 1000  # rows in which every source gets its exact share
NAMED = 8  # caption kinds that an error names


@dataclass
class Source:
    """One part of a mixture: those samples of `shards` that have captions of `kind`."""

    path: str
    kind: str
    weight: float
    shards: Shards = None

    def __len__(self):
        return self.shards.index.count(self.kind)

    def sample(self, i):
        """The index within `shards` of the source's sample i."""
        return self.shards.index.nth(self.kind, i)


def parse_mixture(text):
    """'path:kind:weight,path:kind:weight' -> [Source], weights scaled to sum to 1.

    A kind is "alt" or a key of the .json. Kind (alt) and weight (1) may be left out. Commas within
    braces are the path's. Raises ValueError naming the part that is wrong.
    """
    sources = []
    for part in filter(None, (p.strip() for p in re.split(r",(?![^{}]*})", text))):
        # A single letter before a slash is a drive: C:\\photos:alt:1
        path, kind, weight = re.fullmatch(r"([A-Za-z]:[\\/].*?|.*?)(?::([^:]*))?(?::([^:]*))?",
                                          part, re.DOTALL).groups()
        kind = "alt" if kind is None else kind
        if not path or not kind or (weight is None and re.fullmatch("[-+.0-9]+", kind)):
            raise ValueError(f"data part {part!r}: path {path!r} and caption kind {kind!r} must be "
                             "names, and the weight comes third: write path:kind:weight, as in "
                             "data/photos:alt:2")
        try:
            weight = float("1" if weight is None else weight)
        except ValueError:
            weight = float("nan")
        if not 0 < weight < float("inf"):
            raise ValueError(f"data part {part!r}: weight {part.rpartition(':')[2]!r} must be a "
                             "number above 0; write path:kind:weight")
        sources.append(Source(path, kind, weight))
    if not sources:
        raise ValueError(f"data={text!r} names no source; write --data=path:kind:weight,...")
    total = sum(source.weight for source in sources)
    return [replace(source, weight=source.weight / total) for source in sources]


def largest_source(text):
    """The Source of a mixture with the largest weight, its shards not opened."""
    return max(parse_mixture(text), key=lambda source: source.weight)


def open_sources(text, split="train", gather=None):
    """A mixture with its shards opened.

    A folder with a subfolder `split` (as data/pack.py writes) stands for that subfolder.

    Args: gather: see `tar_index.open_index`.
    Raises: ValueError if no sample of a source has captions of its kind.
    """
    opened, sources = {}, []
    for source in parse_mixture(text):
        inside = Path(source.path) / split
        path = str(inside) if inside.is_dir() else source.path
        if path not in opened:
            opened[path] = Shards(path, gather)
        source = replace(source, path=path, shards=opened[path])
        if not len(source):
            raise ValueError(f"{path}: none of its {len(source.shards):,} samples has a caption of "
                             f"kind {source.kind!r}; they have {kinds_of(source.shards.index)}: "
                             "correct --data=PATH:KIND:WEIGHT")
        sources.append(source)
    return sources


def kinds_of(index):
    """The caption kinds of an index and how many samples have each, the likeliest captions first:
    every text in a .json is a kind, a url too."""
    kinds = sorted(index.kinds, key=lambda kind: not re.search("alt|capt|synth|text", kind.lower()))
    named = [f"{kind} ({index.count(kind):,})" for kind in kinds[:NAMED]]
    more = [f"and {len(kinds) - NAMED} more"] if len(kinds) > NAMED else []
    return ", ".join(named + more) or "none at all"


def deal(sources, seed, rows):
    """Which source each row reads, and its index within the source.

    Args: rows: i64[R], rows of the run, counted from step 0.
    Returns: (source i64[R], index within the source i64[R], counted from the run's start).
    """
    counts = round_counts(sources)
    source, index = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.int64)
    for r in np.unique(rows // ROUND):
        rng = np.random.default_rng([seed, 1, r])
        # The round's shuffle order: the source of each of its rows
        order = rng.permutation(np.repeat(np.arange(len(sources)), counts))
        offset = np.empty(ROUND, dtype=np.int64)  # index within the source, from the round's start
        for k, count in enumerate(counts):
            offset[order == k] = np.arange(count)
        here = rows // ROUND == r
        source[here] = order[rows[here] % ROUND]
        index[here] = offset[rows[here] % ROUND] + r * counts[source[here]]
    return source, index


def round_counts(sources):
    """Rows of each source in a round of ROUND, i64[sources], at least 1 each."""
    shares = np.array([source.weight for source in sources]) * ROUND
    counts = np.maximum(np.floor(shares).astype(int), 1)
    for k in np.argsort(counts - shares)[: max(0, ROUND - counts.sum())]:
        counts[k] += 1  # the largest remainders round up
    counts[np.argmax(counts)] += ROUND - counts.sum()
    return counts


def permuted(i, size, key):
    """Entry i of a seeded permutation of range(size), without making the permutation.

    A Feistel network of four rounds permutes the next power of four; an index that lands outside
    range(size) is permuted again.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for feistel_round in range(4):
            mixed = (right * 0x9E3779B1 + key + feistel_round * 0x85EBCA77) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 32) & mask
        i = left << half | right
        if i < size:
            return i


def sample_of(sources, seed, k, index):
    """The sample, within the shards of source k, that the source's row `index` reads."""
    size = len(sources[k])
    epoch, position = divmod(index, size)
    key = np.random.SeedSequence([seed, 3, k, epoch]).generate_state(1, np.uint64)[0]
    return sources[k].sample(permuted(position, size, int(key)))


def pick_caption(source, sample, rng=None):
    """One of the captions of a sample that have the source's kind (the first one without `rng`).
    Kind "alt" is the .txt, or where that is absent or blank the key "caption" of the .json.

    Raises: ValueError if the sample has none.
    """
    is_alt = source.kind == "alt"
    text = source.shards.alt_text(sample) if is_alt else ""
    key = "caption" if is_alt else source.kind
    captions = [text] if text.strip() else captions_in(source.shards.metadata(sample).get(key))
    if not captions:
        raise ValueError(f"no {source.kind} caption, or an empty one")
    return captions[int(rng.integers(len(captions))) if rng else 0]
