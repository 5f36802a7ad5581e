"""Faces and their 68 landmarks by dlib (HOG detector, regression-tree landmarks), at any size and turned any way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape
from e4s_models.warp import Matrix, ffhq_crop_to_frame, resample, scale_of, transform_points
from e4s_models.weights import weight_path

UInt8 = npt.NDArray[np.uint8]

_COARSE_SIDE: Final = 640  # px, long side of the first copy searched; the detector's window is 80 px
_FINEST_SCALE: Final = 2.0  # of the frame: faces down to 40 px
_UPRIGHT_PIXELS: Final = 16_000_000  # px of the largest copy searched upright, about 0.3 GB
_TURNED_PIXELS: Final = 1_200_000  # px of the largest copy searched turned: seven passes
_CANVAS_GROWTH: Final = 4.0  # times as many px as its copy a turned canvas may have; only pictures longer than 5.8 to 1 are bounded by it
_TURNS: Final = (90, 270, 180, 45, 315, 135, 225)  # degrees; the detector itself bears about 30
_CLEAR: Final = 0.5  # detector score; upright faces score 1 to 3, chance finds below 0.4
_REFINE_SIDE: Final = 512  # px of the aligned crop in which landmarks are refined
_REFINE_BOX: Final = (0.24, 0.31, 0.76, 0.83)  # left, top, right, bottom in that crop: where the detector's box lies on average
_REFINE_ROUNDS: Final = 2
_REFINE_SHIFT: Final = 8  # px of that crop by which the box is moved and resized; the mean halves the landmarks' jitter
_REFINE_BOXES: Final = ((0, 0, 0, 0), (-1, -1, 1, 1), (1, 1, -1, -1), (1, 0, 1, 0), (-1, 0, -1, 0), (0, 1, 0, 1), (0, -1, 0, -1))


@dataclass(frozen=True, eq=False)
class Detection:
    """One face in a frame; points follow `e4s_models.warp`."""

    box: tuple[float, float, float, float]
    """left, top, right, bottom px: a square about from the brows to the chin, upright even if the face is turned; may leave the frame."""
    score: float
    """The detector's: 0 is its own threshold, clear faces have 1 to 3."""
    landmarks: npt.NDArray[np.float32]
    """(68, 2) px, iBUG 300-W order."""

    @property
    def side(self) -> float:
        """Side of the box, px."""
        return self.box[2] - self.box[0]

    @property
    def is_clear(self) -> bool:
        """Whether the detector is sure; what is not clear may be a tiny face or none."""
        return self.score >= _CLEAR


@dataclass(frozen=True, eq=False)
class _Copy:
    """A resized and turned copy of the frame that is searched."""

    pixels: npt.NDArray[Any]
    to_frame: Matrix


class FaceDetector:
    """dlib's frontal face detector and the 68-point predictor `dlib_landmarks68`."""

    def __init__(self, detector: Any, predictor: Any) -> None:
        self._detector = detector
        self._predictor = predictor

    @classmethod
    def load(cls) -> FaceDetector:
        import dlib

        return cls(dlib.get_frontal_face_detector(), dlib.shape_predictor(str(weight_path("dlib_landmarks68"))))

    def detect(self, rgb: UInt8, at_least: int = 1) -> list[Detection]:
        """Find faces in RGB (H, W, 3) uint8, in the order of `sort_faces`.

        Copies from coarse to fine are searched until `at_least` clear faces are found; only if no clear face is found upright are turned
        copies searched, and then the turn with the clearest face counts.
        """
        check_shape(rgb, "H W 3")
        faces = self._search(rgb, (0,), _UPRIGHT_PIXELS, at_least)
        if not any(face.is_clear for face in faces):
            turned = self._search(rgb, _TURNS, _TURNED_PIXELS, at_least)
            faces = [face for face in turned if face.is_clear] or faces
        return sort_faces(faces)

    def _search(self, rgb: UInt8, turns: Sequence[int], max_pixels: int, at_least: int) -> list[Detection]:
        """The faces of the turn with the clearest face; every turn is searched coarsely before one is searched finely."""
        found: dict[int, list[Detection]] = {degrees: [] for degrees in turns}
        best: list[Detection] = []
        for scale in _scales(rgb, turns, max_pixels):
            for degrees in turns:
                copy = _turn(rgb, scale, degrees)
                boxes, scores, _ = self._detector.run(copy.pixels, 0, 0.0)
                faces = [self._landmarks(rgb, copy, box, score) for box, score in zip(boxes, scores, strict=True)]
                found[degrees] = merge_faces(found[degrees] + faces)
            best = max(found.values(), key=lambda faces: max((face.score for face in faces), default=0.0))
            if sum(face.is_clear for face in best) >= at_least:
                break
        return best

    def _landmarks(self, rgb: UInt8, copy: _Copy, box: Any, score: float) -> Detection:
        """Landmarks of one find, refined in aligned crops: they depend little on the size, the turn and the exact box of the find."""
        import dlib

        landmarks = transform_points(copy.to_frame, _predict(self._predictor, copy.pixels, box))
        edges = np.rint(np.array(_REFINE_BOX) * _REFINE_SIDE).astype(int) + _REFINE_SHIFT * np.array(_REFINE_BOXES)  # (7, 4) px
        for _ in range(_REFINE_ROUNDS):
            crop_to_frame = ffhq_crop_to_frame(landmarks, _REFINE_SIDE)
            crop = np.ascontiguousarray(resample(rgb, crop_to_frame, _REFINE_SIDE, _REFINE_SIDE))
            guesses = [_predict(self._predictor, crop, dlib.rectangle(*edge)) for edge in edges.tolist()]
            landmarks = transform_points(crop_to_frame, np.mean(guesses, axis=0))
        centre = np.array((box.left() + box.right(), box.top() + box.bottom())) / 2
        (x, y), half = transform_points(copy.to_frame, centre[None])[0].tolist(), box.width() * scale_of(copy.to_frame) / 2
        return Detection((x - half, y - half, x + half, y + half), float(score), landmarks.astype(np.float32))


def _predict(predictor: Any, rgb: npt.NDArray[Any], box: Any) -> npt.NDArray[np.float64]:
    return np.array([(point.x, point.y) for point in predictor(rgb, box).parts()], np.float64)


def _scales(rgb: UInt8, turns: Sequence[int], max_pixels: int) -> Iterator[float]:
    """Sizes of the searched copies, from coarse to fine, each twice the one before.

    The finest is bounded by scale, by pixels of the copy, and by pixels of the canvas on which it is turned.
    """
    height, width = rgb.shape[:2]
    canvas = max(np.prod(_canvas(height, width, degrees), dtype=float) for degrees in turns)
    finest = min(_FINEST_SCALE, (max_pixels / (height * width)) ** 0.5, (_CANVAS_GROWTH * max_pixels / canvas) ** 0.5)
    scale = min(1.0, _COARSE_SIDE / max(height, width), finest)
    while scale < finest * 0.99:
        yield scale
        scale = min(2 * scale, finest)
    yield finest


def _turn(rgb: UInt8, scale: float, degrees: int) -> _Copy:
    """Resize the frame and turn it counter-clockwise about its centre, on a canvas that holds all of it (black around)."""
    height, width = rgb.shape[:2]
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = cv2.resize(rgb, (columns, rows), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    resized_to_frame = np.diag((width / columns, height / rows, 1.0))
    resized_to_frame[:2, 2] = (width / columns - 1) / 2, (height / rows - 1) / 2
    if degrees == 0:
        return _Copy(pixels, resized_to_frame)
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    canvas_height, canvas_width = _canvas(rows, columns, degrees)
    to_resized = np.array(((cosine, -sine, 0.0), (sine, cosine, 0.0), (0.0, 0.0, 1.0)))
    to_resized[:2, 2] = (columns - 1) / 2, (rows - 1) / 2
    to_resized[:2, 2] -= to_resized[:2, :2] @ ((canvas_width - 1) / 2, (canvas_height - 1) / 2)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    canvas = cv2.warpAffine(pixels, to_resized[:2], (canvas_width, canvas_height), flags=flags)
    return _Copy(canvas, resized_to_frame @ to_resized)


def _canvas(rows: int, columns: int, degrees: int) -> tuple[int, int]:
    """Return height and width px of the canvas that holds (rows, columns) px turned by `degrees`."""
    cosine, sine = abs(np.cos(np.radians(degrees))), abs(np.sin(np.radians(degrees)))
    return ceil(round(rows * cosine + columns * sine, 6)), ceil(round(rows * sine + columns * cosine, 6))


def sort_faces(faces: list[Detection]) -> list[Detection]:
    """Clear faces before doubtful ones, the larger first; of the same side (whole px), from left to right, then downwards."""
    return sorted(faces, key=lambda face: (not face.is_clear, -round(face.side), face.box[0], face.box[1]))


def merge_faces(faces: list[Detection]) -> list[Detection]:
    """Drop all but the clearest of finds that lie on the same face: their landmarks' centres are closer than a third of the larger box."""
    kept: list[Detection] = []
    for face in sorted(faces, key=lambda face: -face.score):
        centre = face.landmarks.mean(axis=0)
        if all(np.hypot(*(centre - other.landmarks.mean(axis=0))) > max(face.side, other.side) / 3 for other in kept):
            kept.append(face)
    return kept
