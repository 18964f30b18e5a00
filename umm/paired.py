"""Intervals and paired tests for scores of items that belong to pictures, in float64 numpy.

n items, c pictures (clusters), r resamples. Several items of one picture (questions) are not independent: the unit of
everything here is the picture, which brings all its items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from umm.errors import UmmError
from umm.stats import NORMAL, Interval, resampled_means


def wilson(correct: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's interval of a proportion (1927): right near 0 and 1, where resampling gives no width."""
    if n < 1:
        raise UmmError("an interval needs at least one item.")
    z, p = NORMAL.inv_cdf((1 + level) / 2), correct / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, max(0.0, middle - half), min(1.0, middle + half), n, level)


def by_cluster(scores, clusters: Sequence[str]) -> np.ndarray:
    """(c, 2): sum of the scores and number of the items of each picture, pictures sorted."""
    scores = np.asarray(scores, dtype=np.float64)
    if len(scores) != len(clusters) or len(scores) == 0:
        raise UmmError(f"{len(scores)} scores and {len(clusters)} pictures: every item needs both.")
    _, where = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    return np.stack([np.bincount(where, scores), np.bincount(where)], axis=1).astype(np.float64)


def clustered_bootstrap(
    scores, clusters: Sequence[str], generator: np.random.Generator, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Percentile interval of the mean score, pictures resampled; n counts items."""
    table = by_cluster(scores, clusters)
    sums = resampled_means(table, generator, resamples)  # (r, 2)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(table[:, 0].sum() / table[:, 1].sum()), float(low), float(high), len(clusters), level)


def clustered_error(scores, clusters: Sequence[str]) -> float:
    """Standard error of the mean score with whole pictures as the unit (the sandwich estimator, c / (c - 1))."""
    table = by_cluster(scores, clusters)
    c, mean = len(table), table[:, 0].sum() / table[:, 1].sum()
    if c < 2:
        raise UmmError("a paired test needs items of at least 2 pictures.")
    residuals = table[:, 0] - mean * table[:, 1]
    return math.sqrt(c / (c - 1) * float((residuals**2).sum())) / float(table[:, 1].sum())


def mcnemar(first, second, clusters: Sequence[str]) -> tuple[int, int, float]:
    """Items that only the first has right, only the second, and McNemar's two-sided p; scores are 0 or 1.

    Exact where every picture has one item; else Obuchowski's chi-squared, whose unit is the picture (Statistics in
    Medicine 17, 1998, equation 4): (sum of d_k)^2 / sum of d_k^2, d_k the difference of the two counts in picture k.
    """
    from scipy.stats import binomtest, chi2

    first, second = np.asarray(first), np.asarray(second)
    only_first, only_second = int((first > second).sum()), int((second > first).sum())
    if only_first + only_second == 0:
        return 0, 0, 1.0
    if len(set(clusters)) == len(clusters):
        return only_first, only_second, float(binomtest(only_first, only_first + only_second, 0.5).pvalue)
    d = by_cluster(first - second, clusters)[:, 0]
    p = float(chi2.sf(d.sum() ** 2 / (d**2).sum(), 1)) if d.any() else 1.0
    return only_first, only_second, p


def equivalence_p(difference: float, error: float, clusters: int, margin: float) -> float:
    """p of two one-sided t tests (TOST) that |difference| is at least `margin`: small means equivalent."""
    from scipy.stats import t

    if error == 0:
        return 0.0 if abs(difference) < margin else 1.0
    return float(t.sf((margin - abs(difference)) / error, clusters - 1))  # the larger of the two


@dataclass(frozen=True)
class Comparison:
    """Two results on the same items; `difference` is first - second. `mcnemar` is None where scores are not 0 or 1."""

    first: float
    second: float
    difference: Interval
    p: float  # two-sided, of no difference, clustered t
    mcnemar: tuple[int, int, float] | None
    equivalence: float
    margin: float
    clusters: int


def compare(first, second, clusters: Sequence[str], generator, margin: float, resamples: int = 10_000) -> Comparison:
    """Paired comparison of (n,) scores of the same items."""
    from scipy.stats import t

    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    differences = first - second
    interval = clustered_bootstrap(differences, clusters, generator, resamples)
    error, c = clustered_error(differences, clusters), len(set(clusters))
    p = float(2 * t.sf(abs(interval.value) / error, c - 1)) if error else float(interval.value == 0)
    binary = np.isin(np.concatenate([first, second]), (0.0, 1.0)).all()
    discordant = mcnemar(first, second, clusters) if binary else None
    equivalent = equivalence_p(interval.value, error, c, margin)
    return Comparison(float(first.mean()), float(second.mean()), interval, p, discordant, equivalent, margin, c)
