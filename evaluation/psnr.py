"""PSNR: peak signal-to-noise ratio for a peak of 1, in dB, per picture; the number of a set is the mean over its pictures."""

from __future__ import annotations

from torch import Tensor

from evaluation.pictures import squared_error

MAX_DB = 120.0
"""dB, stands for equality: two different 8-bit pictures of 1024 px reach at most 113.1 (one value off by one)."""


def psnr(images: Tensor, references: Tensor, where: Tensor | None = None) -> Tensor:
    """RGB (B, 3, H, W) [0, 1] against references, optionally within a region (B, H, W) bool -> (B,) float64 dB, at most `MAX_DB`."""
    return (-10 * squared_error(images, references, where).log10()).clamp(max=MAX_DB)
