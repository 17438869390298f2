"""Decoder: one causal transformer reads the features and predicts the next patch or token.

Each sample is one sequence in which image and text touch, so plain causal attention is right for
every mix of sizes:

    position       0      1    ..  n-1    n     n+1  ..          (n = 3 patches, caption "a cat")
    input         f_0    f_1      f_2    BOS    a     cat   pad
    predicts      x_1    x_2      -      a      cat   EOS   -

Only the text has (learned) positions: image features carry theirs from the encoder. Two linear
heads, no biases.

Pipeline: features, tokens -> **decoder states** -> losses. Source: paper section 2.1. Lesson: 05.
"""

import torch
from torch import nn

from nano_aimv2.layers import Trunk


class Decoder(nn.Module):
    """The multimodal decoder with the heads pixel_head and text_head."""

    def __init__(self, config):
        super().__init__()
        D = config.decoder_dim
        self.connector = nn.Linear(config.embed_dim, D)
        self.token_embed = nn.Embedding(config.vocab_size, D)
        self.bos = nn.Parameter(torch.empty(D))
        self.text_positions = nn.Parameter(torch.empty(config.max_tokens + 1, D))
        self.trunk = Trunk(D, config.decoder_blocks, config.decoder_heads,
                           config.decoder_mlp_hidden_dim, config.recompute)
        self.pixel_head = nn.Linear(D, config.patch_dim, bias=False)
        self.text_head = nn.Linear(D, config.vocab_size, bias=False)

    def embed_text(self, tokens, start=0):
        """Text inputs: tokens i64[B, T] -> f[B, 1+T, Dd] with BOS in front if `start` is 0, else
        f[B, T, Dd] at text positions start, start+1, .."""
        x = self.token_embed(tokens)
        if start == 0:
            x = torch.cat([self.bos.expand(len(x), 1, -1), x], dim=1)
        return x + self.text_positions[start : start + x.shape[1]]

    def forward(self, features, num_patches, tokens):
        """One pass over [n patches | BOS | tokens | padding] of every sample.

        Args:
            features: f[B, A, De] from the encoder, padding at the end.
            num_patches: i64[B], the valid patches n; None: every image fills its grid, n = A.
            tokens: i64[B, T], padded with any valid id.
        Returns: (image states f[B, A, Dd]: state j predicts patch j+1;
                  text states f[B, 1+T, Dd]: state 0 (BOS) predicts token 0).
                  Rows of padding hold meaningless numbers.
        """
        image, text = self.connector(features), self.embed_text(tokens)
        (B, A, _), L = image.shape, text.shape[1]
        x = torch.cat([image, text.to(image.dtype)], dim=1)  # [B, S, Dd]
        if num_patches is None:
            x = self.trunk(x, causal=True)
            return x[:, :A], x[:, A:]
        # Image and text touch: position s reads patch s while s < n, then text element s - n.
        s = torch.arange(A + L, device=tokens.device)[None]  # [1, S]
        n = num_patches[:, None]  # [B, 1]
        # i64[B, S], a permutation per sample
        source = torch.where(s < n, s, torch.where(s < n + L, s - n + A, s - L))
        rows = torch.arange(B, device=tokens.device)[:, None]
        x = self.trunk(x[rows, source], causal=True)
        return x[:, :A], x[rows, n + s[:, :L]]
