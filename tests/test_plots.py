"""Plots: what is drawn, read back from the figures."""

import math
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import run_script
from matplotlib.figure import Figure

from nano_aimv2.lab import plots
from nano_aimv2.lab.plots import BLUE, GREEN, GREY, ORANGE, RED


@pytest.fixture(autouse=True)
def no_warnings():
    """A figure that makes matplotlib warn is a figure with a fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def lines(axis):
    """{legend label: [(x, y)]} of the labelled lines."""
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axis.lines
            if not line.get_label().startswith("_")}


def image(height, width, value=128):
    return np.full((height, width, 3), value, dtype=np.uint8)


def shown_title(axis):
    return axis.get_title(loc="center")


@pytest.mark.slow
def test_importing_plots_leaves_the_backend_to_the_notebook():
    code = "import nano_aimv2.lab.plots, matplotlib; print(matplotlib.get_backend())"
    assert run_script("-c", code, env={"MPLBACKEND": "svg"}).stdout.strip() == "svg"


def test_a_written_figure_has_the_style_and_leaves_the_settings_of_others(tmp_path):
    before = dict(matplotlib.rcParams)
    with plots.new_figure(tmp_path / "empty.png", 2) as figure:
        assert matplotlib.rcParams["font.size"] == plots.STYLE["font.size"]
    assert dict(matplotlib.rcParams) == before and not plt.get_fignums()
    assert plt.imread(tmp_path / "empty.png").shape[:2] == (220, 990)
    assert figure.get_size_inches().tolist() == [plots.WIDTH, 2]
    with plots.new_figure(tmp_path / "without_format", 1):
        pass
    assert plt.imread(tmp_path / "without_format", "png").shape[:2] == (110, 990)


def test_smoothing_a_constant_gives_the_constant():
    assert plots.smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert plots.smooth([1.0, 2.0], weight=0.5) == pytest.approx([1.0, (0.5 * 0.5 + 1.0) / 0.75])


def test_loss_curves_show_both_losses_with_chance_and_what_was_held_out(tmp_path):
    rows = [{"step": 20, "loss_text": 6.0, "loss_image": 0.9},
            {"step": 40, "loss_text": 2.0, "loss_image": 0.5},
            {"step": 40, "val_loss_text": 2.5, "val_loss_image": 0.625}]
    text, image_loss = plots.loss_curves(rows, tmp_path / "loss.png", 768, 432).axes
    assert [axis.get_title("left") for axis in (text, image_loss)] == ["text loss", "image loss"]
    assert (text.get_ylabel(), text.get_yscale()) == ("nats per token", "log")
    assert image_loss.get_ylabel() == "squared error of normalised patches"
    assert text.get_xlabel() == image_loss.get_xlabel() == "step"
    assert lines(text)["training, smoothed"][0] == (20, pytest.approx(6.0))
    assert lines(text)["held out: 2.500 at the end"] == [(40, 2.5)]
    assert lines(text)["chance: ln V = 6.64"][0][1] == math.log(768)
    assert lines(image_loss)["predicting zeros: (P-1)/P = 1.00"][0][1] == 431 / 432
    assert text.lines[0].get_xydata().tolist() == [[20, 6.0], [40, 2.0]]


def test_held_out_curves_have_one_line_per_run_and_name_its_end(tmp_path):
    rows = [{"step": k, "val_loss_text": 1 / (1 + k), "caption_exact": k / 10} for k in range(3)]
    runs = {"a": [{"step": 1, "loss": 2.0}, *rows], "b": rows[:2]}
    captions, losses = plots.held_out_curves(runs, tmp_path / "curves.png").axes
    assert lines(captions) == {"a: 0.200 at the end": [(0, 0.0), (1, 0.1), (2, 0.2)],
                               "b: 0.100 at the end": [(0, 0.0), (1, 0.1)]}
    assert lines(losses)["b: 0.500 at the end"] == [(0, 1.0), (1, 0.5)]
    assert losses.get_ylabel() == "nats per token"


def test_size_curves_have_a_column_per_shape_and_a_ring_at_the_size_of_training(tmp_path):
    rows = [dict(run=run, size=size, shape=shape, loss_image=0.5, caption_exact=size / 100)
            for run in ("square", "native") for size in (48, 72)
            for shape in ("up to 4:3", "beyond 2:1")]
    rows[0]["caption_exact"] = 0.05
    figure = plots.size_curves(rows, {"square": 48}, tmp_path / "sizes.png")
    assert figure.get_suptitle() == ("Captions at the worst size and shape: native 0.48, "
                                     "square 0.05. Rings: the size of training")
    narrow, wide, below, _ = figure.axes
    assert narrow.get_title("left") == "sides up to 4:3"
    assert wide.get_title("left") == "sides beyond 2:1"
    assert lines(narrow) == {"square": [(48, 0.05), (72, 0.72)], "native": [(48, 0.48), (72, 0.72)]}
    assert below.get_ylabel() == "image loss\n(normalised patches)"
    rings = [line for line in wide.lines if line.get_markerfacecolor() == "none"]
    assert [(line.get_xdata()[0], line.get_color()) for line in rings] == [(48, GREY)]
    rows = [{**row, "caption_names_label": 0.5} for row in rows]
    labelled = plots.size_curves(rows, {}, tmp_path / "sizes.png")
    assert labelled.axes[0].get_ylabel() == "share of captions with the label"


def test_a_grid_writes_the_numbers_into_its_cells():
    axis = Figure().subplots()
    plots.show_grid(axis, [[1, 0, 0.25], [1, 1, 0]], "mask", "key", "query")
    found = {text.get_position(): text.get_text() for text in axis.texts}
    assert found[2, 0] == "0.25" and found[0, 1] == "1" and len(found) == 6
    assert axis.get_title() == "mask" and axis.get_xlabel() == "key"


def test_a_page_of_samples_marks_right_captions_green_and_wrong_ones_red(tmp_path):
    captioned = [(image(48, 48), "a red star", "a red star"),
                 (image(48, 48), "a ring", "a red ring"), (image(48, 48), "cat.jpg", None)]
    names = ["original", "given", "sample 1", "sample 2", "teacher-forced"]
    completed = [tuple(image(48, 48, value) for value in (10, 20, 30, 40, 50)) for _ in range(3)]
    figure = plots.samples_page(captioned, completed, tmp_path / "page.png", "three images")
    assert figure.get_suptitle() == "three images"
    above, below = (part.axes for part in figure.subfigs)
    assert [(shown_title(axis), axis.title.get_color()) for axis in above] == [
        ("a red star", GREEN), ("a ring\nwritten: a red ring", RED), ("cat.jpg", "black")]
    assert len(below) == 20 and [shown_title(axis) for axis in below[:10]] == names * 2
    shown = [int(axis.images[0].get_array()[0, 0, 0]) for axis in below[10:15]]
    assert shown == [10, 20, 30, 40, 50]
    assert not any(axis.images for axis in below[15:]) and not any(map(shown_title, below[10:]))


def test_panoramas_are_completed_one_per_line(tmp_path):
    figure = plots.samples_page([(image(20, 80), "a", None)], [(image(20, 80),) * 4] * 2,
                                tmp_path / "page.png", "wide")
    names = ["original", "given", "sample 1", "teacher-forced"]
    assert [shown_title(axis) for axis in figure.subfigs[1].axes] == [*names, *[""] * 4]


def test_characters_that_the_font_lacks_are_replaced_in_captions_and_titles(tmp_path):
    strange = "caf\u00e9 \u6f22\u5b57 \x07 \u0378 costs $5 or $6"
    assert plots.wrap(strange) == "caf\u00e9 \ufffd\ufffd \ufffd \ufffd costs \\$5 or \\$6"
    plots.samples_page([(image(20, 20), strange, strange + "!")], [], tmp_path / "1.png", strange)
    plots.components_page([(image(20, 20), np.zeros((2, 2, 3)), strange)], tmp_path / "2.png")


def test_long_captions_are_broken_at_spaces():
    assert plots.wrap("top left a large red star, bottom right a ring") == (
        "top left a large red star, bottom\nright a ring")
    assert plots.wrap("x" * 40) == "x" * 40


def test_components_lie_beside_their_image_at_the_same_scale(tmp_path):
    pair = (image(40, 60), np.zeros((2, 3, 3)), "cat")
    single = plots.components_page([pair], tmp_path / "one.png")
    assert single.get_suptitle().startswith("image | ")
    left, right = single.axes
    assert shown_title(left) == "cat" and shown_title(right) == "2 x 3 patches"
    assert right.images[0].get_extent() == [0, 60, 40, 0]
    three = plots.components_page([pair] * 3, tmp_path / "three.png")
    assert three.get_suptitle().startswith("images | ")
    assert [bool(axis.images) for axis in three.axes] == [True] * 6 + [False] * 2


def test_probe_bars_count_the_attributes_on_which_the_intervals_do_not_overlap(tmp_path):
    def score(top1):
        return {"top1": top1, "low": top1 - 0.05, "high": top1 + 0.05}

    rows = {"this run": {"attentive": {"place": score(0.9), "size": score(0.6)}},
            "raw pixels": {"attentive": {"place": score(0.5), "size": score(0.55)}}}
    figure = plots.probe_bars(rows, {"place": 0.25, "size": 0.5}, tmp_path / "probe.png")
    assert figure.get_suptitle().startswith(
        "The attentive probe of this run beats every probe of raw pixels on 1 of 2 attributes")
    place, size = figure.axes
    assert place.get_title("left") == "place"
    assert place.get_ylabel() == "top-1 accuracy on test images"
    assert [bar.get_height() for bar in place.patches] == [0.9, 0.5]
    assert lines(size)["always the most common class"][0][1] == 0.5
    assert [label.get_text() for label in size.get_xticklabels()] == ["attentive"]


def test_a_study_with_several_numbers_of_samples_is_drawn_as_curves(tmp_path):
    panels = {"loss": {("a", 10): (1.0, 0.1), ("a", 20): (0.5, math.inf), ("b", 10): (2.0, 0.2)}}
    over_flops = plots.study_page(panels, {("a", 10): 1e9, ("a", 20): 2e9, ("b", 10): 3e9},
                                  tmp_path / "curves.png")
    axis = over_flops.axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("training FLOPs", "loss")
    assert axis.get_xscale() == "log"
    a, b = axis.containers
    assert a.lines[0].get_xydata().tolist() == [[1e9, 1.0], [2e9, 0.5]]
    assert b.lines[0].get_xydata().tolist() == [[3e9, 2.0]]
    assert [text.get_text() for text in over_flops.legends[0].texts] == ["a", "b"]
    ends = [segment[:, 1].tolist() for segment in a.lines[2][0].get_segments()]
    assert ends == [pytest.approx([0.9, 1.1]), [0.5, 0.5]], "one seed has no interval"
    over_samples = plots.study_page(panels, None, tmp_path / "curves.png").axes[0]
    assert over_samples.get_xlabel() == "samples seen"
    assert over_samples.get_xticks().tolist() == [10, 20]


def test_a_study_with_one_number_of_samples_is_drawn_as_dots_beside_the_first_arm(tmp_path):
    panels = {"top-1": {("base", 10): (0.3, 0.1), ("other", 10): (0.4, 0.1)},
              "loss": {("base", 10): (1.5, 0.1)}}
    top1, loss = plots.study_page(panels, None, tmp_path / "dots.png").axes
    assert [label.get_text() for label in top1.get_yticklabels()] == ["base", "other"]
    assert not any(label.get_text() for label in loss.get_yticklabels())
    dots = [dot.lines[0] for dot in top1.containers]
    assert [dot.get_xydata().tolist() for dot in dots] == [[[0.3, 0]], [[0.4, 1]]]
    assert [dot.get_color() for dot in dots] == [ORANGE, BLUE]
    assert top1.get_xlabel() == "top-1" and len(loss.containers) == 1
    assert list(top1.lines[-1].get_xdata()) == [0.3, 0.3], "the line through the first arm"
