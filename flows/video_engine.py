"""Work through a plan of videos; knows no Prefect.

A video goes through passes: its frame table; the source's side; the faces of each stretch of frames; one person's course; each group of
pictures, swapped and encoded; and the joined file. What a pass makes is an artifact, so that a killed run goes on behind the last one.
The earliest video that has a unit ready goes first; where none has, the next video is begun. Rows, outputs, log and manifest are written
here, in the planning process, whichever process runs the units.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from e4s_models.weights import WeightsError
from flows.execution.jobs import Executor, Job, TaskHook, call_directly
from flows.execution.local_executor import LocalExecutor
from flows.execution.process import THIS_PROCESS, require_weights, use_threads
from flows.execution.scheduler import run_jobs
from flows.execution.summary import Summary
from flows.room import VIDEO_BYTES, blocked_places, lacking_room
from flows.video_jobs import FolderJob, UnitJob, VideoJob
from flows.video_plan import VideoPlan
from flows.video_segments import Segment, Tuning
from flows.video_units import (
    FAILED,
    PASSED,
    SEGMENT_FACTS,
    SWAPPED,
    Desk,
    Detecting,
    Probing,
    Sounding,
    SourceSide,
    Tables,
    Tracking,
    Unit,
    source_item,
)
from storage.faults import fault_point
from storage.run import check_writable
from storage.store import Artifact, Damaged, StoreError
from storage.video_run import FRAME_SCHEMA, VideoRow
from tasks.frame import hash_file
from tasks.graph import UsageError
from tasks.runner import DiskFull, JobResult, crash_sentence, failure, raise_if_full
from tasks.stage import Array, ItemError
from tasks.video_pass import ID_NETWORK, Way, detect_ranges, time_of
from tasks.video_sound import Sound
from tasks.video_write import check_encoder, chunk_ranges, copies_video, deliver, join, remux

if TYPE_CHECKING:
    from tasks.video import FrameTable

JOBS_AHEAD = 1  # units that a Dask worker is given at a time: they take long beside the way to the worker

_STATUS = ("passed", "swapped", "failed")

Frames = Callable[[int, int, str], None]
"""Told how many of how many frames went through the running pass of the earliest video, and which video and pass that is."""

Passes = Generator[list[VideoJob], None, None]
"""The jobs of a video: those of one list may run in any order; the next list follows when all ended, or one did not succeed."""


class VideoFailedError(Exception):
    """A video cannot be done: the stage and the sentence."""

    def __init__(self, stage: str, reason: str, remembered: bool = False) -> None:
        super().__init__(reason)
        self.stage, self.reason = stage, reason
        self.remembered = remembered  # known without trying, as from an earlier attempt: no attempt is counted


class VideoCrashError(VideoFailedError):
    """A program error stopped a job of a video: its traceback, and whether that is no video's fault."""

    def __init__(self, stage: str, where: str, crash: str, broken: bool = False) -> None:
        super().__init__(stage, f"{where}: {crash_sentence(crash)}" if where else crash_sentence(crash))
        self.crash, self.broken = crash, broken


def execute_videos(plan: VideoPlan, frames: Frames = lambda done, total, part: None, hook: TaskHook = call_directly) -> Summary:
    """Carry out a plan. The manifest is written whatever happens; what is finished stays finished.

    Raises WeightsError, and UsageError for settings of the output that no encoder takes or a cluster that is not there, before anything is
    done; UsageError, StoreError, DiskFull and KeyboardInterrupt after the manifest was written.
    """
    if plan.todo and not plan.request.remote:
        require_weights([*plan.graph.weights(), ID_NETWORK])
    if plan.todo:
        check_encoder(plan.configs.output)
        check_writable(plan.folder.path / "frames", "--run")
    summary, folder = Summary(0, 0, 0), plan.folder
    tables = Tables(plan.store)
    with closing(make_executor(plan, tables, hook)) if plan.todo else nullcontext() as executor:
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
        try:
            if executor:
                run_jobs(VideoPlanner(plan, frames, summary, tables), executor)
            fault_point("before-manifest")
        except OSError as error:
            raise_if_full(error, plan.store.url)
            raise
        finally:
            folder.write_rows(plan.rows.values())
    summary.conclude(folder, plan.rows.values())
    return summary


def make_executor(plan: VideoPlan, tables: Tables, hook: TaskHook) -> Executor:
    """Make the executor that the request names. Raises ClusterError."""
    request = plan.request
    if request.dask:
        from flows.execution.dask_executor import DaskExecutor
        from flows.video_context import make_video_run_context

        return DaskExecutor(make_video_run_context(plan), request, plan.store, plan.folder, hook, JOBS_AHEAD)
    threads = request.compute_threads()
    use_threads(threads)
    at_once = request.workers or threads
    desk = Desk(plan, tables, keep=request.keep, chunk=request.chunk, max_pixels=request.max_pixels, at_once=at_once)
    return LocalExecutor(desk, hook)


class VideoPlanner:
    """Rows of videos -> the units of their passes, those of the earliest video first."""

    def __init__(self, plan: VideoPlan, frames: Frames, summary: Summary, tables: Tables) -> None:
        self.plan, self.summary, self.tables = plan, summary, tables
        self._frames = frames
        self._coming = enumerate(plan.todo)
        self._videos: list[Video] = []  # begun and not ended, in order
        self._by_number: dict[int, Video] = {}
        self._made: set[str] = set()  # keys of jobs that ended: what one video needed, another one may need, too
        self._numbers = count()
        self._stopped = False

    # -- which jobs ----------------------------------------------------------------------------------------------------

    @property
    def is_stopped(self) -> bool:
        return self._stopped

    def ready_jobs(self) -> Iterator[VideoJob]:
        for video in list(self._videos):
            if video.ready and video.adopt(self._made):
                self._continue_if_idle(video)
            yield from video.ready

    def make_more_ready(self) -> bool:
        """Begin the next video."""
        following = next(self._coming, None)
        if following is None or self._stopped:
            return False
        number, name = following
        video = Video(self.plan, number, self.plan.rows[name], self.tables, self._numbers)
        self._videos.append(video)
        self._by_number[number] = video
        self._continue(video)
        return True

    def start(self, job: Job) -> Job:
        """Take a job from its video, with what is known of the source's side by now."""
        assert isinstance(job, VideoJob)
        video = self._by_number[job.group]
        video.ready.remove(job)
        if isinstance(job, UnitJob):
            job.unit = video.equipped(job.unit)
            job.preferred_worker = video.last_worker
        video.under_way += 1
        self.plan.folder.append_log("start", chunk=video.number, stage=job.name)
        return job

    # -- what follows --------------------------------------------------------------------------------------------------

    def on_stage(self, job: Job, node: str) -> None:
        """Do nothing: the log says which pass a video is in."""

    def on_progress(self, job: Job, share: float) -> None:
        assert isinstance(job, VideoJob)
        self._by_number[job.group].shares[job.number] = share * job.frames
        self._show()

    def on_keys_used(self, keys: Collection[str]) -> None:
        self.plan.store.runs.extend(self.plan.folder.path, keys)

    def on_shared(self, job: Job, artifacts: Sequence[Artifact]) -> None:
        """Do nothing: units share nothing before they end."""

    def on_finished(self, job: Job, result: JobResult) -> None:
        """Write the log; let the video go on if it waits for nothing else."""
        assert isinstance(job, VideoJob)
        video, job.result = self._by_number[job.group], result
        video.under_way -= 1
        self._made |= set(job.keys)
        video.shares.pop(job.number, None)
        video.behind += job.frames
        video.last_worker = next(iter(result.places.values()), video.last_worker)
        if job.frames:
            self._log_pass(video)
        if isinstance(job, UnitJob):
            self._show()
        video.row.seconds += result.spent
        for sentence in result.repaired:
            print(f"e4s: {sentence}", file=sys.stderr)
            self.plan.folder.append_log("repair", chunk=video.number, reason=sentence)
        self.summary.add(result)
        for name, executions in result.computed.items():
            self.plan.folder.append_log(
                "stage",
                chunk=video.number,
                stage=name,
                items=executions,
                seconds=round(result.seconds[name], 3),
                device=self.plan.graph.device(name) if name in self.plan.graph.stages else "cpu",
                worker=result.places.get(name, THIS_PROCESS),
            )
        video.shelf.known |= {artifact.key: artifact for artifact in result.artifacts}
        if not result.succeeded:
            video.ready.clear()
        self._continue_if_idle(video)

    def _show(self) -> None:
        if self._videos and self._videos[0].length:
            video = self._videos[0]
            done = min(video.behind + round(sum(video.shares.values())), video.length)
            self._frames(done, video.length, f"{video.row.id}, {video.passing}")

    def _log_pass(self, video: Video) -> None:
        """Write into the log how far a video's running pass is."""
        self.plan.folder.append_log(
            "pass", chunk=video.number, item=video.row.id, stage=video.passing, frames=video.behind, of=video.length
        )

    def _continue_if_idle(self, video: Video) -> None:
        """Let a video go on if it waits for no job."""
        if not video.under_way and not video.ready:
            self._continue(video)

    def _continue(self, video: Video) -> None:
        """Let a video go on until it has jobs again, or to its end."""
        row, folder = video.row, self.plan.folder
        try:
            while not video.ready:
                video.ready.extend(next(video.passes))
            if any(job.frames for job in video.ready):
                self._log_pass(video)
            self._show()
            return
        except StopIteration:
            pass
        except VideoFailedError as failed:
            self._fail(video, failed)
        except (DiskFull, StoreError, UsageError, WeightsError, OSError):
            raise  # no fault of the program: the run stops with the sentence
        except Exception:
            self._fail(video, VideoCrashError(video.passing, "", traceback.format_exc()))
        self._videos.remove(video)
        del self._by_number[video.number]
        folder.append_log("chunk", chunk=video.number, items=1, done=int(row.status == "done"), failed=int(row.status == "failed"))
        folder.write_rows(self.plan.rows.values())
        self._stopped = bool(self.summary.crash) or (self.plan.request.fail_fast and row.status == "failed")

    def _fail(self, video: Video, failed: VideoFailedError) -> None:
        """Write down why a video failed. A program error is a failed attempt as any other, unless it is no video's fault."""
        row, folder = video.row, self.plan.folder
        if isinstance(failed, VideoCrashError):
            folder.append_log("crash", chunk=video.number, item=row.id, stage=failed.stage, traceback=failed.crash)
            if failed.broken:
                self.summary.crash = failed.crash
                print(f"e4s: no video's fault: the run ends: {failed.stage}: {failed.reason}", file=sys.stderr)
                return
        row.status, row.stage, row.reason = "failed", failed.stage, failed.reason
        if not failed.remembered:
            self.plan.attempts.add([row])
        folder.append_log("failed", chunk=video.number, item=row.id, stage=row.stage, reason=row.reason, attempt=row.attempts)


@dataclass
class _Shelf:
    """What is known of the artifacts that a video may use."""

    plan: VideoPlan
    known: dict[str, Artifact] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)

    def expect(self, keys: Iterable[str]) -> None:
        """Look up many keys at once, and keep what they name from being pruned. Failures that are to be tried again are cancelled."""
        new = [key for key in keys if key not in self.asked]
        if not new:
            return
        self.plan.store.runs.extend(self.plan.folder.path, new)
        self.asked |= set(new)
        found = self.plan.store.lookup(new)
        if "failed" in self.plan.request.retry:
            failed = [artifact for artifact in found.values() if artifact.failed]
            self.plan.store.void(*failed)
            found = {key: artifact for key, artifact in found.items() if not artifact.failed}
        self.known |= found

    def damaged(self, damaged: Damaged) -> None:
        """Cancel what turned out to be damaged, loudly."""
        self.plan.store.cancel_damaged(damaged)
        self.known.pop(damaged.artifact.key, None)
        sentence = f"{damaged}; computing it again"
        print(f"e4s: {sentence}", file=sys.stderr)
        self.plan.folder.append_log("repair", reason=sentence)


class Video:
    """One video through all passes."""

    def __init__(self, plan: VideoPlan, number: int, row: VideoRow, tables: Tables, numbers: Iterable[int]) -> None:
        self.plan, self.number, self.row, self._tables, self._numbers = plan, number, row, tables, iter(numbers)
        self.shelf = _Shelf(plan)
        self.passes = self._through()
        self.ready = deque[VideoJob]()  # that do not run yet
        self.under_way = 0  # jobs that run
        self.last_worker = ""  # which has it open
        self.length = 0  # frames
        self.passing = ""  # name of the running pass
        self.behind = 0  # of them, behind the running pass
        self.shares: dict[int, float] = {}  # frames of units under way that are done, by the units' numbers
        self._source_keys: Sequence[str] = ()
        self._notes: list[str] = []  # what is to be known of the output
        self._looked_up: set[str] = set()  # keys that another video came back with

    def equipped(self, unit: Unit) -> Unit:
        """A unit with what is known of the source's side by now."""
        return replace(unit, source=self._known_of_source()) if isinstance(unit, Segment | Tuning | SourceSide) else unit

    def _known_of_source(self) -> dict[str, Artifact]:
        return {key: self.shelf.known[key] for key in self._source_keys if key in self.shelf.known}

    def adopt(self, made: Collection[str]) -> bool:
        """Drop ready jobs that have nothing left to do, because another video needed the same; return whether there were any.

        `made`: keys of all that came back in this execution, among them some that were not finished.
        """
        new = {key for job in self.ready for key in job.keys if key in made and key not in self._looked_up}
        if not new:
            return False
        self._looked_up |= new
        self.shelf.known |= self.plan.store.lookup(new)
        left = [job for job in self.ready if not job.keys or any(key not in self.shelf.known for key in job.keys)]
        fewer = len(left) < len(self.ready)
        self.ready = deque(left)
        return fewer

    def _through(self) -> Passes:
        while True:
            try:
                yield from self._passes()
                return
            except Damaged as damaged:
                self.shelf.damaged(damaged)

    def _passes(self) -> Passes:
        plan, row, output = self.plan, self.row, self.plan.configs.output
        (probed,) = yield from self._make([Probing(number=self._number(), row=row, key=plan.probe_key(row))])
        table = self._tables.table(probed)
        row.frames, row.repaired, row.damaged, self.length = len(table), table.repaired, table.damaged, len(table)
        try:
            delivery = deliver(table, output)
            copied = deliver(table, output, copied=True) if copies_video(table) else None
        except ItemError as error:
            raise VideoFailedError("probe", str(error), remembered=True) from None
        self._check_room(table)
        sound = None
        if tracks := tuple(track.index for track in delivery.converted):
            unit = Sounding(number=self._number(), row=row, key=plan.sound_key(row, tracks), table=probed, tracks=tracks)
            (sound,) = yield from self._make([unit])
        yield from self._source_side()
        ranges = detect_ranges(len(table))
        keys = [plan.detect_key(row, *range_) for range_ in ranges]
        yield from self._make(
            [
                Detecting(number=self._number(), row=row, key=key, table=probed, start=start, stop=stop)
                for (start, stop), key in zip(ranges, keys, strict=True)
            ]
        )
        course = Tracking(number=self._number(), row=row, key=plan.track_key(row, keys), table=probed, detected=keys)
        (tracked,) = yield from self._make([course])
        way = self._tables.way(tracked)
        row.shots = int(way.cut.sum())
        shows_face = bool(way.with_face.any())
        if not shows_face and copied:
            self._notes = ["no face was found: the output is the input, packet by packet", *copied.notes]
            written = yield from self._write("remux", lambda: remux(table, row.video, self._output, output, self._sound(tracks, sound)))
            self._finish(table, way, np.zeros(len(table), np.uint8), {}, written)
            return
        again = f"no face was found: the video is encoded again, since {table.codec} can be copied neither into MP4 nor into Matroska"
        self._notes = [*([] if shows_face else [again]), *delivery.notes]
        tuned = None
        if shows_face and (key := plan.tuning_key(row, tracked.key)):
            (tuned,) = yield from self._make([Tuning(number=self._number(), row=row, key=key, table=probed, way=tracked, source={})])
        groups = chunk_ranges(len(table), 1, output)
        segments = [
            Segment(
                number=self._number(),
                row=row,
                key=plan.segment_key(row, start, stop, way, tuned.key if tuned else ""),
                table=probed,
                way=tracked,
                start=start,
                stop=stop,
                source={},
                tuning=tuned,
            )
            for start, stop in groups
        ]
        facts: dict[str, Mapping[str, Array]] = {}
        made = yield from self._make(segments, facts)
        states, reasons = self._frames(segments, facts)
        fault_point("before-join")
        written = yield from self._write("join", lambda: self._join(table, made, self._sound(tracks, sound)))
        self._finish(table, way, states, reasons, written)

    def _number(self) -> int:
        return next(self._numbers)

    def _make(
        self, units: Sequence[Unit], facts: dict[str, Mapping[str, Array]] | None = None
    ) -> Generator[list[VideoJob], None, list[Artifact]]:
        """Have made what is not there; returns the artifacts of all units, and adds to `facts` what they say, by key."""
        known = self.shelf.known
        self.shelf.expect(unit.key for unit in units)
        for unit in units:
            if (found := known.get(unit.key)) and found.failed:
                raise VideoFailedError(found.stage, found.reason, remembered=True)
        jobs = [UnitJob.of(unit, self.number, self.plan) for unit in units if unit.key not in known]
        self.behind, self.passing = self.length - sum(job.frames for job in jobs), units[0].name
        if jobs:
            yield [*jobs]
        _raise(self.row.id, jobs)
        for job in jobs:
            if facts is not None and job.result.facts:
                facts[job.unit.key] = job.result.facts
        artifacts = [known[unit.key] for unit in units]
        for artifact in artifacts:
            if artifact.failed:  # by another video that needed the same
                raise VideoFailedError(artifact.stage, artifact.reason, remembered=True)
        if facts is not None:
            for artifact in artifacts:
                if artifact.key not in facts:
                    facts[artifact.key] = {name: self.plan.store.read(artifact, name) for name in SEGMENT_FACTS}
        return artifacts

    def _source_side(self) -> Passes:
        plan, item = self.plan, source_item(self.plan, self.row)
        works = plan.source_graph().works(item)
        self._source_keys = tuple({work.key: work for work in works.values()})
        self.shelf.expect(self._source_keys)
        known = self._known_of_source()
        failed = {key: (artifact.stage, artifact.reason) for key, artifact in known.items() if artifact.failed}
        if failed:
            raise VideoFailedError(*failure(item, works, failed), remembered=True)
        if len(known) < len(self._source_keys):
            unit = SourceSide(number=self._number(), row=self.row, key="", source=known, made=self._source_keys)
            job = UnitJob.of(unit, self.number, self.plan)
            yield [job]
            _raise(self.row.id, [job])

    def _write(self, name: str, work: Callable[[], Path]) -> Generator[list[VideoJob], None, Path]:
        """A piece of work of this process, which writes the output."""
        written: list[Path] = []
        job = FolderJob(
            number=self._number(),
            group=self.number,
            name=name,
            subject=self.row.id,
            work=lambda: written.append(work()),
            store=self.plan.store.url,
        )
        yield [job]
        _raise(self.row.id, [job])
        return written[0]

    def _frames(self, segments: Sequence[Segment], facts: Mapping[str, Mapping[str, Array]]) -> tuple[Array, dict[int, Sequence[str]]]:
        """The state of every frame and (stage, reason) of those that failed."""
        reasons: dict[int, Sequence[str]] = {}
        for unit in segments:
            found = json.loads(facts[unit.key]["reasons"].tobytes())
            reasons |= {unit.start + int(frame): reason for frame, reason in found.items()}
        states = np.concatenate([facts[unit.key]["state"] for unit in segments])
        if reasons and not (states == SWAPPED).any():
            (stage, reason), _ = Counter(map(tuple, reasons.values())).most_common(1)[0]
            raise VideoFailedError(stage, f"no frame could be swapped: {reason}")
        return states, reasons

    @property
    def _output(self) -> Path:
        return self.plan.folder.outputs / f"{self.row.id}.out"  # its container gives the suffix

    def _check_room(self, table: FrameTable) -> None:
        """Raise VideoFailedError if the video's files have no room or no place."""
        plan, row = self.plan, self.row
        outputs = [plan.folder.outputs / f"{row.id}.{kind}" for kind in ("mp4", "mkv")]
        if blocked := blocked_places({row.id: [*outputs, plan.folder.frames_file(row.id)]}):
            raise VideoFailedError("output", blocked[row.id], remembered=True)
        size = VIDEO_BYTES * table.width * table.height * len(table)
        if problem := lacking_room(plan.folder, plan.store, size, 0):
            raise VideoFailedError("output", problem, remembered=True)

    def _sound(self, tracks: Sequence[int], made: Artifact | None) -> Sound | None:
        """The converted tracks. Raises Damaged."""
        return Sound(tuple(tracks), self.plan.store.read(made, "sound").tobytes()) if made else None

    def _join(self, table: FrameTable, made: Sequence[Artifact], sound: Sound | None) -> Path:
        for unfinished in self._output.parent.glob(f".{self.row.id}.*.tmp"):  # of a killed run; this one has the folder's lock
            unfinished.unlink()
        segments = (self.plan.store.read(artifact, "segment").tobytes() for artifact in made)
        return join(table, self.row.video, segments, self._output, self.plan.configs.output, sound)

    def _finish(self, table: FrameTable, way: Way, state: Array, reasons: Mapping[int, Sequence[str]], output: Path) -> None:
        row, folder = self.row, self.plan.folder
        folder.write_frames(row.id, frame_list(table, way, state, reasons))
        row.passed, row.swapped, row.failed = (int((state == kind).sum()) for kind in (PASSED, SWAPPED, FAILED))
        row.output, row.output_size = str(output.relative_to(folder.path)), output.stat().st_size
        row.output_sha256 = hash_file(str(output))
        row.status, row.stage, row.reason = "done", "", ""
        left_out = [f"left out: {', '.join(table.dropped)}"] if table.dropped else []
        row.note = "; ".join([*self._notes, *left_out])


def _raise(video: str, jobs: Sequence[VideoJob]) -> None:
    """Raise what went wrong with jobs: VideoCrashError or VideoFailedError, or Damaged where nothing else did."""
    for job in sorted(jobs, key=lambda job: job.result.damaged is not None):
        result = job.result
        if result.crash:
            where = job.subject.removeprefix(video).strip()
            raise VideoCrashError(result.stage or job.name, where, result.crash, result.broken)
        if result.reason:
            raise VideoFailedError(result.stage, result.reason, remembered=isinstance(job, UnitJob) and not result.computed)
        if result.damaged:
            raise Damaged(*result.damaged)


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
