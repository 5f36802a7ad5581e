"""Units of work on a video: plain data that any process can carry, in the planning process or on a Dask worker.

A unit names what it reads by artifacts and what it makes by a key. Whoever carries it publishes the artifact; small facts go back. What a
process keeps between units (models, open videos, tables) is its `Desk`; nothing of that decides bytes.
"""

from __future__ import annotations

import io
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import numpy as np
import pyarrow.parquet as pq

from e4s_models.weights import WeightsError
from flows.execution.jobs import JobReporter
from flows.video_recipe import Recipe
from storage.parquet import read_parquet
from storage.store import Artifact, Damaged, Finished, Store, StoreError
from storage.video_run import VideoRow
from tasks.frame import ImageFile, hash_file
from tasks.graph import Graph, Item, UsageError
from tasks.runner import ChunkJob, DiskFull, JobResult, Keep, ProgramError, Worker, raise_if_full, run_chunk
from tasks.stage import Array, ItemError, Outputs, PassingError
from tasks.steady import Steady
from tasks.video_pass import (
    ID_NETWORK,
    Way,
    detect_range,
    identify,
    reference_identity,
    track_person,
)

if TYPE_CHECKING:
    from e4s_models.id_networks import IdNetwork
    from e4s_models.video_faces import VideoFaceDetector
    from tasks.planes import PlanarFrame
    from tasks.track import Faces, Track
    from tasks.video import FrameTable, Playhead

PASSED, SWAPPED, FAILED = 0, 1, 2
SEGMENT_FACTS = ("state", "reasons")
HELD = 4  # tables and courses that a process keeps
OPEN = 2  # videos that it keeps open

Thing = TypeVar("Thing")


class Tables:
    """Frame tables and courses as they are in the store, those of the last few videos."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._held: dict[str, Any] = {}

    def table(self, artifact: Artifact) -> FrameTable:
        """Raises Damaged."""
        from tasks.video import FrameTable

        return self._get(artifact, lambda outputs: FrameTable.from_arrow(read_parquet(outputs["table"].tobytes())))

    def way(self, artifact: Artifact) -> Way:
        """Raises Damaged."""
        return self._get(artifact, Way.of)

    def tuning(self, artifact: Artifact) -> Outputs:
        """Raises Damaged."""
        return self._get(artifact, dict)

    def _get(self, artifact: Artifact, make: Callable[[Mapping[str, Array]], Thing]) -> Thing:
        found = self._held.pop(artifact.key, None)
        if found is None:
            found = make(read_all(self.store, artifact))
        self._held[artifact.key] = found
        if len(self._held) > HELD:
            del self._held[next(iter(self._held))]
        return cast(Thing, found)


def read_all(store: Store, artifact: Artifact) -> dict[str, Array]:
    """Every output of an artifact. Raises Damaged."""
    return {name: store.read(artifact, name) for name in artifact.payloads}


class Desk:
    """What one process keeps between units: models, loaded once, open videos, tables. A `JobRunner`."""

    def __init__(self, recipe: Recipe, tables: Tables, *, keep: Keep, chunk: int, max_pixels: int, at_once: int) -> None:
        self.recipe, self.tables, self.store = recipe, tables, tables.store
        self.chunk, self.max_pixels = chunk, max_pixels
        self.source_worker = Worker(recipe.source_graph(), self.store, "all", at_once)
        self.worker = Worker(recipe.graph, self.store, keep, at_once)
        self._open: dict[str, Playhead] = {}
        self._steady: dict[str, Steady] = {}

    @cached_property
    def detector(self) -> VideoFaceDetector:
        from e4s_models.video_faces import VideoFaceDetector

        return cast("VideoFaceDetector", VideoFaceDetector.load())

    @cached_property
    def id_network(self) -> IdNetwork:
        from e4s_models.id_networks import ID_NETWORKS

        return ID_NETWORKS[ID_NETWORK]("cpu")

    @cached_property
    def driving_worker(self) -> Worker:
        """For what the generator is tuned to."""
        graph = self.recipe.graph
        wanted = [(node, "") for node in graph.producers("tune")]
        driving = Graph(graph.all_nodes.values(), graph.final, graph.settings, wanted=wanted)
        return Worker(driving, self.store, "final", self.worker.at_once)

    def playhead(self, row: VideoRow, table: FrameTable) -> Playhead:
        """The open video. Every frame that is read is compared with the table, so it is the same video that was probed."""
        from tasks.video import Playhead

        found = self._open.pop(row.video, None) or Playhead(row.video, table)
        self._open[row.video] = found
        if len(self._open) > OPEN:
            self._open.pop(next(iter(self._open))).close()
        return found

    def steady(self, artifact: Artifact, way: Way) -> Steady:
        """What is known of the frames along a course: the last one's is kept, so that groups in order look at nothing twice."""
        if artifact.key not in self._steady:
            self._steady = {artifact.key: Steady(self.worker, way, self.recipe.configs.smooth)}
        return self._steady[artifact.key]

    def prefetch(self, payload: Unit) -> None:
        """Do nothing: frames are decoded as a unit goes on."""

    def run(self, payload: Unit, reporter: JobReporter) -> JobResult:
        """Run a unit. Raises DiskFull, StoreError, and what ends a run with a sentence."""
        result = outcome_of(payload.name, self.store.url, lambda result: payload.run(self, reporter, result))
        if reporter.worker:
            result.places = dict.fromkeys(result.computed, reporter.worker)
        if not result.succeeded:  # maybe in the middle of a video
            self._put_away()
        return result

    def _put_away(self) -> None:
        self._steady.clear()
        while self._open:
            self._open.popitem()[1].close()

    def close(self) -> None:
        self._put_away()
        self.source_worker.close()
        self.worker.close()
        if "driving_worker" in vars(self):
            self.driving_worker.close()


def outcome_of(name: str, where: str, work: Callable[[JobResult], None]) -> JobResult:
    """Do a piece of work and return what came of it.

    Raises what is no fault of the program and no item's: DiskFull (`where` is full, if nothing else is known), StoreError, UsageError and
    WeightsError.
    """
    result, began = JobResult(), time.perf_counter()
    try:
        work(result)
    except Damaged as damaged:
        result.damaged = damaged.artifact, str(damaged)
        for numbers in (result.computed, result.seconds):
            numbers.pop(name, None)  # it is tried again, when that was made again
    except ItemError as error:
        result.stage, result.reason = result.stage or name, str(error)
    except (DiskFull, StoreError, UsageError, WeightsError):
        raise
    except ProgramError as error:
        result.crash = str(error)
    except OSError as error:
        raise_if_full(error, where)
        result.crash = traceback.format_exc()
    except Exception:
        result.crash = traceback.format_exc()
    result.spent = time.perf_counter() - began
    if name in result.computed:
        result.seconds[name] = result.spent - sum(seconds for node, seconds in result.seconds.items() if node != name)
    return result


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What one process does in one go, to make the artifact of one key."""

    name: ClassVar[str]
    facts: ClassVar[Sequence[str]] = ()  # outputs that go back
    number: int  # of the unit, in this execution
    row: VideoRow
    key: str
    again: bool = False  # a worker that had it was lost: it may be finished

    @property
    def part(self) -> str:
        """Of the video, for people."""
        return self.row.id

    @property
    def frames(self) -> int:
        """How many frames it works on, where progress tells of that."""
        return 0

    @property
    def keys(self) -> Collection[str]:
        """Of all that it makes."""
        return (self.key,)

    def on_gpu(self, recipe: Recipe) -> bool:
        """Whether it needs a GPU."""
        return False

    def for_retry(self) -> Unit:
        """Return the unit for another worker, after one that had it was lost."""
        return replace(self, again=True)

    def run(self, desk: Desk, reporter: JobReporter, result: JobResult) -> None:
        """Make the artifact and publish it, or its failure, which follows from the files. Raises ItemError."""
        if self.again and (there := desk.store.lookup([self.key]).get(self.key)):
            result.artifacts.append(there)
            result.stage, result.reason = (there.stage, there.reason) if there.failed else ("", "")
            return
        result.count(self.name, 1, 0.0)
        try:
            outputs = self.make(desk, reporter, result)
        except PassingError:
            raise
        except ItemError as error:
            if hash_file(self.row.video) != self.row.video_sha256:
                raise PassingError(changed(self.row.video)) from None
            result.artifacts += desk.store.publish([Finished(self.key, self.name, reason=str(error))])
            raise
        values = {name: ("array", value) for name, value in outputs.items()}
        result.artifacts += desk.store.publish([Finished(self.key, self.name, cast(Any, values))])
        result.facts = {name: value for name, value in outputs.items() if name in self.facts}

    def make(self, desk: Desk, reporter: JobReporter, result: JobResult) -> Outputs:
        """The values. Raises ItemError, PassingError or Damaged."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Probing(Unit):
    """The frame table of a video."""

    name: ClassVar[str] = "probe"

    def make(self, desk: Desk, reporter: JobReporter, result: JobResult) -> Outputs:
        from tasks.video import probe

        table = probe(self.row.video, desk.recipe.configs.probe)
        if table.sha256 != self.row.video_sha256:
            raise PassingError(changed(self.row.video))
        buffer = io.BytesIO()
        pq.write_table(table.to_arrow(), buffer)
        return {"table": np.frombuffer(buffer.getvalue(), np.uint8)}


@dataclass(frozen=True, kw_only=True)
class Sounding(Unit):
    """Sound tracks that the output's container does not take, as AAC."""

    name: ClassVar[str] = "sound"
    table: Artifact
    tracks: Sequence[int]  # indices

    def make(self, desk: Desk, reporter: JobReporter, result: JobResult) -> Outputs:
        from tasks.video_sound import convert_sound

        table = desk.tables.table(self.table)
        sound = convert_sound(self.row.video, table, [track for track in table.tracks if track.index in self.tracks])
        return {"sound": np.frombuffer(sound.data, np.uint8)}


def changed(path: str) -> str:
    return f"{path} was changed while running: leave the inputs alone during a run and start it again."


@dataclass(frozen=True, kw_only=True)
class SourceSide(Unit):
    """What the stages make of the source alone."""

    name: ClassVar[str] = "source"
    source: Mapping[str, Artifact]  # what is known of it
    made: Collection[str]  # keys

    @property
    def keys(self) -> Collection[str]:
        return self.made

    def on_gpu(self, recipe: Recipe) -> bool:
        return on_gpu_of(recipe.source_graph())

    def run(self, desk: Desk, reporter: JobReporter, result: JobResult) -> None:
        known = {**self.source, **(desk.store.lookup(self.made) if self.again else {})}
        desk.source_worker.notify = reporter.progress
        chunk = run_chunk(desk.source_worker, ChunkJob(self.number, [source_item(desk.recipe, self.row)], known), run_stage)
        result.artifacts += chunk.artifacts
        result.include(chunk)
        (outcome,) = chunk.outcomes
        result.stage, result.reason = outcome.stage, outcome.reason


def source_item(recipe: Recipe, row: VideoRow) -> Item:
    """The source of a video, alone."""
    return Item(f"source of {row.id}", {"source": recipe.source(row)})


@dataclass(frozen=True, kw_only=True)
class Stretch(Unit):
    """On frames [start, stop)."""

    table: Artifact
    start: int
    stop: int

    @property
    def part(self) -> str:
        return f"{self.row.id} frames {self.start}-{self.stop - 1}"

    @property
    def frames(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Detecting(Stretch):
    """Faces of a stretch of frames."""

    name: ClassVar[str] = "detect"

    def make(self, desk: Desk, reporter: JobReporter, result: JobResult) -> Outputs:
        table = desk.tables.table(self.table)
        frames = desk.playhead(self.row, table).frames(self.start, min(self.stop + 1, len(table)))
        return detect_range(desk.detector, _counted(frames, reporter, self.frames), self.start, self.stop)


@dataclass(frozen=True, kw_only=True)
class Tracking(Unit):
    """One person's course through the video."""

    name: ClassVar[str] = "track"
    table: Artifact
    detected: Sequence[str]  # keys

    def make(self, desk: Desk, reporter: JobReporter, result: JobResult) -> Outputs:
        row, recipe = self.row, desk.recipe
        table = desk.tables.table(self.table)
        found = desk.store.lookup(self.detected)
        parts = [read_all(desk.store, found[key]) for key in self.detected]
        configs, min_face = recipe.configs, recipe.graph.configs["align"].min_face
        who: Any = int(row.face) if row.face.isdecimal() else None
        if who is None:
            picture = ImageFile(row.face, row.face_sha256, desk.max_pixels).read().rgb8
            who = reference_identity(desk.id_network, desk.detector, picture, min_face)

        def features(faces: Faces, tracks: Sequence[Track]) -> list[Track]:
            return identify(desk.id_network, desk.playhead(row, table), faces, tracks, configs.track)

        return track_person(parts, len(table), who, configs.track, configs.smooth, min_face, features)


def on_gpu_of(graph: Graph) -> bool:
    return any(graph.device(node.name) != "cpu" for node in graph.nodes)


def _counted(frames: Iterable[PlanarFrame], reporter: JobReporter, count: int) -> Iterator[PlanarFrame]:
    for number, frame in enumerate(frames):
        reporter.progress(number / count)
        yield frame


def run_stage(node: str, work: Callable[[], None]) -> None:
    """Run a stage on frames: no step of its own, the unit is one."""
    work()
