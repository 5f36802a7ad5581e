"""The Prefect flow of image pairs: one task per stage and chunk, references inside, our store for skip and resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from prefect import flow

from flows.artifacts import Shown
from flows.engine import Progress, Summary, execute
from flows.plan import Plan, Request, Retry, make_plan
from flows.progress import Lines
from flows.step import run_step
from tasks.frame import MAX_PIXELS
from tasks.runner import Keep

_planned: dict[str, tuple[Plan, Progress]] = {}  # plans that this process made a moment ago, by run folder


@flow(name="pairs", persist_result=False, validate_parameters=False)
def pairs(
    manifest: str,
    run: str,
    profile: str = "mobile",
    stages: Sequence[str] = (),
    changes: Sequence[str] = (),
    device: str = "auto",
    keep: Keep = "all",
    store: str = "",
    chunk: int = 16,
    workers: int = 0,
    source_face: int = 0,
    target_face: int = 0,
    max_pixels: int = MAX_PIXELS,
    fail_fast: bool = False,
    verify: bool = False,
    retry: Sequence[Retry] = (),
    max_attempts: int = 3,
    dask: str = "",
    dask_wait: float = 60.0,
    threads: int = 0,
) -> Summary:
    """Swap every pair of a manifest; what is done is not done again. Parameters as `e4s pairs --help` explains them."""
    if run in _planned:
        plan, progress = _planned.pop(run)
    else:
        request = Request(
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
            target_face=target_face,
            max_pixels=max_pixels,
            fail_fast=fail_fast,
            verify=verify,
            retry=retry,
            max_attempts=max_attempts,
            dask=dask,
            dask_wait=dask_wait,
            threads=threads,
        )
        plan, progress = make_plan(request), Lines()
    shown = Shown(progress)
    try:
        summary = execute(plan, shown, stage_task)
        shown.conclude(plan)
    finally:
        plan.close()
    if summary.crash:
        raise StageCrash(summary)
    return summary


class StageCrash(Exception):
    """A program error stopped chunks: the flow run counts as failed."""

    def __init__(self, summary: Summary) -> None:
        super().__init__(summary.crash)
        self.summary = summary


def stage_task(chunk: int, node: str, work: Callable[[], None]) -> None:
    """One stage on one chunk as a Prefect task."""
    run_step(node, f"{node} of chunk {chunk}", work)


def run_planned(plan: Plan, progress: Progress) -> Summary:
    """Run the flow on a plan that was made already; `PREFECT_API_URL` must point at a server."""
    _planned[plan.request.run] = (plan, progress)
    try:
        summary: Summary = pairs(**asdict(plan.request))
        return summary
    except StageCrash as crash:
        return crash.summary
