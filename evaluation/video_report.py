"""The report page of a run of videos, from plain data: per video a clip, a strip of frames, curves over time, and what was counted."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from evaluation.charts import Series, curves, number, timeline
from evaluation.report import Failure, Picture, StageRan, render_page
from evaluation.video import Steadiness

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class StripFrame:
    """One frame of the strip."""

    title: str
    status: str  # swapped, passed, failed
    before: Picture
    after: Picture


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoMeasures:
    """What was measured on frames of one video; rows (n,) run through time, a row of NaN parts stretches that are not neighbours."""

    times: Float64  # s
    jumps_before: Float64  # percent of the eye distance, see `evaluation.video.landmark_jumps`
    jumps_after: Float64
    alike_before: Float64  # cosine of the input's face to the source's
    alike_after: Float64  # cosine of the output's face to the source's
    jitter_before: Steadiness
    jitter_after: Steadiness
    identity_jitter: Steadiness  # of the output
    frames: int  # measured
    faceless: int  # of them without a face in the output
    network: str  # that measured identity; "" if none could

    @property
    def ratio(self) -> float | None:
        """Jitter of the output's landmarks over that of the input's."""
        before, after = self.jitter_before.value, self.jitter_after.value
        return after / before if before and after is not None else None


@dataclass(frozen=True, kw_only=True)
class VideoPart:
    """One video on the page."""

    id: str
    title: str
    status: str  # done, failed, left
    reason: str = ""  # with the stage, of a video that failed; the page groups them
    note: str = ""
    output: str = ""  # relative to the page
    duration: float = 0.0  # s
    frames: int = 0
    swapped: int = 0
    passed: int = 0
    failed: int = 0
    seconds: float = 0.0  # of computing
    facts: Sequence[str] = ()  # sentences
    failures: Sequence[Failure] = ()  # of frames, named by their numbers
    spans: Sequence[tuple[str, float, float]] = ()  # (status, from, to) in s
    clip: bytes = b""  # MP4: input and output side by side
    clip_text: str = ""
    poster: Picture | None = None  # what the clip shows before it is played
    strip: Sequence[StripFrame] = ()
    measures: VideoMeasures | None = None
    not_measured: str = ""  # why


@dataclass(frozen=True, kw_only=True)
class VideoReport:
    """All that the page says."""

    title: str
    summary: Sequence[str]
    notes: Sequence[str] = ()
    videos: Sequence[VideoPart] = ()
    failures: Sequence[Failure] = ()  # of whole videos
    stage_seconds: Mapping[str, tuple[int, float]] = field(default_factory=dict)  # stage -> items computed, seconds
    settings: Mapping[str, str] = field(default_factory=dict)
    stages: Sequence[StageRan] = ()


def render_videos(report: VideoReport, clips: str = "") -> str:
    """The page as HTML text. Clips are embedded, or with `clips` expected in that folder beside the page, as `<id>.mp4`."""
    return render_page(
        "videos.html",
        report=report,
        title=report.title,
        clips=clips,
        parts=[_contents(part, clips) for part in report.videos],
        total_seconds=sum(seconds for _, seconds in report.stage_seconds.values()),
    )


def told_videos(report: VideoReport) -> list[dict[str, Any]]:
    """The page's numbers as plain data, a dict per video."""
    return [
        {
            "id": part.id,
            "status": part.status,
            "reason": part.reason,
            **{name: getattr(part, name) for name in ("frames", "swapped", "passed", "failed", "seconds")},
            **(_numbers(part.measures) if part.measures else {}),
        }
        for part in report.videos
    ]


def headline(parts: Sequence[VideoPart]) -> str:
    """How steady and how like their source the outputs are, over all videos, in one sentence; "" where nothing was measured."""
    found = [part.measures for part in parts if part.measures]
    ratios = [measures.ratio for measures in found if measures.ratio is not None]
    alike = [mean for measures in found if (mean := _mean(measures.alike_after)) is not None]
    of = f", median of {len(found)} videos" if len(found) > 1 else ""
    said = []
    if ratios:
        said.append(f"landmarks jitter {number(statistics.median(ratios))} times as much as in the input{of}")
    if alike:
        said.append(f"the cosine to the source's identity is {number(statistics.median(alike))}{of if not ratios else ''}")
    return (text[:1].upper() + text[1:] + ".") if (text := "; ".join(said)) else ""


def _contents(part: VideoPart, clips: str) -> dict[str, Any]:
    measures = part.measures
    clip = f"{clips}/{part.id}.mp4" if clips else Markup("data:video/mp4;base64,") + base64.b64encode(part.clip).decode()
    return {
        "part": part,
        "clip": clip if part.clip else "",
        "timeline": timeline(part.spans, spoken=_spoken_counts(part)) if part.spans else "",
        "charts": _charts(part, measures) if measures else [],
        "ratio": measures.ratio if measures else None,
        "numbers": _numbers(measures) if measures else {},
    }


def _numbers(measures: VideoMeasures) -> dict[str, Any]:
    return {
        "jitter_before": measures.jitter_before.value,
        "jitter_after": measures.jitter_after.value,
        "jitter_ratio": measures.ratio,
        "identity_before": _mean(measures.alike_before),
        "identity": _mean(measures.alike_after),
        "identity_jitter": measures.identity_jitter.value,
        "identity_network": measures.network,
        "measured_frames": measures.frames,
        "faceless_frames": measures.faceless,
    }


def _charts(part: VideoPart, measures: VideoMeasures) -> list[dict[str, Any]]:
    span = (part.spans[0][1], part.spans[-1][2]) if part.spans else (float(np.nanmin(measures.times)), float(np.nanmax(measures.times)))
    found = []
    if np.isfinite(measures.jumps_after).any():
        before, after = measures.jitter_before.value, measures.jitter_after.value
        said = f"Landmark jitter: {_amount(before)} in the input, {_amount(after)} in the output"
        said += f", {number(measures.ratio)} times as much" if measures.ratio is not None else ""
        lines = [Series("output", measures.times, measures.jumps_after), Series("input", measures.times, measures.jumps_before)]
        svg = curves(lines, span, label="landmark jitter, % of the eye distance, over s", spoken=said, from_zero=True)
        found.append({"svg": svg, "caption": f"{said}. Second difference over time; a jump is a peak."})
    if np.isfinite(measures.alike_after).any():
        said = f"Cosine to the source ({measures.network}): {number(_mean(measures.alike_after) or 0)} in the output"
        said += f", {number(_mean(measures.alike_before) or 0)} in the input" if np.isfinite(measures.alike_before).any() else ""
        lines = [Series("output", measures.times, measures.alike_after), Series("input", measures.times, measures.alike_before)]
        svg = curves(lines, span, label="identity, cosine to the source, over s", spoken=said)
        steady = measures.identity_jitter.value
        more = f" From frame to frame the output's identity changes by {number(steady)} (1 - cosine)." if steady is not None else ""
        found.append({"svg": svg, "caption": f"{said}.{more}"})
    return found


def _spoken_counts(part: VideoPart) -> str:
    return f"{part.frames} frames: {part.swapped} swapped, {part.passed} without the face, {part.failed} failed"


def _mean(values: Float64) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def _amount(value: float | None) -> str:
    return "none" if value is None else f"{number(value)} %"
