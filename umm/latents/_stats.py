"""Latent statistics from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from umm.errors import DataError
from umm.latents.base import RunningStats
from umm.pretrained import read_tensors


def load_stats(source: str | Path | Mapping[str, Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Mean and population variance, each broadcasting to (C, h, w), or None for mean 0 or variance 1.

    Args:
        source: an official `stat.pt` ({"mean", "var"}, each None or absent where it was not measured), a
            `stats.safetensors` of ours (count, mean, m2), or such a dictionary.

    Raises:
        MissingWeights: the file cannot be read.
        DataError: it holds no statistics.
    """
    state = source if isinstance(source, Mapping) else read_tensors(Path(source).expanduser())
    if not isinstance(state, Mapping) or not {"mean", "var", "m2"} & set(state):
        raise DataError(f"{_name(source)} holds no latent statistics: it needs mean and var, or count, mean and m2.")
    if "m2" in state:
        stats = RunningStats.from_state(state)
        return stats.mean, stats.var
    return state.get("mean"), state.get("var")


def _name(source: object) -> str:
    return "the dictionary" if isinstance(source, Mapping) else str(source)
