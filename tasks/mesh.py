"""Stage `mesh`: aligned face -> dense 3-D landmarks and expression coefficients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from e4s_models.checks import check_shape
from tasks.stage import Inputs, ItemError, Outputs, Stage, each

if TYPE_CHECKING:
    from e4s_models.face_mesh import FaceMesh


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """When a face counts as found."""

    min_presence: float = 0.5  # the landmark network's own probability that there is a face


def _load(config: MeshConfig, device: str) -> FaceMesh:
    from e4s_models.face_mesh import FaceMesh

    return FaceMesh.load()


def _mesh(model: FaceMesh, config: MeshConfig, inputs: Inputs) -> Outputs:
    """RGB (H, W, 3) uint8 -> points (478, 3) float32 px, blendshapes (52,) float32 [0, 1]."""
    face = inputs["face"]
    shape = check_shape(face, "H W 3")
    points, presence = model.landmarks(face)
    if presence < config.min_presence:
        raise ItemError(
            f"mesh: no face in the aligned crop (presence {presence:.2f}, at least {config.min_presence:g} is asked for); "
            "check the picture and its alignment"
        )
    return {"points": points, "blendshapes": model.blendshapes(points, max(shape["H"], shape["W"]))}


STAGE = Stage(
    name="mesh",
    backend="mediapipe",
    version=1,
    config=MeshConfig,
    load=_load,
    run=each(_mesh),
    reads=("face",),
    writes={"points": "array", "blendshapes": "array"},
    weights=lambda config: ("face_mesh",),
    libraries=("numpy", "opencv-python-headless", "ai-edge-litert"),
)
BACKENDS = {"mediapipe": STAGE}
