"""Expression: L2 distance of expression coefficients between the swapped face and its target (paper, section 6.2).

The `open` protocol takes 52 blendshape coefficients in [0, 1], the `paper` protocol Deep3D's 64: their numbers do not compare.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape


def expression_distance(coefficients: npt.NDArray[Any], references: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Coefficients (N, D) against references (N, D) -> (N,)."""
    shape = check_shape(coefficients, "N D")
    check_shape(references, f"{shape['N']} {shape['D']}")
    return np.asarray(np.linalg.norm(np.asarray(coefficients, np.float64) - np.asarray(references, np.float64), axis=1), np.float64)
