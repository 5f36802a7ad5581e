"""The words of execution: job, planner, executor, and who hears how a job goes on.

A planner knows rows and decides what is to do; an executor knows processes and does it; the scheduler (`flows.execution.scheduler`) stands
between them. All three live in the planning process, in its main thread; an executor may run jobs in threads or other processes. What
leaves the process is a job's payload, which is plain data, and what comes back is a `tasks.runner.JobResult`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from storage.store import Artifact
from tasks.runner import JobResult, ProgramError

Payload = TypeVar("Payload")

TaskHook = Callable[[str, str, Callable[[], None]], None]
"""Runs one step of a job: (name of the stage or pass, what it works on, the work). A flow hangs its task policy here."""


def call_directly(name: str, subject: str, work: Callable[[], None]) -> None:
    """Run a step on the spot."""
    work()


def run_as_task(hook: TaskHook, name: str, subject: str, work: Callable[[], JobResult]) -> JobResult:
    """Run a whole job as one task, which sees an exception only where a program error stopped the job."""
    results: list[JobResult] = []

    def task() -> None:
        results.append(work())
        if results[0].crash:
            raise ProgramError(results[0].crash)

    try:
        hook(name, subject, task)
    except ProgramError:
        if not results:
            raise
    return results[0]


class JobReporter(Protocol):
    """What a running job says, in the process that runs it. Its methods may raise KeyboardInterrupt when the run was stopped."""

    @property
    def worker(self) -> str:
        """Name of the worker process; "" in the planning process."""
        ...

    def stage(self, node: str, work: Callable[[], None]) -> None:
        """Report that a chunk enters a stage, and run the stage."""
        ...

    def progress(self, share: float) -> None:
        """Report which share of the job is done."""
        ...

    def uses(self, keys: Collection[str]) -> None:
        """Report keys, not known before, of artifacts that the run may use now."""
        ...


class JobRunner(Protocol):
    """What one process keeps between the jobs of one run: models, open files, decoded images. One job at a time."""

    def prefetch(self, payload: Any) -> None:
        """Start reading ahead what a coming job needs."""
        ...

    def run(self, payload: Any, reporter: JobReporter) -> JobResult:
        """Run a job. Raises DiskFull, StoreError, and KeyboardInterrupt from the reporter; an item's failure is part of the result."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class JobRequirements:
    """What a payload is called and which worker it needs."""

    name: str  # what is done
    subject: str  # with what: the two together name it
    group: int  # number of the chunk or video, in the log
    gpu: bool = False
    preferred_worker: str = ""  # among those that have equally much to do


class JobCrashError(Exception):
    """A job was stopped by a program error, or lost too many workers: the sentence says which."""


class PayloadSender(Protocol):
    """What a job on Dask sends its payload by: the pool of workers."""

    def send(self, wanted: JobRequirements, payload: Payload, for_retry: Callable[[Payload], Payload], owner: object) -> JobResult:
        """Return the result of a payload's job on a worker. When that worker is lost, another one gets `for_retry(payload)`: what is left.

        Losses are counted per `owner`. Raises JobCrashError, ClusterError, DiskFull or StoreError.
        """
        ...


@dataclass(kw_only=True, eq=False)
class Job(ABC):
    """What one executor slot does in one go. Objects stay in the planning process."""

    number: int  # unique in this execution
    group: int  # number of its chunk or video, by which the log names it
    name: str  # stage, part of the graph, or pass
    subject: str  # what it works on, such as "chunk 3" or "clip frames 0-5"
    needs_worker: ClassVar[bool] = True  # False: it writes the run folder, so the planning process runs it

    @property
    def keys(self) -> Collection[str]:
        """Keys of what it makes that other jobs may need, too: of two jobs with a common key only one runs at a time."""
        return ()

    def prefetch(self, runner: JobRunner) -> None:
        """Start reading ahead what it needs."""
        return

    @abstractmethod
    def run_locally(self, runner: JobRunner, reporter: JobReporter, hook: TaskHook) -> JobResult:
        """Run in the planning process."""

    @abstractmethod
    def run_on_workers(self, pool: PayloadSender, hook: TaskHook, share: Callable[[Sequence[Artifact]], None]) -> JobResult:
        """Run on Dask workers, from a thread of the planning process.

        `share` hands out artifacts that other jobs wait for before this one ends. Raises ClusterError, DiskFull or StoreError.
        """


class JobListener(Protocol):
    """What an executor says of running jobs while it waits, by their numbers."""

    def on_stage(self, number: int, node: str) -> None: ...
    def on_progress(self, number: int, share: float) -> None: ...
    def on_keys_used(self, keys: Collection[str]) -> None: ...
    def on_shared(self, number: int, artifacts: Sequence[Artifact]) -> None: ...


class Planner(Protocol):
    """What is to do, and what follows from what was done. Writes rows, outputs and the log."""

    @property
    def is_stopped(self) -> bool:
        """Return True once no further job shall run: a program error that is no item's fault, or --fail-fast."""
        ...

    def ready_jobs(self) -> Iterable[Job]:
        """Return jobs that could run now, the most urgent first. A job stays ready until `start` gets it."""
        ...

    def make_more_ready(self) -> bool:
        """Make further jobs ready: read the next chunk, begin the next video. Return False if there is nothing to begin."""
        ...

    def start(self, job: Job) -> Job:
        """Return the job as it is to run, with the artifacts that were finished since it became ready."""
        ...

    def on_finished(self, job: Job, result: JobResult) -> None:
        """Record what a job came to; may make jobs ready."""
        ...

    def on_stage(self, job: Job, node: str) -> None: ...
    def on_progress(self, job: Job, share: float) -> None: ...
    def on_keys_used(self, keys: Collection[str]) -> None: ...
    def on_shared(self, job: Job, artifacts: Sequence[Artifact]) -> None: ...


class Executor(Protocol):
    """Runs jobs: in this process (`LocalExecutor`) or on Dask workers (`DaskExecutor`)."""

    def free_slots(self) -> int:
        """Return how many jobs that need a worker can be submitted now."""
        ...

    def submit(self, job: Job) -> None: ...

    def prefetch(self, job: Job) -> None:
        """Start reading ahead for a job that is submitted soon; may do nothing."""
        ...

    def wait(self, listener: JobListener) -> tuple[Job, JobResult] | None:
        """Return a job that ended, after telling the listener what happened meanwhile; None if none did for a moment.

        Raises UsageError, DiskFull, StoreError or KeyboardInterrupt.
        """
        ...

    def close(self) -> None:
        """Stop what still runs at its next item; what it finished is kept."""
        ...
