"""From a request for videos to a plan: which are done, which are to do, and what decides their bytes. Loads no model, no torch, no PyAV."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Literal

from flows.attempts import Attempts
from flows.pictures import Pictures
from flows.plan import BaseRequest, Holding, environment, open_store, pick_device, read_previous, with_instructions
from flows.profiles import check_effect, make_settings
from flows.resume import VideoResume
from flows.stages import FRAME_RESULT, VIDEO_NODES
from flows.stale import remove_stale
from flows.tables import Ids, PathCells, find_manifest, path_cell, printable, read_rows, whole_number
from flows.video_recipe import CONFIGS, Configs, Recipe
from storage.keys import digest
from storage.runs import Lease
from storage.spelling import near_miss, near_path, nearest
from storage.store import Store
from storage.video_run import KIND, VideoRow, VideoRunFolder
from tasks.frame import Header
from tasks.graph import Graph, Settings, UsageError, configured, make_config, pick_backend
from tasks.paste import PasteConfig
from tasks.stage import PassingError
from tasks.video_write import EncodeConfig

VideoKeep = Literal["all", "final"]

NEEDED: Final = ("source", "video")
_COLUMNS: Final = ("id", *NEEDED, "source_face", "face")


@dataclass(frozen=True, kw_only=True)
class VideoRequest(BaseRequest):
    """What the user asked for."""

    keep: VideoKeep = "final"  # final: what lets the run go on, and source-side work; all: every picture of every frame, too
    face: str = "largest"  # who is swapped: largest, a number, or the path of a picture of the person

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep not in ("all", "final"):
            raise UsageError(f"--keep {self.keep!r}{near_miss(self.keep, ('all', 'final'))}: choose all or final")


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
        resume = VideoResume(plan, store, folder, attempts, before, previous, retry=request.retry, verify=request.verify, dry=dry)
        decision = resume.decide(rows)
        plan.todo, plan.again = decision.pending, decision.retried
        if plan.todo and not dry:
            plan.lease = store.register(folder.path, (row.key for row in rows.values() if row.key), unfolding=True)
            store.runs.extend(folder.path, decision.known)
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
