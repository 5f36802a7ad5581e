"""What the store holds of the videos of a plan, pass by pass. Nothing is decoded and nothing is written.

The keys of a pass follow from what earlier passes made: how many frames there are says the frame table, where the face is says the course.
So they are known as far as those artifacts are there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.parquet import open_parquet
from storage.store import Artifact, Damaged
from tasks.graph import Item, Ref, Work, needed
from tasks.runner import failure
from tasks.stage import Array
from tasks.video_pass import Way, detect_ranges
from tasks.video_write import chunk_ranges

if TYPE_CHECKING:
    from flows.video_plan import VideoPlan
    from storage.video_run import VideoRow


@dataclass
class Stand:
    """The keys of one video's passes, as far as they are known."""

    probe: str
    item: Item  # the source alone
    source: Mapping[Ref, Work]  # its side, producers first
    finals: Collection[str]  # keys of what the frames read of it
    detect: list[str] | None = None  # None: how many there are is known when the video is probed
    track: str | None = None
    tuning: str | None = None  # "" where nothing is tuned
    segments: list[str] | None = None  # None: they are known when the course is; none where no face was found


class Survey:
    """Looks up the passes of some videos of a plan: one scan of the index for each step behind which more keys are known."""

    def __init__(self, plan: VideoPlan, rows: Iterable[VideoRow]) -> None:
        self._plan = plan
        self.found: dict[str, Artifact] = {}  # finished or failed
        self.gone: dict[str, str] = {}  # key -> why an artifact that was finished is there no more: damaged, pruned
        graph, self.stands = plan.source_graph(), dict[str, Stand]()
        rows = list(rows)
        for row in rows:
            item = Item(f"source of {row.id}", {"source": plan.source(row)})
            works = graph.works(item)
            self.stands[row.id] = Stand(plan.probe_key(row), item, works, [works[place].key for place in graph.wanted])
        self._look_up(key for stand in self.stands.values() for key in (stand.probe, *(work.key for work in stand.source.values())))
        for row in rows:
            frames, stand = self._frames(row), self.stands[row.id]
            if frames is not None:
                stand.detect = [plan.detect_key(row, start, stop) for start, stop in detect_ranges(frames)]
                stand.track = plan.track_key(row, stand.detect)
                stand.tuning = plan.tuning_key(row, stand.track)
        tracked = [stand for stand in self.stands.values() if stand.track]
        self._look_up(key for stand in tracked for key in (*(stand.detect or ()), stand.track, stand.tuning) if key)
        for row in rows:
            stand = self.stands[row.id]
            if stand.track and (made := self._read(stand.track)):
                way, ranges = Way.of(made), chunk_ranges(len(made["state"]), 1, plan.configs.output)
                tuning, there = stand.tuning or "", way.with_face.any()
                stand.segments = [plan.segment_key(row, start, stop, way, tuning) for start, stop in ranges] if there else []
                stand.tuning = tuning if there else ""
        self._look_up(key for stand in self.stands.values() for key in stand.segments or ())

    def is_there(self, key: str) -> bool:
        """Whether it is finished."""
        return key in self.found and not self.found[key].failed

    def source_left(self, stand: Stand) -> list[Work]:
        """Work on the source that is to be done."""
        works = {work.key: work for work in stand.source.values()}
        return needed(works, stand.finals, {key for key in works if self.is_there(key)})

    def failures(self, stand: Stand) -> list[Artifact]:
        """The remembered failures of a video, the first that a run would meet first."""
        keys = [stand.probe, *(work.key for work in stand.source.values()), *(stand.detect or ())]
        keys += [*(key for key in (stand.track, stand.tuning) if key), *(stand.segments or ())]
        return [self.found[key] for key in keys if key in self.found and self.found[key].failed]

    def reason(self, stand: Stand, failed: Artifact) -> tuple[str, str]:
        """Stage and reason of a remembered failure."""
        of_source = failure(stand.item, stand.source, {failed.key: (failed.stage, failed.reason)})
        return of_source if of_source[0] else (failed.stage, failed.reason)

    def _look_up(self, keys: Iterable[str]) -> None:
        if wanted := set(keys):
            found = self._plan.store.find(wanted)
            self.found |= found.artifacts
            self.gone |= {key: "damaged" if kind == "void" else kind for key, kind in found.cancelled.items()}

    def _frames(self, row: VideoRow) -> int | None:
        """How many frames the video has: by its frame table, or by the row that the run before left of the same video."""
        if made := self._read(self.stands[row.id].probe):
            return int(open_parquet(made["table"].tobytes()).metadata.num_rows)
        before, prints = self._plan.before.get(row.id), self._plan.previous.get("videos", {}).get("prints", {})
        same = before and before.video_sha256 == row.video_sha256 and prints.get("probe") == self._plan.prints["probe"]
        return before.frames if before and same and before.frames else None

    def _read(self, key: str) -> dict[str, Array] | None:
        """The values under a key; None if it is not finished, or damaged."""
        if not self.is_there(key):
            return None
        try:
            return {name: self._plan.store.read(self.found[key], name) for name in self.found[key].payloads}
        except Damaged:
            del self.found[key]
            self.gone[key] = "damaged"
            return None


def set_known_failures_aside(plan: VideoPlan) -> set[str]:
    """Take videos out of a plan whose failure the store remembers; those in `plan.again` are tried: their failures are cancelled.

    Returns the keys of all that the store holds of the plan's videos that are not done.
    """
    survey = Survey(plan, [plan.rows[video] for video in plan.todo])
    cancelled: dict[str, Artifact] = {}
    for video in list(plan.todo):
        row, stand = plan.rows[video], survey.stands[video]
        failures = survey.failures(stand)
        if video in plan.again:
            cancelled |= {failed.key: failed for failed in failures}
        elif failures:
            row.status, (row.stage, row.reason) = "failed", survey.reason(stand, failures[0])
            before = plan.before.get(video)
            if before and before.key == row.key:
                row.frames, row.repaired, row.damaged, row.shots = before.frames, before.repaired, before.damaged, before.shots
    plan.todo = [video for video in plan.todo if plan.rows[video].status == "left"]
    if not plan.dry:
        plan.store.void(*cancelled.values())
    return survey.found.keys() - cancelled.keys()
