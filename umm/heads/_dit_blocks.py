"""Parts of the diffusion transformer. B batch, N tokens, D width.

The residual stream keeps the dtype of the latents: under autocast the matrix products run in half precision, while
norms, modulation, gates, residual sums and the time embedding stay in float32.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from umm.layers import Attention, Mlp, RMSNorm, SwiGLU
from umm.settings import DiTSettings

FREQUENCIES = 256  # of the Gaussian Fourier features; half as many in DiT's sinusoids


def norm_layer(width: int, config: DiTSettings) -> nn.Module:
    return RMSNorm(width) if config.norm == "rms" else nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def mlp_layer(width: int, config: DiTSettings) -> nn.Module:
    hidden = int(width * config.mlp_ratio)
    return SwiGLU(width, int(2 / 3 * hidden)) if config.mlp == "swiglu" else Mlp(width, hidden, approximate="tanh")


class TimeEmbedding(nn.Module):
    """Times (B,) in [0, 1] -> (B, D), always in float32."""

    def __init__(self, width: int, kind: str):
        super().__init__()
        if kind == "fourier":  # a fixed random draw: it cannot be rebuilt, so it is saved with the weights
            self.register_buffer("frequencies", torch.randn(FREQUENCIES))
        else:
            exponent = torch.arange(FREQUENCIES // 2, dtype=torch.float64) / (FREQUENCIES // 2)
            self.register_buffer("frequencies", (10000.0**-exponent).float(), persistent=False)
        self.scale = 2 * math.pi if kind == "fourier" else 1000.0
        self.sine_first = kind == "fourier"
        self.mlp = nn.Sequential(nn.Linear(2 * len(self.frequencies), width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        with torch.autocast(t.device.type, enabled=False):
            angle = self.scale * t[:, None].float() * self.frequencies.float()  # (B, F)
            waves = (angle.sin(), angle.cos()) if self.sine_first else (angle.cos(), angle.sin())
            return self.mlp(torch.cat(waves, dim=1).to(self.mlp[0].weight.dtype))


class Modulation(nn.Sequential):
    """adaLN-Zero: condition (B, 1 or N, D) -> `parts` tensors (B, 1 or N, D) in `dtype`, all zero at first."""

    def __init__(self, width: int, parts: int):
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))
        self.parts = parts
        nn.init.zeros_(self[1].weight)
        nn.init.zeros_(self[1].bias)

    def forward(self, condition: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return super().forward(condition).to(dtype).chunk(self.parts, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, fused."""
    return torch.addcmul(shift, x, 1 + scale)


class DiTBlock(nn.Module):
    """Pre-norm attention and MLP, (B, N, D) -> (B, N, D).

    With adaLN (DiT, arXiv 2212.09748, section 3.2) a condition (B, 1, D) or, token by token, (B, N, D) shifts, scales
    and gates both; without it the condition is not read.
    """

    def __init__(self, width: int, heads: int, config: DiTSettings, adaln: bool = True):
        super().__init__()
        self.norm1 = norm_layer(width, config)
        self.attn = Attention(width, heads, config.qk_norm)
        self.norm2 = norm_layer(width, config)
        self.mlp = mlp_layer(width, config)
        self.modulation = Modulation(width, 6) if adaln else None

    def forward(self, x: Tensor, condition: Tensor | None, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        if self.modulation is None:
            x = x + self.attn(self.norm1(x), rope)
            return x + self.mlp(self.norm2(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition, x.dtype)
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1), rope))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """Modulated norm and a linear map, (B, N, D) -> (B, N, out); zero at first."""

    def __init__(self, width: int, out: int, config: DiTSettings):
        super().__init__()
        self.norm = norm_layer(width, config)
        self.modulation = Modulation(width, 2)
        self.linear = nn.Linear(width, out)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.linear(modulate(self.norm(x), *self.modulation(condition, x.dtype)))


def repa_projector(width: int, out: int, layers: int, hidden: int = 2048) -> nn.Sequential:
    """REPA's MLP from hidden tokens to encoder features (arXiv 2410.06940, section 3.2); 1 layer: a linear map."""
    sizes = [width] + [hidden] * (layers - 1) + [out]
    parts: list[nn.Module] = []
    for before, after in pairwise(sizes):
        parts += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*parts[:-1])
