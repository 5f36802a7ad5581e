"""Percentile bootstrap interval of a mean (Efron 1979), as `scipy.stats.bootstrap(method="percentile")` computes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
RESAMPLES = 2000
SEED = 0
MIN_SAMPLE = 10
"""Values below which no interval is shown: resampling a handful of pairs gives intervals that are far too narrow."""
_BLOCK = 1 << 20  # indices drawn at once: bounds memory


def mean_interval(
    values: npt.NDArray[Any], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float] | None:
    """Interval of the mean of values (N,) over pairs; None for fewer than two values. The same values give the same interval."""
    sample = np.asarray(values, np.float64)
    if sample.ndim != 1:
        raise ValueError(f"expected values (N,), got {sample.shape}")
    if len(sample) < 2:
        return None
    random = np.random.Generator(np.random.PCG64(seed))
    rows = max(1, _BLOCK // len(sample))
    means = [
        sample[random.integers(0, len(sample), (min(rows, resamples - start), len(sample)))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    low, high = np.percentile(np.concatenate(means), [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def interval_or_reason(values: npt.NDArray[Any], what: str = "value") -> tuple[tuple[float, float] | None, str]:
    """The interval that may stand beside the mean of values (N,), or None and why there is none; the reason is "" with an interval.

    None for fewer than `MIN_SAMPLE` values, and for equal ones: all resamples are the same then, and an interval without width would look
    certain where it knows nothing (three hits of three are no proof that all would be).
    """
    count = len(values)
    if count < MIN_SAMPLE:
        return None, f"{count} {'pair is' if count == 1 else 'pairs are'} too few (at least {MIN_SAMPLE})"
    if np.ptp(values) == 0:
        return None, f"all {count} pairs have the same {what}"
    return mean_interval(values), ""
