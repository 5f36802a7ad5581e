"""Reading a run back: its graph as it ran, and the artifacts of one item."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from flows.plan import open_store
from flows.profiles import change_settings
from flows.stages import PAIR_NODES, PAIR_RESULT
from storage.run import Row, RunError, RunFolder
from storage.store import Artifact
from tasks.graph import Graph, Image, Item, Settings, UsageError, Work

_SAID = ("device", "cpu_threads", "processor", "platform", "written", "e4s", "python", "libraries", "store", "nodes")
_ASKED = ("profile", "stages", "changes", "max_pixels")  # names in run.json, and in its `request`, that reading back needs


class FinishedRun:
    """A run folder's settings, rows and artifacts; backends and settings of single stages may be changed.

    Keys are those of the run itself, whatever has become of its profile and of the installed libraries since. Raises RunError if this is no
    run, or one that another version wrote and this one cannot read; UsageError if the changes do not fit.
    """

    def __init__(self, folder: RunFolder, stages: Sequence[str] = (), changes: Sequence[str] = ()) -> None:
        self.folder = folder
        self.settings = folder.read_settings()
        self.rows = {row.id: row for row in folder.read_rows()}
        try:
            for name in _SAID:
                self.settings[name]
            for name in _ASKED:
                self.settings["request"][name]
            self.store = open_store(folder, self.settings["store"])
            prints: dict[str, dict[str, Any]] = self.settings["nodes"]
            backends = {print_["stage"]: print_["backend"] for print_ in prints.values()}
            options = {node: print_["config"] for node, print_ in prints.items()}
            instructions = next((print_["instructions"] for print_ in prints.values() if "instructions" in print_), "")
            settings = Settings(backends, options, self.settings["device"], instructions)
            self.graph = Graph(PAIR_NODES, PAIR_RESULT, settings, prints)
        except (KeyError, TypeError, AttributeError, UsageError) as error:
            lacks = f"nothing is said of {error}" if isinstance(error, KeyError) else str(error)
            by = self.settings.get("e4s", "of an unknown version")
            raise RunError(
                f"{folder.settings}: what e4s {by} wrote cannot be read back by this version, {version('e4s')} ({lacks}); "
                "repeat the run's command with this version, or read it with that one"
            ) from None
        if stages or changes:
            self.graph = Graph(PAIR_NODES, PAIR_RESULT, change_settings(settings, stages, changes), prints)

    def works(self, row: Row) -> dict[tuple[str, str], Work]:
        """The row's work by (node, role or "")."""
        return self.graph.works(item_of(row))

    def artifacts(self, rows: Sequence[Row]) -> dict[str, Artifact]:
        """Finished artifacts of these rows by key."""
        found = self.store.lookup({work.key for row in rows for work in self.works(row).values()})
        return {key: artifact for key, artifact in found.items() if not artifact.failed}


def item_of(row: Row) -> Item:
    """The item that a manifest row describes."""
    source = Image(row.source, row.source_sha256, row.source_face, reading=row.source_reading)
    target = Image(row.target, row.target_sha256, row.target_face, reading=row.target_reading)
    return Item(row.id, {"source": source, "target": target})
