"""The interval against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from evaluation import bootstrap
from evaluation.bootstrap import MIN_SAMPLE, interval_or_reason, mean_interval


@pytest.mark.parametrize("values", [np.arange(20.0) ** 2, np.array([0.0] * 30 + [1.0] * 12), np.array([3.0, 5.0])])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_equals_scipy(values: np.ndarray, level: float) -> None:
    random = np.random.Generator(np.random.PCG64(7))
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=500, confidence_level=level, method="percentile", rng=random
    ).confidence_interval
    assert mean_interval(values, level=level, resamples=500, seed=7) == pytest.approx(tuple(expected), rel=1e-12)
    assert expected.low < values.mean() < expected.high


def test_blocks_draw_what_one_block_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.Generator(np.random.PCG64(0)).standard_normal(101)
    whole = mean_interval(values, resamples=50)
    monkeypatch.setattr(bootstrap, "_BLOCK", 301)
    assert mean_interval(values, resamples=50) == whole


def test_too_few_values_have_no_interval() -> None:
    assert mean_interval(np.array([])) is None
    assert mean_interval(np.array([1.0])) is None
    assert mean_interval(np.array([2.0, 2.0])) == (2, 2)
    with pytest.raises(ValueError, match=r"expected values \(N,\), got \(2, 2\)"):
        mean_interval(np.ones((2, 2)))


def test_an_interval_that_would_look_certain_is_not_given() -> None:
    """Three hits of three are no proof of 1.0, and equal values have no width however many they are."""
    few, equal = np.ones(3), np.ones(500)
    assert mean_interval(few) == mean_interval(equal) == (1, 1)
    assert interval_or_reason(few) == (None, "3 pairs are too few (at least 10)")
    assert interval_or_reason(few[:1]) == (None, "1 pair is too few (at least 10)")
    assert interval_or_reason(equal) == (None, "all 500 pairs have the same value")
    spread = np.arange(float(MIN_SAMPLE))
    assert interval_or_reason(spread) == (mean_interval(spread), "")
    assert interval_or_reason(spread[1:])[0] is None
