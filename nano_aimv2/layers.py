"""Layers: the transformer block that encoder and decoder share.

Pre-norm: `x += Attention(RMSNorm(x)); x += SwiGLU(RMSNorm(x))`, no biases, no dropout. A trunk is a
stack of blocks and a final RMSNorm. Only the mask makes a trunk an encoder or a decoder.

For generation, attention can keep the keys and values of the past in a `KVCache`: a new element
then costs one row of attention instead of a whole forward pass. That is exact wherever earlier
elements do not attend to later ones (lesson 11).

Source: paper section 3 (SwiGLU, RMSNorm); names as in Apple's released weights. Lessons: 03, 04.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

NORM_EPS = 1e-5
# Up to so many keys, a CPU trains faster without the fused attention kernel.
WRITTEN_OUT = {torch.float32: 160, torch.bfloat16: 512}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), NORM_EPS)


class KVCache:
    """Room for the keys and values of one attention layer, f[B, heads, capacity, head dim]."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.length = 0
        self.k = self.v = None

    def append(self, k, v):
        """Store k, v f[B, heads, new, head dim] behind the past; return all of it, past and new."""
        if self.k is None:
            self.k, self.v = (t.new_empty(*t.shape[:2], self.capacity, t.shape[3]) for t in (k, v))
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


def attend(q, k, v, bias, causal):
    """softmax(q k^T / sqrt(head dim) + bias) v.

    Args: q: f[B, heads, N, hd]; k, v: f[B, heads, K, hd]; bias: f[B, 1, N, K] or None.
    Returns: f[B, heads, N, hd].

    On a CPU, short sequences train fastest with the formula written out: in bfloat16 its matmuls
    are in bfloat16, the softmax in float32. The fused kernel's bfloat16 is slow there, so longer
    sequences take its float32.
    """
    if q.device.type == "cpu":
        if k.shape[2] <= WRITTEN_OUT.get(q.dtype, 0) and torch.is_grad_enabled():
            return attend_written_out(q, k, v, bias, causal)
        if q.dtype == torch.bfloat16:
            bias = None if bias is None else bias.float()
            with torch.autocast("cpu", enabled=False):
                return attend(q.float(), k.float(), v.float(), bias, causal).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)


def attend_written_out(q, k, v, bias, causal):
    """The formula of `attend` as it stands there."""
    if causal:
        bias = mask_to_bias(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril())
    scores, scale = (q @ k.transpose(-2, -1)).float(), q.shape[-1] ** -0.5
    scores = scores * scale if bias is None else torch.add(bias, scores, alpha=scale)
    return scores.softmax(dim=-1).to(v.dtype) @ v


def mask_to_bias(can_attend, dtype=torch.float32):
    """bool -> `dtype`: 0 where True, -inf where False."""
    bias = torch.zeros(can_attend.shape, dtype=dtype, device=can_attend.device)
    return bias.masked_fill_(~can_attend, float("-inf"))


class Attention(nn.Module):
    """Multi-head self-attention without biases, scale 1/sqrt(head dim)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x, bias=None, causal=False, cache=None):
        """x f[B, N, D], bias f[B, 1, N, K] or None -> f[B, N, D]."""
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))  # each [B, heads, N, hd]
        if cache is not None:
            k, v = cache.append(k, v)
        x = attend(q, k, v, bias, causal)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


def init_linear_layers(model):
    """Xavier-uniform weights (q, k and v as separate matrices), zero biases."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            for part in module.weight.data.chunk(3 if name.endswith("qkv") else 1):
                nn.init.xavier_uniform_(part)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class SwiGLU(nn.Module):
    """Gated MLP: fc2(silu(fc1 x) * fc3 x), without biases."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=False)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=False)
        self.fc3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x):
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class Block(nn.Module):
    """One pre-norm transformer block: forward(x f[B, N, D], ...) -> f[B, N, D]."""

    def __init__(self, dim, num_heads, hidden_dim):
        super().__init__()
        self.norm_1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm_2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, hidden_dim)

    def forward(self, x, bias=None, causal=False, cache=None):
        x = x + self.attn(self.norm_1(x), bias, causal, cache)
        return x + self.mlp(self.norm_2(x))


class Trunk(nn.Module):
    """A stack of blocks under one mask, then the final norm: f[B, N, D] -> f[B, N, D].

    Under autocast x, to which every block adds, is float32, and the bias is made once in the
    precision of the matmuls: else each block would cast it and keep its own copy.

    recompute: keep only the input of each block for the backward pass and run the block again there
    (activation checkpointing): a third more arithmetic, a tenth of the memory.
    """

    def __init__(self, dim, num_blocks, num_heads, hidden_dim, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.blocks = nn.ModuleList(Block(dim, num_heads, hidden_dim) for _ in range(num_blocks))
        self.post_trunk_norm = RMSNorm(dim)

    def forward(self, x, can_attend=None, causal=False, caches=None):
        matmul_dtype, kind = x.dtype, x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            x, matmul_dtype = x.float(), torch.get_autocast_dtype(kind)
        bias = None if can_attend is None else mask_to_bias(can_attend, matmul_dtype)
        for i, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled() and not caches:
                x = checkpoint(block, x, bias, causal, use_reentrant=False,
                               preserve_rng_state=False)  # a block draws no random numbers
            else:
                x = block(x, bias, causal, caches[i] if caches else None)
        return self.post_trunk_norm(x)
