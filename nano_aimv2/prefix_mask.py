"""Prefix mask: one integer per image says who may look at whom.

`prefix_len` M: query q may attend to key k **iff k <= q or k < M**. The first M patches see each other freely, later
ones see the prefix and their own past, so the encoder can be trained with a next-patch loss and used bidirectionally:

    M = 1 (causal)     M = 3 (prefix)     M = 5 (bidirectional)
    1 0 0 0 0          1 1 1 0 0          1 1 1 1 1
    1 1 0 0 0          1 1 1 0 0          1 1 1 1 1
    1 1 1 0 0          1 1 1 0 0          1 1 1 1 1        rows: queries
    1 1 1 1 0          1 1 1 1 0          1 1 1 1 1        columns: keys
    1 1 1 1 1          1 1 1 1 1          1 1 1 1 1

Patches that pad an image to a common length stand at the end: k <= q and k < M <= n keep them from every valid query.

Way: (seed, step) -> **prefix_len** -> encoder mask and image loss. Source: paper section 2.2. Lesson: 02.
"""

import torch


def sample_prefix_len(num_patches, generator):
    """Draw one prefix length per image, uniform on 1 .. n-1, so that at least one patch is left to predict.

    Args:
        num_patches: i64[B], the valid patches n of each image, each at least 2.
        generator: a CPU torch.Generator.
    Returns: i64[B] on the device of `num_patches`.
    Raises: ValueError if an image has fewer than 2 patches.
    """
    return prefix_len_from_uniform(num_patches, torch.rand(len(num_patches), generator=generator, dtype=torch.float64))


def step_prefix_len(num_patches, seed, step, rows, batch_size, prefix="random"):
    """The prefix lengths of rows `rows` (a slice) of the global batch of `step`: a pure function of (seed, step).

    The whole global batch is drawn and sliced, so that they do not depend on ranks, workers or accumulation steps.
    `prefix`: "random", as the paper has it, or what it is compared with: "causal" (M = 1) and "full" (M = n).
    """
    if prefix != "random":
        return torch.ones_like(num_patches) if prefix == "causal" else num_patches.clone()
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    uniform = torch.rand(batch_size, generator=generator, dtype=torch.float64)
    return prefix_len_from_uniform(num_patches, uniform[rows])


def prefix_len_from_uniform(num_patches, uniform):
    """num_patches i64[B] and uniform f64[B] in [0, 1) on the CPU -> i64[B] in 1 .. n-1."""
    if num_patches.numel() and int(num_patches.min()) < 2:
        raise ValueError(f"an image has {int(num_patches.min())} patch; a prefix and a target need 2: use a larger "
                         "image or smaller patches")
    return 1 + (uniform.to(num_patches.device) * (num_patches - 1)).long()


def prefix_mask(prefix_len, size):
    """Who may attend to whom.

    Args: prefix_len: i64[B]; size: the sequence length.
    Returns: bool[B, 1, size, size], True = query (row) may attend to key (column).
    """
    i = torch.arange(size, device=prefix_len.device)
    causal = i[None, :] <= i[:, None]  # k <= q
    in_prefix = i[None, :] < prefix_len[:, None]  # k < M, [B, size]
    return (causal | in_prefix[:, None, :])[:, None]


def is_image_target(prefix_len, num_patches, size):
    """Which patches are predicted: target k counts iff M <= k < n. Returns bool[B, size].

    Decoder position k-1 predicts patch k. Patches inside the prefix were seen by their own predictor: they would leak.
    """
    k = torch.arange(size, device=prefix_len.device)
    return (k >= prefix_len[:, None]) & (k < num_patches[:, None])
