"""Faces in every frame of a video: the picture detector, with its search narrowed by what fixed frames of the video show.

A full search (all sizes, all turns) of a frame without a face costs a hundred times a plain one. So it is made on every `every`-th frame
only; the frames between are searched at the size and in the turns of the faces found at both ends. Nothing is carried along from frame
to frame, so the result does not depend on where a chunk begins, as long as that is at a multiple of `every`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from math import ceil
from typing import Final

import numpy as np

from e4s_models.dlib_face import Detection, FaceDetector, UInt8, sort_faces

EVERY: Final = 12  # frames
_COARSE_SIDE: Final = 640  # px, long side of the copy that is searched if nothing is known: faces from an eighth of it
_FACE_SIDE: Final = 110  # px that a known face should have in the searched copy; the detector's window has 80
_FINEST_SCALE: Final = 2.0
_UPRIGHT: Final = 30.0  # degrees that the detector itself bears


class VideoFaceDetector(FaceDetector):
    """`FaceDetector` for the frames of one video."""

    def detect_chunk(self, frames: Iterable[UInt8], count: int, at_least: int = 1, every: int = EVERY) -> Iterator[list[Detection]]:
        """Faces of `count` frames, RGB (H, W, 3) uint8, each in the order of `sort_faces`.

        The first frame lies at a multiple of `every`; after the last a further one is read, if there is one, as the other end. At most
        `every` + 1 frames are held. `at_least` faces are looked for in a full search.
        """
        source = iter(frames)
        group = list(itertools.islice(source, 1))
        begin = self.detect(group[0], at_least) if group else []
        left = count
        while group and left > 0:
            group += itertools.islice(source, every)
            after = group.pop() if len(group) > every else None
            end = self.detect(after, at_least) if after is not None else []
            yield begin
            for rgb in group[1:left]:
                yield self.detect_near(rgb, [*begin, *end], max(1, sum(face.is_clear for face in begin)))
            left -= len(group)
            group, begin = ([after] if after is not None else []), end

    def detect_near(self, rgb: UInt8, hints: list[Detection], at_least: int) -> list[Detection]:
        """Faces of RGB (H, W, 3) uint8 at about the size and turn of the clear hints; without any, upright faces in a coarse copy."""
        height, width = rgb.shape[:2]
        clear = [face for face in hints if face.is_clear]
        scale = min(1.0, _COARSE_SIDE / max(height, width))
        if clear:
            scale = min(max(scale, _FACE_SIDE / min(face.side for face in clear)), _FINEST_SCALE)
        turns = sorted({_turn_of(face) for face in clear}) or [0]
        return sort_faces(self._search(rgb, turns, ceil(height * width * scale * scale), at_least))


def _turn_of(face: Detection) -> int:
    """By how many degrees the frame must be turned counter-clockwise so that the detector bears the face: 0, or a multiple of 45."""
    left, right = face.landmarks[36:42].mean(axis=0), face.landmarks[42:48].mean(axis=0)
    x, y = (right - left).tolist()
    angle = float(np.degrees(np.arctan2(y, x)))
    return 0 if abs(angle) <= _UPRIGHT else round(angle / 45) * 45 % 360
