"""Known answers: the swapped face against the picture that it should equal, inside the face."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape


def inside_face(landmarks: npt.NDArray[Any], side: int) -> npt.NDArray[np.bool_]:
    """The convex hull of 68 landmarks (68, 2) px in a crop of that side -> (side, side): from the brows to the chin, no forehead."""
    check_shape(landmarks, "68 2")
    inside = np.zeros((side, side), np.uint8)
    cv2.fillConvexPoly(inside, cv2.convexHull(np.rint(landmarks).astype(np.int32)), 1)
    return np.asarray(inside > 0)
