"""The patch sampler: what it sees, its noise, what it learns to draw, and how that is measured."""

import math

import pytest
import torch
from helpers import as_run, liven_sampler, random_batch, run_script, tiny_config
from safetensors.torch import load_file, save_file

from nano_aimv2.generate import complete, teacher_forced
from nano_aimv2.lab.drawn import continued, frechet_distance, pixel_numbers
from nano_aimv2.model import AIMv2
from nano_aimv2.patch_sampler import (
    PatchSampler,
    hashed_noise,
    lowest_frequencies,
    touching_pixels,
)
from nano_aimv2.patchify import patchify
from nano_aimv2.training.checkpoint import load_model
from nano_aimv2.training.optim import SAMPLER_LR, make_optimizer

slow = pytest.mark.slow


@pytest.mark.parametrize("p, size", [(4, 48), (5, 64), (12, 64)])
def test_the_coefficients_are_the_lowest_frequencies_of_an_orthonormal_basis(p, size):
    basis, scale = lowest_frequencies(p)
    assert basis.shape == (size, p * p * 3)
    assert torch.allclose(basis @ basis.T, torch.eye(size), atol=1e-5)
    assert bool((scale.diff() <= 0).all()) and scale[0] == p
    flat = torch.tensor([0.5, -1.0, 2.0]).repeat(p * p)  # one colour: the first three alone
    found = basis @ flat
    assert torch.allclose(found[:3] / p, flat[:3], atol=1e-5) and found[3:].abs().max() < 1e-4


def test_touching_pixels_are_those_of_the_image_on_any_grid():
    torch.manual_seed(0)
    images = [torch.randn(1, 3, 12, 20), torch.randn(1, 3, 16, 12)]  # 3 x 5 and 4 x 3 patches
    patches = torch.zeros(2, 15, 48)
    for row, image in zip(patches, images, strict=True):
        n = image.shape[2] * image.shape[3] // 16
        row[:n] = patchify(image, 4)[0]
    found = touching_pixels(patches, torch.tensor([[3, 5], [4, 3]]))
    for b, (image, cols) in enumerate(zip(images, (5, 3), strict=True)):
        for k in range(image.shape[2] * image.shape[3] // 16):
            y, x = 4 * (k // cols), 4 * (k % cols)
            left, is_left, above, is_above = found[b, k].split([12, 1, 12, 1])
            assert bool(is_left) == (x > 0) and bool(is_above) == (y > 0)
            expected = image[0, :, y : y + 4, x - 1].T.flatten() if x else torch.zeros(12)
            assert torch.equal(left, expected)
            expected = image[0, :, y - 1, x : x + 4].T.flatten() if y else torch.zeros(12)
            assert torch.equal(above, expected)


def test_noise_is_standard_normal_and_follows_from_seed_row_and_patch():
    rows, patches = torch.arange(2000), torch.arange(2000) % 7
    noise = hashed_noise(3, rows, patches, 65)
    assert abs(float(noise.mean())) < 0.01 and abs(float(noise.std()) - 1) < 0.01
    assert abs(float((noise**4).mean()) - 3) < 0.1  # no lighter tails than a normal has
    assert float(torch.corrcoef(noise.T).fill_diagonal_(0).abs().max()) < 0.12
    assert torch.equal(hashed_noise(3, rows[5:9], patches[5:9], 65), noise[5:9])
    for other in (hashed_noise(4, rows, patches, 65), hashed_noise(3, rows + 1, patches, 65),
                  hashed_noise(3, rows, patches + 1, 65)):
        assert abs(float((noise * other).mean())) < 0.02


def test_the_loss_of_a_row_does_not_depend_on_its_micro_batch():
    model = AIMv2(tiny_config())
    liven_sampler(model)
    batch, M = random_batch(model.config), torch.tensor([3, 8, 2])
    model.requires_grad_(False)
    whole = model(batch, M).sampler_sum
    parts = 0
    for b in range(3):
        one = batch.map(lambda tensor, b=b: tensor[b : b + 1])
        one.first_row = b
        parts += model(one, M[b : b + 1]).sampler_sum
    assert float(whole) == pytest.approx(float(parts), rel=1e-4)
    batch.first_row = 3  # the next step: other noise
    assert float(model(batch, M).sampler_sum) != pytest.approx(float(whole), rel=1e-4)


def test_a_sampler_that_knows_the_patch_draws_it_in_any_number_of_steps():
    sampler = PatchSampler(tiny_config())
    with torch.no_grad():
        sampler.final.bias.copy_(torch.linspace(-1, 1, 48))
    seen = torch.zeros(5, 32 + 48 + 26)
    expected = (torch.linspace(-1, 1, 48) * sampler.scale) @ sampler.basis
    for steps in (1, 3, 20):
        drawn = sampler.sample(seen, torch.randn(5, 96), steps)
        assert torch.allclose(drawn, expected.expand(5, -1), atol=1e-4), steps


def test_where_two_patches_may_come_it_draws_either_and_never_their_mean():
    torch.manual_seed(0)
    sampler = PatchSampler(tiny_config())
    seen = torch.ones(256, 32 + 48 + 26)
    optimizer = torch.optim.Adam(sampler.parameters(), lr=2e-3)
    for _ in range(300):
        patches = torch.where(torch.rand(256, 1) < 0.5, 1.5, -1.5).expand(-1, 48)
        loss = sampler.loss(patches, seen, torch.randn(256, 97)) / 256
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        brightness = sampler.sample(seen, torch.randn(256, 96)).mean(dim=1)
    assert 0.25 < float((brightness > 0).float().mean()) < 0.75
    near = ((brightness.abs() - 1.5).abs() < 0.4).float().mean()
    assert float(near) > 0.9, brightness.abs().sort().values[::32]


def test_what_the_basis_leaves_out_becomes_grain_of_the_right_strength():
    torch.manual_seed(0)
    sampler = PatchSampler(tiny_config(image_size=32, patch_size=8))  # 64 of 192 numbers
    seen = torch.zeros(64, 32 + 64 + 50)
    optimizer = torch.optim.Adam([sampler.grain], lr=3e-3)
    for _ in range(300):
        patches = 0.3 * torch.randn(64, 192)
        (sampler.loss(patches, seen, torch.randn(64, 129)) / 64).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        drawn = sampler.sample(seen, torch.randn(64, 64 + 192))
    grain, rest = float(sampler.grain.detach()), drawn - drawn @ sampler.basis.T @ sampler.basis
    left_out = (128 / 192) ** 0.5  # share of the deviation
    assert grain == pytest.approx(0.3 * left_out, rel=0.1)
    assert float(rest.std()) == pytest.approx(grain * left_out, rel=0.05)


def test_another_seed_draws_another_image_and_the_same_seed_the_same():
    torch.manual_seed(0)
    model = AIMv2(tiny_config()).eval()
    liven_sampler(model)
    batch = random_batch(model.config, size=2, num_tokens=(5, 5))
    one, again, other = (complete(model, batch.patches, batch.grid, 5, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one[:, 5:], other[:, 5:])
    alone = complete(model, batch.patches[:1], batch.grid[:1], 5, 1)
    assert (alone[0].int() - one[0].int()).abs().max() <= 1
    assert not torch.equal(teacher_forced(model, batch.patches, batch.grid, 5, 1),
                           teacher_forced(model, batch.patches, batch.grid, 5, 2))
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        complete(model, batch.patches, batch.grid, 5, steps=0)


def test_the_sampler_has_a_peak_rate_of_its_own():
    optimizer = make_optimizer(AIMv2(tiny_config()), 1e-3, 1e-4, (0.9, 0.95))
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert scales == {1.0, SAMPLER_LR / 1e-3}


def test_weights_of_the_statistics_head_are_called_that(tmp_path):
    as_run(tmp_path / "old")
    path = tmp_path / "old/model.safetensors"
    weights = {k: v for k, v in load_file(path).items() if not k.startswith("sampler.")}
    save_file(weights | {"decoder.stats_head.0.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match="before the patch sampler replaced the statistics head"):
        load_model(tmp_path / "old")


# Measuring


def test_the_frechet_distance_is_that_of_two_gaussians():
    torch.manual_seed(0)
    a, b = torch.randn(40_000, 3), 2 * torch.randn(40_000, 3) + torch.tensor([1.0, 0.0, 2.0])
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(5 + 3 * (1 + 4 - 2 * 2), rel=0.03)
    mixed = torch.tensor([[2.0, 1.0], [0.0, 0.5]])
    c, d = torch.randn(40_000, 2) @ mixed, torch.randn(40_000, 2)
    covariance = mixed.T @ mixed
    root = torch.linalg.eigvals(covariance.double()).real.sqrt().sum()  # against the identity
    expected = float(covariance.trace() + 2 - 2 * root)
    assert frechet_distance(c, d) == pytest.approx(expected, rel=0.05)


def test_seams_are_the_steps_between_patches_over_those_within():
    ramp = torch.arange(16.0).expand(1, 3, 16, 16).contiguous()  # one unit per pixel to the right
    energy, seams = pixel_numbers(patchify(ramp, 4).to(torch.uint8), (4, 4), 4)
    assert energy == pytest.approx(0.5) and math.isclose(seams, 1, rel_tol=0.5)
    flat = torch.zeros(1, 3, 16, 16)
    flat[..., 8:] = 100  # one step, at a seam
    energy, seams = pixel_numbers(patchify(flat, 4).to(torch.uint8) + 0, (4, 4), 4)
    assert energy > 0 and (seams == float("inf") or seams > 1e6)


def test_an_object_counts_as_continued_where_half_of_its_columns_go_on():
    real = torch.full((4, 3, 12, 16), 100, dtype=torch.uint8)
    real[:3, 0, 2:10, 4:10] = 250  # six columns of red across a border at row 6, in three images
    drawn = real.clone()
    drawn[1, 0, 6:, 4:6] = 100  # four of six go on
    drawn[2, 0, 6:, 4:8] = 100  # two of six
    assert continued(real, real, 6, 2) == 1
    assert continued(drawn, real, 6, 2) == pytest.approx(2 / 3)
    assert continued(drawn[2:], real[2:], 6, 2) == 0  # the last image has no object
    assert math.isnan(continued(real[3:], real[3:], 6, 2))


@slow
def test_drawn_writes_numbers_and_a_picture(trained, tmp_path):
    run = trained[0]
    other = tmp_path / "other"
    as_run(other)
    done = run_script("-m", "nano_aimv2.lab.drawn", f"--run_dir={run}", f"--judge={other}",
                      "--images=50", "--seeds=2", f"--out={tmp_path}/out")
    assert "frechet_lower_half" in done.stdout and "seams" in done.stdout
    assert (tmp_path / "out/drawn.png").stat().st_size > 10_000
    done = run_script("-m", "nano_aimv2.lab.drawn", f"--run_dir={run}", f"--judge={run}",
                      check=False)
    assert done.returncode == 1 and "must be another run" in done.stderr
    assert "Traceback" not in done.stderr
