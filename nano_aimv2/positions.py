"""Positions: where on the grid a patch stands.

Fixed-resolution encoders learn one vector for each place of the grid. The native-resolution encoder
computes 2-D sines and cosines from the actual (row, column), so that any grid works. Both are added
after the norm of the patch embedding.

Source: paper section 2.4 (native resolution uses sin-cos); layout of Apple's released code: the
first half of the channels encodes the column, the second half the row, each half [sin | cos], base
10000, integer positions. Lesson: 04.
"""

import torch
import torch.nn.functional as F
from torch import nn


def sincos(position, dim, base=10000.0):
    """1-D positions [...] -> f32[..., dim], [sin | cos], wavelengths 2 pi .. 2 pi base."""
    channel = torch.arange(dim // 2, device=position.device, dtype=torch.float32)
    omega = base ** (-channel / (dim // 2))
    angle = position.float()[..., None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def sincos_2d(grid, size, dim):
    """2-D sin-cos positions of every patch.

    Args: grid: i64[B, 2] (rows, cols); size: padded patches A; dim: width D, a multiple of 4.
    Returns: f32[B, A, D]: channels 0..D/2 encode the column, D/2..D the row.
    """
    k, cols = torch.arange(size, device=grid.device), grid[:, 1:]  # patch k is in row k // cols
    return torch.cat([sincos(k % cols, dim // 2), sincos(k // cols, dim // 2)], dim=-1)


def resize_table(table, old_grid, new_grid):
    """Resize a learned position table f[N, D] from one grid (rows, cols) to another, bicubic.

    Computed in float32; the identity at equal size; exact on a linear ramp away from the border.
    """
    if tuple(old_grid) == tuple(new_grid):
        return table
    square = table.float().reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # [1, D, rows, cols]
    # antialias=True also selects Keys's cubic (a = -0.5), which reproduces straight lines; torch's
    # default (a = -0.75) does not.
    square = F.interpolate(square, size=tuple(new_grid), mode="bicubic", antialias=True)
    return square.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


class SinCosPositions(nn.Module):
    """Fixed positions for any grid: forward(grid i64[B, 2], size) -> f32[B, size, D]."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, grid, size):
        return sincos_2d(grid, size, self.dim)


class LearnedPositions(nn.Module):
    """A learned table for one square grid: forward(grid i64[B, 2], size) -> f32[1, size, D].

    Another grid than its own resizes the table; all images of the batch must then share that grid.
    """

    def __init__(self, side, dim):
        super().__init__()
        self.side = side
        self.table = nn.Parameter(torch.empty(side * side, dim))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, grid, size):
        if self.training and size == self.side**2:
            return self.table[None]  # trained on its own grid only: `grid` need not leave a GPU
        rows, cols = grid[0].tolist()
        if rows * cols != size or not bool((grid == grid[0]).all()):
            raise ValueError(f"grids {grid.unique(dim=0).tolist()} in one batch of {size} patches; "
                             "a learned position table needs equal grids: use positions='sincos' "
                             "for mixed sizes")
        return resize_table(self.table, (self.side, self.side), (rows, cols))[None]
