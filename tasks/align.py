"""Stage `align`: one face of a picture -> FFHQ-aligned crop, its place in the frame and its landmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from e4s_models.warp import ffhq_crop_to_frame, resample, transform_points
from tasks.stage import Inputs, ItemError, Outputs, Stage, each

if TYPE_CHECKING:
    from e4s_models.dlib_face import Detection, FaceDetector


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    side: int = 1024  # px of the aligned crop; FFHQ has 1024
    min_face: int = 40  # px, smallest side of the detector's box (brows to chin) in the frame

    def __post_init__(self) -> None:
        if self.side < 64:
            raise ValueError(f"side must be at least 64 px, got {self.side}")
        if self.min_face < 1:
            raise ValueError(f"min_face must be at least 1 px, got {self.min_face}")


def pick_face(faces: list[Detection], index: int, min_face: int) -> Detection:
    """The face of that index, the largest being 0. Raises ItemError if there is none, or if it is smaller than `min_face` px."""
    if not faces:
        raise ItemError("no face found: give a picture in which one face is seen from the front, sharp and not covered.")
    if index >= len(faces):
        found = "1 face was" if len(faces) == 1 else f"{len(faces)} faces were"
        raise ItemError(f"face {index} was asked for but {found} found: choose --face 0 to {len(faces) - 1} (0 is the largest).")
    face = faces[index]
    if face.side < min_face:
        found = f"{int(face.side)} px wide but {min_face} px are needed"
        raise ItemError(f"face {index} is {found}: give a larger picture, or lower align.min_face.")
    return face


def align(detector: FaceDetector, config: AlignConfig, inputs: Inputs) -> Outputs:
    """Reads `image` and `face_index` (0 = largest); writes `face`, `crop_to_frame`, `landmarks`.

    `face` is RGB (side, side, 3) uint8, mirrored at the frame's edges; `crop_to_frame` (3, 3) float64 maps px of the crop to px of the
    frame, `landmarks` (68, 2) float32 are px in the crop; pixel centres lie at whole numbers (see `e4s_models.warp`).
    """
    index = int(inputs["face_index"])
    if index < 0:
        raise ItemError(f"face {index} was asked for: faces are counted from 0, the largest.")
    rgb = inputs["image"].read().rgb8
    face = pick_face(detector.detect(rgb, at_least=index + 1), index, config.min_face)
    crop_to_frame = ffhq_crop_to_frame(face.landmarks, config.side)
    return {
        "face": resample(rgb, crop_to_frame, config.side, config.side),
        "crop_to_frame": crop_to_frame,
        "landmarks": transform_points(np.linalg.inv(crop_to_frame), face.landmarks).astype(np.float32),
    }


def _load(config: AlignConfig, device: str) -> FaceDetector:
    from e4s_models.dlib_face import FaceDetector

    return FaceDetector.load()


STAGE = Stage(
    name="align",
    backend="dlib",
    version=1,
    config=AlignConfig,
    load=_load,
    run=each(align),
    reads=("image", "face_index"),
    writes={"face": "image", "crop_to_frame": "array", "landmarks": "array"},
    weights=lambda config: ("dlib_landmarks68",),
    libraries=("numpy", "opencv-python-headless", "pillow", "dlib-bin"),
)

BACKENDS = {"dlib": STAGE}
