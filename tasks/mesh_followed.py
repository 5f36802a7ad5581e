"""Backend `followed` of stage `mesh`: the mesh where it is known, as in a frame of a video whose meshes were smoothed over time.

A picture of which nothing is known is read, as the backend `mediapipe` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tasks.mesh import STAGE as READ
from tasks.mesh import MeshConfig
from tasks.stage import Inputs, ItemError, Outputs

if TYPE_CHECKING:
    from e4s_models.face_mesh import FaceMesh


def _run(model: FaceMesh, config: MeshConfig, batch: Sequence[Inputs]) -> list[Outputs | ItemError]:
    """Reads `face` (H, W, 3), `motion` ("" or the sha256 of `points`) and `image`, which then has `points` (478, 3) px of the face."""
    results: list[Outputs | ItemError] = []
    for inputs in batch:
        if inputs["motion"]:
            points = inputs["image"].points
            results.append({"points": points, "blendshapes": model.blendshapes(points, max(inputs["face"].shape[:2]))})
        else:
            results += READ.run(model, config, [inputs])
    return results


STAGE = replace(READ, backend="followed", version=1, run=_run, reads=("face", "image", "motion"))

BACKENDS = {"followed": STAGE}
