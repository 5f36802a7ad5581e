"""The Prefect flow of videos: one task per pass and part of a video (a stretch of frames, a group); our store skips and resumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.execution.summary import Summary
from flows.pairs import conclude
from flows.plan import Retry
from flows.progress import counted
from flows.step import run_as_prefect_task, run_flow
from flows.tracking import Once
from flows.video_engine import Frames, execute_videos
from flows.video_plan import VideoKeep, VideoPlan, VideoRequest, make_video_plan
from tasks.frame import MAX_PIXELS

_planned: dict[str, Once[Summary]] = {}  # work that this process planned a moment ago, by run folder


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
) -> Summary | State[Any]:
    """Swap a face into every video of a manifest; what is done is not done again. Parameters as `e4s videos --help` explains them."""
    if work := _planned.pop(run, None):
        return conclude("video", work)
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
    return conclude("video", lambda: _plan_and_carry_out(request))


def _plan_and_carry_out(request: VideoRequest) -> Summary:
    plan = make_video_plan(request)
    try:
        with counted("frames") as progress:
            return execute_videos(plan, progress, run_as_prefect_task)
    finally:
        plan.close()


def run_planned(plan: VideoPlan, frames: Frames) -> Summary:
    """Run the flow on a plan that was made already; `PREFECT_API_URL` must point at a server. Without one the work is done all the same."""
    work = _planned[plan.request.run] = Once(partial(execute_videos, plan, frames, run_as_prefect_task))
    return run_flow(partial(videos, **asdict(plan.request)), work)
