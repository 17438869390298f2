"""Patch sampler: draws the next patch, where regression gives the mean of all that may come.

The paper's pixel head predicts one patch with the least squared error. Where an object may stand or
not, that is half an object: a grey block. This head *samples*. It is a rectified flow (Liu et al.,
2022), a straight path from noise e to a patch x, both f[C]:

    x_t = t x + (1 - t) e        t = 0: noise, t = 1: the patch        velocity  dx_t/dt = x - e

A small MLP sees x_t, t, the decoder's state, what the pixel head makes of it, and the pixels that
touch the patch. It predicts the clean patch; (predicted - x_t) / (1 - t) is then the velocity.
Sampling starts from noise and takes Euler steps along it. Another noise gives another patch.

x are the lowest frequencies of the patch (a 2-D DCT), scaled so that fine detail is the smaller:
noise hides it longer, and what stands in the patch is decided first. The states are **detached**:
the paper's objective does not feel this head.

Pipeline: decoder states -> **patches to look at**. Source: MAR's loss per token (arXiv 2406.11838).
Lesson: 12.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from nano_aimv2.layers import init_linear_layers

WIDTH, NUM_BLOCKS = 224, 3
MAX_COEFFICIENTS = 64
DECAY = 1.5  # in natural images the deviation falls about as 1 / (1 + frequency)^1.9
DRAWS = 2  # times and noises per patch and training step: their chance is most of the gradient's
TIME = -0.8, 1.4  # t = sigmoid(normal) in training: mean and deviation of the normal
MAX_WEIGHT = 20.0
MEDIAN = 0.6745  # of the absolute value of a normal number
STEPS, END = 20, 0.8  # of sampling: Euler steps, and the time at which they end
TEMPERATURE = 1.02  # of the noise: at 1 a head that has not learnt to the end draws too few objects
TIME_FEATURES = 32  # cosines and sines of t
HASH = tuple(n - (1 << 64) if n >> 63 else n for n in (  # splitmix64's constants as i64
    0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def lowest_frequencies(p):
    """The 2-D DCT of a patch of p x p pixels: (orthonormal basis f[C, P], C = min(64, P), lowest
    frequency first; the scale of each coefficient, p / (1 + frequency)^DECAY, f[C])."""
    k = torch.arange(p, dtype=torch.float64)
    waves = torch.cos(math.pi / p * (k + 0.5) * k[:, None]) * (2 / p) ** 0.5  # [frequency, pixel]
    waves[0] *= 0.5**0.5
    channels = torch.eye(3, dtype=torch.float64)
    basis = torch.einsum("ui,vj,cd->uvcijd", waves, waves, channels).reshape(p * p * 3, -1)
    frequency = (k[:, None] ** 2 + k**2).sqrt().flatten().repeat_interleave(3)
    order = frequency.argsort(stable=True)[:MAX_COEFFICIENTS]
    scale = p / (1 + frequency[order]) ** DECAY
    return basis[order].float(), scale.float()


def touching_pixels(patches, grid):
    """The pixels that a patch touches: the last column of its left neighbour and the last row of
    its upper one, and whether they are there.

    Args: patches: f[B, A, P], standardised; grid: i64[B, 2].
    Returns: f[B, A, 2 * 3p + 2], zeros where there is no neighbour.
    """
    B, A, P = patches.shape
    p = round((P / 3) ** 0.5)
    pixels = patches.view(B, A, p, p, 3)
    cols = grid[:, 1:]  # [B, 1]
    k = torch.arange(A, device=patches.device)[None]
    found = []
    for distance, is_there, edge in ((1, k % cols > 0, pixels[:, :, :, -1]),  # left
                                     (cols, k >= cols, pixels[:, :, -1])):  # above
        source = (k - distance).clamp(min=0)[..., None].expand(B, -1, 3 * p)
        found += [edge.flatten(2).gather(1, source) * is_there[..., None], is_there[..., None]]
    return torch.cat([part.to(patches.dtype) for part in found], dim=-1)


def hashed_noise(seed, rows, patches, size):
    """Standard normal noise that follows from (seed, row of the run, patch), made on the device.

    Args: seed: int; rows, patches: i64[K]. Returns: f32[K, size].
    """
    key = mix(mix(rows + mix(torch.full_like(rows, seed))) + patches)[:, None]
    u, v = to_uniform(mix(key + torch.arange(2 * size, device=rows.device))).chunk(2, dim=1)
    return (-2 * u.log()).sqrt() * torch.cos(2 * math.pi * v)  # Box-Muller


def mix(x):
    """A hash of i64 numbers (splitmix64)."""
    x = x + HASH[0]
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * HASH[1]
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * HASH[2]
    return x ^ (x >> 31 & (1 << 33) - 1)


def to_uniform(x):
    """i64 -> f32 in (0, 1)."""
    return ((x >> 40 & 0xFFFFFF).float() + 0.5) / (1 << 24)


def two_layers(size, out=WIDTH):
    return nn.Sequential(nn.Linear(size, WIDTH), nn.SiLU(), nn.Linear(WIDTH, out))


class FlowBlock(nn.Module):
    """h + gate * MLP(norm(h) * (1 + scale) + shift): forward(h f[K, W], modulation f[K, 3 W]).

    Scale, shift and gate follow from condition and time by one layer for all blocks, and a vector
    of each block's own. They start at zero.
    """

    def __init__(self):
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(3 * WIDTH))
        self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h, modulation):
        scale, shift, gate = (modulation + self.modulation).chunk(3, dim=-1)
        x = F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift
        return h + gate * self.fc2(F.silu(self.fc1(x)))


class PatchSampler(nn.Module):
    """The head: `loss` trains it, `sample` draws patches."""

    def __init__(self, config):
        super().__init__()
        basis, scale = lowest_frequencies(config.patch_size)
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.size = len(scale)  # C
        self.noise_sizes = DRAWS * self.size + 1, sum(basis.shape)  # of `loss` and of `sample`
        seen = config.decoder_dim + self.size + 2 * 3 * config.patch_size + 2  # Q: see `see`
        self.embed = nn.Linear(self.size, WIDTH)
        self.embed_seen = two_layers(seen)
        self.embed_time = nn.Linear(TIME_FEATURES, WIDTH)
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.layers = nn.ModuleList(FlowBlock() for _ in range(NUM_BLOCKS))
        self.final = nn.Linear(WIDTH, self.size)
        self.direct = two_layers(seen, self.size)  # what is certain, past all noise
        self.grain = nn.Parameter(torch.zeros(1))  # deviation of what the basis leaves out
        init_linear_layers(self)
        for layer in (self.modulation, self.final):  # at first each block is the identity
            nn.init.zeros_(layer.weight)

    def see(self, states, predicted, touching):
        """What is known before drawing, without gradient: f[K, Q].

        Args: states: f[K, Dd]; predicted: f[K, P], the pixel head's, whose meaning stays while that
            of the states moves during training; touching: f[K, 6p + 2].
        """
        parts = states, predicted.float() @ self.basis.T, touching
        return torch.cat([part.float() for part in parts], dim=-1).detach()

    def condition(self, seen):
        """seen f[K, Q] -> f[K, W + C], once for all steps."""
        return torch.cat([self.embed_seen(seen), self.direct(seen)], dim=-1)

    def clean(self, x, t, condition):
        """The patch that x_t came from: x f[K, C], t f[K, 1], condition f[K, W + C] -> f[K, C]."""
        # 16 frequencies from 1 to 10
        angle = t * torch.logspace(0, 1, TIME_FEATURES // 2, device=x.device)
        time = self.embed_time(torch.cat([angle.cos(), angle.sin()], dim=-1))
        seen, direct = condition.tensor_split([WIDTH], dim=-1)
        h, modulation = self.embed(x), self.modulation(F.silu(seen + time))
        for layer in self.layers:
            h = layer(h, modulation)
        return (self.final(F.layer_norm(h, h.shape[-1:])) + direct).float()

    def loss(self, patches, seen, noise):
        """Sum over patches of the mean squared error of the clean patch, weighed by 1 / (1 - t),
        and of the absolute error of the grain.

        Args: patches: f[K, P], standardised; seen: f[K, Q]; noise: f[K, DRAWS * C + 1], the last
            for t: the draws of a patch take opposite times.
        """
        z, patches = noise[:, -1:], patches.float()
        t = (TIME[0] + TIME[1] * torch.cat([z, -z])).sigmoid()  # [2K, 1]
        x = patches @ self.basis.T  # [K, C]
        rest, x = patches - x @ self.basis, (x / self.scale).repeat(DRAWS, 1)  # [K, P], [2K, C]
        x_t = t * x + (1 - t) * torch.cat(noise[:, :-1].chunk(DRAWS, dim=1))
        condition = self.condition(seen).repeat(DRAWS, 1)
        error = (self.clean(x_t, t, condition) - x).square().mean(dim=-1, keepdim=True)
        error = (error / (1 - t).clamp(min=1 / MAX_WEIGHT)).sum() / DRAWS
        return error + (rest.abs() - MEDIAN * self.grain).abs().mean(dim=-1).sum()

    def sample(self, seen, noise, steps=STEPS):
        """Patches f[K, P], standardised, from noise f[K, C + P] and seen f[K, Q].

        The steps lead to t = END. From there the clean patch is read off: the little noise that is
        left looks like detail, and following it further only adds the errors of late velocities.
        The last P numbers of the noise become the grain.
        """
        condition, (x, grain) = self.condition(seen), noise.tensor_split([self.size], dim=-1)
        x = TEMPERATURE * x
        times = torch.arange(steps + 1, device=noise.device)[:, None, None] * (END / steps)
        times = times.expand(-1, len(x), 1)  # [steps + 1, K, 1]
        for t in times[:-1]:
            x = x + (self.clean(x, t, condition) - x) / (1 - t) * (END / steps)
        x = self.clean(x, times[-1], condition) * self.scale
        return x @ self.basis + self.grain * grain
