"""Whether there is room for what a run will write, and a place for every output: looked at before anything is computed.

How much a run writes is not known beforehand. The estimates are low, so that what they refuse could not have ended well; a disk that fills
up all the same stops the run with a sentence, and nothing finished is lost.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flows.plan import Plan
from flows.why import works_left
from storage.run import RunError, RunFiles, check_writable
from storage.store import Store

PNG_BYTES = 0.8  # per px of a result; photographs take about 1.7
KEPT_BYTES = 0.4  # per px of an aligned crop, of one stage's artifact
VIDEO_BYTES = 0.002  # per px of a frame in an encoded video; at quality 18 it is rather 0.02


def check_pair_room(plan: Plan) -> None:
    """Check room and places for a plan's pairs; a pair whose output has no place fails. Raises RunError."""
    check_writable(plan.folder.path / "report", "--run")
    blocked = blocked_places({item.id: [plan.folder.outputs / f"{item.id}.png"] for item in plan.todo})
    for name, sentence in blocked.items():
        row = plan.rows[name]
        row.status, row.stage, row.reason = "failed", "output", sentence
    plan.todo = [item for item in plan.todo if item.id not in blocked]
    results = sum(PNG_BYTES * item.images["target"].pixels for item in plan.todo)
    crop = KEPT_BYTES * getattr(plan.graph.configs["align"], "side", 0) ** 2 if plan.request.keep == "all" else 0.0
    most = crop * len(plan.todo) * len(plan.graph.nodes)
    if lacking_room(plan.folder, plan.store, results, results + most):
        kept = crop * sum(1 for _ in works_left(plan))
        if problem := lacking_room(plan.folder, plan.store, results, results + kept):
            raise RunError(problem + (", or keep less (--keep final)" if crop else ""))


def blocked_places(places: Mapping[str, Iterable[Path]]) -> dict[str, str]:
    """Return the items whose files cannot be written because folders stand there, with sentences."""
    folders = {entry for parent in {path.parent for paths in places.values() for path in paths} for entry in _folders(parent)}
    found = {}
    for name, paths in places.items():
        if blocking := [path for path in paths if path in folders]:
            found[name] = f"a folder stands where {blocking[0]} would be written: move it away"
    return found


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []


def lacking_room(folder: RunFiles[Any], store: Store, outputs: float, kept: float) -> str:
    """Return a sentence if there is no room for `outputs` bytes in a run folder and `kept` bytes in its store; "" if there is.

    A store behind a URL is taken to have room.
    """
    needs: dict[int, float] = defaultdict(float)  # by device
    where: dict[int, Path] = {}
    for path, size in ((folder.path, outputs), *([(Path(store.files.root), kept)] if store.files.local else [])):
        there = next(at for at in (path, *path.absolute().parents) if at.exists())
        device = there.stat().st_dev
        needs[device] += size
        where.setdefault(device, there)
    for device, size in needs.items():
        free = shutil.disk_usage(where[device]).free
        if free < size:
            return f"{where[device]}: at least {_bytes(size)} are needed for what is left, {_bytes(free)} are free; free some"
    return ""


def _bytes(count: float) -> str:
    """850 kB, 12 MB, 3.4 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
