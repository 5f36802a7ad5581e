"""RMSE: root of the mean squared error over channels and pixels, in [0, 1]."""

from __future__ import annotations

from torch import Tensor

from evaluation.pictures import squared_error


def rmse(images: Tensor, references: Tensor, where: Tensor | None = None) -> Tensor:
    """RGB (B, 3, H, W) [0, 1] against references, optionally within a region (B, H, W) bool -> (B,) float64; 0 is equality."""
    return squared_error(images, references, where).sqrt()
