"""Studies: arms are trained once and judged by the spread over their seeds."""

import itertools
import json
import math

import pytest
import torch
from conftest import TINY, random_batch, tiny_config

from nano_aimv2 import study
from nano_aimv2.config import Config
from nano_aimv2.model import AIMv2
from nano_aimv2.plots import study_page
from nano_aimv2.study import Claim, Study


def rows(metric="probe", **cells):
    """name="arm", value: [a value a seed] -> rows at 100 samples; `arm_200` is at 200."""
    out = []
    for name, values in cells.items():
        arm, _, samples = name.partition("_")
        out += [{"arm": arm, "samples": int(samples or 100), "seed": seed, metric: value, "seconds": 1.0, "parameters": 5}
                for seed, value in enumerate(values)]
    return out


def test_every_arm_builds_a_config_and_every_claim_speaks_of_measured_cells():
    for name, found in study.STUDIES.items():
        for base, changes in itertools.product(study.BASES.values(), found.arms.values()):
            Config(**{**base, **{k: v for k, v in changes.items() if k != "contrastive"}})
        cells = {(arm, samples) for arm in found.arms for samples in found.samples}
        for claim in found.claims:
            assert {*claim.better, *claim.worse} <= cells, (name, claim.text)
            assert claim.metric in study.METRICS
            assert len(claim.better) == len(claim.worse)


def test_an_interval_is_students_t_with_the_spread_pooled_over_arms():
    cells = study.cells_of(rows(a=[1.0, 3.0], b=[4.0, 4.0, 7.0]), "probe")
    value, half = study.contrast(cells, [("b", 100)], [("a", 100)])
    variance = (2.0 + 6.0) / 3  # squares about each mean, by 1 + 2 degrees of freedom
    assert value == pytest.approx(3.0)
    assert half == pytest.approx(3.182 * math.sqrt(variance * (1 / 2 + 1 / 3)))


def test_sample_counts_with_their_own_spread_take_satterthwaites_degrees_of_freedom():
    cells = study.cells_of(rows(a=[1.0, 3.0], a_200=[5.0, 5.5], b_200=[2.0, 2.5]), "probe")
    value, half = study.contrast(cells, [("a", 200)], [("a", 100)])
    small, large = 2.0 / 2, (0.125 + 0.125) / 2 / 2  # variances of the two means
    freedom = int((small + large) ** 2 / (small**2 / 1 + large**2 / 2))
    assert value == pytest.approx(3.25) and freedom == 1
    assert half == pytest.approx(study.STUDENT[freedom - 1] * math.sqrt(small + large))


@pytest.mark.parametrize("metric, a, b, verdict", [
    ("probe", [0.8, 0.81, 0.79], [0.5, 0.51, 0.49], "holds"),
    ("probe", [0.5, 0.51, 0.49], [0.8, 0.81, 0.79], "fails"),
    ("probe", [0.5, 0.9, 0.7], [0.6, 0.7, 0.65], "cannot be told"),
    ("probe", [0.9], [0.1], "cannot be told"),  # one seed says nothing of its spread
    ("caption_loss", [0.5, 0.51, 0.49], [0.8, 0.81, 0.79], "holds"),  # lower is better
])
def test_a_verdict_needs_an_interval_that_leaves_zero_out(metric, a, b, verdict):
    claim = Claim("a beats b", metric, (("a", 100),), (("b", 100),))
    assert study.judge(claim, rows(metric, a=a, b=b))[2] == verdict
    assert study.judge(claim, rows(metric, a=a)) is None


@pytest.fixture(scope="module")
def small_study(scenes):
    arms = {"both": {}, "captions": {"alpha": 0.0, "prefix": "full"}, "images": {"text_weight": 0.0},
            "CLIP": {"contrastive": True}}
    found = Study(arms, (24, 60), (Claim("both beats images", "probe", (("both", 24),), (("images", 24),)),),
                  ("probe", "caption_loss", "image_loss"))
    base = {**TINY, "data": f"{scenes}:synthetic:3,{scenes}:alt:1", "batch_size": 12, "warmup_steps": 2, "eval_every": 0,
            "eval_images": 8, "save_every": 0}
    del base["num_workers"], base["device"]
    return found, base


def test_a_study_trains_each_arm_once_and_goes_on_where_it_stopped(small_study, tmp_path, monkeypatch):
    found, base = small_study
    path = tmp_path / "out/tiny.jsonl"

    def jobs(seeds, samples):
        part = Study(found.arms, samples, found.claims, found.metrics)
        return list(study.jobs_of(part, base, seeds, tmp_path / "runs", "cpu", (40, 30)))

    first = study.run_jobs(jobs(1, (24,)), path)
    assert {row["arm"] for row in first} == set(found.arms) and len(path.read_text().splitlines()) == 4
    by_arm = {row["arm"]: row for row in first}
    assert all(0 <= row["probe"] <= 1 and row["parameters"] > 0 for row in first)
    assert "caption_loss" in by_arm["captions"] and "image_loss" not in by_arm["captions"]
    assert "image_loss" in by_arm["images"] and "caption_loss" not in by_arm["images"] and "caption_loss" not in by_arm["CLIP"]
    assert by_arm["both"]["caption_loss"] > 1 and by_arm["both"]["train_flops"] > 0

    path.write_text(path.read_text() + '{"arm": "bo')  # killed in the middle of a row
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda *_: pytest.fail("nothing is left to do"))
    assert study.run_jobs(jobs(1, (24,)), path) == first
    monkeypatch.undo()
    found_again = study.run_jobs(jobs(1, (24, 60))[:5], path)
    assert len(found_again) == 5 and len(study.metrics.read_metrics(path)) == 5, "the cut row spoils none that follow"
    text = study.report(found, first)
    assert "| both | 24 | 1 |" in text and "one seed | cannot be told" in text


def test_a_run_that_fails_is_named_and_stops_no_other(small_study, tmp_path):
    _, base = small_study
    part = Study({"bad": {"lr": -1.0}, "good": {}}, (24,), ())
    with pytest.raises(RuntimeError, match="1 of 2 runs failed.*bad-24-0.*lr=-1.0 must be a number above 0"):
        study.run_jobs(study.jobs_of(part, base, 1, tmp_path / "runs", "cpu", (40, 30)), tmp_path / "tiny.jsonl")
    assert [json.loads(line)["arm"] for line in (tmp_path / "tiny.jsonl").read_text().splitlines()] == ["good"]


@pytest.mark.parametrize("flags, message", [
    (["objective", "--samples=many"], "--samples=many must be whole numbers"),
    (["objective", "--samples=20000,31"], "31 samples are not one step of 32"),
    (["objective", "--seeds=0"], "seeds=0 must be at least 1"),
    (["objective", "--data=nowhere:alt:1"], "nowhere does not exist: pack labelled pictures"),
])
def test_a_wrong_flag_is_refused_before_anything_is_trained(flags, message):
    with pytest.raises(ValueError, match=message):
        study.main(flags)


def test_caption_loss_is_of_images_seen_whole():
    model = AIMv2(tiny_config())
    batch = random_batch(model.config)
    whole = float(model(batch, torch.full((3,), 25)).text_sum.detach())
    assert study.caption_loss(model, [batch, batch], "cpu") == pytest.approx(2 * whole, rel=1e-5)


def test_figures_are_drawn_for_curves_and_for_dots(tmp_path):
    curves = {"loss": {("a", 10): (1.0, 0.1), ("a", 20): (0.5, math.inf), ("b", 10): (2.0, 0.2)}}
    study_page(curves, {("a", 10): 1e9, ("a", 20): 2e9, ("b", 10): 3e9}, tmp_path / "curves.png")
    study_page({"top-1": {("a", 10): (0.3, 0.1), ("b", 10): (0.4, 0.1)}}, None, tmp_path / "dots.png")
    assert (tmp_path / "curves.png").stat().st_size > 5_000 and (tmp_path / "dots.png").stat().st_size > 5_000
