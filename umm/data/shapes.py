"""Procedural scenes with label, caption, mask and questions that agree because they come from one description.

A scene holds one large object and some small ones that never overlap. Its class is the shape of the large one, or
what `label` says instead.
Scene i of a split is a function of (seed, split, i), `max_objects` and `textured`; nothing is stored.
"""

from __future__ import annotations

import dataclasses

import torch

from umm.data._scene_text import caption, questions
from umm.data._scenes import COLOURS, SHAPES, VERSION, Dice, Scene, draw_scene, sample_scene
from umm.data.base import DataSource, check_split
from umm.errors import ConfigError
from umm.rng import derive_seed
from umm.settings import ShapesSettings


class ShapesSource(DataSource):
    """Items have image, label, caption, mask (index of the shape + 1, background 0) and questions of five kinds."""

    Config = ShapesSettings

    def __init__(self, config: ShapesSettings, split: str):
        check_split(split)
        _check(config)
        self.config, self.split = config, split
        counts = [str(count) for count in range(1, config.max_objects + 1)]
        self.image_size = config.image_size
        self.classes = {"shape": SHAPES, "colour": list(COLOURS), "count": counts}[config.label]
        number = getattr(config, split)
        number = number if config.limit is None else min(number, config.limit)
        self.ids = [f"{config.seed}/{split}/{index:06d}" for index in range(number)]

    @classmethod
    def from_config(cls, config: ShapesSettings, split: str) -> ShapesSource:
        return cls(config, split)

    @classmethod
    def tiny(cls, split: str = "train") -> ShapesSource:
        return cls(ShapesSettings(image_size=32, train=24, val=12, test=12), split)

    def __len__(self) -> int:
        return len(self.ids)

    def scene(self, index: int) -> Scene:
        """The description that everything in item `index` is made from."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        config = self.config
        return sample_scene(config.seed, self.split, index, config.max_objects, config.textured)

    def load(self, index: int, generator: torch.Generator | None = None) -> dict:
        scene = self.scene(index)
        image, mask = draw_scene(scene, self.image_size)
        dice = Dice(derive_seed("shapes", VERSION, self.config.seed, self.split, index, "questions"))
        return {
            "image": torch.from_numpy(image).permute(2, 0, 1).contiguous(),  # (3, S, S)
            "id": self.ids[index],
            "label": self.label(scene),
            "caption": caption(scene),
            "mask": torch.from_numpy(mask),
            "questions": questions(scene, dice, self.config.questions),
        }

    def label(self, scene: Scene) -> int:
        """Index in `classes` of the shape or the colour of the large object, or of the number of objects."""
        large, count = scene.things[0], str(len(scene.things))
        return self.classes.index({"shape": large.shape, "colour": large.colour, "count": count}[self.config.label])

    def identity(self) -> dict[str, object]:
        settings = dataclasses.asdict(self.config)
        keep = ("name", "image_size", "seed", "max_objects", "textured", "questions")
        facts = {key: settings[key] for key in keep} | {"version": VERSION, "split": self.split, "items": len(self)}
        return facts if settings["label"] == "shape" else facts | {"label": settings["label"]}


def _check(config: ShapesSettings) -> None:
    if config.flip or config.crop != "center":
        raise ConfigError("data.flip and data.crop=random do not go with shapes: captions and questions name places.")
    if not 2 <= config.max_objects <= 5:  # six would leave no absent shape to ask about
        raise ConfigError(f"data.max_objects must be 2 to 5, is {config.max_objects}.")
    if config.image_size < 24:
        raise ConfigError(f"data.image_size must be at least 24 for shapes, is {config.image_size}: stars would blur.")
