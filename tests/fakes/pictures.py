"""A data set in a few lines: smooth coloured ramps, as someone's own module would add it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from umm.data.base import DataSource
from umm.rng import generator
from umm.settings import DataSettings


@dataclass
class Config(DataSettings):
    name: str = "fakes.pictures"
    image_size: int = 16
    count: int = 37  # a prime, so that no batch size divides it
    poison: int = -1  # index of a picture whose pixels are not numbers once encoded


class Ramps(DataSource):
    Config = Config

    def __init__(self, config: Config, split: str):
        self.config, self.split, self.image_size = config, split, config.image_size
        self.classes = ["a", "b", "c"]

    @classmethod
    def from_config(cls, config, split):
        return cls(config, split)

    def __len__(self):
        return self.config.limit or self.config.count

    @property
    def ids(self):
        return [f"{self.split}-{i}" for i in range(len(self))]

    def load(self, index, generator_=None):
        draw = generator("ramps", self.split, index)
        corners = torch.rand(1, 3, 2, 2, generator=draw)
        size = (self.image_size, self.image_size)
        image = torch.nn.functional.interpolate(corners, size, mode="bilinear", align_corners=True)[0]
        if self.config.flip and generator_ is not None and torch.rand((), generator=generator_) < 0.5:
            image = image.flip(-1)
        if index == self.config.poison:
            image = torch.zeros_like(image)
        return {"image": (image * 255).round().byte(), "id": self.ids[index], "label": index % 3}

    def identity(self):
        return {"data": "ramps", "split": self.split, "count": len(self), "size": self.image_size}
