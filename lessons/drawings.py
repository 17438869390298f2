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
