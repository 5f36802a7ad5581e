"""Squares that feature networks look at, cut out of FFHQ-aligned crops: templates over landmarks, batched, differentiable.

Points follow `e4s_models.warp`: (x, y) px, pixel centres at whole numbers.
"""

from __future__ import annotations

from math import ceil
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from e4s_models.checks import check_shape

FFHQ_SIDE: Final = 1024  # px of the crop that the points below refer to
FFHQ_LANDMARKS: Final = torch.tensor(
    np.fromstring(
        """221 497 223 574 230 649 244 725 270 796 316 856 375 906 439 946 512 959 584 946 648 906 707 856 753 796 779 725 793 649 800 574
        802 497 274 444 309 408 361 396 415 403 465 423 558 423 608 403 662 396 714 408 749 444 512 478 512 528 512 578 512 630 450 661
        479 671 512 681 544 671 573 661 335 488 366 470 402 471 436 494 401 498 365 497 587 494 621 471 657 470 688 488 658 497 622 498
        387 743 433 729 479 722 512 729 544 722 590 729 636 743 592 789 547 810 512 814 476 810 431 789 405 747 478 745 512 749 545 745
        618 747 546 773 512 777 477 773""",
        np.float32,
        sep=" ",
    ).reshape(68, 2)
)
"""(68, 2) px: the mean iBUG landmarks of 36 generated people in their FFHQ crops (dlib, both halves averaged by mirroring)."""

ARCFACE_TEMPLATE: Final = torch.tensor(
    ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)), dtype=torch.float32
)
"""(5, 2) px of a 112 px square: eyes, nose tip, mouth corners (Deng et al., CVPR 2019, as InsightFace publishes it)."""
ARCFACE_SIDE: Final = 112  # px


def as_pixels(faces: Tensor) -> npt.NDArray[np.uint8]:
    """RGB (B, 3, H, W) float [-1, 1] -> (B, H, W, 3) uint8, for networks that read pixels."""
    check_shape(faces, "B 3 H W")
    pixels = ((faces.detach() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).cpu().numpy())


def default_landmarks(faces: Tensor) -> Tensor:
    """The mean landmarks for a batch of FFHQ crops (B, 3, H, H): (B, 68, 2) px of those crops."""
    shape = check_shape(faces, "B 3 H H")
    scale = shape["H"] / FFHQ_SIDE
    points = (FFHQ_LANDMARKS + 0.5) * scale - 0.5
    return points.to(faces.device).expand(shape["B"], 68, 2)


def five_points(landmarks: Tensor) -> Tensor:
    """68 iBUG landmarks (B, 68, 2) -> eye centres, nose tip, mouth corners (B, 5, 2), left in the picture first."""
    check_shape(landmarks, "B 68 2")
    eyes = [landmarks[:, 36:42].mean(1), landmarks[:, 42:48].mean(1)]
    return torch.stack([*eyes, landmarks[:, 30], landmarks[:, 48], landmarks[:, 54]], dim=1)


def similarity_to(template: Tensor, points: Tensor) -> Tensor:
    """The least-squares similarity from a template (P, 2) to points (B, P, 2): (B, 2, 3), without mirroring.

    In the plane it has a closed form: with centred coordinates as complex numbers t and p, turn and scale are sum(conj(t) p) / sum(|t|^2).
    """
    shape = check_shape(points, "B P 2")
    check_shape(template, f"{shape['P']} 2")
    middle, centres = template.mean(0), points.mean(1, keepdim=True)
    t, p = template - middle, points - centres
    power = t.square().sum()
    cosine = (t * p).sum((1, 2)) / power  # [B]
    sine = (t[:, 0] * p[..., 1] - t[:, 1] * p[..., 0]).sum(1) / power
    turn = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)  # [B, 2, 2]
    shift = centres[:, 0] - turn @ middle
    return torch.cat([turn, shift[..., None]], dim=2)


def sample_squares(faces: Tensor, square_to_face: Tensor, side: int, oversampling: int) -> Tensor:
    """Squares of `side` px that show faces (B, 3, H, W) at `square_to_face` (B, 2, 3) px: (B, 3, side, side).

    Each pixel is the mean of `oversampling` x `oversampling` bilinear samples, so that shrinking does not alias; beyond the edge the edge
    pixel repeats.
    """
    shape = check_shape(faces, "B 3 H W")
    check_shape(square_to_face, f"{shape['B']} 2 3")
    places = (torch.arange(side * oversampling, dtype=faces.dtype, device=faces.device) + 0.5) / oversampling - 0.5
    y, x = torch.meshgrid(places, places, indexing="ij")
    grid = torch.stack([x, y, torch.ones_like(x)], dim=-1) @ square_to_face.to(faces.dtype).mT[:, None]  # [B, S, S, 2] px
    size = torch.tensor([shape["W"], shape["H"]], dtype=faces.dtype, device=faces.device)
    samples = F.grid_sample(faces, (2 * grid + 1) / size - 1, mode="bilinear", padding_mode="border", align_corners=False)
    return F.avg_pool2d(samples, oversampling)


def arcface_squares(faces: Tensor, landmarks: Tensor | None = None) -> Tensor:
    """FFHQ crops (B, 3, H, H) -> faces on ArcFace's template (B, 3, 112, 112), by landmarks (B, 68, 2) px of the crops.

    Without landmarks the mean ones serve: a fixed square, the same for every crop of a size.
    """
    shape = check_shape(faces, "B 3 H H")
    points = default_landmarks(faces) if landmarks is None else landmarks.to(faces)
    check_shape(points, f"{shape['B']} 68 2")
    template = ARCFACE_TEMPLATE.to(faces)
    nominal = shape["H"] / FFHQ_SIDE * 7.3  # px of an average crop per px of the square
    return sample_squares(faces, similarity_to(template, five_points(points)), ARCFACE_SIDE, max(1, ceil(nominal)))


def loose_squares(faces: Tensor, side: int) -> Tensor:
    """The head in FFHQ crops (B, 3, H, H), from above the hairline to below the chin: (B, 3, side, side), antialiased.

    It is the box of a face detector grown by a fifth on each side, which head pose networks were trained on.
    """
    height = check_shape(faces, "B 3 H H")["H"]
    left, top, size = (round(height * part) for part in (0.08, 0.12, 0.84))
    return F.interpolate(faces[..., top : top + size, left : left + size], (side, side), mode="bilinear", antialias=True)
