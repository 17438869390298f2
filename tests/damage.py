"""Damage: copies of a file as disks, cables and editors spoil them, from a fixed seed."""

import numpy as np

KINDS = ("flipped bit", "zeros", "noise", "cut", "bytes removed", "bytes inserted", "twice")


def damaged(data, count, seed=0, kinds=KINDS):
    """Yields `count` pairs (what was done, damaged bytes) of the byte string `data`."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        kind = kinds[i % len(kinds)]
        at = int(rng.integers(len(data)))
        length = int(min(len(data) - at, rng.choice([1, 7, 64, 512, 700, 3000])))
        part = data[at : at + length]
        if kind == "flipped bit":
            length = 1
            part = bytes([data[at] ^ 1 << int(rng.integers(8))])
        elif kind == "zeros":
            part = bytes(length)
        elif kind == "noise":
            part = rng.bytes(length)
        elif kind == "cut":
            length, part = len(data) - at, b""
        elif kind == "bytes removed":
            part = b""
        elif kind == "bytes inserted":
            part = rng.bytes(length) + part
        elif kind == "twice":
            part = part + part
        yield f"damage {i}: {kind}, {length} bytes at {at}", data[:at] + part + data[at + length :]
