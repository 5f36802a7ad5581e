"""Work through a plan, chunk by chunk; knows no Prefect, so that a single swap runs without a server.

Where the chunks are carried is an `Executor`'s business: this process (`Local`) or Dask workers (`flows.cluster.Cluster`). Rows, outputs,
log and manifest are written here, whichever it is.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import tee, zip_longest
from typing import Any, Protocol

from e4s_models.weights import WeightsError, remedies, weight_path
from flows.journal import Logged
from flows.plan import Plan, export, record
from flows.room import check_pair_room
from storage.faults import fault_point
from storage.run import BaseRow, Row, RunFiles
from storage.store import Artifact, Damaged
from tasks.runner import Call, ChunkJob, ChunkResult, Worker, crash_sentence, run_chunk, singles

MANIFEST_EVERY = 10.0  # s between rewrites of the manifest while running
THIS_PROCESS = f"{socket.gethostname()}:{os.getpid()}"  # the worker that the log names where there is no other
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


StageCall = Callable[[int, str, Callable[[], None]], None]
"""Runs one stage (on Dask: one part) of one chunk: (number of the chunk, name, the work). A flow hangs its task policy here."""


Results = Generator[tuple[ChunkJob, ChunkResult], None, None]


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
    crash: str = ""  # traceback of a program error that ended the run: no item's fault

    def conclude(self, folder: RunFiles[Any], rows: Iterable[BaseRow]) -> None:
        """Count the rows as they are now, and say so in the log."""
        count = [row.status for row in rows].count
        self.done, self.failed, self.left = count("done"), count("failed"), count("left")
        folder.append_log("end", done=self.done, failed=self.failed, left=self.left)

    @property
    def exit_code(self) -> int:
        """0 all done, 1 program error, 2 some items failed."""
        return 1 if self.crash or self.left else 2 if self.failed else 0


def direct_call(chunk: int, node: str, work: Callable[[], None]) -> None:
    """Run a stage's work on the spot."""
    work()


class Executor(Protocol):
    """Carries chunks."""

    def results(self, jobs: Iterable[ChunkJob]) -> Results:
        """Chunks with what became of them, in any order. May raise UsageError, DiskFull or StoreError."""
        ...

    def close(self) -> None:
        """Stop what is still running, quickly; what was computed is kept."""
        ...


class Shared:
    """Per-image work that several chunks read: what earlier chunks finished is known to later ones."""

    def __init__(self) -> None:
        self.artifacts: dict[str, Artifact] = {}

    def equip(self, job: ChunkJob) -> ChunkJob:
        """The job with what is finished by now."""
        found = {key: self.artifacts[key] for key in job.shared if key in self.artifacts}
        return replace(job, known={**job.known, **found}) if found else job

    def take(self, job: ChunkJob, result: ChunkResult) -> None:
        self.artifacts |= {artifact.key: artifact for artifact in result.artifacts if artifact.key in job.shared}


class Local:
    """One chunk after the other in this process; the next one's pictures are decoded ahead."""

    def __init__(self, plan: Plan, progress: Progress, call: StageCall) -> None:
        self._progress, self._call, self._shared = progress, call, Shared()
        threads = plan.request.compute_threads()
        use_threads(threads)
        self._worker = Worker(plan.graph, plan.store, plan.request.keep, plan.request.workers or threads)

    def results(self, jobs: Iterable[ChunkJob]) -> Results:
        ahead, behind = tee(jobs)
        next(ahead, None)
        for job, following in zip_longest(behind, ahead):
            if following:
                self._worker.prefetch(following)
            self._worker.notify = partial(_within, self._progress, len(job.items))
            result = run_chunk(self._worker, self._shared.equip(job), _announced(self._progress, job, self._call))
            self._shared.take(job, result)
            yield job, result

    def close(self) -> None:
        self._worker.close()


def make_executor(plan: Plan, progress: Progress, call: StageCall) -> Executor:
    """The executor that the request names."""
    if plan.request.dask:
        from flows.cluster import Cluster

        return Cluster(plan, progress, call)
    return Local(plan, progress, call)


def check_weights(plan: Plan) -> None:
    """Check the weights that this machine needs for the plan; workers on other machines check their own. Raises WeightsError."""
    if plan.todo and not plan.request.remote:
        require_weights(plan.graph.weights())


def use_threads(count: int) -> None:
    """Fix the thread count of the computing libraries: bytes are promised for one count. Freed memory is kept for what comes next.

    Waiting threads sleep (unless the environment says otherwise): on a busy machine spinning ones made small steps ten times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
    os.environ.pop("NVIDIA_TF32_OVERRIDE", None)  # read when the GPU is first used; it would overrule what is set below
    import cv2
    import torch
    from threadpoolctl import threadpool_limits

    cv2.setNumThreads(count)
    torch.set_num_threads(count)
    # Torch's own defaults, which bytes on a GPU are promised for, whatever the environment or the program set before.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = True
    threadpool_limits(count)  # NumPy's linear algebra, whose sums depend on it
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Have glibc keep up to 1 GiB that is free, and map only what is above 32 MiB by itself; another C library stays as it is.

    Dask's nannies set MALLOC_TRIM_THRESHOLD_=65536, which gives every larger tensor back to the system as soon as it is freed: half of the
    time of optimization went into pages that were mapped anew.
    """
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


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


def execute(plan: Plan, progress: Progress, call: StageCall = direct_call) -> Summary:
    """Carry out a plan. The manifest is written whatever happens; what is finished stays finished.

    `call(chunk, node, work)` runs one stage on one chunk. Raises WeightsError, and UsageError for a cluster that is not there, before
    anything is done, RunError where there is no room; UsageError, StoreError, DiskFull and
    KeyboardInterrupt after the manifest was written.
    """
    check_weights(plan)
    if plan.todo:
        check_pair_room(plan)
    summary = Summary(0, 0, 0)
    folder = plan.folder
    progress = Logged(progress, folder)
    with closing(make_executor(plan, progress, call)) if plan.todo else nullcontext() as executor:
        record(plan)
        progress.begin(plan)
        try:
            if executor:
                _work_through(plan, progress, executor, summary)
            fault_point("before-manifest")
        finally:
            progress.end()
            folder.write_rows(plan.rows.values())
    summary.conclude(folder, plan.rows.values())
    return summary


def _work_through(plan: Plan, progress: Progress, executor: Executor, summary: Summary) -> None:
    """Carry all chunks, then the items of those that a program error stopped, one by one: the culprits fail, the others are done."""
    due = time.monotonic() + MANIFEST_EVERY
    number = -(-len(plan.todo) // plan.request.chunk)  # of the next job
    jobs: Iterable[ChunkJob] = plan.chunks()
    while True:
        again: list[ChunkJob] = []
        with closing(executor.results(_until(jobs, again if plan.request.fail_fast else ()))) as results:
            for job, result in results:
                _record(plan, job, result, summary)
                if result.crash and result.broken:
                    summary.crash = result.crash
                    return
                alone = singles(plan.graph, job, result, number) if result.crash and len(job.items) > 1 else []
                again += alone
                number += len(alone)
                later = {single.items[0].id for single in alone}
                progress.advance([plan.rows[outcome.id] for outcome in result.outcomes if outcome.id not in later])
                if plan.request.fail_fast and any(plan.rows[outcome.id].status == "failed" for outcome in result.outcomes):
                    return
                if time.monotonic() > due:
                    began = time.monotonic()
                    plan.folder.write_rows(plan.rows.values())
                    due = time.monotonic() + max(MANIFEST_EVERY, 20 * (time.monotonic() - began))  # a large manifest costs at most 5 %
        if not again:
            return
        jobs = again


def _until(jobs: Iterable[ChunkJob], stop: Collection[ChunkJob]) -> Iterator[ChunkJob]:
    """The jobs, as long as there is nothing in `stop`."""
    for job in jobs:
        if stop:
            return
        yield job


def _within(progress: Progress, items: int, share: float) -> None:
    progress.within(items * share)


def _announced(progress: Progress, job: ChunkJob, call: StageCall) -> Call:
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
        summary.computed[node] = summary.computed.get(node, 0) + result.computed[node]
    statuses = [plan.rows[outcome.id].status for outcome in result.outcomes]
    done, failed, seconds = statuses.count("done"), statuses.count("failed"), sum(result.seconds.values())
    plan.folder.append_log("chunk", chunk=job.number, items=len(job.items), done=done, failed=failed, seconds=round(seconds, 3))


def _note_crash(plan: Plan, job: ChunkJob, result: ChunkResult) -> None:
    """Write down a program error; for an item that was alone it is a failed attempt."""
    alone = len(job.items) == 1 and not result.broken
    item = {"item": job.items[0].id} if alone else {}
    plan.folder.append_log("crash", chunk=job.number, stage=result.crash_node, traceback=result.crash, **item)
    sentence = crash_sentence(result.crash)
    if not alone:
        remedy = "no pair's fault: the run ends" if result.broken else "its pairs are tried one by one at the end"
        print(f"e4s: chunk {job.number} was stopped in {result.crash_node}: {sentence}; {remedy}", file=sys.stderr)
        return
    row = plan.rows[job.items[0].id]
    if row.status != "left":  # done or failed before the error
        return
    row.status, row.stage, row.reason = "failed", result.crash_node, sentence
    plan.attempts.add([row])
    plan.folder.append_log("failed", chunk=job.number, item=row.id, stage=row.stage, reason=row.reason, attempt=row.attempts)
