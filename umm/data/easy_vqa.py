"""easy-VQA (Victor Zhou, 2019): 64 px pictures of one coloured shape each, with yes/no, colour and shape questions."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from umm import assets
from umm.data.base import DataSource, Question, check_split, digest
from umm.errors import DataError
from umm.rng import derive_seed
from umm.settings import EasyVQASettings
from umm.transforms import load_picture, prepare

SHAPES = ["circle", "rectangle", "triangle"]


class EasyVQASource(DataSource):
    """test is the official test set; val is taken out of the official training set by a hash of the picture's number.

    The class is the shape. The questions leave it open for 4 % of the pictures, so it is read off the picture, which
    agrees with every question that tells.
    """

    Config = EasyVQASettings

    def __init__(self, config: EasyVQASettings, split: str, root: Path | None = None):
        check_split(split)
        self.config, self.split, self.image_size, self.classes = config, split, config.image_size, list(SHAPES)
        official = "test" if split == "test" else "train"
        self.folder = (root or assets.path("easy-vqa")) / official
        self.questions = _questions(self.folder / "questions.json")
        numbers = sorted(self.questions)
        if split != "test":
            numbers = [n for n in numbers if (_share(n) < config.holdout) == (split == "val")]
        self.numbers = numbers[: config.limit]
        self.ids = [f"{official}/{number}" for number in self.numbers]

    @classmethod
    def from_config(cls, config: EasyVQASettings, split: str) -> EasyVQASource:
        return cls(config, split)

    @classmethod
    def tiny(cls, split: str = "train") -> EasyVQASource:
        """Made-up pictures in the same layout."""
        keep = tempfile.TemporaryDirectory(prefix="umm-tiny-")
        for official in ("train", "test"):
            _write_tiny(Path(keep.name, official))
        source = cls(EasyVQASettings(image_size=32, holdout=0.3), split, Path(keep.name))
        source.keep = keep  # the pictures live as long as the source
        return source

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int, generator: torch.Generator | None = None) -> dict:
        number, config = self.numbers[index], self.config
        picture = load_picture(self.folder / "images" / f"{number}.png")
        return {
            "image": prepare(picture, self.image_size, config.crop, config.flip, generator),
            "id": self.ids[index],
            "label": SHAPES.index(shape_of(picture)),
            "questions": self.questions[number],
        }

    def identity(self) -> dict[str, object]:
        facts = {"name": self.config.name, "split": self.split, "image_size": self.image_size, "crop": "adm"}
        return facts | {"items": len(self), "ids": digest(self.ids)}


def shape_of(picture: Image.Image) -> str:
    """The shape, by how much of its bounding box it covers: rectangle 1, circle pi / 4, triangle 1 / 2.

    Edges count by their coverage, height and width are those of the fullest column and row, so that the three groups
    stay apart down to the smallest shape (over all 5,000 pictures: up to 0.69, 0.78 to 0.87, from 0.99).
    """
    pixels = np.asarray(picture, np.float64)
    distance = np.abs(pixels - np.median(pixels, axis=(0, 1))).sum(-1)  # from the background
    coverage = distance / distance.max()
    filled = coverage.sum() / (coverage.sum(0).max() * coverage.sum(1).max())
    return "triangle" if filled < 0.73 else "circle" if filled < 0.93 else "rectangle"


def _questions(file: Path) -> dict[int, list[Question]]:
    """{picture number: its questions}."""
    try:
        rows = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not readable ({error}): delete its folder, and it is made again.") from error
    questions = defaultdict(list)
    for text, answer, number in rows:
        kind = "yes/no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "colour"
        questions[number].append(Question(text, answer, kind))
    return dict(questions)


def _share(number: int) -> float:
    """A fixed uniform number in [0, 1) for each training picture."""
    return derive_seed("easy_vqa", number) / 2**63


def _write_tiny(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(24):
        shape, picture = SHAPES[number % 3], Image.new("RGB", (64, 64), "white")
        pen, end = ImageDraw.Draw(picture), 30 + number
        match shape:
            case "circle":
                pen.ellipse((10, 10, end, end), fill="teal")
            case "rectangle":
                pen.rectangle((10, 20, end, 50), fill="red")
            case _:
                pen.polygon([(10, end), (end, end), (5 + end // 2, 10)], fill="blue")
        picture.save(folder / "images" / f"{number}.png")
        rows.append(["what shape is in the image?", shape, number])
        rows.append(["is there a circle?", "yes" if shape == "circle" else "no", number])
    (folder / "questions.json").write_text(json.dumps(rows))
