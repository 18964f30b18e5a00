"""A data set with questions in a few lines: one colour a picture, which only the picture tells."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from umm.data.base import DataSource, Question
from umm.settings import DataSettings

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220), "white": (230, 230, 230)}


@dataclass
class Config(DataSettings):
    name: str = "fakes.riddles"
    image_size: int = 16


class Riddles(DataSource):
    Config = Config

    def __init__(self, config: Config, split: str):
        self.config, self.split, self.image_size = config, split, config.image_size
        self.ids = [f"{split}-{i}" for i in range(32)]

    @classmethod
    def from_config(cls, config, split):
        return cls(config, split)

    def __len__(self):
        return len(self.ids)

    def load(self, index, generator_=None):
        name = list(COLOURS)[(index // 2) % 4]
        image = torch.tensor(COLOURS[name], dtype=torch.uint8).view(3, 1, 1).expand(3, 16, 16).contiguous()
        about_red = Question("Is it red?", "yes" if name == "red" else "no", "yes/no")
        return {
            "image": image,
            "id": self.ids[index],
            "questions": [Question("What colour is it?", name, "colour"), about_red],
        }

    def identity(self):
        return {"data": "riddles", "split": self.split}
