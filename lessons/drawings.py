"""Drawings of the lessons: what is hard to say in words. Each function shows one figure.

They are made of `canvas`, `box` and `arrow` of helper.py: blue is what the drawing is about, grey
what surrounds it; data flows from left to right or from below to above.
"""

import matplotlib.pyplot as plt
from helper import arrow, box, canvas


def draw_probe():
    """Lesson 13: the same probe on three sources of tokens."""
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
    """Lesson 13: one learned query attends over the patches of an image."""
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


def draw_study():
    """Lesson 15: from arms to verdicts."""
    _, axis = canvas(10, 2.6, 1.9, "A study: every arm is trained alike, several times")
    steps = ("arms x numbers\nof samples\nx seeds", "one run each:\ntrain.py",
             "one row each:\nprobe, losses", "one cell per arm\nand number\nof samples",
             "claim: holds, fails,\ninconclusive")
    for i, step in enumerate(steps):
        x = 1 + 2 * i
        box(axis, (x, 1.3), step, 1.6, 1.2, i == 4)
        if i:
            arrow(axis, (x - 1.2, 1.3), (x - 0.8, 1.3))
    plt.show()
