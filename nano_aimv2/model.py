"""AIMv2: an encoder under a prefix mask, one causal decoder over image and text, two losses.

The whole forward pass is one method. One addition to the paper is ours: a *patch sampler*, a small
head that draws the next patch, since the paper's pixel head predicts the mean of all that may come,
normalised. The sampler reads **detached** states: the paper's objective does not feel it.

Source: paper sections 2.1 and 2.2; initialisation as in Apple's training code, but for the
connector (README, "Differences"). Lesson: 06.
"""

import torch
from torch import nn

from nano_aimv2.decoder import Decoder
from nano_aimv2.encoder import Encoder
from nano_aimv2.layers import init_linear_layers
from nano_aimv2.losses import IGNORE, Losses, image_loss, text_loss, text_targets
from nano_aimv2.patch_sampler import PatchSampler, hashed_noise, touching_pixels
from nano_aimv2.patchify import normalize_patches
from nano_aimv2.prefix_mask import is_image_target


class AIMv2(nn.Module):
    """`AIMv2(config)`; `.encoder` is what you keep, `.decoder` is what trains it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.init_weights()
        self.sampler = PatchSampler(config)  # the last: the weights above do not depend on it
        self.encoder.requires_grad_(config.encoder_lr > 0)

    def init_weights(self):
        """Xavier-uniform for the linear layers, small normals for tables and heads."""
        init_linear_layers(self)
        decoder = self.decoder
        nn.init.normal_(decoder.text_positions, std=0.01)
        nn.init.normal_(decoder.token_embed.weight, std=0.02)
        nn.init.normal_(decoder.bos, std=0.02)
        head_std = ((1 + self.config.decoder_blocks) * self.config.decoder_dim) ** -0.5
        for head in (decoder.pixel_head, decoder.text_head):
            nn.init.trunc_normal_(head.weight, std=head_std)

    def forward(self, batch, prefix_len, num_targets=(None, None)):
        """One training pass.

        Args:
            batch: patches u8[B, A, P], grid i64[B, 2], tokens i64[B, T] (EOS included), num_tokens
                i64[B], is_full (whether every image fills its grid).
            prefix_len: i64[B], M in 1 .. n-1.
            num_targets: how many patches and how many tokens are targets; if given, a GPU does not
                have to stop and count them.
        Returns: Losses, sums and counts of this batch.
        """
        decoder = self.decoder
        patches = self.encoder.standardize(batch.patches)  # f[B, A, P]
        num_patches = batch.grid.prod(dim=1)  # n, i64[B]
        features = self.encoder(patches, batch.grid, prefix_len)  # f[B, A, De]
        tokens = batch.tokens[:, : self.config.max_tokens]  # i64[B, T]; batches round T up
        image_states, text_states = decoder(  # f[B, A, Dd], f[B, T, Dd]
            features, None if batch.is_full else num_patches, tokens[:, :-1])

        # State j predicts patch j+1; patch 0 is never a target. Only rows with a target reach the
        # heads.
        is_target = is_image_target(prefix_len, num_patches, patches.shape[1])  # bool[B, A]
        rows = true_rows(is_target, num_targets[0])  # i64[K], into B*A
        states = image_states.flatten(0, 1)[rows - 1]  # f[K, Dd]
        target = patches.flatten(0, 1)[rows]  # f[K, P]
        touching = touching_pixels(patches, batch.grid).flatten(0, 1)[rows]  # f[K, 6p + 2]
        place = batch.first_row + rows // patches.shape[1], rows % patches.shape[1]
        noise = hashed_noise(self.config.seed, *place, self.sampler.noise_sizes[0])
        predicted = decoder.pixel_head(states)  # f[K, P]
        seen = self.sampler.see(states, predicted, touching)
        sampler_sum = self.sampler.loss(target, seen, noise)
        target = target if self.config.raw_pixels else normalize_patches(target)[0]
        image_sum, image_count = image_loss(predicted, target)

        # Text state t predicts token t: BOS predicts the first, the last token EOS.
        target = text_targets(tokens, batch.num_tokens)  # i64[B, T]
        rows = true_rows(target != IGNORE, num_targets[1])  # i64[K], into B*T
        logits = decoder.text_head(text_states.flatten(0, 1)[rows])  # f[K, V]
        text_sum, text_count = text_loss(logits, target.flatten()[rows])
        return Losses(image_sum, image_count, text_sum, text_count, sampler_sum)


def true_rows(mask, count=None):
    """Where a mask bool[B, L] is True, as i64[K] into its B*L places; K is counted unless given.

    Raises: ValueError if `count` is not K; on a GPU, which does not wait, CUDA's assertion error.
    """
    mask = mask.flatten()
    if count is None:
        count = int(mask.sum())
    elif mask.is_cuda:
        torch._assert_async(mask.sum() == count)
    elif not mask.is_meta and int(mask.sum()) != count:
        raise ValueError(f"{count} targets given; the masks have {int(mask.sum())}")
    return mask.nonzero_static(size=count).flatten()
