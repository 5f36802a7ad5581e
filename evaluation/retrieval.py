"""ID retrieval: whether a swapped face's own source is the most similar among all sources (paper, section 6.2).

Similarity is the cosine of identity features. The rank of the own source is 1 + how many others are more similar + half of those that tie
(mid-rank), so that a network which gives every face the same feature scores as chance does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape

Float64 = npt.NDArray[np.float64]

TIE = 1e-9
"""Cosines closer than this tie: equal features can differ by rounding of the matrix product."""
_BLOCK = 256  # queries per matrix product


def _unit(features: npt.NDArray[Any]) -> Float64:
    values = np.asarray(features, np.float64)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    if not np.all(lengths > 0):
        raise ValueError(f"{int((~(lengths > 0)).sum())} of {len(values)} identity features are zero or not a number")
    return np.asarray(values / lengths, np.float64)


def cosines(features: npt.NDArray[Any], others: npt.NDArray[Any]) -> Float64:
    """Cosine of each feature (N, D) with its own partner (N, D): (N,) in [-1, 1]."""
    check_shape(others, " ".join(map(str, features.shape)))
    return np.asarray((_unit(features) * _unit(others)).sum(1), np.float64)


def ranks(queries: npt.NDArray[Any], gallery: npt.NDArray[Any], own: npt.NDArray[np.integer[Any]]) -> Float64:
    """Mid-rank, from 1, of each query's own entry: features (N, D), gallery (G, D) of distinct sources, indices (N,) into it -> (N,)."""
    shape = check_shape(queries, "N D")
    check_shape(gallery, f"G {shape['D']}")
    check_shape(own, f"{shape['N']}")
    if len(own) and not (own.min() >= 0 and own.max() < len(gallery)):
        raise ValueError(f"expected indices into a gallery of {len(gallery)}, got {own.min()} to {own.max()}")
    units, sources, result = _unit(queries), _unit(gallery), np.empty(shape["N"])
    for start in range(0, shape["N"], _BLOCK):
        block = slice(start, start + _BLOCK)
        similar = units[block] @ sources.T  # (n, G)
        lead = similar - np.take_along_axis(similar, own[block, None], axis=1)  # 0 for the own source
        result[block] = 1 + (lead > TIE).sum(1) + ((np.abs(lead) <= TIE).sum(1) - 1) / 2
    return result


def hits(mid_ranks: Float64, k: int) -> Float64:
    """1.0 where the rank is at most `k`, else 0.0; their mean is the top-k accuracy."""
    return np.asarray(mid_ranks <= k, np.float64)
