"""Plan of pairs -> jobs of the scheduler -> rows, outputs, log and manifest. Knows no Prefect, so that one swap needs no server.

Runs in the planning process. Chunks run wherever the executor runs them; only this process writes the run folder. The manifest is written
every MANIFEST_EVERY seconds and at the end, whatever ends the run; what it says less than the store holds, the next command finds there.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from flows.execution.graph_jobs import GraphJob, GraphRunner
from flows.execution.jobs import Executor, Job, TaskHook, call_directly
from flows.execution.local_executor import LocalExecutor
from flows.execution.process import THIS_PROCESS, require_weights, use_threads
from flows.execution.scheduler import run_jobs
from flows.execution.summary import Summary
from flows.journal import Logged
from flows.outputs import export
from flows.plan import Plan, record
from flows.progress import RunProgress
from flows.room import check_pair_room
from storage.faults import fault_point
from storage.store import Artifact, Damaged
from tasks.runner import ChunkJob, JobResult, Worker, crash_sentence, singles

if TYPE_CHECKING:
    from flows.execution.dask_worker import RunContext

MANIFEST_EVERY = 10.0  # s between rewrites of the manifest while running
MAX_READY = 64  # chunks that are held ready because they wait for what another one makes
JOBS_AHEAD = 2  # chunks that a Dask worker is given at a time: one runs, one waits there


def check_weights(plan: Plan) -> None:
    """Check the weights that this machine needs for the plan; workers on other machines check their own. Raises WeightsError."""
    if plan.todo and not plan.request.remote:
        require_weights(plan.graph.weights())


def execute(plan: Plan, progress: RunProgress, hook: TaskHook = call_directly) -> Summary:
    """Carry out a plan. The manifest is written whatever happens; what is finished stays finished.

    `hook` runs each stage of each chunk (on Dask: each part). Raises WeightsError, RunError where there is no room, and UsageError for a
    cluster that is not there, before anything is done; UsageError, StoreError, DiskFull and KeyboardInterrupt after the manifest was
    written.
    """
    check_weights(plan)
    if plan.todo:
        check_pair_room(plan)
    summary = Summary(0, 0, 0)
    folder = plan.folder
    progress = Logged(progress, folder)
    with closing(make_executor(plan, hook)) if plan.todo else nullcontext() as executor:
        record(plan)
        progress.begin(plan)
        try:
            if executor:
                run_jobs(PairPlanner(plan, progress, summary), executor)
            fault_point("before-manifest")
        finally:
            progress.end()
            folder.write_rows(plan.rows.values())
    summary.conclude(folder, plan.rows.values())
    return summary


def make_executor(plan: Plan, hook: TaskHook) -> Executor:
    """Make the executor that the request names. Raises ClusterError."""
    request = plan.request
    if request.dask:
        from flows.execution.dask_executor import DaskExecutor

        return DaskExecutor(make_run_context(plan), request, plan.store, plan.folder, hook, JOBS_AHEAD)
    threads = request.compute_threads()
    use_threads(threads)
    return LocalExecutor(GraphRunner(Worker(plan.graph, plan.store, request.keep, request.workers or threads)), hook)


def make_run_context(plan: Plan) -> RunContext:
    """Return what Dask workers must know of the plan."""
    from flows.execution.dask_worker import RunContext
    from flows.execution.worker_pool import base_run_context

    image = next(iter(plan.todo[0].images.values())) if plan.todo else None
    return RunContext(
        **base_run_context(plan.graph, plan.request, plan.store),
        fingerprints=plan.graph.fingerprints,
        keep=plan.request.keep,
        picture=(image.path, image.sha256) if image else ("", ""),
    )


class PairPlanner:
    """Rows of pairs -> chunks; then the items of chunks that a program error stopped, one by one: only the culprits fail."""

    def __init__(self, plan: Plan, progress: RunProgress, summary: Summary) -> None:
        self._plan, self._progress, self._summary = plan, progress, summary
        self._chunks = plan.chunks()
        self._ready = deque[GraphJob]()
        self._singles = deque[GraphJob]()
        self._next_number = -(-len(plan.todo) // plan.request.chunk)
        self._shared: dict[str, Artifact] = {}  # per-image work that several chunks read
        self._sharing: set[int] = set()  # chunks on workers that are still at work that others wait for
        self._within: dict[int, float] = {}  # running chunk -> items' worth of work done
        self._manifest_due = time.monotonic() + MANIFEST_EVERY
        self._stopped = False

    # -- which jobs ------------------------------------------------------------------------------------------------------------------

    @property
    def is_stopped(self) -> bool:
        return self._stopped

    def ready_jobs(self) -> Iterable[GraphJob]:
        if self._singles and self._plan.request.fail_fast:
            return self._singles
        return [*self._ready, *self._singles]

    def make_more_ready(self) -> bool:
        """Take further chunks of the plan: one at a time, and one more that can be read ahead."""
        if self._singles and self._plan.request.fail_fast:
            return False
        before = len(self._ready)
        while len(self._ready) < min(max(before + 1, 2), MAX_READY) and (chunk := next(self._chunks, None)):
            self._ready.append(self._job(chunk))
        return len(self._ready) > before

    def start(self, job: Job) -> Job:
        """Take a job from the ready ones, with the shared artifacts that are finished by now."""
        assert isinstance(job, GraphJob)
        (self._ready if job in self._ready else self._singles).remove(job)
        chunk = job.chunk
        found = {key: self._shared[key] for key in chunk.shared if key in self._shared and key not in chunk.known}
        if found:
            job = replace(job, chunk=replace(chunk, known={**chunk.known, **found}))
        if self._plan.request.dask and job.keys:
            self._sharing.add(job.number)
        return job

    def _job(self, chunk: ChunkJob) -> GraphJob:
        return GraphJob.of(chunk, self._plan.graph, self._plan.store)

    # -- what follows ----------------------------------------------------------------------------------------------------------------

    def on_stage(self, job: Job, node: str) -> None:
        self._progress.stage(job.number, node)

    def on_progress(self, job: Job, share: float) -> None:
        assert isinstance(job, GraphJob)
        if job.number not in self._sharing:
            self._within[job.number] = share * len(job.chunk.items)
            self._progress.within(sum(self._within.values()))

    def on_keys_used(self, keys: Collection[str]) -> None:
        """Do nothing: all keys of pairs are registered when they are planned."""

    def on_shared(self, job: Job, artifacts: Sequence[Artifact]) -> None:
        assert isinstance(job, GraphJob)
        self._sharing.discard(job.number)
        self._shared |= {artifact.key: artifact for artifact in artifacts if artifact.key in job.chunk.shared}

    def on_finished(self, job: Job, result: JobResult) -> None:
        """Write rows, outputs and log; a crash makes the items that are left jobs of their own, if there were several."""
        assert isinstance(job, GraphJob)
        plan = self._plan
        self.on_shared(job, result.artifacts)
        self._within.pop(job.number, None)
        _record(plan, job.chunk, result, self._summary)
        if result.crash and result.broken:
            self._summary.crash = result.crash
            self._stopped = True
            return
        alone: list[ChunkJob] = []
        if result.crash and len(job.chunk.items) > 1:
            alone = singles(plan.graph, job.chunk, result, self._next_number)
        self._singles += [self._job(chunk) for chunk in alone]
        self._next_number += len(alone)
        later = {chunk.items[0].id for chunk in alone}
        self._progress.advance([plan.rows[outcome.id] for outcome in result.outcomes if outcome.id not in later])
        if plan.request.fail_fast and any(plan.rows[outcome.id].status == "failed" for outcome in result.outcomes):
            self._stopped = True
            return
        self._write_manifest_now_and_then()

    def _write_manifest_now_and_then(self) -> None:
        if time.monotonic() > self._manifest_due:
            began = time.monotonic()
            self._plan.folder.write_rows(self._plan.rows.values())
            # A large manifest costs at most 5 % of the time.
            self._manifest_due = time.monotonic() + max(MANIFEST_EVERY, 20 * (time.monotonic() - began))


def _record(plan: Plan, job: ChunkJob, result: JobResult, summary: Summary) -> None:
    for sentence in result.repaired:
        print(f"e4s: {sentence}", file=sys.stderr)
        plan.folder.append_log("repair", chunk=job.number, reason=sentence)
    for outcome in result.outcomes:
        row = plan.rows[outcome.id]
        row.seconds += outcome.seconds
        row.note = outcome.note or row.note
        if outcome.reason:
            row.status, row.stage, row.reason = "failed", outcome.stage, outcome.reason
            plan.attempts.add([row])
            plan.folder.append_log("failed", chunk=job.number, item=row.id, stage=row.stage, reason=row.reason, attempt=row.attempts)
        elif outcome.artifact:
            try:
                export(plan.folder, plan.store, row, outcome.artifact)
            except Damaged as damaged:
                plan.store.void(outcome.artifact)
                print(f"e4s: pair {row.id}: {damaged}; repeat the command", file=sys.stderr)
                plan.folder.append_log("repair", chunk=job.number, item=row.id, reason=str(damaged))
    if result.crash:
        _note_crash(plan, job, result)
    for node, seconds in result.seconds.items():
        plan.folder.append_log(
            "stage",
            chunk=job.number,
            stage=node,
            items=result.computed[node],
            seconds=round(seconds, 3),
            device=plan.graph.device(node),
            worker=result.places.get(node, THIS_PROCESS),
        )
    summary.add(result)
    statuses = [plan.rows[outcome.id].status for outcome in result.outcomes]
    done, failed, seconds = statuses.count("done"), statuses.count("failed"), sum(result.seconds.values())
    plan.folder.append_log("chunk", chunk=job.number, items=len(job.items), done=done, failed=failed, seconds=round(seconds, 3))


def _note_crash(plan: Plan, job: ChunkJob, result: JobResult) -> None:
    """Write down a program error; for an item that was alone it is a failed attempt."""
    alone = len(job.items) == 1 and not result.broken
    item = {"item": job.items[0].id} if alone else {}
    plan.folder.append_log("crash", chunk=job.number, stage=result.stage, traceback=result.crash, **item)
    sentence = crash_sentence(result.crash)
    if not alone:
        remedy = "no pair's fault: the run ends" if result.broken else "its pairs are tried one by one at the end"
        print(f"e4s: chunk {job.number} was stopped in {result.stage}: {sentence}; {remedy}", file=sys.stderr)
        return
    row = plan.rows[job.items[0].id]
    if row.status != "left":  # done or failed before the error
        return
    row.status, row.stage, row.reason = "failed", result.stage, sentence
    plan.attempts.add([row])
    plan.folder.append_log("failed", chunk=job.number, item=row.id, stage=row.stage, reason=row.reason, attempt=row.attempts)
