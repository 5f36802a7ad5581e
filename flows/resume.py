"""What of a run is done, what is pending, and what is not tried: the one place that decides it, for pairs and for videos.

An item is done if the run before left it so under the same key and its output exists, or if the store holds its result. It is not tried if
its input cannot be read, if it is in quarantine, or if the store remembers that this very input fails. All else is pending. Planning, --why
and `e4s status --why` ask here; so do runs, since they begin with a plan. Runs in the planning process, under the run folder's lock unless
`dry`; with `dry` nothing is written, exported or cancelled.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flows.attempts import Attempts
from flows.outputs import RESULT, export
from flows.stale import clear_outputs
from flows.video_recipe import Recipe
from flows.video_survey import VideoLookup
from storage.run import BaseRow, Row, RunFiles, RunFolder
from storage.store import Artifact, Damaged, Store
from storage.video_run import VideoRow, VideoRunFolder
from tasks.frame import hash_file
from tasks.graph import Graph, Item
from tasks.runner import failure, notes_of
from tasks.stage import ItemError

_KEPT_OF_DONE = ("status", "note", "output", "output_sha256", "output_size", "seconds", "attempts")


@dataclass
class PairDecision:
    """What of some pairs is pending."""

    pending: list[Item]
    known: dict[str, Artifact]  # finished or failed artifacts that they may use
    gone: dict[str, str]  # key -> why an artifact that was finished is there no more: damaged, pruned


@dataclass
class VideoDecision:
    """What of some videos is pending."""

    pending: list[str]  # ids
    retried: set[str]  # ids that are tried although their failure is remembered
    known: set[str]  # keys of all that the store holds of videos that are not done


def output_exists(folder: RunFiles[Any], row: BaseRow, verify: bool) -> bool:
    """Return whether a done row's output is there: by size, or by digest if asked for."""
    path = folder.path / row.output
    try:
        return path.stat().st_size == row.output_size and (not verify or hash_file(str(path)) == row.output_sha256)
    except (OSError, ItemError):
        return False


class PairResume:
    """Decides for the pairs of one plan."""

    def __init__(
        self,
        graph: Graph,
        store: Store,
        folder: RunFolder,
        attempts: Attempts,
        before: Mapping[str, Row],
        *,
        retry: Collection[str],
        verify: bool,
        dry: bool,
    ) -> None:
        self._graph, self._store, self._folder, self._attempts, self._before = graph, store, folder, attempts, before
        self._retry, self._verify, self._dry = retry, verify, dry
        self._damaged: set[str] = set()

    def done_before(self, row: Row) -> Row | None:
        """Return a planned row as the run before left it if that is done, under the same key, and its output exists; else None."""
        earlier = self._before.get(row.id)
        if not earlier or earlier.status != "done" or earlier.key != row.key:
            return None
        if not output_exists(self._folder, earlier, self._verify):
            return None
        return replace(row, **{name: getattr(earlier, name) for name in _KEPT_OF_DONE})

    def decide(self, rows: Mapping[str, Row], items: Sequence[Item]) -> PairDecision:
        """Look up all keys of items that were not done before; write into their rows which are done or failed, and why.

        Results that the store holds are exported. Damaged artifacts, and failures that are tried again, are cancelled.
        """
        looked_up = self._store.find({work.key for item in items for work in self._graph.works(item).values()})
        known = looked_up.artifacts
        if self._verify:
            known = self._verified(known)
        if not self._dry:
            earlier = [self._before[item.id] for item in items if item.id in self._before]
            clear_outputs(self._folder, [row for row in earlier if self._has_result(rows[row.id], known)], self._store)
        left: list[Item] = []
        for item in items:
            row = rows[item.id]
            if not self._finish(row, known):
                left.append(item)
                continue
            limits = notes_of(self._graph, self._store, self._graph.works(item), known, {})
            row.note = "; ".join(filter(None, (limits, row.note)))
        pending = self._select_pending(rows, left, known)
        gone = {key: "damaged" if kind == "void" else kind for key, kind in looked_up.cancelled.items()}
        return PairDecision(pending, known, gone | dict.fromkeys(self._damaged, "damaged"))

    def _has_result(self, row: Row, known: Mapping[str, Artifact]) -> bool:
        """Return whether the index says that an earlier or another run computed the row's result."""
        return row.key in known and not known[row.key].failed

    def _finish(self, row: Row, known: dict[str, Artifact]) -> bool:
        """Return whether an earlier or another run computed the row's result; its picture, missing here, is copied from the store."""
        if not self._has_result(row, known):
            return False
        artifact = known[row.key]
        try:
            if self._dry:
                self._store.read_bytes(artifact, RESULT)
                row.status = "done"
            else:
                export(self._folder, self._store, row, artifact)
        except Damaged as damaged:
            self._cancel(damaged)
            del known[row.key]
            return False
        return True

    def _verified(self, known: dict[str, Artifact]) -> dict[str, Artifact]:
        """Return the artifacts whose payloads all match their digests."""
        whole = {}
        for key, artifact in known.items():
            try:
                for output in artifact.payloads:
                    self._store.read(artifact, output)
                whole[key] = artifact
            except Damaged as damaged:
                self._cancel(damaged)
        return whole

    def _cancel(self, damaged: Damaged) -> None:
        self._damaged.add(damaged.artifact.key)
        if not self._dry:
            print(f"e4s: {damaged}; computing it again", file=sys.stderr)
            self._store.cancel_damaged(damaged)

    def _select_pending(self, rows: Mapping[str, Row], items: Sequence[Item], known: dict[str, Artifact]) -> list[Item]:
        """Return the items that are tried: neither in quarantine nor known to fail on this very input, unless `retry` says so.

        The failure of an item that is tried all the same is cancelled, in `known` and in the store. The rows of the others say why not.
        """
        for item in items:
            self._attempts.look_up(rows[item.id])
        quarantined = [rows[item.id] for item in items if rows[item.id].quarantined]
        released = quarantined if "quarantined" in self._retry else []
        self._attempts.release(released)
        retried = {row.id for row in released}
        if "failed" in self._retry:
            retried |= {item.id for item in items if not rows[item.id].quarantined}
        pending: list[Item] = []
        cancelled: dict[str, Artifact] = {}
        for item in items:
            row = rows[item.id]
            if row.quarantined:
                continue
            works = self._graph.works(item)
            failed = {work.key: known[work.key] for work in works.values() if work.key in known and known[work.key].failed}
            if failed and item.id not in retried:
                row.stage, row.reason = failure(item, works, {key: (found.stage, found.reason) for key, found in failed.items()})
                row.status = "failed"
            else:
                pending.append(item)
                cancelled |= failed
        for key in cancelled:
            del known[key]
        if not self._dry:
            self._store.void(*cancelled.values())
        return pending


class VideoResume:
    """Decides for the videos of one plan."""

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        folder: VideoRunFolder,
        attempts: Attempts,
        before: Mapping[str, VideoRow],
        previous: Mapping[str, Any],
        *,
        retry: Collection[str],
        verify: bool,
        dry: bool,
    ) -> None:
        self._recipe, self._store, self._folder, self._attempts = recipe, store, folder, attempts
        self._before, self._previous = before, previous
        self._retry, self._verify, self._dry = retry, verify, dry

    def decide(self, rows: dict[str, VideoRow]) -> VideoDecision:
        """Write into rows which are done or failed, and why; a row with a reason has an input that cannot be read.

        Failures that are tried again are cancelled.
        """
        unreadable = [row for row in rows.values() if row.reason]
        for row in unreadable:
            row.status = "failed"
        retried: set[str] = set()
        tried: list[str] = []
        for row in [row for row in rows.values() if not row.reason]:
            if done := self._done_before(row):
                rows[row.id] = done
                continue
            self._attempts.look_up(row)
            if row.quarantined and "quarantined" in self._retry:
                self._attempts.release([row])
                retried.add(row.id)
            if not row.quarantined:
                tried.append(row.id)
                retried |= {row.id} if "failed" in self._retry else set()
        self._attempts.unreadable(unreadable)
        known = self._set_known_failures_aside([rows[video] for video in tried], retried)
        return VideoDecision([video for video in tried if rows[video].status == "left"], retried, known)

    def _done_before(self, row: VideoRow) -> VideoRow | None:
        """Return a row as the run before left it if that is done, under the same key, and its files exist; else None.

        The time that was spent under the same key counts on.
        """
        earlier = self._before.get(row.id)
        if not earlier or earlier.key != row.key:
            return None
        row.seconds = earlier.seconds
        if earlier.status != "done" or not output_exists(self._folder, earlier, self._verify):
            return None
        if not self._folder.frames_file(row.id).exists():
            return None
        return replace(earlier, source=row.source, video=row.video, face=row.face)

    def _set_known_failures_aside(self, rows: Sequence[VideoRow], retried: Collection[str]) -> set[str]:
        """Let rows fail whose failure the store remembers; of those in `retried` it is cancelled.

        Return the keys of all that the store holds of these videos.
        """
        lookup = VideoLookup(self._recipe, self._store, rows, self._before, self._previous)
        cancelled: dict[str, Artifact] = {}
        for row in rows:
            keys = lookup.videos[row.id]
            failures = lookup.failures(keys)
            if row.id in retried:
                cancelled |= {failed.key: failed for failed in failures}
            elif failures:
                row.status, (row.stage, row.reason) = "failed", lookup.reason(keys, failures[0])
                before = self._before.get(row.id)
                if before and before.key == row.key:
                    row.frames, row.repaired, row.damaged, row.shots = (
                        before.frames,
                        before.repaired,
                        before.damaged,
                        before.shots,
                    )
        if not self._dry:
            self._store.void(*cancelled.values())
        return lookup.found.keys() - cancelled.keys()
