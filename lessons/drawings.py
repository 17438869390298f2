"""Drawings of the lessons: what is hard to say in words. Each function shows one figure.

They are made of `canvas`, `box` and `arrow` of helper.py: blue is what the drawing is about, grey
what surrounds it; data flows from left to right or from below to above.
"""

from helper import BLUE, GREY, WIDTH, arrow, box, canvas, plt

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


# Text (lesson 07)


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


# Data (lesson 08)


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
