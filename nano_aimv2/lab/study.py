"""Study: tests claims of the paper by training all arms of a comparison alike, with several seeds.

A study is a table of *arms* (settings that differ) and of *claims* (which arm should be better, in
which metric). Every arm is trained with every number of samples and every seed, then measured:

- `probe`: top-1 accuracy of the attentive probe on the frozen encoder, averaged over the attributes
  of the images (probe.py);
- `caption_loss`: nats per token on held-out images, with the encoder bidirectional (M = n);
- `image_loss`: on held-out images, with prefixes sampled as in training.

Each measured run is a row of OUT/PRESET-NAME.jsonl, and a run that has a row is not trained again:
an interrupted study resumes, and more --seeds add runs. Without anything left to train, only the
table and the figure are made again. The study `pixels` has its arms and claims in pixels.py.

    python -m nano_aimv2.lab.study objective       # or another one; draws the toy set first
    python -m nano_aimv2.lab.study objective --preset=photos --jobs=2    # see lessons/studies

The value of an arm is the mean over its seeds. Whether a claim holds, fails or is inconclusive is
decided by claims.py.

Source: paper figures 2 and 4, tables 9a to 9f. Lesson: 15, with the results.
"""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

from nano_aimv2.config import Config
from nano_aimv2.data.mixture import largest_source, open_sources, parse_mixture
from nano_aimv2.files import remove, write_text
from nano_aimv2.flags import check_at_least, check_choice, read_flags, run_command
from nano_aimv2.lab import pixels, probe
from nano_aimv2.lab.claims import (
    METRICS,
    Claim,
    Study,
    difference,
    interval_text,
    judge,
    table_line,
)
from nano_aimv2.lab.contrastive import CLIP
from nano_aimv2.lab.heads import Settings
from nano_aimv2.lab.plots import gain_page, study_page
from nano_aimv2.lab.sizes import whole_numbers
from nano_aimv2.model import AIMv2
from nano_aimv2.training import metrics
from nano_aimv2.training.checkpoint import load_model
from nano_aimv2.training.distributed import choose_device, keep_memory, single_process
from nano_aimv2.training.evaluate import Evaluation, held_out_sources

ROOT = Path(__file__).parents[2]  # the clone, with train.py in it
read_labelled = cache(probe.read_labelled)  # once per process: all runs of a study share the images

# What all arms share. Small: all studies of one preset take an hour or two on two CPU cores.
SMALL = dict(embed_dim=96, num_blocks=3, num_heads=3, decoder_dim=96, decoder_blocks=2,
             decoder_heads=3, batch_size=32, lr=1e-3, warmup_steps=100, eval_every=0,
             eval_images=64, save_every=0)
TOY_SET = "data/scenes_study"
BASES = {
    "toy": dict(SMALL, data=f"{TOY_SET}:synthetic:85,{TOY_SET}:alt:15"),
    "photos": dict(SMALL, data="data/photos_study:synthetic:1,data/photos_study:alt:1",
                   patch_size=8),
}
PROBED = {"toy": (2000, 6000), "photos": (4000, 6000)}  # at most: labelled images to learn, to test
MEASURED = 1000  # held-out images for the two losses


def at_each(samples, text, metric, better, worse):
    """The same claim at every number of samples."""
    for count in samples:
        yield Claim(f"{count:,} samples: {text}", metric, ((better, count),), ((worse, count),))


def doublings(arms, samples, metric):
    """More data helps: each arm against itself with half the samples. More parameters help: each
    arm against the next smaller one."""
    for arm, (few, many) in itertools.product(arms, itertools.pairwise(samples)):
        yield Claim(f"{arm}: {many:,} samples beat {few:,}", metric, ((arm, many),), ((arm, few),))
    for small, large in itertools.pairwise(arms):
        yield from at_each(samples, f"{large} beats {small}", metric, large, small)


WIDTHS = {"width 32": dict(embed_dim=32, num_heads=1), "width 96": {},
          "width 192": dict(embed_dim=192, num_heads=6)}
SCALES = (8_000, 16_000, 32_000, 64_000)
SIZES = (20_000, 60_000)
TUNED = 30_000
BOTH, PREFIX, FULL = "AIMv2", "caption only, prefix", "caption only, bidirectional"
CAPTIONERS = {BOTH: {}, PREFIX: dict(alpha=0.0), FULL: dict(alpha=0.0, prefix="full")}
ABOUT_CAPTIONERS = (
    *at_each(SIZES, "both losses beat caption only", "probe", BOTH, PREFIX),
    *at_each(SIZES, "both losses beat caption only, bidirectional", "probe", BOTH, FULL),
    *at_each(SIZES, "caption only: prefix beats bidirectional", "probe", PREFIX, FULL),
    Claim("captioning plateaus first: AIMv2 gains more from 20,000 to 60,000 samples", "probe",
          ((BOTH, 60_000), (PREFIX, 20_000)), ((BOTH, 20_000), (PREFIX, 60_000))))
ABLATIONS = {  # arm: (settings that differ from the baseline, claim)
    "alpha 0.1": (dict(alpha=0.1), "alpha 0.4 beats 0.1"),
    "alpha 1.6": (dict(alpha=1.6), "alpha 0.4 beats 1.6"),
    "decoder width 48": (dict(decoder_dim=48), "decoder width 96 beats 48"),
    "decoder width 192": (dict(decoder_dim=192), "decoder width 96 beats 192"),
    "decoder depth 1": (dict(decoder_blocks=1), "decoder depth 2 beats 1"),
    "decoder depth 4": (dict(decoder_blocks=4), "decoder depth 2 beats 4"),
    "causal": (dict(prefix="causal"),
               "training with prefixes beats causal training, both used bidirectionally"),
    "raw pixels": (dict(raw_pixels=True), "normalised targets beat raw ones"),
}
STUDIES = {
    "scaling": Study(
        WIDTHS, SCALES, metrics=("caption_loss", "image_loss", "probe"), against_flops=True,
        claims=(
            *doublings(WIDTHS, SCALES, "caption_loss"),
            *doublings(WIDTHS, SCALES, "probe"),
            Claim("small models saturate first: from 32,000 to 64,000 samples width 192 gains more "
                  "than width 32", "probe",
                  (("width 192", 64_000), ("width 32", 32_000)),
                  (("width 192", 32_000), ("width 32", 64_000))),
            Claim("at small compute the larger is worse: width 96 with 16,000 samples beats width "
                  "192 with 8,000", "caption_loss",
                  (("width 96", 16_000),), (("width 192", 8_000),)))),
    "objective": Study(
        {**CAPTIONERS, "image only": dict(text_weight=0.0), "CLIP": dict(contrastive=True)}, SIZES,
        claims=(
            *ABOUT_CAPTIONERS,
            *at_each(SIZES, "caption only beats image only", "probe", PREFIX, "image only"),
            *at_each(SIZES, "AIMv2 beats CLIP", "probe", BOTH, "CLIP"),
            *at_each(SIZES, "the image loss helps the captions", "caption_loss", BOTH, PREFIX))),
    "settle": Study(CAPTIONERS, SIZES, is_paired=True, claims=(  # more seeds of these three arms
        *ABOUT_CAPTIONERS,
        *at_each(SIZES, "the image loss helps the captions", "log_caption_loss", BOTH, PREFIX))),
    "ablations": Study(
        {"baseline": {}, **{arm: changes for arm, (changes, _) in ABLATIONS.items()}}, (TUNED,),
        claims=tuple(Claim(text, metric, (("baseline", TUNED),), ((arm, TUNED),))
                     for metric in ("probe", "caption_loss")
                     for arm, (_, text) in ABLATIONS.items())),
    "pixels": pixels.BY_PRESET["toy"],
}


@dataclass(frozen=True)
class Job:
    """One run: what to train and how to measure it."""

    arm: str
    samples: int
    seed: int
    flags: dict  # settings of train.py, and "contrastive"
    run_dir: str
    device: str
    probed: tuple  # labelled images (to learn from, to test on)


def study_of(name, preset):
    return pixels.BY_PRESET[preset] if name == "pixels" else STUDIES[name]


def flags_of(base, changes, seed):
    """Settings of one run: those all arms share, then those of its arm.

    Two of an arm's settings are not of train.py: `contrastive` makes it the CLIP baseline, and
    `kinds` are caption kinds of the largest source of the base: seed s reads kind s, modulo their
    number, and no other.
    """
    flags = {**base, **changes, "seed": seed}
    kinds = flags.pop("kinds", None)
    if kinds:
        flags["data"] = f"{largest_source(base['data']).path}:{kinds[seed % len(kinds)]}:1"
    return flags


def jobs_of(study, base, seeds, run_dir, device, probed):
    """Every run of a study. Seeds come outermost: a study that is stopped early has measured all
    arms, with fewer seeds."""
    runs = itertools.product(range(seeds), study.samples, study.arms.items())
    for seed, samples, (arm, changes) in runs:
        if arm in study.first_only and samples != study.samples[0]:
            continue
        flags = flags_of(base, changes, seed) | {"steps": samples // base["batch_size"]}
        name = f"{arm.replace(', ', '-').replace(' ', '-')}-{samples}-{seed}"
        yield Job(arm, samples, seed, flags, f"{run_dir}/{name}", device, probed)


def run_key(arm, samples, seed, flags, **_):
    """What identifies a run, from the fields of its job or of its row."""
    return arm, samples, seed, tuple(sorted(flags.items()))


def run_jobs(jobs, path, at_once=1):
    """Train and measure the jobs without a row in `path` (.jsonl), `at_once` of them side by side.

    Returns: the rows of all jobs, in the order of the jobs.
    Raises: RuntimeError that names the runs that failed, when all others are done.
    """
    jobs, path = {run_key(**vars(job)): job for job in jobs}, Path(path)
    rows = {run_key(**row): row for row in read_rows(path)}
    left, failed = [job for key, job in jobs.items() if key not in rows], []
    if left:
        threads = max(1, (os.cpu_count() or 1) // at_once)
        pool = ProcessPoolExecutor(at_once, get_context("spawn"), share_cores, (threads,))
        bar = tqdm(total=len(jobs), initial=len(jobs) - len(left), unit="run")
        with pool, bar:
            futures = {pool.submit(run_job, job): job for job in left}
            for future in as_completed(futures):
                try:
                    row = future.result()
                except RuntimeError as error:
                    failed.append(str(error))
                    tqdm.write(f"failed: {error}")
                    continue
                rows[run_key(**row)] = row
                with open(path, "a") as file:
                    file.write(json.dumps(row) + "\n")
                remove(Path(futures[future].run_dir, "checkpoints"))  # the run keeps its weights
                bar.update()
                bar.set_postfix_str(f"{row['arm']}, {row['samples']:,} samples: "
                                    f"probe {row['probe']:.3f}")
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(jobs)} runs failed, the others are in {path}: "
                           + "; ".join(failed))
    return [rows[key] for key in jobs]


def read_rows(path):
    """The rows of a .jsonl, none if it does not exist yet. A last line that was cut by a kill gets
    an end, so that it does not spoil the next row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        path.write_text(text + "\n")
    return metrics.read_metrics(path) if text else []


def share_cores(threads):
    """Start a worker process that uses its share of the CPU cores."""
    torch.set_num_threads(threads)
    keep_memory()


def run_job(job):
    """Train and measure one run. Returns its row. Raises RuntimeError with the last line of the
    log if the training fails."""
    begin, flags = time.perf_counter(), dict(job.flags)
    script = [str(ROOT / "train.py")]
    if flags.pop("contrastive", False):
        script = ["-m", "nano_aimv2.lab.contrastive"]
    flags |= {"num_workers": 0, "device": job.device, "run_dir": job.run_dir}
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    Path(job.run_dir).mkdir(parents=True, exist_ok=True)
    log = Path(job.run_dir, "log.txt")
    with open(log, "w") as file:
        done = subprocess.run([sys.executable, *script, *(f"--{k}={v}" for k, v in flags.items())],
                              env=os.environ | environment, stdout=file, stderr=file)
    if done.returncode:
        raise RuntimeError(f"{job.run_dir}: {log.read_text().strip().splitlines()[-1]}")
    row = dict(arm=job.arm, samples=job.samples, seed=job.seed, flags=job.flags, device=job.device,
               seconds=round(time.perf_counter() - begin, 1))
    return row | measure(job)


def measure(job):
    """Results of a finished run: probes, held-out losses, parameters, and FLOPs of the training.

    A contrastive run has no losses and no FLOPs.
    """
    contrastive = "contrastive" in job.flags
    model, config, tokenizer = load_model(job.run_dir, kind=CLIP if contrastive else AIMv2)
    folder = largest_source(config.data).path
    view = Config(image_size=config.image_size, patch_size=config.patch_size)
    train, _ = read_labelled(f"{folder}/train", view, job.probed[0])
    test, _ = read_labelled(f"{folder}/val", view, job.probed[1])
    settings = Settings(epochs=20, seed=config.seed, device=job.device)
    scores = probe.probe_encoder(model.encoder, train, test, settings)
    top1 = {method: {attribute: score["top1"] for attribute, score in found.items()}
            for method, found in scores.items()}
    row = dict(probe=fmean(top1["attentive"].values()), linear=fmean(top1["linear"].values()),
               knn=fmean(top1["k-NN"].values()), test_images=len(test.patches),
               by_attribute=top1["attentive"],
               parameters=sum(p.numel() for p in model.encoder.parameters()))
    if contrastive:
        return row
    return row | held_out_losses(model.to(job.device), config, tokenizer, job.device)


def held_out_losses(model, config, tokenizer, device):
    """Held-out losses that a run was trained for, and the matmul FLOPs of its training."""
    evaluation = Evaluation(held_out_sources(config)["val"], config, tokenizer, MEASURED)
    batches = evaluation.batches
    tokens = sum(int(batch.num_tokens.sum()) for batch in batches)
    pairs = sum(len(batch.patches) for batch in batches)
    n = (config.image_size // config.patch_size) ** 2
    flops = metrics.train_flops(config, n, batches[0].tokens.shape[1], n / 2, tokens / pairs)
    row = {"train_flops": flops * config.steps * config.batch_size}
    if config.text_weight:
        row["caption_loss"] = caption_loss(model, batches, device) / tokens
    if config.alpha:
        row["image_loss"] = evaluation.losses(model, single_process(device))[1]
    return row


@torch.no_grad()
def caption_loss(model, batches, device):
    """Cross-entropy of all captions in nats, with each image seen whole by the encoder (M = n)."""
    return sum(float(model(batch.to(device), batch.grid.prod(dim=1).to(device)).text_sum)
               for batch in batches)


def tables(study, rows):
    """The results of a study as Markdown: a table of arms, then a table of claims; between them
    those of pixels.py, if its arms come in pairs."""
    if study.is_paired:
        rows = [row | pixels.derived(row) for row in rows]
    titles = [METRICS[metric][0] for metric in study.metrics]
    lines = [table_line("arm", "samples", "seeds", *titles, "encoder", "training"),
             "|---" * (5 + len(titles)) + "|"]
    for samples, arm in itertools.product(study.samples, study.arms):
        mine = [row for row in rows if (row["arm"], row["samples"]) == (arm, samples)]
        if mine:
            values = [cell_text(study, rows, metric, (arm, samples)) for metric in study.metrics]
            seconds = fmean(row["seconds"] for row in mine)
            lines.append(table_line(arm, f"{samples:,}", len(mine), *values,
                                    f"{mine[0]['parameters'] / 1e6:.2f}M", f"{seconds:.0f} s"))
    lines += pixels.gain_tables(study, rows)
    lines += ["", table_line("claim", "in", "difference [95%]", "verdict"), "|---" * 4 + "|"]
    for claim in study.claims:
        found = judge(claim, rows, study.is_paired)
        if found:
            lines.append(table_line(claim.text, claim.metric.replace("_", " "),
                                    interval_text(*found[:2]), found[2]))
    return "\n".join(lines) + "\n"


def cell_text(study, rows, metric, cell):
    """Mean and half interval of a cell; nothing if the arm does not have the metric."""
    found = difference(rows, metric, [cell], is_paired=study.is_paired)
    if not found:
        return ""
    value, half = found
    return f"{value:.3f} ± {half:.3f}" if half < math.inf else f"{value:.3f}"


def draw(study, rows, path):
    """The figure of a study: one panel per metric, means over seeds with their 95% intervals."""
    panels = {}
    for metric in study.metrics:
        found = {cell: difference(rows, metric, [cell], is_paired=study.is_paired)
                 for cell in itertools.product(study.arms, study.samples)}
        panels[METRICS[metric][0]] = {cell: value for cell, value in found.items() if value}
    flops = None
    if study.against_flops:
        flops = {(row["arm"], row["samples"]): row["train_flops"] for row in rows}
    return study_page(panels, flops, path)


@dataclass
class Options:
    name: tuple = ()  # the word on the command line: one of STUDIES
    preset: str = "toy"  # toy or photos
    data: str = ""  # another mixture than the preset's, written as for train.py; give --out with it
    samples: str = ""  # other numbers of samples than the study's, with commas between
    seeds: int = 3  # runs of every arm, with seeds 0 .. SEEDS-1
    jobs: int = 1  # runs side by side; they share the cores or the GPU
    device: str = "auto"  # auto, cpu, cuda or mps
    out: str = "lessons/studies"  # folder for rows, tables and figures
    run_dir: str = "runs/studies"  # folder for the runs

    def __post_init__(self):
        if len(self.name) != 1:
            raise ValueError(f"name one study: {', '.join(STUDIES)}")
        check_choice("study", self.name[0], STUDIES)
        check_choice("preset", self.preset, BASES)
        check_at_least(self, seeds=1, jobs=1)


def main(argv):
    options = Options(**read_flags(argv, Options, doc=__doc__, words="name")[0])
    if not (ROOT / "train.py").exists():
        raise ValueError(f"{ROOT} has no train.py, which a study starts: run it from a clone of "
                         "the repository")
    study = study_of(options.name[0], options.preset)
    base = dict(BASES[options.preset])
    base["data"] = options.data or base["data"]
    if options.samples:
        study = replace(study, samples=parse_samples(options.samples, base["batch_size"]))
    prepare_data(base["data"])
    name, device = f"{options.preset}-{options.name[0]}", choose_device(options.device).type
    jobs = list(jobs_of(study, base, options.seeds, f"{options.run_dir}/{name}", device,
                        PROBED[options.preset]))
    check_kinds({job.flags["data"] for job in jobs} - {base["data"]})
    out = f"{options.out}/{name}"
    try:
        rows = run_jobs(jobs, f"{out}.jsonl", options.jobs)
    except RuntimeError as error:
        raise ValueError(error) from error
    text = tables(study, rows)
    write_text(f"{out}.md", text)
    figure = f"{out}.png"
    if options.name[0] == "pixels":  # one figure of both presets, from all rows that there are
        figure = f"{options.out}/{options.name[0]}.png"
        found = {p: read_rows(Path(f"{options.out}/{p}-{options.name[0]}.jsonl")) for p in BASES}
        gain_page(pixels.gain_panels(found), figure)
    else:
        draw(study, rows, figure)
    print(f"{text}written: {out}.jsonl, {out}.md, {figure}")


def prepare_data(data):
    """Draw the toy set of the studies if it is missing. Raises ValueError if another set is."""
    for source in parse_mixture(data):
        if Path(source.path).exists():
            continue
        if source.path != TOY_SET:
            raise ValueError(f"{source.path} does not exist: pack labelled images with `python "
                             f"data/pack.py PHOTOS --out={source.path} --val=0.2`, or name others "
                             "with --data")
        done = subprocess.run([sys.executable, ROOT / "data/scenes.py", f"--out={TOY_SET}",
                               f"--val={PROBED['toy'][1]}", "--subsets=true"])  # more to test on
        if done.returncode:
            raise ValueError(f"data/scenes.py could not draw {TOY_SET}: see its message above")


def check_kinds(mixtures):
    """Raise ValueError if a data set lacks captions that an arm reads."""
    for mixture in sorted(mixtures):
        try:
            open_sources(mixture)
        except ValueError as error:
            raise ValueError(f"{error}. A set that was made before this study existed lacks its "
                             "captions: move the folder away and make it again, see "
                             "lessons/studies/README.md") from error


def parse_samples(text, batch_size):
    """'8000,16000' -> (8000, 16000). Raises ValueError unless each is at least one step."""
    samples = tuple(whole_numbers("samples", text, "8000,16000"))
    if min(samples) < batch_size:
        raise ValueError(f"--samples={text}: {min(samples)} samples are not one step of "
                         f"{batch_size}, give at least as many")
    return samples


if __name__ == "__main__":
    run_command(main)
