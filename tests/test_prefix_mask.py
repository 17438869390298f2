"""Who may attend to whom, and that no prediction sees its target."""

import pytest
import torch
from helpers import random_batch, tiny_config

from nano_aimv2.losses import Losses
from nano_aimv2.model import AIMv2
from nano_aimv2.prefix_mask import (
    is_image_target,
    prefix_mask,
    sample_prefix_len,
    step_prefix_len,
)


def test_the_mask_is_k_at_most_q_or_k_below_m():
    mask = prefix_mask(torch.tensor([1, 3, 5]), 5)
    assert mask.shape == (3, 1, 5, 5) and mask.dtype == torch.bool
    for b, m in enumerate((1, 3, 5)):
        for q in range(5):
            for k in range(5):
                assert bool(mask[b, 0, q, k]) == (k <= q or k < m), (m, q, k)


def test_prefix_lengths_are_uniform_on_1_to_n_minus_1():
    n = torch.full((60_000,), 7)
    counts = torch.bincount(sample_prefix_len(n, torch.Generator().manual_seed(0)), minlength=8)
    assert counts[0] == 0 and counts[7] == 0
    assert (counts[1:7] - 10_000).abs().max() < 500, counts  # 5 standard deviations


def test_every_image_draws_its_own_prefix_within_its_own_size():
    num_patches = torch.tensor([2, 50, 50, 50, 50, 50])
    lengths = sample_prefix_len(num_patches, torch.Generator().manual_seed(0))
    assert lengths[0] == 1 and len(set(lengths[1:].tolist())) > 1


def test_prefixes_are_a_function_of_seed_and_step_however_the_batch_is_cut():
    n = torch.full((10,), 30)
    whole = step_prefix_len(n, 3, 8, slice(0, 10), 10)
    parts = torch.cat([step_prefix_len(n[:4], 3, 8, slice(0, 4), 10),
                       step_prefix_len(n[4:], 3, 8, slice(4, 10), 10)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, step_prefix_len(n, 3, 9, slice(0, 10), 10))
    assert not torch.equal(whole, step_prefix_len(n, 4, 8, slice(0, 10), 10))


def test_causal_and_full_prefixes_are_one_and_all():
    n = torch.tensor([5, 9, 2])
    assert step_prefix_len(n, 1, 2, slice(0, 3), 3, "causal").tolist() == [1, 1, 1]
    assert step_prefix_len(n, 1, 2, slice(0, 3), 3, "full").tolist() == [5, 9, 2]


def test_an_image_of_one_patch_is_refused():
    with pytest.raises(ValueError, match="1 patch; a prefix and a target need 2"):
        sample_prefix_len(torch.tensor([4, 1]), torch.Generator())


def test_targets_are_the_valid_patches_from_m_on():
    targets = is_image_target(torch.tensor([1, 3]), torch.tensor([4, 5]), 6)
    assert targets.int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0]]


def prediction_gradients(model, batch, prefix_len):
    """|gradient| of the prediction of patch j+1 with respect to patch k, of the first image:
    f[A, A]."""
    patches = model.encoder.standardize(batch.patches).requires_grad_()
    features = model.encoder(patches, batch.grid, prefix_len)
    states, _ = model.decoder(features, batch.grid.prod(dim=1), batch.tokens[:, :-1])
    predicted = model.decoder.pixel_head(states)
    rows = []
    for j in range(patches.shape[1]):
        (gradient,) = torch.autograd.grad(predicted[0, j].sum(), patches, retain_graph=True)
        rows.append(gradient[0].abs().sum(-1))
    return torch.stack(rows)


def test_no_prediction_sees_its_target_and_the_prefix_sees_itself():
    model = AIMv2(tiny_config())
    batch, M = random_batch(model.config), 9
    gradient = prediction_gradients(model, batch, torch.tensor([M, 4, 20]))
    n = len(gradient)
    for j in range(M - 1, n - 1):  # state j predicts target j+1 >= M
        assert gradient[j, j + 1 :].max() == 0, f"prediction {j + 1} sees a patch after {j}"
        assert gradient[j, : j + 1].min() > 0, f"prediction {j + 1} misses a patch before it"
    assert gradient[0, :M].min() > 0, "inside the prefix attention is bidirectional"
    assert gradient[0, M:].max() == 0


def test_a_bidirectional_encoder_would_leak_every_target():
    model = AIMv2(tiny_config())
    gradient = prediction_gradients(model, random_batch(model.config), None)
    assert gradient[9, 10] > 0


def test_the_losses_do_not_count_what_the_prefix_has_seen():
    model = AIMv2(tiny_config())
    batch, M = random_batch(model.config), torch.tensor([9, 4, 24])
    losses = model(batch, M)
    assert isinstance(losses, Losses) and int(losses.image_count) == (25 - 9) + (25 - 4) + 1
