"""A latent space in a few lines: patches times a fixed random matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from umm.latents.base import Features, LatentSpace, LatentSpec, Normalizer
from umm.layers import tokens_of
from umm.rng import generator
from umm.settings import LatentSettings


@dataclass
class Config(LatentSettings):
    name: str = "fakes.space"
    image_size: int = 16
    channels: int = 12
    break_on_black: bool = False  # a black picture encodes to NaN


class Patches(LatentSpace):
    Config = Config
    families = ("patches",)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.spec = LatentSpec(config.channels, 4, 4, config.image_size)
        self.normalizer = Normalizer(self.spec.shape, config.normalizer)
        patch = config.image_size // 4
        weight = torch.randn(config.channels, 3, patch, patch, generator=generator("patches")) / patch
        self.register_buffer("weight", weight)

    @classmethod
    def from_config(cls, config):
        return cls(config)

    @classmethod
    def tiny(cls, **changes):
        return cls(Config(**changes))

    def raw(self, images):
        z = torch.nn.functional.conv2d(images - 0.5, self.weight, stride=self.weight.shape[-1])
        if self.config.break_on_black:
            z = torch.where(images.amax((1, 2, 3), keepdim=True) > 0, z, torch.nan)
        return z

    def features(self, images, layers=None):
        found = Features(None, tokens_of(self.raw(images)))
        return found if layers is None else [found] * len(layers)

    def identity(self):
        return {"space": "patches", "channels": self.config.channels, "image_size": self.config.image_size}
