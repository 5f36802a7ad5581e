"""The Prefect flow of videos: one task per pass and part of a video (a stretch of frames, a group); our store skips and resumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from prefect import flow

from flows.engine import Summary
from flows.pairs import StageCrash
from flows.plan import Retry
from flows.progress import counted
from flows.step import run_step
from flows.video_engine import Frames, execute_videos
from flows.video_plan import VideoKeep, VideoPlan, VideoRequest, make_video_plan
from tasks.frame import MAX_PIXELS

_planned: dict[str, tuple[VideoPlan, Frames]] = {}  # plans that this process made a moment ago, by run folder


@flow(name="videos", persist_result=False, validate_parameters=False)
def videos(
    manifest: str,
    run: str,
    profile: str = "mobile",
    stages: Sequence[str] = (),
    changes: Sequence[str] = (),
    device: str = "auto",
    keep: VideoKeep = "final",
    store: str = "",
    chunk: int = 16,
    workers: int = 0,
    source_face: int = 0,
    face: str = "largest",
    max_pixels: int = MAX_PIXELS,
    fail_fast: bool = False,
    verify: bool = False,
    retry: Sequence[Retry] = (),
    max_attempts: int = 3,
    dask: str = "",
    dask_wait: float = 60.0,
    threads: int = 0,
) -> Summary:
    """Swap a face into every video of a manifest; what is done is not done again. Parameters as `e4s videos --help` explains them."""
    if run in _planned:
        plan, frames = _planned.pop(run)
        return _carry_out(plan, frames)
    request = VideoRequest(
        manifest=manifest,
        run=run,
        profile=profile,
        stages=stages,
        changes=changes,
        device=device,
        keep=keep,
        store=store,
        chunk=chunk,
        workers=workers,
        source_face=source_face,
        face=face,
        max_pixels=max_pixels,
        fail_fast=fail_fast,
        verify=verify,
        retry=retry,
        max_attempts=max_attempts,
        dask=dask,
        dask_wait=dask_wait,
        threads=threads,
    )
    plan = make_video_plan(request)
    try:
        with counted("frames") as progress:
            return _carry_out(plan, progress)
    finally:
        plan.close()


def _carry_out(plan: VideoPlan, frames: Frames) -> Summary:
    summary = execute_videos(plan, frames, part_task)
    if summary.crash:
        raise StageCrash(summary)
    return summary


def part_task(part: str, name: str, work: Callable[[], None]) -> None:
    """One pass on one part of a video as a Prefect task."""
    run_step(name, f"{name} of {part}", work)


def run_planned(plan: VideoPlan, frames: Frames) -> Summary:
    """Run the flow on a plan that was made already; `PREFECT_API_URL` must point at a server."""
    _planned[plan.request.run] = plan, frames
    try:
        summary: Summary = videos(**asdict(plan.request))
        return summary
    except StageCrash as crash:
        return crash.summary
