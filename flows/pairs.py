"""The Prefect flow of image pairs: one task per stage and chunk, references inside, our store for skip and resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed

from flows.artifacts import Shown
from flows.engine import execute
from flows.execution.summary import Summary
from flows.plan import Plan, Request, Retry, make_plan
from flows.progress import Lines, RunProgress, plural
from flows.step import run_as_prefect_task, run_flow, tracked
from flows.tracking import Once
from storage.run import RunBusy
from tasks.frame import MAX_PIXELS
from tasks.runner import Keep

_planned: dict[str, Once[Summary]] = {}  # work that this process planned a moment ago, by run folder


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
) -> Summary | State[Any]:
    """Swap every pair of a manifest; what is done is not done again. Parameters as `e4s pairs --help` explains them."""
    if work := _planned.pop(run, None):
        return conclude("pair", work)
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
    return conclude("pair", lambda: _carry_out(make_plan(request), Lines()))


def _carry_out(plan: Plan, progress: RunProgress) -> Summary:
    shown = Shown(progress)
    try:
        summary = execute(plan, shown, run_as_prefect_task)
        shown.conclude(plan)
        return summary
    finally:
        plan.close()


def conclude(noun: str, work: Callable[[], Summary]) -> Summary | State[Any]:
    """Do a flow's work; returns its result, or the state that says what of it is missing. Raises StageCrash or AllFailed."""
    try:
        with tracked():
            summary = work()
    except RunBusy as busy:  # the writer of the run goes on; a run that found it at work is left out
        return Cancelled(message=str(busy))
    if summary.crash:
        raise StageCrash(summary)
    if not summary.failed:
        return summary
    count = summary.done + summary.failed + summary.left
    sentence = f"{summary.failed} of {plural(count, noun)} failed"
    if not summary.done:
        raise AllFailed(sentence)
    return Completed(message=sentence, data=summary)


class AllFailed(Exception):
    """No item could be done: the flow run counts as failed."""


class StageCrash(Exception):
    """A program error stopped chunks: the flow run counts as failed."""

    def __init__(self, summary: Summary) -> None:
        super().__init__(summary.crash)
        self.summary = summary


def run_planned(plan: Plan, progress: RunProgress) -> Summary:
    """Run the flow on a plan that was made already; `PREFECT_API_URL` must point at a server. Without one the work is done all the same."""
    work = _planned[plan.request.run] = Once(partial(_carry_out, plan, progress))
    return run_flow(partial(pairs, **asdict(plan.request)), work)
