"""Colour outliers: skin of a swapped face that has a colour which its target's skin has nowhere (burnt, yellow or violet patches).

A measure of our own. Chroma alone is looked at, CIE Lab's a and b at 256 px: light and shadow may differ. Each face's skin is skin and nose
by its own label map; in the swapped face also what lies inside the landmarks and is no feature, since a parser takes a burnt patch for
something else.
"""

from __future__ import annotations

from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape
from e4s_models.regions import Region
from evaluation.answer import inside_face

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

DEVIATIONS: Final = 3.0  # robust standard deviations (1.4826 MAD) by which the range of the target's skin is widened
LEAST_DEVIATION: Final = 1.0  # units of a and b: the skin of a gray picture has no deviation, that of a JPEG one has some
TAIL: Final = 0.01  # share of the target's skin on either side that is no part of its range
FAULTY: Final = 0.005  # share of outliers above which a pair counts as faulty
SIDE: Final = 256  # px
RIM: Final = 2  # px of SIDE along the border of the skin that do not count: lips and brows shine through there

_SKIN = (Region.SKIN, Region.NOSE)
_FEATURES = (Region.LIPS, Region.BROWS, Region.EYES, Region.MOUTH, Region.GLASSES, Region.HAIR)


def chroma_outliers(chroma: Float32, of_target: Float32) -> Mask:
    """Skin colours (N, 2) a and b of a swapped face, and (M, 2) of its target -> which lie outside the target's range, (N,)."""
    check_shape(chroma, "N 2")
    check_shape(of_target, "M 2")
    low, middle, high = np.quantile(of_target, (TAIL, 0.5, 1 - TAIL), axis=0)  # (2,) each
    deviation = np.maximum(1.4826 * np.median(np.abs(of_target - middle), axis=0), LEAST_DEVIATION)
    beyond = (chroma < low - DEVIATIONS * deviation) | (chroma > high + DEVIATIONS * deviation)
    return np.asarray(beyond.any(axis=1))


def skin_outliers(face: UInt8, regions: UInt8, landmarks: npt.NDArray[Any], target: UInt8, target_regions: UInt8) -> float:
    """The share [0, 1] of a swapped face's skin whose colour is an outlier; NaN where either face shows no skin.

    `face`, `target`: aligned crops RGB (S, S, 3) uint8; `regions`, `target_regions` (S, S) uint8 region ids; `landmarks` (68, 2) px of
    the swapped face.
    """
    skin = np.isin(regions, _SKIN) | (inside_face(landmarks, len(regions)) & ~np.isin(regions, _FEATURES))
    swapped = _skin_chroma(face, skin)
    of_target = _skin_chroma(target, np.isin(target_regions, _SKIN))
    if not len(swapped) or not len(of_target):
        return float("nan")
    return float(chroma_outliers(swapped, of_target).mean())


def _skin_chroma(face: UInt8, skin: Mask) -> Float32:
    """a and b (N, 2) of the skin (S, S) of a crop RGB (S, S, 3), at SIDE px."""
    whole = cv2.resize(skin.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA) > 0.999
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * RIM + 1, 2 * RIM + 1))
    inner = cv2.erode(whole.astype(np.uint8), kernel) > 0
    small = cv2.resize(face, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    return np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2LAB)[inner][:, 1:], np.float32)
