"""How faces are cut for networks that the user brings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from e4s_models.face_crops import FFHQ_LANDMARKS, arcface_squares, five_points
from e4s_models.user_crops import CUTS, DEEP3D_POINTS, user_squares
from e4s_models.user_network import ROLES


def faces(side: int = 256) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def places(side: int) -> torch.Tensor:
    """A picture whose first two channels are x and y px, as parts of its side."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)])[None].float() / side


def test_every_role_has_a_cut_of_its_published_size() -> None:
    assert CUTS.keys() == ROLES.keys()
    for role, convention in ROLES.items():
        squares = user_squares(role, faces(), None, convention.height, convention.width)
        assert squares.shape == (2, 3, convention.height, convention.width)
        torch.testing.assert_close(user_squares(role, faces()[1:], None, convention.height, convention.width), squares[1:])


def test_cosface_sees_arcfaces_template_and_its_middle() -> None:
    landmarks = (FFHQ_LANDMARKS / 4 + torch.tensor([3.0, -2.0])).expand(2, 68, 2)
    square = arcface_squares(faces(), landmarks)
    torch.testing.assert_close(user_squares("cosface", faces(), landmarks, 112, 112), square)
    torch.testing.assert_close(user_squares("cosface", faces(), landmarks, 112, 96), square[..., 8:104])


def test_deep3d_scales_and_shifts_so_that_the_mean_face_fits() -> None:
    """Landmarks that are the mean face itself under a known camera: its origin lies in the middle, a unit is 102 of 224 px."""
    unit, origin = 90.0, torch.tensor([130.0, 120.0])
    five = origin + unit * DEEP3D_POINTS[:, :2] * torch.tensor([1.0, -1.0])
    landmarks = torch.zeros(1, 68, 2)
    for indices, point in zip(((36, 37, 38, 39, 40, 41), (42, 43, 44, 45, 46, 47), (30,), (48,), (54,)), five, strict=True):
        landmarks[0, list(indices)] = point
    torch.testing.assert_close(five_points(landmarks)[0], five)
    found = user_squares("deep3d", places(256), landmarks, 224, 224)[0, :2] * 256
    middle = found[:, 111:113, 111:113].mean(dim=(1, 2))
    np.testing.assert_allclose(middle.numpy(), origin.numpy(), atol=0.05)
    step = (found[0, 112, 162] - found[0, 112, 62]) / 100
    assert float(step) == pytest.approx(unit / 102, rel=1e-3)
    assert float((found[1, 162, 112] - found[1, 62, 112]) / 100) == pytest.approx(unit / 102, rel=1e-3)


def test_inception_sees_the_whole_crop() -> None:
    picture = places(512)
    corners = user_squares("inception", picture, None, 299, 299)[0, 0, 0, [0, -1]]
    assert corners[0] < 0.01 and corners[1] > 0.98
