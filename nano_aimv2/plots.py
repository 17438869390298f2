"""Plots: every figure of the project, all of one width and one type size.

Lesson figures import their pieces from here too; nothing else imports matplotlib.
"""

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


def show_image(axis, pixels, title="", colour="black"):
    """One image u8[H, W, 3] without axes."""
    axis.imshow(pixels, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.set_title(title, color=colour, loc="center", fontsize=7.5)


def samples_page(captioned, completed, path, title):
    """Captions above, completions below.

    Args:
        captioned: [(pixels u8[H, W, 3], generated text, written text or None)].
        completed: [(original, given, generated, teacher-forced)], each u8[H, W, 3]; may be empty.
    """
    columns = min(4, max(1, len(captioned)))
    rows = -(-len(captioned) // columns)
    pairs = -(-len(completed) // 2)
    heights = [2.6 * rows] + ([1.35 * pairs + 0.3] if completed else [])
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
            axes = parts[1].subplots(pairs, 8, squeeze=False)
            for axis in axes.flat:
                axis.set_axis_off()
            for i, images in enumerate(completed):
                for k, (pixels, name) in enumerate(zip(images, VERSIONS, strict=True)):
                    axis = axes[i // 2, 4 * (i % 2) + k]
                    axis.set_axis_on()
                    show_image(axis, pixels, name if i < 2 else "")
        figure.savefig(path)
        plt.close(figure)


def wrap(text, width=34):
    """Break a caption into lines after commas and blanks."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines).replace("$", r"\$")


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
