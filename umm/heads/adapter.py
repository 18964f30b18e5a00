"""A small residual network that moves a frozen encoder's latents for all heads at once: z' = z + A(z).

B batch, C channels, h w latent grid.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from umm.heads.base import Head
from umm.latents.base import LatentSpec
from umm.rng import seeded_init
from umm.settings import AdapterSettings


class Adapter(Head):
    """Standardised latents (B, C, h, w) -> standardised latents, token by token, in float32 whatever is autocast.

    The last layer begins at zero, so an untrained adapter returns its input bit for bit. Every token keeps its length:
    no loss can be lowered by shrinking or by blowing up latents, and spheres stay spheres.

    Args:
        hidden: channels of the hidden layers.
        depth: how many of them.
    """

    Config = AdapterSettings

    def __init__(self, spec: LatentSpec, hidden: int, depth: int):
        super().__init__()
        self.spec = spec
        widths = [spec.channels, *[hidden] * depth]
        layers = [layer for pair in pairwise(widths) for layer in (nn.Conv2d(*pair, 1), nn.GELU())]
        self.residual = nn.Sequential(*layers, nn.Conv2d(hidden, spec.channels, 1))
        for parameter in self.residual[-1].parameters():
            nn.init.zeros_(parameter)

    @classmethod
    def from_config(cls, config: AdapterSettings, spec: LatentSpec, **facts) -> Adapter:
        return cls(spec, config.hidden, config.depth)

    @classmethod
    def tiny(cls, spec: LatentSpec) -> Adapter:
        with seeded_init("tiny adapter"):
            made = cls(spec, hidden=8, depth=1)
            nn.init.normal_(made.residual[-1].weight)
        return made

    def forward(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(self.residual[0].weight.dtype)
            moved = z + self.residual(z)
            length = moved.norm(dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
            return moved * (z.norm(dim=1, keepdim=True) / length)
