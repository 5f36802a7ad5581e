"""Stage `align_near`: the face of a result that lies where the target's lies -> its own FFHQ-aligned crop and landmarks.

No part of the pipeline: an evaluation measures a swapped face as it is found in the output, by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from e4s_models.warp import ffhq_crop_to_frame, resample, transform_points
from tasks.align import STAGE as ALIGN
from tasks.stage import Inputs, ItemError, Outputs, Stage, each

if TYPE_CHECKING:
    from e4s_models.dlib_face import FaceDetector


@dataclass(frozen=True, kw_only=True)
class AlignNearConfig:
    side: int = 1024  # px of the aligned crop
    reach: float = 0.2  # of the target's crop: a find whose landmarks' middle lies farther from the target's is another face

    def __post_init__(self) -> None:
        if self.side < 64:
            raise ValueError(f"side must be at least 64 px, got {self.side}")
        if not 0 < self.reach <= 1:
            raise ValueError(f"reach is a fraction of the crop from 0 to 1, got {self.reach}")


def align_near(detector: FaceDetector, config: AlignNearConfig, inputs: Inputs) -> Outputs:
    """Reads `image`, and of the target `crop_to_frame` and `landmarks`; writes `face` and `landmarks` as `tasks.align.align` does.

    Of several faces the one nearest to the target's counts. Where the picture is the target itself, so is the crop.
    """
    rgb = inputs["image"].read().rgb8
    to_crop = np.linalg.inv(inputs["crop_to_frame"])
    middle = np.asarray(inputs["landmarks"], np.float64).mean(axis=0)
    found = [
        (float(np.hypot(*(transform_points(to_crop, face.landmarks).mean(axis=0) - middle))), face.landmarks)
        for face in detector.detect(rgb)
    ]
    distance, landmarks = min(found, key=lambda entry: entry[0], default=(np.inf, None))
    if landmarks is None or distance > config.reach * config.side:
        raise ItemError("no face found in the output where the target's face is")
    crop_to_frame = ffhq_crop_to_frame(landmarks, config.side)
    return {
        "face": resample(rgb, crop_to_frame, config.side, config.side),
        "landmarks": transform_points(np.linalg.inv(crop_to_frame), landmarks).astype(np.float32),
    }


STAGE = Stage(
    name="align_near",
    backend="dlib",
    version=1,
    config=AlignNearConfig,
    load=ALIGN.load,
    run=each(align_near),
    reads=("image", "crop_to_frame", "landmarks"),
    writes={"face": "image", "landmarks": "array"},
    weights=ALIGN.weights,
    libraries=ALIGN.libraries,
)
