"""Percentile bootstrap interval of a mean (Efron 1979), as `scipy.stats.bootstrap(method="percentile")` computes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
RESAMPLES = 2000
SEED = 0
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
