"""Ways to swap the pairs of one manifest, measured side by side: for benchmarks that compare them on photographs.

Every way has a run folder of its own under the work folder, named after the way and what decides its bytes; all share one artifact store.
So the same command goes on where it stopped, a larger `--limit` adds pairs, and after a change of code the earlier results stay there.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.protocols import Protocol
from evaluation.results import Evaluation, MetricLine
from flows.engine import execute
from flows.evaluate import evaluate
from flows.execution.process import use_threads
from flows.finished import FinishedRun
from flows.inputs import read_pairs
from flows.plan import Request, make_plan
from flows.profiles import make_settings
from flows.progress import Lines
from flows.report import spent_seconds
from flows.stages import PAIR_NODES, PAIR_RESULT
from storage.keys import digest
from storage.run import Row, RunFolder
from tasks.graph import Graph, needed
from tasks.runner import cpu_threads


@dataclass(frozen=True)
class Way:
    """One way to swap: what differs from the profile."""

    name: str
    stages: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


CODES = Way(
    "codes",
    stages=("swap=codes", "recolor=guided"),
    changes=("swap.target_layers=0", "encode_driven.passes=2", "encode_driven.steps=20"),
)
"""The default before `fused`: codes exchanged after 20 steps of optimization."""
COMPOSITE = Way("composite", stages=("swap=composite", "recolor=guided"))
FUSED = Way("fused")
"""The profile as it is."""
PASTE = Way("paste", stages=("swap=composite", "inpaint=none"), changes=("swap.hair_margin=0", "swap.rim_margin=0"))
"""Nothing but colour: the whole reenacted inner face, recolored as the profile does it; what it does not cover stays the target's."""


@dataclass(frozen=True)
class Measured:
    """One way's run and its numbers."""

    run: RunFolder
    evaluation: Evaluation
    seconds: Mapping[str, float]  # of each stage for one pair that shares nothing with others

    def line(self, metric: str, network: str) -> MetricLine:
        """Raises KeyError where the protocol has no such line, or its network is not here."""
        for line in self.evaluation.lines:
            if (line.measured.metric, line.measured.network) == (metric, network):
                return line
        raise KeyError(f"{metric} with {network} was not measured")


def measure_ways(
    ways: Sequence[Way], manifest: Path, work: Path, protocol: Protocol, *, limit: int = 0, profile: str = "mobile"
) -> dict[str, Measured]:
    """Swap the manifest's first `limit` pairs (0: all) every way, and measure the results, by name of the way."""
    use_threads(cpu_threads())
    pairs = limited(manifest, work / "manifests", limit)
    runs = {}
    for way in ways:
        print(f"{way.name}: swapping", flush=True)
        runs[way.name] = run_way(way, pairs, work, profile)
    evaluations = {}
    for name, run in runs.items():
        print(f"{name}: measuring", flush=True)
        evaluations[name] = evaluate(run, [protocol], "cpu")
    seconds = seconds_per_pair(runs)
    return {name: Measured(run, evaluations[name], seconds[name]) for name, run in runs.items()}


def limited(manifest: Path, folder: Path, limit: int) -> Path:
    """A manifest with absolute paths of the first `limit` pairs of another (0: all), written to a folder under the same name."""
    pairs = read_pairs(str(manifest))
    chosen = [pair for pair in pairs if not pair.problem][: limit or None]
    columns = ["id", "source", "target", "source_face", "target_face", *(["truth"] if chosen and chosen[0].truth else [])]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{manifest.stem}.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows([getattr(pair, column) for column in columns] for pair in chosen)
    return path


def run_way(way: Way, manifest: Path, work: Path, profile: str = "mobile") -> RunFolder:
    """Swap the pairs that are not done yet."""
    graph = Graph(PAIR_NODES, PAIR_RESULT, make_settings(profile, way.stages, way.changes))
    name = f"{manifest.stem}-{way.name.replace(' ', '-')}-{digest(graph.fingerprints)[:8]}"
    request = Request(
        manifest=str(manifest),
        run=str(work / "runs" / name),
        profile=profile,
        stages=way.stages,
        changes=way.changes,
        store=str(work / "store"),
        keep="resume",
        device="cpu",
    )
    plan = make_plan(request)
    try:
        summary = execute(plan, Lines())
    finally:
        plan.close()
    if summary.crash:
        raise RuntimeError(f"{way.name}: the run was stopped by a program error:\n{summary.crash}")
    return RunFolder(request.run)


def seconds_per_pair(runs: Mapping[str, RunFolder]) -> dict[str, dict[str, float]]:
    """For each run what every stage takes on one pair that shares nothing, s: the mean over its executions times those that a pair needs.

    With one store a stage may be computed in one of the runs only: its mean there serves all runs whose settings of it are the same. NaN
    where none of them says, because it was made by a session that was killed or by a run that is not here.
    """
    spent: dict[str, tuple[int, float]] = {}
    finished = {name: FinishedRun(run) for name, run in runs.items()}
    for run in finished.values():
        prints = _prints(run)
        for node, (items, seconds) in spent_seconds(run.folder).items():
            if node in prints:
                before = spent.get(prints[node], (0, 0.0))
                spent[prints[node]] = before[0] + items, before[1] + seconds
    found = {}
    for name, run in finished.items():
        prints = _prints(run)
        executions = _executions(run)
        found[name] = {
            node: count * spent[prints[node]][1] / spent[prints[node]][0] if spent.get(prints[node], (0,))[0] else float("nan")
            for node, count in executions.items()
        }
    return found


def _prints(run: FinishedRun) -> dict[str, str]:
    nodes: Mapping[str, object] = run.settings["nodes"]
    return {node: digest([node, fingerprint]) for node, fingerprint in nodes.items()}


def _executions(run: FinishedRun) -> Counter[str]:
    """How often each stage runs for one pair of two different pictures."""
    lone: Row | None = next((row for row in run.rows.values() if row.status == "done" and row.source_sha256 != row.target_sha256), None)
    if lone is None:
        return Counter()
    works = {work.key: work for work in run.works(lone).values()}
    return Counter(work.node for work in needed(works, [lone.key], ()))


def common_mean(measured: Mapping[str, Measured], metric: str, network: str) -> tuple[dict[str, float], int]:
    """The mean of a metric for each way over the pairs that have a value in all of them, and how many these are."""
    values: dict[str, dict[str, float]] = {}
    for name, found in measured.items():
        line = found.line(metric, network)
        values[name] = {pair: float(value) for pair, value in zip(found.evaluation.pairs, line.values, strict=True) if np.isfinite(value)}
    common = set.intersection(*map(set, values.values()))
    means = {name: float(np.mean([of_way[pair] for pair in sorted(common)])) if common else float("nan") for name, of_way in values.items()}
    return means, len(common)


def _cell(value: float) -> str:
    return "unknown" if np.isnan(value) else f"{value:.3f}"


def print_table(measured: Mapping[str, Measured], lines: Sequence[tuple[str, str]]) -> dict[tuple[str, str], dict[str, float]]:
    """Print the metrics (name, network) of all ways side by side as Markdown, then seconds by stage; returns the means."""
    names = list(measured)
    means = {}
    print(f"\n| metric | network | pairs | {' | '.join(names)} |")
    print(f"|{'---|' * (3 + len(names))}")
    for metric, network in lines:
        try:
            found, count = common_mean(measured, metric, network)
        except KeyError as missing:
            print(f"| {metric} | {network} | {missing.args[0]} |")
            continue
        means[metric, network] = found
        unit = next(iter(measured.values())).line(metric, network).unit
        label = f"{metric}, {unit}" if unit in ("degrees", "dB", "%") else metric
        print(f"| {label} | {network} | {count} | {' | '.join(_cell(found[name]) for name in names)} |")
    for label, counts in (
        ("pairs failed", {name: found.evaluation.failed for name, found in measured.items()}),
        ("no face found in the result", {name: len(found.evaluation.no_face) for name, found in measured.items()}),
    ):
        print(f"| {label} | | | {' | '.join(str(counts[name]) for name in names)} |")
    for node in dict.fromkeys(node for found in measured.values() for node in found.seconds):
        cells = [_cell(found.seconds[node]) if node in found.seconds else "" for found in measured.values()]
        print(f"| {node}, s a pair | | | {' | '.join(cells)} |")
    print(f"| all stages, s a pair | | | {' | '.join(_cell(sum(found.seconds.values())) for found in measured.values())} |\n")
    for name, way in measured.items():
        print(f"{name}: {way.run.path}")
    return means
