"""Distance of generated pictures to the nearest training picture: does the generator copy?"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from umm.metrics._store import FeatureStore
from umm.metrics.base import SetMetric
from umm.metrics.prdc import tiles

QUANTILE = 1e-3  # of held-out real pictures; what lies nearer to the training set is called a copy
ALARM = 1e-3  # probability of so many copies if fakes were like held-out pictures


def nearest_distances(x: Tensor, train: Tensor) -> Tensor:
    """Distance of each row of x (n, d) to the nearest row of train, (n,), float64."""
    centre = train.mean(0)
    return torch.cat([squared.amin(1) for _, squared in tiles(x - centre, train - centre)]).sqrt()


def copies(fake: Tensor, real: Tensor) -> tuple[int, float]:
    """How many fakes lie nearer to the training set than the 0.1 % quantile of held-out pictures, and how likely.

    With the j-th smallest of n exchangeable distances as threshold, the number of m others below it is beta-binomial
    with parameters (m, j, n - j + 1), whatever the law of the distances: the probability is exact.
    """
    from scipy.stats import betabinom

    rank = max(1, math.ceil(QUANTILE * len(real)))
    count = int((fake < real.sort().values[rank - 1]).sum())
    return count, float(betabinom.sf(count - 1, len(fake), rank, len(real) - rank + 1))


class Nearest(SetMetric):
    """Needs three collections in the store: fake, real (held out) and train.

    nearest_ratio  median distance of fakes to the training set over that of held-out pictures; below 1 is suspicious
    copied         share of fakes nearer than all but 0.1 % of the held-out pictures
    copied_p       probability of at least so many if fakes were as new as held-out pictures
    """

    name = "nearest"
    numbers = ("nearest_ratio", "copied", "copied_p")
    sides = ("real", "fake", "train")

    def compute(self, store: FeatureStore) -> dict[str, float]:
        train = store.rows("train")
        fake, real = (nearest_distances(store.rows(side), train) for side in ("fake", "real"))
        count, probability = copies(fake, real)
        typical = float(real.median())
        ratio = float(fake.median()) / typical if typical else math.nan
        return {"nearest_ratio": ratio, "copied": count / len(fake), "copied_p": probability}

    def better(self, number: str) -> bool | None:
        return {"copied": False, "copied_p": True}.get(number)

    def notes(self, numbers: Mapping[str, float]) -> list[str]:
        if numbers["copied_p"] >= ALARM:
            return []
        return [
            f"memorisation alarm: {numbers['copied']:.1%} of the samples lie nearer to a training picture than "
            f"{1 - QUANTILE:.1%} of held-out pictures do (p = {numbers['copied_p']:.1e}); look at them beside it."
        ]
