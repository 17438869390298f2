"""Claims: what the rows of a study say, with an interval and a verdict.

A claim compares cells, (arm, samples), in one metric. It *holds* or *fails* if the 95% interval
(Student's t) of the difference does not contain 0; otherwise it is *inconclusive*. The interval
comes from the spread over seeds, in one of two ways:

- `paired`: the difference is taken seed by seed, between runs of the same seed and the same data
  order, and its own spread counts. What a seed does to both runs cancels, and no other arm has a
  say. Seeds that read other captions are not replicates: the spread is that within the groups of
  seeds that read the same ones.
- `contrast`: the variance between seeds is pooled over all arms with the same number of samples.
  The studies with two or three seeds use it, for its degrees of freedom. It assumes that a seed
  matters about as much in every arm: an arm of larger spread, such as "causal" in the ablations,
  widens the intervals of all others.

Lesson: 15.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean

# 97.5% points of Student's t for 1 .. 30 degrees of freedom; the last one serves for more
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
           2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
           2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
UP, DOWN = 1, -1
METRICS = {"probe": ("top-1 of the attentive probe", UP),
           "caption_loss": ("caption loss, nats per token", DOWN),
           "image_loss": ("image loss, normalised patches", DOWN),
           # Derived from the others, see pixels.py
           "log_caption_loss": ("log of the caption loss", DOWN),
           "not_named": ("top-1 of the attributes that the captions do not name", UP),
           "not_named_minus_named": ("the same minus that of the attributes they name", UP)}


@dataclass(frozen=True)
class Claim:
    """Some cells, (arm, samples), are better in `metric` than others: sum against sum. A cell that
    is named twice counts twice."""

    text: str
    metric: str
    better: tuple
    worse: tuple
    per: int = 1  # the difference is divided by this


@dataclass(frozen=True)
class Study:
    arms: dict  # {name: settings that differ; beside those of train.py see `flags_of`}
    samples: tuple  # how many samples a run sees, epochs included
    claims: tuple
    metrics: tuple = ("probe", "caption_loss")
    against_flops: bool = False  # what the figure is drawn over; False: samples
    is_paired: bool = False  # which of the two intervals
    first_only: tuple = ()  # arms that are trained with the first number of samples only


def cells_of(rows, metric):
    """{(arm, samples): [one value per seed]} of a metric, from the rows that have it."""
    cells = defaultdict(list)
    for row in rows:
        if metric in row:
            cells[row["arm"], row["samples"]].append(row[metric])
    return cells


def student(freedom):
    """The 97.5% point of Student's t. Satterthwaite's degrees of freedom are rarely whole: they are
    rounded down, after a margin for the rounding errors of the sums (6.9999999 is 7)."""
    return STUDENT[min(math.floor(freedom + 1e-6), len(STUDENT)) - 1]


def seed_variance(cells):
    """{samples: (variance between seeds, degrees of freedom)}, pooled over the arms."""
    squares, freedom = defaultdict(float), defaultdict(int)
    for (_, samples), values in cells.items():
        mean = fmean(values)
        squares[samples] += sum((value - mean) ** 2 for value in values)
        freedom[samples] += len(values) - 1
    return {samples: (squares[samples] / free if free else math.inf, free)
            for samples, free in freedom.items()}


def contrast(cells, plus, minus):
    """Sum of the means of cells `plus` minus that of cells `minus`: (difference, half interval).

    Half the 95% interval is infinite with one seed. If the cells differ in their number of samples,
    which have a variance each, the degrees of freedom are Satterthwaite's.
    """
    pooled, parts = seed_variance(cells), defaultdict(float)
    for cell in (*plus, *minus):
        parts[cell[1]] += pooled[cell[1]][0] / len(cells[cell])
    value = sum(fmean(cells[cell]) for cell in plus) - sum(fmean(cells[cell]) for cell in minus)
    variance = sum(parts.values())
    if not 0 < variance < math.inf:
        return value, variance  # all seeds give the same value, or there is only one
    freedom = variance**2 / sum(part**2 / pooled[samples][1] for samples, part in parts.items())
    return value, student(freedom) * variance**0.5


def weighted(groups, weights):
    """A weighted sum of the means of groups: (value, half its 95% interval).

    Args: groups: {group: [independent values]}, with one variance within all groups; weights:
        {group: its weight}. Half the interval is infinite if no group has two values.
    """
    value = sum(weight * fmean(groups[group]) for group, weight in weights.items())
    freedom = sum(len(values) - 1 for values in groups.values())
    if not freedom:
        return value, math.inf
    squares = 0.0
    for values in groups.values():
        mean = fmean(values)
        squares += sum((x - mean) ** 2 for x in values)
    shares = sum(weight**2 / len(groups[group]) for group, weight in weights.items())
    return value, student(freedom) * (squares / freedom * shares) ** 0.5


def paired(rows, metric, plus, minus):
    """`contrast` seed by seed: (mean difference, half interval); None if no seed has all cells.

    Seeds that read the same captions form a group. Every group counts alike, and the spread is that
    within groups: n seeds in g groups leave n - g degrees of freedom.
    """
    found = {(row["arm"], row["samples"], row["seed"]): row for row in rows if metric in row}
    groups = defaultdict(list)
    for seed in sorted({seed for *_, seed in found}):
        runs = [found.get((*cell, seed)) for cell in (*plus, *minus)]
        if None not in runs:
            values = [run[metric] for run in runs]
            captions = tuple(run["flags"]["data"] for run in runs)
            groups[captions].append(sum(values[: len(plus)]) - sum(values[len(plus) :]))
    return weighted(groups, dict.fromkeys(groups, 1 / len(groups))) if groups else None


def difference(rows, metric, plus, minus=(), is_paired=False):
    """The sum of cells `plus` minus that of cells `minus`, by one of the two methods above:
    (difference, half interval); None if a cell has no row."""
    if is_paired:
        return paired(rows, metric, plus, minus)
    cells = cells_of(rows, metric)
    return contrast(cells, plus, minus) if {*plus, *minus} <= cells.keys() else None


def judge(claim, rows, is_paired=False):
    """(difference in favour of the claim, half interval, verdict); None if an arm is missing."""
    found = difference(rows, claim.metric, claim.better, claim.worse, is_paired)
    if not found:
        return None
    value, half = METRICS[claim.metric][1] * found[0] / claim.per, found[1] / claim.per
    return value, half, "holds" if value > half else "fails" if value < -half else "inconclusive"


def interval_text(value, half, digits=3):
    """'+0.023 [+0.009 +0.037]'."""
    if half == math.inf:
        return f"{value:+.{digits}f}, no interval"
    return f"{value:+.{digits}f} [{value - half:+.{digits}f} {value + half:+.{digits}f}]"


def table_line(*cells):
    return f"| {' | '.join(map(str, cells))} |"
