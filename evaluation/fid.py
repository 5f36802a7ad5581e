"""FID: Frechet distance of two Gaussians fitted to features (Heusel et al., NeurIPS 2017, Eq. 6).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

The trace of the root is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric: no complex root, no iteration.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape

Float64 = npt.NDArray[np.float64]

FULL_RANK = 2049  # pictures: with fewer the covariance of Inception's 2048 features is singular, and FID depends much on how many there are


class Gaussian:
    """Mean and covariance of features that come in batches; memory does not grow with their number."""

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.mean: Float64 = np.zeros(dimensions)
        self._scatter: Float64 = np.zeros((dimensions, dimensions))  # sum of outer products about the mean

    def add(self, features: npt.NDArray[Any]) -> None:
        """Add features (B, D), B may be 0. Batches are merged about their own means (Chan et al. 1979), so no digits cancel."""
        check_shape(features, f"B {len(self.mean)}")
        if not len(features):
            return
        batch = np.asarray(features, np.float64)
        mean = batch.mean(0)
        centred, shift = batch - mean, mean - self.mean
        total = self.count + len(batch)
        self._scatter += centred.T @ centred + np.outer(shift, shift) * (self.count * len(batch) / total)
        self.mean = self.mean + shift * (len(batch) / total)
        self.count = total

    @property
    def covariance(self) -> Float64:
        """The unbiased covariance (D, D). Raises ValueError for fewer than two features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 features, got {self.count}")
        return np.asarray(self._scatter / (self.count - 1), np.float64)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Frechet distance of two Gaussians of one dimension; 0 is equality."""
    import torch  # its LAPACK is several times quicker than numpy's here

    check_shape(b.mean, f"{len(a.mean)}")
    first, second = torch.from_numpy(a.covariance), torch.from_numpy(b.covariance)
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # rounding makes eigenvalues of 0 slightly negative
    roots = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt()
    shift = a.mean - b.mean
    return max(0.0, float(shift @ shift) + float(first.trace() + second.trace() - 2 * roots.sum()))


def fid(features: npt.NDArray[Any], references: npt.NDArray[Any]) -> float:
    """FID of features (N, D) against references (M, D), at least two of each.

    With few pictures it is biased upwards: compare numbers of equal N and M only. With fewer pictures than dimensions the covariances are
    A^T A and B^T B of the centred, scaled features A (N, D) and B (M, D), and the trace of the root is the sum of the singular values of
    A B^T: the same number, much sooner.
    """
    shape = check_shape(features, "N D")
    others = check_shape(references, f"M {shape['D']}")["M"]
    if min(shape["N"], others) < 2:
        raise ValueError(f"FID needs at least 2 pictures on each side, got {shape['N']} and {others}")
    if max(shape["N"], others) > shape["D"]:
        return frechet_distance(_gaussian(features), _gaussian(references))
    means, scaled = [], []
    for values in (features, references):
        sample = np.asarray(values, np.float64)
        means.append(sample.mean(0))
        scaled.append((sample - means[-1]) / np.sqrt(len(sample) - 1))
    shift = means[0] - means[1]
    root = np.linalg.svd(scaled[0] @ scaled[1].T, compute_uv=False).sum()
    return max(0.0, float(shift @ shift + sum((side * side).sum() for side in scaled) - 2 * root))


def _gaussian(features: npt.NDArray[Any]) -> Gaussian:
    gaussian = Gaussian(features.shape[1])
    for start in range(0, len(features), 1024):
        gaussian.add(features[start : start + 1024])
    return gaussian
