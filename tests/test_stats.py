"""Intervals cover what they say, and agree with scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umm import stats
from umm.errors import UmmError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_t_interval_equals_scipys():
    from scipy.stats import t

    x = rng().normal(3, 2, 20)
    found = stats.t_interval(x, 0.9)
    low, high = t.interval(0.9, 19, loc=x.mean(), scale=x.std(ddof=1) / math.sqrt(20))
    assert (found.value, found.low, found.high) == pytest.approx((x.mean(), low, high), rel=1e-12)
    assert (found.n, found.level) == (20, 0.9)


@pytest.mark.parametrize(("bca", "method"), [(True, "BCa"), (False, "percentile")])
def test_the_bootstrap_agrees_with_scipys(bca, method):
    from scipy.stats import bootstrap

    x = rng().exponential(1, 60)
    mine = stats.bootstrap(x, rng(1), resamples=20_000, bca=bca)
    theirs = bootstrap((x,), np.mean, n_resamples=20_000, method=method, rng=rng(2)).confidence_interval
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_intervals_of_skewed_values_cover_the_mean_as_often_as_they_say():
    draws = rng().exponential(1, (300, 60))
    covered = np.mean([i.low <= 1 <= i.high for i in (stats.bootstrap(x, rng(1), 400) for x in draws)])
    assert 0.90 < covered < 0.98


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(2, 50), st.floats(-100, 100), st.floats(0.1, 10))
def test_intervals_move_and_scale_with_the_values(n, shift, scale):
    x = rng(n).normal(size=n)
    base, moved = stats.bootstrap(x, rng(), 200), stats.bootstrap(scale * x + shift, rng(), 200)
    expected = [scale * value + shift for value in (base.value, base.low, base.high)]
    assert [moved.value, moved.low, moved.high] == pytest.approx(expected, abs=1e-9 * (1 + abs(shift)) * scale * 100)


def test_equal_values_have_an_interval_of_no_width():
    for constant in (0.1, 100.0):
        found = stats.bootstrap(np.full(7, constant), rng())
        assert found.low == pytest.approx(constant) and found.high == pytest.approx(constant)


def test_the_same_generator_gives_the_same_interval_in_chunks_or_at_once(monkeypatch):
    x = rng().normal(size=100)
    whole = stats.bootstrap(x, rng(1))
    assert stats.bootstrap(x, rng(1)) == whole
    monkeypatch.setattr(stats, "CHUNK", 64 * 100)
    assert stats.bootstrap(x, rng(1)) == whole


def test_columns_are_resampled_together():
    x = rng().normal(size=(40, 3))
    means = stats.resampled_means(np.stack([x[:, 0], 2 * x[:, 0]], 1), rng(1), 50)
    assert np.allclose(means[:, 1], 2 * means[:, 0]) and means.shape == (50, 2)


def test_too_few_and_broken_values_are_sentences():
    with pytest.raises(UmmError, match="at least 2 pictures"):
        stats.t_interval([1.0])
    with pytest.raises(UmmError, match="1 of 3 values"):
        stats.bootstrap([1.0, math.nan, 2.0], rng())


def test_differences_pair_pictures_by_id_and_refuse_strangers():
    one, other = {"b": 2.0, "a": 1.0}, {"a": 0.5, "b": 0.0}
    assert stats.paired_differences(one, other).tolist() == [0.5, 2.0]
    with pytest.raises(UmmError, match="'c'"):
        stats.paired_differences(one, {"a": 0.5, "b": 0.0, "c": 1.0})


def test_the_sign_flip_test_equals_enumeration():
    """Of the 16 signings of 1, 2, 3, 4 only the two extreme ones sum to 10 in size."""
    assert stats.sign_flip_p([1, 2, 3, 4], rng(), 40_000) == pytest.approx(2 / 16, abs=0.01)


def test_the_sign_flip_test_is_calibrated_and_finds_real_differences():
    null = [stats.sign_flip_p(x, rng(1), 200) for x in rng().normal(size=(200, 20))]
    assert 0.01 < np.mean(np.array(null) < 0.05) < 0.10
    assert stats.sign_flip_p(rng().normal(1, 1, 100), rng(1), 1000) == pytest.approx(1 / 1001)


def test_standardised_differences():
    assert stats.standardised([1.0, 3.0]) == pytest.approx(2 / math.sqrt(2))
    assert stats.standardised([0.0, 0.0]) == 0 and stats.standardised([-2.0, -2.0]) == -math.inf
