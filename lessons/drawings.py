"""Drawings of the lessons: what is hard to say in words. Each function shows one figure.

They are made of `canvas`, `box` and `arrow` of helper.py: blue is what the drawing is about, grey
what surrounds it; data flows from left to right or from below to above.
"""

from helper import BLUE, GREY, arrow, box, canvas, plt


def draw_task():
    """Lesson 00: what goes in and what is predicted, at each place of the sequence."""
    _, axis = canvas(9, 4.6, 3.0, "At each place the decoder predicts what comes next")
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


def draw_patch_axes():
    """Lesson 01: the axes that `reshape` makes of an image of 4 x 6 pixels, and their new order."""
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


def draw_targets(prefix_len, n):
    """Lesson 02: position q has read patch q and predicts patch q + 1; which of them count."""
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
    plt.show()
