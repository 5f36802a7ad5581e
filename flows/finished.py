"""Reading a run back: its graph as it ran, and the artifacts of one item."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flows.plan import PAIR_NODES, PAIR_RESULT
from flows.profiles import make_settings
from storage.run import Row, RunFolder
from storage.store import Artifact, Store
from tasks.graph import Graph, Image, Item, Work


class FinishedRun:
    """A run folder's settings, rows and artifacts; backends and settings of single stages may be changed."""

    def __init__(self, folder: RunFolder, stages: Iterable[str] = (), changes: Iterable[str] = ()) -> None:
        settings = folder.read_settings()
        request = settings["request"]
        self.folder = folder
        self.settings = settings
        self.rows = {row.id: row for row in folder.read_rows()}
        self.store = Store(settings["store"])
        changed = make_settings(request["profile"], [*request["stages"], *stages], [*request["changes"], *changes])
        self.graph = Graph(PAIR_NODES, PAIR_RESULT, replace(changed, device=settings["device"]))

    def works(self, row: Row) -> dict[tuple[str, str], Work]:
        """The row's work by (node, role or ""); its keys are the run's if the same versions of libraries are installed."""
        return self.graph.works(item_of(row))

    def artifacts(self, rows: Iterable[Row]) -> dict[str, Artifact]:
        """Finished artifacts of these rows by key."""
        found = self.store.lookup({work.key for row in rows for work in self.works(row).values()})
        return {key: artifact for key, artifact in found.items() if not artifact.failed}


def item_of(row: Row) -> Item:
    """The item that a manifest row describes."""
    source = Image(row.source, row.source_sha256, row.source_face)
    return Item(row.id, {"source": source, "target": Image(row.target, row.target_sha256, row.target_face)})
