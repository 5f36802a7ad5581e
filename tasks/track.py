"""Faces found frame by frame -> one person's course through a video, its gaps bridged and its crop smoothed over time.

Pure functions on tables that are small beside the video: a whole video's detections fit in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape
from e4s_models.warp import Matrix, ffhq_crop_to_frame
from tasks.stage import Float32, ItemError, UInt8

Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

NONE, DETECTED, BRIDGED = 0, 1, 2
"""How a frame of a `Course` came by its landmarks."""

_THUMBNAIL: Final = (32, 18)  # px, width and height
_HISTOGRAM: Final = 4  # bins per channel
_CURVE: Final = 4  # frames on each side of the parabola that tells how motion accelerates
_SURE: Final = 3.0  # standard errors
_TRUNCATE: Final = 4.0  # standard deviations at which a Gaussian ends
_NEAR: Final = 3.0  # likewise for what is dear to find on further frames


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    max_gap: int = 12  # frames without a detection that are bridged
    reach: float = 0.5  # sides of the face's box between a detection and where the face was expected
    reach_per_frame: float = 0.1  # sides more for every frame since it was last seen, at most twice `reach`
    resize: float = 1.6  # ratio of the sides of one face's boxes in neighbouring detections, at most
    clear: float = 0.5  # detector score that one detection of a track must have
    same_person: float = 0.3  # cosine of identity features from which two tracks are one person
    stranger: float = 0.1  # cosine below which a detection is not the tracked person, wherever it lies
    cut: float = 0.3  # difference of neighbouring frames (0 to 1) that may be a cut
    cut_stands_out: float = 2.5  # times the differences around it

    def __post_init__(self) -> None:
        if self.max_gap < 0 or self.reach <= 0 or self.resize < 1:
            raise ValueError(
                f"max_gap must not be negative, reach be above 0 and resize at least 1, got {self.max_gap}, {self.reach}, {self.resize}"
            )


@dataclass(frozen=True, kw_only=True)
class SmoothConfig:
    centre: float = 1.0  # frames, standard deviation for the crop's centre (the published pipeline)
    axes: float = 3.0  # frames, likewise for its size and turn
    landmarks: float = 1.0  # frames
    mesh: float = 1.0  # frames, for the dense mesh that brings the source to the target's pose and expression
    mask: float = 1.0  # frames, for the target's label map: what a pixel is over the frames around decides
    light: float = 2.0  # frames, over which the colours of the target's skin are shared that guide the recolouring
    tolerance: float = 0.004  # of the crop's half side: how far smoothing may pull a face that accelerates off its place
    axes_tolerance: float = 0.012  # likewise for size and turn, which a talking mouth alone changes from frame to frame
    farthest: float = 0.02  # likewise: no smoothed point lies further from where it was found, whatever happened
    axes_farthest: float = 0.06  # likewise for size and turn

    def __post_init__(self) -> None:
        if (
            min(self.centre, self.axes, self.landmarks, self.mesh, self.mask, self.light) < 0
            or min(self.tolerance, self.axes_tolerance, self.farthest, self.axes_farthest) <= 0
        ):
            raise ValueError(f"standard deviations must be at least 0, tolerances and farthest above 0, got {self}")

    @property
    def overlap(self) -> int:
        """Frames on each side that decide a smoothed frame: what a chunk must read beyond its ends."""
        return max(2 * _CURVE, ceil(_TRUNCATE * max(self.centre, self.axes, self.landmarks, self.mesh)))

    @property
    def mask_reach(self) -> int:
        """Frames on each side whose label maps decide a frame's."""
        return ceil(_NEAR * self.mask)

    @property
    def light_reach(self) -> int:
        """Frames on each side whose colours are shared with a frame."""
        return ceil(_NEAR * self.light)


@dataclass(frozen=True, eq=False)
class Faces:
    """All faces found in a video, a row each, by frame."""

    frame: npt.NDArray[np.int64]
    """(N,) ascending."""
    box: Float64
    """(N, 4) left, top, right, bottom px."""
    score: Float64
    """(N,)"""
    landmarks: Float64
    """(N, 68, 2) px."""
    features: Float32 | None = None
    """(N, D) identity features, any length; None where nobody computed them."""

    def __post_init__(self) -> None:
        rows = check_shape(self.frame, "N")["N"]
        check_shape(self.box, f"{rows} 4")
        check_shape(self.score, f"{rows}")
        check_shape(self.landmarks, f"{rows} 68 2")
        if self.features is not None:
            check_shape(self.features, f"{rows} D")
        if (np.diff(self.frame) < 0).any():
            raise ValueError("faces must be ordered by frame")

    @property
    def side(self) -> Float64:
        """(N,) px."""
        return np.asarray(self.box[:, 2] - self.box[:, 0], np.float64)


@dataclass(frozen=True, eq=False)
class Track:
    """One face from its first to its last detection within a shot."""

    rows: npt.NDArray[np.int64]
    """(n,) rows of `Faces`, a frame each."""
    frames: npt.NDArray[np.int64]
    """(n,) their frames, ascending; gaps between them are bridged."""
    weight: float
    """px^2 frames: how much of the video the face fills; bridged frames do not count."""
    feature: Float32 | None
    """(D,) mean direction of the identity features, length 1."""

    @property
    def span(self) -> range:
        return range(int(self.frames[0]), int(self.frames[-1]) + 1)


@dataclass(frozen=True, eq=False)
class Course:
    """One person through a video of T frames."""

    state: UInt8
    """(T,) NONE, DETECTED or BRIDGED."""
    run: npt.NDArray[np.int64]
    """(T,) number of the uninterrupted stretch, -1 where there is no face; nothing is smoothed across stretches."""
    landmarks: Float64
    """(T, 68, 2) px, NaN where there is no face."""
    score: Float64
    """(T,) of the detector, NaN where nothing was detected."""

    @property
    def without_face(self) -> npt.NDArray[np.int64]:
        """Frames that pass through untouched."""
        return np.flatnonzero(self.state == NONE)


@dataclass(frozen=True, eq=False)
class Crops:
    """Smoothed FFHQ crops and landmarks of T frames; NaN where there is no face."""

    centre: Float64
    """(T, 2) px of the frame."""
    axis: Float64
    """(T, 2) px, from the centre to the middle of the crop's right side."""
    landmarks: Float64
    """(T, 68, 2) px of the frame."""

    def crop_to_frame(self, index: int, side: int) -> Matrix:
        """(3, 3): px of a crop of side x side px -> px of the frame; see `e4s_models.warp`."""
        x = self.axis[index]
        y = x[::-1] * (-1, 1)
        matrix = np.eye(3)
        matrix[:2, 0], matrix[:2, 1] = 2 * x / side, 2 * y / side
        matrix[:2, 2] = self.centre[index] - (x + y) * (1 - 1 / side)
        return matrix


def shot_feature(rgb: UInt8) -> Float32:
    """What a frame looks like from afar, RGB (H, W, 3) uint8 -> (F,): a thumbnail and its colour histogram, each of unit scale."""
    check_shape(rgb, "H W 3")
    small = cv2.resize(rgb, _THUMBNAIL, interpolation=cv2.INTER_AREA)
    bins = (small.astype(np.int64) * _HISTOGRAM) >> 8
    index = (bins[..., 0] * _HISTOGRAM + bins[..., 1]) * _HISTOGRAM + bins[..., 2]
    histogram = np.bincount(index.ravel(), minlength=_HISTOGRAM**3) / index.size
    return np.concatenate((small.ravel() / 255, histogram)).astype(np.float32)


def find_cuts(features: npt.NDArray[Any], config: TrackConfig) -> Bool:
    """Features (T, F) of neighbouring frames -> (T,) whether a new shot begins with the frame; the first one does.

    The difference is the mean of the thumbnails' (four times it, up to 1) and the histograms' (half the L1 distance). A cut's stands out
    from those of the two frames before and after; a flash, a pan and a fast hand do not.
    """
    return cuts_of(shot_changes(features), config) if check_shape(features, "T F")["T"] else np.zeros(0, np.bool_)


def shot_changes(features: npt.NDArray[Any]) -> Float64:
    """Features (T, F) of neighbouring frames -> how much each differs from the next, (T - 1,) 0 to 1; see `find_cuts`."""
    split = _THUMBNAIL[0] * _THUMBNAIL[1] * 3
    steps = np.abs(np.diff(np.asarray(features, np.float64), axis=0))
    return np.asarray((np.minimum(4 * steps[:, :split].mean(axis=1), 1) + steps[:, split:].sum(axis=1) / 2) / 2, np.float64)


def cuts_of(change: Float64, config: TrackConfig) -> Bool:
    """Changes (T - 1,) of T neighbouring frames -> (T,) whether a new shot begins with the frame, as `find_cuts` says."""
    count = len(change) + 1
    around = np.pad(change, 2)
    other = np.max([around[shift : shift + count - 1] for shift in (0, 1, 3, 4)], axis=0) if count > 1 else change
    cuts = np.zeros(count, np.bool_)
    cuts[:1] = True
    cuts[1:] = (change >= config.cut) & (change >= config.cut_stands_out * other)
    return cuts


def link_faces(faces: Faces, cuts: Bool, config: TrackConfig) -> list[Track]:
    """Detections -> tracks within shots, in the order in which they begin.

    Frame by frame the likeliest pairs of track and detection are joined: near to where the track is expected at its pace, of like size, and
    not of another person where identity features tell. A track without any clear detection is a chance find and is dropped.
    """
    centres = faces.landmarks.mean(axis=1)  # [N, 2]
    features = _unit(faces.features) if faces.features is not None else None
    sides, begins = faces.side, np.searchsorted(faces.frame, np.arange(len(cuts) + 1))
    running: list[list[int]] = []
    ended: list[list[int]] = []
    for frame in range(len(cuts)):
        if cuts[frame]:
            ended, running = ended + running, []
        late = [rows for rows in running if frame - faces.frame[rows[-1]] > config.max_gap + 1]
        ended += late
        running = [rows for rows in running if not any(rows is other for other in late)]
        found = range(begins[frame], begins[frame + 1])
        pairs = []
        for number, rows in enumerate(running):
            for row in found:
                cost = _cost(rows, row, faces.frame, centres, sides, features, config)
                if cost is not None:
                    pairs.append((cost, number, row))
        taken_tracks: set[int] = set()
        taken_rows: set[int] = set()
        for _, number, row in sorted(pairs):
            if number not in taken_tracks and row not in taken_rows:
                running[number].append(row)
                taken_tracks.add(number)
                taken_rows.add(row)
        running += [[row] for row in found if row not in taken_rows]
    kept = [rows for rows in ended + running if faces.score[rows].max() >= config.clear]
    return [_track(rows, faces, sides, features) for rows in sorted(kept)]


def _cost(
    rows: list[int], row: int, frame: npt.NDArray[np.int64], centres: Float64, sides: Float64, features: Float32 | None, config: TrackConfig
) -> float | None:
    """How unlikely it is that a detection goes on with a track; None if it cannot."""
    last = rows[-1]
    elapsed = int(frame[row] - frame[last])
    expected = centres[last]
    if len(rows) > 1:
        pace = (centres[last] - centres[rows[-2]]) / int(frame[last] - frame[rows[-2]])
        expected = expected + pace * min(elapsed, 3)
    side = (sides[last] + sides[row]) / 2
    distance = float(np.hypot(*(centres[row] - expected)) / side)
    nearest = min(distance, float(np.hypot(*(centres[row] - centres[last])) / side))  # it may have stopped
    ratio = float(max(sides[row], sides[last]) / min(sides[row], sides[last]))
    reach = min(config.reach + config.reach_per_frame * (elapsed - 1), 2 * config.reach)
    if nearest > reach or ratio > config.resize:
        return None
    if features is None:
        return distance
    alike = float(features[row] @ features[last])
    return None if alike < config.stranger else distance - alike / 2


def _track(rows: list[int], faces: Faces, sides: Float64, features: Float32 | None) -> Track:
    index = np.array(rows, np.int64)
    feature = None if features is None else _unit(features[index].mean(axis=0, keepdims=True))[0]
    return Track(index, faces.frame[index], float((sides[index] ** 2).sum()), feature)


def _unit(features: npt.NDArray[Any]) -> Float32:
    values = np.asarray(features, np.float32)
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12), np.float32)


def group_people(tracks: Sequence[Track], config: TrackConfig) -> list[list[Track]]:
    """Tracks -> people, who fills most of the video first. Tracks that overlap in time are different people.

    Beginning with the largest, a track joins the person that it is most alike, if alike enough.
    """
    people: list[list[Track]] = []
    for track in sorted(tracks, key=lambda track: (-track.weight, track.span[0], int(track.rows[0]))):
        best, best_alike = None, config.same_person
        for person in people:
            if track.feature is None or any(_overlap(track, other) for other in person):
                continue
            alike = max(float(track.feature @ other.feature) for other in person if other.feature is not None)
            if alike >= best_alike:
                best, best_alike = person, alike
        if best is None:
            people.append([track])
        else:
            best.append(track)
    return sorted(people, key=lambda person: (-sum(track.weight for track in person), person[0].span[0], int(person[0].rows[0])))


def _overlap(one: Track, other: Track) -> bool:
    return one.span[0] <= other.span[-1] and other.span[0] <= one.span[-1]


def choose_tracks(tracks: Sequence[Track], cuts: Bool, who: int | npt.NDArray[Any], config: TrackConfig) -> list[Track]:
    """The tracks of one person, none overlapping another, by time.

    `who` is 0 for the person who fills most of the video, 1 for the next, ..., or the identity feature (D,) of a reference picture. Without
    identity features people cannot be known again: then `who` counts the faces of each shot. Raises ItemError if there is no such person.
    """
    if not tracks:
        raise ItemError("no face was found in the video: it stays as it is.")
    if isinstance(who, np.ndarray):
        return _like_reference(tracks, who, config)
    if who < 0:
        raise ItemError(f"person {who} was asked for: people are counted from 0, the largest.")
    if tracks[0].feature is not None:
        people = group_people(tracks, config)
        found = "1 person was" if len(people) == 1 else f"{len(people)} people were"
        if who >= len(people):
            raise ItemError(f"person {who} was asked for but {found} found: choose --face 0 to {len(people) - 1} (0 is the largest).")
        return sorted(people[who], key=lambda track: track.span[0])
    shots = np.cumsum(cuts)
    chosen: list[Track] = []
    for shot in np.unique(shots[[track.span[0] for track in tracks]]):
        here = [track for track in tracks if shots[track.span[0]] == shot]
        rivals = sorted(here, key=lambda track: (-track.weight, int(track.rows[0])))
        lanes: list[list[Track]] = []  # a face that was lost and found again goes on in the first lane that is free
        for track in rivals:
            lane = next((lane for lane in lanes if not any(_overlap(track, other) for other in lane)), None)
            if lane is None:
                lanes.append([track])
            else:
                lane.append(track)
        chosen += lanes[who] if who < len(lanes) else []
    if not chosen:
        raise ItemError(f"face {who} was asked for but no shot shows so many: choose a smaller --face (0 is the largest).")
    return sorted(chosen, key=lambda track: track.span[0])


def _like_reference(tracks: Sequence[Track], reference: npt.NDArray[Any], config: TrackConfig) -> list[Track]:
    if any(track.feature is None for track in tracks):
        raise ValueError("a reference picture needs identity features of the detections")
    wanted = _unit(reference[None])[0]
    ranked = sorted(((float(track.feature @ wanted), track) for track in tracks if track.feature is not None), key=lambda pair: -pair[0])
    chosen: list[Track] = []
    for alike, track in ranked:
        if alike >= config.same_person and not any(_overlap(track, other) for other in chosen):
            chosen.append(track)
    if not chosen:
        raise ItemError(
            f"nobody in the video is like the reference picture (cosine {ranked[0][0]:.2f}, {config.same_person:g} is asked for): "
            "give another picture, or choose by number."
        )
    return sorted(chosen, key=lambda track: track.span[0])


def follow(faces: Faces, tracks: Sequence[Track], frames: int) -> Course:
    """Lay tracks (none overlapping) out over the frames of a video; frames between two detections of a track are interpolated."""
    course = no_course(frames)
    for number, track in enumerate(tracks):
        span = np.arange(track.span.start, track.span.stop)
        known = faces.landmarks[track.rows].reshape(len(track.rows), -1)
        points = np.stack([np.interp(span, track.frames, column) for column in known.T], axis=1)
        course.landmarks[span] = points.reshape(-1, 68, 2)
        course.state[span], course.state[track.frames] = BRIDGED, DETECTED
        course.run[span], course.score[track.frames] = number, faces.score[track.rows]
    return course


def no_course(frames: int) -> Course:
    """A video without the person."""
    empty = np.full((frames, 68, 2), np.nan)
    return Course(np.zeros(frames, np.uint8), np.full(frames, -1, np.int64), empty, np.full(frames, np.nan))


def smooth_course(course: Course, config: SmoothConfig) -> Crops:
    """FFHQ crops and landmarks of a course, smoothed in time; a frame depends on the `config.overlap` frames around it only.

    Each frame is a weighted straight-line fit to its stretch, with Gaussian weights symmetric in time: inside a stretch this is the plain
    Gaussian mean, without lag; at its ends, steady motion is kept too. Where motion accelerates, such a mean is off by
    sigma^2 / 2 times the acceleration, so there sigma shrinks until that is within `config.tolerance`.
    """
    frames = len(course.state)
    centre, axis = np.full((frames, 2), np.nan), np.full((frames, 2), np.nan)
    for index in np.flatnonzero(course.run >= 0):
        matrix = ffhq_crop_to_frame(course.landmarks[index], 2)
        centre[index], axis[index] = matrix[:2] @ (0.5, 0.5, 1.0), matrix[:2, 0]
    half = np.hypot(*axis.T)  # [T] px

    return Crops(
        _pull(centre[:, None], course.run, half, config.centre, config.tolerance, config.farthest)[:, 0],
        _pull(axis[:, None], course.run, half, config.axes, config.axes_tolerance, config.axes_farthest)[:, 0],
        _pull(course.landmarks, course.run, half, config.landmarks, config.tolerance, config.farthest),
    )


def smooth_mesh(points: Float64, run: npt.NDArray[np.int64], half: Float64, config: SmoothConfig) -> Float64:
    """Dense points (T, P, 3) px of the frame, stretches (T,), half sides of the crops (T,) px -> smoothed, as `smooth_course` does."""
    parts = (points[..., :2], np.stack([points[..., 2], np.zeros_like(points[..., 2])], axis=-1))  # the plane, and the depth
    plane, depth = (_pull(part, run, half, config.mesh, config.tolerance, config.farthest) for part in parts)
    return np.concatenate([plane, depth[..., :1]], axis=-1)


def _pull(points: Float64, run: npt.NDArray[np.int64], half: Float64, sigma: float, tolerance: float, farthest: float) -> Float64:
    """Points (T, P, 2) px smoothed, none further from its place than `farthest` half sides."""
    moved = _smooth(points, run, sigma, tolerance * half) - points
    far = np.linalg.norm(moved, axis=2) / (farthest * half[:, None])
    return np.asarray(points + moved / np.maximum(far, 1)[..., None], np.float64)


def _smooth(points: Float64, run: npt.NDArray[np.int64], sigma: float, allowed: Float64) -> Float64:
    """Points (T, P, 2) px, stretches (T,), allowed displacement (T,) px -> smoothed points. Sums run in one order whatever T is."""
    if sigma == 0 or not len(run):
        return points.copy()
    bend = _acceleration(points, run)  # [T, P]
    with np.errstate(divide="ignore", invalid="ignore"):
        sigmas = np.minimum(sigma, np.sqrt(2 * allowed[:, None] / bend))  # [T, P]
    sigmas = np.where(np.isfinite(sigmas), sigmas, sigma)
    reach = ceil(_TRUNCATE * sigma)
    s0, s1, s2 = (np.zeros(points.shape[:2]) for _ in range(3))
    m0, m1 = np.zeros_like(points), np.zeros_like(points)
    for k in range(-reach, reach + 1):
        moved, same = _neighbours(points, run, k)
        weight = np.where(same[:, None], np.exp(-0.5 * (k / np.maximum(sigmas, 1e-3)) ** 2), 0.0)
        offset = np.where(same[:, None, None], moved - points, 0.0)
        s0, s1, s2 = s0 + weight, s1 + weight * k, s2 + weight * k * k
        m0, m1 = m0 + weight[..., None] * offset, m1 + (weight * k)[..., None] * offset
    spread = s0 * s2 - s1 * s1
    line = np.where(spread[..., None] > 1e-9, s2[..., None] * m0 - s1[..., None] * m1, 0.0) / np.maximum(spread, 1e-9)[..., None]
    return np.asarray(points + line, np.float64)


def _acceleration(points: Float64, run: npt.NDArray[np.int64]) -> Float64:
    """How much motion surely accelerates, (T, P) px per frame^2.

    It is the second derivative of a parabola fitted to 2 x 4 + 1 frames, less three of its own standard errors: noise must not switch the
    smoothing off. Near the ends of a stretch that of the nearest frame with all of them; 0 in stretches that are too short.
    """
    places = np.arange(-_CURVE, _CURVE + 1, dtype=np.float64)
    curve = places**2 - (places**2).mean()
    count, lines, curves = len(places), float(places @ places), float(curve @ curve)
    whole = np.ones(len(run), np.bool_)
    sums = [np.zeros_like(points) for _ in range(4)]  # of y, y * place, y * curve, y^2
    for place, bent in zip(places.tolist(), curve.tolist(), strict=True):
        moved, same = _neighbours(points, run, int(place))
        y = np.where(same[:, None, None], moved - points, 0.0)
        sums = [total + term for total, term in zip(sums, (y, y * place, y * bent, y * y), strict=True)]
        whole &= same
    y0, y1, y2, squares = sums
    residual = np.maximum(squares - y0**2 / count - y1**2 / lines - y2**2 / curves, 0).sum(axis=2) / (2 * (count - 3))  # [T, P] px^2
    bend = 2 * np.hypot(y2[..., 0], y2[..., 1]) / curves - _SURE * 2 * np.sqrt(residual / curves)
    result = np.where(whole[:, None], np.maximum(bend, 0), 0.0)
    filled, known = whole.copy(), np.dstack((result, np.broadcast_to(whole[:, None], result.shape)))
    for k in range(1, _CURVE + 1):
        for shift in (-k, k):
            moved, same = _neighbours(known, run, shift)
            take = ~filled & same & (moved[:, 0, 1] > 0)
            result[take] = moved[take, :, 0]
            filled |= take
    return result


def _neighbours(points: Float64, run: npt.NDArray[np.int64], k: int) -> tuple[Float64, Bool]:
    """Points (T, ...) of frame t + k at t, and whether it lies in the same stretch."""
    count = len(run)
    moved, same = np.zeros_like(points), np.zeros(count, np.bool_)
    here = slice(max(0, -k), max(0, min(count, count - k)))
    there = slice(max(0, k), max(0, min(count, count + k)))
    moved[here] = points[there]
    same[here] = (run[there] == run[here]) & (run[here] >= 0)
    return moved, same
