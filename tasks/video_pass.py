"""The passes before and after the swap of a video: faces and cuts of a stretch of frames, one person's course through all of them, and
how a swapped face gets back into a frame's planes.

Pure functions from frames and arrays to arrays; what is kept of them and under which key is the flow's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np

from e4s_models.video_faces import EVERY
from e4s_models.warp import Matrix, ffhq_crop_to_frame, resample, transform_points
from tasks.align import pick_face
from tasks.frame import Frame
from tasks.paste import PasteConfig, feather, like_frame, warp_patch
from tasks.planes import PlanarFrame, paste_patch
from tasks.stage import Array, Float32, ItemError, Outputs, UInt8
from tasks.track import (
    BRIDGED,
    DETECTED,
    NONE,
    Bool,
    Crops,
    Faces,
    SmoothConfig,
    Track,
    TrackConfig,
    choose_tracks,
    cuts_of,
    follow,
    link_faces,
    no_course,
    shot_changes,
    shot_feature,
    smooth_course,
)
from tasks.video import FrameTable, Playhead

if TYPE_CHECKING:
    from e4s_models.dlib_face import FaceDetector
    from e4s_models.id_networks import IdNetwork
    from e4s_models.video_faces import VideoFaceDetector

DETECT_RANGE: Final = 8 * EVERY  # frames whose detections are one artifact; ranges lie on this grid
ID_NETWORK: Final = "arcface_mbf"
_ID_SIDE: Final = 256  # px of the aligned crop that the ID network's square is cut from
_ID_SAMPLES: Final = 5  # detections of a track that are looked at

Features = Callable[[Faces, Sequence[Track]], list[Track]]
"""Gives tracks their identity features."""


@dataclass(frozen=True, eq=False)
class Still:
    """One frame of a video as the root input `image` of the stages."""

    path: str
    """Of the video."""
    planes: PlanarFrame

    @property
    def pixels(self) -> int:
        return self.planes.width * self.planes.height

    @cached_property
    def rgb(self) -> UInt8:
        """(H, W, 3), upright."""
        return self.planes.rgb8()

    def read(self) -> Frame:
        return Frame(self.rgb)

    def text(self) -> dict[str, str]:
        return {}


def detect_ranges(frames: int) -> list[tuple[int, int]]:
    """The stretches [start, stop) in which the faces of a video are looked for."""
    return [(start, min(start + DETECT_RANGE, frames)) for start in range(0, frames, DETECT_RANGE)]


def detect_range(detector: VideoFaceDetector, frames: Iterable[PlanarFrame], start: int, stop: int) -> Outputs:
    """Faces in frames [start, stop); `frames` gives one more, if the video goes on.

    Writes `frame` (N,) int64, `box` (N, 4) and `score` (N,) float64, `landmarks` (N, 68, 2) float32, a row per face, see `Faces`; and
    `change` float64, how much each frame differs from the next one, see `shot_changes`.
    """
    features: list[Float32] = []

    def seen() -> Iterator[UInt8]:
        for planes in frames:
            rgb = planes.rgb8()
            features.append(shot_feature(rgb))
            yield rgb

    found = [
        (frame, face)
        for frame, faces in enumerate(detector.detect_chunk(seen(), stop - start), start)
        for face in sorted(faces, key=lambda face: face.box)
    ]
    return {
        "frame": np.array([frame for frame, _ in found], np.int64),
        "box": np.array([face.box for _, face in found], np.float64).reshape(-1, 4),
        "score": np.array([face.score for _, face in found], np.float64),
        "landmarks": np.array([face.landmarks for _, face in found], np.float32).reshape(-1, 68, 2),
        "change": shot_changes(np.stack(features)),
    }


def track_person(
    parts: Sequence[Mapping[str, Array]],
    frames: int,
    who: int | Float32,
    track: TrackConfig,
    smooth: SmoothConfig,
    min_face: int,
    features: Features | None,
) -> Outputs:
    """What all ranges of a video showed -> the chosen person's smoothed course.

    `who` as in `choose_tracks`; faces whose box is smaller than `min_face` px are left out; `features` is asked where people have to be
    told apart. Writes, a row per frame: `state` uint8, `run` int64, `score` float64 (see `Course`), `cut` uint8, and `centre`, `axis`
    (T, 2) float64, `landmarks` (T, 68, 2) float32 (see `Crops`), NaN where there is no face. Raises ItemError if nobody is like that.
    """
    rows = {name: np.concatenate([part[name] for part in parts]) for name in ("frame", "box", "score", "landmarks")}
    large = rows["box"][:, 2] - rows["box"][:, 0] >= min_face
    faces = Faces(*(rows[name][large].astype(kind) for name, kind in _KINDS.items()))
    cuts = cuts_of(np.concatenate([part["change"] for part in parts])[: frames - 1], track)
    tracks = link_faces(faces, cuts, track)
    course = no_course(frames)
    if tracks:
        if features and (isinstance(who, np.ndarray) or len(tracks) > 1):
            tracks = features(faces, tracks)
        course = follow(faces, choose_tracks(tracks, cuts, who, track), frames)
    crops = smooth_course(course, smooth)
    return {
        "state": course.state,
        "run": course.run,
        "score": course.score,
        "cut": cuts.astype(np.uint8),
        "centre": crops.centre,
        "axis": crops.axis,
        "landmarks": crops.landmarks.astype(np.float32),
    }


_KINDS: Final = {"frame": np.int64, "box": np.float64, "score": np.float64, "landmarks": np.float64}


@dataclass(frozen=True, eq=False)
class Way:
    """What `track_person` wrote, read back."""

    state: UInt8
    run: Array
    score: Array
    cut: Array
    crops: Crops

    @classmethod
    def of(cls, outputs: Mapping[str, Array]) -> Way:
        crops = Crops(outputs["centre"], outputs["axis"], outputs["landmarks"].astype(np.float64))
        return cls(outputs["state"], outputs["run"], outputs["score"], outputs["cut"].astype(np.bool_), crops)

    @property
    def with_face(self) -> Bool:
        """(T,)"""
        return np.asarray(self.state != NONE)

    @property
    def bridged(self) -> Bool:
        """(T,) whether the face was not detected but is known from the frames around."""
        return np.asarray(self.state == BRIDGED)

    def course(self, frame: int) -> tuple[float, ...] | None:
        """Where the face is, as keys hold it: centre, axis and landmarks, px; None without it."""
        if self.state[frame] == NONE:
            return None
        crops = self.crops
        return tuple(np.concatenate([crops.centre[frame], crops.axis[frame], crops.landmarks[frame].ravel()]).tolist())


def identify(network: IdNetwork, playhead: Playhead, faces: Faces, tracks: Sequence[Track], config: TrackConfig) -> list[Track]:
    """Tracks with the mean identity feature of a few of their clear detections; the video is read once, forwards."""
    samples: list[tuple[int, int, int]] = []  # frame, row, track
    for number, track in enumerate(tracks):
        clear = track.rows[faces.score[track.rows] >= config.clear]
        places = np.unique(np.linspace(0, len(clear) - 1, _ID_SAMPLES).round().astype(int))
        samples += [(int(faces.frame[row]), int(row), number) for row in clear[places].tolist()]
    found: list[list[Float32]] = [[] for _ in tracks]
    rgb, at = None, -1
    for frame, row, number in sorted(samples):
        if frame != at:
            rgb, at = next(playhead.frames(frame, frame + 1)).rgb8(), frame
        assert rgb is not None
        found[number].append(identity(network, rgb, faces.landmarks[row]))
    return [replace(track, feature=_direction(np.mean(mine, axis=0))) for track, mine in zip(tracks, found, strict=True)]


def identity(network: IdNetwork, rgb: UInt8, landmarks: Array) -> Float32:
    """The identity feature (D,), of length 1, of the face with these landmarks (68, 2) px in RGB (H, W, 3)."""
    import torch

    matrix = ffhq_crop_to_frame(landmarks, _ID_SIDE)
    crop = resample(rgb, matrix, _ID_SIDE, _ID_SIDE)
    points = transform_points(np.linalg.inv(matrix), landmarks).astype(np.float32)
    face = torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))).float()[None] / 127.5 - 1  # [1, 3, S, S]
    return _direction(network.features(face, torch.from_numpy(points)[None])[0].cpu().numpy())


def reference_identity(network: IdNetwork, detector: FaceDetector, rgb: UInt8, min_face: int) -> Float32:
    """The identity feature of the largest face of a picture RGB (H, W, 3). Raises ItemError if it shows none."""
    try:
        face = pick_face(detector.detect(rgb), 0, min_face)
    except ItemError as error:
        raise ItemError(f"the picture of the person to choose: {error}") from None
    return identity(network, rgb, face.landmarks)


def _direction(feature: Array) -> Float32:
    return np.asarray(feature / max(float(np.linalg.norm(feature)), 1e-12), np.float32)


def spread_frames(way: Way, count: int) -> list[int]:
    """At most `count` frames in which the face was found, spread evenly over all that have it."""
    found = np.flatnonzero(way.state == DETECTED)
    places = (np.arange(min(count, len(found))) + 0.5) * len(found) / max(min(count, len(found)), 1)
    return [int(frame) for frame in found[places.astype(int)]]


def put_back(still: Still, face: UInt8, mask: UInt8, crop_to_frame: Matrix, config: PasteConfig) -> PlanarFrame:
    """A frame with the swapped crop RGB (S, S, 3) in it, where the mask (S, S) uint8 is set; every other sample keeps its bits."""
    width, height = still.planes.size
    patch = warp_patch(like_frame(face, still.rgb), feather(mask, config), crop_to_frame, width, height)
    return still.planes if patch is None else paste_patch(still.planes, patch.pixels, patch.weights, patch.left, patch.top)


def time_of(table: FrameTable, frame: int) -> float:
    """When a frame is presented, s from the beginning of the earliest stream."""
    return float(int(table.pts[frame]) * table.tick - table.origin)
