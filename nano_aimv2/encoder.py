"""Encoder: the ViT that AIMv2 exists to train.

Patch embedding (linear with the encoder's only bias), RMSNorm, positions, then a trunk of blocks under the prefix mask.
No class token, no registers. Trained with a random prefix per image, used bidirectionally: both are the same call.

Way: patches -> **features** -> decoder (training) or your probe (use). Source: paper sections 2.2 and 3. Lesson: 03.
"""

from torch import nn

from nano_aimv2.layers import RMSNorm, Trunk
from nano_aimv2.positions import LearnedPositions, SinCosPositions
from nano_aimv2.prefix_mask import prefix_mask


class Encoder(nn.Module):
    """AIMv2's vision encoder. Fields of `config` it reads: patch_size, image_size, embed_dim, num_blocks, num_heads,
    mlp_hidden_dim, positions."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.embed_dim
        self.proj = nn.Linear(config.patch_dim, D)
        self.norm = RMSNorm(D)
        if config.positions == "learned":
            self.positions = LearnedPositions(config.image_size // config.patch_size, D)
        else:
            self.positions = SinCosPositions(D)
        self.trunk = Trunk(D, config.num_blocks, config.num_heads, config.mlp_hidden_dim, config.recompute)

    def embed(self, patches, grid):
        """Patches to block inputs: f[B, A, P], grid i64[B, 2] -> f[B, A, De]."""
        return self.norm(self.proj(patches)) + self.positions(grid, patches.shape[1])

    def forward(self, patches, grid, prefix_len=None):
        """Features of every patch.

        Args:
            patches: f[B, A, P], normalised pixels, padding at the end.
            grid: i64[B, 2], (rows, cols) of the valid patches; n = rows*cols <= A.
            prefix_len: i64[B], or None for bidirectional attention over the n valid patches.
        Returns: f[B, A, De], after the final norm. Rows of padding hold numbers that mean nothing.
        """
        if prefix_len is None:
            prefix_len = grid.prod(dim=1)  # M = n: everyone sees every valid patch
            if bool((prefix_len == patches.shape[1]).all()):  # no padding: all may attend to all, and no mask is fastest
                return self.trunk(self.embed(patches, grid))
        return self.masked_trunk(self.embed(patches, grid), prefix_len)

    def masked_trunk(self, x, prefix_len):
        """The blocks under the prefix mask: f[B, A, De], i64[B] -> f[B, A, De]."""
        return self.trunk(x, can_attend=prefix_mask(prefix_len, x.shape[1]))
