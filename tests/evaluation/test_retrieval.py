"""Retrieval by hand, by brute force, with ties."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.retrieval import cosines, hits, ranks


def test_by_hand() -> None:
    gallery = np.array([[1, 0], [0, 2], [-3, 0]])
    queries = np.array([[2, 0.1], [0.5, 0.4], [1, 1], [1, 0]])
    own = np.array([0, 1, 2, 2])
    # cosines to the gallery, highest first: 0 1 2; 0 1 2; 0 and 1 tie, then 2; 0 1 2
    assert ranks(queries, gallery, own).tolist() == [1, 2, 3, 3]
    assert hits(np.array([1, 1.5, 2, 5, 5.5]), 1).tolist() == [1, 0, 0, 0, 0]
    assert hits(np.array([1, 1.5, 2, 5, 5.5]), 5).tolist() == [1, 1, 1, 1, 0]
    assert cosines(np.array([[1, 0], [1, 1]]), np.array([[0, 3], [2, 2]])) == pytest.approx([0, 1])


def test_equals_brute_force() -> None:
    random = np.random.Generator(np.random.PCG64(1))
    gallery, queries = random.standard_normal((40, 8)), random.standard_normal((300, 8)).astype(np.float32)  # more than one block
    own = random.integers(0, 40, 300)
    expected = []
    for query, index in zip(queries.astype(np.float64), own, strict=True):
        similar = [float(query @ other / np.linalg.norm(query) / np.linalg.norm(other)) for other in gallery]
        expected.append(1 + sorted(similar, reverse=True).index(similar[index]))
    assert ranks(queries, gallery, own).tolist() == expected
    for size in (1, 7):
        parts = [ranks(queries[i : i + size], gallery, own[i : i + size]) for i in range(0, 300, size)]
        assert np.concatenate(parts).tolist() == expected


@pytest.mark.parametrize("count", [2, 3, 500])
def test_ties_get_the_mid_rank(count: int) -> None:
    same = np.tile(np.random.Generator(np.random.PCG64(0)).standard_normal(64).astype(np.float32), (count, 1))
    middle = (count + 1) / 2
    assert ranks(same, same, np.arange(count)).tolist() == [middle] * count  # a network that sees no difference scores as chance


def test_wrong_inputs_are_refused() -> None:
    features = np.ones((3, 4))
    with pytest.raises(ValueError, match="gallery of 3, got 0 to 3"):
        ranks(features, features, np.array([0, 1, 3]))
    with pytest.raises(ValueError, match="1 of 3 identity features are zero"):
        ranks(np.diag([1.0, 1, 0])[:, :3], np.ones((3, 3)), np.arange(3))
    with pytest.raises(ValueError, match="expected shape"):
        ranks(features, features[:, :2], np.arange(3))
