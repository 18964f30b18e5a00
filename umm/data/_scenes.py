"""Procedural scenes: a description drawn from seeded random numbers, and its picture.

The distribution of scenes is unchanged by renaming shapes, by renaming colours and by mirroring the canvas; and how
many objects a scene has, and how many share its `theme` value, are both uniform. Questions lean on these symmetries
to have answers that cannot be guessed (see `_scene_text`).

Lengths are fractions of the picture's side, x to the right, y down. S is the side in pixels.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from umm.rng import derive_seed

VERSION = 1  # raised when the same seed draws something else

COLOURS = {  # name -> RGB; at least 30 apart in CIELAB, from each other and from every background
    "red": (214, 32, 40),
    "orange": (247, 136, 16),
    "yellow": (250, 226, 40),
    "green": (40, 158, 60),
    "cyan": (40, 206, 222),
    "blue": (36, 72, 216),
    "purple": (156, 48, 180),
    "pink": (248, 120, 190),
}
SHAPES = ["circle", "square", "triangle", "star", "cross", "heart"]
VALUES = {"shape": SHAPES, "colour": list(COLOURS)}  # attribute -> its values
RADIUS = {"large": (0.20, 0.26), "small": (0.095, 0.12)}  # of the bounding circle
BACKGROUNDS = ["striped", "checked", "shaded", "cloudy"]
GAP = 0.02  # at least, between bounding circles and to the border
CLOUDS = 6  # grid points a side
SUPERSAMPLE = 4


@dataclass(frozen=True)
class Thing:
    """One object."""

    shape: str
    colour: str
    size: str  # large or small
    x: float  # of the centre
    y: float
    radius: float
    angle: float  # radians
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Background:
    """Two muted tones and how they mix."""

    kind: str
    tones: tuple[tuple[int, int, int], tuple[int, int, int]]
    angle: float
    waves: float  # periods across the picture
    phase: float
    clouds: tuple[float, ...]


@dataclass(frozen=True)
class Scene:
    """Objects, the single large one first. `theme` is an (attribute, value) that `theme_count` objects have."""

    things: tuple[Thing, ...]
    background: Background
    theme: tuple[str, str]
    theme_count: int

    @property
    def label(self) -> int:
        """The shape of the large object."""
        return SHAPES.index(self.things[0].shape)


class Dice(random.Random):
    """Draws that rest on `random()` alone, the one stream Python promises to keep between versions."""

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def pick(self, options: Sequence):
        return options[int(self.random() * len(options))]

    def coin(self) -> bool:
        return self.random() < 0.5

    def mixed(self, options: Sequence) -> list:
        """In random order."""
        return [options[i] for _, i in sorted((self.random(), i) for i in range(len(options)))]


# ------------------------------------------------------------------------------------------------------- sampling


def sample_scene(seed: int, split: str, index: int, max_objects: int = 4, textured: float = 0.5) -> Scene:
    """Scene `index` of a split."""
    dice = Dice(derive_seed("shapes", VERSION, seed, split, index))
    number, theme_count = _counts(dice, max_objects)
    family = dice.pick(list(VALUES))
    theme = (family, dice.pick(VALUES[family]))
    values = {name: [dice.pick(VALUES[name]) for _ in range(number)] for name in VALUES}
    others = [value for value in VALUES[family] if value != theme[1]]
    values[family] = dice.mixed([theme[1]] * theme_count + [dice.pick(others) for _ in range(number - theme_count)])
    things = tuple(
        Thing(shape, colour, size, x, y, radius, dice.between(-0.25, 0.25), _jittered(dice, COLOURS[colour]))
        for shape, colour, (size, x, y, radius) in zip(values["shape"], values["colour"], _layout(dice, number))
    )
    return Scene(things, _background(dice, textured), theme, theme_count)


@functools.cache
def count_table(max_objects: int) -> tuple[tuple[float, tuple[int, int]], ...]:
    """Cumulative probabilities of (number of objects, number that share the theme), both uniform.

    1 <= number <= max_objects and 0 <= sharing < max_objects, sharing <= number, by iterative proportional fitting.
    """
    table = np.tril(np.ones((max_objects, max_objects + 1)), 1)[:, :max_objects]  # rows: 1.., columns: 0..
    for _ in range(500):
        table /= table.sum(1, keepdims=True)
        table /= table.sum(0, keepdims=True)
    cumulative = np.cumsum(table / max_objects).tolist()
    return tuple((p, (cell // max_objects + 1, cell % max_objects)) for cell, p in enumerate(cumulative))


def _counts(dice: Dice, max_objects: int) -> tuple[int, int]:
    table, draw = count_table(max_objects), dice.random()
    return next((pair for bound, pair in table if draw < bound), table[-1][1])


def _layout(dice: Dice, number: int) -> list[tuple[str, float, float, float]]:
    """(size, x, y, radius) of one large and otherwise small objects that do not overlap."""
    while True:
        placed: list[tuple[str, float, float, float]] = []
        for size in ["large"] + ["small"] * (number - 1):
            radius = dice.between(*RADIUS[size])
            for _ in range(40):
                x, y = (dice.between(radius + GAP, 1 - radius - GAP) for _ in "xy")
                if all(math.hypot(x - a, y - b) > radius + r + GAP for _, a, b, r in placed):
                    placed.append((size, x, y, radius))
                    break
        if len(placed) == number:
            return placed


def _background(dice: Dice, textured: float) -> Background:
    kind = dice.pick(BACKGROUNDS) if dice.random() < textured else "plain"
    grey, step = dice.between(56, 226), dice.between(20, 44)
    second = grey - step if grey > 140 else grey + step
    tint = [dice.between(-9, 9) for _ in "rgb"]
    tones = tuple(tuple(round(level + t) for t in tint) for level in (grey, second))
    return Background(
        kind,
        tones,
        angle=dice.between(0, math.pi),
        waves=dice.between(2.5, 5.0),
        phase=dice.between(0, 2 * math.pi),
        clouds=tuple(dice.random() for _ in range(CLOUDS**2)),
    )


def _jittered(dice: Dice, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    return tuple(min(255, max(0, round(level + dice.between(-7, 7)))) for level in rgb)


# -------------------------------------------------------------------------------------------------------- drawing


def draw_scene(scene: Scene, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Antialiased picture uint8 (S, S, 3), and mask int64 (S, S): index of the shape + 1, background 0."""
    picture = Image.fromarray(_draw_background(scene.background, size))
    mask = np.zeros((size, size), np.int64)
    for thing in scene.things:
        coverage = _coverage(thing, size)
        picture.paste(thing.rgb, mask=coverage)
        mask[np.asarray(coverage) >= 128] = SHAPES.index(thing.shape) + 1
    return np.array(picture), mask


def _coverage(thing: Thing, size: int) -> Image.Image:
    """Share of each pixel that the object covers, 0-255, drawn larger and averaged down."""
    side = size * SUPERSAMPLE
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    radius = thing.radius * side - 0.5  # Pillow fills the pixels on the outline too, half a pixel too far
    points = outlines()[thing.shape] @ turn * radius + (thing.x * side - 0.5, thing.y * side - 0.5)
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in points.tolist()], fill=255)
    return canvas.reduce(SUPERSAMPLE)


@functools.cache
def outlines() -> dict[str, np.ndarray]:
    """Corners (P, 2) of each shape within the unit circle, centred on a point of the shape."""
    arm = 0.31  # half the width of the cross's bars
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    heart = np.stack(
        [16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) - 2], -1
    )
    corner = np.array([[arm, -0.95], [arm, -arm], [0.95, -arm]])  # of one quarter; the next ones are turned
    turn = np.array([[0, 1], [-1, 0]])
    return {
        "circle": 0.88 * _regular(60),
        "square": _regular(4, phase=np.pi / 4),
        "triangle": _regular(3),
        "star": _regular(10) * np.where(np.arange(10) % 2, 0.45, 1.0)[:, None],
        "cross": np.concatenate([corner @ np.linalg.matrix_power(turn, k) for k in range(4)]),
        "heart": heart / np.linalg.norm(heart, axis=1).max(),
    }


def _regular(corners: int, phase: float = 0.0) -> np.ndarray:
    """Corners of a regular polygon, the first at the top."""
    angles = 2 * np.pi * np.arange(corners) / corners + phase
    return np.stack([np.sin(angles), -np.cos(angles)], -1)


def _draw_background(background: Background, size: int) -> np.ndarray:
    """uint8 (S, S, 3)."""
    low, high = (np.array(tone, np.float32) for tone in background.tones)
    weight = _texture(background, size)[..., None]  # (S, S, 1)
    return (low + (high - low) * weight + 0.5).astype(np.uint8)


def _texture(background: Background, size: int) -> np.ndarray:
    """How much of the second tone each pixel has, in [0, 1], (S, S) or (1, 1)."""
    steps = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    cos, sin = math.cos(background.angle), math.sin(background.angle)
    along = steps * cos + steps[:, None] * sin  # (S, S)
    across = steps[:, None] * cos - steps * sin
    turns = 2 * math.pi * background.waves
    edge = size / turns  # makes the step from one tone to the other one pixel wide
    match background.kind:
        case "striped":
            return (0.5 + edge * np.sin(turns * along + background.phase)).clip(0, 1)
        case "checked":
            waves = np.sin(turns * along + background.phase) * np.sin(turns * across + background.phase)
            return (0.5 + edge * waves).clip(0, 1)
        case "shaded":
            return (along - along.min()) / np.ptp(along)
        case "cloudy":
            grid = Image.fromarray(np.array(background.clouds, np.float32).reshape(CLOUDS, CLOUDS))
            return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)
        case _:
            return np.zeros((size, size), np.float32)
