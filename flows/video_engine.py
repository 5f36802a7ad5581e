"""Work through a plan of videos, one after the other; knows no Prefect.

A video goes through passes: its frame table; the source's side; the faces of each stretch of frames; one person's course; each group of
pictures, swapped and encoded; and the joined file. What a pass makes is an artifact, so that a killed run goes on behind the last one.
"""

from __future__ import annotations

import errno
import io
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from e4s_models.weights import WeightsError
from flows.engine import CRASHES_IN_A_ROW, THIS_PROCESS, Summary, require_weights, use_threads
from flows.video_plan import FRAME_RESULT, VideoPlan
from storage.faults import fault_point
from storage.keys import digest, digest_bytes
from storage.store import Artifact, Damaged, Finished, StoreError
from storage.video_run import FRAME_SCHEMA, VideoRow
from tasks.frame import ImageFile, hash_file
from tasks.graph import Item, UsageError
from tasks.runner import ChunkJob, ChunkResult, DiskFull, Worker, run_chunk
from tasks.stage import Array, ItemError, Outputs, PassingError
from tasks.steady import Known, Steady, aligned
from tasks.video_pass import (
    ID_NETWORK,
    Still,
    Way,
    detect_range,
    detect_ranges,
    identify,
    put_back,
    reference_identity,
    time_of,
    track_person,
)
from tasks.video_write import chunk_ranges, encode_group, join, remux

if TYPE_CHECKING:
    from e4s_models.id_networks import IdNetwork
    from e4s_models.video_faces import VideoFaceDetector
    from tasks.planes import PlanarFrame
    from tasks.track import Faces, Track
    from tasks.video import FrameTable, Playhead

PASSED, SWAPPED, FAILED = 0, 1, 2
_STATUS = ("passed", "swapped", "failed")

Made = TypeVar("Made")

VideoCall = Callable[[str, str, Callable[[], None]], None]
"""Runs one pass on one part of a video: (id and part, name of the pass, the work). A flow hangs its task policy here."""

Frames = Callable[[int, int], None]
"""Told how many of how many frames went through."""


def direct_call(part: str, name: str, work: Callable[[], None]) -> None:
    """Run the work on the spot."""
    work()


class StepFailed(Exception):
    """A video cannot be done: the stage and the sentence."""

    def __init__(self, stage: str, reason: str, remembered: bool = False) -> None:
        super().__init__(reason)
        self.stage, self.reason = stage, reason
        self.remembered = remembered  # known from an earlier attempt: nothing was tried


class ProgramError(Exception):
    """A stage was stopped by a program error: its traceback."""


def execute_videos(plan: VideoPlan, frames: Frames = lambda done, total: None, call: VideoCall = direct_call) -> Summary:
    """Carry out a plan. The manifest is written whatever happens; what is finished stays finished.

    Raises WeightsError before anything is done; UsageError, StoreError, DiskFull and KeyboardInterrupt after the manifest was written.
    """
    if plan.todo:
        require_weights([*plan.graph.weights(), ID_NETWORK])
        use_threads(plan.request.compute_threads())
    summary, folder = Summary(0, 0, 0), plan.folder
    plan.record()
    failed_before = sum(row.status == "failed" for row in plan.rows.values())
    folder.append_log(
        "begin",
        items=len(plan.rows),
        todo=len(plan.todo),
        done=plan.done_before,
        failed=failed_before,
        chunk=1,
        planning_seconds=round(plan.seconds, 3),
    )
    crashes = 0
    try:
        with closing(_Tools(plan)) as tools:
            for number, video in enumerate(plan.todo):
                crashed = _carry_out(plan, number, plan.rows[video], tools, frames, call, summary)
                crashes = crashes + 1 if crashed else 0
                folder.write_rows(plan.rows.values())
                if crashes == CRASHES_IN_A_ROW or (plan.request.fail_fast and plan.rows[video].status == "failed"):
                    break
        fault_point("before-manifest")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = error.filename or plan.store.url
            raise DiskFull(
                f"{where}: no space left on the device; free some and repeat the same command (nothing finished is lost)"
            ) from None
        raise
    finally:
        folder.write_rows(plan.rows.values())
    count = [row.status for row in plan.rows.values()].count
    summary.done, summary.failed, summary.left = count("done"), count("failed"), count("left")
    folder.append_log("end", done=summary.done, failed=summary.failed, left=summary.left)
    return summary


def _carry_out(plan: VideoPlan, number: int, row: VideoRow, tools: _Tools, frames: Frames, call: VideoCall, summary: Summary) -> bool:
    """One video as far as it goes; returns whether a program error stopped it."""
    folder = plan.folder
    work = _Video(plan, number, row, tools, frames, call, summary)
    try:
        with closing(work):
            work.carry_through()
    except StepFailed as failed:
        row.status, row.stage, row.reason = "failed", failed.stage, failed.reason
        if not failed.remembered:
            plan.attempts.add([row])
        folder.append_log("failed", chunk=number, item=row.id, stage=row.stage, reason=row.reason, attempt=row.attempts)
    except (DiskFull, StoreError, UsageError, WeightsError, OSError):
        raise  # no fault of the program: the run stops with the sentence
    except Exception as error:
        summary.crash = str(error) if isinstance(error, ProgramError) else traceback.format_exc()
        folder.append_log("crash", chunk=number, item=row.id, traceback=summary.crash)
        print(f"e4s: video {row.id} was stopped by a program error:\n{summary.crash}", file=sys.stderr)
    folder.append_log("chunk", chunk=number, items=1, done=int(row.status == "done"), failed=int(row.status == "failed"))
    return row.status == "left"


class _Tools:
    """What all videos of a run share: models and the workers of both graphs."""

    def __init__(self, plan: VideoPlan) -> None:
        self.plan = plan
        request = plan.request
        at_once = request.workers or request.compute_threads()
        self.source_worker = Worker(plan.source_graph(), plan.store, "all", at_once)
        self.worker = Worker(plan.graph, plan.store, request.keep, at_once)

    @cached_property
    def detector(self) -> VideoFaceDetector:
        from e4s_models.video_faces import VideoFaceDetector

        return cast("VideoFaceDetector", VideoFaceDetector.load())

    @cached_property
    def id_network(self) -> IdNetwork:
        from e4s_models.id_networks import ID_NETWORKS

        return ID_NETWORKS[ID_NETWORK]("cpu")

    def close(self) -> None:
        self.source_worker.close()
        self.worker.close()


@dataclass
class _Shelf:
    """Artifacts that are made when they are asked for and not there."""

    plan: VideoPlan
    summary: Summary
    known: dict[str, Artifact] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)

    def expect(self, keys: Collection[str]) -> None:
        """Look up many keys at once, and keep what they name from being pruned."""
        self.plan.store.runs.extend(self.plan.folder.path, keys)
        self.known |= self.plan.store.lookup(keys)
        self.asked |= set(keys)

    def get(self, key: str, stage: str, make: Callable[[], Outputs]) -> dict[str, Array]:
        """The values under a key. Raises StepFailed where `make` raises ItemError, now or in an earlier run."""
        if key not in self.asked:
            self.expect([key])
        artifact = self.known.get(key)
        if artifact and artifact.failed and "failed" in self.plan.request.retry:
            self.plan.store.void(artifact)
            artifact = None
        if artifact and artifact.failed:
            raise StepFailed(stage, artifact.reason, remembered=True)
        if artifact:
            try:
                return {name: self.plan.store.read(artifact, name) for name in artifact.payloads}
            except Damaged as damaged:
                self.damaged(damaged)
        self.summary.computed[stage] = self.summary.computed.get(stage, 0) + 1
        try:
            outputs = make()
        except PassingError as error:
            raise StepFailed(stage, str(error)) from None
        except ItemError as error:
            self.plan.store.publish([Finished(key, stage, reason=str(error))])
            raise StepFailed(stage, str(error)) from None
        (self.known[key],) = self.plan.store.publish([Finished(key, stage, {name: ("array", value) for name, value in outputs.items()})])
        return outputs

    def damaged(self, damaged: Damaged) -> None:
        """Cancel what turned out to be damaged, loudly."""
        self.plan.store.void(damaged.artifact)
        self.known.pop(damaged.artifact.key, None)
        sentence = f"{damaged}; computing it again"
        print(f"e4s: {sentence}", file=sys.stderr)
        self.plan.folder.append_log("repair", reason=sentence)


class _Video:
    """One video through all passes."""

    def __init__(
        self, plan: VideoPlan, number: int, row: VideoRow, tools: _Tools, frames: Frames, call: VideoCall, summary: Summary
    ) -> None:
        self.plan, self.number, self.row, self.tools, self.summary = plan, number, row, tools, summary
        self._frames, self._call = frames, call
        self.shelf = _Shelf(plan, summary)
        self.source_artifacts: dict[str, Artifact] = {}
        self.playhead: Playhead | None = None
        self.node_seconds = 0.0  # spent in the stages, which have lines of their own in the log

    def close(self) -> None:
        if self.playhead:
            self.playhead.close()

    def carry_through(self) -> None:
        began, before = time.perf_counter(), self.row.seconds
        try:
            self._carry_through()
        finally:
            self.row.seconds = before + time.perf_counter() - began

    def _carry_through(self) -> None:
        from tasks.video import FrameTable, Playhead

        row = self.row
        probed = self._step("", "probe", partial(self.shelf.get, self.plan.probe_key(row), "probe", self._probe))
        table = FrameTable.from_arrow(_table(probed))
        row.frames, row.repaired, row.damaged = len(table), table.repaired, table.damaged
        self.playhead = Playhead(row.video, table)
        self._step("", "source", self._source_side)
        ranges = detect_ranges(len(table))
        keys = [self.plan.detect_key(row, *range_) for range_ in ranges]
        self.shelf.expect(keys)
        parts = []
        for (start, stop), key in zip(ranges, keys, strict=True):
            make = partial(self._detect, self.playhead, table, start, stop)
            parts.append(self._step(f" frames {start}-{stop - 1}", "detect", partial(self.shelf.get, key, "detect", make)))
        make = partial(self._track, self.playhead, table, parts)
        way = Way.of(self._step("", "track", partial(self.shelf.get, self.plan.track_key(row, keys), "track", make)))
        row.shots = int(way.cut.sum())
        if not way.with_face.any():
            row.note = "no face was found: the output is the input, packet by packet"
            state = np.zeros(len(table), np.uint8)
            self._finish(table, way, state, {}, self._step("", "remux", partial(remux, table, row.video, self._output)))
            return
        self._swap(table, way, self.playhead)

    def _swap(self, table: FrameTable, way: Way, playhead: Playhead) -> None:
        row, config = self.row, self.plan.configs.output
        ranges = chunk_ranges(len(table), 1, config)
        keys = [self.plan.segment_key(row, start, stop, way) for start, stop in ranges]
        self.shelf.expect(keys)
        while True:
            try:
                states, reasons = self._segments(table, _Group(self, table, playhead, way), ranges, keys)
                fault_point("before-join")
                self._finish(table, way, states, reasons, self._step("", "join", partial(self._join, table, keys)))
                return
            except Damaged as damaged:
                self.shelf.damaged(damaged)

    def _segments(
        self, table: FrameTable, group: _Group, ranges: Sequence[tuple[int, int]], keys: Sequence[str]
    ) -> tuple[Array, dict[int, Sequence[str]]]:
        """Make what is missing; the state of every frame and (stage, reason) of those that failed."""
        state: list[Array] = []
        reasons: dict[int, Sequence[str]] = {}
        for (start, stop), key in zip(ranges, keys, strict=True):
            self._frames(start, len(table))
            make = partial(self._segment_facts, key, partial(group.encode, start, stop))
            made = self._step(f" frames {start}-{stop - 1}", "segment", make)
            state.append(made["state"])
            reasons |= {start + int(frame): reason for frame, reason in json.loads(made["reasons"].tobytes()).items()}
        self._frames(len(table), len(table))
        states = np.concatenate(state)
        if not (states == SWAPPED).any():
            (stage, reason), _ = Counter(map(tuple, reasons.values())).most_common(1)[0]
            raise StepFailed(stage, f"no frame could be swapped: {reason}")
        return states, reasons

    def _segment_facts(self, key: str, make: Callable[[], Outputs]) -> dict[str, Array]:
        """Of a finished segment what is small; its bytes are read when the file is joined."""
        artifact = self.shelf.known.get(key)
        if artifact and not artifact.failed:
            try:
                return {name: self.plan.store.read(artifact, name) for name in ("state", "reasons")}
            except Damaged as damaged:
                self.shelf.damaged(damaged)
        made = self.shelf.get(key, "segment", make)
        return {name: made[name] for name in ("state", "reasons")}

    @property
    def _output(self) -> Path:
        return self.plan.folder.outputs / f"{self.row.id}.out"  # its container gives the suffix

    def _join(self, table: FrameTable, keys: Sequence[str]) -> Path:
        for unfinished in self._output.parent.glob(f".{self.row.id}.*.tmp"):  # of a killed run; this one has the folder's lock
            unfinished.unlink()
        segments = (self.plan.store.read(self.shelf.known[key], "segment").tobytes() for key in keys)
        return join(table, self.row.video, segments, self._output, self.plan.configs.output)

    def _finish(self, table: FrameTable, way: Way, state: Array, reasons: Mapping[int, Sequence[str]], output: Path) -> None:
        row, folder = self.row, self.plan.folder
        folder.write_frames(row.id, frame_list(table, way, state, reasons))
        row.passed, row.swapped, row.failed = (int((state == kind).sum()) for kind in (PASSED, SWAPPED, FAILED))
        row.output, row.output_size = str(output.relative_to(folder.path)), output.stat().st_size
        row.output_sha256 = hash_file(str(output))
        row.status, row.stage, row.reason = "done", "", ""
        if table.dropped:
            row.note = "; ".join(filter(None, (row.note, f"left out: {', '.join(table.dropped)}")))

    def _step(self, part: str, name: str, work: Callable[[], Made]) -> Made:
        """A pass through `call`: its result, or what an item of it lacks."""
        done: list[Made | StepFailed | Damaged] = []

        def guarded() -> None:
            try:
                done.append(work())
            except (StepFailed, Damaged) as error:  # no failure of the task
                done.append(error)
            except PassingError as error:
                done.append(StepFailed(name, str(error)))
            except ItemError as error:
                done.append(StepFailed(name, str(error)))

        self.plan.folder.append_log("start", chunk=self.number, stage=name)
        made, inside, began = self.summary.computed.get(name, 0), self.node_seconds, time.perf_counter()
        self._call(f"{self.row.id}{part}", name, guarded)
        if self.summary.computed.get(name, 0) > made:
            self._log(name, 1, time.perf_counter() - began - (self.node_seconds - inside))
        (result,) = done
        if isinstance(result, StepFailed | Damaged):
            raise result
        return result

    def _log(self, stage: str, items: int, seconds: float) -> None:
        self.plan.folder.append_log(
            "stage",
            chunk=self.number,
            stage=stage,
            items=items,
            seconds=round(seconds, 3),
            device=self.plan.graph.device(stage) if stage in self.plan.graph.stages else "cpu",
            worker=THIS_PROCESS,
        )

    def took(self, spent: Mapping[str, tuple[int, float]]) -> None:
        """Note what stages did for a group before its frames went through the graph."""
        for node, (count, seconds) in spent.items():
            self.summary.computed[node] = self.summary.computed.get(node, 0) + count
            self._log(node, count, seconds)
            self.node_seconds += seconds

    def take(self, result: ChunkResult) -> None:
        """Note what a chunk of frames did."""
        for sentence in result.repaired:
            print(f"e4s: {sentence}", file=sys.stderr)
            self.plan.folder.append_log("repair", chunk=self.number, reason=sentence)
        self.took({node: (count, result.seconds[node]) for node, count in result.computed.items()})
        if result.crash:
            raise ProgramError(result.crash)

    # -- passes --------------------------------------------------------------------------------------------------------------------------

    def _probe(self) -> Outputs:
        from tasks.video import probe

        table = probe(self.row.video, self.plan.configs.probe)
        if table.sha256 != self.row.video_sha256:
            raise PassingError(f"{self.row.video} was changed while running: leave the inputs alone during a run and start it again.")
        buffer = io.BytesIO()
        pq.write_table(table.to_arrow(), buffer)
        return {"table": np.frombuffer(buffer.getvalue(), np.uint8)}

    def _source_side(self) -> None:
        worker = self.tools.source_worker
        item = Item(f"source of {self.row.id}", {"source": self.plan.source(self.row)})
        keys = [work.key for work in worker.graph.works(item).values()]
        self.plan.store.runs.extend(self.plan.folder.path, keys)
        known = self.plan.store.lookup(keys)
        if "failed" in self.plan.request.retry:
            failed = [artifact for artifact in known.values() if artifact.failed]
            self.plan.store.void(*failed)
            known = {key: artifact for key, artifact in known.items() if not artifact.failed}
        result = run_chunk(worker, ChunkJob(0, [item], known), _at_once)
        self.take(result)
        (outcome,) = result.outcomes
        if outcome.reason:
            raise StepFailed(outcome.stage, outcome.reason, remembered=not result.computed)
        self.source_artifacts = known | {artifact.key: artifact for artifact in result.artifacts}

    def _detect(self, playhead: Playhead, table: FrameTable, start: int, stop: int) -> Outputs:
        self._frames(start, len(table))
        return detect_range(self.tools.detector, playhead.frames(start, min(stop + 1, len(table))), start, stop)

    def _track(self, playhead: Playhead, table: FrameTable, parts: Sequence[Mapping[str, Array]]) -> Outputs:
        row, configs, min_face = self.row, self.plan.configs, self.plan.graph.configs["align"].min_face
        who: Any = int(row.face) if row.face.isdecimal() else None
        if who is None:
            picture = ImageFile(row.face, row.face_sha256, self.plan.request.max_pixels).read().rgb8
            who = reference_identity(self.tools.id_network, self.tools.detector, picture, min_face)

        def features(faces: Faces, tracks: Sequence[Track]) -> list[Track]:
            return identify(self.tools.id_network, playhead, faces, tracks, configs.track)

        return track_person(parts, len(table), who, configs.track, configs.smooth, min_face, features)


def _at_once(node: str, work: Callable[[], None]) -> None:
    work()


class _Group:
    """One group of pictures: decoded, swapped a few frames at a time, encoded as it goes."""

    def __init__(self, video: _Video, table: FrameTable, playhead: Playhead, way: Way) -> None:
        self.video, self.table, self.playhead, self.way = video, table, playhead, way
        self.steady = Steady(video.tools.worker, way, video.plan.configs.smooth)
        self.known: dict[int, Known] = {}
        self.state: list[int] = []
        self.reasons: dict[int, tuple[str, str]] = {}

    def encode(self, start: int, stop: int) -> Outputs:
        """Writes `segment` (bytes), `state` (n,) and `reasons` (JSON: frame in the group -> stage, reason), all uint8."""
        self.state, self.reasons = [], {}
        self.known = self.steady.group(start, stop, self.playhead.frames)
        self.video.took(self.steady.spent)
        self.steady.spent = {}
        data = encode_group(self.table, start, self._frames(start, stop), self.video.plan.configs.output)
        return {
            "segment": np.frombuffer(data, np.uint8),
            "state": np.array(self.state, np.uint8),
            "reasons": np.frombuffer(json.dumps({str(frame - start): reason for frame, reason in self.reasons.items()}).encode(), np.uint8),
        }

    def _frames(self, start: int, stop: int) -> Iterator[PlanarFrame]:
        size = self.video.plan.request.chunk
        for first in range(start, stop, size):
            yield from self._swapped(first, min(first + size, stop))

    def _swapped(self, start: int, stop: int) -> Iterator[PlanarFrame]:
        """Frames of one chunk, swapped where that works."""
        row, plan = self.video.row, self.video.plan
        stills = [Still(row.video, planes) for planes in self.playhead.frames(start, stop)]
        items: dict[int, Item] = {}
        given: dict[str, Outputs] = {}
        for frame in self.known.keys() & set(range(start, stop)):
            still, side = stills[frame - start], plan.graph.configs["align"].side
            known = {"align": aligned(still.rgb, self.way.crops, frame, side), **self.known[frame]}
            item = plan.item(row, frame, self.table.frame_id(frame), {node: digest_of(outputs) for node, outputs in known.items()})
            works = plan.graph.works(item)
            given |= {works[node, "target"].key: outputs for node, outputs in known.items()}
            items[frame] = item
        swapped = self._run(items, stills, start, given) if items else {}
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
                crop_to_frame = self.way.crops.crop_to_frame(frame, plan.graph.configs["align"].side)
                yield put_back(still, outcome["inpainted"], outcome["mask"], crop_to_frame, plan.configs.paste)

    def _run(
        self, items: Mapping[int, Item], stills: Sequence[Still], start: int, given: Mapping[str, Outputs]
    ) -> dict[int, Outputs | tuple[str, str]]:
        """Frame -> what the last stage made of it, or stage and reason of its failure."""
        video, plan, worker = self.video, self.video.plan, self.video.tools.worker
        made: dict[str, Outputs] = {}
        worker.opened = {item.images["target"].sha256: stills[frame - start] for frame, item in items.items()}
        worker.given = given
        worker.sink = made.__setitem__
        job = ChunkJob(start, list(items.values()), self._known(list(items.values())))
        result = run_chunk(worker, job, _at_once)
        worker.opened, worker.given = {}, {}
        video.take(result)
        video.source_artifacts |= {artifact.key: artifact for artifact in result.artifacts if artifact.key in video.source_artifacts}
        passing = result.failed.keys() - {artifact.key for artifact in (*result.artifacts, *job.known.values()) if artifact.failed}
        if passing:
            raise PassingError(result.failed[min(passing)][1])
        found: dict[int, Outputs | tuple[str, str]] = {}
        for (frame, item), outcome in zip(items.items(), result.outcomes, strict=True):
            key = plan.graph.works(item)[FRAME_RESULT[0], ""].key
            if key in made:
                found[frame] = made[key]
            elif outcome.artifact:
                found[frame] = {name: plan.store.read(outcome.artifact, name) for name in ("inpainted", "mask")}
            else:
                found[frame] = outcome.stage, outcome.reason
        return found

    def _known(self, items: Sequence[Item]) -> dict[str, Artifact]:
        plan = self.video.plan
        known = self.video.source_artifacts
        if plan.request.keep == "all":
            keys = {work.key for item in items for work in plan.graph.works(item).values()}
            plan.store.runs.extend(plan.folder.path, keys)
            known = known | plan.store.lookup(keys)
        return known


def digest_of(outputs: Outputs) -> str:
    """What decides the values that a node is said to have written."""
    return digest([[name, list(value.shape), digest_bytes(value.tobytes())] for name, value in sorted(outputs.items())])


def _table(outputs: Mapping[str, Array]) -> pa.Table:
    return pq.read_table(io.BytesIO(outputs["table"].tobytes()))


def frame_list(table: FrameTable, way: Way, state: Array, reasons: Mapping[int, Sequence[str]]) -> pa.Table:
    """The rows of FRAME_SCHEMA of a whole video."""
    count = len(table)
    stages, sentences = ([reasons.get(frame, ("", ""))[place] for frame in range(count)] for place in (0, 1))
    centre, axis, landmarks = way.crops.centre, way.crops.axis, way.crops.landmarks
    box = np.concatenate([landmarks.min(axis=1), landmarks.max(axis=1)], axis=1)  # [T, 4]
    absent = ~way.with_face
    columns = {
        "frame": np.arange(count),
        "time": [time_of(table, frame) for frame in range(count)],
        "status": np.array(_STATUS)[state],
        "stage": stages,
        "reason": sentences,
        "cut": way.cut,
        "bridged": way.bridged,
        "x": pa.array(centre[:, 0], mask=absent),
        "y": pa.array(centre[:, 1], mask=absent),
        "size": pa.array(2 * np.hypot(*axis.T), mask=absent),
        "angle": pa.array(np.degrees(np.arctan2(axis[:, 1], axis[:, 0])), mask=absent),
        "box": pa.FixedSizeListArray.from_arrays(box.ravel(), 4, mask=pa.array(absent)),
        "score": pa.array(way.score, mask=np.isnan(way.score)),
    }
    return pa.table(
        [pa.array(columns[name], kind) for name, kind in zip(FRAME_SCHEMA.names, FRAME_SCHEMA.types, strict=True)], FRAME_SCHEMA
    )
