"""SSIM: structural similarity with the Gaussian window of its authors (Wang et al., IEEE TIP 2004, Eq. 13).

As scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=0)`: 11
taps, K1 = 0.01, K2 = 0.03, per channel, the mean over places where the window lies wholly inside.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from evaluation.pictures import check_pictures, mean_over

RADIUS = 5  # px; 3.5 sigma, as scikit-image cuts it
_SIGMA = 1.5  # px
_C1, _C2 = 0.01**2, 0.03**2
_RAW = [math.exp(-((tap - RADIUS) ** 2) / (2 * _SIGMA**2)) for tap in range(2 * RADIUS + 1)]
_WINDOW = [value / sum(_RAW) for value in _RAW]


def _blur(x: Tensor) -> Tensor:
    """Window means (..., H, W) -> (..., H - 10, W - 10); in place sums of shifted views are the fastest float64 way on a CPU."""
    for axis in (-2, -1):
        size = x.shape[axis] - 2 * RADIUS
        y = x.narrow(axis, 0, size) * _WINDOW[0]
        for tap in range(1, 2 * RADIUS + 1):
            y.add_(x.narrow(axis, tap, size), alpha=_WINDOW[tap])
        x = y
    return x


def _ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """Two channels (H, W) float64 -> (H - 10, W - 10)."""
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a = _blur(a * a) - mean_a * mean_a
    variance_b = _blur(b * b) - mean_b * mean_b
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a * mean_a + mean_b * mean_b + _C1)
    return luminance * (2 * covariance + _C2) / (variance_a + variance_b + _C2)


def ssim(images: Tensor, references: Tensor, where: Tensor | None = None) -> Tensor:
    """RGB (B, 3, H, W) [0, 1] against references -> (B,) float64 in [-1, 1], 1 is equality. Sides of at least 11 px.

    With a region (B, H, W) bool: the mean over windows whose centre lies in it (a border of 5 px is never a centre).
    """
    check_pictures(images, references, where)
    if min(images.shape[-2:]) < 2 * RADIUS + 1:
        raise ValueError(f"expected pictures of at least {2 * RADIUS + 1} px, got {images.shape[-1]}x{images.shape[-2]} px")
    values = images.new_zeros(len(images), dtype=torch.float64)
    for index, (image, reference) in enumerate(zip(images.double(), references.double(), strict=True)):
        similarity = torch.stack([_ssim_map(a, b) for a, b in zip(image, reference, strict=True)]).mean(0)  # (H - 10, W - 10)
        centres = None if where is None else where[index, RADIUS:-RADIUS, RADIUS:-RADIUS]
        values[index] = mean_over(similarity, centres)
    return values
