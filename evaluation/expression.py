"""Expression: L2 distance of expression coefficients between the swapped face and its target (paper, section 6.2).

The `open` protocol takes 52 blendshape coefficients in [0, 1], the `paper` protocol Deep3D's 64: their numbers do not compare.
Blendshapes have names, so that the mouth and the eyes can be looked at apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape
from e4s_models.face_mesh import BLENDSHAPE_NAMES, NUM_BLENDSHAPES


def _starting_with(*beginnings: str) -> tuple[int, ...]:
    return tuple(index for index, name in enumerate(BLENDSHAPE_NAMES) if name.startswith(beginnings))


MOUTH: Final = _starting_with("jaw", "mouth")
"""The 27 of the 52 blendshapes that move lips and jaw, as columns."""
EYES: Final = _starting_with("eye")
"""The 14 that move the eyelids and turn the eyes, as columns."""


def expression_distance(coefficients: npt.NDArray[Any], references: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Coefficients (N, D) against references (N, D) -> (N,)."""
    shape = check_shape(coefficients, "N D")
    check_shape(references, f"{shape['N']} {shape['D']}")
    return np.asarray(np.linalg.norm(np.asarray(coefficients, np.float64) - np.asarray(references, np.float64), axis=1), np.float64)


def part_distance(part: Sequence[int], coefficients: npt.NDArray[Any], references: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The same over the blendshapes of one part of the face (`MOUTH`, `EYES`): (N, 52) against (N, 52) -> (N,)."""
    check_shape(coefficients, f"N {NUM_BLENDSHAPES}")
    return expression_distance(np.asarray(coefficients)[:, part], np.asarray(references)[:, part])
