"""The convolutional decoder of latent diffusion (arXiv 2112.10752), as SVG, VA-VAE and AlignTok use it.

B batch, C channels, h w latent grid, H W image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm.errors import ConfigError
from umm.latents.base import LatentSpec
from umm.layers import grid_of, tokens_of
from umm.settings import ConvDecoderSettings


def groups_of(channels: int) -> int:
    """32, or the most, a power of two, that divide the channels into four or more each.

    Groups of one channel are an instance norm, which takes flat colours away.
    """
    most = min(32, max(1, channels // 4))
    return math.gcd(channels, 1 << (most.bit_length() - 1))


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups_of(channels), channels, eps=1e-6)


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (B, C, h, w) -> (B, C', h, w)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs), conv(inputs, outputs)
        self.norm2, self.conv2 = group_norm(outputs), conv(outputs, outputs)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class GridAttention(nn.Module):
    """x + attention over all places, one head, (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens_of(self.norm(x))).chunk(3, dim=-1)  # each (B, N, C)
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + grid_of(self.proj(attended), *x.shape[2:])


class Upsample(nn.Module):
    """Twice the size by repetition, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ConvDecoder(nn.Module):
    """Raw latents (B, C, h, w) -> images (B, 3, H, W) around [0, 1], not clamped, of any grid.

    Levels of `width * multipliers` channels, the last multiplier at the latent's grid; each level but the first doubles
    the size.

    Raises:
        ConfigError: the levels do not lead from the latent's grid to the picture.
    """

    def __init__(self, spec: LatentSpec, settings: ConvDecoderSettings):
        super().__init__()
        levels = len(settings.multipliers)
        if 2 ** (levels - 1) != spec.patch:
            whole = spec.patch.bit_count() == 1
            fitting = f"give {spec.patch.bit_length()} levels, or" if whole else "no number draws that,"
            raise ConfigError(
                f"latent.decoder.multipliers has {levels} levels, which draw {2 ** max(levels - 1, 0)} px a token; "
                f"this latent has {spec.patch} px: {fitting} choose another encoder_size."
            )
        widths = [settings.width * multiplier for multiplier in reversed(settings.multipliers)]
        x = widths[0]
        layers = [conv(spec.channels, x), ResBlock(x, x), GridAttention(x), ResBlock(x, x)]
        for level, width in enumerate(widths):
            layers += [Upsample(x)] if level else []
            for _ in range(settings.blocks + 1):
                layers.append(ResBlock(x, width))
                x = width
                if settings.attention and level == 0:
                    layers.append(GridAttention(x))
        self.layers = nn.Sequential(*layers, group_norm(x), nn.SiLU(), conv(x, 3))
        for name, value in (("pixel_mean", spec.pixel_mean), ("pixel_std", spec.pixel_std)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.layers[-1].weight

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents) * self.pixel_std + self.pixel_mean
