"""Study: a claim of the paper, put to the test by training every arm of a comparison alike.

A study is a table of *arms* (settings that differ) and of *claims* (which arm should be better, in what). Every arm is
trained at every sample count with every seed, one run after the other (or --jobs at a time), then measured:

- `probe`: top-1 of the attentive probe on the frozen encoder, mean over the attributes of the pictures (probe.py);
- `caption_loss`: nats a token on held-out images, the encoder bidirectional, as it is used (M = n);
- `image_loss`: held-out, prefixes drawn as in training.

Each measured run is a row of OUT/PRESET-NAME.jsonl. A row that is there is not trained again: an interrupted study goes
on, more --seeds are added, and without anything to do the table and the figure are drawn anew.

    python -m nano_aimv2.study objective                    # the toy set, drawn on first use
    python -m nano_aimv2.study objective --preset=photos    # photographs packed into data/photos_study, see lessons/studies

An arm's value is the mean over seeds; how much a seed matters is pooled over the arms (at the same sample count), and a
claim *holds* or *fails* if the 95% interval (Student's t) of the difference leaves 0 out; else it *cannot be told*.

Source: paper figures 2 and 4, tables 9a to 9f. Lesson: 12, with the results.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from nano_aimv2 import metrics, probe
from nano_aimv2.checkpoint import load_model
from nano_aimv2.config import Config
from nano_aimv2.contrastive import CLIP
from nano_aimv2.data import parse_mixture
from nano_aimv2.distributed import alone, choose_device, keep_memory
from nano_aimv2.evaluate import Evaluation, held_out_sources
from nano_aimv2.heads import Settings

# 97.5% points of Student's t for 1 .. 30 degrees of freedom; beyond, the normal one is near
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
           2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
UP, DOWN = 1, -1
METRICS = {"probe": ("top-1 of the attentive probe", UP), "caption_loss": ("caption loss, nats a token", DOWN),
           "image_loss": ("image loss, normalised patches", DOWN)}

# What all arms share. Small enough that all studies of one preset take an hour or two of two CPU cores.
SMALL = dict(embed_dim=96, num_blocks=3, num_heads=3, decoder_dim=96, decoder_blocks=2, decoder_heads=3, batch_size=32,
             lr=1e-3, warmup_steps=100, eval_every=0, eval_images=64, save_every=0)
BASES = {
    "toy": dict(SMALL, data="data/scenes_study:synthetic:85,data/scenes_study:alt:15"),
    "photos": dict(SMALL, data="data/photos_study:synthetic:1,data/photos_study:alt:1", patch_size=8),
}
PROBED = {"toy": (2000, 6000), "photos": (4000, 6000)}  # at most so many labelled images to learn from and to test on
MEASURED = 1000  # held-out images for the two losses


@dataclass(frozen=True)
class Claim:
    """Cells, (arm, samples), that are better in `metric` than others: the sum of ones against the sum of the others."""

    text: str
    metric: str
    better: tuple
    worse: tuple


@dataclass(frozen=True)
class Study:
    arms: dict  # {name: settings that differ; "contrastive": True is the CLIP baseline}
    samples: tuple  # how many samples a run sees, epochs included
    claims: tuple
    metrics: tuple = ("probe", "caption_loss")
    against_flops: bool = False  # the figure's axis; else samples


def doublings(arms, samples, metric):
    """More data helps, and more parameters: each arm against itself with half the samples, and against the smaller arm."""
    for arm, (few, many) in itertools.product(arms, itertools.pairwise(samples)):
        yield Claim(f"{arm}: {many:,} samples beat {few:,}", metric, ((arm, many),), ((arm, few),))
    for (small, large), count in itertools.product(itertools.pairwise(arms), samples):
        yield Claim(f"{count:,} samples: {large} beats {small}", metric, ((large, count),), ((small, count),))


def at_each(samples, text, metric, better, worse):
    """One claim at every sample count."""
    for count in samples:
        yield Claim(f"{count:,} samples: {text}", metric, ((better, count),), ((worse, count),))


WIDTHS = {"width 32": dict(embed_dim=32, num_heads=1), "width 96": {}, "width 192": dict(embed_dim=192, num_heads=6)}
SCALES = (8_000, 16_000, 32_000, 64_000)
SIZES = (20_000, 60_000)
TUNED = (30_000,)
STUDIES = {
    "scaling": Study(WIDTHS, SCALES, metrics=("caption_loss", "image_loss", "probe"), against_flops=True, claims=(
        *doublings(WIDTHS, SCALES, "caption_loss"),
        *doublings(WIDTHS, SCALES, "probe"),
        Claim("small models saturate first: from 32,000 to 64,000 samples width 192 gains more than width 32", "probe",
              (("width 192", 64_000), ("width 32", 32_000)), (("width 192", 32_000), ("width 32", 64_000))),
        Claim("at small compute the larger is worse: width 96 with 16,000 samples beats width 192 with 8,000",
              "caption_loss", (("width 96", 16_000),), (("width 192", 8_000),)))),
    "objective": Study({
        "AIMv2": {},
        "caption only, prefix": dict(alpha=0.0),
        "caption only, bidirectional": dict(alpha=0.0, prefix="full"),
        "image only": dict(text_weight=0.0),
        "CLIP": dict(contrastive=True),
    }, SIZES, claims=(
        *at_each(SIZES, "both losses beat caption only", "probe", "AIMv2", "caption only, prefix"),
        *at_each(SIZES, "both losses beat caption only, bidirectional", "probe", "AIMv2", "caption only, bidirectional"),
        *at_each(SIZES, "caption only: prefix beats bidirectional", "probe", "caption only, prefix",
                 "caption only, bidirectional"),
        *at_each(SIZES, "caption only beats image only", "probe", "caption only, prefix", "image only"),
        *at_each(SIZES, "AIMv2 beats CLIP", "probe", "AIMv2", "CLIP"),
        Claim("captioning plateaus first: AIMv2 gains more from 20,000 to 60,000 samples", "probe",
              (("AIMv2", 60_000), ("caption only, prefix", 20_000)), (("AIMv2", 20_000), ("caption only, prefix", 60_000))),
        *at_each(SIZES, "the image loss helps the captions", "caption_loss", "AIMv2", "caption only, prefix"))),
    "ablations": Study({
        "baseline": {},  # alpha 0.4, decoder 2 x 96, random prefixes, normalised patches
        "alpha 0.1": dict(alpha=0.1),
        "alpha 1.6": dict(alpha=1.6),
        "decoder width 48": dict(decoder_dim=48),
        "decoder width 192": dict(decoder_dim=192),
        "decoder depth 1": dict(decoder_blocks=1),
        "decoder depth 4": dict(decoder_blocks=4),
        "causal": dict(prefix="causal"),
        "raw pixels": dict(raw_pixels=True),
    }, TUNED, claims=tuple(
        Claim(text, metric, (("baseline", TUNED[0]),), ((arm, TUNED[0]),)) for metric in ("probe", "caption_loss")
        for arm, text in {
            "alpha 0.1": "alpha 0.4 beats 0.1", "alpha 1.6": "alpha 0.4 beats 1.6",
            "decoder width 48": "decoder width 96 beats 48", "decoder width 192": "decoder width 96 beats 192",
            "decoder depth 1": "decoder depth 2 beats 1", "decoder depth 4": "decoder depth 2 beats 4",
            "causal": "training with prefixes beats causal training, both used bidirectionally",
            "raw pixels": "normalised targets beat raw ones"}.items())),
}


@dataclass(frozen=True)
class Job:
    """One run: what to train and how to measure it."""

    arm: str
    samples: int
    seed: int
    flags: tuple  # ((setting, value), ...)
    run: str
    device: str
    probed: tuple  # labelled images (to learn from, to test on)

    @property
    def key(self):
        return self.arm, self.samples, self.seed, self.flags


def jobs_of(study, base, seeds, runs, device, probed):
    """Every run of a study, seeds outermost: a study that is stopped early has all arms with fewer seeds."""
    for seed, samples, (arm, changes) in itertools.product(range(seeds), study.samples, study.arms.items()):
        flags = {**base, **changes, "seed": seed, "steps": samples // base["batch_size"]}
        folder = f"{runs}/{arm.replace(', ', '-').replace(' ', '-')}-{samples}-{seed}"
        yield Job(arm, samples, seed, tuple(sorted(flags.items())), folder, device, probed)


def do(job):
    """Train and measure one run: its row of results. Raises RuntimeError with the last line of a training that failed."""
    flags = dict(job.flags)
    contrastive = flags.pop("contrastive", False)
    root, begin = Path(__file__).parents[1], time.perf_counter()
    script = ["-m", "nano_aimv2.contrastive"] if contrastive else [str(root / "train.py")]
    Path(job.run).mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(root)}
    with open(f"{job.run}/log.txt", "w") as log:
        done = subprocess.run([sys.executable, *script, *(f"--{k}={v}" for k, v in flags.items()), "--num_workers=0",
                               f"--device={job.device}", f"--run={job.run}"], env=os.environ | threads, stdout=log, stderr=log)
    if done.returncode:
        raise RuntimeError(f"{job.run}: {Path(log.name).read_text().strip().splitlines()[-1]}")
    row = dict(arm=job.arm, samples=job.samples, seed=job.seed, flags=dict(job.flags), device=job.device)
    row["seconds"] = round(time.perf_counter() - begin, 1)
    return row | measure(job.run, contrastive, job.device, job.probed)


def measure(run, contrastive, device, probed):
    """What a finished run is worth: probe and, of an AIMv2 run, held-out losses; parameters and training FLOPs."""
    model, config, tokenizer = load_model(run, kind=CLIP) if contrastive else load_model(run)
    folder = max(parse_mixture(config.data), key=lambda source: source.weight).path
    train, test = (labelled(f"{folder}/{split}", config.image_size, config.patch_size, count)
                   for split, count in zip(("train", "val"), probed, strict=True))
    scores = probe.probe_encoder(model.encoder, train, test, config, Settings(epochs=20, seed=config.seed, device=device))
    mean = {method: sum(s["top1"] for s in found.values()) / len(found) for method, found in scores.items()}
    row = dict(probe=mean["attentive"], linear=mean["linear"], knn=mean["k-NN"], test_images=len(test.patches),
               by_attribute={name: s["top1"] for name, s in scores["attentive"].items()},
               parameters=sum(p.numel() for p in model.encoder.parameters()))
    if contrastive:
        return row
    evaluation = Evaluation(held_out_sources(config)["val"], config, tokenizer, MEASURED)
    model.to(device)
    tokens = sum(int(batch.num_tokens.sum()) for batch in evaluation.batches)
    pairs = sum(len(batch.patches) for batch in evaluation.batches)
    n = (config.image_size // config.patch_size) ** 2
    flops = metrics.train_flops(config, n, evaluation.batches[0].tokens.shape[1], n / 2, tokens / pairs)
    row["train_flops"] = flops * config.steps * config.batch_size
    if config.text_weight:
        row["caption_loss"] = caption_loss(model, evaluation.batches, device) / tokens
    if config.alpha:
        row["image_loss"] = evaluation.losses(model, alone(device))[1]
    return row


@torch.no_grad()
def caption_loss(model, batches, device):
    """Cross-entropy of all captions in nats, each image seen whole by the encoder (M = n)."""
    return sum(float(model(batch.to(device), batch.grid.prod(dim=1).to(device)).text_sum) for batch in batches)


@cache
def labelled(folder, image_size, patch_size, count):
    """The first `count` labelled images of a folder, read once a process."""
    return probe.read_labelled(folder, Config(image_size=image_size, patch_size=patch_size), count)[0]


def cells_of(rows, metric):
    """{(arm, samples): [a value a seed]} of a metric, of those rows that have it."""
    cells = defaultdict(list)
    for row in rows:
        if metric in row:
            cells[row["arm"], row["samples"]].append(row[metric])
    return cells


def seed_variance(cells):
    """{samples: (variance over seeds, degrees of freedom)}, pooled over the arms at that sample count."""
    pooled = {}
    for samples in {key[1] for key in cells}:
        here = [values for (_, count), values in cells.items() if count == samples]
        freedom = sum(len(values) - 1 for values in here)
        square = sum((v - sum(values) / len(values)) ** 2 for values in here for v in values)
        pooled[samples] = (square / freedom if freedom else math.inf, freedom)
    return pooled


def contrast(cells, plus, minus):
    """Sum of the means of the cells `plus` less that of `minus`: (difference, half its 95% interval).

    The half is infinite with one seed. Cells of several sample counts: Satterthwaite's degrees of freedom.
    """
    pooled, parts = seed_variance(cells), defaultdict(float)
    for cell in (*plus, *minus):
        parts[cell[1]] += pooled[cell[1]][0] / len(cells[cell])
    value = sum(sum(cells[c]) / len(cells[c]) for c in plus) - sum(sum(cells[c]) / len(cells[c]) for c in minus)
    variance = sum(parts.values())
    if not 0 < variance < math.inf:
        return value, variance  # one seed: unknown; or no seed makes a difference
    freedom = variance**2 / sum(part**2 / pooled[samples][1] for samples, part in parts.items())
    return value, STUDENT[min(int(freedom), len(STUDENT)) - 1] * variance**0.5


def judge(claim, rows):
    """(difference in favour of the claim, half interval, verdict); None if an arm was not measured."""
    cells = cells_of(rows, claim.metric)
    if not all(cell in cells for cell in (*claim.better, *claim.worse)):
        return None
    value, half = contrast(cells, claim.better, claim.worse)
    value *= METRICS[claim.metric][1]
    return value, half, "holds" if value > half else "fails" if value < -half else "cannot be told"


def report(study, rows):
    """The results of a study as Markdown: a table of arms, then a table of claims."""
    lines = ["| arm | samples | seeds | " + " | ".join(METRICS[m][0] for m in study.metrics) + " | encoder | training |",
             "|---" * (5 + len(study.metrics)) + "|"]
    by_metric = {metric: cells_of(rows, metric) for metric in study.metrics}
    for samples, arm in itertools.product(study.samples, study.arms):
        mine = [row for row in rows if (row["arm"], row["samples"]) == (arm, samples)]
        if not mine:
            continue
        values = []
        for cells in by_metric.values():
            value, half = contrast(cells, [(arm, samples)], ()) if (arm, samples) in cells else (None, None)
            values.append("" if value is None else f"{value:.3f}" + (f" ± {half:.3f}" if half < math.inf else ""))
        seconds = sum(row["seconds"] for row in mine) / len(mine)
        lines.append(f"| {arm} | {samples:,} | {len(mine)} | " + " | ".join(values)
                     + f" | {mine[0]['parameters'] / 1e6:.2f}M | {seconds:.0f} s |")
    lines += ["", "| claim | in | difference [95%] | verdict |", "|---|---|---|---|"]
    for claim in study.claims:
        found = judge(claim, rows)
        if found:
            value, half, verdict = found
            ends = f" [{value - half:+.3f} {value + half:+.3f}]" if half < math.inf else ", one seed"
            lines.append(f"| {claim.text} | {claim.metric.replace('_', ' ')} | {value:+.3f}{ends} | {verdict} |")
    return "\n".join(lines) + "\n"


def draw(study, rows, path):
    """The figure of a study: a panel for each of its metrics, means over seeds with their 95% intervals."""
    from nano_aimv2.plots import study_page

    cells = {METRICS[metric][0]: cells_of(rows, metric) for metric in study.metrics}
    panels = {label: {cell: contrast(values, [cell], ()) for cell in values} for label, values in cells.items()}
    flops = {(row["arm"], row["samples"]): row["train_flops"] for row in rows} if study.against_flops else None
    study_page(panels, flops, path)


def run_jobs(jobs, path, at_once=1):
    """Train and measure what `path` (a .jsonl) has no row of yet, `at_once` runs side by side; returns all rows.

    A run that fails stops no other; RuntimeError names all of them at the end.
    """
    jobs, path = list(jobs), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.read_text() if path.exists() else ""
    if written and not written.endswith("\n"):
        path.write_text(written + "\n")  # a row that a kill has cut spoils none that follows
    places = {job.key: place for place, job in enumerate(jobs)}
    rows = [row for row in (metrics.read_metrics(path) if written else ()) if key_of(row) in places]
    measured = {key_of(row) for row in rows}
    left, failed = [job for job in jobs if job.key not in measured], []
    if not left:
        return sorted(rows, key=lambda row: places[key_of(row)])
    threads = max(1, (os.cpu_count() or 1) // at_once)
    with ProcessPoolExecutor(at_once, get_context("spawn"), start, (threads,)) as pool, \
            tqdm(total=len(jobs), initial=len(rows), unit="run") as bar:
        futures = {pool.submit(do, job): job for job in left}
        for future in as_completed(futures):
            try:
                row = future.result()
            except RuntimeError as error:
                failed.append(str(error))
                tqdm.write(f"failed: {error}")
                continue
            rows.append(row)
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
            shutil.rmtree(f"{futures[future].run}/checkpoints", ignore_errors=True)  # measured: its weights are enough
            bar.update()
            bar.set_postfix_str(f"{row['arm']}, {row['samples']:,} samples: probe {row['probe']:.3f}")
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(jobs)} runs failed, the others are in {path}: " + "; ".join(failed))
    return sorted(rows, key=lambda row: places[key_of(row)])  # not in the order in which they were finished


def key_of(row):
    flags = {k: tuple(v) if isinstance(v, list) else v for k, v in row["flags"].items()}
    return row["arm"], row["samples"], row["seed"], tuple(sorted(flags.items()))


def start(threads):
    torch.set_num_threads(threads)
    keep_memory()


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m nano_aimv2.study", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=STUDIES)
    parser.add_argument("--preset", choices=BASES, default="toy")
    parser.add_argument("--data", default="", help="another mixture than the preset's, as train.py's --data; give --out with it")
    parser.add_argument("--samples", default="", help="other sample counts than the study's, with commas between")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every arm; seeds 0 .. SEEDS-1")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; they share the cores or the GPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="lessons/studies", help="where results, table and figure go")
    parser.add_argument("--runs", default="runs/studies", help="where the runs go")
    given = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        if getattr(given, name) < 1:
            raise ValueError(f"{name}={getattr(given, name)} must be at least 1")
    study, base = STUDIES[given.name], dict(BASES[given.preset])
    base["data"] = given.data or base["data"]
    if given.samples:
        study = replace(study, samples=read_samples(given.samples, base["batch_size"]))
    if given.preset == "toy" and not given.data and not Path("data/scenes_study").exists():
        scenes = Path(__file__).parents[1] / "data/scenes.py"  # the toy set with more images to test on
        subprocess.run([sys.executable, scenes, "--out=data/scenes_study", f"--val={PROBED['toy'][1]}"], check=True)
    for source in parse_mixture(base["data"]):
        if not Path(source.path).exists():
            raise ValueError(f"{source.path} does not exist: pack labelled pictures with `python data/pack.py PICTURES "
                             f"--out={source.path} --val=0.2`, or name others with --data")
    jobs = jobs_of(study, base, given.seeds, f"{given.runs}/{given.preset}-{given.name}", choose_device(given.device).type,
                   PROBED[given.preset])
    out = Path(given.out) / f"{given.preset}-{given.name}"
    rows = run_jobs(jobs, f"{out}.jsonl", given.jobs)
    text = report(study, rows)
    Path(f"{out}.md").write_text(text)
    print(text)
    draw(study, rows, f"{out}.png")
    print(f"written: {out}.jsonl, {out}.md, {out}.png")


def read_samples(text, batch_size):
    """'8000,16000' -> (8000, 16000). Raises ValueError where that is no count of at least one step."""
    try:
        samples = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--samples={text} must be whole numbers with commas between, such as 8000,16000") from None
    if min(samples) < batch_size:
        raise ValueError(f"--samples={text}: {min(samples)} samples are not one step of {batch_size}")
    return samples


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"study: {error}")
