"""How an aligned face is cut for a network that the user brought: by its role, in the size that its file wants.

Faces are RGB (B, 3, H, H) float32 [-1, 1], FFHQ-aligned; landmarks (B, 68, 2) px of them or None for the mean ones. Where a file wants
an oblong, it gets the middle of the square (CosFace's 96 x 112 px are the middle of ArcFace's template).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from e4s_models.checks import check_shape
from e4s_models.face_crops import (
    ARCFACE_SIDE,
    ARCFACE_TEMPLATE,
    FFHQ_SIDE,
    default_landmarks,
    five_points,
    sample_squares,
    similarity_to,
)

Cut = Callable[[Tensor, Tensor | None, int], Tensor]
"""Faces, landmarks, side px -> squares (B, 3, side, side)."""

DEEP3D_POINTS: Final = torch.tensor(
    (
        (-0.31148657, 0.29036078, 0.13377953),
        (0.30979887, 0.28972036, 0.13179526),
        (0.0032535, -0.04617932, 0.55244243),
        (-0.25216928, -0.38133916, 0.22405732),
        (0.2484662, -0.38128236, 0.22235769),
    )
)
"""(5, 3): eyes, nose tip, mouth corners of the mean face to which Deep3DFaceRecon aligns; y points upwards."""
_DEEP3D_SCALE: Final = 102 / 224  # of the square's side: what a unit of the mean face becomes


def user_squares(role: str, faces: Tensor, landmarks: Tensor | None, height: int, width: int) -> Tensor:
    """Faces as the network of that role (a key of `CUTS`) sees them: (B, 3, height, width)."""
    side = max(height, width)
    squares = CUTS[role](faces, landmarks, side)
    top, left = (side - height) // 2, (side - width) // 2
    return squares[..., top : top + height, left : left + width].contiguous()


def _points(faces: Tensor, landmarks: Tensor | None) -> Tensor:
    shape = check_shape(faces, "B 3 H H")
    points = default_landmarks(faces) if landmarks is None else landmarks.to(faces)
    check_shape(points, f"{shape['B']} 68 2")
    return five_points(points)  # [B, 5, 2]


def _template(faces: Tensor, landmarks: Tensor | None, side: int) -> Tensor:
    """ArcFace's template, enlarged to the side."""
    scale = side / ARCFACE_SIDE
    nominal = faces.shape[-1] / FFHQ_SIDE * 7.3 / scale  # px of an average crop per px of the square
    to_face = similarity_to(ARCFACE_TEMPLATE.to(faces) * scale, _points(faces, landmarks))
    return sample_squares(faces, to_face, side, max(1, ceil(nominal)))


def _deep3d(faces: Tensor, landmarks: Tensor | None, side: int) -> Tensor:
    """Deep3DFaceRecon's alignment: the affine camera that takes the mean face's five points to the picture's gives place and scale."""
    points = _points(faces, landmarks)
    design = F.pad(DEEP3D_POINTS.to(points), (0, 1), value=1.0)  # [5, 4]
    camera = torch.linalg.pinv(design) @ points  # [B, 4, 2]: two axes, and where the mean face's origin lies
    unit = camera[:, :3].norm(dim=1).mean(1)  # [B] px of the face per unit
    step = unit / (_DEEP3D_SCALE * side)  # [B] px of the face per px of the square
    corner = camera[:, 3] + ((1 - side) / 2 * step)[:, None]  # [B, 2]: the centre of the square's first pixel
    to_face = torch.cat([step[:, None, None] * torch.eye(2).to(points), corner[..., None]], dim=2)
    return sample_squares(faces, to_face, side, max(1, ceil(faces.shape[-1] / FFHQ_SIDE * 3.9 * 224 / side)))


def _whole(faces: Tensor, landmarks: Tensor | None, side: int) -> Tensor:
    return F.interpolate(faces, (side, side), mode="bilinear", antialias=True)


CUTS: Final[Mapping[str, Cut]] = {"cosface": _template, "deep3d": _deep3d, "inception": _whole}
