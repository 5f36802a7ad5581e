"""LPIPS (AlexNet, version 0.1) of aligned crops: `e4s_models.lpips_net` on pictures in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from e4s_models.lpips_net import Lpips
from evaluation.pictures import check_pictures, mean_over


@torch.inference_mode()
def lpips(network: Lpips, images: Tensor, references: Tensor, where: Tensor | None = None) -> Tensor:
    """RGB (B, 3, H, W) [0, 1] against references -> (B,) float64, 0 is equality; one pair at a time, so that memory does not grow.

    With a region (B, H, W) bool: the mean of the distance per pixel over it.
    """
    check_pictures(images, references, where)
    values = images.new_zeros(len(images), dtype=torch.float64)
    for index in range(len(images)):
        pair = [batch[index : index + 1].float() * 2 - 1 for batch in (images, references)]
        values[index] = network(*pair)[0] if where is None else mean_over(network.spatial(*pair)[0], where[index])
    return values
