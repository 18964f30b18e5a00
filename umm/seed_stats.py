"""Tests, intervals and scores whose unit is the training seed, in float64 numpy: few values, all pairs.

S paired seeds, K arms of a learning curve. Percentile bootstraps are no good at such S (their nominal 5 % is 10 to
20 %), so intervals are Student's or the jackknife's and the test of no difference is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from umm.errors import UmmError
from umm.paired import equivalence_p
from umm.stats import Interval, t_interval

QUANTILES = 4000
MOST_SEEDS = 20  # 2^20 signings are a second; beyond that a t test does as well


# ------------------------------------------------------------------------------------------------------- one mean


def mean_of(values: Sequence[float], alpha: float = 0.05) -> dict:
    """Mean and Student's interval; without an interval below two values."""
    if len(values) < 2:
        return {"mean": float(values[0]) if len(values) else None, "low": None, "high": None, "n": len(values)}
    interval = t_interval(values, 1 - alpha)
    return {"mean": interval.value, "low": interval.low, "high": interval.high, "n": len(values)}


# --------------------------------------------------------------------------------------------- one mean difference


def exact_sign_flip_p(differences) -> np.ndarray | float:
    """Two-sided p of paired differences (..., S) symmetric about 0: the share of all 2^S signings at least as far out.

    Fisher's permutation test (The Design of Experiments, 1935, section 21). It cannot fall below 2 / 2^S.
    """
    x = np.asarray(differences, dtype=np.float64)
    seeds = x.shape[-1]
    if not 1 <= seeds <= MOST_SEEDS:
        raise UmmError(f"an exact sign-flip test takes 1 to {MOST_SEEDS} seeds, got {seeds}.")
    bits = np.arange(2 ** (seeds - 1))[:, None] >> np.arange(seeds)  # the last sign is +: -x is as far out as x
    sums = np.abs(x @ (1.0 - 2.0 * (bits & 1)).T)  # (..., 2^(S-1))
    p = np.mean(sums >= np.abs(x.sum(-1, keepdims=True)) * (1 - 1e-12), axis=-1)
    return float(p) if x.ndim == 1 else p


def smallest_p(seeds: int) -> float:
    """The least two-sided p of the exact sign-flip test: 0.25 at 3 seeds, 0.0625 at 5, 0.0078 at 8."""
    return 2 / 2**seeds


def t_p(differences) -> np.ndarray | float:
    """Two-sided p of Student's paired t test of (..., S) differences; 0 or 1 where they do not vary."""
    from scipy.stats import t

    x = np.asarray(differences, dtype=np.float64)
    mean, error = x.mean(-1), x.std(-1, ddof=1) / math.sqrt(x.shape[-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error > 1e-12 * np.abs(mean), np.abs(mean) / error, np.where(mean == 0, 0.0, np.inf))
    p = 2 * t.sf(ratio, x.shape[-1] - 1)
    return float(p) if x.ndim == 1 else p


def equivalence(differences, margin: float) -> float:
    """p of two one-sided t tests (Schuirmann 1987) that the mean is at least `margin` from 0; small: equivalent."""
    x = np.asarray(differences, dtype=np.float64)
    return equivalence_p(float(x.mean()), float(x.std(ddof=1)) / math.sqrt(len(x)), len(x), margin)


def no_harm(differences, margin: float) -> float:
    """p of one t test that the mean is at most -margin; small: no loss as large as the margin."""
    from scipy.stats import t

    x = np.asarray(differences, dtype=np.float64)
    above, error = float(x.mean()) + margin, float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(t.sf(above / error, len(x) - 1)) if error else float(above <= 0)


def jackknife_t(statistic: Callable[[np.ndarray], float], rows: np.ndarray, level: float = 0.95) -> Interval:
    """Interval of a statistic of (S, ...) seeds: leave-one-out error, Student's t with S - 1 (Efron & Tibshirani 1993,
    chapter 11). For a mean it is `umm.stats.t_interval`.

    The statistic is computed anew, curves and all, on every leave-one-out.
    """
    from scipy.stats import t

    seeds = len(rows)
    if seeds < 2:
        raise UmmError(f"an interval over seeds needs at least 2, got {seeds}: run more.")
    value = statistic(rows)
    left_out = np.array([statistic(np.delete(rows, i, axis=0)) for i in range(seeds)])
    error = math.sqrt((seeds - 1) / seeds * float(((left_out - left_out.mean()) ** 2).sum()))
    half = float(t.ppf((1 + level) / 2, seeds - 1)) * error
    return Interval(float(value), float(value) - half, float(value) + half, seeds, level)


# ------------------------------------------------------------------------------------------------------ many tests


def intersection_union(p_values) -> float:
    """p of "all of them": the largest; no correction is needed (Berger 1982)."""
    return float(max(p_values))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p values that keep the chance of any false rejection (Holm 1979)."""
    order, adjusted, running = sorted(p_values, key=p_values.__getitem__), {}, 0.0
    for rank, name in enumerate(order):
        running = max(running, (len(order) - rank) * p_values[name])
        adjusted[name] = min(1.0, running)
    return {name: adjusted[name] for name in p_values}


def benjamini_hochberg(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p values that keep the share of false ones among the rejections (Benjamini & Hochberg 1995)."""
    order, adjusted, running = sorted(p_values, key=p_values.__getitem__), {}, 1.0
    for rank in range(len(order), 0, -1):
        running = min(running, len(order) / rank * p_values[order[rank - 1]])
        adjusted[order[rank - 1]] = running
    return {name: adjusted[name] for name in p_values}


# ----------------------------------------------------------------------------------------------------------- power


def power(effect: float, seeds: int, alpha: float = 0.05) -> float:
    """Chance that a two-sided paired t test sees a mean of `effect` standard deviations of the differences."""
    from scipy.stats import chi2, norm, t

    freedom, shift = seeds - 1, effect * math.sqrt(seeds)
    squares = chi2.ppf((np.arange(QUANTILES) + 0.5) / QUANTILES, freedom)  # of the sample's variance, equally likely
    limits = t.ppf(1 - alpha / 2, freedom) * np.sqrt(squares / freedom)
    return float(np.mean(norm.sf(limits - shift) + norm.cdf(-limits - shift)))


def detectable(seeds: int, chance: float = 0.8, alpha: float = 0.05) -> float:
    """The effect that a two-sided paired t test sees with that chance, in standard deviations of the differences."""
    from scipy.optimize import brentq

    return float(brentq(lambda effect: power(effect, seeds, alpha) - chance, 0, 1e6, xtol=1e-6))


# ---------------------------------------------------------------------------------------------------------- scores


def log_error_ratio(single, joint) -> np.ndarray:
    """s = log(error alone / error together), (S,): positive where together is better.

    Raises:
        UmmError: an error that is not positive has no logarithm.
    """
    single, joint = np.asarray(single, dtype=np.float64), np.asarray(joint, dtype=np.float64)
    bad = np.concatenate([single[~(single > 0)], joint[~(joint > 0)]])
    if len(bad):
        raise UmmError(f"an error of {bad[0]:g} has no logarithm: choose an endpoint off its ceiling, or give a floor.")
    return np.log(single) - np.log(joint)


@dataclass(frozen=True)
class Reading:
    """Compute read off a curve; where the curve ends, `sign` says on which side of `value` it lies."""

    value: float
    sign: str = ""  # "", "<" or ">"


@dataclass(frozen=True)
class LearningCurve:
    """log error over log compute, falling; straight between the arms, unknown beyond them."""

    log_compute: np.ndarray  # (K,), rising
    log_error: np.ndarray  # (K,), never rising

    @classmethod
    def fit(cls, compute, log_errors) -> LearningCurve:
        """Through the seeds' mean log errors (S, K), pooled where they rise (isotonic regression, Barlow 1972)."""
        from scipy.optimize import isotonic_regression

        order = np.argsort(compute)
        means = np.asarray(log_errors, dtype=np.float64).mean(0)[order]
        falling = isotonic_regression(means, increasing=False).x
        return cls(np.log(np.asarray(compute, dtype=np.float64)[order]), falling)

    def inverse(self, log_error: float) -> Reading:
        """The least compute whose error is that small."""
        x, y = self.log_compute, self.log_error
        if log_error < y[-1]:
            return Reading(float(np.exp(x[-1])), ">")
        if log_error > y[0]:
            return Reading(float(np.exp(x[0])), "<")
        right = int(np.argmax(y <= log_error))  # the first arm that is as good
        if right == 0 or y[right] == log_error:
            return Reading(float(np.exp(x[right])))
        share = (y[right - 1] - log_error) / (y[right - 1] - y[right])
        return Reading(float(np.exp(x[right - 1] + share * (x[right] - x[right - 1]))))


def budget_equivalent(readings, compute: float) -> Reading:
    """Sigma = sum of the specialists' compute C* that equals the joint model's errors, over its own compute C.

    1: worth specialists sharing the budget; 2 (of two tasks): each is as good as with the whole budget; more than 2 is
    "1 + 1 > 2". Beyond a curve's end it is a bound, and where bounds point both ways nothing is known ("?").
    """
    signs = {reading.sign for reading in readings} - {""}
    sign = "?" if len(signs) > 1 else next(iter(signs), "")
    return Reading(sum(reading.value for reading in readings) / compute, sign)
