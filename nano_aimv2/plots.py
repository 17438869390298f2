"""Plots: every figure of the project, all of one width and one type size.

Lesson figures import their pieces from here too; nothing else imports matplotlib.
"""

import itertools
import math

import matplotlib
import numpy as np

matplotlib.use("Agg", force=False)
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)

WIDTH = 9.0  # inches
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110,
         "axes.titlelocation": "left", "legend.frameon": False}
VERSIONS = ("original", "given", "generated", "teacher-forced")
BLUE, ORANGE, GREY, GREEN, RED = "#2b6cb0", "#dd6b20", "#718096", "#2f855a", "#c53030"


def smooth(values, weight=0.9):
    """Exponential mean with the start corrected, as optimizers do."""
    out, mean = [], 0.0
    for i, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**i))
    return out


def loss_curves(rows, path, vocab_size, patch_dim):
    """Both losses of a run over its steps, with what chance would score: rows of metrics.jsonl -> a picture file."""
    train = [row for row in rows if "loss_text" in row]
    held_out = [row for row in rows if "val_loss_text" in row]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.2), layout="constrained")
        parts = (("text", "nats a token", math.log(vocab_size), "chance: ln V"),
                 ("image", "squared error of normalised patches", (patch_dim - 1) / patch_dim, "predicting zeros: (P-1)/P"))
        for axis, (term, unit, chance, label), colour in zip(axes, parts, (BLUE, ORANGE), strict=True):
            steps, values = [r["step"] for r in train], [r[f"loss_{term}"] for r in train]
            axis.plot(steps, values, color=colour, lw=0.5, alpha=0.35)
            axis.plot(steps, smooth(values), color=colour, lw=1.8, label="training, smoothed")
            if held_out:
                axis.plot([r["step"] for r in held_out], [r[f"val_loss_{term}"] for r in held_out], "o", ms=4, color="black",
                          label=f"held out: {held_out[-1][f'val_loss_{term}']:.3f} at the end")
            axis.axhline(chance, color=GREY, lw=1, ls="--", label=f"{label} = {chance:.2f}")
            axis.set(xlabel="step", ylabel=unit, title=f"{term} loss")
            if term == "text":  # falls by orders of magnitude
                axis.set(yscale="log", ylim=(None, chance * 1.4))
            else:
                axis.set(ylim=(0, chance * 1.2))
            axis.legend(loc="upper right", bbox_to_anchor=(1, 0.93))
        figure.savefig(path)
        plt.close(figure)


def held_out_curves(runs, path):
    """Exact captions and text loss of several runs on held-out images over their steps: {name: rows of metrics.jsonl}."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.2), layout="constrained")
        for (name, rows), colour in zip(runs.items(), itertools.cycle((BLUE, ORANGE, GREEN, RED))):
            rows = [row for row in rows if "val_loss_text" in row]
            for axis, key in zip(axes, ("caption_exact", "val_loss_text"), strict=True):
                axis.plot([r["step"] for r in rows], [r[key] for r in rows], "o-", ms=3.5, lw=1.8, color=colour,
                          label=f"{name}: {rows[-1][key]:.3f} at the end")
        axes[0].set(xlabel="step", ylabel="captions exact, share", ylim=(0, 1.03), title="captions of held-out images")
        axes[1].set(xlabel="step", ylabel="nats a token", yscale="log", title="text loss on held-out images")
        axes[0].legend(loc="lower right")
        axes[1].legend(loc="upper right")
        figure.savefig(path)
        plt.close(figure)


def size_curves(rows, own_sizes, path):
    """Captions and image loss of runs over sizes, a column of panels for each shape; a ring marks the size of training.

    Args: rows: of `evaluate.across_sizes`; own_sizes: {run: pixels} of runs of one size.
    """
    runs, shapes = list(dict.fromkeys(r["run"] for r in rows)), list(dict.fromkeys(r["shape"] for r in rows))
    sizes = sorted({r["size"] for r in rows})
    score = "caption_names_label" if "caption_names_label" in rows[0] else "caption_exact"
    parts = ((score, "captions that name the label, share" if "label" in score else "captions exact, share"),
             ("loss_image", "image loss\n(normalised patches)"))
    worst = {run: min(r[score] for r in rows if r["run"] == run) for run in runs}
    first, *others = sorted(runs, key=worst.get, reverse=True)
    others = f" ({', '.join(f'{run} {worst[run]:.2f}' for run in others)})" if others else ""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, len(shapes), figsize=(WIDTH, 5.0), layout="constrained", sharex=True, sharey="row",
                                    squeeze=False)
        for (column, shape), (line, (name, label)) in itertools.product(enumerate(shapes), enumerate(parts)):
            axis = axes[line, column]
            for run, colour in zip(runs, itertools.cycle((GREY, BLUE, ORANGE, GREEN, RED))):
                mine = {r["size"]: r[name] for r in rows if r["run"] == run and r["shape"] == shape}
                axis.plot(list(mine), list(mine.values()), "o-", ms=3.5, lw=1.8, color=colour, label=run)
                if own_sizes.get(run) in mine:
                    axis.plot(own_sizes[run], mine[own_sizes[run]], "o", ms=10, mfc="none", color=colour)
            axis.set(xticks=sizes, ylim=(0, 1.03) if line == 0 else (0, None))
            if line == 0:
                axis.set(title=f"sides {shape}")
            else:
                axis.set(xlabel="size, px (the area is that of such a square)")
            if column == 0:
                axis.set(ylabel=label)
        axes[1, 0].legend(loc="lower left")
        figure.suptitle(f"Captions right at the worst size or shape: {first} {worst[first]:.2f}{others}. Rings: trained size")
        figure.savefig(path)
        plt.close(figure)


def show_image(axis, pixels, title="", colour="black"):
    """One image u8[H, W, 3] without axes."""
    axis.imshow(pixels, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.set_title(title, color=colour, loc="center", fontsize=7.5)


def show_grid(axis, values, title="", xlabel="key (what is looked at)", ylabel="query (who looks)", text=True, cmap="Blues"):
    """A small matrix [rows, columns] as cells, its numbers written in them: masks, tables, attention."""
    values = np.asarray(values, dtype=float)
    image = axis.imshow(values, cmap=cmap, vmin=min(0.0, values.min()))  # zero is white
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel, xticks=range(values.shape[1]), yticks=range(values.shape[0]))
    axis.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", lw=1.5)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(values) if text else ():
        r, g, b, _ = image.cmap(image.norm(value))
        axis.text(column, row, f"{value:.2g}", ha="center", va="center", color="black" if r + g + b > 1.5 else "white")
    return image


# Where each lesson stands on the way of a sample: name, lesson, place (column, row), what it reads.
WAY = {"data": ("07", (0, 1), ()), "patches": ("01", (1, 1), ("data",)), "text": ("06", (2, 0), ("data",)),
       "prefix mask": ("02", (2, 2), ()), "encoder": ("03", (2, 1), ("patches", "prefix mask")),
       "decoder": ("04", (3, 1), ("encoder", "text")), "losses": ("05", (4, 1), ("decoder",)),
       "sampling": ("09", (4, 0), ("decoder",)), "training": ("08", (5, 1), ("losses",)),
       "probe": ("10", (3, 2), ("encoder",))}


def show_way(*here):
    """The way of a sample from data to training, the places `here` in colour: names of WAY."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH, 2), layout="constrained")
        axis.set(xlim=(-0.45, 5.45), ylim=(-0.4, 2.4))
        axis.set_axis_off()
        for _, (x, y), sources in WAY.values():
            for source in sources:
                u, v = WAY[source][1]
                down = x - u > 1  # to the text, below the patches
                start, end = ((u + 0.37, v - 0.27 * down), (x - 0.37, y)) if u != x else ((u, v - 0.27), (x, y + 0.27))
                axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": GREY})
        for name, (lesson, (x, y), _) in WAY.items():
            ink, paper = ("white", BLUE) if name in here else ("black", "#edf2f7")
            axis.add_patch(plt.Rectangle((x - 0.37, y - 0.27), 0.74, 0.54, facecolor=paper, edgecolor=GREY, lw=0.8))
            axis.text(x, y, f"{name}\nlesson {lesson}", ha="center", va="center", color=ink)
        plt.show()


def samples_page(captioned, completed, path, title):
    """Captions above, completions below.

    Args:
        captioned: [(pixels u8[H, W, 3], generated text, written text or None)].
        completed: [(original, given, generated, teacher-forced)], each u8[H, W, 3]; may be empty.
    """
    columns = min(4, max(1, len(captioned)))
    rows = -(-len(captioned) // columns)
    tallest = max(pixels.shape[0] / pixels.shape[1] for pixels, *_ in captioned)  # panoramas need less height ...
    abreast = 1 if tallest < 0.6 else 2  # ... and more width
    lines = -(-len(completed) // abreast)
    heights = [min(2.6, 0.7 + WIDTH / columns * tallest) * rows]
    heights += [min(1.35, 0.15 + WIDTH / 4 / abreast * tallest) * lines + 0.3] if completed else []
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(WIDTH, sum(heights) + 0.5), layout="constrained")
        figure.get_layout_engine().set(hspace=0.01, h_pad=0.02)
        figure.suptitle(title)
        parts = np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights))
        axes = list(parts[0].subplots(rows, columns, squeeze=False).flat)
        for axis in axes:
            axis.set_axis_off()
        for axis, (pixels, text, written) in zip(axes, captioned, strict=False):
            axis.set_axis_on()
            exact = written is None or text == written
            wanted = "" if exact else f"\nwritten: {wrap(written)}"
            show_image(axis, pixels, wrap(text) + wanted, GREEN if exact and written else (RED if written else "black"))
        if completed:
            axes = parts[1].subplots(lines, 4 * abreast, squeeze=False)
            for axis in axes.flat:
                axis.set_axis_off()
            for i, images in enumerate(completed):
                for k, (pixels, name) in enumerate(zip(images, VERSIONS, strict=True)):
                    axis = axes[i // abreast, 4 * (i % abreast) + k]
                    axis.set_axis_on()
                    show_image(axis, pixels, name if i < abreast else "")
        figure.savefig(path)
        plt.close(figure)


def wrap(text, width=34):
    """Break a caption into lines after commas and blanks."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in "\n".join(lines))
    return text.replace("$", r"\$")


def components_page(pictures, path):
    """Pictures beside the first three principal components of their patch features.

    Args: pictures: [(pixels u8[H, W, 3], colours f[rows, cols, 3] in 0..1, title)], one or more; two pairs a row.
    """
    pairs = min(2, len(pictures))
    rows = -(-len(pictures) // pairs)
    width = WIDTH / (2 * pairs) if len(pictures) > 1 else WIDTH / 3
    heights = [width * max(min(2, pixels.shape[0] / pixels.shape[1]) for pixels, *_ in pictures[r * pairs : (r + 1) * pairs])
               for r in range(rows)]  # a very tall picture is shown smaller
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, 2 * pairs, figsize=(2 * pairs * width, sum(heights) + 0.25 * rows + 0.2),
                                    squeeze=False, layout="constrained", height_ratios=heights)
        figure.suptitle("picture | principal components 1, 2, 3 of its patch features as red, green, blue" if len(pictures) == 1
                        else "pictures | principal components 1, 2, 3 of all patch features together, as red, green, blue",
                        fontsize=8)
        for axis in axes.flat:
            axis.set_axis_off()
        for i, (pixels, colours, title) in enumerate(pictures):
            left, right = axes[i // pairs, 2 * (i % pairs) : 2 * (i % pairs) + 2]
            show_image(left, pixels, title.replace("$", r"\$")[:40])
            # The same extent, so that a patch lies beside its pixels.
            right.imshow(colours, interpolation="nearest", extent=(0, pixels.shape[1], pixels.shape[0], 0))
            rows_cols = f"{colours.shape[0]} x {colours.shape[1]} patches"
            right.set_title(rows_cols, loc="center", fontsize=7.5)
        figure.savefig(path)
        plt.close(figure)


def probe_bars(rows, chance, path):
    """Frozen-feature accuracy as bars with 95% intervals, one panel an attribute; the title counts where they are apart.

    Args: rows {name: {method: {attribute: {"top1", "low", "high"}}}}, the first against the others; chance {attribute: share}.
    """
    first, *others = rows
    best = [name for name in chance if all(rows[first]["attentive"][name]["low"] > rows[other][method][name]["high"]
                                           for other in others for method in rows[other])]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(chance), figsize=(WIDTH, 3.2), layout="constrained", sharey=True, squeeze=False)
        figure.suptitle(f"The attentive probe of {first} beats every probe of {' and '.join(others)} on "
                        f"{len(best)} of {len(chance)} attributes (intervals apart)", fontsize=10)
        for axis, name in zip(axes.flat, chance, strict=True):
            methods = list(rows[first])
            for i, (row, colour) in enumerate(zip(rows, (BLUE, ORANGE, GREY), strict=False)):
                x = np.arange(len(methods)) + (i - (len(rows) - 1) / 2) * 0.27
                top = np.array([rows[row][m][name]["top1"] for m in methods])
                ends = np.array([[rows[row][m][name][end] for m in methods] for end in ("low", "high")])
                axis.bar(x, top, 0.25, color=colour, label=row)
                axis.errorbar(x, top, np.abs(ends - top), fmt="none", ecolor="black", elinewidth=0.9, capsize=2)
            axis.axhline(chance[name], color="black", lw=1, ls="--", label="always the commonest class")
            axis.set(title=name, ylim=(0, 1.02), xticks=range(len(methods)), xticklabels=methods)
        axes[0, 0].set_ylabel("top-1 on test images")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(rows) + 1)
        figure.savefig(path)
        plt.close(figure)


def study_page(panels, flops, path):
    """The arms of a study: {name of a metric: {(arm, samples): (mean, half its interval)}}, a panel each.

    Curves over samples, or over training FLOPs where {(arm, samples): FLOPs} is given; dots if there is one sample count.
    """
    colours = (BLUE, ORANGE, GREEN, RED, GREY)
    with plt.rc_context(STYLE):
        arms = list(dict.fromkeys(arm for cells in panels.values() for arm, _ in cells))
        counts = sorted({samples for cells in panels.values() for _, samples in cells})
        figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.4), layout="constrained", squeeze=False)
        for axis, (label, cells) in zip(axes.flat, panels.items(), strict=True):
            for (place, arm), colour in zip(enumerate(arms), itertools.cycle(colours)):
                mine = sorted((samples, *cells[arm, samples]) for samples in counts if (arm, samples) in cells)
                if not mine:
                    continue
                samples, means, halves = map(list, zip(*mine, strict=True))
                halves = [half if math.isfinite(half) else 0 for half in halves]
                if len(counts) == 1:
                    axis.errorbar(means, [place], xerr=halves, fmt="o", ms=5, capsize=3, color=BLUE if place else ORANGE)
                else:
                    x = [flops[arm, count] for count in samples] if flops else samples
                    axis.errorbar(x, means, yerr=halves, fmt="o-", ms=4, lw=1.6, capsize=3, color=colour, label=arm)
            if len(counts) == 1:
                axis.set(yticks=range(len(arms)), yticklabels=arms if axis is axes[0, 0] else [], ylim=(len(arms) - 0.5, -0.5),
                         xlabel=label)
                if (arms[0], counts[0]) in cells:
                    axis.axvline(cells[arms[0], counts[0]][0], color=ORANGE, lw=0.8, ls="--")
            else:
                axis.set(xscale="log", xlabel="training FLOPs" if flops else "samples seen", ylabel=label)
                if not flops:
                    axis.set_xticks(counts, [f"{count:,}" for count in counts])
                    axis.minorticks_off()
        if len(counts) > 1:
            figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(arms), 5))
        figure.suptitle("Means over seeds, 95% intervals from the spread over seeds", fontsize=10)
        figure.savefig(path)
        plt.close(figure)
