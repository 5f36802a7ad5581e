"""Records FID at 2048 dimensions by another way, for test_fid: `python tests/evaluation/record_fid.py` (a minute or two).

The textbook formula with numpy.cov and scipy.linalg.sqrtm of the product, as the published FID scripts compute it.
"""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.linalg

RECORDED = Path(__file__).parents[1] / "data" / "fid_2048.json"


def samples(count: int, dimensions: int, seed: int) -> npt.NDArray[np.float32]:
    """Features (N, D) that look like pooled activations: not negative, correlated with their neighbours, unequal variances."""
    random = np.random.Generator(np.random.PCG64([seed, dimensions]))
    values = random.standard_normal((count, dimensions), np.float32)
    values += 0.8 * np.roll(values, 1, axis=1)
    values *= np.linspace(0.2, 1.0 + 0.1 * seed, dimensions, dtype=np.float32)
    return np.asarray(np.maximum(values + np.float32(0.1 * seed), 0), np.float32)


def textbook(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 sqrtm(C1 C2))."""
    shift = a.mean(0, np.float64) - b.mean(0, np.float64)
    first, second = (np.cov(x.astype(np.float64), rowvar=False) for x in (a, b))
    root = np.real(scipy.linalg.sqrtm(first @ second))
    return float(shift @ shift + np.trace(first + second - 2 * root))


def main() -> None:
    RECORDED.write_text(json.dumps({"fid": textbook(samples(2500, 2048, 1), samples(2200, 2048, 2))}) + "\n")


if __name__ == "__main__":
    main()
