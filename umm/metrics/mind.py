"""MIND (arXiv 2605.06797): sliced Wasserstein distance of features, which sees what two or three moments do not."""

from __future__ import annotations

import torch
from torch import Tensor

from umm.metrics._store import FeatureStore
from umm.metrics.base import SetMetric
from umm.rng import generator

DIRECTIONS, SEED = 1000, 2020
CHUNK = 100  # directions at a time


def mind(x: Tensor, y: Tensor, directions: Tensor) -> float:
    """3 d mean_u W2^2(x u, y u) of (n, d) and (n, d), float64, over unit directions (M, d)."""
    squares = [
        ((x @ u.T).sort(dim=0).values - (y @ u.T).sort(dim=0).values).square().mean(0) for u in directions.split(CHUNK)
    ]
    return float(3 * x.shape[1] * torch.cat(squares).mean())


class MIND(SetMetric):
    """Over 1000 seeded directions; the larger side is thinned, seeded, to the size of the smaller.

    A set that copies mean and covariance of the real one scores a Frechet distance of 0 and is found out here.
    """

    name = "mind"
    numbers = ("mind",)
    higher_is_better = False

    def compute(self, store: FeatureStore) -> dict[str, float]:
        sides = [store.rows(side) for side in self.sides]
        size, width = min(map(len, sides)), sides[0].shape[1]
        x, y = (_thinned(rows, size) for rows in sides)
        directions = torch.randn(DIRECTIONS, width, dtype=torch.float64, generator=generator(SEED, "mind", width))
        return {"mind": mind(x, y, (directions / directions.norm(dim=1, keepdim=True)).to(x.device))}

    def protocol(self) -> dict[str, object]:
        return {"directions": DIRECTIONS, "seed": SEED}


def _thinned(rows: Tensor, size: int) -> Tensor:
    if len(rows) == size:
        return rows
    return rows[torch.randperm(len(rows), generator=generator(SEED, "thin", len(rows)))[:size].to(rows.device)]
