"""Images to patches and back."""

import numpy as np
import pytest
import torch

from nano_aimv2.data.batches import to_patches
from nano_aimv2.patchify import (
    denormalize_patches,
    float_to_pixels,
    normalize_patches,
    patchify,
    pixels_to_float,
    unpatchify,
)


def test_a_patch_is_laid_out_row_column_channel_in_raster_order():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for k in range(6):
        row, col = divmod(k, 3)
        tile = images[1, :, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2]  # [3, 2, 2]
        assert torch.equal(patches[1, k], tile.permute(1, 2, 0).flatten()), f"patch {k}"


def test_unpatchify_undoes_patchify_on_a_grid_that_is_not_square():
    images = torch.randn(2, 3, 10, 15)
    assert torch.equal(unpatchify(patchify(images, 5), (2, 3), 5), images)


def test_the_loaders_numpy_patches_equal_patchify():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    expected = patchify(torch.from_numpy(pixels).permute(2, 0, 1)[None], 4)[0]
    assert np.array_equal(to_patches(pixels, 4), expected.numpy())


def test_normalized_patches_have_zero_mean_and_unit_unbiased_variance_and_come_back():
    patches = torch.randn(3, 5, 48) * 7 + 2
    normalized, mean, std = normalize_patches(patches)
    assert normalized.mean(-1).abs().max() < 1e-6
    assert (normalized.var(-1, correction=1) - 1).abs().max() < 1e-5
    assert torch.allclose(denormalize_patches(normalized, mean, std), patches, atol=1e-5)


def test_predicting_zeros_scores_p_minus_one_over_p():
    P = 588
    error = normalize_patches(torch.randn(4, 9, P))[0].square().mean()
    assert abs(float(error) - (P - 1) / P) < 1e-5


def test_a_flat_patch_becomes_zeros():
    normalized, mean, std = normalize_patches(torch.full((1, 1, 12), 0.3))
    assert normalized.abs().max() < 1e-3 and float(std) == pytest.approx(1e-3)


def test_pixels_survive_the_float_scale():
    patches = torch.arange(256).repeat_interleave(3)[None].to(torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    floats = pixels_to_float(patches, mean, std)
    assert float(floats[0, 3 * 100 + 1]) == pytest.approx((100 / 255 - 0.456) / 0.224, abs=1e-5)
    assert torch.equal(float_to_pixels(floats, mean, std), patches)


@pytest.mark.parametrize("shape, message", [
    ((1, 3, 5, 4), "5 x 4 pixels.*multiples of the patch size 2"),
    ((3, 4, 4), r"\[B, 3, H, W\]"),
])
def test_images_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        patchify(torch.zeros(shape), 2)


def test_patches_that_do_not_fit_the_grid_are_refused():
    with pytest.raises(ValueError, match="2 x 3 grid"):
        unpatchify(torch.zeros(1, 5, 12), (2, 3), 2)
