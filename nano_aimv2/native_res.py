"""Native resolution: every image keeps its own aspect ratio, every batch has one area.

A mini-batch draws one area A (in patches). Each of its images is resized to the grid that best
fills A at the image's own proportions. The batch takes B = C // A images, so that the work C = A *
B stays the same whatever was drawn: small areas show many images, large areas show detail. Zero
patches pad an image that does not fill A, at its end, where no valid query attends
(prefix_mask.py).

Pipeline: (seed, step) -> **A, B** -> batches. Source: paper section 2.4; A = 2^n, n normal,
truncated to [-1, 1], mapped linearly onto [7, 12]. Lesson: 14.
"""

import numpy as np


def draw_areas(seed, steps, low, high):
    """The area of every step, i64[steps]: 2^n with n drawn between `low` and `high`.

    n follows N(0, 1) truncated to [-1, 1] and mapped linearly onto [low, high]. Step k's area does
    not depend on how many steps are asked for.
    """
    rng = np.random.default_rng([seed, 7])
    inside = np.empty(0)
    while len(inside) < steps:  # drawn in fixed blocks: a longer run begins like a shorter one
        block = rng.normal(size=4096)
        inside = np.concatenate([inside, block[np.abs(block) <= 1]])
    exponent = low + (inside[:steps] + 1) / 2 * (high - low)
    return np.floor(2.0**exponent + 1e-9).astype(np.int64)


def batch_sizes(areas, patches_per_batch):
    """Images of each step, i64[steps]: B = C // A, at least one."""
    return np.maximum(patches_per_batch // areas, 1)


def best_grid(width, height, area):
    """The grid (rows, cols) of at most `area` patches that fills most of it and distorts least.

    Args: width, height: in pixels; area: A, at least 2.
    Returns: (rows, cols), both at least 1, which maximise (rows*cols / A) * min(q, 1/q), where
        q = (cols/rows) / (width/height).
    """
    aspect = width / height
    ideal = (area / aspect) ** 0.5  # rows at the exact proportions, not a whole number
    near = [int(ideal) + d for d in (-1, 0, 1, 2)]
    # Long images: as many rows as so few columns leave
    near += [area // max(1, int(ideal * aspect) + d) for d in (0, 1)]
    best = (0.0, 1, 1)
    for rows in {max(1, min(area, rows)) for rows in near}:
        ideal_cols = int(rows * aspect)
        for cols in {max(1, min(area // rows, ideal_cols + d)) for d in (-1, 0, 1, 2)}:
            q = cols / rows / aspect
            best = max(best, (rows * cols / area * min(q, 1 / q), rows, cols))
    rows, cols = best[1:]
    if rows * cols < 2:
        return (1, 2) if aspect >= 1 else (2, 1)
    return rows, cols
