"""The contract of a task: what is trained and how it is judged. `train.py` and `evaluate.py` know only this.

A task owns its networks, its optimisers' parameter groups, its data order and its random stream, so tasks that share no
parameter, trained in one loop, equal the same tasks trained apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from umm.rng import PictureRNG
from umm.settings import OptimSettings


@dataclass
class Phase:
    """One optimiser's turn in a step: some tasks alternate two (decoder, discriminator)."""

    name: str
    module: nn.Module  # what is optimised, wrapped for DDP by the loop
    optim: OptimSettings
    ema: float | None = None  # decay per step of an averaged copy, None: no copy
    start: int = 0  # images after which this phase takes its turn; its schedule starts there


@dataclass
class Records:
    """What an evaluation found: numbers, and the values per picture they are means of."""

    numbers: list[dict] = field(default_factory=list)  # {"metric", "value", "low", "high", "n", "higher_is_better", ...}
    items: dict[str, dict[str, float]] = field(default_factory=dict)  # metric -> {picture id: value}
    fingerprints: dict[str, dict] = field(default_factory=dict)


class Task:
    """Built from settings and a frozen latent space; `name` is its file's name."""

    name: str = ""
    phases: list[Phase]

    def loss(self, phase: str, batch: dict[str, Tensor], rng: PictureRNG, images: int) -> dict[str, Tensor]:
        """Loss terms of one micro-batch, means over its pictures; "loss" is trained on, the rest is logged.

        `images` is the number of pictures trained on before this step (schedules are counted in it).
        """
        raise NotImplementedError
