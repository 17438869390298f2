"""Drawings of the lessons: what is hard to say in words. Each function shows one figure.

They are made of `canvas`, `box` and `arrow` of helper.py: blue is what the drawing is about, grey
what surrounds it; data flows from left to right or from below to above.
"""

import matplotlib.pyplot as plt
from helper import GREY, arrow, box, canvas

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
    plt.show()
