"""Intervals and tests for means over pictures, in float64 numpy; randomness comes from a generator argument.

n pictures, m numbers measured on each, r resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from umm.errors import UmmError

CHUNK = 1 << 22  # indices drawn at once
NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """A mean, its confidence interval (`level` two-sided) and the number of pictures."""

    value: float
    low: float
    high: float
    n: int
    level: float = 0.95


def t_interval(values, level: float = 0.95) -> Interval:
    """Student's interval of the mean of (n,) values; exact for normal values, good from some 30 pictures on."""
    from scipy.stats import t

    x = _checked(values)
    half = t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half), len(x), level)


def bootstrap(
    values, generator: np.random.Generator, resamples: int = 1000, level: float = 0.95, bca: bool = True
) -> Interval:
    """Bootstrap interval of the mean of (n,) values over pictures (Efron & Tibshirani 1993, chapter 14).

    Args:
        bca: bias-corrected and accelerated, which follows skewed values; False: plain percentiles.
    """
    x = _checked(values)
    mean, means = x.mean(), resampled_means(x, generator, resamples)
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if bca:
        tails = _bca_tails(x, float(mean), means, tails)
    low, high = np.quantile(means, tails)
    return Interval(float(mean), float(low), float(high), len(x), level)


def resampled_means(x: np.ndarray, generator: np.random.Generator, resamples: int) -> np.ndarray:
    """Means (r,) or (r, m) of resampled rows of x (n,) or (n, m), a bounded number of indices at a time."""
    step = max(1, CHUNK // len(x))
    draws = [generator.integers(len(x), size=(min(step, resamples - i), len(x))) for i in range(0, resamples, step)]
    return np.concatenate([x[rows].mean(axis=1) for rows in draws])


def _bca_tails(x: np.ndarray, mean: float, means: np.ndarray, tails: np.ndarray) -> np.ndarray:
    """Corrected quantiles to read the interval from; for a mean the jackknife's acceleration is its skewness / 6."""
    deviations = x - mean
    spread = float((deviations**2).sum())
    if spread <= (1e-12 * abs(mean)) ** 2 * len(x):  # all values equal: nothing to correct
        return tails
    acceleration = float((deviations**3).sum()) / (6 * spread**1.5)
    tie = 1e-9 * math.sqrt(spread)  # few values give the mean again, up to rounding
    below = (np.sum(means < mean - tie) + 0.5 * np.sum(np.abs(means - mean) <= tie)) / len(means)
    bias = NORMAL.inv_cdf(min(max(below, 0.5 / len(means)), 1 - 0.5 / len(means)))
    shifted = [bias + NORMAL.inv_cdf(tail) for tail in tails]
    return np.array([NORMAL.cdf(bias + z / (1 - acceleration * z)) for z in shifted])


# --------------------------------------------------------------------------------------------- paired comparisons


def paired_differences(first: Mapping[str, float], second: Mapping[str, float]) -> np.ndarray:
    """first - second per picture, (n,), ids sorted; both must hold the same pictures."""
    if first.keys() != second.keys():
        lonely = sorted(first.keys() ^ second.keys())
        raise UmmError(
            f"a paired comparison needs the same pictures on both sides, but {len(lonely)} are on one only, "
            f"e.g. '{lonely[0]}': evaluate both on the same split."
        )
    return np.array([first[i] - second[i] for i in sorted(first)], dtype=np.float64)


def sign_flip_p(differences, generator: np.random.Generator, resamples: int = 10_000) -> float:
    """Two-sided p of mean difference 0: how often a mean with random signs is as far from 0, the data counted once."""
    x = _checked(differences)
    observed, step = abs(x.sum()) * (1 - 1e-12), max(1, CHUNK // len(x))
    extreme = 0
    for start in range(0, resamples, step):
        signs = 1 - 2 * generator.integers(2, size=(min(step, resamples - start), len(x)))
        extreme += int(np.sum(np.abs(signs @ x) >= observed))
    return (extreme + 1) / (resamples + 1)


def standardised(differences) -> float:
    """Mean difference in units of the differences' standard deviation (Cohen's d of pairs)."""
    x = _checked(differences)
    spread = x.std(ddof=1)
    return float(x.mean() / spread) if spread else math.copysign(math.inf, x.mean()) if x.mean() else 0.0


def _checked(values) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) < 2:
        raise UmmError(f"an interval needs at least 2 pictures, got {x.size}: evaluate more.")
    if not np.isfinite(x).all():
        raise UmmError(f"{int((~np.isfinite(x)).sum())} of {len(x)} values are not finite: no interval is made.")
    return x
