"""Drawings of the lessons: what is hard to say in words. Each function shows one figure.

They are made of `canvas`, `box` and `arrow` of helper.py: blue is what the drawing is about, grey
what surrounds it; data flows from left to right or from below to above.
"""

import matplotlib.pyplot as plt
from helper import arrow, box, canvas

from nano_aimv2.lab.plots import BLUE

# Lessons 09 and 10: training


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
    plt.show()
