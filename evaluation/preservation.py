"""Preservation: how much of the target outside its face is left as it was, and the picture comparison of a reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor

from e4s_models.checks import check_shape
from e4s_models.lpips_net import Lpips
from e4s_models.regions import INNER_FACE
from evaluation.lpips import lpips
from evaluation.metrics import COMPARED
from evaluation.psnr import psnr
from evaluation.rmse import rmse
from evaluation.ssim import ssim


def outside_face(regions: Tensor) -> Tensor:
    """Region ids (B, H, W) uint8 of targets -> (B, H, W) bool: everything but the inner face (skin, brows, eyes, nose, mouth, glasses)."""
    check_shape(regions, "B H W")
    return ~torch.isin(regions, torch.tensor([int(region) for region in INNER_FACE], dtype=regions.dtype, device=regions.device))


def compare(images: Tensor, references: Tensor, where: Tensor | None = None, network: Lpips | None = None) -> Tensor:
    """The picture metrics of RGB (B, 3, H, W) [0, 1] against references: (B, 3) float64, with a network its distance alone, (B, 1).

    Columns as `COMPARED["pixels"]` and `COMPARED["lpips"]`. With a region (B, H, W) bool only it counts: what lies beyond it is first
    made equal to the reference, since windows and receptive fields reach across the border; then each metric's mean over the region is
    taken. NaN where a region is empty.
    """
    if where is not None:
        images = torch.where(where[:, None], images, references)
    if network is not None:
        return lpips(network, images, references, where)[:, None]
    columns = {name: metric(images, references, where) for name, metric in (("ssim", ssim), ("psnr", psnr), ("rmse", rmse))}
    return torch.stack([columns[name] for name in COMPARED["pixels"]], dim=1)
