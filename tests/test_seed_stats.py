"""Tests and intervals over a handful of seeds err as often as they say, and no more."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umm import seed_stats as s
from umm.errors import UmmError
from umm.paired import equivalence_p
from umm.stats import t_interval

SEEDS = (3, 5, 8)
ALPHA = 0.05


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def rate_is(found, expected: float, n: int) -> bool:
    """Within four Monte-Carlo standard errors."""
    return abs(np.mean(found) - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


# ------------------------------------------------------------------------------------------------------ known answers


def test_the_exact_test_equals_enumeration_over_all_signs():
    x = rng().normal(0.5, 1, (4, 6))
    for row in x:
        sums = [abs(sum(a * b for a, b in zip(row, signs))) for signs in itertools.product((1, -1), repeat=6)]
        assert s.exact_sign_flip_p(row) == pytest.approx(np.mean(np.array(sums) >= abs(row.sum()) - 1e-12))
    assert s.exact_sign_flip_p(x) == pytest.approx([s.exact_sign_flip_p(row) for row in x])


def test_the_exact_test_agrees_with_scipys():
    from scipy.stats import permutation_test

    x = rng(1).normal(0.4, 1, 7)
    theirs = permutation_test((x,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert s.exact_sign_flip_p(x) == pytest.approx(theirs.pvalue)


def test_few_seeds_cannot_reach_significance():
    for seeds, least in ((3, 0.25), (5, 0.0625), (6, 0.03125), (8, 0.0078125)):
        assert s.exact_sign_flip_p(1 + rng().random(seeds)) == s.smallest_p(seeds) == least


def test_too_many_seeds_for_enumeration_are_a_sentence():
    with pytest.raises(UmmError, match="1 to 20 seeds, got 21"):
        s.exact_sign_flip_p(np.ones(21))


def test_the_t_test_agrees_with_scipys_and_knows_constants():
    from scipy.stats import ttest_1samp

    x = rng().normal(0.3, 1, (3, 8))
    assert s.t_p(x) == pytest.approx(ttest_1samp(x, 0, axis=1).pvalue)
    assert s.t_p([0.1, 0.1, 0.1]) == 0 and s.t_p([0, 0, 0]) == 1


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(2, 9), st.integers(0, 1000))
def test_of_a_mean_the_jackknife_is_students_interval(seeds, seed):
    x = rng(seed).normal(size=seeds)
    mine, theirs = s.jackknife_t(np.mean, x), t_interval(x)
    assert (mine.value, mine.low, mine.high) == pytest.approx((theirs.value, theirs.low, theirs.high), abs=1e-9)


def test_holm_and_benjamini_hochberg_agree_with_hand_and_scipy():
    from scipy.stats import false_discovery_control

    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5}
    assert s.holm(p) == pytest.approx({"a": 0.04, "b": 0.09, "c": 0.09, "d": 0.5})
    assert list(s.benjamini_hochberg(p).values()) == pytest.approx(false_discovery_control(list(p.values())))
    assert s.intersection_union(p.values()) == 0.5 and s.holm({}) == {} == s.benjamini_hochberg({})


def test_the_power_of_the_t_test_agrees_with_the_noncentral_t():
    from scipy.stats import nct, t

    for seeds, effect in ((5, 1.0), (8, 1.156), (10, 0.5)):
        limit, shift = t.ppf(0.975, seeds - 1), effect * math.sqrt(seeds)
        expected = nct.sf(limit, seeds - 1, shift) + nct.cdf(-limit, seeds - 1, shift)
        assert s.power(effect, seeds) == pytest.approx(expected, abs=1e-3)
    assert [s.detectable(n) for n in (3, 5, 6, 8, 10)] == pytest.approx([3.26, 1.68, 1.43, 1.16, 1.00], abs=0.01)


def test_log_error_ratios_are_positive_where_together_is_better():
    assert s.log_error_ratio([0.2, 0.1], [0.1, 0.2]).tolist() == pytest.approx([math.log(2), -math.log(2)])
    with pytest.raises(UmmError, match="an error of 0 has no logarithm"):
        s.log_error_ratio([0.1, 0.0], [0.1, 0.1])


# ---------------------------------------------------------------------------------------------------- learning curves


def power_law(compute, exponent: float = 0.5) -> np.ndarray:
    return -exponent * np.log(np.asarray(compute, dtype=float))


def test_a_power_law_is_read_back_exactly():
    curve = s.LearningCurve.fit([4, 1, 2], power_law([4, 1, 2])[None])
    for compute in (1, 1.3, 2, 3.7, 4):
        reading = curve.inverse(float(power_law(compute)))
        assert reading.value == pytest.approx(compute) and reading.sign == ""


def test_nothing_is_extrapolated():
    curve = s.LearningCurve.fit([1, 2, 4], power_law([1, 2, 4])[None])
    assert curve.inverse(float(power_law(9))) == s.Reading(pytest.approx(4), ">")
    assert curve.inverse(float(power_law(0.5))) == s.Reading(pytest.approx(1), "<")


def test_a_curve_that_rises_is_pooled_and_read_at_the_least_compute():
    curve = s.LearningCurve.fit([1, 2, 4], np.log([[4.0, 1.0, 2.0]]))
    assert np.exp(curve.log_error) == pytest.approx([4, math.sqrt(2), math.sqrt(2)])
    assert curve.inverse(math.log(2) / 2).value == pytest.approx(2)


def test_sigma_is_two_where_each_task_is_as_good_as_with_the_whole_budget():
    full, half = s.Reading(1.0), s.Reading(0.5)
    assert s.budget_equivalent([full, full], 1.0) == s.Reading(2.0)
    assert s.budget_equivalent([half, half], 1.0) == s.Reading(1.0)
    assert s.budget_equivalent([s.Reading(4.0, ">"), full], 2.0) == s.Reading(2.5, ">")
    assert s.budget_equivalent([s.Reading(4.0, ">"), s.Reading(0.5, "<")], 2.0).sign == "?"


# -------------------------------------------------------------------------------------------------------- simulations


@pytest.mark.parametrize("seeds", SEEDS)
def test_under_no_effect_the_tests_reject_as_often_as_they_say(seeds):
    n = 20_000
    x = rng(seeds).normal(size=(n, seeds))
    assert rate_is(s.t_p(x) < ALPHA, ALPHA, n)
    reachable = math.floor(ALPHA * 2 ** (seeds - 1)) / 2 ** (seeds - 1)  # p is a multiple of 2 / 2^S
    exact = np.mean(s.exact_sign_flip_p(x) <= ALPHA)
    assert exact == 0 if not reachable else rate_is(s.exact_sign_flip_p(x) <= ALPHA, reachable, n)


@pytest.mark.parametrize("seeds", SEEDS)
def test_the_exact_test_needs_no_normal_noise(seeds):
    """Symmetric about zero is enough: heavy tails, and a spread of its own for every seed."""
    n = 20_000
    x = rng(seeds).standard_t(1.5, size=(n, seeds)) * np.linspace(1, 5, seeds)
    p = s.exact_sign_flip_p(x)
    for alpha in (0.05, 0.25, 0.5):
        assert np.mean(p <= alpha) < alpha + 4 * math.sqrt(alpha * (1 - alpha) / n)


@pytest.mark.parametrize("seeds", SEEDS)
def test_intervals_over_seeds_cover_the_truth_as_often_as_they_say(seeds):
    n = 1500
    x = rng(seeds).normal(0.3, 1, (n, seeds))
    found = [t_interval(row) for row in x]
    assert rate_is([i.low <= 0.3 <= i.high for i in found], 0.95, n)


@pytest.mark.parametrize("seeds", SEEDS)
def test_the_effect_called_detectable_is_seen_four_times_in_five(seeds):
    n = 10_000
    x = rng(seeds).normal(s.detectable(seeds), 1, (n, seeds))
    assert rate_is(s.t_p(x) < ALPHA, 0.8, n)


def test_the_exact_test_sees_a_planted_effect_with_eight_seeds():
    x = rng().normal(1.5, 1, (4000, 8))
    assert np.mean(s.exact_sign_flip_p(x) <= ALPHA) > 0.9


@pytest.mark.parametrize("seeds", SEEDS)
def test_equivalence_and_no_harm_are_claimed_wrongly_no_more_often_than_they_say(seeds):
    """The true difference is exactly the margin."""
    n, margin = 3000, 0.5
    x = rng(seeds).normal(margin, 0.2, (n, seeds))
    assert np.mean([s.equivalence(row, margin) < ALPHA for row in x]) < ALPHA + 4 * math.sqrt(ALPHA / n)
    assert rate_is([s.no_harm(-row, margin) < ALPHA for row in x], ALPHA, n)
    narrow = rng(seeds).normal(0, 0.05, (200, seeds))
    assert np.mean([s.equivalence(row, margin) < ALPHA for row in narrow]) > 0.9


def test_equivalence_is_the_one_of_paired_items():
    x = rng().normal(0.1, 1, 8)
    assert s.equivalence(x, 0.5) == equivalence_p(x.mean(), x.std(ddof=1) / math.sqrt(8), 8, 0.5)


@pytest.mark.parametrize("seeds", SEEDS)
def test_both_directions_are_claimed_wrongly_no_more_often_than_one_test_errs(seeds):
    """One direction has a huge effect, the other none: the hardest null of an intersection-union test."""
    n = 20_000
    none, huge = rng(seeds).normal(size=(n, seeds)), rng(9).normal(50, 1, (n, seeds))
    both = np.maximum(s.t_p(none), s.t_p(huge)) < ALPHA
    assert rate_is(both, ALPHA, n)


@pytest.mark.parametrize("seeds", SEEDS)
def test_holm_keeps_the_chance_of_any_false_claim(seeds):
    n = 5000
    p = s.t_p(rng(seeds).normal(size=(n, 2, seeds)))
    wrong = [min(s.holm({"und": a, "gen": b}).values()) < ALPHA for a, b in p]
    assert np.mean(wrong) < ALPHA + 4 * math.sqrt(ALPHA * (1 - ALPHA) / n)


def test_benjamini_hochberg_keeps_the_share_of_false_claims():
    n, tests = 2000, 10
    shift = np.zeros((tests, 1))
    shift[:3] = 2.0
    p = s.t_p(rng().normal(size=(n, tests, 8)) + shift)
    shares = []
    for row in p:
        claimed = [i for i, q in enumerate(s.benjamini_hochberg(dict(enumerate(row))).values()) if q < 0.2]
        shares.append(sum(i >= 3 for i in claimed) / max(len(claimed), 1))
    assert np.mean(shares) < 0.2


@pytest.mark.parametrize("seeds", SEEDS)
def test_the_jackknife_interval_of_sigma_covers_it(seeds):
    """Two specialists at five budgets and a joint model worth 0.7 and 0.6 of its budget, 1 % and 2 % seed noise."""
    n, budgets = 400, np.array([0.25, 0.5, 1, 2, 4])
    levels = [np.concatenate([power_law(budgets, e), [power_law(c, e)]]) for e, c in ((0.3, 0.7), (0.5, 0.6))]
    draw, covered = rng(seeds), []
    for _ in range(n):
        noise = draw.normal(size=(seeds, 2, 6)) * np.array([0.01, 0.02])[None, :, None]
        interval = s.jackknife_t(lambda rows: log_sigma(rows, budgets), np.stack(levels) + noise)
        covered.append(interval.low <= math.log(1.3) <= interval.high)
    assert 0.92 < np.mean(covered) < 0.98


def log_sigma(rows: np.ndarray, budgets: np.ndarray) -> float:
    readings = [
        s.LearningCurve.fit(budgets, rows[:, task, :-1]).inverse(float(rows[:, task, -1].mean())) for task in (0, 1)
    ]
    return math.log(s.budget_equivalent(readings, 1.0).value)
