"""Backend `followed` of stage `align`: a crop where the face is known to be, as in a frame of a video whose tracks were smoothed.

A picture of which nothing is known is searched, as the backend `dlib` does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from e4s_models.warp import resample, transform_points
from tasks.align import STAGE as SEARCHED
from tasks.align import AlignConfig, align
from tasks.stage import Inputs, Outputs, each
from tasks.track import Crops

if TYPE_CHECKING:
    from e4s_models.dlib_face import FaceDetector


def course_of(crops: Crops, index: int) -> tuple[float, ...]:
    """One frame of a person's way through a video as plain numbers, part of an item's key: centre, axis and landmarks, px."""
    return tuple(np.concatenate([crops.centre[index], crops.axis[index], crops.landmarks[index].ravel()]).tolist())


def crop_of(course: tuple[float, ...]) -> Crops:
    """The inverse of `course_of`: a table of one frame."""
    values = np.array(course, np.float64)
    return Crops(values[None, 0:2], values[None, 2:4], values[4:].reshape(1, 68, 2))


def align_followed(detector: FaceDetector, config: AlignConfig, inputs: Inputs) -> Outputs:
    """Reads `image`, `face_index` and `course` (None, or see `course_of`); writes what `tasks.align.align` does.

    With a course nothing is searched: the crop is cut by it.
    """
    if inputs["course"] is None:
        return align(detector, config, inputs)
    crop = crop_of(inputs["course"])
    crop_to_frame = crop.crop_to_frame(0, config.side)
    return {
        "face": resample(inputs["image"].read().rgb8, crop_to_frame, config.side, config.side),
        "crop_to_frame": crop_to_frame,
        "landmarks": transform_points(np.linalg.inv(crop_to_frame), crop.landmarks[0]).astype(np.float32),
    }


STAGE = replace(SEARCHED, backend="followed", version=1, run=each(align_followed), reads=("image", "face_index", "course"))

BACKENDS = {"followed": STAGE}
