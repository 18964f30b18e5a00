"""The contract of a task: what is trained and how it is judged. `train.py` and `evaluate.py` know only this.

A task owns its networks, its optimisers, its data order and its random stream, so tasks that share no parameter,
trained in one loop, equal the same tasks trained apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from omegaconf import DictConfig
from torch import Tensor, nn

from umm.data.base import DataSource
from umm.judging import Records
from umm.latents.base import LatentSpace
from umm.model import UnifiedModel
from umm.rng import PictureRNG
from umm.settings import OptimSettings


@dataclass
class Phase:
    """One optimiser's turn in a step: some tasks alternate two (decoder, discriminator)."""

    name: str
    module: nn.Module  # what is optimised
    optim: OptimSettings
    ema: float | None = None  # decay per step of an averaged copy; None: no copy
    start: int = 0  # images after which this phase takes its turns; its schedule starts there
    forward: Callable = field(init=False)  # the module as the loop wraps it; call this in `loss`

    def __post_init__(self):
        self.forward = self.module


class Loan:
    """Gradients of parameters that one optimiser moves, made in passes of others."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters, self.gradients = list(parameters), {}

    def take(self, task: str) -> None:
        """Put the parameters' gradients by, under the task they are of."""
        self.gradients[task] = [p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None

    def repay(self, task: str) -> None:
        """Give a task's gradients back to the parameters."""
        for parameter, gradient in zip(self.parameters, self.gradients.pop(task, [None] * len(self.parameters))):
            parameter.grad = gradient


@dataclass
class Turn:
    """What one task has to say in an optimiser's step."""

    task: Task
    phase: str
    clip: float  # of this task's own gradient
    weight: float = 1.0  # of its gradient, after clipping
    stopped: list[nn.Parameter] = field(default_factory=list)  # its gradient does not move these
    pick: Callable[[nn.Module], nn.Module] = lambda module: module  # the phase's module inside the optimiser's
    lends: Loan | None = None  # takes what this turn's pass leaves at another optimiser's parameters
    borrows: Loan | None = None  # where this turn's gradient was left by an earlier pass; it has none of its own
    guests: tuple[str, ...] = ()  # tasks on whose pictures it is taken; empty: its own

    @property
    def key(self) -> str:
        return f"{self.task.name}.{self.phase}"

    @property
    def reads(self) -> tuple[str, ...]:
        """Tasks whose pictures it sees."""
        return self.guests or (self.task.name,)


@dataclass
class Group:
    """What one optimiser moves: a phase of one task, or a module that several tasks share (`shared`)."""

    name: str
    phase: Phase
    turns: list[Turn]
    shared: list[nn.Parameter] | None = None  # where the gradients of the tasks meet; None: a single task's module
    balance: bool = False  # scale every task's gradient to the norm that the first one's has at `shared`


class Task:
    """Built from the whole configuration, a frozen latent space and the validation pictures.

    `name` is its file's name, `keys` the fields of a batch it reads. Latents in a batch ("latent") are in the encoder's
    own units; `space.normalizer` standardises them.
    """

    name: str = ""
    keys: tuple[str, ...] = ("image", "latent")
    encodes: bool = True  # False: the loop need not encode what no cache has
    phases: list[Phase]
    window: tuple[int, int | None] = (0, None)  # images of the run in which the task takes part, counted from its start

    def __init__(self, config: DictConfig, space: LatentSpace, val: DataSource | None):
        self.config, self.space, self.val, self.seed = config, space, val, config.seed

    def members(self) -> list[Task]:
        """The tasks that take part in the loop, each with its own pictures, order and random stream."""
        return [self]

    def groups(self) -> list[Group]:
        """What is optimised, in the order of the steps."""
        return [
            Group(f"{self.name}.{phase.name}", phase, [Turn(self, phase.name, phase.optim.clip)])
            for phase in self.phases
        ]

    def view(self, data):
        """The training pictures as this task sees them: some of them, or with other labels."""
        return data

    def begin(self, phase: str) -> None:
        """Called before the micro-batches of a step."""

    def loss(self, phase: str, batch: dict[str, Tensor], rng: PictureRNG, images: int) -> dict[str, Tensor]:
        """Loss terms of one micro-batch, means over its pictures; "loss" is trained on, the rest is logged.

        A term may be two numbers, a sum and a count, both divided by the pictures: their ratio over all logged steps is
        the number of the log, and none stands there where the count is 0.

        `images` is the number of pictures trained on before this step (schedules are counted in it).
        """
        raise NotImplementedError

    def end(self, phase: str, mean: Callable[[Tensor], Tensor]) -> None:
        """Called after the micro-batches; `mean` averages a tensor over the processes."""

    def state_dict(self) -> dict:
        """What a checkpoint needs beside weights and optimisers."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Undo `state_dict`."""

    def sample(self, modules: dict[str, nn.Module], file: Path) -> None:
        """Draw what the task makes into a PNG; `modules` are the phases' averaged weights."""

    def heads(self, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """The heads of a `UnifiedModel`, from the phases' averaged weights."""
        raise NotImplementedError

    def head_settings(self) -> dict[str, dict]:
        """{head: {"settings": its dataclass as a dictionary, "facts": what else `from_config` needs}}."""
        raise NotImplementedError

    def facts(self) -> dict:
        """Provenance for the saved model, e.g. {"trained_with": families of networks that took part}."""
        return {}

    @staticmethod
    def evaluate(model: UnifiedModel, config: DictConfig, accelerator: Accelerator) -> Records:
        """Judge a model's heads of this task on `eval.split`; the result is whole on every process."""
        raise NotImplementedError
