"""Plots: every figure of the project, in one style.

Functions that take a `path` write a figure to it and return the figure. They open no window and
leave matplotlib's backend as it is, so notebooks still show their own figures. The lessons import
the small pieces: `show_image`, `show_grid`. No other file imports matplotlib.
"""

import contextlib
import itertools
import math
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from nano_aimv2.generate import caption, complete, teacher_forced
from nano_aimv2.patchify import unpatchify
from nano_aimv2.training.checkpoint import load_model
from nano_aimv2.training.evaluate import Evaluation, held_out_sources

WIDTH = 9.0  # inches
FONT = "DejaVu Sans"  # comes with matplotlib
STYLE = {"font.family": FONT, "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False,
         "axes.spines.right": False, "figure.dpi": 110, "axes.titlelocation": "left",
         "legend.frameon": False}
SHOWN_FRACTIONS = (0.5, 0.75)  # of the patches given: half an image, and a cut through objects
BLUE, ORANGE, GREY, GREEN, RED = "#2b6cb0", "#dd6b20", "#718096", "#2f855a", "#c53030"


@contextlib.contextmanager
def new_figure(path, height, width=WIDTH):
    """A figure in the project's style, in inches; written to `path` when the block ends, as a PNG
    if the name does not say another format."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        has_no_format = isinstance(path, str | Path) and not Path(path).suffix
        figure.savefig(path, format="png" if has_no_format else None)  # else it renames the file


def smooth(values, weight=0.9):
    """Exponential moving average, corrected for its start at zero as in Adam."""
    out, mean = [], 0.0
    for i, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**i))
    return out


def loss_curves(rows, path, vocab_size, patch_dim):
    """Both losses of a run over its steps, and what chance would score: rows of metrics.jsonl."""
    zeros = (patch_dim - 1) / patch_dim
    terms = (("text", BLUE, "nats per token", math.log(vocab_size), "chance: ln V"),
             ("image", ORANGE, "squared error of normalised patches", zeros,
              "predicting zeros: (P-1)/P"))
    train = [row for row in rows if "loss_text" in row]
    held_out = [row for row in rows if "val_loss_text" in row]
    with new_figure(path, 3.2) as figure:
        axes = figure.subplots(1, 2)
        for axis, (term, colour, unit, chance, label) in zip(axes, terms, strict=True):
            steps, values = [r["step"] for r in train], [r[f"loss_{term}"] for r in train]
            axis.plot(steps, values, color=colour, lw=0.5, alpha=0.35)
            axis.plot(steps, smooth(values), color=colour, lw=1.8, label="training, smoothed")
            if held_out:
                values = [r[f"val_loss_{term}"] for r in held_out]
                axis.plot([r["step"] for r in held_out], values, "o", ms=4, color="black",
                          label=f"held out: {values[-1]:.3f} at the end")
            axis.axhline(chance, color=GREY, lw=1, ls="--", label=f"{label} = {chance:.2f}")
            axis.set(xlabel="step", ylabel=unit, title=f"{term} loss")
            if term == "text":  # falls by orders of magnitude
                axis.set(yscale="log", ylim=(None, chance * 1.4))
            else:
                axis.set(ylim=(0, chance * 1.2))
            axis.legend(loc="upper right", bbox_to_anchor=(1, 0.93))
    return figure


def held_out_curves(runs, path):
    """Exact captions and text loss on held-out images over steps: {run: rows of metrics.jsonl}."""
    with new_figure(path, 3.2) as figure:
        axes = figure.subplots(1, 2)
        for (name, rows), colour in zip(runs.items(), itertools.cycle((BLUE, ORANGE, GREEN, RED))):
            rows = [row for row in rows if "val_loss_text" in row]
            for axis, key in zip(axes, ("caption_exact", "val_loss_text"), strict=True):
                axis.plot([r["step"] for r in rows], [r[key] for r in rows], "o-", ms=3.5, lw=1.8,
                          color=colour, label=f"{name}: {rows[-1][key]:.3f} at the end")
        axes[0].set(xlabel="step", ylabel="share of exact captions", ylim=(0, 1.03),
                    title="captions of held-out images")
        axes[1].set(xlabel="step", ylabel="nats per token", yscale="log",
                    title="text loss on held-out images")
        axes[0].legend(loc="lower right")
        axes[1].legend(loc="upper right")
    return figure


def size_curves(rows, own_sizes, path):
    """Captions and image loss of runs over image sizes, one column of panels per shape.

    Args: rows: of `sizes.across_sizes`; own_sizes: {run: pixels} of the runs that were trained at a
        single size, which is marked with a ring.
    """
    score, score_label = "caption_exact", "share of exact captions"
    if "caption_names_label" in rows[0]:
        score, score_label = "caption_names_label", "share of captions with the label"
    labels = {score: score_label, "loss_image": "image loss\n(normalised patches)"}
    runs = list(dict.fromkeys(row["run"] for row in rows))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    with new_figure(path, 5.0) as figure:
        axes = figure.subplots(2, len(shapes), sharex=True, sharey="row", squeeze=False)
        panels = itertools.product(enumerate(labels), enumerate(shapes))
        for (line, name), (column, shape) in panels:
            for run, colour in zip(runs, itertools.cycle((GREY, BLUE, ORANGE, GREEN, RED))):
                found = {row["size"]: row[name] for row in rows
                         if row["run"] == run and row["shape"] == shape}
                axes[line, column].plot(list(found), list(found.values()), "o-", ms=3.5, lw=1.8,
                                        color=colour, label=run)
                if own_sizes.get(run) in found:
                    axes[line, column].plot(own_sizes[run], found[own_sizes[run]], "o", ms=10,
                                            mfc="none", color=colour)
            axes[0, column].set(title=f"sides {shape}", ylim=(0, 1.03))
            axes[1, column].set(xlabel="side of a square of the same area, px", ylim=(0, None),
                                xticks=sorted({row["size"] for row in rows}))
            axes[line, 0].set(ylabel=labels[name])
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center",
                      ncols=min(len(runs), 5))
        worst = {run: min(row[score] for row in rows if row["run"] == run) for run in runs}
        best_first = sorted(runs, key=worst.get, reverse=True)
        figure.suptitle("Captions at the worst size and shape: "
                        + ", ".join(f"{run} {worst[run]:.2f}" for run in best_first)
                        + ". Rings: the size of training")
    return figure


def show_image(axis, pixels, title="", colour="black"):
    """One image u8[H, W, 3] without axes."""
    axis.imshow(pixels, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.set_title(title, color=colour, loc="center", fontsize=7.5)


def show_grid(axis, values, title="", xlabel="key (is attended to)", ylabel="query (attends)",
              text=True, cmap="Blues"):
    """A small matrix [rows, columns] as cells with numbers in them: masks, tables, attention."""
    values = np.asarray(values, dtype=float)
    rows, columns = values.shape
    image = axis.imshow(values, cmap=cmap, vmin=min(0.0, values.min()))  # zero is white
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel, xticks=range(columns), yticks=range(rows))
    axis.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", lw=1.5)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(values) if text else ():
        r, g, b, _ = image.cmap(image.norm(value))
        axis.text(column, row, f"{value:.2g}", ha="center", va="center",
                  color="black" if r + g + b > 1.5 else "white")
    return image


def completions(model, patches, grid, fraction, num_samples=3, seed=0):
    """Images with their last patches drawn by the patch sampler, ready to be shown.

    Args: patches: u8[B, A, P]; grid: i64[B, 2]; fraction: share of the patches that is given, at
        least one; seed: of the first sample, the others have the seeds that follow.
    Returns: [(original, given, sample 1, .., teacher-forced)] in the order of the images, each
        u8[H, W, 3]. Images of one grid are generated together.
    """
    found = [None] * len(grid)
    for rows_cols in grid.unique(dim=0):
        n = int(rows_cols.prod())
        same = (grid == rows_cols).all(dim=1).nonzero()[:, 0]
        whole, grids = patches[same, :n], grid[same]
        num_given = min(max(1, round(fraction * n)), n - 1)
        given = whole.clone()
        given[:, num_given:] = 128
        samples = [complete(model, whole, grids, num_given, seed + i) for i in range(num_samples)]
        versions = [whole, given, *samples, teacher_forced(model, whole, grids, num_given, seed)]
        shape = tuple(rows_cols.tolist())
        images = [unpatchify(v, shape, model.config.patch_size) for v in versions]
        images = [v.permute(0, 2, 3, 1).cpu().numpy() for v in images]  # each u8[same, H, W, 3]
        for i, row in enumerate(same.tolist()):
            found[row] = tuple(image[i] for image in images)
    return found


def held_out_samples(run_dir, count=8, device="cpu", data=""):
    """Captions and completions of images that a finished run has never seen.

    Half of them have novel pairs, if there are any.

    Args: data: in place of the run's own, in the form of `Config.data`.

    Returns: (captioned, completed), as `samples_page` draws them.
    Raises: ValueError if the run's data has no held-out part.
    """
    model, config, tokenizer = load_model(run_dir, device)
    config = replace(config, data=data or config.data)
    sources = held_out_sources(config)
    if not sources:
        raise ValueError(f"{config.data} has no val folder: give images with --image=FILE")
    captioned, completed = [], []
    for source in sources.values():
        evaluation = Evaluation(source, config, tokenizer, count // len(sources))
        batch = evaluation.batches[0].to(device)
        half = len(batch.patches) // 2
        halves = (slice(0, half), slice(half, None))
        images = []
        for rows, fraction in zip(halves, SHOWN_FRACTIONS, strict=True):
            if len(batch.patches[rows]):
                images += completions(model, batch.patches[rows], batch.grid[rows], fraction)
        found = caption(model, batch.patches, batch.grid, tokenizer)
        captioned += [(versions[0], c.text, written) for versions, c, written
                      in zip(images, found, evaluation.captions, strict=True)]
        completed += images
    return captioned, completed


def samples_page(captioned, completed, path, title):
    """Captions above, completions below.

    Args:
        captioned: [(pixels u8[H, W, 3], generated text, written text or None)], one or more.
        completed: [(original, given, sample 1, .., teacher-forced)], u8[H, W, 3] each, or empty.
    """
    columns = min(4, len(captioned))
    rows = math.ceil(len(captioned) / columns)
    tallest = max(pixels.shape[0] / pixels.shape[1] for pixels, *_ in captioned)
    per_line = 1 if tallest < 0.6 else 2  # panoramas need less height and more width
    lines = math.ceil(len(completed) / per_line)
    across = per_line * len(completed[0]) if completed else 0  # images on a line
    heights = [min(2.6, 0.7 + WIDTH / columns * tallest) * rows]
    if completed:
        heights.append(min(1.35, 0.15 + WIDTH / across * tallest) * lines + 0.3)
    with new_figure(path, sum(heights) + 0.5) as figure:
        figure.get_layout_engine().set(hspace=0.01, h_pad=0.02)
        figure.suptitle(drawable(title))
        parts = np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights))
        for axis, (pixels, text, written) in zip(blank_axes(parts[0], rows, columns), captioned,
                                                 strict=False):
            if written is None:
                show_image(axis, pixels, wrap(text))
            elif text == written:
                show_image(axis, pixels, wrap(text), GREEN)
            else:
                show_image(axis, pixels, f"{wrap(text)}\nwritten: {wrap(written)}", RED)
        if completed:
            axes = blank_axes(parts[1], lines, across)
            images = [pixels for versions in completed for pixels in versions]
            samples = [f"sample {i}" for i in range(1, len(completed[0]) - 2)]
            names = ["original", "given", *samples, "teacher-forced"] * per_line
            for i, (axis, pixels) in enumerate(zip(axes, images, strict=False)):
                show_image(axis, pixels, names[i] if i < across else "")
    return figure


def blank_axes(figure, rows, columns, **options):
    """A grid of axes without frames, as a list, row by row."""
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axis in axes:
        axis.set_axis_off()
    return axes


def drawable(text):
    """Make a text safe to draw: escape dollar signs, which would begin a formula, and replace
    characters that the font lacks (an untrained model writes many)."""
    font = get_font(findfont(FONT))
    shown = ""
    for c in text:
        has_glyph = c.isprintable() and font.get_char_index(ord(c))
        shown += c if has_glyph or c == "\n" else "\N{REPLACEMENT CHARACTER}"
    return shown.replace("$", r"\$")


def wrap(text, width=34):
    """Break a caption at spaces into lines that can be drawn."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return drawable("\n".join(lines))


def components_page(images, path):
    """Images beside the first three principal components of their patch features.

    Args: images: [(pixels u8[H, W, 3], colours f[rows, cols, 3] in 0..1, title)], one or more; two
        pairs per row.
    """
    title = "image | principal components 1, 2, 3 of its patch features as red, green, blue"
    if len(images) > 1:
        title = ("images | principal components 1, 2, 3 of all patch features together, "
                 "as red, green, blue")
    pairs = min(2, len(images))
    width = WIDTH / (2 * pairs) if len(images) > 1 else WIDTH / 3
    heights = []
    for i in range(0, len(images), pairs):
        tallest = max(pixels.shape[0] / pixels.shape[1] for pixels, *_ in images[i : i + pairs])
        heights.append(width * min(2, tallest))  # a very tall image is shown smaller
    rows = len(heights)
    with new_figure(path, sum(heights) + 0.25 * rows + 0.2, 2 * pairs * width) as figure:
        figure.suptitle(title, fontsize=8)
        axes = blank_axes(figure, rows, 2 * pairs, height_ratios=heights)
        for i, (pixels, colours, name) in enumerate(images):
            left, right = axes[2 * i : 2 * i + 2]
            show_image(left, pixels, drawable(name[:40]))
            extent = (0, pixels.shape[1], pixels.shape[0], 0)  # each patch lies beside its pixels
            right.imshow(colours, interpolation="nearest", extent=extent)
            right.set_title(f"{colours.shape[0]} x {colours.shape[1]} patches", loc="center",
                            fontsize=7.5)
    return figure


def search_page(images, path, title):
    """Images that were found, the best first: [(pixels u8[H, W, 3], text above)], one or more."""
    columns = max(2, min(4, len(images)))
    rows = math.ceil(len(images) / columns)
    tallest = max(pixels.shape[0] / pixels.shape[1] for pixels, _ in images)
    lines = max(text.count("\n") + 1 for _, text in images)
    height = rows * (min(2.6, WIDTH / columns * tallest) + 0.17 * lines) + 0.4
    with new_figure(path, height) as figure:
        figure.suptitle(wrap(title, 100), fontsize=10)
        for axis, (pixels, text) in zip(blank_axes(figure, rows, columns), images, strict=False):
            show_image(axis, pixels, drawable(text))
    return figure


def probe_bars(rows, chance, path):
    """Accuracy of probes as bars with 95% intervals, one panel per attribute.

    Args: rows: {encoder: {method: {attribute: {"top1", "low", "high"}}}}, the first one is compared
        with all others; chance: {attribute: share of its most common class}.
    """
    first, *others = rows
    wins = [attribute for attribute in chance if beats_all(rows, attribute)]
    with new_figure(path, 3.2) as figure:
        figure.suptitle(f"The attentive probe of {first} beats every probe of "
                        f"{' and '.join(others)} on {len(wins)} of {len(chance)} attributes\n"
                        "(95% intervals do not overlap)", fontsize=10)
        axes = figure.subplots(1, len(chance), sharey=True, squeeze=False)[0]
        for axis, attribute in zip(axes, chance, strict=True):
            methods = list(rows[first])
            for i, (name, colour) in enumerate(zip(rows, (BLUE, ORANGE, GREY), strict=False)):
                scores = [rows[name][method][attribute] for method in methods]
                x = np.arange(len(methods)) + (i - (len(rows) - 1) / 2) * 0.27
                top = np.array([score["top1"] for score in scores])
                ends = np.array([[score[end] for score in scores] for end in ("low", "high")])
                axis.bar(x, top, 0.25, color=colour, label=name)
                axis.errorbar(x, top, np.abs(ends - top), fmt="none", ecolor="black",
                              elinewidth=0.9, capsize=2)
            axis.axhline(chance[attribute], color="black", lw=1, ls="--",
                         label="always the most common class")
            axis.set(title=attribute, ylim=(0, 1.02))
            axis.set_xticks(range(len(methods)), methods)
        axes[0].set_ylabel("top-1 accuracy on test images")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center",
                      ncols=len(rows) + 1)
    return figure


def beats_all(rows, attribute):
    """Whether the interval of the first encoder's attentive probe lies above all of the others'."""
    first, *others = rows.values()
    highest = max(found[attribute]["high"] for other in others for found in other.values())
    return first["attentive"][attribute]["low"] > highest


def study_page(panels, flops, path):
    """The arms of a study, as curves over samples or, with a single number of samples, as dots.

    Args: panels: {label of a metric: {(arm, samples): (mean, half its interval)}}; flops: None, or
        {(arm, samples): training FLOPs} to draw over instead of samples.
    """
    cells = [cell for panel in panels.values() for cell in panel]
    arms = list(dict.fromkeys(arm for arm, _ in cells))
    counts = sorted({samples for _, samples in cells})
    with new_figure(path, 3.4) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (label, panel) in zip(axes, panels.items(), strict=True):
            if len(counts) == 1:
                arm_dots(axis, arms, {arm: value for (arm, _), value in panel.items()})
                axis.set(xlabel=label)
            else:
                arm_curves(axis, arms, counts, panel, flops)
                axis.set(ylabel=label)
        if len(counts) == 1:
            axes[0].set_yticklabels(arms)
        else:
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center",
                          ncols=min(len(arms), 5))
        figure.suptitle("Means over seeds, 95% intervals from the spread over seeds", fontsize=10)
    return figure


def arm_dots(axis, arms, values):
    """One dot per arm with its interval, the first arm's mean as a line: {arm: (mean, half)}."""
    for place, arm in enumerate(arms):
        if arm in values:
            mean, half = values[arm]
            axis.errorbar([mean], [place], xerr=[half if math.isfinite(half) else 0], fmt="o", ms=5,
                          capsize=3, color=BLUE if place else ORANGE)
    axis.set(yticks=range(len(arms)), yticklabels=[], ylim=(len(arms) - 0.5, -0.5))
    if arms[0] in values:
        axis.axvline(values[arms[0]][0], color=ORANGE, lw=0.8, ls="--")


def arm_curves(axis, arms, counts, values, flops):
    """One curve per arm over samples or FLOPs: {(arm, samples): (mean, half its interval)}."""
    for arm, colour in zip(arms, itertools.cycle((BLUE, ORANGE, GREEN, RED, GREY))):
        measured = [count for count in counts if (arm, count) in values]
        if measured:
            means, halves = zip(*(values[arm, count] for count in measured), strict=True)
            x = [flops[arm, count] for count in measured] if flops else measured
            axis.errorbar(x, means, yerr=[half if math.isfinite(half) else 0 for half in halves],
                          fmt="o-", ms=4, lw=1.6, capsize=3, color=colour, label=arm)
    axis.set(xscale="log", xlabel="training FLOPs" if flops else "samples seen")
    if not flops:
        axis.set_xticks(counts, [f"{count:,}" for count in counts])
        axis.minorticks_off()


def gain_page(panels, path):
    """What pixels bring to the probe, over what the captions name.

    Args: panels: {title: (label of the x axis, {series: {label on the x axis: (gain, half its
        interval)}})}, in points, at most three series. A gain without an interval is hollow.
    """
    with new_figure(path, 3.6) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, (title, (xlabel, series)) in zip(axes, panels.items(), strict=True):
            labels = list(dict.fromkeys(label for found in series.values() for label in found))
            for i, (name, found) in enumerate(series.items()):
                colour = (BLUE, ORANGE, GREEN)[i]
                shift = 0.16 * (i - (len(series) - 1) / 2)
                for label, (gain, half) in found.items():
                    known = math.isfinite(half)
                    axis.errorbar(labels.index(label) + shift, gain, yerr=half if known else 0,
                                  fmt="o", ms=5, capsize=3, color=colour,
                                  mfc=colour if known else "none")
                axis.plot([], [], "o", ms=5, color=colour, label=name)
            axis.axhline(0, color="black", lw=0.8)
            axis.set(title=title, xlabel=xlabel, xlim=(-0.5, max(len(labels), 1) - 0.5))
            axis.set_xticks(range(len(labels)), labels)
            if series:
                axis.legend(loc="best", fontsize=7.5)
        axes[0].set_ylabel("gain from pixels, points of top-1")
        figure.suptitle("Probe with the image loss minus without it: mean over seeds, 95% interval",
                        fontsize=10)
    return figure
