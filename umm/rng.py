"""Randomness that belongs to a picture, not to a process.

Every random number of a run is a function of (seed, stream name, index): the index counts pictures, so neither batch
size, accumulation, number of processes nor an interruption changes what picture n sees, and no generator state has
to be saved. A stream name keeps tasks apart: adding a task does not move another task's numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; equal parts give equal seeds on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator seeded from `parts`."""
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))


@contextlib.contextmanager
def seeded_init(*parts: object) -> Iterator[None]:
    """Initialise weights inside this block: a function of `parts`, and the caller's global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(*parts))
        yield


class PictureRNG:
    """One random stream a picture: row b of every draw depends on (seed, stream, indices[b]) alone.

    Args:
        indices: the picture counters of this batch, length B.
        parts: what the stream belongs to, e.g. (seed, "gen").
        device: where the numbers are drawn. CPU numbers are the same everywhere; CUDA's differ from them.
    """

    def __init__(self, indices: Sequence[int], *parts: object, device: torch.device | str = "cpu"):
        self.indices, self.parts, self.device = list(indices), parts, torch.device(device)
        self._generators = [generator(*parts, i, device=device) for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def fork(self, name: str) -> PictureRNG:
        """An independent stream for the same pictures."""
        return PictureRNG(self.indices, *self.parts, name, device=self.device)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers, (B, *shape)."""
        return torch.stack([torch.randn(shape, generator=g, device=self.device, dtype=dtype) for g in self._generators])

    def rand(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform numbers in [0, 1), (B, *shape)."""
        return torch.stack([torch.rand(shape, generator=g, device=self.device, dtype=dtype) for g in self._generators])

    def randint(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high), (B, *shape), int64."""
        return torch.stack([torch.randint(high, shape, generator=g, device=self.device) for g in self._generators])
