"""Pictures whose class is the brightness of their left half, with masks of that half: a probe can learn both."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from umm.data.base import DataSource
from umm.rng import generator
from umm.settings import DataSettings

NAMES = ["dark", "middle", "light"]


@dataclass
class Config(DataSettings):
    name: str = "fakes.shades"
    image_size: int = 16
    count: int = 90
    bad_label: int = -1  # index of a picture with a label outside the classes
    empty: bool = False  # a fourth class without pictures
    labels: bool = True


class Shades(DataSource):
    Config = Config

    def __init__(self, config: Config, split: str):
        self.config, self.split, self.image_size = config, split, config.image_size
        self.classes = NAMES + ["nobody"] * config.empty
        self.ids = [f"{split}-{i}" for i in range(config.limit or config.count)]

    @classmethod
    def from_config(cls, config, split):
        return cls(config, split)

    def __len__(self):
        return len(self.ids)

    def load(self, index, generator_=None):
        draw, label, side = generator("shades", self.split, index), index % 3, self.image_size
        image = torch.rand(3, side, side, generator=draw) * 0.3
        left = side // 2 if torch.rand((), generator=draw) < 0.5 else side // 4
        image[:, :, :left] += 0.3 * label
        mask = torch.zeros(side, side, dtype=torch.int64)
        mask[:, :left] = label + 1
        item = {"image": (image.clamp(0, 1) * 255).round().byte(), "id": self.ids[index], "mask": mask}
        return item | ({"label": 7 if index == self.config.bad_label else label} if self.config.labels else {})

    def identity(self):
        return {"data": "shades", "split": self.split, "count": len(self), "bad": self.config.bad_label}
