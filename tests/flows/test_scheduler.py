"""The one dispatch loop on jobs that only write down when they ran: order, common keys, capacity, what follows from a result."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from flows.execution.jobs import Job, JobListener, JobReporter, JobRunner, PayloadSender, TaskHook, call_directly
from flows.execution.local_executor import LocalExecutor
from flows.execution.scheduler import run_jobs
from storage.store import Artifact
from tasks.runner import JobResult


@dataclass(kw_only=True, eq=False)
class NotedJob(Job):
    makes: frozenset[str] = frozenset()

    @property
    def keys(self) -> Collection[str]:
        return self.makes

    def prefetch(self, runner: JobRunner) -> None:
        runner.prefetch(self.name)

    def run_locally(self, runner: JobRunner, reporter: JobReporter, hook: TaskHook) -> JobResult:
        reporter.stage("stage", lambda: None)
        reporter.progress(0.5)
        return runner.run(self.name, reporter)

    def run_on_workers(self, pool: PayloadSender, hook: TaskHook, share: Callable[[Sequence[Artifact]], None]) -> JobResult:
        raise NotImplementedError


def job(number: int, *makes: str) -> NotedJob:
    return NotedJob(number=number, group=number, name=f"job {number}", subject="nothing", makes=frozenset(makes))


@dataclass
class NotingRunner:
    notes: list[str] = field(default_factory=list)

    def prefetch(self, payload: str) -> None:
        self.notes.append(f"prefetch {payload}")

    def run(self, payload: str, reporter: JobReporter) -> JobResult:
        self.notes.append(f"run {payload}")
        return JobResult(computed={payload: 1})

    def close(self) -> None:
        self.notes.append("close")


class ListPlanner:
    """Jobs in order, `lookahead` of them ready at a time; stops behind the job that it is told."""

    def __init__(self, jobs: Iterable[Job], lookahead: int = 1, stop_after: int = -1) -> None:
        self._coming, self._lookahead, self._stop_after = iter(jobs), lookahead, stop_after
        self.ready, self.events, self.is_stopped = deque[Job](), list[str](), False

    def ready_jobs(self) -> Iterable[Job]:
        return list(self.ready)

    def make_more_ready(self) -> bool:
        if len(self.ready) >= self._lookahead or not (following := next(self._coming, None)):
            return False
        self.ready.append(following)
        return True

    def start(self, job: Job) -> Job:
        self.ready.remove(job)
        self.events.append(f"start {job.number}")
        return job

    def on_finished(self, job: Job, result: JobResult) -> None:
        self.events.append(f"finished {job.number}")
        self.is_stopped = job.number == self._stop_after

    def on_stage(self, job: Job, node: str) -> None:
        self.events.append(f"{job.number} in {node}")

    def on_progress(self, job: Job, share: float) -> None:
        self.events.append(f"{job.number} at {share}")

    def on_keys_used(self, keys: Collection[str]) -> None: ...

    def on_shared(self, job: Job, artifacts: Sequence[Artifact]) -> None:
        self.events.append(f"{job.number} shared")


class HeldExecutor:
    """Three slots; jobs end in the order that the test gives, and may share what they made before."""

    def __init__(self, steps: Iterable[str]) -> None:
        self._steps, self.running = iter(steps), dict[int, Job]()

    def free_slots(self) -> int:
        return 3 - len(self.running)

    def submit(self, job: Job) -> None:
        self.running[job.number] = job

    def prefetch(self, job: Job) -> None: ...

    def wait(self, listener: JobListener) -> tuple[Job, JobResult] | None:
        what, number = next(self._steps).split()
        if what == "share":
            listener.on_shared(int(number), [])
            return None
        return self.running.pop(int(number)), JobResult()

    def close(self) -> None: ...


def test_this_process_runs_one_job_after_the_other_and_reads_ahead() -> None:
    planner, runner = ListPlanner([job(0), job(1)], lookahead=2), NotingRunner()
    planner.ready.extend([job(7), job(8)])
    run_jobs(planner, LocalExecutor(runner, call_directly))
    assert runner.notes[:5] == ["prefetch job 7", "prefetch job 8", "run job 7", "prefetch job 8", "run job 8"]
    assert [note for note in runner.notes if note.startswith("run")] == ["run job 7", "run job 8", "run job 0", "run job 1"]
    assert planner.events[:4] == ["start 7", "7 in stage", "7 at 0.5", "finished 7"]


def test_of_two_jobs_with_a_common_key_one_waits_until_the_other_shares_it() -> None:
    planner = ListPlanner([job(0, "a", "b"), job(1, "b"), job(2, "c"), job(3, "a")], lookahead=4)
    run_jobs(planner, HeldExecutor(["end 2", "share 0", "end 1", "end 3", "end 0"]))
    assert planner.events == [
        "start 0",
        "start 2",
        "finished 2",
        "0 shared",
        "start 1",
        "start 3",
        "finished 1",
        "finished 3",
        "finished 0",
    ]


def test_what_waits_for_a_key_goes_on_when_the_job_that_made_it_ends() -> None:
    planner = ListPlanner([job(0, "a"), job(1, "a")])
    run_jobs(planner, HeldExecutor(["end 0", "end 1"]))
    assert planner.events == ["start 0", "finished 0", "start 1", "finished 1"]


def test_nothing_is_started_behind_a_stop() -> None:
    planner, runner = ListPlanner([job(0), job(1), job(2)], stop_after=1), NotingRunner()
    run_jobs(planner, LocalExecutor(runner, call_directly))
    assert planner.events[-1] == "finished 1"
    assert "run job 2" not in runner.notes
