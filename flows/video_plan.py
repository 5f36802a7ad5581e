"""From a request for videos to a plan: which are done, which are to do, and what decides their bytes. Loads no model, no torch, no PyAV."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Final, Literal

from e4s_models.weights import weight_digest
from flows.attempts import Attempts
from flows.pictures import Pictures
from flows.plan import PAIR_NODES, BaseRequest, Holding, environment, open_store, pick_device, read_previous, stands, with_instructions
from flows.profiles import check_effect, make_settings
from flows.stale import remove_stale
from flows.tables import Ids, PathCells, find_manifest, path_cell, printable, read_rows, whole_number
from flows.video_survey import set_known_failures_aside
from storage.keys import digest
from storage.runs import Lease
from storage.spelling import near_miss, near_path, nearest
from storage.store import Store
from storage.video_run import KIND, VideoRow, VideoRunFolder
from tasks.frame import Header
from tasks.graph import Graph, Image, Item, Ref, Settings, UsageError, configured, library_version, make_config, needed, pick_backend
from tasks.paste import PasteConfig
from tasks.stage import PassingError
from tasks.steady import reaches
from tasks.track import SmoothConfig, TrackConfig
from tasks.tune import TuningConfig
from tasks.video import ProbeConfig
from tasks.video_pass import DETECT_RANGE, ID_NETWORK, Way
from tasks.video_write import EncodeConfig

VideoKeep = Literal["all", "final"]

VIDEO_NODES = tuple(node for node in PAIR_NODES if node.name != "paste")
"""The stages of a pair; the target is a frame whose face is followed, and its pasting is done in the frame's own planes."""

FRAME_RESULT: Ref = ("inpaint", "inpainted")

CONFIGS: Final[Mapping[str, type]] = {
    "probe": ProbeConfig,
    "track": TrackConfig,
    "smooth": SmoothConfig,
    "tuning": TuningConfig,
    "output": EncodeConfig,
}
"""Settings that are no stage's, by the name in `--set NAME.SETTING=VALUE` and in a profile."""

VERSIONS: Final = {"probe": 1, "sound": 1, "detect": 1, "track": 1, "tuning": 1, "segment": 2}
"""Raise one whenever the bytes of that artifact change for the same inputs and settings."""

NEEDED: Final = ("source", "video")
_COLUMNS: Final = ("id", *NEEDED, "source_face", "face")

_LIBRARIES: Final = ("av", "numpy", "opencv-python-headless")


@dataclass(frozen=True, kw_only=True)
class VideoRequest(BaseRequest):
    """What the user asked for."""

    keep: VideoKeep = "final"  # final: what lets the run go on, and source-side work; all: every picture of every frame, too
    face: str = "largest"  # who is swapped: largest, a number, or the path of a picture of the person

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep not in ("all", "final"):
            raise UsageError(f"--keep {self.keep!r}{near_miss(self.keep, ('all', 'final'))}: choose all or final")


@dataclass(frozen=True)
class Configs:
    """Settings that are no node's."""

    probe: ProbeConfig
    track: TrackConfig
    smooth: SmoothConfig
    tuning: TuningConfig
    output: EncodeConfig
    paste: PasteConfig


@dataclass
class Recipe:
    """What decides the bytes of everything that is made of videos, and so the keys. Worker processes have the same one."""

    graph: Graph
    configs: Configs

    @cached_property
    def prints(self) -> dict[str, Any]:
        """What decides each kind of artifact beside its inputs."""
        return _prints(self.graph, self.configs)

    def probe_key(self, row: VideoRow) -> str:
        """Of a video's frame table."""
        return digest(["probe", self.prints["probe"], row.video_sha256])

    def sound_key(self, row: VideoRow, tracks: Sequence[int]) -> str:
        """Of sound tracks that were converted. Nothing else is made of them but the output, so that few videos need to know of it."""
        made = [VERSIONS["sound"], library_version("av"), self.prints["probe"]]
        return digest(["sound", made, row.video_sha256, list(tracks)])

    def detect_key(self, row: VideoRow, start: int, stop: int) -> str:
        """Of what was found in a stretch of frames."""
        return digest(["detect", self.prints["detect"], self.prints["probe"], row.video_sha256, start, stop])

    def track_key(self, row: VideoRow, detected: Sequence[str]) -> str:
        """Of the chosen person's course, which follows from the keys of all detections."""
        return digest(["track", self.prints["track"], row.face_sha256 or int(row.face), detected])

    @cached_property
    def reach(self) -> int:
        """Frames on each side that decide what is known of a frame before it goes through the stages."""
        return max(reaches(self.graph.fingerprints, self.configs.smooth).values(), default=0)

    def tuning_key(self, row: VideoRow, track: str) -> str:
        """Of the generator's tuning along a course with this key; "" where the stage `tune` does not tune."""
        if "tuning" not in self.prints:
            return ""
        return digest(["tuning", self.prints["tuning"], self.prints["probe"], row.source_sha256, row.source_face, track])

    def segment_key(self, row: VideoRow, start: int, stop: int, way: Way, tuning: str = "") -> str:
        """Of an encoded group of pictures, frames [start, stop).

        It names all that decides the keys of the frames' own results, which are not worked out for this.
        """
        first, last = max(0, start - self.reach), min(len(way.state), stop + self.reach)
        around = [[way.course(frame), int(way.run[frame] - way.run[first])] for frame in range(first, last)]
        source = [*self.source_identity(row), *([tuning] if tuning else [])]
        return digest(["segment", self.prints["segment"], self.prints["probe"], source, row.video_sha256, start, stop, first, around])

    def item(self, row: VideoRow, frame: int, frame_id: str, given: Mapping[Ref, str]) -> Item:
        """The pair of source and one frame, of which the outputs of some nodes are known: see `Item.given`."""
        pictures = {"source": self.source(row), "target": Image(row.video, frame_id)}
        return Item(f"{row.id}:{frame}", pictures, given)

    def source(self, row: VideoRow) -> Image:
        return Image(row.source, row.source_sha256, row.source_face, reading=row.source_reading)

    @staticmethod
    def source_identity(row: VideoRow) -> list[Any]:
        """What tells a source apart in keys; how it is read only where that is another way than an earlier version's."""
        return [row.source_sha256, row.source_face, *([{"reading": row.source_reading}] if row.source_reading else [])]

    def source_graph(self) -> Graph:
        """The work on a source that does not depend on the frame, as a graph of its own with the same keys."""
        works = self.graph.works(Item("", {"source": Image("", "0" * 64), "target": Image("", "1" * 64)}))
        by_key = {work.key: work for work in works.values()}
        used = {work.key for work in needed(by_key, [works[FRAME_RESULT[0], ""].key], ())}
        wanted = [place for place, work in works.items() if place[1] == "source" and work.key in used]
        if not wanted:
            chosen = " and ".join(f"{name}={self.graph.stages[name].backend}" for name in ("reenact", "swap") if name in self.graph.stages)
            raise UsageError(f"with {chosen} no frame needs work on the source picture, so nothing of it would be seen; choose others")
        return Graph(VIDEO_NODES, FRAME_RESULT, self.graph.settings, wanted=wanted)


@dataclass(kw_only=True)
class VideoPlan(Recipe, Holding):
    """A request against what exists."""

    request: VideoRequest
    store: Store
    folder: VideoRunFolder
    rows: dict[str, VideoRow]
    attempts: Attempts
    todo: list[str] = field(default_factory=list)  # ids
    done_before: int = 0
    seconds: float = 0.0
    previous: Mapping[str, Any] = field(default_factory=dict)  # run.json as the run before left it; empty if there is none
    before: Mapping[str, VideoRow] = field(default_factory=dict)  # its rows by id
    dry: bool = False  # only to be looked at: nothing is written
    again: set[str] = field(default_factory=set)  # ids that are tried although their failure is remembered
    lock: IO[bytes] | None = field(default=None, repr=False)
    lease: Lease | None = field(default=None, repr=False)

    def describe(self) -> dict[str, object]:
        """Contents of run.json."""
        settings = {name: asdict(config) for name, config in vars(self.configs).items()}
        return {
            "kind": KIND,
            **environment(self.request, self.graph),
            "videos": {"prints": self.prints, **settings},
        }

    def record(self) -> None:
        """Write the run's settings and rows as they stand, and take away outputs that are none of theirs."""
        remove_stale(self.folder, self.before.values(), self.rows, None)
        self.folder.write_settings(self.describe())
        self.folder.write_rows(self.rows.values())


def _prints(graph: Graph, configs: Configs) -> dict[str, Any]:
    def made(kind: str, *weights: str, libraries: Sequence[str] = _LIBRARIES, **more: Any) -> dict[str, Any]:
        return {
            "version": VERSIONS[kind],
            "weights": {name: weight_digest(name) for name in weights},
            "libraries": {name: library_version(name) for name in libraries},
            **({"instructions": graph.settings.instructions} if graph.settings.instructions else {}),
            **more,
        }

    landmarks, paste = "dlib_landmarks68", pick_backend("paste", graph.settings.backends.get("paste"))
    output = {name: value for name, value in asdict(configs.output).items() if name not in ("container", "sound")}
    driving = {name: graph.fingerprints[name] for name in _upstream(graph, "tune")} if "tune" in graph.fingerprints else {}
    tuning = {"tuning": made("tuning", nodes=driving, config=asdict(configs.tuning), smooth=asdict(configs.smooth))} if driving else {}
    return {
        "probe": made("probe", config=asdict(configs.probe)),
        "detect": made("detect", landmarks, libraries=(*_LIBRARIES, "dlib-bin"), range=DETECT_RANGE),
        "track": made(
            "track",
            landmarks,
            ID_NETWORK,
            libraries=(*_LIBRARIES, "dlib-bin", "torch"),
            track=asdict(configs.track),
            smooth={name: value for name, value in asdict(configs.smooth).items() if name not in ("mesh", "mask", "light")},
            min_face=graph.configs["align"].min_face,
        ),
        **tuning,
        "segment": made(
            "segment", nodes=graph.fingerprints, paste=[paste.version, asdict(configs.paste)], output=output, smooth=asdict(configs.smooth)
        ),
    }


def _upstream(graph: Graph, node: str) -> set[str]:
    """A node and all that its inputs come from."""
    return {node}.union(*(_upstream(graph, producer) for producer in graph.producers(node)))


def make_video_plan(request: VideoRequest, *, dry: bool = False) -> VideoPlan:
    """Read the manifest, hash the inputs, see what is done. Raises UsageError or RunError.

    With `dry` nothing is written, locked or cancelled: the plan says what a run would do now, beside one that is at work, too.
    """
    began = time.perf_counter()
    settings = make_settings(request.profile, request.stages, request.changes, pick_device(request.device, request.remote))
    options = dict(settings.options)
    own = {name: configured(config, options.pop(name, {}), name, name) for name, config in CONFIGS.items()}
    if "align" in settings.backends:
        raise UsageError("--stage align: in a video the face is followed; leave it out")
    backends = dict(settings.backends)
    if own["smooth"].light and settings.backends.get("recolor", "guided") in ("guided", "lab"):
        backends.setdefault("light", "skin")
        if "side" in options.get("recolor", {}):
            options["light"] = {"side": options["recolor"]["side"], **options.get("light", {})}
    graph = Graph(VIDEO_NODES, FRAME_RESULT, Settings(backends, options, settings.device))
    check_effect(graph, request.stages, request.changes, used=("paste",))
    paste = pick_backend("paste", settings.backends.get("paste"))
    if paste.config is not PasteConfig:
        raise UsageError(f"--stage paste={paste.backend}: faces are pasted into a video by paste=feather only")
    configs = Configs(**own, paste=make_config(paste, options.get("paste", {})))
    rows = {row.id: row for row in read_videos(request.manifest, source_face=request.source_face, face=request.face)}
    folder = VideoRunFolder(request.run)
    lock = None
    if not dry:
        folder.create()
        lock = folder.lock()
    previous, before = read_previous(folder)
    store = open_store(folder, request.store)
    graph = Graph(VIDEO_NODES, FRAME_RESULT, with_instructions(graph.settings, store, request.instructions(), write=not dry))
    attempts = Attempts(folder, request.max_attempts, dry)
    plan = VideoPlan(
        graph,
        configs,
        request=request,
        store=store,
        folder=folder,
        rows=rows,
        attempts=attempts,
        previous=previous,
        before=before,
        dry=dry,
        lock=lock,
    )
    try:
        _identify(plan)
        _sort_out(plan, before)
        known = set_known_failures_aside(plan)
        if plan.todo and not dry:
            plan.lease = store.register(folder.path, (row.key for row in rows.values() if row.key), unfolding=True)
            store.runs.extend(folder.path, known)
    except BaseException:
        plan.close()
        raise
    plan.done_before = sum(row.status == "done" for row in rows.values())
    plan.seconds = time.perf_counter() - began
    return plan


def _identify(plan: VideoPlan) -> None:
    """Hash all files; a row whose files cannot be used fails."""
    request, rows = plan.request, [row for row in plan.rows.values() if not row.reason]
    pictures = Pictures(plan.folder.path / "inputs.parquet", request.max_pixels, trust=not request.verify)
    videos = Pictures(plan.folder.path / "videos.parquet", request.max_pixels, trust=not request.verify, probe=_no_probe)
    images = pictures.find([*(row.source for row in rows), *(row.face for row in rows if not row.face.isdecimal())])
    films = videos.find(row.video for row in rows)
    if not plan.dry:
        pictures.remember()
        videos.remember()
    for row in rows:
        person = None if row.face.isdecimal() else images[row.face]
        for role, found in (("source", images[row.source]), ("video", films[row.video]), ("face", person)):
            if isinstance(found, str):
                row.stage, row.reason = "input", row.reason or f"{role}: {found}"
            elif found:
                setattr(row, f"{role}_sha256", found.sha256)
                row.source_reading = found.reading if role == "source" else row.source_reading
        if not row.reason:
            person_key = row.face_sha256 or int(row.face)
            source, output = Recipe.source_identity(row), plan.configs.output
            sound = [output.sound] if output.sound != EncodeConfig.sound else []  # a setting that came later: keys of before stay
            row.key = digest(["video", plan.prints, source, row.video_sha256, person_key, output.container, *sound])


def _no_probe(path: str, max_pixels: int) -> Header:
    """Pictures are probed while planning; a video is, when its turn comes."""
    if not Path(path).is_file():
        raise PassingError(f"{path} does not exist or is not a file: correct its path.")
    return Header(0, 0)


def _sort_out(plan: VideoPlan, before: Mapping[str, VideoRow]) -> None:
    """Which rows are done, which are tried, and which are not, for what reason."""
    unreadable = []
    for row in list(plan.rows.values()):
        earlier = before.get(row.id)
        if row.reason:
            row.status = "failed"
            unreadable.append(row)
            continue
        if earlier and earlier.key == row.key:
            row.seconds = earlier.seconds
            if earlier.status == "done" and stands(plan.folder, earlier, plan.request.verify) and plan.folder.frames_file(row.id).exists():
                plan.rows[row.id] = replace(earlier, source=row.source, video=row.video, face=row.face)
                continue
        plan.attempts.look_up(row)
        if row.quarantined and "quarantined" in plan.request.retry:
            plan.attempts.release([row])
            plan.again.add(row.id)
        if not row.quarantined:
            plan.todo.append(row.id)
            plan.again |= {row.id} if "failed" in plan.request.retry else set()
    plan.attempts.unreadable(unreadable)


def read_videos(manifest: str, *, source_face: int = 0, face: str = "largest") -> Iterator[VideoRow]:
    """Videos of a manifest, .csv or .parquet, with the columns source and video and maybe id, source_face and face.

    Relative paths are resolved from its own folder, that of the argument `face` from the working folder. A row with an empty or wrong
    cell fails with a reason; anything wrong with the whole, such as an id that stands twice, raises UsageError.
    """
    path = find_manifest(manifest, "videos", NEEDED)
    paths, ids = PathCells(path.parent), Ids(path)
    everyone, wrong = _who(face, PathCells(Path()))
    if wrong or not (everyone.isdecimal() or Path(everyone).exists()):
        raise UsageError(f"--face {wrong or f'{printable(face)}: no such picture{near_path(face)}; give largest, a number or a picture'}")
    for record in read_rows(path, _COLUMNS, NEEDED):
        problem = record.problem
        found: dict[str, str] = {}
        for role in NEEDED:
            found[role], wrong = path_cell(record, role, paths)
            problem = problem or wrong
        index, wrong = whole_number("source_face", record.cells.get("source_face", ""), source_face)
        problem = problem or (f"{wrong} in row {record.number}" if wrong else "")
        cell = record.cells.get("face", "")
        who, wrong = _who(cell, paths) if cell else (everyone, "")
        problem = problem or (f"the cell face of row {record.number}: {wrong}" if wrong else "")
        row = VideoRow(id=ids.take(record), source=found["source"], video=found["video"], source_face=index, face=who)
        row.stage, row.reason = ("input", problem) if problem else ("", "")
        yield row


def _who(cell: str, paths: PathCells) -> tuple[str, str]:
    """Return who is swapped, of largest, a number or the path of a picture: the number or the path; and a problem, or ""."""
    if cell.casefold() == "largest":
        return "0", ""
    number, no_number = whole_number("face", cell, 0)
    if cell[:1].isdigit() and not no_number:
        return str(number), ""
    found, problem = paths.find(cell)
    if not problem and not Path(found).exists() and nearest(cell, ("largest",)):
        problem = f"{cell}: no such picture (did you mean largest?)"
    return found, problem
