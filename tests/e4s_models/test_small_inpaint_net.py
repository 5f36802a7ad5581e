"""The small inpainting network: it begins as a smooth continuation and never looks into the hole."""

from __future__ import annotations

import pytest
import torch

from e4s_models.inpaint_small import SmallInpaintNet, continued


@pytest.fixture(scope="module")
def network() -> SmallInpaintNet:
    torch.manual_seed(0)
    return SmallInpaintNet().eval()


def scene() -> tuple[torch.Tensor, torch.Tensor]:
    """A face (1, 3, S, S), dark at the left and bright at the right, and a hole that has some of both beside it."""
    face = torch.linspace(-1, 1, SmallInpaintNet().side).expand(1, 3, 128, 128).clone()
    hole = torch.zeros(1, 1, 128, 128)
    hole[..., 40:80, 50:90] = 1
    return face, hole


@torch.no_grad()
def test_a_continuation_keeps_what_is_known_and_is_smooth_within() -> None:
    face, hole = scene()
    whole = continued(face, hole)
    assert torch.equal(whole[..., :40, :], face[..., :40, :])
    inside = whole[0, 0, 60, 50:90]
    assert inside[0] < inside[20] < inside[-1]
    assert (inside - face[0, 0, 60, 50:90]).abs().max() < 0.25


@torch.no_grad()
def test_nothing_is_added_before_anything_is_learnt_and_the_hole_is_not_looked_at(network: SmallInpaintNet) -> None:
    face, hole = scene()
    torch.testing.assert_close(network(face, hole), continued(face, hole))
    other = torch.where(hole > 0, torch.rand_like(face), face)
    for name, parameter in network.named_parameters():
        if "to_image.weight" in name:
            parameter.add_(0.1)
    assert not torch.equal(network(face, hole), continued(face, hole))
    torch.testing.assert_close(network(other, hole), network(face, hole))
    filled = network.fill(face, hole)
    assert torch.equal(filled[hole.expand_as(face) == 0], face[hole.expand_as(face) == 0])
