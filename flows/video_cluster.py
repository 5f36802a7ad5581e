"""Units of videos on Dask workers: the hands of `e4s videos --dask`.

A unit is sent to one worker of a crew (`flows.workers`). When that worker is lost, another one looks whether the unit is finished, and
carries it if not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flows.remote import Kit
from flows.video_plan import Configs, Recipe, VideoPlan
from flows.video_steps import Step, Told, VideoCall
from flows.video_units import Desk, Tables, Unit, UnitResult
from flows.workers import Crashed, Crew, Errand, kit_of
from storage.store import Store

AHEAD = 1  # units that a worker is given at a time: they take long beside the way to the worker, and none waits behind another


@dataclass(frozen=True, kw_only=True)
class VideoKit(Kit):
    """All that a worker must know of a run of videos."""

    configs: Configs
    chunk: int
    max_pixels: int
    film: str  # path of a video that it must see

    def recipe(self) -> Recipe:
        return Recipe(self.graph(), self.configs)

    def prints_here(self) -> Mapping[str, Mapping[str, Any]]:
        return prints_of(self.recipe())

    def unseen(self) -> str:
        return super().unseen() or ("" if not self.film or Path(self.film).is_file() else f"{self.film} does not exist or is not a file")

    def outfit(self) -> Desk:
        tables = Tables(Store(self.store))
        return Desk(self.recipe(), tables, keep=self.keep, chunk=self.chunk, max_pixels=self.max_pixels, at_once=self.at_once)


def prints_of(recipe: Recipe) -> Mapping[str, Mapping[str, Any]]:
    """What decides all bytes of a run of videos, by node and kind of artifact."""
    return {**recipe.graph.fingerprints, **recipe.prints}


def make_video_kit(plan: VideoPlan) -> VideoKit:
    """What workers must know of the plan."""
    request = plan.request
    row = plan.rows[plan.todo[0]] if plan.todo else None
    return VideoKit(
        **kit_of(plan.graph, request, plan.store),
        prints=prints_of(plan),
        keep=request.keep,
        picture=(row.source, row.source_sha256) if row else ("", ""),
        configs=plan.configs,
        chunk=request.chunk,
        max_pixels=request.max_pixels,
        film=row.video if row else "",
    )


class WorkersHands:
    """Dask workers, each with one unit at a time; work on the run folder is done in this process beside them."""

    def __init__(self, plan: VideoPlan, call: VideoCall, told: Told) -> None:
        """Raises ClusterError if the scheduler does not answer."""
        self._plan, self._call, self._told = plan, call, told
        self._under_way = 0
        self._last: dict[str, str] = {}  # id of a video -> the worker that had its last unit, and has it open
        self._crew = Crew(make_video_kit(plan), plan.request, plan.store, plan.folder, AHEAD)
        self.close = self._crew.close

    def room(self, step: Step | None) -> bool:
        return (step is not None and step.unit is None) or self._under_way < self._crew.room()

    def give(self, step: Step) -> None:
        self._under_way += step.unit is not None
        self._crew.start(partial(self._through, step, self._last.get(step.video.row.id, "")))

    def take(self) -> Step | None:
        heard = self._crew.hear()
        if heard is None:
            return None
        kind, message = heard
        if kind == "event":
            if "uses" in message:
                self._told.uses(message["uses"])
            else:
                self._told.within(message["chunk"], message["share"])
            return None
        step: Step = message
        self._under_way -= step.unit is not None
        self._last[step.video.row.id] = step.result.place
        return step

    def _through(self, step: Step, near: str) -> Step:
        unit = step.unit
        step.visibly(self._call, lambda: self._carry(step, unit, near) if unit else step.carry_here(self._plan.store.url))
        return step

    def _carry(self, step: Step, unit: Unit, near: str) -> UnitResult:
        errand = Errand(unit.name, unit.part, step.video.number, unit.on_gpu(self._plan), near)
        try:
            result: UnitResult = self._crew.send(errand, unit, Unit.resent, owner=unit.number)
        except Crashed as crash:
            return UnitResult(crash=str(crash))
        return result
