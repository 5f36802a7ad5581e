"""Gather what a run made and write its report page."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from evaluation.report import PairPictures, Picture, Report, render, show_regions, thumbnail
from flows.finished import FinishedRun
from flows.progress import duration, plural
from storage.run import Row, RunFolder
from storage.store import Artifact, Damaged, write_atomic
from tasks.frame import ImageFile
from tasks.stage import ItemError

SHOWN = (  # name on the page, node, role of per-image work, output
    ("aligned source", "align", "source", "face"),
    ("aligned target", "align", "target", "face"),
    ("reenact", "reenact", "", "driven"),
    ("parse: driven", "parse_driven", "", "regions"),
    ("parse: target", "parse", "target", "regions"),
    ("swap: mask", "swap", "", "swapped_regions"),
    ("swap", "swap", "", "swapped"),
    ("recolor", "recolor", "", "recolored"),
    ("enhance", "enhance", "", "enhanced"),
    ("blend", "blend", "", "blended"),
    ("inpaint", "inpaint", "", "inpainted"),
)


def write_report(folder: RunFolder, limit: int = 24) -> Path:
    """Write RUN/report/index.html with the first `limit` finished pairs; returns its path. Raises RunError if this is no run."""
    run = FinishedRun(folder)
    rows = list(run.rows.values())
    done = [row for row in rows if row.status == "done"]
    counts = Counter(row.status for row in rows)
    artifacts = run.artifacts(done[:limit])
    spent: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for event in folder.read_log():
        if event["event"] == "stage":
            items, seconds = spent[event["stage"]]
            spent[event["stage"]] = (items + event["items"], seconds + event["seconds"])
    total = sum(seconds for _, seconds in spent.values())
    nodes = run.settings["nodes"]
    report = Report(
        title=f"e4s pairs: {folder.path.name}",
        summary=[
            f"{plural(len(rows), 'pair')}: {counts['done']} done, {counts['failed']} failed, {counts['left']} left. "
            f"{duration(total)} of computing on {run.settings['device']}, {run.settings['cpu_threads']} cores.",
            *([f"The first {limit} finished pairs are shown."] if len(done) > limit else []),
        ],
        stage_seconds={node.name: spent[node.name] for node in run.graph.nodes if node.name in spent},
        pairs=[PairPictures(_title(row), _pictures(run, row, artifacts)) for row in done[:limit]],
        failures=dict(Counter(f"{row.stage}: {row.reason}" for row in rows if row.status == "failed").most_common()),
        settings={
            "profile": run.settings["request"]["profile"],
            **{name: f"{print_['backend']} v{print_['version']}" for name, print_ in nodes.items()},
            "e4s": run.settings["e4s"],
            **run.settings["libraries"],
        },
    )
    path = folder.path / "report/index.html"
    write_atomic(path, render(report).encode())
    return path


def _title(row: Row) -> str:
    return f"{row.id}: {Path(row.source).name} into {Path(row.target).name}, {row.seconds:.1f} s"


def _pictures(run: FinishedRun, row: Row, artifacts: Mapping[str, Artifact]) -> dict[str, Picture]:
    works = run.works(row)
    max_pixels = run.settings["request"]["max_pixels"]
    pictures: dict[str, Picture] = {}
    files = {
        "source": (row.source, row.source_sha256),
        "target": (row.target, row.target_sha256),
        "result": (str(run.folder.path / row.output), row.output_sha256),
    }
    for name, (path, sha256) in files.items():
        try:
            pictures[name] = thumbnail(ImageFile(path, sha256, max_pixels).read().rgb8)
        except ItemError:
            pictures[f"{name}: moved or changed"] = np.full((256, 256, 3), 128, np.uint8)
    for name, node, role, output in SHOWN:
        work = works.get((node, role))
        if work and work.key in artifacts and not (node == "enhance" and run.graph.stages[node].backend == "none"):
            try:
                value = run.store.read(artifacts[work.key], output)
            except Damaged:
                continue
            pictures[name] = thumbnail(show_regions(value) if value.ndim == 2 else value)
    return pictures
