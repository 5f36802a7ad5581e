"""Gather what a run of videos made and write its report page.

What the page shows of a video is computed once and kept in the run's store: the preview (clip and strip) and the measures. A second report
decodes nothing.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from e4s_models.warp import ffhq_crop_to_frame, resample, transform_points
from e4s_models.weights import WeightsError, weight_digest
from evaluation.features import NETWORKS, Extract, FeatureNetwork
from evaluation.preview import side_by_side, write_clip
from evaluation.protocols import PROTOCOLS
from evaluation.report import Failure, Picture, thumbnail
from evaluation.retrieval import cosines
from evaluation.video import identity_jitter, landmark_jitter, landmark_jumps
from evaluation.video_report import StripFrame, VideoMeasures, VideoPart, VideoReport, headline, render_videos, told_videos
from flows.evaluate import Advance
from flows.plan import open_store, pick_device
from flows.progress import duration, plural
from flows.report import PAGE, run_settings, sentence, silent, spent_seconds, stages_ran
from storage.keys import digest
from storage.store import Damaged, Finished, Store, write_atomic
from storage.video_run import VideoRow, VideoRunFolder
from tasks.frame import ImageFile
from tasks.stage import ItemError
from tasks.video import FrameTable, probe, read_frames

if TYPE_CHECKING:
    from e4s_models.dlib_face import Detection
    from e4s_models.video_faces import VideoFaceDetector

Values = dict[str, npt.NDArray[Any]]

NUMBERS: Final = "videos.json"  # beside the page
CLIPS: Final = "clips"  # folder beside the page, where the clips are too large to be embedded
EMBEDDED: Final = 12_000_000  # bytes of all clips together that are embedded
_VERSION: Final = 1  # raise it when previews or measures change
_LANDMARKS: Final = "dlib_landmarks68"


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    clip: float = 6.0  # s of the video
    rate: float = 30.0  # frames per second of the clip, at most
    strip: int = 8  # frames
    strip_side: int = 200  # px
    around: float = 1.1  # side of what the strip shows, in sides of the crop


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    frames: int = 72  # of a video, at most: landmarks and identity of the input and the output take about 0.5 s each
    window: int = 24  # frames in a row
    side: int = 1024  # px of the aligned crops that identity is measured on


class FramesGone(Exception):
    """A video of the run was moved or changed since; the sentence says which."""


@dataclass(frozen=True, eq=False)
class _Frames:
    """The list of frames of one video."""

    status: list[str]
    time: npt.NDArray[np.float64]
    cut: npt.NDArray[np.bool_]
    centre: npt.NDArray[np.float64]
    """(T, 2) px, NaN where there is no face."""
    size: npt.NDArray[np.float64]
    """(T,) px."""
    where: list[str]
    reason: list[str]

    @classmethod
    def of(cls, folder: VideoRunFolder, video: str) -> _Frames:
        table = folder.read_frames(video)
        column = {name: table[name].to_pylist() for name in ("status", "stage", "reason")}
        number = {name: np.array(table[name].to_numpy(zero_copy_only=False), np.float64) for name in ("time", "x", "y", "size")}
        return cls(
            column["status"],
            number["time"],
            np.array(table["cut"].to_pylist(), np.bool_),
            np.stack([number["x"], number["y"]], axis=1),
            number["size"],
            [stage or "" for stage in column["stage"]],
            [reason or "" for reason in column["reason"]],
        )

    def __len__(self) -> int:
        return len(self.status)

    @cached_property
    def shot(self) -> npt.NDArray[np.int64]:
        return np.cumsum(self.cut)

    @property
    def step(self) -> float:
        """s, how long a frame stands, as a rule."""
        return float(np.median(np.diff(self.time))) if len(self) > 1 else 0.04

    def spans(self) -> list[tuple[str, float, float]]:
        """(status, from, to) in s of frames in a row that share it."""
        begins = [index for index in range(len(self)) if not index or self.status[index] != self.status[index - 1]]
        ends = [*(self.time[index] for index in begins[1:]), self.time[-1] + self.step] if begins else []
        return [(self.status[index], float(self.time[index]), float(end)) for index, end in zip(begins, ends, strict=True)]

    def failures(self) -> list[Failure]:
        """Failed frames by stage and reason, most first."""
        grouped: dict[tuple[str, str], list[str]] = defaultdict(list)
        for index, status in enumerate(self.status):
            if status == "failed":
                grouped[self.where[index], self.reason[index]].append(str(index))
        found = [Failure(where=where, reason=reason, pairs=frames) for (where, reason), frames in grouped.items()]
        return sorted(found, key=lambda failure: -len(failure.pairs))


def write_video_report(
    folder: VideoRunFolder, *, measure: bool = True, device: str = "auto", limit: int = 24, progress: Advance = silent
) -> VideoReport:
    """Write RUN/report/index.html and videos.json; `limit` videos have a preview. Raises RunError if this is no run of videos."""
    report = gather_videos(folder, measure=measure, device=device, limit=limit, progress=progress)
    clips = "" if sum(len(part.clip) for part in report.videos) <= EMBEDDED else CLIPS
    page = folder.path / PAGE
    if clips:
        for part in report.videos:
            if part.clip:
                write_atomic(page.parent / clips / f"{part.id}.mp4", part.clip)
    write_atomic(page.parent / NUMBERS, json.dumps({"videos": told_videos(report), "summary": report.summary}, indent=1).encode())
    write_atomic(page, render_videos(report, clips).encode())
    return report


def report_videos(
    folder: VideoRunFolder, *, measure: bool = True, device: str = "auto", limit: int = 24, progress: Advance = silent
) -> list[str]:
    """`write_video_report`, and what the terminal says of it."""
    report = write_video_report(folder, measure=measure, device=device, limit=limit, progress=progress)
    missing = dict.fromkeys(f"not measured: {part.id}: {part.not_measured}" for part in report.videos if part.not_measured)
    return [
        *report.summary,
        *report.notes,
        *missing,
        f"numbers: {(folder.path / PAGE).with_name(NUMBERS)}",
        f"report: {folder.path / PAGE}",
    ]


def gather_videos(
    folder: VideoRunFolder, *, measure: bool = True, device: str = "auto", limit: int = 24, progress: Advance = silent
) -> VideoReport:
    """All that the page says about a run of videos."""
    settings, rows = folder.read_settings(), folder.read_rows()
    store = open_store(folder, settings["store"])
    shown = [row.id for row in rows if row.status == "done"][:limit]
    gauge = _Gauge(device) if measure else None
    parts = []
    for number, row in enumerate(rows):
        progress(number, len(rows))
        parts.append(_part(folder, store, row, gauge, row.id in shown, settings["request"].get("max_pixels", 0)))
    progress(len(rows), len(rows))
    counts = Counter(row.status for row in rows)
    spent = spent_seconds(folder)
    total = sum(seconds for _, seconds in spent.values())
    left = f", {counts['left']} left" if counts["left"] else ""
    frames = {name: sum(getattr(row, name) for row in rows if row.status == "done") for name in ("frames", "swapped", "passed", "failed")}
    summary = [
        *([said] if (said := headline(parts)) else []),
        f"{plural(len(rows), 'video')}: {counts['done']} done, {counts['failed']} failed{left}. {plural(frames['frames'], 'frame')}: "
        f"{frames['swapped']} swapped, {frames['passed']} without the face, {frames['failed']} failed. "
        f"{duration(total)} of computing on {settings['device']}, {plural(settings['cpu_threads'], 'core')}.",
    ]
    notes = [f"the run is not finished: {plural(counts['left'], 'video')} left"] if counts["left"] else []
    if counts["done"] > len(shown):
        notes.append(f"previews of the first {len(shown)} of {counts['done']} finished videos; --limit shows more")
    grouped: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row.status == "failed":
            grouped[row.stage, row.reason].append(row.id)
    failures = [Failure(where=where, reason=reason, pairs=ids) for (where, reason), ids in grouped.items()]
    return VideoReport(
        title=f"e4s videos: {folder.path.resolve().name}",
        summary=summary,
        notes=[sentence(note) for note in notes],
        videos=parts,
        failures=sorted(failures, key=lambda failure: -len(failure.pairs)),
        stage_seconds=spent,
        settings=run_settings(settings),
        stages=stages_ran(settings, list(settings["nodes"])),
    )


def _part(folder: VideoRunFolder, store: Store, row: VideoRow, gauge: _Gauge | None, shown: bool, max_pixels: int) -> VideoPart:
    part = VideoPart(
        id=row.id,
        title=f"{Path(row.source).name} into {Path(row.video).name}",
        status=row.status,
        reason=f"{row.stage}: {row.reason}" if row.reason else "",
        note=sentence(row.note) if row.note else "",
        seconds=row.seconds,
    )
    if row.status != "done":
        return part
    frames = _Frames.of(folder, row.id)
    videos = _Videos(row, folder.path / row.output)
    part = replace(
        part,
        output=f"../{row.output}",
        frames=row.frames,
        swapped=row.swapped,
        passed=row.passed,
        failed=row.failed,
        duration=frames.spans()[-1][2] - float(frames.time[0]) if len(frames) else 0.0,
        spans=frames.spans(),
        failures=frames.failures(),
        facts=[_facts(row, frames)],
    )
    if shown and len(frames):
        try:
            part = _with_preview(part, store, row, frames, videos)
        except FramesGone as gone:
            part = replace(part, note=f"{part.note} {gone}".strip())
    if gauge and row.swapped:
        try:
            part = replace(part, measures=_measures(store, row, frames, videos, gauge, max_pixels))
        except (FramesGone, ItemError, WeightsError) as error:
            part = replace(part, not_measured=str(error))
    return part


def _facts(row: VideoRow, frames: _Frames) -> str:
    said = [f"{duration(row.seconds)} of computing"] if row.seconds else []
    if row.frames and row.seconds:
        said[0] += f", {row.seconds / row.frames:.2f} s per frame"
    said += [f"{plural(row.shots, 'shot')}"] if row.shots else []
    said += [f"{plural(row.repaired, 'time')} repaired"] if row.repaired else []
    said += [f"{plural(row.damaged, 'damaged packet or frame')}"] if row.damaged else []
    said.append(f"person like {Path(row.face).name}" if row.face_sha256 else f"person {row.face} by size")
    return "; ".join(said) + "."


class _Videos:
    """Input and output of a row, opened when they are needed."""

    def __init__(self, row: VideoRow, output: Path) -> None:
        self._paths = {"input": (row.video, row.video_sha256), "output": (str(output), row.output_sha256)}
        self._tables: dict[str, FrameTable] = {}

    def pictures(self, which: str, start: int, stop: int) -> Iterator[Picture]:
        """Frames [start, stop), upright RGB (H, W, 3) uint8. Raises FramesGone."""
        path, sha256 = self._paths[which]
        try:
            if which not in self._tables:
                self._tables[which] = probe(path)
            if self._tables[which].sha256 != sha256:
                raise FramesGone(f"The {which} {Path(path).name} was changed since the run.")
            for frame in read_frames(path, self._tables[which], start, stop):
                yield frame.rgb8()
        except ItemError as error:
            raise FramesGone(f"The {which} {Path(path).name} cannot be read: {error}") from None

    def both(self, start: int, stop: int) -> Iterator[tuple[Picture, Picture]]:
        return zip(self.pictures("input", start, stop), self.pictures("output", start, stop), strict=True)


def _kept(store: Store, stage: str, key: str, make: Callable[[], Values]) -> Values:
    """Values from the store, or made and put there."""
    found = store.lookup([key]).get(key)
    if found:
        try:
            return {name: store.read(found, name) for name in found.payloads}
        except Damaged:
            store.void(found)
    values = make()
    store.publish([Finished(key, stage, {name: ("array", value) for name, value in values.items()})])
    return values


# -- preview -----------------------------------------------------------------------------------------------------------------------------


def _with_preview(part: VideoPart, store: Store, row: VideoRow, frames: _Frames, videos: _Videos) -> VideoPart:
    config = PreviewConfig()
    key = digest(["video preview", _VERSION, asdict(config), row.key, row.output_sha256, version("av")])
    start, stop, every = clip_range(frames.status, frames.time, config)
    chosen = strip_frames(frames.status, config.strip)

    def make() -> Values:
        whole = itertools.islice(enumerate(videos.both(start, stop), start), 0, None, every)
        clip = write_clip((float(frames.time[index]), side_by_side(*pair)) for index, pair in whole)
        middle = (start + stop) // 2
        values: Values = {"clip": np.frombuffer(clip, np.uint8), "poster": side_by_side(*next(videos.both(middle, middle + 1)))}
        for index in chosen:
            before, after = next(videos.both(index, index + 1))
            values[f"frame{index}"] = np.stack([_close_up(one, frames, index, config) for one in (before, after)])
        return values

    values = _kept(store, "video_preview", key, make)
    strip = [
        StripFrame(title=f"frame {index}, {frames.time[index]:.2f} s", status=frames.status[index], before=pair[0], after=pair[1])
        for index in chosen
        for pair in [values[f"frame{index}"]]
    ]
    seconds = frames.time[stop - 1] + frames.step - frames.time[start]
    text = f"Input and output side by side, {frames.time[start]:.1f} to {frames.time[start] + seconds:.1f} s, without sound"
    return replace(
        part,
        clip=values["clip"].tobytes(),
        clip_text=text + (f"; every {every}. frame" if every > 1 else "") + ".",
        poster=values["poster"],
        strip=strip,
    )


def clip_range(status: Sequence[str], time: npt.NDArray[np.float64], config: PreviewConfig) -> tuple[int, int, int]:
    """(start, stop, every): the stretch of `config.clip` s with most swapped frames, and every how many of them are shown."""
    swapped = np.concatenate([[0], np.cumsum([one == "swapped" for one in status])])
    ends = np.searchsorted(time, time + config.clip, "left")
    start = int(np.argmax(swapped[ends] - swapped[:-1]))
    start = min(start, int(np.searchsorted(time, time[-1] - config.clip, "right")))  # a whole stretch, where there is one
    stop = int(ends[start])
    rate = (stop - start - 1) / max(float(time[stop - 1] - time[start]), 1e-3)
    return start, stop, max(1, round(rate / config.rate))


def strip_frames(status: Sequence[str], count: int) -> list[int]:
    """Frames spread evenly over those with the face, or over all where there is none."""
    among = [index for index, one in enumerate(status) if one != "passed"] or list(range(len(status)))
    return [among[round(place)] for place in np.linspace(0, len(among) - 1, min(count, len(among)))]


def _close_up(rgb: Picture, frames: _Frames, index: int, config: PreviewConfig) -> Picture:
    """The face's surroundings, a square; the whole frame, letterboxed, where there is none."""
    side = config.strip_side
    if np.isfinite(frames.size[index]):
        scale = frames.size[index] * config.around / side
        to_frame = np.array([[scale, 0, 0], [0, scale, 0], [0, 0, 1.0]])
        to_frame[:2, 2] = frames.centre[index] - scale * (side - 1) / 2
        return np.asarray(resample(rgb, to_frame, side, side, "zero"), np.uint8)
    small = thumbnail(rgb, side)
    square = np.zeros((side, side, 3), np.uint8)
    top, left = (side - small.shape[0]) // 2, (side - small.shape[1]) // 2
    square[top : top + small.shape[0], left : left + small.shape[1]] = small
    return square


# -- measures ----------------------------------------------------------------------------------------------------------------------------


class _Gauge:
    """Detector and identity network, loaded when the first video needs them."""

    def __init__(self, device: str) -> None:
        self.device = device
        names = PROTOCOLS["open"].networks["identity"]
        self.network: FeatureNetwork | None = next((NETWORKS[name] for name in names if not NETWORKS[name].missing()), None)

    @cached_property
    def detector(self) -> VideoFaceDetector:
        from e4s_models.video_faces import VideoFaceDetector

        found = VideoFaceDetector.load()
        assert isinstance(found, VideoFaceDetector)
        return found

    @cached_property
    def extract(self) -> Extract:
        assert self.network is not None and self.network.load is not None
        return self.network.load(pick_device(self.device))

    def identity(self, rgb: Picture, landmarks: npt.NDArray[Any], side: int) -> npt.NDArray[np.float32]:
        """Feature (D,) of the face with these landmarks; NaN if the network finds none."""
        import torch

        to_frame = ffhq_crop_to_frame(landmarks, side)
        face = torch.from_numpy(resample(rgb, to_frame, side, side)).permute(2, 0, 1)[None].float() / 127.5 - 1
        points = torch.from_numpy(transform_points(np.linalg.inv(to_frame), landmarks))[None].float()
        with torch.inference_mode():
            found = self.extract(face, points)
        return np.full_like(found.features[0], np.nan) if found.failures else found.features[0]


def _measures(store: Store, row: VideoRow, frames: _Frames, videos: _Videos, gauge: _Gauge, max_pixels: int) -> VideoMeasures:
    config = MeasureConfig()
    network = gauge.network
    identity = [network.name, network.version, network.sha256] if network else []
    libraries = [version(name) for name in ("dlib-bin", "numpy", "opencv-python-headless", "torch")]
    landmarks = [weight_digest(_LANDMARKS), libraries]
    key = digest(["video measures", _VERSION, asdict(config), row.key, row.output_sha256, *landmarks, *identity])
    windows = measured_windows(frames.status, frames.shot, config)
    if not windows:
        raise ItemError("there are no 3 swapped frames in a row.")

    def make() -> Values:
        source = ImageFile(row.source, row.source_sha256, max_pixels).read().rgb8 if network and max_pixels else None
        values: Values = {}
        if network and source is not None:
            faces = gauge.detector.detect(source, row.source_face + 1)
            if len(faces) > row.source_face:
                values["source"] = gauge.identity(source, faces[row.source_face].landmarks, config.side)
        for which in ("output", "input"):  # the output first: it may have been changed
            for number, (start, stop) in enumerate(windows):
                points, features = _measure(gauge, videos.pictures(which, start, stop), frames, start, stop, config, "source" in values)
                values[f"{which} landmarks {number}"] = points
                if features is not None:
                    values[f"{which} features {number}"] = features
        return values

    values = _kept(store, "video_measures", key, make)
    return _summed(values, windows, frames, network.name if network else "")


def measured_windows(status: Sequence[str], shot: npt.NDArray[np.int64], config: MeasureConfig) -> list[tuple[int, int]]:
    """Stretches [start, stop) of swapped frames within a shot, of at least 3: all, or windows spread evenly over them."""
    runs: list[tuple[int, int]] = []
    for _, group in itertools.groupby(range(len(status)), key=lambda index: (status[index] == "swapped", int(shot[index]))):
        members = list(group)
        if status[members[0]] == "swapped":
            runs += [(members[0], members[-1] + 1)]
    whole = [run for run in runs if run[1] - run[0] >= 3]
    if sum(stop - start for start, stop in whole) <= config.frames:
        return whole
    pieces = [(at, min(at + config.window, stop)) for start, stop in whole for at in range(start, stop, config.window) if stop - at >= 3]
    count = max(1, config.frames // config.window)
    return [pieces[round(place)] for place in np.linspace(0, len(pieces) - 1, min(count, len(pieces)))]


def _measure(
    gauge: _Gauge, pictures: Iterator[Picture], frames: _Frames, start: int, stop: int, config: MeasureConfig, identify: bool
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32] | None]:
    """Landmarks (n, 68, 2) px and identity features (n, D) of a window's face, NaN where it is not found."""
    searched, seen = itertools.tee(pictures)
    points, features = np.full((stop - start, 68, 2), np.nan), []
    for row, (rgb, faces) in enumerate(zip(seen, gauge.detector.detect_chunk(searched, stop - start), strict=True)):
        face = _nearest(faces, frames, start + row)
        if face is not None:
            points[row] = face.landmarks
        if identify:
            found = gauge.identity(rgb, points[row], config.side) if face is not None else None
            features.append(found)
    known = next((one for one in features if one is not None), None)
    if known is None:
        return points, None
    return points, np.stack([np.full_like(known, np.nan) if one is None else one for one in features])


def _nearest(faces: Sequence[Detection], frames: _Frames, index: int) -> Detection | None:
    """The face that lies where the swapped one was."""
    centre, size = frames.centre[index], frames.size[index]
    near = [(float(np.hypot(*(face.landmarks.mean(axis=0) - centre))), face) for face in faces]
    return min(((far, face) for far, face in near if far < size / 4), key=lambda pair: pair[0], default=(0.0, None))[1]


def _summed(values: Values, windows: Sequence[tuple[int, int]], frames: _Frames, network: str) -> VideoMeasures:
    """Windows -> rows through time with a row of NaN between two."""
    source = values.get("source")
    lengths = [stop - start for start, stop in windows]

    def joined(name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        rows = [(values.get(f"{name} {number}"), length) for number, length in enumerate(lengths)]
        gap = np.full((1, *shape), np.nan)
        return np.concatenate([part for found, n in rows for part in (np.full((n, *shape), np.nan) if found is None else found, gap)])

    points = {which: joined(f"{which} landmarks", (68, 2)) for which in ("input", "output")}
    found = {which: np.isfinite(one).all(axis=(1, 2)) for which, one in points.items()}
    features = {which: joined(f"{which} features", (1,) if source is None else source.shape) for which in points}
    identified = {which: np.isfinite(one).all(axis=1) for which, one in features.items()}
    alike = {which: np.full(len(one), np.nan) for which, one in features.items()}
    for which, known in identified.items():
        if source is not None and known.any():
            alike[which][known] = cosines(features[which][known], np.broadcast_to(source, features[which][known].shape))
    both = found["input"] & found["output"]  # one set of frames on both sides
    return VideoMeasures(
        times=np.concatenate([part for start, stop in windows for part in (frames.time[start:stop], [np.nan])]),
        jumps_before=landmark_jumps(points["input"], found["input"]),
        jumps_after=landmark_jumps(points["output"], found["output"]),
        alike_before=alike["input"],
        alike_after=alike["output"],
        jitter_before=landmark_jitter(points["input"], both),
        jitter_after=landmark_jitter(points["output"], both),
        identity_jitter=identity_jitter(features["output"], identified["output"]),
        frames=sum(lengths),
        faceless=sum(lengths) - int(found["output"].sum()),
        network=network if source is not None else "",
    )
