"""Drawings of the lessons: what is hard to say in words. Each function shows one figure.

They are made of `canvas`, `box` and `arrow` of helper.py: blue is what the drawing is about, grey
what surrounds it; data flows from left to right or from below to above.
"""

import matplotlib.pyplot as plt
import numpy as np
from helper import BLUE, GREY, PALE, WIDTH, arrow, box, canvas

from nano_aimv2.lab.plots import ORANGE, show_image

PALE_ORANGE = "#fbd38d"


# Lesson 00


def draw_task():
    """What goes in and what is predicted, at each place of the sequence."""
    _, axis = canvas(9, 4.6, 3.0, "At each position the decoder predicts what comes next")
    inputs = ["patch 0", "patch 1", "...", "patch 14", "patch 15", "start", "top", "left", "a"]
    outputs = ["patch 1", "patch 2", "...", "patch 15", "", "top", "left", "a", "small"]
    for x, (given, predicted) in enumerate(zip(inputs, outputs, strict=True)):
        box(axis, (x + 0.5, 0.3), given, 0.84, 0.5)
        arrow(axis, (x + 0.5, 0.6), (x + 0.5, 1.15 if x < 5 else 2.3))
        if predicted:
            box(axis, (x + 0.5, 4.0), predicted, 0.84, 0.5, True)
            arrow(axis, (x + 0.5, 3.05), (x + 0.5, 3.7))
    box(axis, (2.5, 1.45), "encoder: what you keep after training", 4.84, 0.56)
    arrow(axis, (2.5, 1.78), (2.5, 2.3), "features")
    box(axis, (4.5, 2.65), "decoder", 8.84, 0.66)
    plt.show()


# Lesson 01


def draw_patch_axes():
    """The axes that `reshape` makes of an image of 4 x 6 pixels, and their new order."""
    _, axis = canvas(13, 5.4, 3.1, "reshape gives each index its own axis, permute sorts them")
    for row in range(4):
        for col in range(6):
            is_marked = (row, col) == (3, 4)
            box(axis, (0.9 + 0.7 * col, 3.9 - 0.7 * row), f"{row},{col}", 0.7, 0.7, is_marked)
    for row in range(2):
        for col in range(3):
            corner = (0.55 + 1.4 * col, 1.45 + 1.4 * row)
            axis.add_patch(plt.Rectangle(corner, 1.4, 1.4, fill=False, edgecolor="black", lw=2))
    axis.text(2.65, 4.6, "pixel (row, column), p = 2", ha="center")
    axis.text(2.65, 0.35, "pixel 3,4 is in patch row 1, patch column 2;\n"
              "within the patch it is at 1, 0", ha="center", color=BLUE)
    before, after = ["B", "C", "rows", "p", "cols", "p"], [0, 2, 4, 3, 5, 1]
    for new, old in enumerate(after):
        box(axis, (6.6 + 1.15 * new, 4.0), before[new], 1.0, 0.6)
        box(axis, (6.6 + 1.15 * new, 1.6), before[old], 1.0, 0.6, True)
        arrow(axis, (6.6 + 1.15 * old, 3.68), (6.6 + 1.15 * new, 1.92))
    axis.text(9.5, 4.6, "axes after reshape", ha="center")
    for x, width, text in ((6.6, 1.0, "B"), (8.325, 2.15, "n"), (11.2, 3.3, "P")):
        axis.plot([x - width / 2, x + width / 2], [1.15, 1.15], color=GREY, lw=1.5)
        axis.text(x, 0.65, text, ha="center")
    plt.show()


# Lesson 02


def draw_targets(prefix_len, n):
    """Position q has read patch q and predicts patch q + 1; which of them count."""
    _, axis = canvas(1.4 * n + 1.6, 3, 2.2, f"M = {prefix_len}: the last patch of the prefix "
                     "predicts the first patch that counts")
    for k in range(n):
        x = 2.2 + 1.4 * k
        in_prefix = "\n(prefix)" if k < prefix_len else ""
        seen = "\n(seen)" if 0 < k < prefix_len else ""
        box(axis, (x, 0.5), f"patch {k}{in_prefix}", 1.1, 0.7)
        counts = k >= prefix_len
        box(axis, (x, 2.4), f"patch {k}{seen}", 1.1, 0.7, counts)
        if k:
            arrow(axis, (x - 1.3, 0.9), (x - 0.1, 2.0), colour=BLUE if counts else GREY)
    axis.text(0.05, 0.5, "position has read", va="center", fontsize=8)
    axis.text(0.05, 2.4, "predicts; blue\ncounts in the loss", va="center", fontsize=8)


# Lesson 03


def draw_attention():
    """One query, here of patch 2, becomes one weighted mean of the values."""
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
    """Heads attend side by side, each with its own slice of the channels."""
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


def draw_patches(pixels, patches, places):
    """An image beside some of its patches u8[N, P], as squares."""
    figure, axes = plt.subplots(1, 1 + len(places), figsize=(WIDTH, 2), layout="constrained",
                                width_ratios=[2] + [1] * len(places))
    show_image(axes[0], pixels, "the scene")
    for axis, k in zip(axes[1:], places, strict=True):
        side = int((patches.shape[-1] / 3) ** 0.5)
        show_image(axis, patches[k].reshape(side, side, 3), f"patch {k}")


def draw_weights(rows):
    """Attention weights of one query as bars: {title: weights [keys]}."""
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


# Lesson 04


def draw_swiglu():
    """Two linear layers in, a product, one linear layer out."""
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
    """The pre-norm block, two branches that add to the residual stream."""
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
    """The encoder from patches to features."""
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


def draw_sizes(**curves):
    """The size of x after each layer of a stack, on a logarithmic axis."""
    _, axis = plt.subplots(figsize=(WIDTH * 0.7, 2.3), layout="constrained")
    names = {"plain": "x = layer(x)", "added": "x = x + layer(x)",
             "normed": "x = x + layer(norm(x))"}
    for (name, sizes), colour in zip(curves.items(), (GREY, ORANGE, BLUE), strict=True):
        axis.semilogy(range(1, len(sizes) + 1), sizes, color=colour, label=names[name])
    axis.set(xlabel="layer", ylabel="root mean square of x",
             title="Only a residual branch behind a norm keeps the size of x in check")
    axis.legend()


def draw_gates():
    """What passes a gate of SwiGLU."""
    _, axis = plt.subplots(figsize=(WIDTH * 0.7, 2.1), layout="constrained")
    gate = np.linspace(-6, 6, 200)
    for value, colour in ((-2, ORANGE), (1, GREY), (2, BLUE)):
        axis.plot(gate, gate / (1 + np.exp(-gate)) * value, color=colour, label=f"value {value}")
    axis.set(xlabel="gate g, before silu", ylabel="what passes: silu(g) · value",
             title="A gate far below 0 is shut; above 0 it multiplies")
    axis.legend()


def draw_positions(table, nearness):
    """Sin-cos vectors [N, D] of a grid, and a map [rows, cols] of cosines with one."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH * 0.85, 2.2), layout="constrained",
                                width_ratios=[1.5, 1])
    half = table.shape[1] // 2
    axes[0].imshow(table, cmap="RdBu", aspect="auto")
    axes[0].set(xlabel=f"channel (0 to {half - 1}: column, {half} to {2 * half - 1}: row)",
                ylabel="patch", title="Columns repeat in each row; rows change slowly")
    shown = axes[1].imshow(nearness)
    axes[1].set(xlabel="column", ylabel="row", title="Places near (2, 3) are most like it")
    figure.colorbar(shown, ax=axes[1], label="cosine similarity", shrink=0.9)


# Lesson 05


def draw_decoder_sequence(reads, predicts, num_patches):
    """What each position reads and predicts, which inputs its state has seen, and the
    same as a mask; blue is the image, orange the text."""
    _, axis = canvas(14.4, 4.7, 3.7)
    x = [0.75 + 1.32 * s for s in range(len(reads))]
    for s, (word, target) in enumerate(zip(reads, predicts, strict=True)):
        is_image = s < num_patches
        for t in range(s + 1):  # causal: the state at s has seen the inputs 0 .. s
            axis.plot([x[t], x[s]], [1.06, 2.04], color=GREY, lw=0.8, alpha=0.6)
        for y, text in ((0.75, word), (2.35, f"state {s}"), (4.05, target)):
            is_text = None if is_image or text == "nothing" else PALE_ORANGE
            box(axis, (x[s], y), text, 1.16, 0.6, is_image and text != "nothing", is_text)
        arrow(axis, (x[s], 2.67), (x[s], 3.73))
    for y, text in ((0.2, "reads"), (4.55, "predicts")):
        axis.text(x[0] - 0.58, y, text, va="center", fontweight="bold")
    for place, text in ((x[0], "pixel_head"), (x[num_patches], "text_head")):
        axis.text(place + 0.1, 3.2, text, color=GREY, va="center", fontsize=8)
    axis.text(x[0] - 0.58, 1.66, "trunk,\ncausal", color=GREY, va="center", fontsize=8)
    draw_causal_mask(axis, reads, 10.2, 3.6, 0.62)
    plt.show()


def draw_causal_mask(axis, reads, left, top, size):
    """Rows: the states; columns: the inputs; blue where a state sees an input."""
    for s in range(len(reads)):
        y = top - size * s
        axis.text(left - 0.5, y, f"state {s}", ha="right", va="center", fontsize=8)
        axis.text(left + size * s, top + 0.45, reads[s], ha="center", va="center", fontsize=7.5)
        for t in range(len(reads)):
            text = "1" if t <= s else "0"
            box(axis, (left + size * t, y), text, size, size, is_blue=t <= s)
    axis.text(left - 0.3, top + 0.95, "which input each state sees", va="center",
              fontweight="bold")


def draw_layouts(layouts):
    """Where the padding of a batch stands: {title: rows of names} side by side."""
    _, axis = canvas(13.4, 3, 1.6)
    for left, (title, rows) in zip((0.6, 7.4), layouts.items(), strict=True):
        axis.text(left - 0.5, 2.7, title)
        for y, row in zip((1.85, 0.95), rows, strict=True):
            for s, name in enumerate(row):
                colour = None if name.startswith(("f", "pad")) else PALE_ORANGE
                box(axis, (left + s, y), name, 0.92, 0.7, name.startswith("f"), colour)
        for s in range(len(rows[0])):
            axis.text(left + s, 0.3, f"{s}", ha="center", color=GREY)
    plt.show()


# Lesson 07


def draw_merging(rows, title):
    """The pieces of one word before and after each merge, from above; what a merge has made is
    blue. Args: rows: [[str]]."""
    length = sum(map(len, rows[0]))
    _, axis = canvas(length + 3, len(rows), 0.32 * len(rows) + 0.3, title)
    for i, pieces in enumerate(rows):
        x, y = 3, len(rows) - i - 0.5
        axis.text(0.1, y, f"{len(pieces)} tokens", va="center", color=GREY)
        for k, piece in enumerate(pieces):
            is_new = i > 0 and k == first_difference(rows[i - 1], pieces)
            box(axis, (x + len(piece) / 2, y), piece.replace(" ", "␣"), len(piece) - 0.12, 0.7,
                is_new)
            x += len(piece)
    plt.show()


def first_difference(before, after):
    return next(k for k, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)


def draw_tokens(texts, title):
    """Texts as rows of their tokens in turns of blue and grey, each as wide as its characters.
    Args: texts: [[str]]."""
    figure, axis = plt.subplots(figsize=(WIDTH, 0.45 * len(texts) + 0.6), layout="constrained")
    for y, words in enumerate(texts):
        x = 0
        for k, word in enumerate(words):
            axis.barh(y, len(word), left=x, color=(BLUE, GREY)[k % 2], height=0.7)
            axis.text(x + len(word) / 2, y, word.strip(), ha="center", va="center",
                      color="white", family="monospace", fontsize=8)
            x += len(word)
        axis.text(x + 0.5, y, f"{len(words)} tokens", va="center")
    axis.invert_yaxis()
    axis.set(yticks=[], xlabel="character", xlim=(0, 68), title=title)
    plt.show()


# Lesson 08


def draw_tar(members, size, title):
    """A tar of `size` bytes, to scale: headers grey, contents blue, the zeros behind them hatched.
    Args: members: {name: (offset, size) of the content}."""
    figure, axis = plt.subplots(figsize=(7.5, 1.6), layout="constrained")
    for name, (offset, length) in members.items():
        end = offset + -(-length // 512) * 512
        axis.barh(0, 512, left=offset - 512, color=GREY)
        axis.barh(0, length, left=offset, color=BLUE)
        axis.barh(0, end - offset - length, left=offset + length, color="white", hatch="////",
                  edgecolor=GREY, lw=0)
        axis.text(offset, 0.47, name, rotation=20, fontsize=7)
    axis.barh(0, size - end, left=end, color="white", hatch="////", edgecolor=GREY, lw=0)
    axis.set(xlabel="byte", yticks=[], ylim=(-0.45, 1.3), xlim=(0, size), title=title)
    axis.spines["left"].set_visible(False)
    plt.show()


def draw_feistel_round():
    """One Feistel round: the halves change places, and one of them is mixed into the other."""
    figure, axis = canvas(10, 4.2, 2.1,
                          "One Feistel round: the right half is kept, so it can be undone")
    figure.set_figwidth(5.5)
    for y, names in ((3.8, ("left", "right")), (0.4, ("right", "left XOR mix(right)"))):
        for x, name in zip((2, 8), names, strict=True):
            box(axis, (x, y), name, 3.2, 0.7)
    box(axis, (2, 2.5), "XOR", 1.2, 0.6, is_blue=True)
    box(axis, (5, 2.5), "mix", 1.2, 0.6, is_blue=True)
    arrow(axis, (2, 3.4), (2, 2.85))
    arrow(axis, (8, 2.5), (5.65, 2.5), colour=BLUE)
    arrow(axis, (4.35, 2.5), (2.65, 2.5), colour=BLUE)
    arrow(axis, (5, 3.5), (5, 2.85), colour=BLUE)
    axis.text(5, 3.6, "key, round", ha="center", color=BLUE, fontsize=8)
    arrow(axis, (8, 3.4), (8, 2.5), style="-")
    arrow(axis, (8, 2.5), (2.6, 0.8))
    arrow(axis, (2.3, 2.15), (7.2, 0.8))
    plt.show()


def draw_dealt(rows, size, title):
    """Rows of a mixture, one round per line: blue is the last source; the number is the row's index
    within its source. Args: rows: [(source, index within the source)]; size: of a round."""
    lines = -(-len(rows) // size)
    figure, axis = canvas(size + 1.6, lines, 0.3 * lines + 0.3, title)
    figure.set_figwidth(6)
    last = max(source for source, _ in rows)
    for row, (source, index) in enumerate(rows):
        place = (1.6 + row % size + 0.5, lines - row // size - 0.5)
        box(axis, place, f"{'ab'[source]}{index}", 0.94, 0.8, source == last)
    for k in range(lines):
        axis.text(0.1, lines - k - 0.5, f"round {k}", va="center", color=GREY)
    plt.show()


def draw_address(steps, title):
    """A chain of computations, from a row of the run to a training view.
    Args: steps: [(what is known, the function that leads to it)]."""
    figure, axis = canvas(len(steps) * 2.4, 2, 1.1, title)
    figure.set_figwidth(7)
    for i, (known, function) in enumerate(steps):
        box(axis, (2.4 * i + 1.2, 0.75), known, 1.7, 1.3, is_blue=i == len(steps) - 1)
        if i:
            arrow(axis, (2.4 * i - 0.34, 0.75), (2.4 * i + 0.34, 0.75))
            axis.text(2.4 * i, 1.55, function, ha="center", fontsize=8, color=BLUE)
    plt.show()


def draw_sequences(patches, num_patches, p, title):
    """Images as the sequences of patches that a batch holds, padding hatched.
    Args: patches: u8[B, A, p*p*3]; num_patches: those that are valid."""
    B, A = patches.shape[:2]
    figure, axis = plt.subplots(figsize=(7, 0.47 * B + 0.7), layout="constrained")
    for b, (row, n) in enumerate(zip(patches, num_patches, strict=True)):
        for k, patch in enumerate(row.reshape(A, p, p, 3)):
            if k < n:
                axis.imshow(patch, extent=(k + 0.04, k + 0.96, b + 0.94, b + 0.06))
            else:
                axis.add_patch(plt.Rectangle((k + 0.04, b + 0.06), 0.92, 0.88, hatch="////",
                                             facecolor="white", edgecolor=GREY, lw=0.8))
    axis.set(xlim=(0, A), ylim=(B, 0), aspect="auto", xlabel="patch", ylabel="image", title=title,
             xticks=[k + 0.5 for k in range(A)], xticklabels=range(A),
             yticks=[b + 0.5 for b in range(B)], yticklabels=range(B))
    axis.tick_params(length=0)
    plt.show()


def draw_micro_batches(place, ranks, steps, grad_accum, title):
    """Which rows of the run each rank reads. Args: place: place(rank, k) -> (first row of the step,
    slice of rows)."""
    figure, axis = canvas(steps * grad_accum + 0.7, ranks + 0.9, 0.34 * ranks + 0.7, title)
    figure.set_figwidth(7)
    for k in range(steps * grad_accum):
        step, part = divmod(k, grad_accum)
        x = k + 1.2
        axis.text(x, ranks + 0.45, f"data[{k}]\nstep {step}, part {part}", ha="center",
                  va="center", fontsize=8)
        for rank in range(ranks):
            start, rows = place(rank, k)
            text = f"rows {start + rows.start} .. {start + rows.stop - 1}"
            box(axis, (x, ranks - rank - 0.5), text, 0.94, 0.8, step % 2 == 1)
    for rank in range(ranks):
        axis.text(0.1, ranks - rank - 0.5, f"rank {rank}", va="center", color=GREY)
    plt.show()


# Lesson 09


def draw_ddp():
    """What each of two ranks holds under DDP, and what they exchange."""
    _, axis = canvas(10, 3.6, 2.6, "DDP: each rank holds everything and reads half of the batch; "
                                   "gradients are exchanged once per step")
    for rank, y in ((0, 2.9), (1, 0.7)):
        axis.text(0, y, f"rank {rank}", va="center")
        parts = ((1.5, "its rows of\nthe batch"), (3.5, "all weights:\nforward"),
                 (5.9, "all gradients"), (8.4, "all of m and v:\nAdamW step"))
        for (x, text), (u, _) in zip(parts, ((0, ""), *parts), strict=False):
            box(axis, (x, y), text, 1.6, 0.9, is_blue=text == "all gradients")
            if u:
                arrow(axis, (u + 0.8, y), (x - 0.8, y))
    arrow(axis, (5.9, 2.45), (5.9, 1.15), colour=BLUE, style="<->")
    axis.text(6.05, 1.8, "all-reduce: both get the mean", va="center", color=BLUE, fontsize=8)
    plt.show()


def draw_fsdp():
    """What each of two ranks holds under FSDP, and what they exchange."""
    _, axis = canvas(11.6, 4.2, 3, "FSDP: each rank keeps half of everything; a block is whole "
                                   "only while it is computed")
    parts = ((1.3, "half of the\nweights"), (3.3, "one block whole:\nforward"),
             (5.5, "one block whole:\nbackward"), (7.8, "half of the\ngradients"),
             (10.2, "half of m and v:\nAdamW step"))
    for rank, y in ((0, 3.5), (1, 0.8)):
        axis.text(-0.3, y, f"rank {rank}", va="center")
        for i, (x, text) in enumerate(parts):
            box(axis, (x, y), text, 1.8, 1.0, is_blue=text.startswith("half"))
            if i:
                arrow(axis, (parts[i - 1][0] + 0.9, y), (x - 0.9, y))
    for x, text in ((3.3, "all-gather\nweights"), (5.5, "all-gather\nweights"),
                    (7.8, "reduce-scatter\ngradients")):
        arrow(axis, (x, 3), (x, 1.3), colour=BLUE, style="<->")
        axis.text(x + 0.1, 2.15, text, va="center", color=BLUE, fontsize=8)
    axis.text(4.4, 0.05, "repeated for each block", ha="center", va="center", fontsize=8)
    plt.show()


# Lesson 10


def draw_late_read():
    """When the CPU reads a number of the GPU: at once, or a step later."""
    _, axis = canvas(12, 5.6, 3, "Read at once, the GPU has nothing to do in between; read a step "
                                 "later, it is never idle")
    rows = (("at once", 5.1, ((0, 1, "launch 0"), (3.6, 0.9, "read 0"), (4.5, 1, "launch 1"),
                              (8.1, 0.9, "read 1")),
             ((1, 2.6, "step 0"), (5.5, 2.6, "step 1"))),
            ("a step later", 2.4, ((0, 1, "launch 0"), (1, 1, "launch 1"), (3.6, 0.9, "read 0"),
                                   (4.5, 1, "launch 2"), (6.2, 0.9, "read 1")),
             ((1, 2.6, "step 0"), (3.6, 2.6, "step 1"), (6.2, 2.6, "step 2"))))
    for name, y, cpu, gpu in rows:
        axis.text(0, y, f"{name}:  CPU", va="center")
        axis.text(1.75, y - 1, "GPU", va="center", ha="right")
        for height, parts in ((y, cpu), (y - 1, gpu)):
            for x, width, text in parts:
                box(axis, (2 + x + width / 2, height), text, width, 0.8, is_blue=parts is gpu)
    arrow(axis, (2, 0.5), (11.5, 0.5), "time")


# Lesson 11


def draw_kv_cache():
    """Which positions are computed at each call, without a cache and with one; below, one layer."""
    _, axis = canvas(14, 7.1, 4.6)
    words = ("BOS", "top", "left", "a")
    for x, name in ((0, "without a cache"), (7.2, "with a cache")):
        axis.text(x + 0.1, 6.85, name, weight="bold")
        for call in range(4):
            y = 6.3 - 0.62 * call
            is_new = call == 0 or x == 0
            box(axis, (x + 1.1, y), "16 image features", 2.0, 0.5, is_new)
            for t in range(call + 1):
                box(axis, (x + 2.5 + 0.8 * t, y), words[t], 0.72, 0.5, is_new or t == call)
            rows = 17 + call if is_new else 1
            axis.text(x + 5.4, y, f"{rows} row{'s' * (rows > 1)}", va="center", color=GREY)
    axis.plot([0, 14], [3.75, 3.75], color=GREY, lw=0.6)
    axis.text(0.1, 3.35, "one attention layer at the third call: blue is computed, pale is kept",
              weight="bold")
    box(axis, (1.1, 1.6), "state of\n\"left\"", 1.3, 0.9, True)
    for y, name in ((2.7, "q"), (1.6, "k"), (0.5, "v")):
        box(axis, (3.2, y), name, 0.7, 0.6, True)
        arrow(axis, (1.75, 1.6), (2.85, y))
    for y, name in ((1.6, "keys"), (0.5, "values")):
        box(axis, (6.05, y), f"18 {name} kept", 2.5, 0.6)
        box(axis, (7.65, y), "+ 1", 0.7, 0.6, True)
        arrow(axis, (3.55, y), (4.8, y))
        axis.text(4.15, y + 0.12, "append", ha="center", color=GREY, fontsize=8)
    box(axis, (10.1, 2.3), "softmax(q keysᵀ)\n1 row of 19", 2.4, 0.9, True)
    arrow(axis, (3.55, 2.7), (8.9, 2.5))
    arrow(axis, (8.0, 1.6), (8.9, 2.1))
    box(axis, (12.7, 1.1), "weighted sum\nof 19 values", 2.2, 0.9, True)
    arrow(axis, (11.3, 2.1), (12.3, 1.55))
    arrow(axis, (8.0, 0.5), (11.6, 0.9))
    plt.show()


# Lesson 12


def draw_patch_sampler():
    """What the head reads, and how its answer moves the noise towards a patch."""
    _, axis = canvas(14, 6.0, 3.9)
    axis.text(0.1, 5.65, "known before drawing (detached)", weight="bold")
    for y, name in ((4.9, "decoder's state  192"), (4.1, "pixel head's prediction\nas 64 waves"),
                    (3.3, "touching pixels  2 · 36 + 2")):
        box(axis, (1.7, y), name, 3.0, 0.7)
        arrow(axis, (3.2, y), (4.2, 4.1))
    box(axis, (4.7, 4.1), "seen\n330", 0.9, 0.9)
    box(axis, (7.0, 3.5), "embed_seen\ntwo layers", 1.9, 0.75, True)
    box(axis, (7.0, 4.7), "direct\ntwo layers", 1.9, 0.75, True)
    box(axis, (3.9, 1.9), "t", 0.7, 0.6)
    box(axis, (7.0, 1.9), "embed_time", 1.9, 0.6, True)
    box(axis, (3.9, 0.7), "x_t  64", 1.1, 0.6)
    box(axis, (7.0, 0.7), "embed", 1.9, 0.6, True)
    box(axis, (10.0, 1.6), "3 FlowBlocks,\nlinear layer", 1.9, 1.2, True)
    box(axis, (12.9, 1.6), "clean patch\n64 waves", 1.7, 0.9)
    for start, end in (((5.15, 4.2), (6.05, 4.7)), ((5.15, 4.0), (6.05, 3.5)),
                       ((4.25, 1.9), (6.05, 1.9)), ((4.45, 0.7), (6.05, 0.7)),
                       ((7.95, 0.7), (9.05, 1.2)), ((7.95, 1.9), (9.05, 1.7)),
                       ((7.95, 3.4), (9.6, 2.2)), ((10.95, 1.6), (12.05, 1.6)),
                       ((7.95, 4.7), (12.6, 2.05))):
        arrow(axis, start, end)
    axis.text(11.0, 3.7, "added at the end", color=GREY, fontsize=8)
    axis.text(6.7, 2.7, "modulates each block", color=GREY, fontsize=8, va="center")
    axis.plot([12.9, 12.9, 3.9], [1.15, 0.05, 0.05], color=GREY, lw=1)
    arrow(axis, (3.9, 0.05), (3.9, 0.4))
    axis.text(8.0, 0.18, "a short step towards it, then the next t", color=GREY, fontsize=8)


# Lesson 13


def draw_probe():
    """The same probe on three sources of tokens."""
    _, axis = canvas(10, 3.6, 2.6, "One probe, three sources: only the source differs")
    box(axis, (0.9, 1.7), "400 scenes\nto train,\n300 to test", 1.5, 1.1)
    sources = ("trained encoder,\nfrozen", "untrained encoder,\nfrozen", "raw patches")
    for y, source in zip((2.9, 1.7, 0.5), sources, strict=True):
        box(axis, (3.4, y), source, 2.1, 0.8)
        box(axis, (6.3, y), "small classifier,\ntrained", 2.0, 0.8, True)
        box(axis, (9.0, y), "correct of 300", 1.6, 0.6)
        arrow(axis, (1.65, 1.7), (2.35, y))
        arrow(axis, (4.45, y), (5.3, y))
        arrow(axis, (7.3, y), (8.2, y))
    plt.show()


def draw_one_query():
    """One learned query attends over the patches of an image."""
    _, axis = canvas(10, 4, 2.8, "The attentive probe: blue is learned, the features are frozen")
    for i, weight in enumerate((0.05, 0.1, 0.8, 0.05)):
        x = 0.9 + 1.3 * i
        box(axis, (x, 0.6), f"feature {i}", 1.1, 0.6)
        box(axis, (x, 2.1), f"weight\n{weight}", 1.1, 0.8)
        arrow(axis, (x, 0.9), (x, 1.7))
        arrow(axis, (2.85, 3.1), (x, 2.5))
    box(axis, (2.85, 3.4), "query", 1.2, 0.6, True)
    axis.text(5.45, 1.3, "score = query . key,\nsoftmax over patches", fontsize=8)
    box(axis, (6.6, 2.1), "weighted sum\nof the values", 1.5, 0.8)
    box(axis, (8.9, 2.1), "linear\nclassifier", 1.3, 0.8, True)
    arrow(axis, (5.35, 2.1), (5.85, 2.1))
    arrow(axis, (7.35, 2.1), (8.25, 2.1))
    box(axis, (8.9, 3.5), "8 shapes", 1.3, 0.6)
    arrow(axis, (8.9, 2.5), (8.9, 3.2))
    plt.show()


# Lesson 14


def draw_grids(images, title, blue=()):
    """Images side by side and to scale, each cut into its grid of patches.

    Args: images: [((width, height) in pixels, (rows, cols))]; blue: numbers of those that the
        drawing is about.
    """
    gap = 0.14 * max(width for (width, _), _ in images) + 8
    total = sum(width + gap for (width, _), _ in images)
    tallest = max(height for (_, height), _ in images)
    _, axis = canvas(total, 1.3 * tallest, 9.0 * 1.3 * tallest / total + 0.3, title)
    axis.set(ylim=(-0.02 * tallest, 1.3 * tallest))
    left = gap / 2
    for i, ((width, height), (rows, cols)) in enumerate(images):
        colour, line = (BLUE, "white") if i in blue else (PALE, "#4a5568")
        axis.add_patch(plt.Rectangle((left, 0), width, height, facecolor=colour))
        for k in range(rows + 1):
            axis.plot([left, left + width], [height * k / rows] * 2, color=line, lw=0.8)
        for k in range(cols + 1):
            axis.plot([left + width * k / cols] * 2, [0, height], color=line, lw=0.8)
        axis.text(left + width / 2, height + 0.04 * tallest, f"{width} x {height} px\n{rows} x "
                  f"{cols} = {rows * cols} patches", ha="center", va="bottom", fontsize=8)
        left += width + gap
    plt.show()


# Lesson 15


def draw_study():
    """From arms to verdicts."""
    _, axis = canvas(10, 2.6, 1.9, "A study: every arm is trained alike, several times")
    steps = ("arms x numbers\nof samples\nx seeds", "one run each:\ntrain.py",
             "one row each:\nprobe, losses", "one cell per arm\nand number\nof samples",
             "claim: holds, fails,\ninconclusive")
    for i, step in enumerate(steps):
        x = 1 + 2 * i
        box(axis, (x, 1.3), step, 1.6, 1.2, i == 4)
        if i:
            arrow(axis, (x - 1.2, 1.3), (x - 0.8, 1.3))
