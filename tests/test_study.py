"""Studies: arms are trained once and judged by the spread over their seeds."""

import itertools
import json
import math

import pytest
import torch
from helpers import TINY, random_batch, tiny_config

from nano_aimv2.config import Config
from nano_aimv2.lab import claims, study
from nano_aimv2.lab.claims import Claim, Study
from nano_aimv2.model import AIMv2


def rows(metric="probe", **cells):
    """arm=[one value per seed] -> rows at 100 samples; `arm_200` is at 200."""
    out = []
    for name, values in cells.items():
        arm, _, samples = name.partition("_")
        for seed, value in enumerate(values):
            out.append({"arm": arm, "samples": int(samples or 100), "seed": seed, metric: value,
                        "seconds": 1.0, "parameters": 5})
    return out


def test_every_arm_builds_a_config_and_every_claim_speaks_of_measured_cells():
    for name, preset in itertools.product(study.STUDIES, study.BASES):
        found = study.study_of(name, preset)
        jobs = list(study.jobs_of(found, study.BASES[preset], 1, "runs", "cpu", ()))
        for job in jobs:
            Config(**{k: v for k, v in job.flags.items() if k != "contrastive"})
        cells = {(job.arm, job.samples) for job in jobs}
        assert {arm for arm, _ in cells} == set(found.arms)
        for claim in found.claims:
            assert {*claim.better, *claim.worse} <= cells, (name, claim.text)
            assert claim.metric in claims.METRICS
            assert len(claim.better) == len(claim.worse)


def test_an_interval_is_students_t_with_the_spread_pooled_over_arms():
    cells = claims.cells_of(rows(a=[1.0, 3.0], b=[4.0, 4.0, 7.0]), "probe")
    value, half = claims.contrast(cells, [("b", 100)], [("a", 100)])
    variance = (2.0 + 6.0) / 3  # squares about each mean, by 1 + 2 degrees of freedom
    assert value == pytest.approx(3.0)
    assert half == pytest.approx(3.182 * math.sqrt(variance * (1 / 2 + 1 / 3)))


def test_sample_counts_with_their_own_spread_take_satterthwaites_degrees_of_freedom():
    cells = claims.cells_of(rows(a=[1.0, 3.0], a_200=[5.0, 5.5], b_200=[2.0, 2.5]), "probe")
    value, half = claims.contrast(cells, [("a", 200)], [("a", 100)])
    small, large = 2.0 / 2, (0.125 + 0.125) / 2 / 2  # variances of the two means
    freedom = int((small + large) ** 2 / (small**2 / 1 + large**2 / 2))
    assert value == pytest.approx(3.25) and freedom == 1
    assert half == pytest.approx(claims.STUDENT[freedom - 1] * math.sqrt(small + large))


def test_degrees_of_freedom_are_rounded_before_they_are_floored():
    assert claims.student(6.9999999) == claims.student(7.0) == claims.STUDENT[6] == 2.365
    assert claims.student(6.9) == claims.student(6) == 2.447
    assert claims.student(1) == 12.706 and claims.student(250.3) == claims.student(30) == 2.042


def runs(**cells):
    """Like `rows`; seeds 0, 2, 4, .. read captions of one kind, the others of another."""
    return [row | {"flags": {"data": f"set:{'even' if row['seed'] % 2 == 0 else 'odd'}:1"}}
            for row in rows(**cells)]


def test_a_paired_difference_has_the_spread_of_the_differences_alone():
    a, b = [0.5, 0.7, 0.6], [0.51, 0.73, 0.62]  # seeds move both arms alike
    same = [row | {"flags": {"data": "set:alt:1"}} for row in rows(a=a, b=b, c=[0.1, 0.9, 0.3])]
    value, half = claims.paired(same, "probe", [("b", 100)], [("a", 100)])
    assert value == pytest.approx(0.02)
    assert half == pytest.approx(4.303 * 0.01 / math.sqrt(3))  # 0.01, 0.03, 0.02: two degrees
    assert claims.contrast(claims.cells_of(same, "probe"), [("b", 100)], [("a", 100)])[1] > 0.2
    assert claims.paired(same[:2] + same[5:], "probe", [("b", 100)], [("a", 100)]) is None


def test_seeds_that_read_other_captions_are_not_replicates():
    found = runs(a=[0.0] * 5, b=[0.10, 0.30, 0.12, 0.34, 0.14])
    value, half = claims.paired(found, "probe", [("b", 100)], [("a", 100)])
    assert value == pytest.approx((0.12 + 0.32) / 2), "each kind of captions counts alike"
    variance = (0.02**2 * 2 + 0.02**2 * 2) / 3  # two degrees within even, one within odd
    assert half == pytest.approx(3.182 * math.sqrt(variance * (1 / 3 + 1 / 2) / 4))
    assert claims.paired(found[:2] + found[5:7], "probe", [("b", 100)], [("a", 100)])[1] == math.inf


def test_a_cell_that_is_named_twice_counts_twice_and_a_claim_is_divided_by_per():
    same = [row | {"flags": {"data": "set:alt:1"}} for row in rows(a=[1.0, 2.0], b=[5.0, 8.0])]
    claim = Claim("", "probe", (("b", 100), ("b", 100)), (("a", 100), ("a", 100)), per=4)
    value, half, _ = claims.judge(claim, same, is_paired=True)
    assert value == pytest.approx((4 + 6) / 2 / 2)
    assert half == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2) / 2)


@pytest.mark.parametrize("metric, a, b, verdict", [
    ("probe", [0.8, 0.81, 0.79], [0.5, 0.51, 0.49], "holds"),
    ("probe", [0.5, 0.51, 0.49], [0.8, 0.81, 0.79], "fails"),
    ("probe", [0.5, 0.9, 0.7], [0.6, 0.7, 0.65], "inconclusive"),
    ("probe", [0.9], [0.1], "inconclusive"),  # one seed says nothing about the spread
    ("caption_loss", [0.5, 0.51, 0.49], [0.8, 0.81, 0.79], "holds"),  # lower is better
])
def test_a_verdict_needs_an_interval_without_zero(metric, a, b, verdict):
    claim = Claim("a beats b", metric, (("a", 100),), (("b", 100),))
    assert claims.judge(claim, rows(metric, a=a, b=b))[2] == verdict
    assert claims.judge(claim, rows(metric, a=a)) is None


@pytest.fixture(scope="module")
def small_study(scenes):
    arms = {"both": {}, "captions": {"alpha": 0.0, "prefix": "full"},
            "images": {"text_weight": 0.0}, "CLIP": {"contrastive": True}}
    claim = Claim("both beats images", "probe", (("both", 24),), (("images", 24),))
    found = Study(arms, (24, 60), (claim,), ("probe", "caption_loss", "image_loss"))
    base = {**TINY, "data": f"{scenes}:synthetic:3,{scenes}:alt:1", "batch_size": 12,
            "warmup_steps": 2, "eval_every": 0, "eval_images": 8, "save_every": 0}
    del base["num_workers"], base["device"]
    return found, base


@pytest.mark.slow
def test_a_study_trains_each_arm_once_and_resumes(small_study, tmp_path, monkeypatch):
    found, base = small_study
    path = tmp_path / "out/tiny.jsonl"

    def jobs(seeds, samples):
        part = Study(found.arms, samples, found.claims, found.metrics)
        return list(study.jobs_of(part, base, seeds, tmp_path / "runs", "cpu", (40, 30)))

    first = study.run_jobs(jobs(1, (24,)), path)
    assert {row["arm"] for row in first} == set(found.arms)
    assert len(path.read_text().splitlines()) == 4
    assert not list(tmp_path.glob("runs/*/checkpoints")), "a measured run keeps its weights only"
    by_arm = {row["arm"]: row for row in first}
    assert all(0 <= row["probe"] <= 1 and row["parameters"] > 0 for row in first)
    assert "caption_loss" in by_arm["captions"] and "image_loss" not in by_arm["captions"]
    assert "image_loss" in by_arm["images"] and "caption_loss" not in by_arm["images"]
    assert "caption_loss" not in by_arm["CLIP"]
    assert by_arm["both"]["caption_loss"] > 1 and by_arm["both"]["train_flops"] > 0

    path.write_text(path.read_text() + '{"arm": "bo')  # killed in the middle of a row
    monkeypatch.setattr(study, "ProcessPoolExecutor",
                        lambda *_: pytest.fail("nothing is left to do"))
    assert study.run_jobs(jobs(1, (24,)), path) == first
    monkeypatch.undo()
    found_again = study.run_jobs(jobs(1, (24, 60))[:5], path)
    assert len(found_again) == 5
    assert len(study.metrics.read_metrics(path)) == 5, "the cut row spoils none that follow"
    text = study.tables(found, first)
    assert "| both | 24 | 1 |" in text and "no interval | inconclusive" in text


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_does_not_stop_the_others(small_study, tmp_path):
    _, base = small_study
    part = Study({"bad": {"lr": -1.0}, "good": {}}, (24,), ())
    with pytest.raises(RuntimeError, match="1 of 2 runs failed.*bad-24-0.*"
                                           "lr=-1.0 must be a number above 0"):
        study.run_jobs(study.jobs_of(part, base, 1, tmp_path / "runs", "cpu", (40, 30)),
                       tmp_path / "tiny.jsonl")
    lines = (tmp_path / "tiny.jsonl").read_text().splitlines()
    assert [json.loads(line)["arm"] for line in lines] == ["good"]


def test_the_command_writes_table_and_figure_and_ends_a_failed_run_in_one_line(
        tmp_path, monkeypatch, capsys):
    def run_jobs(jobs, path, at_once):
        assert [job.seed for job in jobs][::10] == [0, 1] and at_once == 3
        return rows(AIMv2_20000=[0.5, 0.6], CLIP_20000=[0.3, 0.2])

    flags = ["objective", "--seeds=2", "--jobs", "3", f"--out={tmp_path}", "--data=tests:alt:1"]
    monkeypatch.setattr(study, "run_jobs", run_jobs)
    study.main(flags)
    table = (tmp_path / "toy-objective.md").read_text()
    assert "| AIMv2 | 20,000 | 2 | 0.550 ± 0.215 |  | 0.00M | 1 s |" in table
    assert "AIMv2 beats CLIP | probe | +0.300 [-0.004 +0.604] | inconclusive |" in table
    assert table in capsys.readouterr().out and (tmp_path / "toy-objective.png").exists()

    def fail(*_):
        raise RuntimeError("1 of 2 runs failed")

    monkeypatch.setattr(study, "run_jobs", fail)
    with pytest.raises(ValueError, match="1 of 2 runs failed"):  # run_command prints it as one line
        study.main(flags)


@pytest.mark.parametrize("flags, message", [
    (["objective", "--samples=many"], "--samples=many must be whole numbers"),
    (["objective", "--samples=20000,31"], "31 samples are not one step of 32"),
    (["objective", "--seeds=0"], "seeds=0 must be at least 1"),
    (["objective", "--data=nowhere:alt:1"], "nowhere does not exist: pack labelled images"),
    ([], "name one study: scaling, objective, settle, ablations, pixels"),
    (["objectiv"], r"must be one of .* \(did you mean objective\?\)"),
    (["scaling", "--preset=large"], "preset='large' must be one of toy, photos"),
])
def test_a_wrong_flag_is_refused_before_anything_is_trained(flags, message):
    with pytest.raises(ValueError, match=message):
        study.main(flags)


def test_the_toy_set_of_the_studies_is_drawn_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(study.PROBED, "toy", (40, 30))
    monkeypatch.setattr(study.subprocess, "run", lambda words: started.append(words) or result)
    started, result = [], study.subprocess.CompletedProcess([], 0)
    study.prepare_data(f"{study.TOY_SET}:alt:1")
    assert started[0][2:] == ["--out=data/scenes_study", "--val=30", "--subsets=true"]
    result.returncode = 1
    with pytest.raises(ValueError, match="could not draw data/scenes_study"):
        study.prepare_data(study.BASES["toy"]["data"])


def test_a_package_without_the_scripts_asks_for_a_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="no train.py.*run it from a clone"):
        study.main(["objective"])


def test_caption_loss_is_of_images_seen_whole():
    model = AIMv2(tiny_config())
    batch = random_batch(model.config)
    whole = float(model(batch, torch.full((3,), 25)).text_sum.detach())
    assert study.caption_loss(model, [batch, batch], "cpu") == pytest.approx(2 * whole, rel=1e-5)


def test_the_committed_tables_follow_from_the_rows_and_the_rows_belong_to_the_studies():
    folder = study.ROOT / "lessons/studies"
    tables = sorted(path for path in folder.glob("*.md") if path.stem != "README")
    assert len(tables) >= 5
    for path in tables:
        preset, name = path.stem.split("-")
        found = study.metrics.read_metrics(path.with_suffix(".jsonl"))
        text, arms = path.read_text(encoding="utf-8"), study.study_of(name, preset)
        assert study.tables(arms, found) == text, path
        jobs = study.jobs_of(arms, study.BASES[preset], 12, "runs", "cpu", ())
        keys = {study.run_key(**vars(job)) for job in jobs}
        assert {study.run_key(**row) for row in found} <= keys, f"{path}: would be trained again"


@pytest.mark.parametrize("preset", study.BASES)
def test_the_first_seeds_of_settle_are_the_rows_of_the_objective(preset):
    folder = study.ROOT / "lessons/studies"
    objective, settle = ({study.run_key(**row): row for row in study.read_rows(path)}
                         for path in (folder / f"{preset}-objective.jsonl",
                                      folder / f"{preset}-settle.jsonl"))
    shared = objective.keys() & settle.keys()
    assert len(shared) == 3 * 3 * 2, "three seeds of three arms with two numbers of samples"
    assert all(objective[key] == settle[key] for key in shared)
