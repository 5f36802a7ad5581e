"""Jobs in this process, one after the other; what the next one reads is read ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection

from flows.execution.jobs import Job, JobListener, JobRunner, TaskHook
from tasks.runner import JobResult


class LocalExecutor:
    """Runs a job when it is waited for, in the calling thread."""

    def __init__(self, runner: JobRunner, hook: TaskHook) -> None:
        self._runner, self._hook = runner, hook
        self._queue = deque[Job]()

    def free_slots(self) -> int:
        return 0 if self._queue else 1

    def submit(self, job: Job) -> None:
        self.prefetch(job)
        self._queue.append(job)

    def prefetch(self, job: Job) -> None:
        job.prefetch(self._runner)

    def wait(self, listener: JobListener) -> tuple[Job, JobResult] | None:
        job = self._queue.popleft()
        return job, job.run_locally(self._runner, _LocalReporter(job, listener, self._hook), self._hook)

    def close(self) -> None:
        self._runner.close()


class _LocalReporter:
    """Hands what a running job says straight to the listener; a stage is a step of its own."""

    worker = ""

    def __init__(self, job: Job, listener: JobListener, hook: TaskHook) -> None:
        self._job, self._listener, self._hook = job, listener, hook

    def stage(self, node: str, work: Callable[[], None]) -> None:
        self._listener.on_stage(self._job.number, node)
        self._hook(node, self._job.subject, work)

    def progress(self, share: float) -> None:
        self._listener.on_progress(self._job.number, share)

    def uses(self, keys: Collection[str]) -> None:
        self._listener.on_keys_used(keys)
