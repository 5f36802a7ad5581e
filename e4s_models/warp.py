"""Similarity crops of a picture: one convention of coordinates, one resampling, the FFHQ square.

Points are (x, y) px with pixel centres at whole numbers (OpenCV's and dlib's convention): the centre of the top left pixel is (0, 0), the
picture's corner is (-0.5, -0.5). A matrix `a_to_b` is (3, 3) float64, homogeneous: b = a_to_b @ (x, y, 1).
"""

from __future__ import annotations

from math import ceil, floor
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape

Pixels = npt.NDArray[Any]
Matrix = npt.NDArray[np.float64]
"""(3, 3), homogeneous, the last row is 0 0 1."""


def transform_points(matrix: npt.NDArray[Any], points: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Map points (N, 2) px by a matrix (3, 3)."""
    return np.asarray(np.asarray(points, np.float64) @ matrix[:2, :2].T + matrix[:2, 2], np.float64)


def scale_of(matrix: Matrix) -> float:
    """How many px of its target space one px becomes under a similarity."""
    return float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))


def ffhq_crop_to_frame(landmarks: npt.NDArray[np.floating[Any]], side: int) -> Matrix:
    """The similarity from an FFHQ-aligned crop of side x side px to the frame in which the 68 landmarks (68, 2) px were found.

    Source: the FFHQ recipe (Karras et al. 2019, dataset tool): a square turned like the face, around eyes and mouth.
    """
    check_shape(landmarks, "68 2")
    points = np.asarray(landmarks, np.float64)
    left_eye, right_eye = points[36:42].mean(axis=0), points[42:48].mean(axis=0)  # left and right in the picture
    eyes, mouth = (left_eye + right_eye) / 2, (points[48] + points[54]) / 2
    eye_to_eye, eye_to_mouth = right_eye - left_eye, mouth - eyes
    x = eye_to_eye - eye_to_mouth[::-1] * (-1, 1)  # the quarter turn of (x, y) is (-y, x)
    x *= max(np.hypot(*eye_to_eye) * 2.0, np.hypot(*eye_to_mouth) * 1.8) / np.hypot(*x)  # from the centre to the middle of the right side
    y = x[::-1] * (-1, 1)
    centre = eyes + eye_to_mouth * 0.1
    corner = centre - x - y  # the outer corner of the top left pixel, (-0.5, -0.5) in the crop
    matrix = np.eye(3)
    matrix[:2, 0], matrix[:2, 1] = 2 * x / side, 2 * y / side
    matrix[:2, 2] = corner + (x + y) / side
    return matrix


def resample(pixels: Pixels, to_source: Matrix, height: int, width: int, border: Literal["reflect", "zero"] = "reflect") -> Pixels:
    """Picture (height, width[, C]) whose pixel (x, y) shows `pixels` (H, W[, C]) at `to_source` @ (x, y, 1), in the same dtype.

    Cubic; pixels are averaged where the picture shrinks, so that nothing aliases. Past the edge the picture is mirrored without repeating
    the edge pixel, as often as needed, or zero. Only the part of `pixels` that is seen is touched. `to_source` is a similarity.
    """
    scale = scale_of(to_source)
    block = max(1, floor(scale))  # px of the source averaged to one before the warp
    corners = transform_points(to_source, [(-0.5, -0.5), (width - 0.5, -0.5), (-0.5, height - 0.5), (width - 0.5, height - 0.5)])
    left, top = (floor(value) - 3 * block for value in corners.min(axis=0))
    columns = ceil((corners[:, 0].max() + 3 * block - left) / block) * block
    rows = ceil((corners[:, 1].max() + 3 * block - top) / block) * block
    seen = _window(pixels, top, left, rows, columns, border)
    if block > 1:
        seen = cv2.resize(seen, (columns // block, rows // block), interpolation=cv2.INTER_AREA)
    to_seen = to_source.copy()
    to_seen[:2, 2] -= np.array((left, top)) + (block - 1) / 2
    to_seen[:2] /= block
    if scale <= 1.05:  # the same size or larger; a hair above 1 must not blur
        return _warp(seen, to_seen, height, width)
    half = np.array(((0.5, 0.0, -0.25), (0.0, 0.5, -0.25), (0.0, 0.0, 1.0)))  # px of the doubled picture -> px of the picture
    return cv2.resize(_warp(seen, to_seen @ half, 2 * height, 2 * width), (width, height), interpolation=cv2.INTER_AREA)


def _warp(pixels: Pixels, to_source: Matrix, height: int, width: int) -> Pixels:
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, to_source[:2], (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _window(pixels: Pixels, top: int, left: int, rows: int, columns: int, border: Literal["reflect", "zero"]) -> Pixels:
    """The (rows, columns) px of `pixels` from (top, left) on, which may lie outside."""
    height, width = pixels.shape[:2]
    y, x = np.arange(top, top + rows), np.arange(left, left + columns)
    if border == "reflect":
        if top >= 0 and left >= 0 and top + rows <= height and left + columns <= width:
            return pixels[top : top + rows, left : left + columns]
        return pixels[_mirror(y, height)[:, None], _mirror(x, width)]
    window = np.zeros((rows, columns, *pixels.shape[2:]), pixels.dtype)
    inside_y, inside_x = (y >= 0) & (y < height), (x >= 0) & (x < width)
    window[np.ix_(inside_y, inside_x)] = pixels[y[inside_y][:, None], x[inside_x]]
    return window


def _mirror(index: npt.NDArray[np.intp], size: int) -> npt.NDArray[np.intp]:
    """Indices reflected into [0, size) without repeating the edge: -1 -> 1, size -> size - 2."""
    period = max(1, 2 * (size - 1))
    folded = index % period
    return np.minimum(folded, period - folded)
