"""FID against the textbook formula with scipy's matrix root (see record_fid.py)."""

from __future__ import annotations

import json

import numpy as np
import pytest
from record_fid import RECORDED, samples, textbook

from evaluation.fid import Gaussian, fid, frechet_distance


def gaussian(features: np.ndarray, batch: int = 100) -> Gaussian:
    result = Gaussian(features.shape[1])
    for start in range(0, len(features), batch):
        result.add(features[start : start + batch])
    return result


def test_by_hand_in_one_dimension() -> None:
    a, b = np.array([[0.0], [2.0]]), np.array([[3.0], [7.0]])  # means 1 and 5, deviations sqrt 2 and 2 sqrt 2
    assert frechet_distance(gaussian(a), gaussian(b)) == pytest.approx(16 + 2)
    assert fid(a, b) == pytest.approx(18)


def test_equals_the_textbook_at_64_dimensions() -> None:
    a, b = samples(1000, 64, 1), samples(1000, 64, 2)
    assert fid(a, b) == pytest.approx(textbook(a, b), rel=1e-6)
    assert fid(a, b) > 1


def test_equals_the_textbook_at_2048_dimensions() -> None:
    expected = json.loads(RECORDED.read_text())["fid"]
    assert fid(samples(2500, 2048, 1), samples(2200, 2048, 2)) == pytest.approx(expected, rel=1e-3)


def test_fewer_pictures_than_dimensions_give_the_same_by_singular_values() -> None:
    a, b = samples(50, 128, 1), samples(90, 128, 2)
    assert fid(a, b) == pytest.approx(frechet_distance(gaussian(a), gaussian(b)), rel=1e-6)


def test_batches_give_the_moments_of_the_whole() -> None:
    values = samples(1000, 64, 1) + 1000  # a large mean: no digits may cancel
    for batch in (1, 7, 1000):
        whole = gaussian(values, batch)
        np.testing.assert_allclose(whole.mean, values.mean(0, np.float64), rtol=1e-12)
        np.testing.assert_allclose(whole.covariance, np.cov(values.astype(np.float64), rowvar=False), rtol=0, atol=1e-10)
    whole.add(values[:0])
    assert whole.count == 1000


@pytest.mark.parametrize("count", [10, 200])
def test_equal_sets_have_distance_0(count: int) -> None:
    values = samples(count, 32, 1)
    assert fid(values, values) == pytest.approx(0, abs=1e-9)
    assert fid(values, values[::-1].copy()) == pytest.approx(0, abs=1e-9)


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 pictures on each side, got 1 and 5"):
        fid(np.ones((1, 3)), np.ones((5, 3)))
    with pytest.raises(ValueError, match="at least 2 features, got 1"):
        gaussian(np.ones((1, 3))).covariance  # noqa: B018
    with pytest.raises(ValueError, match="expected shape"):
        fid(np.ones((2, 3)), np.ones((2, 4)))
