"""Kernel distance (KID; Binkowski et al. 2018, arXiv 1801.01401)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from umm.metrics._store import FeatureStore
from umm.metrics.base import SetMetric

SUBSETS, SUBSET, SEED = 100, 1000, 2020  # the published protocol, torch-fidelity's seed
TILE = 4096  # rows of the kernel matrix at a time


def kid(x: Tensor, y: Tensor) -> float:
    """Unbiased MMD^2 of (m, d) and (n, d), float64, with k(x, y) = (x . y / d + 1)^3; may be negative.

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean k(x_i, y_j): all pairs, no subsets, no seed.
    """
    within = [(_kernel_sum(z, z) - kernel(z, z, paired=True).sum()) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return float(sum(within) - 2 * _kernel_sum(x, y) / (len(x) * len(y)))


def kernel(x: Tensor, y: Tensor, paired: bool = False) -> Tensor:
    """(m, n), or the m values k(x_i, y_i)."""
    products = (x * y).sum(1) if paired else x @ y.T
    return (products / x.shape[1] + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([kernel(a, b).sum() for a in x.split(TILE) for b in y.split(TILE)]).sum()


def kid_subsets(x: Tensor, y: Tensor, subsets: int, size: int, seed: int) -> tuple[float, float]:
    """Mean and standard deviation (not a standard error) of KID over random subsets, as published numbers are made."""
    draw = np.random.RandomState(seed)  # torch-fidelity's stream: its values are reproduced
    values = []
    for _ in range(subsets):
        a, b = (z[torch.from_numpy(draw.choice(len(z), size, replace=False)).to(z.device)] for z in (x, y))
        values.append(kid(a, b))
    return float(np.mean(values)), float(np.std(values))


class KID(SetMetric):
    """kid          over all pairs of pictures
    kid_subsets  mean over 100 seeded subsets of 1000, where both sides have more pictures than that; kid_subsets_sd

    Sees three moments only: read it beside coverage and MIND.
    """

    name = "kid"
    numbers = ("kid", "kid_subsets", "kid_subsets_sd")
    higher_is_better = False

    def compute(self, store: FeatureStore) -> dict[str, float]:
        fake, real = store.rows("fake"), store.rows("real")
        numbers = {"kid": kid(fake, real)}
        if min(len(fake), len(real)) > SUBSET:
            mean, spread = kid_subsets(fake, real, SUBSETS, SUBSET, SEED)
            numbers |= {"kid_subsets": mean, "kid_subsets_sd": spread}
        return numbers

    def better(self, number: str) -> bool | None:
        return None if number == "kid_subsets_sd" else False

    def protocol(self) -> dict[str, object]:
        return {"estimator": "unbiased, all pairs", "subsets": f"{SUBSETS}x{SUBSET} seed {SEED}"}
