"""The one dispatch loop: ready jobs of a planner to the free slots of an executor.

It runs in the main thread of the planning process and holds no state that outlives it: what is finished is in the store, so a run that is
killed here continues from there. Our own loop rather than Dask's scheduler, because two things must hold in every process, with Dask or
without: of two jobs that make the same key only one runs at a time, and later jobs become known only as results arrive. Placement, lost
workers and messages are the executor's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from flows.execution.jobs import Executor, Job, Planner
from storage.store import Artifact


def run_jobs(planner: Planner, executor: Executor) -> None:
    """Run until the planner has no more jobs or stops. Raises what the executor and the planner raise."""
    _Scheduler(planner, executor).run()


class _Scheduler:
    """Jobs that run, by number; listens to the executor for the planner."""

    def __init__(self, planner: Planner, executor: Executor) -> None:
        self._planner, self._executor = planner, executor
        self._running: dict[int, Job] = {}
        self._released: set[int] = set()  # running jobs whose shared keys are there already

    def run(self) -> None:
        while True:
            self._dispatch()
            if self._planner.is_stopped or not self._running:
                return
            if finished := self._executor.wait(self):
                job, result = finished
                del self._running[job.number]
                self._released.discard(job.number)
                self._planner.on_finished(job, result)

    def _dispatch(self) -> None:
        while not self._planner.is_stopped and (ready := self._next_job()):
            job = self._planner.start(ready)
            self._running[job.number] = job
            self._executor.submit(job)
        for following in self._planner.ready_jobs():
            self._executor.prefetch(following)
            return

    def _next_job(self) -> Job | None:
        """Return the most urgent job that can run now; further chunks or videos are begun only where none of the begun ones can run."""
        while True:
            slots = self._executor.free_slots()
            for job in self._planner.ready_jobs():
                if (slots or not job.needs_worker) and self._is_free(job):
                    return job
            if not slots or not self._planner.make_more_ready():
                return None

    def _is_free(self, job: Job) -> bool:
        """Return True if no running job makes any of the same keys."""
        making = (other for number, other in self._running.items() if number not in self._released)
        return all(set(other.keys).isdisjoint(job.keys) for other in making)

    # -- what the executor says --------------------------------------------------------------------------------------------------------

    def on_stage(self, number: int, node: str) -> None:
        if job := self._running.get(number):
            self._planner.on_stage(job, node)

    def on_progress(self, number: int, share: float) -> None:
        if job := self._running.get(number):
            self._planner.on_progress(job, share)

    def on_keys_used(self, keys: Collection[str]) -> None:
        self._planner.on_keys_used(keys)

    def on_shared(self, number: int, artifacts: Sequence[Artifact]) -> None:
        if job := self._running.get(number):
            self._released.add(number)
            self._planner.on_shared(job, artifacts)
