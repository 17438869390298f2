"""Patchify: an image becomes a sequence of flat patches, and back.

A ViT reads an image as a sequence of square tiles in raster order (left to right, top to bottom). A
tile of `p x p` RGB pixels is one vector of `P = p*p*3` values laid out (row, column, channel). The
same vectors are the decoder's targets, after each has lost its own mean and standard deviation: a
patch in shadow then counts as much as one in the sun, and predicting flat grey earns nothing.

Pipeline: image -> **patches** -> encoder -> decoder -> patch predictions. Source: paper section
2.1; normalised targets as in MAE (arXiv 2111.06377). Lesson: 01.
"""

import torch

PATCH_EPS = 1e-6  # added to a patch's variance: a flat patch becomes zeros, not 0/0


def patchify(images, patch_size):
    """Cut images into flat patches in raster order.

    Args:
        images: [B, 3, H, W], any dtype; H and W multiples of `patch_size`.
        patch_size: side p of a patch, in pixels.
    Returns: [B, N, P] with N = (H/p)*(W/p) and P = p*p*3 laid out (row, column, channel).
    Raises: ValueError if the images are not [B, 3, H, W] or a side is not a multiple of p.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; patchify needs [B, 3, H, W]")
    B, C, H, W = images.shape
    p = patch_size
    if H % p or W % p:
        raise ValueError(f"image is {H} x {W} pixels; both sides must be multiples of the patch "
                         f"size {p}: resize first")
    x = images.reshape(B, C, H // p, p, W // p, p)  # [B, C, rows, p, cols, p]
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(patches, grid, patch_size):
    """Put patches back into images: the inverse of `patchify`.

    Args:
        patches: [B, N, P].
        grid: (rows, cols) with rows*cols = N.
        patch_size: side p in pixels.
    Returns: [B, 3, rows*p, cols*p].
    Raises: ValueError if N or P does not fit the grid and the patch size.
    """
    B, N, P = patches.shape
    rows, cols = grid
    p = patch_size
    if rows * cols != N or p * p * 3 != P:
        raise ValueError(f"patches have shape {tuple(patches.shape)}; a {rows} x {cols} grid of "
                         f"{p}-pixel patches needs [B, {rows * cols}, {p * p * 3}]")
    x = patches.reshape(B, rows, cols, p, p, 3)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, 3, rows * p, cols * p)


def normalize_patches(patches):
    """Remove each patch's own mean and standard deviation, over all P values together.

    Args: patches: float[..., P].
    Returns: normalized float[..., P]; mean and std = sqrt(unbiased variance + 1e-6) float[..., 1].

    A flat patch becomes zeros. Predicting zeros costs (P-1)/P, the mean square of other patches.
    """
    mean = patches.mean(dim=-1, keepdim=True)
    centered = patches - mean
    var = centered.square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)
    std = (var + PATCH_EPS).sqrt()
    return centered / std, mean, std


def denormalize_patches(normalized, mean, std):
    """The inverse of `normalize_patches`: f[..., P], mean and std f[..., 1] -> f[..., P]."""
    return normalized * std + mean


def pixels_to_float(patches, pixel_mean, pixel_std):
    """Standardise raw patches: u8[..., P] -> f32[..., P], (x / 255 - mean) / std per channel."""
    mean, std = per_value(patches, pixel_mean, pixel_std)
    return patches.float().mul_(1 / (255 * std)).sub_(mean / std)


def float_to_pixels(patches, pixel_mean, pixel_std):
    """The inverse of `pixels_to_float`, rounded and clamped: float[..., P] -> u8[..., P]."""
    mean, std = per_value(patches, pixel_mean, pixel_std)
    return ((patches.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def per_value(patches, *channels):
    """Three numbers each (one per channel) -> f32[P] each: a patch repeats its channels."""
    repeats = patches.shape[-1] // 3
    return (torch.as_tensor(c, device=patches.device).repeat(repeats) for c in channels)
