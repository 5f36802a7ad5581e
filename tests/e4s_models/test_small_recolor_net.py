"""The small recoloring network: guidance stays within regions, and a change of colour keeps every detail."""

from __future__ import annotations

import pytest
import torch

from e4s_models.recolor_small import SmallRecolorNet, recolored
from e4s_models.regions import Region

SIDE = SmallRecolorNet.side


@pytest.fixture(scope="module")
def network() -> SmallRecolorNet:
    torch.manual_seed(0)
    return SmallRecolorNet().eval()


def halves() -> tuple[torch.Tensor, torch.Tensor]:
    """A picture (1, 3, S, S), red at the left and blue at the right, and its ids: skin and hair."""
    face = torch.full((1, 3, SIDE, SIDE), -1.0)
    face[:, 0, :, : SIDE // 2] = 0.6
    face[:, 2, :, SIDE // 2 :] = 0.6
    ids = torch.full((1, SIDE, SIDE), int(Region.HAIR), dtype=torch.uint8)
    ids[:, :, : SIDE // 2] = int(Region.SKIN)
    return face, ids


@torch.no_grad()
def test_colours_come_from_the_same_region(network: SmallRecolorNet) -> None:
    target, ids = halves()
    swapped, swapped_ids = torch.rand(1, 3, SIDE, SIDE) * 2 - 1, ids.flip(2)  # hair at the left
    guidance = network.guide(swapped, target, swapped_ids, ids)
    assert guidance.shape == (1, 3, 32, 32)
    assert guidance[0, 2, :, :15].min() > 0.5  # blue
    assert guidance[0, 0, :, 17:].min() > 0.5  # red
    painted = network(swapped, target, swapped_ids, ids)
    assert painted.shape == (1, 3, SIDE, SIDE)
    assert (painted[0, 2] - painted[0, 0])[:, : SIDE // 2 - 4].min() > 1, "an untrained U-Net adds nothing to the guidance"


@torch.no_grad()
def test_only_the_luminance_of_the_swapped_face_is_seen(network: SmallRecolorNet) -> None:
    target, ids = halves()
    swapped = torch.rand(1, 3, SIDE, SIDE)
    gray = (swapped * network.gray).sum(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(network(swapped, target, ids, ids), network(gray, target, ids, ids), rtol=1e-4, atol=1e-4)


def test_shapes_that_cannot_be_are_refused(network: SmallRecolorNet) -> None:
    face, ids = halves()
    with pytest.raises(ValueError, match="expected shape"):
        network(face, face[..., :32], ids, ids)
    with pytest.raises(ValueError, match="expected shape"):
        network(face, face, ids, ids[:, :32])


def test_a_face_painted_as_it_is_stays_as_it_is() -> None:
    faces = torch.rand(2, 3, 4 * SIDE, 4 * SIDE) * 1.8 - 0.9
    painted = torch.nn.functional.avg_pool2d(faces, 4)
    torch.testing.assert_close(recolored(faces, painted), faces, rtol=0, atol=2e-3)


def test_detail_stays_where_colours_change() -> None:
    torch.manual_seed(1)
    smooth = torch.full((1, 3, 8 * SIDE, 8 * SIDE), -0.2)
    detail = 0.1 * torch.randn_like(smooth)
    painted = torch.full((1, 3, SIDE, SIDE), -0.2)
    painted[:, 0] = 0.3
    made = recolored(smooth + detail, painted)
    assert made[:, 0].mean() == pytest.approx(0.3, abs=0.03)
    assert made[:, 2].mean() == pytest.approx(-0.2, abs=0.03)
    kept = made[:, 0] - made[:, 0].mean()
    correlation = torch.corrcoef(torch.stack([kept.flatten(), detail[:, 0].flatten()]))[0, 1]
    assert correlation > 0.99


def test_gradients_reach_what_is_painted() -> None:
    faces, painted = torch.rand(1, 3, 128, 128) * 2 - 1, torch.zeros(1, 3, SIDE, SIDE, requires_grad=True)
    recolored(faces, painted).mean().backward()
    assert painted.grad is not None and painted.grad.abs().sum() > 0
