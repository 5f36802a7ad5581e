"""Pose: L2 distance of yaw, pitch, roll (degrees) between the swapped face and its target (paper, section 6.2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape


def pose_distance(angles: npt.NDArray[Any], references: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Angles (N, 3) degrees against references (N, 3) -> (N,) degrees; each difference is taken the short way round."""
    count = check_shape(angles, "N 3")["N"]
    check_shape(references, f"{count} 3")
    turn = np.asarray(angles, np.float64) - np.asarray(references, np.float64)
    return np.asarray(np.linalg.norm((turn + 180) % 360 - 180, axis=1), np.float64)
