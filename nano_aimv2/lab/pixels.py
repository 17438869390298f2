"""Pixels: when does predicting them beside the caption make a better encoder?

The study trains pairs of runs that differ in alpha, the weight of the image loss, and in nothing
else: the same seed, images, captions and data order. Its *gain* is the probe's accuracy with pixels
minus that without. Between pairs only the captions change. They name k of the four attributes of
the toy scenes (k = 0: how many objects there are), and the probe asks for all four.

Seed s names the first k attributes of the cyclic order that starts at attribute s mod 4, in all its
scenes. So at equal k each attribute is named with some seeds and not with others: a difference
between the two is due to being named, not to how much a caption says.

The claims below were written before the runs. They are judged seed by seed (`claims.paired`), the
caption losses on the log scale.

    python -m nano_aimv2.lab.study pixels --seeds=8          # each attribute is named first twice
    python -m nano_aimv2.lab.study pixels --seeds=7 --preset=photos

Lesson: 15. Source of the question: AIMv2 (paper Table 9a) against captioners without an image loss.
"""

import math
from collections import defaultdict
from statistics import fmean

from nano_aimv2.lab.claims import Claim, Study, difference, interval_text, table_line, weighted
from nano_aimv2.lab.probe import ATTRIBUTES

ALPHA, STRONG = 0.4, 1.6  # the paper's weight, and a large one
SHORT, LONG = 20_000, 60_000  # samples
SOME = (1, 2, 3)  # the k at which some attributes are named and some are not


def named_attributes(k, seed):
    """Those that the captions of a run name, in the order of ATTRIBUTES."""
    start = seed % len(ATTRIBUTES)
    first = [*ATTRIBUTES[start:], *ATTRIBUTES[:start]][:k]
    return tuple(attribute for attribute in ATTRIBUTES if attribute in first)


def caption_kinds(k):
    """The caption kinds of data/scenes.py that seeds 0 to 3 read; they repeat after that."""
    return tuple(f"names_{'_'.join(named_attributes(k, seed)) or 'none'}"
                 for seed in range(len(ATTRIBUTES)))


def arm(case, alpha):
    return f"{case}, alpha {alpha:g}"


def arms_of(cases, alphas):
    """{arm: settings}: {case: caption kinds} with every alpha."""
    return {arm(case, alpha): dict(kinds=kinds, alpha=alpha)
            for case, kinds in cases.items() for alpha in alphas}


def claim_of_gains(text, gains, metric="probe", per=1):
    """A claim that a weighted sum of gains is above 0, the sum divided by `per`.

    Args: gains: {(case, alpha, samples): weight, a whole number}.
    """
    better, worse = [], []
    for (case, alpha, samples), weight in gains.items():
        plus, minus = (arm(case, alpha), samples), (arm(case, 0.0), samples)
        if weight < 0:
            plus, minus = minus, plus
        better += [plus] * abs(weight)
        worse += [minus] * abs(weight)
    return Claim(text, metric, tuple(better), tuple(worse), per)


NAMED = [f"{k} named" for k in range(5)]
NONE, ALL = NAMED[0], NAMED[4]
CASES = {case: caption_kinds(k) for k, case in enumerate(NAMED)}
PARTLY = {(NAMED[k], ALPHA, SHORT): 1 for k in SOME}
TOY_CLAIMS = (
    claim_of_gains("nothing named: pixels help", {(NONE, ALPHA, SHORT): 1}),
    claim_of_gains("1 to 3 named: pixels help the attributes that are not named", PARTLY,
                   "not_named", per=3),
    claim_of_gains("1 to 3 named: pixels help an attribute more if it is not named", PARTLY,
                   "not_named_minus_named", per=3),
    claim_of_gains("the more is named, the less pixels help: fall of the gain per attribute named",
                   {(NAMED[k], ALPHA, SHORT): 2 - k for k in (0, 1, 3, 4)}, per=10),  # minus slope
    claim_of_gains("all named: pixels cost", {(ALL, ALPHA, SHORT): -1}),
    claim_of_gains("all named: pixels cost in the caption loss", {(ALL, ALPHA, SHORT): -1},
                   "log_caption_loss"),
    claim_of_gains("nothing named: alpha 1.6 helps more than 0.4",
                   {(NONE, STRONG, SHORT): 1, (NONE, ALPHA, SHORT): -1}),
    claim_of_gains("all named: alpha 1.6 costs more than 0.4",
                   {(ALL, STRONG, SHORT): -1, (ALL, ALPHA, SHORT): 1}),
    claim_of_gains("60,000 samples, nothing named: pixels help", {(NONE, ALPHA, LONG): 1}),
    claim_of_gains("60,000 samples, all named: pixels cost", {(ALL, ALPHA, LONG): -1}),
    claim_of_gains("nothing named: the gain shrinks from 20,000 to 60,000 samples",
                   {(NONE, ALPHA, SHORT): 1, (NONE, ALPHA, LONG): -1}),
    claim_of_gains("all named: the cost shrinks from 20,000 to 60,000 samples",
                   {(ALL, ALPHA, LONG): 1, (ALL, ALPHA, SHORT): -1}),
)
# Photographs: the probe asks for the class, whatever the captions name
TONE, CLASS, BOTH, ALT = "tone only", "class only", "class and tone", "alt-text"
PHOTO_CASES = {TONE: ("tone",), CLASS: ("class",), BOTH: ("synthetic",), ALT: ("alt",)}
PHOTO_CLAIMS = (
    claim_of_gains("class not named: pixels help", {(TONE, ALPHA, SHORT): 1}),
    claim_of_gains("pixels help more with the tone alone than with the class alone",
                   {(TONE, ALPHA, SHORT): 1, (CLASS, ALPHA, SHORT): -1}),
    claim_of_gains("pixels help more with the tone alone than with both",
                   {(TONE, ALPHA, SHORT): 1, (BOTH, ALPHA, SHORT): -1}),
    claim_of_gains("class and tone named: pixels cost", {(BOTH, ALPHA, SHORT): -1}),
    claim_of_gains("alt-texts: pixels help", {(ALT, ALPHA, SHORT): 1}),
    claim_of_gains("class and tone named: pixels help the caption loss", {(BOTH, ALPHA, SHORT): 1},
                   "log_caption_loss"),
)
METRICS = ("probe", "log_caption_loss")
BUDGETED = arms_of({case: CASES[case] for case in (NONE, ALL)}, (0.0, ALPHA))
TOY_ARMS = {**arms_of(CASES, (0.0, ALPHA)),
            **arms_of({NAMED[k]: CASES[NAMED[k]] for k in (0, 2, 4)}, (STRONG,))}
BY_PRESET = {
    "toy": Study(TOY_ARMS, (SHORT, LONG), TOY_CLAIMS, METRICS, is_paired=True,
                 first_only=tuple(name for name in TOY_ARMS if name not in BUDGETED)),
    "photos": Study(arms_of(PHOTO_CASES, (0.0, ALPHA)), (SHORT,), PHOTO_CLAIMS, METRICS,
                    is_paired=True),
}


def derived(row):
    """More metrics of a row, computed from its own: the caption loss on the log scale; and where
    some attributes are named and some are not, the probe on those that are not, and how much better
    it is there."""
    out, top1 = {}, row.get("by_attribute", {})
    if "caption_loss" in row:
        out["log_caption_loss"] = math.log(row["caption_loss"])
    words = row["flags"]["data"].split(":")[-2].split("_")  # data is FOLDER:KIND:1
    named = [top1[a] for a in top1 if words[0] == "names" and a in words]
    if len(named) in SOME:
        out["not_named"] = fmean(top1[a] for a in top1 if a not in words)
        out["not_named_minus_named"] = out["not_named"] - fmean(named)
    return out


def gains(study, rows):
    """{(case, alpha, samples): (gain in the probe, half interval)}, of all pairs of arms that have
    a seed in common."""
    cases = dict.fromkeys(name.rpartition(", alpha ")[0] for name in study.arms)
    out = {}
    for samples in study.samples:
        for alpha in (ALPHA, STRONG):
            for case in cases:
                found = difference(rows, "probe", [(arm(case, alpha), samples)],
                                   [(arm(case, 0.0), samples)], is_paired=True)
                if found:
                    out[case, alpha, samples] = found
    return out


def attribute_gains(rows, attribute, samples):
    """Gain of one attribute where the captions do not name it, where they do, and the first minus
    the second: three (gain, half interval); None until all kinds of captions have been read.

    Each is the mean over k = 1, 2, 3 of means over pairs of runs. Pairs that read the same captions
    are replicates: the spread is that between these, for this attribute.
    """
    runs = {(row["arm"], row["seed"]): row for row in rows if row["samples"] == samples}
    cells = defaultdict(list)
    for k in SOME:
        for seed in {seed for _, seed in runs}:
            pair = [runs.get((arm(NAMED[k], alpha), seed)) for alpha in (ALPHA, 0.0)]
            if None not in pair:
                plus, minus = (row["by_attribute"][attribute] for row in pair)
                cells[k, named_attributes(k, seed)].append(plus - minus)
    if len(cells) < len(SOME) * len(ATTRIBUTES):
        return None
    # At each k, k of the four kinds of captions name the attribute
    named = {cell: 1 / (len(SOME) * cell[0]) for cell in cells if attribute in cell[1]}
    others = {cell: 1 / (len(SOME) * (len(ATTRIBUTES) - cell[0])) for cell in cells
              if attribute not in cell[1]}
    both = others | {cell: -weight for cell, weight in named.items()}
    return [weighted(cells, weights) for weights in (others, named, both)]


def gain_panels(rows):
    """What `plots.gain_page` draws. Args: rows: {preset: rows, some or none}."""
    toy, photos = ({key: (100 * value, 100 * half)
                    for key, (value, half) in gains(BY_PRESET[preset], rows[preset]).items()}
                   for preset in BY_PRESET)
    budgets = {f"alpha {alpha:g}, {samples:,} samples": {
        case.split()[0]: found for (case, *other), found in toy.items()
        if other == [alpha, samples]} for alpha, samples in (
            (ALPHA, SHORT), (STRONG, SHORT), (ALPHA, LONG))}
    parts = defaultdict(dict)
    for attribute in ATTRIBUTES:
        found = attribute_gains(rows["toy"], attribute, SHORT) or ()
        for part, (value, half) in zip(("not named", "named"), found, strict=False):
            parts[part][attribute] = 100 * value, 100 * half
    return {
        "Toy scenes": ("attributes named in the captions, of 4",
                       {name: found for name, found in budgets.items() if found}),
        f"Toy scenes, alpha {ALPHA}, 1 to 3 named": ("attribute that the probe asks for", parts),
        "Photographs, probe of the class": (
            "what the captions name",
            {f"alpha {ALPHA}": {case.replace(" ", "\n", 1): found
                               for (case, *_), found in photos.items()}} if photos else {})}


def gain_tables(study, rows):
    """Lines of Markdown, in points: the gain of every pair of arms, then of every attribute; none
    if the arms do not come in pairs."""
    found = gains(study, rows)
    if not found:
        return []
    lines = ["", table_line("captions", "alpha", "samples", "gain from pixels, points [95%]"),
             "|---" * 4 + "|"]
    lines += [table_line(case, alpha, f"{samples:,}", points(gain))
              for (case, alpha, samples), gain in found.items()]
    by_attribute = {a: attribute_gains(rows, a, study.samples[0]) for a in ATTRIBUTES
                    if all(a in row.get("by_attribute", ()) for row in rows)}
    if any(by_attribute.values()):
        lines += ["", table_line("gain, 1 to 3 named", "where it is not named",
                                 "where it is named", "difference"), "|---" * 4 + "|"]
        lines += [table_line(a, *map(points, found)) for a, found in by_attribute.items() if found]
    return lines


def points(found):
    value, half = found
    return interval_text(100 * value, 100 * half, 1)
