"""What the package `e4s` offers to notebooks and scripts: swap, run, measure and read, without a Prefect server.

Every function checks its settings before it starts, works in this process (or on Dask workers, where `dask` says so) and writes what the
command of the same name writes: a run that was begun here is continued there, and the other way round.
"""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, cast

import numpy as np

from storage.parquet import read_parquet
from storage.run import BaseRow, RunError, RunFiles, RunFolder, check_writable
from storage.spelling import near_miss
from storage.store import write_atomic
from storage.video_run import VideoRunFolder
from storage.video_run import open_run as open_folder
from tasks.graph import UsageError
from tasks.stage import ItemError

if TYPE_CHECKING:
    import pyarrow as pa

    from flows.progress import Count, RunProgress
    from tasks.frame import Pixels

PathLike = str | os.PathLike[str]
Pair = tuple[PathLike, PathLike]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Of the files that `swap` writes."""


class Options(TypedDict, total=False):
    """Settings of a run, as the options of the same names of `e4s pairs --help` and `e4s videos --help`."""

    profile: str
    """mobile, fast, codes, paper, or the path of a .toml file."""
    device: str
    """auto, cpu or cuda."""
    store: str
    """Folder or URL of the artifact store that runs may share; default: the folder `store` in the run folder."""
    chunk: int
    """Pairs or frames that go through the stages together."""
    workers: int
    """Of them that a stage works on at once where it can; 0: one per core."""
    source_face: int
    """Which face of a source, 0 = largest."""
    max_pixels: int
    """Images with more pixels are refused."""
    fail_fast: bool
    verify: bool
    retry: Sequence[Literal["failed", "quarantined"]]
    max_attempts: int
    dask: str
    """tcp://HOST:PORT of a scheduler, or local:N for N processes of this machine."""
    dask_wait: float
    """Seconds."""
    threads: int
    """Of the computing libraries, per process; 0: one per core."""


class PairOptions(Options, total=False):
    """Settings of a run of pairs."""

    keep: Literal["all", "resume", "final"]
    """Intermediates that outlive the run."""
    target_face: int
    """Which face of a target, 0 = largest."""


class VideoOptions(Options, total=False):
    """Settings of a run of videos."""

    keep: Literal["all", "final"]
    face: str
    """Who is swapped where the manifest does not say: largest, a number, or the path of an image of the person."""


@dataclass(frozen=True)
class Swap:
    """A swapped face in the target's image."""

    image: Pixels
    """(H, W, 3) RGB, or (H, W, 4) with the target's alpha; in the target's bit depth and colour profile."""
    note: str
    """What limits the result, such as "heads turned by 50 degrees"; "" if nothing does."""
    lost: tuple[str, ...]
    """Sentences on what the format of the written file cannot hold."""


@dataclass(frozen=True)
class Run:
    """A run folder of pairs or videos."""

    path: Path

    @cached_property
    def folder(self) -> RunFiles[Any]:
        """Raises RunError if this is no run folder."""
        return open_folder(str(self.path))

    @property
    def kind(self) -> Literal["pairs", "videos"]:
        return "videos" if isinstance(self.folder, VideoRunFolder) else "pairs"

    def table(self) -> pa.Table:
        """Return the run's rows: id, inputs, status ("done", "failed", "left"), stage and reason of a failure, note, output, seconds.

        `.to_pandas()` makes a data frame of it where pandas is installed.
        """
        import pyarrow as pa

        rows = self.folder.read_rows()
        schema = self.folder.schema
        return pa.Table.from_pylist([{name: getattr(row, name) for name in schema.names} for row in rows], schema)

    def frames(self, video: str) -> pa.Table:
        """Return a row per frame of a video: time, s; status; place of the face, px. Raises UsageError for a run of pairs."""
        if not isinstance(self.folder, VideoRunFolder):
            raise UsageError(f"{self.path}: a run of pairs has no frames")
        self._row(video)
        return self.folder.read_frames(video)

    def output(self, item: str) -> Path:
        """Return the path of a result. Raises UsageError for an id that is not there, ItemError for one that is not done."""
        row = self._row(item)
        if row.status != "done":
            why = f" ({row.stage}: {row.reason})" if row.status == "failed" else ""
            raise ItemError(f"{item} is {row.status}{why}: it has no output")
        return self.folder.path / row.output

    def metrics(self) -> pa.Table:
        """Return what the last report measured, a row per pair, metric and network. Raises RunError if nothing was measured."""
        file = self.folder.path / "report/metrics.parquet"
        if not file.exists():
            raise RunError(f"{self.path}: nothing was measured yet; call e4s.report, or type `e4s report {self.path}`")
        return read_parquet(file)

    def counts(self) -> dict[str, int]:
        """Return how many items are done, failed and left."""
        statuses = [row.status for row in self.folder.read_rows()]
        return {status: statuses.count(status) for status in ("done", "failed", "left")}

    def _row(self, item: str) -> BaseRow:
        rows = {row.id: row for row in self.folder.read_rows()}
        if item not in rows:
            raise UsageError(f"{self.path}: no item {item!r}{near_miss(item, rows)}; ids are those of the column id of table()")
        found: BaseRow = rows[item]
        return found

    def __repr__(self) -> str:
        try:
            counts = ", ".join(f"{number} {status}" for status, number in self.counts().items() if number)
            return f"<e4s run of {self.kind} {str(self.path)!r}: {counts or 'empty'}>"
        except RunError as error:
            return f"<e4s run {str(self.path)!r}: {error}>"


@dataclass(frozen=True)
class ReportFiles:
    """Where a report was written."""

    page: Path
    """HTML, one file."""
    lines: tuple[str, ...]
    """What `e4s report` prints."""


def swap(
    source: PathLike,
    target: PathLike,
    output: PathLike | None = None,
    *,
    run: PathLike = "",
    stages: Mapping[str, str] | Sequence[str] = (),
    settings: Mapping[str, Any] | Sequence[str] = (),
    progress: bool = True,
    **options: Unpack[PairOptions],
) -> Swap:
    """Swap the face of `source` into `target` and return it; write it to `output` (.png, .jpg or .webp), if given.

    `run` keeps the intermediates in that folder, so that a second call with other settings computes only what differs. `stages` chooses
    backends, as {"swap": "composite"}; `settings` sets values, as {"blend.levels": 6}.

    Raises UsageError for settings and paths that cannot be, before anything is computed; ItemError if a face is missing or unfit.
    """
    from flows.engine import execute
    from flows.pictures import require_picture
    from flows.plan import make_plan
    from tasks.frame import ImageFile, hash_file
    from tasks.properties import convert_result

    file = None if output is None else _writable(Path(output))
    for path in (source, target):
        require_picture(os.fspath(path))
    with tempfile.TemporaryDirectory(prefix="e4s-") as temporary:
        folder = Path(run or temporary)
        manifest = folder / "pair.csv"
        if folder.is_dir() and any(folder.iterdir()) and not manifest.exists():
            raise UsageError(f"{folder}: a folder with other things in it; choose another --run for this swap")
        RunFolder(folder).create()
        write_atomic(manifest, _manifest([("swap", Path(source), Path(target))]))
        options = {"chunk": 1, **options} if run else {"chunk": 1, **options, "keep": "final"}
        plan = make_plan(_pair_request(manifest, folder, stages, settings, options), temporary=not run)
        try:
            if plan.todo:
                execute(plan, _progress(progress))
            (row,) = plan.rows.values()
            if row.status == "failed":
                raise ItemError(f"{row.stage}: {row.reason}")
            if row.status != "done":
                raise RunError(f"{folder}: the swap was stopped; repeat it")
            result = folder / row.output
            lost: list[str] = []
            if file is not None:
                data = result.read_bytes()
                if file.suffix.lower() != ".png":
                    data, lost = convert_result(data, file.suffix.lower())
                write_atomic(file, data)
            frame = ImageFile(str(result), hash_file(str(result))).read()
            layers = [frame.pixels] if frame.alpha is None else [frame.pixels, frame.alpha]
            return Swap(cast("Pixels", np.dstack(layers)), row.note, tuple(lost))
        finally:
            plan.close()


def pairs(
    manifest: PathLike | Iterable[Pair],
    run: PathLike,
    *,
    stages: Mapping[str, str] | Sequence[str] = (),
    settings: Mapping[str, Any] | Sequence[str] = (),
    progress: bool = True,
    **options: Unpack[PairOptions],
) -> Run:
    """Swap every pair of a manifest in a run folder; what is done is not done again.

    `manifest` is what `e4s pairs` takes: a .csv or .parquet file with columns source and target, a folder that holds one, or
    SOURCES:TARGETS; or (source, target) paths, which are written to `pairs.csv` in the run folder. Pairs that fail do not stop the others:
    see `Run.table`. For `stages` and `settings` see `swap`.

    Raises UsageError, RunError or StoreError before anything is computed, and RunError for a program error.
    """
    from flows.engine import check_weights, execute
    from flows.plan import make_plan, record

    folder = Path(run)
    plan = make_plan(_pair_request(_listed(manifest, folder), folder, stages, settings, options))
    try:
        if plan.todo:
            check_weights(plan)
            if crash := execute(plan, _progress(progress)).crash:
                raise RunError(f"{folder}: a program error stopped the run: {crash.strip().splitlines()[-1]}")
        else:
            record(plan)
    finally:
        plan.close()
    return Run(folder)


def videos(
    manifest: PathLike,
    run: PathLike,
    *,
    stages: Mapping[str, str] | Sequence[str] = (),
    settings: Mapping[str, Any] | Sequence[str] = (),
    progress: bool = True,
    **options: Unpack[VideoOptions],
) -> Run:
    """Swap a face into every video of a manifest (columns source and video) in a run folder; what is done is not done again.

    Raises as `pairs` does.
    """
    from flows.video_engine import execute_videos
    from flows.video_plan import VideoRequest, make_video_plan

    folder = Path(run)
    _known(options, VideoOptions)
    request = VideoRequest(manifest=os.fspath(manifest), run=str(folder), stages=_texts(stages), changes=_texts(settings), **options)
    plan = make_video_plan(request)
    try:
        if plan.todo:
            with _count("frames", progress) as count:
                if crash := execute_videos(plan, count).crash:
                    raise RunError(f"{folder}: a program error stopped the run: {crash.strip().splitlines()[-1]}")
        else:
            plan.record()
    finally:
        plan.close()
    return Run(folder)


def report(
    run: PathLike | Run,
    other: PathLike | Run | None = None,
    *,
    protocols: Sequence[str] = ("open",),
    device: str = "auto",
    measure: bool = True,
    limit: int = 24,
    progress: bool = True,
) -> ReportFiles:
    """Measure a run and write its page, or with `other` compare that run with this one, pair by pair.

    `limit` is the number of pairs on the contact sheet. Without `measure` the page has the earlier numbers that still hold.

    Raises UsageError, RunError or StoreError.
    """
    from evaluation.compare import summary
    from flows.report import PAGE, evaluate_and_report, told, write_comparison, write_report
    from flows.video_report import report_videos

    if limit < 0:
        raise UsageError(f"limit must be at least 0, got {limit}")
    folder = _opened(run)
    if isinstance(folder, VideoRunFolder):
        if other is not None:
            raise UsageError(f"{folder.path} is a run of videos: two of them cannot be compared; give one")
        with _count("videos measured", progress) as count:
            lines = report_videos(folder, measure=measure, device=device, limit=limit, progress=count)
        return ReportFiles(folder.path / PAGE, tuple(lines))
    if other is not None:
        beside = _opened(other)
        if not isinstance(beside, RunFolder):
            raise UsageError(f"{beside.path} is a run of videos: compare two runs of pairs")
        with _count("pairs measured", progress) as count:
            compared = write_comparison(folder, beside, protocols, device, count)
        return ReportFiles(compared.page, tuple(summary(compared.comparison)))
    if not measure:
        write_report(folder, None, limit)
        return ReportFiles(folder.path / PAGE, ())
    with _count("pairs measured", progress) as count:
        written = evaluate_and_report(folder, protocols, device, limit, count)
    return ReportFiles(folder.path / PAGE, tuple(told(folder, written)))


def open_run(path: PathLike) -> Run:
    """Return a run folder of pairs or videos that exists. Raises RunError if there is none."""
    run = Run(Path(path))
    run.folder.read_settings()
    return run


def _opened(run: PathLike | Run) -> RunFolder | VideoRunFolder:
    folder = open_folder(str(run.path if isinstance(run, Run) else os.fspath(run)))
    assert isinstance(folder, (RunFolder, VideoRunFolder))
    return folder


def _pair_request(manifest: str | Path, run: Path, stages: Any, settings: Any, options: Mapping[str, Any]) -> Any:
    from flows.plan import Request

    _known(options, PairOptions)
    return Request(manifest=str(manifest), run=str(run), stages=_texts(stages), changes=_texts(settings), **options)


def _known(options: Mapping[str, Any], kind: Any) -> None:
    """Raises UsageError for an option that a run of this kind does not have."""
    names = kind.__annotations__.keys() | Options.__annotations__.keys()
    for name in options:
        if name not in names:
            raise UsageError(f"unknown option {name!r}{near_miss(name, names)}; options are {', '.join(sorted(names))}")


def _texts(chosen: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """{"blend.levels": 6} -> ["blend.levels=6"], as on the command line."""
    if not isinstance(chosen, Mapping):
        return list(chosen)
    return [f"{name}={_toml(value)}" for name, value in chosen.items()]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_quoted(item) for item in value)}]"
    return str(value)


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else _toml(value)


def _listed(manifest: PathLike | Iterable[Pair], run: Path) -> str:
    if isinstance(manifest, (str, os.PathLike)):
        return os.fspath(manifest)
    RunFolder(run).create()
    file = run / "pairs.csv"
    write_atomic(file, _manifest((f"{index:06d}", Path(source), Path(target)) for index, (source, target) in enumerate(manifest)))
    return str(file)


def _manifest(rows: Iterable[tuple[str, Path, Path]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([("id", "source", "target"), *((name, a.absolute(), b.absolute()) for name, a, b in rows)])
    return text.getvalue().encode(errors="surrogateescape")


def _writable(output: Path) -> Path:
    if output.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{output}: the result is a .png, .jpg or .webp file; name it so")
    if output.is_dir() or not output.parent.is_dir():
        raise UsageError(f"{output}: not a file name in an existing folder")
    check_writable(output.parent, "-o")
    return output


def _progress(shown: bool) -> RunProgress:
    from flows.progress import Silent, terminal_progress

    return terminal_progress() if shown else Silent()


@contextmanager
def _count(what: str, shown: bool) -> Iterator[Count]:
    from flows.progress import counted

    if shown:
        with counted(what) as count:
            yield count
    else:
        yield lambda done, total, part="": None
