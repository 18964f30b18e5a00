"""Precision, recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020), with k-nearest balls."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from umm.errors import UmmError
from umm.metrics._store import FeatureStore
from umm.metrics.base import SetMetric
from umm.settings import EvalSettings

TILE = 1 << 25  # distances held at once: 256 MB


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 of float64 (m, d) and (n, d) -> (m, n).

    Expanded to a matrix product, with what is below its rounding error set to exactly 0: a duplicate must lie at
    distance 0, else balls of radius 0 contain it or not by chance.
    """
    sizes = x.square().sum(1)[:, None] + y.square().sum(1)
    squared = sizes - 2 * (x @ y.T)
    return squared.where(squared > 1e-13 * sizes, 0)


def tiles(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances a block of rows of x at a time."""
    step = max(1, TILE // len(y))
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        yield rows, squared_distances(x[rows], y)


def ball_radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each row of x (n, d) to its k-th nearest other row, (n,)."""
    radii = torch.empty(len(x), dtype=x.dtype, device=x.device)
    for rows, squared in tiles(x, x):
        own = torch.arange(rows.start, rows.stop, device=x.device)
        squared[own - rows.start, own] = torch.inf
        radii[rows] = squared.topk(k, largest=False).values[:, -1]
    return radii


def prdc(real: Tensor, fake: Tensor, k: int) -> dict[str, float]:
    """Of features (m, d) and (n, d), float64; "within a ball" is strictly within, as in the authors' `prdc` package.

    precision  share of fakes within some real picture's ball      recall    the same with roles exchanged
    density    mean number of real balls around a fake, over k     coverage  share of real balls with a fake inside
    """
    if k >= min(len(real), len(fake)):
        raise UmmError(f"neighbors={k} needs more than {k} pictures on both sides, got {len(real)} and {len(fake)}.")
    centre = real.mean(0)  # keeps the products small, hence the differences exact
    real, fake = real - centre, fake - centre
    real_radii, fake_radii = ball_radii(real, k), ball_radii(fake, k)
    balls = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)  # real balls around each fake
    recalled, covered = [], []
    for rows, squared in tiles(real, fake):
        inside = squared < real_radii[rows, None]  # (tile, n)
        balls += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((squared < fake_radii).any(1))
    return {
        "precision": float((balls > 0).double().mean()),
        "recall": float(torch.cat(recalled).double().mean()),
        "density": float(balls.double().mean() / k),
        "coverage": float(torch.cat(covered).double().mean()),
    }


class PRDC(SetMetric):
    """Comparable at equal numbers of pictures and equal k only; coverage is the robust one of the four."""

    name = "prdc"
    numbers = ("precision", "recall", "density", "coverage")

    def __init__(self, k: int = 5):
        self.k = k

    @classmethod
    def from_settings(cls, settings: EvalSettings, device: torch.device | str = "cpu") -> PRDC:
        return cls(settings.neighbors)

    def compute(self, store: FeatureStore) -> dict[str, float]:
        return prdc(store.rows("real"), store.rows("fake"), self.k)

    def protocol(self) -> dict[str, object]:
        return {"k": self.k, "balls": "strict"}
