"""Gather what a run made and write its report page; compare two runs. Evaluating is `flows.evaluate`'s business."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from e4s_models.warp import resample
from evaluation.bootstrap import MIN_SAMPLE
from evaluation.compare import Changed, Comparison, Difference, Setting, as_json, changed_rows, compare, differing, render_comparison
from evaluation.protocols import load_quoted
from evaluation.report import (
    Extremes,
    Failure,
    PairPictures,
    Picture,
    Report,
    StageRan,
    axis_label,
    extreme_rows,
    first_lines,
    has_spread,
    headline,
    plural_pairs,
    render,
    show_regions,
    thumbnail,
    with_unit,
)
from evaluation.results import METRICS_FILE, PAIRS_FILE, Evaluation, read, read_history, write
from flows.evaluate import Advance, evaluate
from flows.execution.jobs import TaskHook, call_directly
from flows.finished import FinishedRun
from flows.progress import duration, plural
from storage.run import Row, RunError, RunFiles, RunFolder
from storage.store import Artifact, Damaged, write_atomic
from tasks.frame import ImageFile, hash_file
from tasks.graph import UsageError
from tasks.stage import ItemError

SHOWN = (  # name on the page, node, role of per-image work, output
    ("aligned source", "align", "source", "face"),
    ("aligned target", "align", "target", "face"),
    ("reenact", "reenact", "", "driven"),
    ("reenact: regions", "reenact", "", "regions"),
    ("reenact: visible", "reenact", "", "visible"),
    ("parse: driven", "parse_driven", "", "regions"),
    ("parse: target", "parse", "target", "regions"),
    ("swap: mask", "swap", "", "swapped_regions"),
    ("swap: trust", "swap", "", "trust"),
    ("swap", "swap", "", "swapped"),
    ("recolor", "recolor", "", "recolored"),
    ("enhance", "enhance", "", "enhanced"),
    ("blend", "blend", "", "blended"),
    ("inpaint", "inpaint", "", "inpainted"),
)
PAGE = "report/index.html"  # in the run folder


def silent(done: int, total: int) -> None:
    pass


@dataclass
class _Shelf:
    """A run's artifacts of the rows that a page shows, found in one scan of the store."""

    run: FinishedRun
    artifacts: Mapping[str, Artifact]

    @classmethod
    def of(cls, run: FinishedRun, rows: Sequence[Row]) -> _Shelf:
        return cls(run, run.artifacts(rows) if rows else {})

    def value(self, row: Row, node: str, role: str, output: str) -> npt.NDArray[Any] | None:
        """One output of one stage; None if its backend does not write it, or it was not kept, or is damaged."""
        work = self.run.works(row).get((node, role))
        if not work or work.key not in self.artifacts or output not in self.artifacts[work.key].payloads:
            return None
        try:
            return self.run.store.read(self.artifacts[work.key], output)
        except Damaged:
            return None

    def frame(self, row: Row, name: str) -> Picture | None:
        """RGB (H, W, 3) uint8 of source, target or result; None if the file was moved or changed."""
        path, sha256 = {
            "source": (row.source, row.source_sha256),
            "target": (row.target, row.target_sha256),
            "result": (str(self.run.folder.path / row.output), row.output_sha256),
        }[name]
        try:
            return ImageFile(path, sha256, self.run.settings["request"]["max_pixels"]).read().rgb8
        except ItemError:
            return None

    def frames(self, row: Row) -> dict[str, Picture]:
        """Source, target and result whole; a name that says so where one is gone."""
        return _named({name: self.frame(row, name) for name in ("source", "target", "result")})

    def faces(self, row: Row) -> dict[str, Picture]:
        """The aligned faces of source, target and result; whole pictures where alignment was not kept."""
        source, target = (self.value(row, "align", role, "face") for role in ("source", "target"))
        to_frame, result = self.value(row, "align", "target", "crop_to_frame"), self.frame(row, "result")
        if result is not None and target is not None and to_frame is not None:
            result = resample(result, to_frame, *target.shape[:2])
        found = {"source": source, "target": target}
        return _named({**{name: self.frame(row, name) if face is None else face for name, face in found.items()}, "result": result})

    def stages(self, row: Row) -> dict[str, Picture]:
        """Pictures and label maps that the stages made, in reading order."""
        pictures = {}
        for name, node, role, output in SHOWN:
            if node == "enhance" and self.run.graph.stages[node].backend == "none":
                continue
            value = self.value(row, node, role, output)
            if value is not None:
                pictures[name] = thumbnail(_shown(value, output))
        return pictures


def _shown(value: Picture, output: str) -> Picture:
    """Return a stage's output as a picture: label maps in the regions' colours, other maps in gray."""
    if value.ndim == 3:
        return value
    return show_regions(value) if output.endswith("regions") else np.repeat(value[..., None], 3, axis=2)


def write_report(folder: RunFolder, evaluation: Evaluation | None = None, limit: int = 24) -> Report:
    """Write RUN/report/index.html, with `limit` finished pairs on the contact sheet. Raises RunError if this is no run.

    Without an evaluation nothing is measured: the page has the numbers of the last report where they still hold, and says of how many
    pairs they are.
    """
    report = gather(folder, evaluation, limit)
    write_atomic(folder.path / PAGE, render(report).encode())
    return report


def evaluate_and_report(
    folder: RunFolder,
    protocols: Sequence[str] = ("open",),
    device: str = "auto",
    limit: int = 24,
    progress: Advance = silent,
    hook: TaskHook = call_directly,
) -> Report:
    """Measure a run, write metrics.parquet, metrics.json, history.jsonl and index.html into RUN/report. Raises as `evaluate` does."""
    FinishedRun(folder)  # what cannot be read back has no page: known before anything is computed for it
    evaluation = write(evaluate(folder, protocols, device, progress, hook=hook), folder.path / "report")
    return write_report(folder, evaluation, limit)


def gather(folder: RunFolder, evaluation: Evaluation | None = None, limit: int = 24) -> Report:
    """All that the page says about a run; without an evaluation its metrics are those of the last report, if any."""
    run = FinishedRun(folder)
    rows = list(run.rows.values())
    done = [row for row in rows if row.status == "done"]
    counts = Counter(row.status for row in rows)
    if evaluation:
        notes, as_of = _evaluation_notes(evaluation), ""
    else:
        evaluation, as_of = _measured_before(folder, done)
        notes = [_partial(counts)] if counts["left"] else []
        if run.settings["e4s"] != version("e4s"):
            notes.append(f"the run was made by e4s {run.settings['e4s']}, this page by {version('e4s')}")
    spent = spent_seconds(folder)
    ends = _ends(evaluation, run.rows) if evaluation else []
    shelf = _Shelf.of(run, [*done[:limit], *(run.rows[pair] for _, best, worst in ends for pair in (*best, *worst))])
    total = sum(seconds for _, seconds in spent.values())
    left = f", {counts['left']} left" if counts["left"] else ""
    sources = {(run.rows[pair].source_sha256, run.rows[pair].source_face) for pair in evaluation.pairs} if evaluation else {}
    numbers = headline(evaluation, len(sources)) if evaluation else ""
    summary = [
        *([numbers] if numbers else []),
        f"{plural(len(rows), 'pair')}: {counts['done']} done, {counts['failed']} failed{left}{_faceless(evaluation)}. "
        f"{duration(total)} of computing on {run.settings['device']}, {plural(run.settings['cpu_threads'], 'core')}.",
    ]
    pictured = len(done[:limit])
    ran = run.settings["nodes"]  # in reading order, then what this version has no more
    nodes = [*(node.name for node in run.graph.nodes if node.name in ran), *(name for name in ran if name not in run.graph.all_nodes)]
    return Report(
        title=f"e4s pairs: {folder.path.resolve().name}",
        summary=summary,
        notes=[sentence(note) for note in (*notes, *filter(None, (as_of, _few(evaluation))))],
        as_of=as_of,
        evaluation=evaluation,
        history=read_history(folder.path / "report") if evaluation else (),
        quoted=load_quoted(),
        extremes=[_extremes(shelf, evaluation, end) for end in ends] if evaluation else (),
        failures=_failures(rows, evaluation),
        limits=_limits(rows),
        pairs=[PairPictures(_title(row), {**_small(shelf.frames(row)), **shelf.stages(row)}) for row in done[:limit]],
        pairs_text=f"The first {pictured} of {len(done)} finished pairs"
        if len(done) > pictured
        else f"{plural_pairs(pictured)}, stage by stage",
        stage_seconds={name: spent[name] for name in (*nodes, *spent) if name in spent},
        settings=run_settings(run.settings),
        stages=stages_ran(run.settings, nodes),
    )


def _partial(counts: Counter[str]) -> str:
    return f"the run is not finished: {plural(counts['left'], 'pair')} left, {counts['done']} shown"


def _measured_before(folder: RunFolder, done: Sequence[Row]) -> tuple[Evaluation | None, str]:
    """The numbers of the last report if they are of results that the run still has, and what must be said of them."""
    inside, outputs = folder.path / "report", {row.id: row.output_sha256 for row in done}
    if not (inside / METRICS_FILE).exists():
        return None, ""
    try:
        found = read(inside)
    except RunError as error:
        return None, f"no numbers: {error}"
    again = f"`e4s report {folder.path}{''.join(f' --protocol {name}' for name in found.protocols if found.protocols != ['open'])}`"
    other = sum(outputs.get(pair) != sha256 for pair, sha256 in zip(found.pairs, found.outputs, strict=True))
    if other:
        have = "has another result now, or none" if other == 1 else "have another result now, or none"
        return None, f"{other} of the {plural(len(found.pairs), 'pair')} that were measured {have}; {again} measures them anew"
    still = {row.id: found.unusable[row.id] for row in done if row.id in found.unusable and not _whole(folder, row)}
    counted = len(found.pairs) - len(found.unusable)
    as_of = ""
    if counted < len(done) - len(still):
        last = max((line.get("time", "") for line in read_history(inside)), default="")
        when = f", as measured on {last[:16].replace('T', ' ')} UTC" if last else ""
        as_of = f"the numbers are of {counted} of the {plural(len(done), 'finished pair')}{when}; {again} measures the others, too"
    return replace(found, unusable=still, notes=()), as_of


def _whole(folder: RunFolder, row: Row) -> bool:
    """Whether a finished pair's output and pictures are there as they were, by their digests."""
    pictures = ((folder.path / row.output, row.output_sha256), (row.source, row.source_sha256), (row.target, row.target_sha256))
    try:
        return all(hash_file(str(path)) == sha256 for path, sha256 in pictures)
    except ItemError:
        return False


def _few(evaluation: Evaluation | None) -> str:
    """That too few pairs were measured for intervals, where that is so."""
    most = max((line.measured.count for line in evaluation.lines), default=0) if evaluation else 0
    return f"{plural(most, 'pair')} measured: too few for intervals, which need {MIN_SAMPLE}" if 0 < most < MIN_SAMPLE else ""


def sentence(words: str) -> str:
    """With a capital and a full stop."""
    return words[:1].upper() + words[1:] + ("" if words.endswith(".") else ".")


def _faceless(evaluation: Evaluation | None) -> str:
    count = len(evaluation.no_face) if evaluation else 0
    return f"; no face is found in {count} of the results" if count else ""


def _title(row: Row) -> str:
    return f"{row.id}: {Path(row.source).name} into {Path(row.target).name}, {row.seconds:.1f} s"


def _named(pictures: Mapping[str, Picture | None]) -> dict[str, Picture]:
    gone = np.full((256, 256, 3), 128, np.uint8)
    return {
        name if picture is not None else f"{name}: moved or changed": gone if picture is None else picture
        for name, picture in pictures.items()
    }


def _small(pictures: Mapping[str, Picture], side: int = 224) -> dict[str, Picture]:
    return {name: thumbnail(picture, side) for name, picture in pictures.items()}


def spent_seconds(folder: RunFiles[Any]) -> dict[str, tuple[int, float]]:
    """Items computed and seconds by stage, over all sessions of the run."""
    spent: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for event in folder.read_log():
        if event["event"] == "stage":
            items, seconds = spent[event["stage"]]
            spent[event["stage"]] = (items + event["items"], seconds + event["seconds"])
    return spent


def run_settings(found: Mapping[str, Any]) -> dict[str, str]:
    """What ran, from the run's settings, in words."""
    request = found["request"]
    return {
        "profile": request["profile"],
        "changed": ", ".join([*request["stages"], *request["changes"]]) or "nothing",
        "device": f"{found['device']}, {plural(found['cpu_threads'], 'thread')}, {found['processor']}, {found['platform']}",
        "begun or continued": found["written"],
        "e4s": found["e4s"],
        "python": found["python"],
        "libraries": ", ".join(f"{name} {version}" for name, version in found["libraries"].items()),
    }


def stages_ran(found: Mapping[str, Any], nodes: Sequence[str]) -> list[StageRan]:
    """These nodes as the run's settings have them."""
    return [
        StageRan(
            name=name,
            backend=f"{print_['backend']} v{print_['version']}",
            settings=", ".join(f"{setting} = {value}" for setting, value in print_["config"].items()),
            weights=print_["weights"],
        )
        for name, print_ in ((name, found["nodes"][name]) for name in nodes)
    ]


def _failures(rows: Sequence[Row], evaluation: Evaluation | None) -> list[Failure]:
    """Failed pairs, results without a face and results that could not be read, grouped by reason, most first."""
    grouped: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row.status == "failed":
            grouped[row.stage, row.reason].append(row.id)
    if evaluation:
        for where, pairs in (("in the result", evaluation.no_face), ("on disk", evaluation.unusable)):
            for pair, reason in pairs.items():
                grouped[where, reason].append(pair)
    failures = [Failure(where=where, reason=reason, pairs=pairs) for (where, reason), pairs in grouped.items()]
    return sorted(failures, key=lambda failure: -len(failure.pairs))


def _limits(rows: Sequence[Row]) -> list[Failure]:
    """Group pairs that are done by what limits them, the number that it says included, the commonest kind first."""
    grouped: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for note in filter(None, row.note.split("; ") if row.status == "done" else ()):
            grouped[note].append(row.id)
    return [Failure(where="", reason=note, pairs=grouped[note]) for note in sorted(grouped, key=lambda note: (_kind(note), note))]


def _kind(note: str) -> str:
    return re.sub(r"\d+", "N", note)


def _evaluation_notes(evaluation: Evaluation) -> list[str]:
    lost = len(evaluation.unusable)
    gone = [f"{plural(lost, 'finished pair')} could not be measured: pictures are missing or changed, see Failures"] if lost else []
    return [*evaluation.notes, *gone]


def told(folder: RunFolder, report: Report) -> list[str]:
    """What the terminal says of an evaluated report: numbers, what is partial, files, features computed anew."""
    evaluation = report.evaluation
    if evaluation is None:
        raise ValueError("expected a report with an evaluation")
    anew = ", ".join(f"{network} {count}" for network, count in evaluation.computed.items())
    missing = dict.fromkeys(f"{line.network}: {line.reason}" for line in evaluation.unavailable)
    inside = folder.path / "report"
    return [
        *report.summary,
        *report.notes,
        *(f"not measured: {line}" for line in missing),
        f"features computed anew: {anew or 'none, all were in the store'}",
        f"metrics: {inside / METRICS_FILE}, a row per pair: {inside / PAIRS_FILE}",
        f"report: {folder.path / PAGE}",
    ]


def exit_code(folder: RunFiles[Any], report: Report | None = None) -> int:
    """Of a report on a run: 2 if items failed, or their files are gone or damaged, which the page names, else 0."""
    unusable = report.evaluation.unusable if report and report.evaluation else ()
    return 2 if unusable or any(row.status == "failed" for row in folder.read_rows()) else 0


# -- best and worst ----------------------------------------------------------------------------------------------------------------------

_End = tuple[int, list[str], list[str]]  # index of a line, ids of its best and of its worst pairs


def _ends(evaluation: Evaluation, rows: Mapping[str, Row]) -> list[_End]:
    ends = []
    shown = {id(line) for line in first_lines(evaluation.lines).values()}
    for index, line in enumerate(evaluation.lines):
        if id(line) in shown and has_spread(line):
            best, worst = ([evaluation.pairs[row] for row in side if evaluation.pairs[row] in rows] for side in extreme_rows(line))
            ends.append((index, best, worst))
    return ends


def _extremes(shelf: _Shelf, evaluation: Evaluation, end: _End) -> Extremes:
    index, best, worst = end
    line = evaluation.lines[index]
    values = dict(zip(evaluation.pairs, line.values.tolist(), strict=True))

    def pictured(pair: str) -> PairPictures:
        pictures = _small(shelf.faces(shelf.run.rows[pair]), 160)
        return PairPictures(pair, pictures, ("result",), with_unit(values[pair], line.unit))

    return Extremes(title=axis_label(line), better=line.better, best=[*map(pictured, best)], worst=[*map(pictured, worst)])


# -- two runs ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """A comparison and the files that hold it."""

    comparison: Comparison
    page: Path
    data: Path


class _PartOfRun(RunFolder):
    """A run folder as if the run were of these pairs only: retrieval and FID hang on the whole set."""

    def __init__(self, folder: RunFolder, pairs: Iterable[str]) -> None:
        super().__init__(folder.path)
        self._pairs = frozenset(pairs)

    def read_rows(self) -> list[Row]:
        return [row for row in super().read_rows() if row.id in self._pairs]


def write_comparison(
    a: RunFolder,
    b: RunFolder,
    protocols: Sequence[str] = ("open",),
    device: str = "auto",
    progress: Advance = silent,
    hook: TaskHook = call_directly,
) -> Compared:
    """Compare B with A over the pairs of pictures that both have finished; write B/report/compare-A.html and .json.

    Both are measured on these pairs alone, so that retrieval has one gallery and FID one set. Raises UsageError if they are one run,
    RunError if one is no run or they have no pair in common, and as `evaluate` does.
    """
    names = _names(a, b)
    runs = FinishedRun(a), FinishedRun(b)
    pairs = matched_pairs(runs[0].rows.values(), runs[1].rows.values())
    if not pairs:
        raise RunError(
            f"{a.path} and {b.path}: no pair of the same two pictures is finished in both, so there is nothing to compare; "
            "compare runs of one manifest"
        )
    parts = [_PartOfRun(folder, [pair[side] for pair in pairs]) for side, folder in enumerate((a, b))]
    found_a, found_b = (
        replace(evaluate(part, protocols, device, progress, hook=hook), run=name) for part, name in zip(parts, names, strict=True)
    )
    differences, not_compared = compare(found_a, found_b, pairs)
    comparison = Comparison(
        a=names[0],
        b=names[1],
        pairs=pairs,
        differences=differences,
        not_compared=not_compared,
        settings=_differing_settings(runs),
        notes=_notes(names, runs, len(pairs)),
    )
    path = b.path / f"report/compare-{re.sub(r'[^A-Za-z0-9._-]+', '-', names[0])}.html"
    write_atomic(path, render_comparison(comparison, _changed(runs, comparison, (found_a, found_b))).encode())
    write_atomic(path.with_suffix(".json"), as_json(comparison))
    return Compared(comparison, path, path.with_suffix(".json"))


def matched_pairs(a: Iterable[Row], b: Iterable[Row]) -> list[tuple[str, str]]:
    """Ids in A and in B of pairs of the same pictures (by content) and faces that are done in both, in B's order, each used once."""
    waiting: dict[tuple[str, int, str, int], list[str]] = defaultdict(list)
    for row in a:
        if row.status == "done":
            waiting[_identity(row)].append(row.id)
    pairs = []
    for row in b:
        candidates = waiting.get(_identity(row), []) if row.status == "done" else []
        if candidates:
            same = row.id if row.id in candidates else candidates[0]
            candidates.remove(same)
            pairs.append((same, row.id))
    return pairs


def _identity(row: Row) -> tuple[str, int, str, int]:
    return row.source_sha256, row.source_face, row.target_sha256, row.target_face


def _names(a: RunFolder, b: RunFolder) -> tuple[str, str]:
    """Names of two runs that tell them apart: of the folder, with that of its parent where both are called the same."""
    paths = [folder.path.resolve() for folder in (a, b)]
    if paths[0] == paths[1]:
        raise UsageError(f"{a.path} and {b.path} are one run; give two")
    if paths[0].name != paths[1].name:
        return paths[0].name, paths[1].name
    return f"{paths[0].parent.name}/{paths[0].name}", f"{paths[1].parent.name}/{paths[1].name}"


def _notes(names: tuple[str, str], runs: tuple[FinishedRun, FinishedRun], pairs: int) -> list[str]:
    """What each run has beside the pairs that are compared."""
    notes = []
    for name, run in zip(names, runs, strict=True):
        counts = Counter(row.status for row in run.rows.values())
        if counts.total() > pairs:
            said = f"{counts['done']} done, {counts['failed']} failed, {counts['left']} left"
            notes.append(f"{name} has {plural(counts.total(), 'pair')} ({said}); the numbers are over the {pairs} that both have done.")
    return notes


def _differing_settings(runs: tuple[FinishedRun, FinishedRun]) -> list[Setting]:
    """What differs of all that decides a run's results; settings of a stage only where both ran it with one backend."""
    sides: list[dict[str, Any]] = []
    nodes = [run.settings["nodes"] for run in runs]
    for run, mine, others in zip(runs, nodes, reversed(nodes), strict=True):
        found, stages = run.settings, {}
        for name, print_ in mine.items():
            same = name in others and others[name]["backend"] == print_["backend"]
            stages[name] = {
                "backend": f"{print_['backend']} v{print_['version']}",
                **(print_["config"] if same else {}),
                "weights": print_["weights"],
            }
        sides.append(
            {
                "profile": found["request"]["profile"],
                "device": found["device"],
                "stages": stages,
                "e4s": found["e4s"],
                "python": found["python"],
                "libraries": found["libraries"],
                "threads": found["cpu_threads"],
                "platform": found["platform"],
            }
        )
    return differing(*sides)


def _changed(runs: tuple[FinishedRun, FinishedRun], comparison: Comparison, found: tuple[Evaluation, Evaluation]) -> list[Changed]:
    """The pairs that changed most in each metric's first line, with their pictures of both runs."""
    firsts: dict[str, Difference] = {}
    for difference in comparison.differences:
        firsts.setdefault(difference.metric, difference)
    wanted = {metric: rows for metric, difference in firsts.items() if (rows := changed_rows(difference))}
    used = [comparison.pairs[row] for row in sorted({row for rows in wanted.values() for row in rows})]
    shelves = [_Shelf.of(run, [run.rows[pair[side]] for pair in used]) for side, run in enumerate(runs)]
    values = [
        {(line.name, pair): value for line in one.lines for pair, value in zip(one.pairs, line.values.tolist(), strict=True)}
        for one in found
    ]

    def pictured(difference: Difference, row: int) -> PairPictures:
        ids = comparison.pairs[row]
        name = f"{difference.metric}/{difference.network}/{difference.protocol}"
        faces = [shelf.faces(shelf.run.rows[pair]) for shelf, pair in zip(shelves, ids, strict=True)]
        before, after = (with_unit(one[name, pair], difference.unit) for one, pair in zip(values, ids, strict=True))
        pictures = {
            **{name: face for name, face in faces[1].items() if not name.startswith("result")},
            **{
                f"{run}: {value}": face
                for run, value, one in zip((comparison.a, comparison.b), (before, after), faces, strict=True)
                for name, face in one.items()
                if name.startswith("result")
            },
        }
        title = ids[1] if ids[0] == ids[1] else f"{ids[1]} ({ids[0]} in {comparison.a})"
        return PairPictures(title, _small(pictures, 160), tuple(pictures)[2:], f"{difference.deltas[row]:+.3g}")

    return [
        Changed(
            title=f"{firsts[metric].title} ({firsts[metric].network})",
            better=firsts[metric].better,
            pairs=[pictured(firsts[metric], row) for row in rows],
        )
        for metric, rows in wanted.items()
    ]
