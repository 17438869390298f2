"""Drawings of the lessons: what is hard to say in words. Each function shows one figure.

They are made of `canvas`, `box` and `arrow` of helper.py: blue is what the drawing is about, grey
what surrounds it; data flows from left to right or from below to above.
"""

import matplotlib.pyplot as plt
from helper import BLUE, PALE, canvas


def draw_grids(images, title, blue=()):
    """Images side by side and to scale, each cut into its grid of patches: lesson 14.

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
