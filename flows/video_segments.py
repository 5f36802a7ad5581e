"""Units that put frames of a video through the stages of a pair: a group of pictures, and the generator's tuning for the whole video."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from e4s_models.regions import INNER_FACE
from flows.execution.jobs import JobReporter
from flows.stages import FRAME_RESULT
from flows.video_recipe import Recipe
from flows.video_units import FAILED, PASSED, SEGMENT_FACTS, SWAPPED, Desk, Stretch, Unit, on_gpu_of, run_stage
from storage.keys import digest, digest_bytes
from storage.store import Artifact
from tasks.graph import Item, Ref
from tasks.runner import ChunkJob, JobResult, Worker, run_chunk
from tasks.stage import Array, ItemError, Outputs, PassingError
from tasks.steady import aligned
from tasks.tune import tune_faces
from tasks.video_pass import Still, put_back, spread_frames
from tasks.video_write import encode_group

if TYPE_CHECKING:
    from tasks.planes import PlanarFrame


@dataclass(frozen=True, kw_only=True)
class Segment(Stretch):
    """One encoded group of pictures; what it writes: see `_Group.encode`."""

    name: ClassVar[str] = "segment"
    facts: ClassVar[Sequence[str]] = SEGMENT_FACTS
    way: Artifact
    source: Mapping[str, Artifact]  # what is known of the source's side
    tuning: Artifact | None = None

    def on_gpu(self, recipe: Recipe) -> bool:
        return on_gpu_of(recipe.graph)

    def make(self, desk: Desk, reporter: JobReporter, result: JobResult) -> Outputs:
        return _Group(desk, self, reporter, result).encode(self.start, self.stop)


@dataclass(frozen=True, kw_only=True)
class Tuning(Unit):
    """The generator fitted to the driven source in a few frames of the video (pivotal tuning; the paper's Appendix B)."""

    name: ClassVar[str] = "tuning"
    table: Artifact
    way: Artifact
    source: Mapping[str, Artifact]  # what is known of the source's side

    def on_gpu(self, recipe: Recipe) -> bool:
        return on_gpu_of(recipe.graph)

    def make(self, desk: Desk, reporter: JobReporter, result: JobResult) -> Outputs:
        return _Faces(desk, self, reporter, result).tune()


class _OnFrames:
    """Frames of one video that go through the stages."""

    def __init__(self, desk: Desk, unit: Segment | Tuning, worker: Worker, reporter: JobReporter, result: JobResult) -> None:
        self.desk, self.unit, self.worker, self.reporter, self.result = desk, unit, worker, reporter, result
        self.recipe, self.graph = desk.recipe, desk.recipe.graph
        self.table, self.way = desk.tables.table(unit.table), desk.tables.way(unit.way)
        self.playhead = desk.playhead(unit.row, self.table)
        self.source = dict(unit.source)
        self.tuning: tuple[str, Outputs] | None = None  # key and values
        self.begun, self.all = 0, 1  # frames that were begun, and of all

    def look(self, start: int, stop: int) -> None:
        """Find out what is known of frames without the graph."""
        steady = self.desk.steady(self.unit.way, self.way)
        self.known = steady.group(start, stop, lambda first, last: self.watched(self.playhead.frames(first, last)))
        for node, (count, seconds) in steady.spent.items():
            self.result.count(node, count, seconds)

    def watched(self, frames: Iterable[PlanarFrame]) -> Iterator[PlanarFrame]:
        for frame in frames:
            self.reporter.progress(self.begun / self.all)
            yield frame

    def stills(self, start: int, stop: int) -> list[Still]:
        return [Still(self.unit.row.video, planes) for planes in self.watched(self.playhead.frames(start, stop))]

    def items(self, stills: Sequence[Still], start: int) -> tuple[dict[int, Item], dict[str, Outputs]]:
        """Frames with the face as items of the graph; what is known of them without it, by key."""
        items: dict[int, Item] = {}
        given: dict[str, Outputs] = {}
        for frame, still in enumerate(stills, start):
            if frame in self.known:
                crop = aligned(still.rgb, self.way.crops, frame, self.graph.configs["align"].side)
                known: dict[Ref, Outputs] = {(node, "target"): value for node, value in self.known[frame].items()}
                known["align", "target"] = crop
                decided = {place: _digest(outputs) for place, outputs in known.items()}
                if self.tuning:
                    decided["tune", ""], known["tune", ""] = self.tuning
                items[frame] = self.recipe.item(self.unit.row, frame, self.table.frame_id(frame), decided)
                works = self.graph.works(items[frame])
                given |= {works[place].key: outputs for place, outputs in known.items()}
        return items, given

    def carry(
        self, items: Mapping[int, Item], given: Mapping[str, Outputs], stills: Sequence[Still], start: int
    ) -> tuple[dict[str, Outputs], JobResult]:
        """What the worker's final nodes made, by key, and what became of the items. Raises PassingError for a lack of memory or a file."""
        worker, made = self.worker, dict[str, Outputs]()
        worker.opened = {item.images["target"].sha256: stills[frame - start] for frame, item in items.items()}
        worker.given, worker.sink = given, made.__setitem__
        done, share = self.begun / self.all, len(stills) / self.all
        worker.notify = lambda part: self.reporter.progress(done + share * part)
        # What is found damaged of the source's side is made again, and published whatever the retention.
        job = ChunkJob(start, list(items.values()), self._artifacts(list(items.values())), shared=frozenset(self.source))
        try:
            chunk = run_chunk(worker, job, run_stage)
        finally:
            worker.opened, worker.given = {}, {}
        again = {artifact.key: artifact for artifact in chunk.artifacts if artifact.key in self.source}
        self.source |= again
        self.result.artifacts += again.values()
        self.result.include(chunk)
        passing = chunk.failed.keys() - {artifact.key for artifact in (*chunk.artifacts, *job.known.values()) if artifact.failed}
        if passing:
            raise PassingError(chunk.failed[min(passing)][1])
        return made, chunk

    def _artifacts(self, items: Sequence[Item]) -> dict[str, Artifact]:
        if self.worker.keep != "all":
            return self.source
        keys = {work.key for item in items for work in self.graph.works(item).values()}
        self.reporter.uses(keys)
        return self.source | self.desk.store.lookup(keys)


class _Faces(_OnFrames):
    """A few driven faces of a video, which its generator is tuned to."""

    def __init__(self, desk: Desk, unit: Tuning, reporter: JobReporter, result: JobResult) -> None:
        super().__init__(desk, unit, desk.driving_worker, reporter, result)
        tune = self.graph.all_nodes["tune"]
        self._reads = {read: self.graph.wire(tune, read).split(".") for read in self.graph.reads("tune")}  # -> node, output

    def tune(self) -> Outputs:
        """Writes `tuning`, see `tasks.tune.tune_faces`. Raises ItemError where no frame will do."""
        frames = spread_frames(self.way, self.recipe.configs.tuning.frames)
        self.all = len(frames)
        faces: list[dict[str, Array]] = []
        reason = "no inner face was found in it"
        for frame in frames:
            found = self._driven(frame)
            if isinstance(found, str):
                reason = found
            elif np.isin(found["regions"], INNER_FACE).any():
                faces.append(found)
            self.begun += 1
        if not faces:
            raise ItemError(f"the generator could not be tuned, since none of {len(frames)} frames will do: {reason}")
        began = time.perf_counter()
        outputs = tune_faces(self.desk.worker.model("tune"), self.graph.configs["tune"], faces)
        self.result.count("tune", len(faces), time.perf_counter() - began)
        return outputs

    def _driven(self, frame: int) -> dict[str, Array] | str:
        """What the stage `tune` reads of one frame, or why it cannot be had."""
        self.look(frame, frame + 1)
        stills = self.stills(frame, frame + 1)
        items, given = self.items(stills, frame)
        made, chunk = self.carry(items, given, stills, frame)
        works = self.graph.works(items[frame])
        keys = {node: works[node, ""].key for node, _ in self._reads.values()}
        if not made.keys() >= set(keys.values()):
            return chunk.outcomes[0].reason
        return {read: made[keys[node]][output] for read, (node, output) in self._reads.items()}


class _Group(_OnFrames):
    """One group of pictures: decoded, swapped a few frames at a time, encoded as it goes."""

    def __init__(self, desk: Desk, unit: Segment, reporter: JobReporter, result: JobResult) -> None:
        super().__init__(desk, unit, desk.worker, reporter, result)
        self.all = unit.frames
        if unit.tuning:
            self.tuning = unit.tuning.key, desk.tables.tuning(unit.tuning)
        self.state: list[int] = []
        self.reasons: dict[int, tuple[str, str]] = {}

    def encode(self, start: int, stop: int) -> Outputs:
        """Writes `segment` (bytes), `state` (n,) and `reasons` (JSON: frame in the group -> stage, reason), all uint8."""
        self.look(start, stop)
        data = encode_group(self.table, start, self._frames(start, stop), self.recipe.configs.output)
        return {
            "segment": np.frombuffer(data, np.uint8),
            "state": np.array(self.state, np.uint8),
            "reasons": np.frombuffer(json.dumps({str(frame - start): reason for frame, reason in self.reasons.items()}).encode(), np.uint8),
        }

    def _frames(self, start: int, stop: int) -> Iterator[PlanarFrame]:
        size = self.desk.chunk
        for first in range(start, stop, size):
            yield from self._swapped(first, min(first + size, stop))

    def _swapped(self, start: int, stop: int) -> Iterator[PlanarFrame]:
        """Frames of one chunk, swapped where that works."""
        stills = self.stills(start, stop)
        items, given = self.items(stills, start)
        swapped = self._run(items, given, stills, start) if items else {}
        self.begun += len(stills)
        for frame, still in enumerate(stills, start):
            if frame not in items:
                self.state.append(PASSED)
                yield still.planes
            elif isinstance(outcome := swapped[frame], tuple):
                self.state.append(FAILED)
                self.reasons[frame] = outcome
                yield still.planes
            else:
                self.state.append(SWAPPED)
                crop_to_frame = self.way.crops.crop_to_frame(frame, self.graph.configs["align"].side)
                yield put_back(still, outcome["inpainted"], outcome["mask"], crop_to_frame, self.recipe.configs.paste)

    def _run(
        self, items: Mapping[int, Item], given: Mapping[str, Outputs], stills: Sequence[Still], start: int
    ) -> dict[int, Outputs | tuple[str, str]]:
        """Frame -> what the last stage made of it, or stage and reason of its failure."""
        made, chunk = self.carry(items, given, stills, start)
        found: dict[int, Outputs | tuple[str, str]] = {}
        for (frame, item), outcome in zip(items.items(), chunk.outcomes, strict=True):
            key = self.graph.works(item)[FRAME_RESULT[0], ""].key
            if key in made:
                found[frame] = made[key]
            elif outcome.artifact:
                found[frame] = {name: self.desk.store.read(outcome.artifact, name) for name in ("inpainted", "mask")}
            else:
                found[frame] = outcome.stage, outcome.reason
        return found


def _digest(outputs: Outputs) -> str:
    """What decides the values that a node is said to have written."""
    return digest([[name, list(value.shape), digest_bytes(value.tobytes())] for name, value in sorted(outputs.items())])
