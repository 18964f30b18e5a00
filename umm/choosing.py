"""Best of N: what a judge's choice from a pool is worth, and how spread out the chosen are; float64 numpy.

R requests, P candidates for each, in the order they were drawn. The pool of size N is the first N of them, so pools are
nested and every judge chooses from the same ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from umm.errors import UmmError
from umm.paired import equivalence_p
from umm.seed_stats import jackknife_t, no_harm
from umm.stats import NORMAL, Interval, bootstrap


def pool_sizes(largest: int) -> list[int]:
    """1, 2, 4, ... and the largest itself."""
    return sorted({2**k for k in range(largest.bit_length())} | {largest})


def favourites(scores: np.ndarray, size: int) -> np.ndarray:
    """(R, N) bool: the candidates that no other of the first N beats in scores (R, P)."""
    pool = scores[:, :size]
    return pool == pool.max(axis=1, keepdims=True)


def worth(scores: np.ndarray, outcomes: np.ndarray, size: int) -> np.ndarray:
    """Expected outcome (R,) of taking the best of N by `scores`, ties drawn evenly; both (R, P).

    Equal scores everywhere are thus exactly the random choice: the mean of the pool.
    """
    best = favourites(scores, size)
    return (best * outcomes[:, :size]).sum(1) / best.sum(1)


def picks(scores: np.ndarray, ties: np.ndarray, size: int) -> np.ndarray:
    """(R,) the candidate taken, ties going to the largest of `ties` (R, P)."""
    return np.where(favourites(scores, size), ties[:, :size], -np.inf).argmax(1)


def gap_closed(chosen: np.ndarray, random: np.ndarray, oracle: np.ndarray) -> Interval | None:
    """(chosen - random) / (oracle - random) of the means of (R,) each, jackknifed; None where there is no gap."""

    def share(rows: np.ndarray) -> float:
        gap = rows[:, 2].mean() - rows[:, 1].mean()
        return (rows[:, 0].mean() - rows[:, 1].mean()) / gap if gap > 1e-12 else np.nan

    rows = np.stack([chosen, random, oracle], axis=1).astype(np.float64)
    found = jackknife_t(share, rows)
    return found if np.isfinite([found.value, found.low]).all() else None


def spread(distances: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance of two of the chosen that were asked for with the same class; `distances` (R, R), labels (R,).

    Raises:
        UmmError: no class was asked for twice.
    """
    pairs = (labels[:, None] == labels) & ~np.eye(len(labels), dtype=bool)
    if not pairs.any():
        raise UmmError("a distance within a class needs two requests of it: raise --per-class.")
    return float(distances[pairs].mean())


def spread_change(chosen: np.ndarray, random: np.ndarray, labels: np.ndarray) -> Interval:
    """Relative change of the spread from `random` to `chosen`, both distances (R, R); jackknifed over requests."""

    def change(rows: np.ndarray) -> float:
        block = np.ix_(rows, rows)
        return spread(chosen[block], labels[rows]) / spread(random[block], labels[rows]) - 1

    return jackknife_t(change, np.arange(len(labels)))


@dataclass(frozen=True)
class Verdict:
    """Whether the latent judge works: better than chance, no worse than looking at the picture again, and cheaper."""

    gain: Interval  # latent - random
    difference: Interval  # latent - re-encoded
    margin: float
    not_worse: float  # p that it is worse by the margin or more
    equivalent: float  # p that it differs by the margin or more, two one-sided tests
    flops: tuple[float, float]  # of judging one candidate: latent, re-encoded
    needed: int  # requests that would show "not worse" with a chance of 0.8 if the two judges are equal

    @property
    def beats_random(self) -> bool:
        return self.gain.low > 0

    @property
    def holds(self) -> bool:
        """All three at 5 %: an intersection-union test, no correction is due."""
        return self.beats_random and self.not_worse < 0.05 and self.cheaper

    @property
    def cheaper(self) -> bool:
        return self.flops[0] < self.flops[1]


def verdict(
    gain: Interval, difference: np.ndarray, flops: tuple[float, float], margin: float, generator: np.random.Generator,
    resamples: int = 1000,
) -> Verdict:  # fmt: skip
    """From the gain over random choice and the (R,) differences of outcomes, latent - re-encoded, on the same pools."""
    between, n = bootstrap(difference, generator, resamples), len(difference)
    variance = float(difference.var(ddof=1))
    equivalent = equivalence_p(between.value, math.sqrt(variance / n), n, margin)
    needed = math.ceil(variance * ((NORMAL.inv_cdf(0.95) + NORMAL.inv_cdf(0.8)) / margin) ** 2)
    return Verdict(gain, between, margin, no_harm(difference, margin), equivalent, flops, needed)
