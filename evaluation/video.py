"""Video metrics on per-frame arrays: how steady identity and landmarks are, and how many frames show no face.

`found` (T,) bool says in which frames a face was found; only frames that are neighbours in time are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape
from evaluation.retrieval import cosines

Bool = npt.NDArray[np.bool_]

_OUTER_EYE_CORNERS = (36, 45)  # of the 68 landmarks


@dataclass(frozen=True)
class Steadiness:
    """One number over a clip, or the reason why there is none."""

    value: float | None
    count: int  # of the compared pairs or triples of frames
    reason: str = ""


def frames_without_face(found: Bool) -> tuple[int, float]:
    """How many frames, and which share of them, show no face; the share of an empty clip is 0."""
    check_shape(found, "T")
    missing = int(len(found) - np.count_nonzero(found))
    return missing, missing / max(len(found), 1)


def identity_jitter(features: npt.NDArray[Any], found: Bool) -> Steadiness:
    """Mean of 1 - cosine of the identity features (T, D) of neighbouring frames; 0 is a steady identity."""
    check_shape(found, f"{check_shape(features, 'T D')['T']}")
    both = found[1:] & found[:-1]
    if not both.any():
        return Steadiness(None, 0, _too_few(found, 2))
    return Steadiness(float((1 - cosines(features[1:][both], features[:-1][both])).mean()), int(both.sum()))


def landmark_jitter(landmarks: npt.NDArray[Any], found: Bool) -> Steadiness:
    """Mean length of the landmarks' second difference over time, in percent of the distance of the outer eye corners.

    Landmarks (T, 68, 2) px. Steady motion at any speed counts as 0; what counts is |p(t-1) - 2 p(t) + p(t+1)|. Beside it belongs the same
    number of the target clip, whose own motion is in it.
    """
    jumps = landmark_jumps(landmarks, found)
    known = np.isfinite(jumps)
    if not known.any():
        return Steadiness(None, 0, _too_few(found, 3))
    return Steadiness(float(jumps[known].mean()), int(known.sum()))


def landmark_jumps(landmarks: npt.NDArray[Any], found: Bool) -> npt.NDArray[np.float64]:
    """`landmark_jitter` frame by frame: (T,) percent, NaN where the frame or a neighbour shows no face."""
    frames = check_shape(landmarks, "T 68 2")["T"]
    check_shape(found, f"{frames}")
    jumps = np.full(frames, np.nan)
    middle = 1 + np.flatnonzero(found[2:] & found[1:-1] & found[:-2])
    points = np.asarray(landmarks, np.float64)
    moved = np.linalg.norm(points[middle + 1] - 2 * points[middle] + points[middle - 1], axis=2).mean(1)  # (n,) px
    left, right = (points[middle, corner] for corner in _OUTER_EYE_CORNERS)
    jumps[middle] = 100 * moved / np.linalg.norm(right - left, axis=1)
    return jumps


def _too_few(found: Bool, needed: int) -> str:
    return f"no {needed} frames in a row with a face ({np.count_nonzero(found)} of {len(found)} frames have one)"
