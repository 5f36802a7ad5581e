"""What the picture metrics (SSIM, PSNR, RMSE, LPIPS) share: their inputs, and means over a region.

Pictures are RGB (B, 3, H, W) float [0, 1], aligned crops of 1024 px under the declared protocols. `where` (B, H, W) bool restricts a
metric to a region; a picture whose region is empty gets NaN, which the caller counts as failed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from e4s_models.checks import check_shape

SIDE = 1024  # px of the aligned crop on which the protocols compare pictures


def check_pictures(images: Tensor, references: Tensor, where: Tensor | None = None) -> None:
    """Raise ValueError unless both are (B, 3, H, W) in [0, 1] of one shape and `where` is (B, H, W) bool."""
    check_shape(images, "B 3 H W")
    if images.shape != references.shape:
        raise ValueError(f"expected two batches of one shape, got {tuple(images.shape)} and {tuple(references.shape)}")
    for batch in (images, references):
        if batch.numel() and not (float(batch.amin()) >= 0 and float(batch.amax()) <= 1):
            raise ValueError(f"expected pictures in [0, 1], got values from {float(batch.amin()):g} to {float(batch.amax()):g}")
    if where is not None:
        batch_size, _, height, width = images.shape
        check_shape(where, f"{batch_size} {height} {width}")
        if where.dtype != torch.bool:
            raise ValueError(f"expected a region of dtype bool, got {where.dtype}")


def mean_over(values: Tensor, where: Tensor | None) -> Tensor:
    """Mean of one picture's map (H, W) over a region (H, W) bool: () float64; NaN if the region is empty."""
    return values.double().mean() if where is None else values.double()[where].mean()


def squared_error(images: Tensor, references: Tensor, where: Tensor | None = None) -> Tensor:
    """Mean squared error over channels and pixels: two batches (B, 3, H, W) [0, 1] -> (B,) float64."""
    check_pictures(images, references, where)
    errors = [
        mean_over((image.double() - reference.double()).square().mean(0), None if where is None else where[index])
        for index, (image, reference) in enumerate(zip(images, references, strict=True))
    ]
    return torch.stack(errors) if errors else images.new_zeros(0, dtype=torch.float64)
