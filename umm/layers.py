"""The blocks that decoder, DiT and probes share.

B batch, N tokens, D width, H heads, h w token grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm.errors import ConfigError


def sincos_2d(dim: int, height: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions, (height * width, dim), float32.

    The first half of the channels encodes the column and the second half the row (MAE's order), each as
    [sin | cos] with frequencies 10000^(-k / (dim/4)), k = 0 .. dim/4 - 1.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, got {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")

    def encode(position: Tensor) -> Tensor:
        angle = position.reshape(-1, 1).double() * omega  # (N, D/4)
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    return torch.cat([encode(columns), encode(rows)], dim=1).float()  # (N, D)


def rope_2d(head_dim: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables of 2-D rotary positions, each (height * width, head_dim), float32.

    The first half of the channels turns with the row and the second with the column; frequencies
    10000^(-2k / (head_dim/2)), each repeated for two adjacent channels.
    """
    half = head_dim // 2
    frequency = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)  # (head_dim/4,)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [p.reshape(-1, 1).double() * frequency for p in (rows, columns)]
    angle = torch.cat([a.repeat_interleave(2, dim=1) for a in angles], dim=1)  # (N, head_dim)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent channel pairs of x (..., N, head_dim): (a, b) -> (a cos - b sin, b cos + a sin)."""
    pairs, cos, sin = at_least_float32(x).unflatten(-1, (-1, 2)), cos[..., ::2], sin[..., ::2]
    if torch.compiler.is_compiling():  # the compiler fuses this and knows no complex numbers
        a, b = pairs.unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:  # a kernel instead of nine
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision tensors become float32, others stay: where sums of bfloat16 would lose digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in at least float32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(at_least_float32(x), x.shape[-1:], at_least_float32(self.weight), self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with [a | b] = w12(x); hidden width int(2/3 * 4 * dim) unless given (Shazeer 2020)."""

    def __init__(self, dim: int, hidden: int | None = None):
        super().__init__()
        hidden = hidden or int(2 / 3 * int(4 * dim))
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D), with optional rotary positions and RMS-normed q and k."""

    def __init__(self, dim: int, heads: int, qk_norm: bool = False):
        super().__init__()
        if dim % heads:
            raise ConfigError(f"width {dim} cannot be split into {heads} heads: choose a divisor of it")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, D/H)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, D/H)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, N, D)


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))); `approximate` is the GELU's: "none" (ViT) or "tanh" (DiT)."""

    def __init__(self, dim: int, hidden: int, approximate: str = "none"):
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class ViTBlock(nn.Module):
    """Pre-norm transformer block, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float = 1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def tokens_of(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, N, C), row by row."""
    return latents.flatten(2).transpose(1, 2)


def grid_of(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, N, C) -> (B, C, h, w), the inverse of `tokens_of`."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def patchify(grid: Tensor, patch: int) -> Tensor:
    """(B, C, h, w) -> (B, N, p * p * C), row by row, each patch laid out (row, column, channel)."""
    x = grid.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, h/p, p, w/p, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, height: int, width: int, patch: int) -> Tensor:
    """(B, N, p * p * C) of a height x width token grid -> (B, C, height * p, width * p), undoes `patchify`."""
    x = patches.unflatten(2, (patch, patch, -1)).unflatten(1, (height, width))  # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
