"""What Dask workers must know of a run of videos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.execution.dask_worker import RunContext
from flows.execution.worker_pool import base_run_context
from flows.video_plan import VideoPlan
from flows.video_recipe import Configs, Recipe
from flows.video_units import Desk, Tables
from storage.store import Store


@dataclass(frozen=True, kw_only=True)
class VideoRunContext(RunContext):
    """What a worker must know of a run of videos, and must prove to agree with. Plain data."""

    configs: Configs
    chunk: int
    max_pixels: int
    video: str  # path of a video that it must see

    def recipe(self) -> Recipe:
        return Recipe(self.graph(), self.configs)

    def fingerprints_here(self) -> Mapping[str, Mapping[str, Any]]:
        return fingerprints_of(self.recipe())

    def check_inputs_visible(self) -> str:
        if problem := super().check_inputs_visible():
            return problem
        return "" if not self.video or Path(self.video).is_file() else f"{self.video} does not exist or is not a file"

    def make_runner(self) -> Desk:
        tables = Tables(Store(self.store))
        return Desk(self.recipe(), tables, keep=self.keep, chunk=self.chunk, max_pixels=self.max_pixels, at_once=self.at_once)


def fingerprints_of(recipe: Recipe) -> Mapping[str, Mapping[str, Any]]:
    """Return what decides all bytes of a run of videos, by node and kind of artifact."""
    return {**recipe.graph.fingerprints, **recipe.prints}


def make_video_run_context(plan: VideoPlan) -> VideoRunContext:
    """Return what workers must know of the plan."""
    request = plan.request
    row = plan.rows[plan.todo[0]] if plan.todo else None
    return VideoRunContext(
        **base_run_context(plan.graph, request, plan.store),
        fingerprints=fingerprints_of(plan),
        keep=request.keep,
        picture=(row.source, row.source_sha256) if row else ("", ""),
        configs=plan.configs,
        chunk=request.chunk,
        max_pixels=request.max_pixels,
        video=row.video if row else "",
    )
