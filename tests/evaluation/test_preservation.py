"""What is left of the target outside the face."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from e4s_models.lpips_net import Lpips
from e4s_models.regions import Region
from evaluation.metrics import COMPARED
from evaluation.preservation import compare, outside_face
from evaluation.psnr import MAX_DB


@pytest.fixture
def target() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def regions() -> Tensor:
    """A square face, hair above it."""
    labels = torch.zeros(2, 64, 64, dtype=torch.uint8)
    labels[:, 16:48, 16:48] = Region.SKIN
    labels[:, 24:28, 24:40] = Region.EYES
    labels[:, 8:16] = Region.HAIR
    return labels


def test_outside_is_everything_but_the_inner_face(regions: Tensor) -> None:
    outside = outside_face(regions)
    assert outside[0].sum() == 64 * 64 - 32 * 32
    assert outside[0, 8, 16] and not outside[0, 24, 24] and not outside[0, 16, 16]


def test_a_swap_within_the_face_preserves_all(network: Lpips, target: Tensor, regions: Tensor) -> None:
    outside = outside_face(regions)
    swapped = torch.where(outside[:, None], target, 1 - target)
    assert compare(swapped, target, outside).tolist() == [[1.0, MAX_DB, 0.0]] * 2
    assert compare(swapped, target, outside, network).tolist() == [[0.0]] * 2
    assert (compare(swapped, target)[:, 0] < 0.9).all() and (compare(swapped, target, network=network) > 0.01).all()


def test_a_change_outside_is_seen_by_every_metric(network: Lpips, target: Tensor, regions: Tensor) -> None:
    outside = outside_face(regions)
    changed = target.clone()
    changed[0, :, :16] = 1 - changed[0, :, :16]
    both = dict(zip(COMPARED["pixels"], compare(changed, target, outside).T.tolist(), strict=True))
    both["lpips"] = compare(changed, target, outside, network)[:, 0].tolist()
    assert both["ssim"][0] < 0.9 < both["ssim"][1] == 1
    assert both["psnr"][0] < 20 < both["psnr"][1] == MAX_DB
    assert both["rmse"][0] > 0.1 > both["rmse"][1] == 0
    assert both["lpips"][0] > 0.01 > both["lpips"][1] == 0


def test_a_target_that_is_all_face_has_no_value(network: Lpips, target: Tensor, regions: Tensor) -> None:
    outside = outside_face(regions)
    outside[1] = False
    for compared in (compare(target, target, outside), compare(target, target, outside, network)):
        assert compared[0].isfinite().all() and compared[1].isnan().all()
