"""A pair of tasks whose synergy is known, to see whether the instrument says yes, no and harm when it should.

    pictures x    uniform noise, (48,) numbers of variance 1
    answers       u = A_u W_u x,  g = A_g W_g x,  with noise; W 4 x 48 of orthonormal rows, A 8 x 4
    network       a shared linear trunk x -> h of WIDTH numbers, a linear head each: 8 answers from h

planted.pair=same      W_u = W_g: all that is hard to learn, 192 of 224 numbers, is common: both must gain
planted.pair=apart     rows of W_g orthogonal to those of W_u, and room in the trunk for both: neither gains nor loses
planted.pair=rivals    the same with room for one only: both must lose

It is task, data and latent space in one file, by its import path: PYTHONPATH=. umm synergy run
experiments/synergy/planted_same.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm.build import open_source, settings_of
from umm.data.base import DataSource, collate
from umm.judging import Records
from umm.latents.base import LatentSpace, LatentSpec, Normalizer
from umm.rng import generator, seeded_init
from umm.settings import DataSettings, LatentSettings, OptimSettings
from umm.tasks.base import Group, Phase, Task, Turn

SIDE, RANK, ANSWERS, DIM = 4, 4, 8, 48
WIDTH = {"same": 8, "apart": 16, "rivals": 4}  # of the trunk


@dataclass
class NoiseSettings(DataSettings):
    name: str = "experiments.planted"
    image_size: int = SIDE
    count: int = 100_000
    judged: int = 1000


class Noise(DataSource):
    Config = NoiseSettings

    def __init__(self, config: NoiseSettings, split: str):
        self.split, self.image_size = split, SIDE
        self.ids = range(config.count if split == "train" else config.judged)

    @classmethod
    def from_config(cls, config: NoiseSettings, split: str) -> Noise:
        return cls(config, split)

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int, generator_: torch.Generator | None = None) -> dict:
        draw = generator("planted", self.split, index)
        return {"image": torch.randint(256, (3, SIDE, SIDE), generator=draw).byte(), "id": str(index)}

    def identity(self) -> dict[str, object]:
        return {"name": "planted", "split": self.split, "items": len(self)}


@dataclass
class PixelSettings(LatentSettings):
    name: str = "experiments.planted"
    normalizer: Literal["scalar"] = "scalar"
    stats_images: int = 2000
    image_size: int = SIDE


class Pixels(LatentSpace):
    Config = PixelSettings

    def __init__(self):
        super().__init__()
        self.spec = LatentSpec(3, SIDE, SIDE, SIDE)
        self.normalizer = Normalizer(self.spec.shape, "scalar")

    @classmethod
    def from_config(cls, config: PixelSettings) -> Pixels:
        return cls()

    def raw(self, images: Tensor) -> Tensor:
        return images

    def identity(self) -> dict[str, object]:
        return {"space": "planted"}


@dataclass
class PlantedSettings:
    pair: Literal["same", "apart", "rivals"] = "same"
    parts: list[Literal["u", "g"]] = field(default_factory=lambda: ["u", "g"])
    stop: list[Literal["u", "g"]] = field(default_factory=list)  # parts that do not move the trunk
    placebo: list[Literal["u", "g"]] = field(default_factory=list)  # parts whose answers belong to other pictures
    noise: float = 1.0  # of the answers learnt from; the judged ones have none
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(lr=1e-2, final_lr=1e-4, warmup=0))


class _Trunk(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.trunk = nn.Linear(DIM, width, bias=False)
        self.heads = nn.ModuleDict({part: nn.Linear(width, ANSWERS, bias=False) for part in "ug"})

    def answer(self, part: str, x: Tensor) -> Tensor:
        return self.heads[part](self.trunk(x.flatten(1)))


class _Part(Task):
    """One of the two: its own pictures and noise by its name."""

    keys = ("image",)

    def __init__(self, name: str, planted: Planted):
        super().__init__(planted.config, planted.space, planted.val)
        self.name, self.planted = name, planted
        self.placebo = name in planted.settings.placebo

    def loss(self, phase, batch, rng, images):
        x = self.space.normalizer(batch["latent"])
        answers = truth(self.planted.maps[self.name], x)
        if self.placebo:
            answers = answers.roll(1, 0)
        noise = self.planted.settings.noise * rng.fork("noise").randn(ANSWERS)
        return {"loss": F.mse_loss(self.planted.network.answer(self.name, x), answers + noise)}

    def heads(self, modules):
        return {}

    def head_settings(self):
        return {}


class Planted(Task):
    """Both parts on one trunk, in the groups that joint training has."""

    name, Config = "experiments.planted", PlantedSettings

    def __init__(self, config, space, val):
        super().__init__(config, space, val)
        self.settings = settings_of(config.planted)
        self.maps = hidden_maps(self.settings.pair, self.seed)
        with seeded_init(self.seed, "planted"):
            self.network = _Trunk(WIDTH[self.settings.pair])
        self.parts = {name: _Part(name, self) for name in self.settings.parts}
        last.update(network=self.network, maps=self.maps, space=space)

    def members(self) -> list[Task]:
        return list(self.parts.values())

    def groups(self) -> list[Group]:
        shared, optim = [self.network.trunk.weight], self.settings.optim
        turns = [
            Turn(part, "answer", optim.clip, stopped=shared if name in self.settings.stop else [])
            for name, part in self.parts.items()
        ]
        return [Group("planted", Phase("answer", self.network, optim), turns, shared)]

    def head_settings(self):
        return {}

    @staticmethod
    @torch.no_grad()
    def evaluate(model, config, accelerator) -> Records:
        """Squared error of each part's answers, as a share of their variance."""
        source, records = open_source(config, config.eval.split), Records()
        x = collate([{"image": source[i]["image"]} for i in range(len(source))])["image"].float() / 255
        x = last["space"].normalizer(x)
        for part in config.planted.parts:
            right = truth(last["maps"][part], x)
            error = (last["network"].answer(part, x) - right).square().mean() / right.square().mean()
            records.numbers.append({"metric": f"error of {part}", "value": float(error), "higher_is_better": False,
                                    "version": 1, "headline": True, "conflict": None, "n": len(x)})  # fmt: skip
        return records


last: dict = {}  # the network of this process's newest run: a linear map is not worth a model folder


def hidden_maps(pair: str, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """{part: (A (8, 4), W (4, 48))}."""
    draw = generator("planted", seed, "maps")
    rows = torch.linalg.qr(torch.randn(DIM, 2 * RANK, generator=draw)).Q.T  # (8, 48), orthonormal
    other = rows[:RANK] if pair == "same" else rows[RANK:]
    return {part: (torch.randn(ANSWERS, RANK, generator=draw) / RANK**0.5, w)
            for part, w in (("u", rows[:RANK]), ("g", other))}  # fmt: skip


def truth(maps: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """Answers (B, 8) without noise."""
    a, w = maps
    return x.flatten(1) @ w.T @ a.T
