"""Losses: the cost of the predicted patches and tokens, each as a sum and a count.

The mean is taken once, after the sums and counts of all micro-batches and ranks have been added up:
a batch then gives the same gradient however it is split. (A mean of means does not: a caption of 3
tokens would weigh as much as one of 30.)

    total = text_sum / text_count + alpha * image_sum / image_count        (alpha = 0.4)

Pipeline: decoder states -> **(sum, count)** -> gradient. Source: paper section 2.1, Table 9c.
Lesson: 06.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

IGNORE = -100  # a text target that is padding


@dataclass
class Losses:
    """Sums over this micro-batch (0-d tensors with gradient) and the number of things summed."""

    image_sum: torch.Tensor  # over target patches, of the mean squared error within the patch
    image_count: torch.Tensor  # target patches
    text_sum: torch.Tensor  # over caption tokens and EOS, of the cross-entropy in nats
    text_count: torch.Tensor  # target tokens
    sampler_sum: torch.Tensor  # over target patches, of the patch sampler's error (trains it alone)

    def sums(self):
        """f[3] without gradient: text, image and sampler."""
        return torch.stack([self.text_sum, self.image_sum, self.sampler_sum]).detach()

    def total(self, alpha, image_count, text_count, text_weight=1.0):
        """The objective, divided by counts summed over the *global* batch.

        Raises: ValueError if there is nothing to predict (without patches alpha must be 0).
        """
        if not (text_count > 0 and (image_count > 0 or alpha == 0)):
            raise ValueError(f"{int(image_count)} target patches and {int(text_count)} target "
                             "tokens in the batch; both must be at least 1: draw prefixes below n, "
                             "and give every image a caption")
        image = (alpha * self.image_sum + self.sampler_sum) / max(image_count, 1)
        return text_weight * self.text_sum / text_count + image


def image_loss(predicted, target):
    """Squared error, mean within a patch, summed over patches: f[K, P] twice -> (sum, count K)."""
    error = F.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=-1)
    return error.sum(), torch.tensor(len(error))


def text_loss(logits, target):
    """Cross-entropy in float32: logits f[K, V], target i64[K] -> (sum in nats, count K)."""
    return F.cross_entropy(logits.float(), target, reduction="sum"), torch.tensor(len(target))


def text_targets(tokens, num_tokens):
    """tokens i64[B, T], num_tokens i64[B] (with EOS) -> i64[B, T], IGNORE on the padding."""
    t = torch.arange(tokens.shape[1], device=tokens.device)
    return tokens.masked_fill(t >= num_tokens[:, None], IGNORE)
