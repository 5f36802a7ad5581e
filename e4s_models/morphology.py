"""Masks grown and shrunk by distance: as round as a large structuring element, and much faster."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


def disc(radius: float) -> npt.NDArray[np.uint8]:
    """Return a round structuring element of that radius, px."""
    size = 2 * round(radius) + 1
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)), np.uint8)


def grow(mask: Mask, reach: float) -> Mask:
    """Return a mask (H, W) bool with everything within `reach` px of it."""
    if not mask.any():
        return mask
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 3)
    return np.asarray(distance <= reach)


def shrink(mask: Mask, reach: float) -> Mask:
    """Return a mask (H, W) bool without everything within `reach` px of its outside; the picture's border is no outside."""
    if mask.all():
        return mask
    distance = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 3)
    return np.asarray(distance > reach)
