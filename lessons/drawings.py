"""Drawings of the lessons: what is hard to say in words. Each function shows one figure.

They are made of `canvas`, `box` and `arrow` of helper.py: blue is what the drawing is about, grey
what surrounds it; data flows from left to right or from below to above.
"""

import matplotlib.pyplot as plt
import numpy as np
from helper import BLUE, GREY, WIDTH, arrow, box, canvas

from nano_aimv2.lab.plots import ORANGE, show_image


def draw_attention():
    """Lesson 03: one query, here of patch 2, becomes one weighted mean of the values."""
    _, axis = canvas(13, 5.6, 3.3,
                     "One query: a score per key, a softmax, a weighted mean of the values")
    for i in range(4):
        y = 4.6 - i * 1.05
        box(axis, (0.7, y), f"patch {i}", 1.2, 0.65, i == 2)
        box(axis, (3.1, y), f"key {i}", 1.1, 0.65)
        box(axis, (5.8, y), f"score {i}", 1.2, 0.65)
        box(axis, (10.2, y), f"weight {i} · value {i}", 2.3, 0.65)
        arrow(axis, (1.3, y), (2.55, y))
        arrow(axis, (3.65, y), (5.2, y))
        arrow(axis, (6.4, y), (7.2, y))
        arrow(axis, (8.2, y), (9.05, y))
        arrow(axis, (11.35, y), (12.0, 3.05 + (1.5 - i) * 0.15))
    axis.text(2.0, 4.75, "$W_k$", ha="center", color=GREY)
    box(axis, (3.1, 0.4), "query 2", 1.1, 0.65, True)
    axis.plot([1.3, 1.6, 1.6], [2.35, 2.35, 0.4], color=BLUE, lw=1)
    arrow(axis, (1.6, 0.4), (2.55, 0.4), colour=BLUE)
    axis.text(2.05, 0.52, "$W_q$", ha="center", color=BLUE)
    axis.plot([3.65, 4.3, 4.3], [0.4, 0.4, 4.4], color=BLUE, lw=1)
    for i in range(4):
        arrow(axis, (4.3, 4.4 - i * 1.05), (5.2, 4.4 - i * 1.05), colour=BLUE)
    box(axis, (7.7, 3.03), "soft-\nmax", 1.0, 3.8, True)
    axis.text(10.2, 0.6, "value $i$ = patch $i$ times $W_v$", ha="center", color=GREY)
    box(axis, (12.5, 3.03), "sum:\noutput\nof 2", 0.9, 1.3, True)


def draw_heads(names=("head 0", "head 1", "head 2")):
    """Lesson 03: heads attend side by side, each with its own slice of the channels."""
    _, axis = canvas(13.6, 4.6, 3.0,
                     "Each head works on its own slice of the channels; proj mixes the results")
    box(axis, (0.7, 2.2), "patches\n[n, D]", 1.2, 1.2)
    box(axis, (2.7, 2.2), "qkv:\none\nmatmul\n[n, 3D]", 1.2, 1.9)
    arrow(axis, (1.3, 2.2), (2.1, 2.2))
    for i, name in enumerate(names):
        y = 3.7 - i * 1.5
        box(axis, (5.2, y), f"q, k, v of {name}\n3 x [n, D/h]", 2.2, 0.9, True)
        arrow(axis, (3.3, 2.2 + (1 - i) * 0.4), (4.1, y))
        arrow(axis, (6.3, y), (7.05, y))
        for row in range(4):
            for column in range(4):
                share = ((i + 2) * (row + 1) + (3 * i + 5) * column) % 5 / 5  # any pattern
                corner = 7.1 + column * 0.24, y + 0.24 - row * 0.24
                axis.add_patch(plt.Rectangle(corner, 0.24, 0.24, facecolor=BLUE, alpha=0.1 + share,
                                             edgecolor="white"))
        arrow(axis, (8.1, y), (8.75, y))
        box(axis, (9.5, y), "output\n[n, D/h]", 1.4, 0.9, True)
        arrow(axis, (10.2, y), (10.9, 2.2 + (1 - i) * 0.4))
    axis.text(7.58, 0.0, "weights [n, n]", ha="center", color=GREY)
    box(axis, (11.5, 2.2), "side\nby side\n[n, D]", 1.1, 1.6)
    arrow(axis, (12.05, 2.2), (12.45, 2.2))
    box(axis, (13.0, 2.2), "proj\n[n, D]", 1.0, 1.2)


def draw_swiglu():
    """Lesson 04: two linear layers in, a product, one linear layer out."""
    _, axis = canvas(12, 3.4, 2.3, "SwiGLU: the gate says how much of each value passes")
    box(axis, (0.8, 1.7), "x\n[n, D]", 1.1, 0.9)
    box(axis, (3.1, 2.6), "fc1: gates\n[n, H]", 1.8, 0.9, True)
    box(axis, (3.1, 0.8), "fc3: values\n[n, H]", 1.8, 0.9, True)
    box(axis, (5.6, 2.6), "silu", 1.1, 0.9, True)
    box(axis, (7.5, 1.7), "multiply\n[n, H]", 1.5, 0.9, True)
    box(axis, (9.5, 1.7), "fc2\n[n, D]", 1.2, 0.9, True)
    arrow(axis, (1.35, 1.85), (2.2, 2.6))
    arrow(axis, (1.35, 1.55), (2.2, 0.8))
    arrow(axis, (4.0, 2.6), (5.05, 2.6))
    arrow(axis, (6.15, 2.6), (6.9, 2.15))
    arrow(axis, (4.0, 0.8), (6.9, 1.25))
    arrow(axis, (8.25, 1.7), (8.9, 1.7))
    arrow(axis, (10.1, 1.7), (11.2, 1.7), "out")


def draw_block():
    """Lesson 04: the pre-norm block, two branches that add to the residual stream."""
    _, axis = canvas(13, 3.2, 2.3,
                     "A block: two branches read a normalised copy of x and add their result to it")
    axis.text(0.1, 0.72, "x", ha="center", va="center")
    for start, layer in ((0.7, "attention"), (6.7, "SwiGLU")):
        box(axis, (start + 1.5, 2.3), "RMSNorm", 1.5, 0.8, True)
        box(axis, (start + 3.6, 2.3), layer, 1.5, 0.8, True)
        axis.plot([start, start], [0.7, 2.3], color=BLUE, lw=1)
        arrow(axis, (start, 2.3), (start + 0.75, 2.3), colour=BLUE)
        arrow(axis, (start + 2.25, 2.3), (start + 2.85, 2.3), colour=BLUE)
        axis.plot([start + 4.35, start + 5.1], [2.3, 2.3], color=BLUE, lw=1)
        arrow(axis, (start + 5.1, 2.3), (start + 5.1, 0.97), colour=BLUE)
        axis.text(start + 5.1, 0.7, "+", ha="center", va="center", color="white",
                  bbox={"boxstyle": "circle,pad=0.2", "facecolor": BLUE, "edgecolor": BLUE})
    for left, right in ((0.3, 5.55), (6.05, 11.55)):
        arrow(axis, (left, 0.7), (right, 0.7))
    arrow(axis, (12.05, 0.7), (12.8, 0.7))
    axis.text(3.3, 0.25, "residual stream: f[B, n, D], the sum of all that was added", color=GREY)


def draw_encoder():
    """Lesson 04: the encoder from patches to features."""
    _, axis = canvas(13.4, 3.2, 2.3,
                     "The encoder: embed, add positions, blocks under the mask, a last norm")
    parts = (("patches\n[n, P]", 1.4), ("linear\n+ bias", 1.3), ("RMSNorm", 1.5), ("+", 0.6),
             ("block", 1.1), ("block", 1.1), ("block", 1.1), ("RMSNorm", 1.5))
    x = 0.1
    for i, (name, width) in enumerate(parts):
        box(axis, (x + width / 2, 1.6), name, width, 0.95, i > 0)
        arrow(axis, (x + width, 1.6), (x + width + 0.4, 1.6))
        if name == "+":
            box(axis, (x + width / 2, 0.35), "positions", 1.6, 0.6)
            arrow(axis, (x + width / 2, 0.65), (x + width / 2, 1.12))
        if i == 5:
            box(axis, (x + width / 2, 2.85), "prefix mask (lesson 02)", 3.4, 0.6)
            for shift in (-1.5, 0, 1.5):
                arrow(axis, (x + width / 2 + shift, 2.55), (x + width / 2 + shift, 2.08))
        x += width + 0.4
    axis.text(x + 0.05, 1.6, "features\n[n, D]", va="center")


def draw_patches(pixels, patches, places):
    """Lesson 03: an image beside some of its patches u8[N, P], as squares."""
    figure, axes = plt.subplots(1, 1 + len(places), figsize=(WIDTH, 2), layout="constrained",
                                width_ratios=[2] + [1] * len(places))
    show_image(axes[0], pixels, "the scene")
    for axis, k in zip(axes[1:], places, strict=True):
        side = int((patches.shape[-1] / 3) ** 0.5)
        show_image(axis, patches[k].reshape(side, side, 3), f"patch {k}")


def draw_weights(rows):
    """Lesson 03: attention weights of one query as bars: {title: weights [keys]}."""
    figure, axes = plt.subplots(1, len(rows), figsize=(WIDTH, 2.1), layout="constrained",
                                sharey=True)
    for axis, (name, weights) in zip(axes, rows.items(), strict=True):
        axis.bar(range(len(weights)), weights, color=BLUE)
        axis.set(xlabel="key", ylabel="attention weight", title=name)


def draw_maps(pixels, rows, title, label, low=0.0, high=1.0, cmap="Blues"):
    """Lessons 03 and 04: what one patch has to do with each patch of an image of 4 x 4 patches.

    rows: {framed patch k: {title: values [16]}}; label: what the colours mean.
    """
    count = 1 + max(len(maps) for maps in rows.values())
    width = min(WIDTH, 1.6 * count)
    height = 0.35 + len(rows) * (0.35 + 0.8 * width / count)
    figure, axes = plt.subplots(len(rows), count, figsize=(width, height), layout="constrained",
                                squeeze=False)
    side = pixels.shape[0] // 4
    for line, (k, maps) in zip(axes, rows.items(), strict=True):
        show_image(line[0], pixels, f"patch {k}")
        corner = k % 4 * side - 0.5, k // 4 * side - 0.5
        line[0].add_patch(plt.Rectangle(corner, side, side, fill=False, edgecolor="white", lw=1.5))
        for axis, (name, values) in zip(line[1:], maps.items(), strict=True):
            shown = axis.imshow(values.reshape(4, 4), cmap=cmap, vmin=low, vmax=high)
            axis.set(xticks=[], yticks=[])
            axis.set_title(name, loc="center", fontsize=9)
            axis.spines[:].set(visible=True, color=GREY)
    figure.colorbar(shown, ax=axes, label=label, shrink=0.8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)


def draw_sizes(**curves):
    """Lesson 04: the size of x after each layer of a stack, on a logarithmic axis."""
    _, axis = plt.subplots(figsize=(WIDTH * 0.7, 2.3), layout="constrained")
    names = {"plain": "x = layer(x)", "added": "x = x + layer(x)",
             "normed": "x = x + layer(norm(x))"}
    for (name, sizes), colour in zip(curves.items(), (GREY, ORANGE, BLUE), strict=True):
        axis.semilogy(range(1, len(sizes) + 1), sizes, color=colour, label=names[name])
    axis.set(xlabel="layer", ylabel="root mean square of x",
             title="Only a residual branch behind a norm keeps the size of x in check")
    axis.legend()


def draw_gates():
    """Lesson 04: what passes a gate of SwiGLU."""
    _, axis = plt.subplots(figsize=(WIDTH * 0.7, 2.1), layout="constrained")
    gate = np.linspace(-6, 6, 200)
    for value, colour in ((-2, ORANGE), (1, GREY), (2, BLUE)):
        axis.plot(gate, gate / (1 + np.exp(-gate)) * value, color=colour, label=f"value {value}")
    axis.set(xlabel="gate g, before silu", ylabel="what passes: silu(g) · value",
             title="A gate far below 0 is shut; above 0 it multiplies")
    axis.legend()


def draw_positions(table, nearness):
    """Lesson 04: sin-cos vectors [N, D] of a grid, and a map [rows, cols] of cosines with one."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH * 0.85, 2.2), layout="constrained",
                                width_ratios=[1.5, 1])
    half = table.shape[1] // 2
    axes[0].imshow(table, cmap="RdBu", aspect="auto")
    axes[0].set(xlabel=f"channel (0 to {half - 1}: column, {half} to {2 * half - 1}: row)",
                ylabel="patch", title="Columns repeat in each row; rows change slowly")
    shown = axes[1].imshow(nearness)
    axes[1].set(xlabel="column", ylabel="row", title="Places near (2, 3) are most like it")
    figure.colorbar(shown, ax=axes[1], label="cosine similarity", shrink=0.9)
