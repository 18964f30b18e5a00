"""Networks of VFM-VAE (arXiv 2510.18457): projections by attention, and a decoder that draws at every scale.

Written from a description of the published networks, not from their code: the decoder begins at the latent's own grid,
doubles by bilinear interpolation, and its style network has the learning rate of everything else.

B batch, C channels, D width, h w latent grid, N = h * w tokens, H W image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm.errors import ConfigError
from umm.latents._conv import GridAttention, group_norm
from umm.latents.base import LatentSpec
from umm.layers import RMSNorm, grid_of, tokens_of
from umm.settings import PyramidSettings

HEAD = 64  # channels of an attention head
LAYER_SCALE = 1e-5  # at first, of a block's branch


class GEGLU(nn.Module):
    """w3(gelu(a) * b) with [a | b] = w12(x) (Shazeer 2020)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.gelu(a) * b)


class AttentionProjection(nn.Module):
    """Change of width by attention, (B, N, inputs) -> (B, N, outputs).

    Every head gives `outputs` numbers a token and their mean is taken; a linear map goes around, a GEGLU follows.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.heads = max(1, inputs // HEAD)
        keys = inputs // self.heads * self.heads
        self.norm, self.skip = nn.LayerNorm(inputs), nn.Linear(inputs, outputs)
        self.queries, self.keys = nn.Linear(inputs, keys), nn.Linear(inputs, keys)
        self.values = nn.Linear(inputs, self.heads * outputs)
        self.norm2, self.mlp = nn.LayerNorm(outputs), GEGLU(outputs, 2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in
                   (self.queries, self.keys, self.values))  # each (B, heads, N, .)  # fmt: skip
        y = self.skip(x) + F.scaled_dot_product_attention(q, k, v).mean(1)
        return y + self.mlp(self.norm2(y))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.mlp.w3.weight


class StyledBlock(nn.Module):
    """ConvNeXt block whose channels a style scales, (B, C, h, w), (B, S) -> (B, C, h, w)."""

    def __init__(self, channels: int, style: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm, self.scale = group_norm(channels), nn.Linear(style, channels)
        self.widen, self.narrow = nn.Conv2d(channels, 4 * channels, 1), nn.Conv2d(4 * channels, channels, 1)
        self.gain = nn.Parameter(torch.full((channels, 1, 1), LAYER_SCALE))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x)) * (1 + self.scale(style)[:, :, None, None])
        return x + self.gain * self.narrow(F.gelu(self.widen(y)))


class Level(nn.Module):
    """One scale: the scale below at twice its size, the latent again, attention, styled blocks, a picture."""

    def __init__(self, inputs: int, width: int, latent: int, style: int, blocks: int, attention: bool):
        super().__init__()
        self.enter = nn.Conv2d(inputs, width, 1)
        self.inject = nn.Conv2d(latent, width, 1) if latent else None
        self.attention = GridAttention(width) if attention else nn.Identity()
        self.blocks = nn.ModuleList(StyledBlock(width, style) for _ in range(blocks))
        self.rgb = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor, z: Tensor, style: Tensor) -> Tensor:
        x = self.enter(x)
        if self.inject is not None:
            x = x + F.interpolate(self.inject(z), x.shape[2:], mode="bilinear", align_corners=False)
        x = self.attention(x)
        for block in self.blocks:
            x = block(x, style)
        return x


class Pyramid(nn.Module):
    """Latents (B, C, h, w) of any grid -> pictures of h, 2 h, ... h * patch rows, the last one the result.

    They are around [0, 1], not clamped; each is the one before at twice its size, and a correction.
    """

    def __init__(self, spec: LatentSpec, settings: PyramidSettings):
        super().__init__()
        doublings = round(math.log2(spec.patch))
        if 2**doublings != spec.patch:
            raise ConfigError(
                f"the decoder doubles, and this latent has {spec.patch} px a token: choose encoder_size or merge so "
                "that it is a power of two."
            )
        sizes = [spec.height * 2**level for level in range(doublings + 1)]
        widths = [min(settings.budget // size, settings.width) for size in sizes]
        self.enter = AttentionProjection(spec.channels, widths[0])
        self.style = nn.Sequential(RMSNorm(spec.channels), *style_layers(spec.channels, settings.style))
        self.levels = nn.ModuleList(
            Level(
                widths[max(level - 1, 0)],
                width,
                spec.channels if level < settings.injected else 0,
                settings.style,
                settings.blocks,
                level < settings.attention,
            )
            for level, width in enumerate(widths)
        )
        for name, value in (("pixel_mean", spec.pixel_mean), ("pixel_std", spec.pixel_std)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.levels[-1].rgb.weight

    def scales(self, z: Tensor) -> list[Tensor]:
        """The pictures of all scales, smallest first."""
        x = grid_of(self.enter(tokens_of(z)), *z.shape[2:])
        style = self.style(z.mean((2, 3)))  # (B, S)
        pictures = []
        for number, level in enumerate(self.levels):
            x = level(double(x) if number else x, z, style)
            pictures.append(level.rgb(x) + (double(pictures[-1]) if pictures else 0))
        return [picture * self.pixel_std + self.pixel_mean for picture in pictures]

    def forward(self, z: Tensor) -> Tensor:
        return self.scales(z)[-1]


def style_layers(inputs: int, width: int) -> list[nn.Module]:
    """Three linear layers with GELUs."""
    return [nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)]


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
