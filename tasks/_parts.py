"""Generation and understanding as parts of joint training on one trunk (see `joint.py`)."""

from __future__ import annotations

from omegaconf import DictConfig
from torch import Tensor, nn

from umm.data.base import DataSource
from umm.heads.dit import DiT
from umm.latents.base import LatentSpace
from umm.loader import View, permutation
from umm.rng import PictureRNG
from umm.tasks.base import Task
from umm.tasks.gen import Gen
from umm.tasks.und import TrunkReader, Und


class SharedTrunk(nn.Module):
    """A DiT and the reader of one of its blocks."""

    def __init__(self, dit: DiT, reader: nn.Module, block: int, time: float):
        super().__init__()
        self.dit, self.reader, self.block, self.time = dit, reader, block, time

    def read(self) -> TrunkReader:
        """The reader with the trunk below it."""
        return TrunkReader(self.dit, self.reader, self.block, self.time)


class PartGen(Gen):
    """Generation as a part: perhaps of something that is no picture's latent."""

    placebo = "none"

    def clean(self, batch: dict[str, Tensor], rng: PictureRNG) -> Tensor:
        z = super().clean(batch, rng)  # (B, C, h, w)
        if self.placebo == "gaussian":
            return rng.fork("placebo").randn(*z.shape[1:])
        if self.placebo == "shuffled_tokens":
            order = rng.fork("placebo").rand(z[0, 0].numel()).argsort(1)  # (B, N)
            return z.flatten(2).gather(2, order[:, None].expand(-1, z.shape[1], -1)).view_as(z)
        return z


class PartUnd(Und):
    """Understanding as a part: its trunk is somebody else's."""

    def __new__(cls, *arguments) -> Task:
        return object.__new__(cls)

    def __init__(self, config: DictConfig, space: LatentSpace, val: DataSource | None, dit: DiT, permuted: bool):
        self.dit, self.permuted = dit, permuted
        super().__init__(config, space, val)

    def build_dit(self) -> DiT:
        return self.dit

    def thaw(self, dit: DiT) -> None:
        """Everything stays trainable: what the reader does not see, `gen` does."""

    def view(self, data):
        data = super().view(data)
        return with_permuted_labels(data, self.seed) if self.permuted else data


def with_permuted_labels(data, seed: int) -> View:
    """The same pictures, each with the label of another one."""
    return View(data, order=permutation(len(data), seed, "placebo", 0))
