"""The study of when pixels pay: what its captions name, its claims, gains and tables."""

import io
import itertools
import json
import math
import re
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT
from PIL import Image

from data.pack import pack
from data.scenes import subset_captions
from nano_aimv2.data.shards import Shards
from nano_aimv2.lab import claims, pixels, plots, study
from nano_aimv2.lab.probe import ATTRIBUTES

TOY, PHOTOS = pixels.BY_PRESET["toy"], pixels.BY_PRESET["photos"]


def jobs(preset="toy", seeds=8):
    return list(study.jobs_of(pixels.BY_PRESET[preset], study.BASES[preset], seeds, "runs", "cpu",
                              ()))


def kind_of(job):
    return job.flags["data"].split(":")[-2]


def rows(preset="toy", seeds=8, gain=lambda job, attribute: 0.0):
    """Synthetic rows; `gain` says what alpha 0.4 and 1.6 bring to an attribute."""
    out = []
    for job in jobs(preset, seeds):
        names = ATTRIBUTES if preset == "toy" else ("label",)
        top1 = {a: 0.5 + 0.01 * i + (gain(job, a) if job.flags["alpha"] else 0.0)
                for i, a in enumerate(names)}
        out.append(dict(arm=job.arm, samples=job.samples, seed=job.seed, flags=job.flags,
                        by_attribute=top1, probe=sum(top1.values()) / len(top1),
                        caption_loss=0.2, seconds=1.0, parameters=5))
    return out


def test_a_seed_names_the_first_attributes_of_the_cyclic_order_from_its_own():
    assert pixels.named_attributes(2, 0) == ("place", "size")
    assert pixels.named_attributes(2, 3) == pixels.named_attributes(2, 7) == ("place", "shape")
    assert pixels.named_attributes(3, 2) == ("place", "colour", "shape")
    for k, attribute in itertools.product(range(5), ATTRIBUTES):
        assert sum(attribute in pixels.named_attributes(k, seed) for seed in range(8)) == 2 * k
    for k, seed in itertools.product(range(4), range(4)):
        assert {*pixels.named_attributes(k, seed)} < {*pixels.named_attributes(k + 1, seed)}


def test_the_captions_of_a_run_are_of_a_kind_that_is_drawn_and_alike_in_both_runs_of_a_pair():
    drawn = subset_captions([("top left", "large", "red", "ring")])
    by_pair = {}
    for job in jobs():
        assert kind_of(job) in drawn and "kinds" not in job.flags
        named = pixels.named_attributes(int(job.arm[0]), job.seed)
        assert kind_of(job) == f"names_{'_'.join(named) or 'none'}"
        others = {key: value for key, value in job.flags.items() if key != "alpha"}
        assert by_pair.setdefault((job.arm[0], job.samples, job.seed), others) == others
    assert len({kind_of(job) for job in jobs()}) == 1 + 4 + 4 + 4 + 1


def test_the_number_of_runs_is_that_of_the_plan():
    toy, photos = jobs(), jobs("photos", 7)
    assert len(toy) == len({study.run_key(**vars(job)) for job in toy}) == 8 * (10 + 3 + 4)
    assert {job.arm[0] for job in toy if job.flags["alpha"] == 1.6} == {"0", "2", "4"}
    assert {job.arm for job in toy if job.samples == 60_000} == {
        f"{k} named, alpha {alpha}" for k in (0, 4) for alpha in ("0", "0.4")}
    assert len(photos) == 7 * 4 * 2
    assert {kind_of(job) for job in photos} == {"tone", "class", "synthetic", "alt"}
    assert all("prefix" not in job.flags for job in toy + photos), "prefixes are sampled"


def verdicts(preset, found):
    found = [row | pixels.derived(row) for row in found]
    return {claim.text: claims.judge(claim, found, is_paired=True)
            for claim in pixels.BY_PRESET[preset].claims}


def test_the_claims_hold_where_the_rows_are_as_they_say():
    def gain(job, attribute):
        noise = 0.001 * math.sin(job.seed * 7 + job.samples + len(job.arm))
        if attribute in kind_of(job).split("_"):
            return -0.03 + noise
        return 0.05 * (0.5 if job.samples > 20_000 else 1.0) + noise

    found = verdicts("toy", rows(gain=gain))
    assert len(found) == len(TOY.claims) == 12 and None not in found.values()
    value, half, verdict = found["1 to 3 named: pixels help an attribute more if it is not named"]
    assert verdict == "holds" and value == pytest.approx(0.08) and half < 0.005
    value, _, verdict = found["the more is named, the less pixels help: fall of the gain per "
                              "attribute named"]
    assert verdict == "holds" and value == pytest.approx(0.02, abs=1e-3)
    value, _, verdict = found["nothing named: the gain shrinks from 20,000 to 60,000 samples"]
    assert verdict == "holds" and value == pytest.approx(0.025, abs=2e-3)
    assert found["all named: pixels cost"][2] == "holds"
    opposite = verdicts("toy", rows(gain=lambda job, a: -gain(job, a)))
    assert opposite["all named: pixels cost"][2] == opposite["nothing named: pixels help"][2] == \
        "fails"


def test_the_gain_of_an_attribute_at_equal_k_is_that_computed_by_hand():
    noise = iter(math.sin(i * i) / 50 for i in range(10_000))
    seen = {}

    def gain(job, attribute):
        key = job.arm, job.samples, job.seed, attribute
        return seen.setdefault(key, next(noise) + (attribute not in kind_of(job)) * 0.1
                               - 0.02 * int(job.arm[0]))

    found = rows(gain=gain)
    named, others, squares = [], [], 0.0
    for k in (1, 2, 3):
        of_seed = [seen[f"{k} named, alpha 0.4", 20_000, seed, "colour"] for seed in range(8)]
        is_named = ["colour" in pixels.named_attributes(k, seed) for seed in range(8)]
        named.append(sum(g for g, yes in zip(of_seed, is_named, strict=True) if yes) / (2 * k))
        others.append(sum(g for g, yes in zip(of_seed, is_named, strict=True) if not yes)
                      / (8 - 2 * k))
        squares += sum((of_seed[s] - of_seed[s + 4]) ** 2 / 2 for s in range(4))
    expected = sum(others) / 3, sum(named) / 3
    theirs = pixels.attribute_gains(found, "colour", 20_000)
    assert [value for value, _ in theirs] == pytest.approx([*expected, expected[0] - expected[1]])
    # 12 degrees of freedom: 3 k x 4 kinds of captions x (2 seeds - 1)
    spread = math.sqrt(squares / 12 * sum((1 / (2 * k) + 1 / (8 - 2 * k)) / 9 for k in (1, 2, 3)))
    assert theirs[2][1] == pytest.approx(2.179 * spread)
    assert pixels.attribute_gains(rows(seeds=3), "colour", 20_000) is None


def test_a_row_gets_the_log_of_its_caption_loss_and_the_probe_on_what_is_not_named():
    row = {"flags": {"data": "a:b/set:names_place_shape:1"}, "caption_loss": 0.5,
           "by_attribute": {"place": 0.9, "size": 0.6, "colour": 0.8, "shape": 0.5}}
    assert pixels.derived(row) == pytest.approx(
        {"log_caption_loss": math.log(0.5), "not_named": 0.7, "not_named_minus_named": 0.0})
    for kind in ("names_none", "names_place_size_colour_shape", "alt"):
        assert set(pixels.derived(row | {"flags": {"data": f"set:{kind}:1"}})) == \
            {"log_caption_loss"}


def test_the_tables_of_a_study_that_is_not_finished_hold_what_there_is():
    few = [row for row in rows(seeds=1) if row["arm"].startswith(("0", "4"))]
    text = study.tables(TOY, few)
    assert "| 0 named | 0.4 | 20,000 | +0.0, no interval |" in text
    assert "all named: pixels cost | probe | +0.000, no interval | inconclusive |" in text
    assert "where it is named" not in text and "2 named" not in text
    whole = study.tables(TOY, rows())
    assert "| colour | +0.0 [+0.0 +0.0] |" in whole and "| 4 named | 1.6 | 20,000 |" in whole
    photos = study.tables(PHOTOS, rows("photos", 7, lambda job, _: 0.02 + 0.001 * job.seed))
    assert "| tone only | 0.4 | 20,000 | +2.3 [+2.1 +2.5] |" in photos
    assert "where it is named" not in photos


def test_the_figure_shows_the_gains_that_there_are_with_their_intervals(tmp_path):
    def gain(job, attribute):
        return 0.02 + 0.001 * (job.seed // 4)

    panels = pixels.gain_panels({"toy": rows(gain=gain), "photos": rows("photos", 7, gain)})
    (toy, by_attribute, photos) = (series for _, series in panels.values())
    assert list(toy["alpha 0.4, 20,000 samples"]) == list("01234")
    assert list(toy["alpha 1.6, 20,000 samples"]) == list("024")
    assert list(toy["alpha 0.4, 60,000 samples"]) == list("04")
    assert toy["alpha 0.4, 20,000 samples"]["0"][0] == pytest.approx(2.05)
    assert list(by_attribute) == ["not named", "named"] and list(by_attribute["named"]) == list(
        ATTRIBUTES)
    assert len(photos["alpha 0.4"]) == 4
    figure = plots.gain_page(panels, tmp_path / "pixels.png")
    assert len(figure.axes) == 3 and (tmp_path / "pixels.png").exists()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == list("01234")


@pytest.mark.parametrize("toy", [[], rows(seeds=1), rows(seeds=1)[:3], rows(seeds=5)[:40]])
def test_the_figure_of_a_study_that_is_not_finished_is_drawn(tmp_path, toy):
    panels = pixels.gain_panels({"toy": toy, "photos": []})
    assert len(plots.gain_page(panels, tmp_path / "pixels.png").axes) == 3


def test_the_command_writes_one_figure_for_both_presets(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "prepare_data", lambda _: None)
    monkeypatch.setattr(study, "check_kinds", lambda _: None)
    for preset in ("toy", "photos"):
        found = rows(preset, 2)
        (tmp_path / f"{preset}-pixels.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in found))
        study.main(["pixels", f"--preset={preset}", "--seeds=2", f"--out={tmp_path}"])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"pixels.png", "toy-pixels.jsonl", "toy-pixels.md", "photos-pixels.jsonl",
                     "photos-pixels.md"}


def test_a_pair_that_has_rows_is_not_trained_again(tmp_path, monkeypatch):
    path = tmp_path / "toy-pixels.jsonl"
    some = jobs(seeds=2)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(seeds=2)))
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda *_: pytest.fail("nothing is left"))
    assert [row["arm"] for row in study.run_jobs(some, path)] == [job.arm for job in some]


def test_a_set_without_the_captions_of_the_study_is_refused_before_anything_is_trained(scenes):
    with pytest.raises(ValueError, match="none of its 96 samples.*'names_.*make it again"):
        study.main(["pixels", f"--data={scenes}:synthetic:1"])


def test_the_commands_of_the_page_give_photographs_all_kinds_of_captions(tmp_path):
    text = (ROOT / "lessons/studies/README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"(?ms)^python - <<'EOF'\n(.*?)^EOF", text)
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    said = [("an automobile", "A dark photo of an automobile in mostly gray tones."),
            ("a deer", "A photo of a deer in mostly blue tones.")]
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for i, _ in enumerate(said):
            archive.writestr(f"images/{i}.png", image.getvalue())
        archive.writestr("captions.jsonl", "".join(
            json.dumps({"file": f"images/{i}.png", "captions": list(captions), "label": i}) + "\n"
            for i, captions in enumerate(said)))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    pack(tmp_path / "photos.zip", tmp_path / "set", tmp_path / "photos.jsonl", val=0.0)
    shards = Shards(str(tmp_path / "set/train"))
    found = [shards.metadata(i) for i in range(2)]
    assert [each["class"] for each in found] == ["A photo of an automobile.", "A photo of a deer."]
    assert [each["tone"] for each in found] == ["A dark photo in mostly gray tones.",
                                                "A photo in mostly blue tones."]
    kinds = {kind for kinds in pixels.PHOTO_CASES.values() for kind in kinds}
    assert kinds <= {"alt", *found[0]} and shards.alt_text(0) == "an automobile"
