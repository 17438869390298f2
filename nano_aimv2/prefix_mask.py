"""Prefix mask: one integer per image says which patch may attend to which.

`prefix_len` M: query q may attend to key k **iff k <= q or k < M**. The first M patches attend to
each other freely; later ones attend to the prefix and to their own past. So the encoder can be
trained with a next-patch loss and be used bidirectionally:

    M = 1 (causal)     M = 3 (prefix)     M = 5 (bidirectional)
    1 0 0 0 0          1 1 1 0 0          1 1 1 1 1
    1 1 0 0 0          1 1 1 0 0          1 1 1 1 1
    1 1 1 0 0          1 1 1 0 0          1 1 1 1 1        rows: queries
    1 1 1 1 0          1 1 1 1 0          1 1 1 1 1        columns: keys
    1 1 1 1 1          1 1 1 1 1          1 1 1 1 1

Patches that pad an image to a common length stand at its end. No valid query attends to them, since
k <= q and k < M <= n both exclude them.

Pipeline: (seed, step) -> **prefix_len** -> encoder mask and image loss. Source: paper section 2.2.
Lesson: 02.
"""

import torch


def sample_prefix_len(num_patches, generator):
    """Draw one prefix length per image, uniform on 1 .. n-1: at least one patch is left to predict.

    Args:
        num_patches: i64[B], the valid patches n of each image, each at least 2.
        generator: a CPU torch.Generator.
    Returns: i64[B] on the device of `num_patches`.
    Raises: ValueError if an image has fewer than 2 patches.
    """
    uniform = torch.rand(len(num_patches), generator=generator, dtype=torch.float64)
    return prefix_len_from_uniform(num_patches, uniform)


def step_prefix_len(num_patches, seed, step, rows, batch_size, prefix="random"):
    """The prefix lengths of some rows of a step's global batch: a pure function of (seed, step).

    Args:
        num_patches: i64[B], the valid patches n of these rows.
        rows: slice of the global batch; batch_size: rows of the global batch.
        prefix: "random" as in the paper; for comparisons "causal" (M = 1) or "full" (M = n).
    Returns: i64[B]. The whole global batch is drawn and then sliced, so that the lengths do not
        depend on ranks, workers or accumulation steps.
    """
    if prefix != "random":
        return torch.ones_like(num_patches) if prefix == "causal" else num_patches.clone()
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    uniform = torch.rand(batch_size, generator=generator, dtype=torch.float64)
    return prefix_len_from_uniform(num_patches, uniform[rows])


def prefix_len_from_uniform(num_patches, uniform):
    """num_patches i64[B] and uniform f64[B] in [0, 1), on the CPU -> i64[B] in 1 .. n-1."""
    if num_patches.numel() and int(num_patches.min()) < 2:
        raise ValueError(f"an image has {int(num_patches.min())} patch; a prefix and a target need "
                         "2: use a larger image or smaller patches")
    return 1 + (uniform.to(num_patches.device) * (num_patches - 1)).long()


def prefix_mask(prefix_len, size):
    """Which patch may attend to which.

    Args: prefix_len: i64[B]; size: the sequence length.
    Returns: bool[B, 1, size, size], True = the query (row) may attend to the key (column).
    """
    i = torch.arange(size, device=prefix_len.device)
    causal = i[None, :] <= i[:, None]  # k <= q
    in_prefix = i[None, :] < prefix_len[:, None]  # k < M, [B, size]
    return (causal | in_prefix[:, None, :])[:, None]


def is_image_target(prefix_len, num_patches, size):
    """Which patches are predicted: target k counts iff M <= k < n. Returns bool[B, size].

    Decoder position k-1 predicts patch k. Within the prefix, position k-1 has already seen patch k:
    predicting it would be a leak.
    """
    k = torch.arange(size, device=prefix_len.device)
    return (k >= prefix_len[:, None]) & (k < num_patches[:, None])
