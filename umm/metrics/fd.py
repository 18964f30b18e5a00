"""Frechet distance between two collections of features: FID, rFID, FD-DINOv2, FWD, by the name of the space.

P packets of features (1 for a network), D their width, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from umm.metrics._store import FeatureStore, Moments
from umm.metrics.base import SetMetric


class Gaussian:
    """The normal law fitted to a collection: mean (P, D), covariance (P, D, D) with ddof = 1, of `count` pictures."""

    def __init__(self, mean: Tensor, covariance: Tensor, count: int | None = None):
        self.mean, self.covariance, self.count = mean, covariance, count

    @classmethod
    def of(cls, moments: Moments) -> Gaussian:
        return cls(moments.mean, moments.covariance, moments.count)

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh((self.covariance + self.covariance.mT) / 2)
        rank = values.shape[-1] if self.count is None else min(values.shape[-1], self.count - 1)
        return values[:, -rank:].clamp_min(0), vectors[:, :, -rank:]  # of N pictures no more than N - 1 are not noise

    @cached_property
    def factor(self) -> Tensor:
        """A with A A^T = covariance, (P, D, r)."""
        values, vectors = self._eigen
        return vectors * values.sqrt()[:, None, :]

    @cached_property
    def bias(self) -> float:
        """b = 1.5 tr S + 1/2 sum_{i != j} l_i l_j / (l_i + l_j), mean over packets: E[FD of N pictures] - FD ~ b / N.

        Second-order perturbation for normal features, l the eigenvalues of S; trust it for N of at least 2 D.
        """
        values = self._eigen[0]
        a, b = values[:, :, None], values[:, None, :]
        pairs = a * b / (a + b).clamp_min(torch.finfo(values.dtype).tiny)
        pairs = pairs.sum((1, 2)) - pairs.diagonal(dim1=1, dim2=2).sum(1)
        return float((1.5 * values.sum(1) + 0.5 * pairs).mean())


def frechet(a: Gaussian, b: Gaussian) -> Tensor:
    """|mu_a - mu_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2 per packet, (P,), never below 0.

    With A = F F^T and B = G G^T the last trace is the nuclear norm of F^T G. Nothing is squared and no product is
    taken for symmetric, so rank-deficient covariances (fewer pictures than features) keep full accuracy.
    """
    overlap = torch.linalg.svdvals(a.factor.mT @ b.factor).sum(-1)
    traces = a.factor.square().sum((1, 2)) + b.factor.square().sum((1, 2))
    return ((a.mean - b.mean).square().sum(-1) + traces - 2 * overlap).clamp_min(0)


class FrechetDistance(SetMetric):
    """fd         distance of all fake from all real pictures; mean over packets where the space has several
    fd_bias    how much of it is to be expected from the finite numbers of pictures alone; for samples, not for
               reconstructions, whose errors of estimation are those of their originals
    fd_floor   distance of one random half of the real pictures from the other half
    fd_excess  distance of a half of the fakes from a half of the reals, minus fd_floor: 0 if fakes are like reals

    The halves are drawn by picture id, a fake never meets its own original, and numbers of pictures are the same on
    both sides of the difference (to second order where real and fake ids differ), so finite-sample bias cancels.
    Frechet distance sees two moments only: read it beside coverage and MIND.
    """

    name = "fd"
    numbers = ("fd", "fd_bias", "fd_floor", "fd_excess")
    higher_is_better = False
    needs_rows = False

    def compute(self, store: FeatureStore) -> dict[str, float]:
        real, fake = (Gaussian.of(store.moments(side)) for side in ("real", "fake"))
        numbers = {"fd": float(frechet(real, fake).mean())}
        if store.independent("real", "fake"):
            numbers["fd_bias"] = real.bias / real.count + fake.bias / fake.count
        if min(store.moments(side, half).count for side in self.sides for half in (0, 1)) >= 2:
            real_a, real_b, fake_a, fake_b = (
                Gaussian.of(store.moments(side, half)) for side in self.sides for half in (0, 1)
            )
            crossed = (frechet(fake_a, real_b) + frechet(fake_b, real_a)) / 2
            floor = frechet(real_a, real_b)
            numbers |= {"fd_floor": float(floor.mean()), "fd_excess": float((crossed - floor).mean())}
        return numbers

    def better(self, number: str) -> bool | None:
        return None if number in ("fd_bias", "fd_floor") else False

    def protocol(self) -> dict[str, object]:
        return {"estimator": "plug-in ddof=1"}

    def notes(self, numbers: Mapping[str, float]) -> list[str]:
        if numbers.get("fd_bias", 0) < 0.5 * numbers["fd"]:
            return []
        return [
            f"about {numbers['fd_bias']:.3g} of the Frechet distance {numbers['fd']:.3g} is what so few pictures give "
            "by themselves: read fd_excess, or evaluate more pictures."
        ]
