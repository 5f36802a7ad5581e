"""Jobs of videos: a unit, which any process can run, or work on the run folder, which only the planning process does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from flows.execution.jobs import (
    Job,
    JobCrashError,
    JobReporter,
    JobRequirements,
    JobRunner,
    PayloadSender,
    TaskHook,
    run_as_task,
)
from flows.video_recipe import Recipe
from flows.video_units import Unit, outcome_of
from storage.store import Artifact
from tasks.runner import JobResult


@dataclass(kw_only=True, eq=False)
class VideoJob(Job):
    """A job of one video, whose number is `group`; its result stays with it for the pass that waits for it."""

    result: JobResult = field(default_factory=JobResult)

    @property
    def frames(self) -> int:
        """Return how many frames it works on, where progress counts them."""
        return 0


@dataclass(kw_only=True, eq=False)
class UnitJob(VideoJob):
    """A unit of one video: sent as it is, to one worker. A lost worker's unit is looked up before another one runs it."""

    unit: Unit
    gpu: bool  # it needs a GPU
    preferred_worker: str = ""  # the one that has the video open

    @classmethod
    def of(cls, unit: Unit, video: int, recipe: Recipe) -> UnitJob:
        return cls(
            number=unit.number,
            group=video,
            name=unit.name,
            subject=unit.part,
            unit=unit,
            gpu=unit.on_gpu(recipe),
        )

    @property
    def keys(self) -> Collection[str]:
        return self.unit.keys

    @property
    def frames(self) -> int:
        return self.unit.frames

    def run_locally(self, runner: JobRunner, reporter: JobReporter, hook: TaskHook) -> JobResult:
        return run_as_task(hook, self.name, self.subject, lambda: runner.run(self.unit, reporter))

    def run_on_workers(self, pool: PayloadSender, hook: TaskHook, share: Callable[[Sequence[Artifact]], None]) -> JobResult:
        return run_as_task(hook, self.name, self.subject, lambda: self._send(pool))

    def _send(self, pool: PayloadSender) -> JobResult:
        wanted = JobRequirements(self.name, self.subject, self.group, self.gpu, self.preferred_worker)
        try:
            return pool.send(wanted, self.unit, Unit.for_retry, owner=self.number)
        except JobCrashError as crash:
            return JobResult(crash=str(crash))


@dataclass(kw_only=True, eq=False)
class FolderJob(VideoJob):
    """Work of the planning process, which writes the run folder."""

    needs_worker: ClassVar[bool] = False
    work: Callable[[], Any]
    store: str  # URL: what is full if nothing else is known

    def run_locally(self, runner: JobRunner, reporter: JobReporter, hook: TaskHook) -> JobResult:
        return self._run(hook)

    def run_on_workers(self, pool: PayloadSender, hook: TaskHook, share: Callable[[Sequence[Artifact]], None]) -> JobResult:
        return self._run(hook)

    def _run(self, hook: TaskHook) -> JobResult:
        return run_as_task(hook, self.name, self.subject, lambda: outcome_of(self.name, self.store, lambda result: self.work()))
