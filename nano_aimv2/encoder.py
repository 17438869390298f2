"""Encoder: the ViT that AIMv2 exists to train.

Patch embedding (a linear layer with the encoder's only bias), RMSNorm, positions, then a trunk of
blocks under the prefix mask. No class token, no registers. Trained with a random prefix per image,
used bidirectionally: both are the same call.

Pipeline: patches -> **features** -> decoder (training) or your probe (use). Source: paper sections
2.2 and 3. Lesson: 04.
"""

import torch
from torch import nn

from nano_aimv2.layers import RMSNorm, Trunk
from nano_aimv2.patchify import float_to_pixels, pixels_to_float
from nano_aimv2.positions import LearnedPositions, SinCosPositions
from nano_aimv2.prefix_mask import prefix_mask


class Encoder(nn.Module):
    """AIMv2's vision encoder.

    It reads these fields of `config`: patch_size, image_size, pixel_mean, pixel_std, embed_dim,
    num_blocks, num_heads, mlp_hidden_dim, positions, recompute.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.embed_dim
        self.set_pixel_scale()
        self.proj = nn.Linear(config.patch_dim, D)
        self.norm = RMSNorm(D)
        if config.positions == "learned":
            self.positions = LearnedPositions(config.image_size // config.patch_size, D)
        else:
            self.positions = SinCosPositions(D)
        self.trunk = Trunk(D, config.num_blocks, config.num_heads, config.mlp_hidden_dim,
                           config.recompute)

    def set_pixel_scale(self):
        """Pixel mean and deviation as buffers f32[3]: moved with the model, not saved with it."""
        for name in ("pixel_mean", "pixel_std"):
            values = torch.tensor(getattr(self.config, name), device="cpu")
            self.register_buffer(name, values, persistent=False)

    def standardize(self, patches):
        """Raw patches u8[B, A, P] -> f32[B, A, P]; floats are taken as standardised already."""
        if patches.is_floating_point():
            return patches
        return pixels_to_float(patches, self.pixel_mean, self.pixel_std)

    def to_pixels(self, patches):
        """The inverse of `standardize`: f[B, A, P] -> u8[B, A, P]."""
        return float_to_pixels(patches, self.pixel_mean, self.pixel_std)

    def embed(self, patches):
        """Patches u8 or f[B, A, P] -> block inputs f[B, A, De], before the positions are added."""
        return self.norm(self.proj(self.standardize(patches)))

    def forward(self, patches, grid, prefix_len=None):
        """Features of every patch.

        Args:
            patches: u8[B, A, P], raw pixels 0..255, padding at the end; floats count as
                standardised.
            grid: i64[B, 2], (rows, cols) of the valid patches; n = rows*cols <= A.
            prefix_len: i64[B], or None for bidirectional attention over the n valid patches.
        Returns: f[B, A, De], after the final norm. Rows of padding hold meaningless numbers.
        """
        A = patches.shape[1]
        x = self.embed(patches) + self.positions(grid, A)
        if prefix_len is None:
            prefix_len = grid.prod(dim=1)  # M = n: every patch attends to every valid patch
            if bool((prefix_len == A).all()):
                return self.trunk(x)  # no padding: all may attend to all, and no mask is fastest
        return self.trunk(x, can_attend=prefix_mask(prefix_len, A))
