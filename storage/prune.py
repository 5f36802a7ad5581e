"""Free room in a store: by age, stage, run, use, failure or size budget, and what crashed writers left.

What is pruned is cancelled in the index first (kind `pruned`: a trace stays), then its files go, unless another artifact refers to them.
What a running run may use is spared. While one runs, files younger than `GRACE` stay too: its publications make a file young before they
refer to it. What nothing refers to (crashed writers, cancelled artifacts) goes when it is older than that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from storage.files import Entry
from storage.runs import Run
from storage.store import Store

GRACE = 3600.0  # s; longer than any publication takes
_REMOVED_AT_ONCE = 1000  # files

_PLAIN = pa.schema([("key", pa.string()), ("stage", pa.string()), ("part", pa.string())])

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What may go: artifacts that meet every condition given. With none given, only what crashed writers left."""

    older_than: float | None = None  # s since it was made
    stages: Sequence[str] = ()
    run: Run | None = None  # only what this run uses
    shared_too: bool = False  # of that run also what other runs use
    unused: bool = False  # only what the present plan of no registered run names
    failed: bool = False  # only failures
    max_size: int | None = None  # bytes of payload that may stay: the least recently made go first

    @property
    def any(self) -> bool:
        return bool(self.older_than is not None or self.stages or self.run or self.unused or self.failed or self.max_size is not None)


@dataclass
class Pruning:
    """What goes, or would go."""

    artifacts: dict[str, int] = field(default_factory=dict)  # by stage
    spared: int = 0  # artifacts that were selected, but a running run may use them
    running: list[Run] = field(default_factory=list)
    files: int = 0  # payload files of these artifacts that nothing else refers to
    file_bytes: int = 0
    left: int = 0  # files that nothing refers to: crashed writers', cancelled artifacts'
    left_bytes: int = 0
    waiting: int = 0  # files that nothing refers to and that are younger than the grace period
    kept_bytes: int = 0  # of payload that artifacts refer to, afterwards

    @property
    def freed(self) -> int:
        """Bytes."""
        return self.file_bytes + self.left_bytes


def prune(store: Store, selection: Selection, *, really: bool, grace: float = GRACE) -> Pruning:
    """Prune, or with `really` False only say what would go. Raises StoreError if somebody else prunes, or if what is used is not known."""
    if not really:
        return _prune(store, selection, really=False, grace=grace)
    with store.runs.pruning():
        store.runs.forget_ended()
        pruning = _prune(store, selection, really=True, grace=grace)
        if selection.run and not selection.run.live and not (selection.stages or selection.failed or selection.older_than):
            store.runs.forget(selection.run)
        if pruning.artifacts:
            store.compact()
        return pruning


def _prune(store: Store, selection: Selection, *, really: bool, grace: float) -> Pruning:
    began = store.runs.now()
    runs = store.runs.registered()
    result = Pruning(running=[run for run in runs if run.live])
    entries = store.index.overview()
    chosen = _chosen(store, selection, entries, runs, began)
    needed = _is_in(entries["key"], store.runs.keys(result.running))
    result.spared = len(pc.unique(entries["key"].filter(pa.array(chosen & needed))))
    chosen &= ~needed
    files, codes, sizes = _payloads(entries)
    if selection.max_size is not None:
        chosen &= _beyond(entries, chosen, codes, sizes, selection.max_size)
    gone = entries.select(["key", "stage", "part"]).filter(pa.array(chosen)).cast(_PLAIN)
    count = gone.group_by("key", use_threads=False).aggregate([("stage", "min")])["stage_min"].value_counts()
    result.artifacts = dict(sorted((entry["values"], entry["counts"]) for entry in count.to_pylist()))

    referred = np.zeros(len(files), bool)
    referred[codes[~chosen & (codes >= 0)]] = True
    result.kept_bytes = int(sizes[referred].sum())
    freed, left, result.waiting = _removable(store, files, referred, began, grace, bool(result.running))
    result.files, result.file_bytes = len(freed), sum(entry.size for entry in freed)
    result.left, result.left_bytes = len(left), sum(entry.size for entry in left)
    if really:
        store.index.cancel(gone.group_by(["key", "stage", "part"], use_threads=False).aggregate([]), "pruned")
        _remove(store, [*freed, *left])
    return result


def _chosen(store: Store, selection: Selection, entries: pa.Table, runs: Sequence[Run], now: float) -> Mask:
    """Which entries meet the conditions other than the size budget: (entries,) bool."""
    chosen = np.full(len(entries), selection.any)
    if selection.stages:
        chosen &= _is_in(entries["stage"].cast(pa.string()), pa.array(selection.stages, pa.string()))
    if selection.failed:
        chosen &= _is_in(entries["kind"].cast(pa.string()), pa.array(["failed"]))
    if selection.older_than is not None:
        chosen &= made(entries) < now - selection.older_than
    if selection.run:
        chosen &= _is_in(entries["key"], store.runs.keys([selection.run]))
        if not selection.shared_too:
            chosen &= ~_is_in(entries["key"], store.runs.keys(run for run in runs if run.id != selection.run.id))
    if selection.unused:
        chosen &= ~_is_in(entries["key"], store.runs.keys(runs, strict=True))
    return chosen


def made(entries: pa.Table) -> npt.NDArray[np.float64]:
    """When each entry was published, s since the epoch: its part's name says it."""
    chunks = entries["part"].chunks  # of one dictionary
    if not chunks:
        return np.zeros(0)
    times = np.array([int(name.split("-")[0]) / 1e9 for name in chunks[0].dictionary.to_pylist()], float)
    return np.concatenate([times[np.asarray(chunk.indices)] for chunk in chunks])


def _payloads(entries: pa.Table) -> tuple[pa.Array, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Payload files (F,), the file of each entry (entries,) or -1, the size of each file (F,)."""
    paths = pc.if_else(pc.equal(entries["file"], ""), None, entries["file"])
    encoded = pa.concat_arrays([pa.array([], pa.string()), *paths.chunks]).dictionary_encode()
    codes = np.asarray(encoded.indices.fill_null(-1)).astype(np.int64)
    sizes = np.zeros(len(encoded.dictionary), np.int64)
    sizes[codes[codes >= 0]] = np.asarray(entries["size"])[codes >= 0]
    return encoded.dictionary, codes, sizes


def _beyond(entries: pa.Table, chosen: Mask, codes: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], budget: int) -> Mask:
    """Which of the chosen entries go so that at most `budget` bytes of payload stay: (entries,) bool, the least recently made."""
    times = made(entries)
    free_at = np.full(len(sizes), -np.inf)  # when a file's last entry goes
    with_file = codes >= 0
    np.maximum.at(free_at, codes[with_file], np.where(chosen, times, np.inf)[with_file])
    order = np.argsort(free_at, kind="stable")
    staying = sizes.sum() - np.cumsum(sizes[order])
    if sizes.sum() <= budget:
        return np.zeros(len(entries), bool)
    enough = np.flatnonzero(staying <= budget)
    limit = free_at[order[enough[0]]] if len(enough) else np.inf
    return times <= limit


def _removable(
    store: Store, files: pa.Array, referred: Mask, began: float, grace: float, running: bool
) -> tuple[list[Entry], list[Entry], int]:
    """Payload files of what goes, files that nothing refers to, and how many of these are too young."""
    staying = set(files.filter(pa.array(referred)).to_pylist())
    going = set(files.filter(pa.array(~referred)).to_pylist())
    freed: list[Entry] = []
    left: list[Entry] = []
    waiting = 0
    for folder in ("payload", "index", "runs"):
        for entries in store.files.walk(folder):
            for entry in entries:
                old = entry.modified < began - grace  # by the scan, not by now: it was to see what refers to it
                if entry.file in going:
                    if old or not running:
                        freed.append(entry)
                    else:
                        waiting += 1
                elif (
                    entry.name.endswith(".tmp") or (folder == "payload" and entry.file not in staying) or entry.name in store.index.damaged
                ):
                    if old:
                        left.append(entry)
                    else:
                        waiting += 1
    return freed, left, waiting


def _remove(store: Store, entries: Sequence[Entry]) -> None:
    """Remove files, folder by folder, except those that were written or made young since they were listed."""
    by_folder: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_folder[entry.file.rsplit("/", 1)[0]].append(entry)
    for folder, listed in by_folder.items():
        now = set(store.files.entries(folder))
        same = [entry.file for entry in listed if entry in now]
        for start in range(0, len(same), _REMOVED_AT_ONCE):
            store.files.remove(same[start : start + _REMOVED_AT_ONCE])


def _is_in(column: pa.ChunkedArray, values: pa.Array) -> Mask:
    return np.asarray(pc.is_in(column, value_set=values))
