"""Drawings of the lessons: what is hard to say in words. Each function shows one figure.

They are made of `canvas`, `box` and `arrow` of helper.py: blue is what the drawing is about, grey
what surrounds it; data flows from left to right or from below to above.
"""

from helper import GREY, arrow, box, canvas, plt

PALE_ORANGE = "#fbd38d"


def draw_decoder_sequence(reads, predicts, num_patches):
    """Lesson 05: what each position reads and predicts, which inputs its state has seen, and the
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
    """Lesson 05: where the padding of a batch stands: {title: rows of names} side by side."""
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
