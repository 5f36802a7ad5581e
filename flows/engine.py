"""Work through a plan, chunk by chunk; knows no Prefect, so that a single swap runs without a server."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import Protocol

from e4s_models.weights import WeightsError, remedies, weight_path
from flows.plan import Plan, export, record
from storage.faults import fault_point
from storage.run import Row
from storage.store import Artifact, Damaged
from tasks.runner import Call, ChunkJob, ChunkResult, Worker, cpu_threads, run_chunk

MANIFEST_EVERY = 10.0  # s between rewrites of the manifest while running
CRASHES_IN_A_ROW = 2  # chunks stopped by a program error before the run gives up


class Progress(Protocol):
    """Told what happens, for the terminal."""

    def begin(self, plan: Plan) -> None: ...
    def stage(self, chunk: int, node: str) -> None: ...
    def within(self, items: float) -> None: ...
    def advance(self, rows: list[Row]) -> None: ...
    def end(self) -> None: ...


@dataclass
class Summary:
    """How a run stands after working through its plan."""

    done: int
    failed: int
    left: int
    computed: dict[str, int] = field(default_factory=dict)  # stage executions by node
    crash: str = ""  # traceback of the last program error

    @property
    def exit_code(self) -> int:
        """0 all done, 1 program error, 2 some items failed."""
        return 1 if self.crash or self.left else 2 if self.failed else 0


def direct_call(chunk: int, node: str, work: Callable[[], None]) -> None:
    """Run a stage's work on the spot."""
    work()


def use_threads(count: int) -> None:
    """Fix the thread count of the computing libraries: bytes are promised for one count.

    Waiting threads sleep (unless the environment says otherwise): on a busy machine spinning ones made small steps ten times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
    import cv2
    import torch

    cv2.setNumThreads(count)
    torch.set_num_threads(count)


def require_weights(names: Iterable[str]) -> None:
    """Check that these weights are here and whole. Raises WeightsError that names all that are not."""
    problems: dict[str, WeightsError] = {}
    for name in names:
        try:
            weight_path(name)
        except WeightsError as error:
            problems[name] = error
    if len(problems) == 1:
        raise next(iter(problems.values()))
    if problems:
        raise WeightsError(f"{len(problems)} weight files are missing or damaged; {remedies(list(problems))}")


def execute(plan: Plan, progress: Progress, call: Callable[[int, str, Callable[[], None]], None] = direct_call) -> Summary:
    """Carry out a plan. The manifest is written whatever happens; what is finished stays finished.

    `call(chunk, node, work)` runs one stage on one chunk. Raises WeightsError before anything is done, DiskFull and KeyboardInterrupt
    after the manifest was written.
    """
    require_weights(plan.graph.weights() if plan.todo else ())
    summary = Summary(0, 0, 0)
    folder = plan.folder
    record(plan)
    if plan.todo:
        use_threads(cpu_threads())
    worker = Worker(plan.graph, plan.store, plan.request.keep, plan.request.workers or cpu_threads())
    progress.begin(plan)
    folder.append_log("begin", items=len(plan.rows), todo=len(plan.todo), planning_seconds=round(plan.seconds, 3))
    due, crashes = time.monotonic() + MANIFEST_EVERY, 0
    shared: dict[str, Artifact] = {}  # per-image work that later chunks read too
    try:
        chunks = plan.chunks()
        for job, following in zip_longest(chunks, chunks[1:]):
            if following:
                worker.prefetch(following)
            worker.notify = partial(_within, progress, len(job.items))
            job = replace(job, known={**job.known, **{key: shared[key] for key in job.shared if key in shared}})
            result = run_chunk(worker, job, _announced(progress, job, call))
            shared |= {artifact.key: artifact for artifact in result.artifacts if artifact.key in job.shared}
            _record(plan, job, result, summary)
            progress.advance([plan.rows[outcome.id] for outcome in result.outcomes])
            crashes = crashes + 1 if result.crash else 0
            if crashes == CRASHES_IN_A_ROW:
                break
            if plan.request.fail_fast and any(outcome.reason for outcome in result.outcomes):
                break
            if time.monotonic() > due:
                began = time.monotonic()
                folder.write_rows(plan.rows.values())
                due = time.monotonic() + max(MANIFEST_EVERY, 20 * (time.monotonic() - began))  # a large manifest costs at most 5 %
        fault_point("before-manifest")
    finally:
        progress.end()
        worker.close()
        folder.write_rows(plan.rows.values())
    count = [row.status for row in plan.rows.values()].count
    summary.done, summary.failed, summary.left = count("done"), count("failed"), count("left")
    folder.append_log("end", done=summary.done, failed=summary.failed, left=summary.left)
    return summary


def _within(progress: Progress, items: int, share: float) -> None:
    progress.within(items * share)


def _announced(progress: Progress, job: ChunkJob, call: Callable[[int, str, Callable[[], None]], None]) -> Call:
    def announce(node: str, work: Callable[[], None]) -> None:
        progress.stage(job.number, node)
        call(job.number, node, work)

    return announce


def _record(plan: Plan, job: ChunkJob, result: ChunkResult, summary: Summary) -> None:
    for sentence in result.repaired:
        print(f"e4s: {sentence}", file=sys.stderr)
        plan.folder.append_log("repair", chunk=job.number, reason=sentence)
    for outcome in result.outcomes:
        row = plan.rows[outcome.id]
        row.seconds += outcome.seconds
        if outcome.reason:
            row.status, row.stage, row.reason = "failed", outcome.stage, outcome.reason
            plan.folder.append_log("failed", chunk=job.number, item=row.id, stage=row.stage, reason=row.reason)
        elif outcome.artifact:
            try:
                export(plan.folder, plan.store, row, outcome.artifact)
            except Damaged as damaged:
                plan.store.void(outcome.artifact)
                print(f"e4s: pair {row.id}: {damaged}; repeat the command", file=sys.stderr)
                plan.folder.append_log("repair", chunk=job.number, item=row.id, reason=str(damaged))
    for node, seconds in result.seconds.items():
        plan.folder.append_log(
            "stage", chunk=job.number, stage=node, items=result.computed[node], seconds=round(seconds, 3), device=plan.graph.device(node)
        )
        summary.computed[node] = summary.computed.get(node, 0) + result.computed[node]
    if result.crash:
        summary.crash = result.crash
        plan.folder.append_log("crash", chunk=job.number, traceback=result.crash)
        print(f"e4s: chunk {job.number} was stopped by a program error:\n{result.crash}", file=sys.stderr)
