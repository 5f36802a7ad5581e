"""Jobs on Dask workers: an existing scheduler (`--dask tcp://...`) or processes of our own (`--dask local:N`).

Each job has a thread of the planning process, which sends its payload, or one part of it after the other, to workers of the
pool and waits (`flows.execution.worker_pool`). Messages arrive in the main thread, in `wait`. Jobs that write the run folder
run in such a thread themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from flows.execution.dask_worker import RunContext
from flows.execution.jobs import Job, JobListener, TaskHook
from flows.execution.worker_pool import ClusterRequest, WorkerPool
from storage.run import RunFiles
from storage.store import Artifact, Store
from tasks.runner import JobResult


class DaskExecutor:
    """A pool of workers, each with up to `jobs_ahead` jobs at a time: one runs, the others wait there."""

    def __init__(
        self,
        context: RunContext,
        request: ClusterRequest,
        store: Store,
        folder: RunFiles[Any],
        hook: TaskHook,
        jobs_ahead: int,
    ) -> None:
        """Raises ClusterError if the scheduler does not answer."""
        self._hook, self._running = hook, 0
        self._pool = WorkerPool(context, request, store, folder, jobs_ahead)
        self.close = self._pool.close

    def free_slots(self) -> int:
        return max(0, self._pool.capacity() - self._running)

    def submit(self, job: Job) -> None:
        self._running += job.needs_worker
        self._pool.start(partial(self._run, job))

    def prefetch(self, job: Job) -> None:
        """Do nothing: a worker reads ahead for the job that waits there."""

    def wait(self, listener: JobListener) -> tuple[Job, JobResult] | None:
        message = self._pool.poll()
        if message is None:
            return None
        kind, content = message
        if kind == "event":
            _notify(listener, content)
            return None
        job, result = content
        self._running -= job.needs_worker
        return job, result

    def _run(self, job: Job) -> tuple[Job, JobResult]:
        def share(artifacts: Sequence[Artifact]) -> None:
            self._pool.emit({"job": job.number, "shared": artifacts})

        return job, job.run_on_workers(self._pool, self._hook, share)


def _notify(listener: JobListener, event: Mapping[str, Any]) -> None:
    if "shared" in event:
        listener.on_shared(event["job"], event["shared"])
    elif "node" in event:
        listener.on_stage(event["job"], event["node"])
    elif "uses" in event:
        listener.on_keys_used(event["uses"])
    else:
        listener.on_progress(event["job"], event["share"])
