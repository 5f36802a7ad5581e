"""What the store holds of the videos of a plan, pass by pass. Nothing is decoded and nothing is written.

The keys of a pass follow from what earlier passes made: how many frames there are says the frame table, where the face is says the course.
So they are known as far as those artifacts are there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flows.video_recipe import Recipe
from storage.parquet import open_parquet
from storage.store import Artifact, Damaged, Store
from storage.video_run import VideoRow
from tasks.graph import Item, Ref, Work, needed
from tasks.runner import failure
from tasks.stage import Array
from tasks.video_pass import Way, detect_ranges
from tasks.video_write import chunk_ranges


@dataclass
class VideoKeys:
    """The keys of one video's passes, as far as they are known."""

    probe: str
    item: Item  # the source alone
    source: Mapping[Ref, Work]  # its side, producers first
    finals: Collection[str]  # keys of what the frames read of it
    detect: list[str] | None = None  # None: how many there are is known when the video is probed
    track: str | None = None
    tuning: str | None = None  # "" where nothing is tuned
    segments: list[str] | None = None  # None: they are known when the course is; none where no face was found


class VideoLookup:
    """Looks up the passes of some videos of a plan: one scan of the index for each step behind which more keys are known."""

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        rows: Iterable[VideoRow],
        before: Mapping[str, VideoRow],
        previous: Mapping[str, Any],
    ) -> None:
        """Look up all passes of `rows`. `before`, `previous`: rows and run.json as the run before left them."""
        self._recipe, self._store, self._before, self._previous = recipe, store, before, previous
        self.found: dict[str, Artifact] = {}  # finished or failed
        self.gone: dict[str, str] = {}  # key -> why an artifact that was finished is there no more: damaged, pruned
        graph, self.videos = recipe.source_graph(), dict[str, VideoKeys]()
        rows = list(rows)
        for row in rows:
            item = Item(f"source of {row.id}", {"source": recipe.source(row)})
            works = graph.works(item)
            self.videos[row.id] = VideoKeys(recipe.probe_key(row), item, works, [works[place].key for place in graph.wanted])
        self._look_up(key for keys in self.videos.values() for key in (keys.probe, *(work.key for work in keys.source.values())))
        for row in rows:
            frames, keys = self._frames(row), self.videos[row.id]
            if frames is not None:
                keys.detect = [recipe.detect_key(row, start, stop) for start, stop in detect_ranges(frames)]
                keys.track = recipe.track_key(row, keys.detect)
                keys.tuning = recipe.tuning_key(row, keys.track)
        tracked = [keys for keys in self.videos.values() if keys.track]
        self._look_up(key for keys in tracked for key in (*(keys.detect or ()), keys.track, keys.tuning) if key)
        for row in rows:
            keys = self.videos[row.id]
            if keys.track and (made := self._read(keys.track)):
                way, ranges = Way.of(made), chunk_ranges(len(made["state"]), 1, recipe.configs.output)
                tuning, there = keys.tuning or "", way.with_face.any()
                keys.segments = [recipe.segment_key(row, start, stop, way, tuning) for start, stop in ranges] if there else []
                keys.tuning = tuning if there else ""
        self._look_up(key for keys in self.videos.values() for key in keys.segments or ())

    def is_there(self, key: str) -> bool:
        """Whether it is finished."""
        return key in self.found and not self.found[key].failed

    def source_left(self, keys: VideoKeys) -> list[Work]:
        """Work on the source that is to be done."""
        works = {work.key: work for work in keys.source.values()}
        return needed(works, keys.finals, {key for key in works if self.is_there(key)})

    def failures(self, keys: VideoKeys) -> list[Artifact]:
        """Return the remembered failures of a video, the first that a run would meet first."""
        passes = [keys.probe, *(work.key for work in keys.source.values()), *(keys.detect or ())]
        passes += [*(key for key in (keys.track, keys.tuning) if key), *(keys.segments or ())]
        return [self.found[key] for key in passes if key in self.found and self.found[key].failed]

    def reason(self, keys: VideoKeys, failed: Artifact) -> tuple[str, str]:
        """Stage and reason of a remembered failure."""
        of_source = failure(keys.item, keys.source, {failed.key: (failed.stage, failed.reason)})
        return of_source if of_source[0] else (failed.stage, failed.reason)

    def _look_up(self, keys: Iterable[str]) -> None:
        if wanted := set(keys):
            found = self._store.find(wanted)
            self.found |= found.artifacts
            self.gone |= {key: "damaged" if kind == "void" else kind for key, kind in found.cancelled.items()}

    def _frames(self, row: VideoRow) -> int | None:
        """How many frames the video has: by its frame table, or by the row that the run before left of the same video."""
        if made := self._read(self.videos[row.id].probe):
            return int(open_parquet(made["table"].tobytes()).metadata.num_rows)
        before, prints = self._before.get(row.id), self._previous.get("videos", {}).get("prints", {})
        same = before and before.video_sha256 == row.video_sha256 and prints.get("probe") == self._recipe.prints["probe"]
        return before.frames if before and same and before.frames else None

    def _read(self, key: str) -> dict[str, Array] | None:
        """The values under a key; None if it is not finished, or damaged."""
        if not self.is_there(key):
            return None
        try:
            return {name: self._store.read(self.found[key], name) for name in self.found[key].payloads}
        except Damaged:
            del self.found[key]
            self.gone[key] = "damaged"
            return None
