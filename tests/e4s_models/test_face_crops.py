"""Crops for feature networks: similarities by hand, sampling without shift, the template on a known face."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from e4s_models.face_crops import (
    ARCFACE_TEMPLATE,
    FFHQ_LANDMARKS,
    arcface_squares,
    as_pixels,
    default_landmarks,
    five_points,
    loose_squares,
    sample_squares,
    similarity_to,
)
from e4s_models.warp import ffhq_crop_to_frame


def test_similarity_is_recovered() -> None:
    turn = 3 * torch.tensor([[math.cos(0.4), -math.sin(0.4)], [math.sin(0.4), math.cos(0.4)]])
    points = ARCFACE_TEMPLATE @ turn.T + torch.tensor([7.0, -5.0])
    matrix = similarity_to(ARCFACE_TEMPLATE, torch.stack([points, ARCFACE_TEMPLATE]))
    torch.testing.assert_close(matrix[0, :, :2], turn)
    torch.testing.assert_close(matrix[0, :, 2], torch.tensor([7.0, -5.0]), rtol=0, atol=1e-3)
    torch.testing.assert_close(matrix[1], torch.eye(2, 3), rtol=0, atol=1e-4)


def test_similarity_is_the_best_one() -> None:
    """No nearby similarity fits noisy points better."""
    points = ARCFACE_TEMPLATE * 2 + torch.randn(5, 2, generator=torch.Generator().manual_seed(0)) * 5
    matrix = similarity_to(ARCFACE_TEMPLATE, points[None])[0]

    def error(a: torch.Tensor) -> float:
        return float((ARCFACE_TEMPLATE @ a[:, :2].T + a[:, 2] - points).square().sum())

    best = error(matrix)
    for step in (0.01, -0.01):
        for change in ([[1, 0, 0], [0, 1, 0]], [[0, -1, 0], [1, 0, 0]], [[0, 0, 9], [0, 0, 0]], [[0, 0, 0], [0, 0, 9]]):
            assert error(matrix + step * torch.tensor(change)) > best


def test_sampling_by_hand() -> None:
    ramp = torch.arange(8.0).expand(1, 3, 8, 8) / 8  # the value of a pixel is x / 8
    identity = torch.eye(2, 3)[None]
    torch.testing.assert_close(sample_squares(ramp, identity, 8, 1), ramp)
    halved = sample_squares(ramp, torch.tensor([[[2.0, 0, 0.5], [0, 2.0, 0.5]]]), 4, 2)  # areas of 2 x 2 px
    torch.testing.assert_close(halved, F.avg_pool2d(ramp, 2))
    beyond = sample_squares(ramp, torch.tensor([[[1.0, 0, 20], [0, 1.0, 0]]]), 8, 1)
    assert beyond.unique().tolist() == [7 / 8]


def test_five_points_and_the_mean_face() -> None:
    points = five_points(FFHQ_LANDMARKS[None])[0]
    assert points[0, 0] < points[2, 0] < points[1, 0] and points[1, 1] < points[2, 1] < points[3, 1]
    aligned = ffhq_crop_to_frame(FFHQ_LANDMARKS.numpy(), 1024)
    np.testing.assert_allclose(aligned, np.eye(3), atol=8)  # the mean face lies as an FFHQ crop puts it: within 8 px
    quarter = default_landmarks(torch.zeros(2, 3, 256, 256))
    torch.testing.assert_close(quarter[1], (FFHQ_LANDMARKS + 0.5) / 4 - 0.5)


def test_template_points_show_the_landmarks() -> None:
    """A dot painted on each of the five points of a face like the template lands on the template's points, at any size of crop."""
    for side in (256, 1024):
        faces = torch.full((1, 3, side, side), -1.0)
        points = ARCFACE_TEMPLATE * (side / 180) + 0.25 * side
        landmarks = torch.zeros(1, 68, 2)
        landmarks[:, 36:42], landmarks[:, 42:48], landmarks[:, 30], landmarks[:, 48], landmarks[:, 54] = points
        radius = side // 90
        for x, y in five_points(landmarks)[0].round().long().tolist():
            faces[..., y - radius : y + radius + 1, x - radius : x + radius + 1] = 1
        square = arcface_squares(faces, landmarks)[0, 0]
        assert square.shape == (112, 112)
        for x, y in ARCFACE_TEMPLATE.round().long().tolist():
            assert square[y, x] > 0.5
        assert square.mean() < -0.95
        assert arcface_squares(faces)[0, 0, 52, 38] < -0.5  # the fixed square does not follow


def test_batch_equals_singles() -> None:
    random = torch.Generator().manual_seed(0)
    faces = torch.rand(3, 3, 128, 128, generator=random) * 2 - 1
    landmarks = default_landmarks(faces) + torch.rand(3, 1, 2, generator=random) * 9
    together = arcface_squares(faces, landmarks)
    singles = torch.cat([arcface_squares(faces[i : i + 1], landmarks[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, singles, rtol=0, atol=1e-6)


def test_loose_square_and_pixels() -> None:
    faces = torch.zeros(1, 3, 100, 100)
    faces[..., 12:96, 8:92] = 1
    torch.testing.assert_close(loose_squares(faces, 20), torch.ones(1, 3, 20, 20))
    assert as_pixels(torch.tensor([-1.0, 0.0, 1.0, 9.0]).view(1, 1, 1, 4).expand(1, 3, 1, 4))[0, 0, :, 0].tolist() == [0, 128, 255, 255]


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected shape \(B, 3, H, H\)"):
        arcface_squares(torch.zeros(1, 3, 64, 32))
    with pytest.raises(ValueError, match=r"expected shape \(1, 68, 2\)"):
        arcface_squares(torch.zeros(1, 3, 64, 64), torch.zeros(1, 5, 2))
