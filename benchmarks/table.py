"""Markdown tables of evaluated runs, for docs/benchmark.md: `python -m benchmarks.table NAME=RUN ...`.

Reads the `report/metrics.json` that `e4s report RUN` leaves; measures nothing. A column per run, a row per metric and network, every number
with its interval, then how the numbers were taken, what could not be measured, and the paper's rows, marked as quoted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from evaluation.charts import number
from evaluation.compare import differing
from evaluation.metrics import METRICS, OF_SET
from evaluation.protocols import PROTOCOLS, load_quoted
from evaluation.results import Evaluation, MetricLine, read
from storage.run import RunError


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; 1 and a sentence on stderr if a run is not evaluated or runs were not measured alike."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument(
        "runs", nargs="+", metavar="NAME=RUN", help="an evaluated run folder and what its column is called (default: the folder's name)"
    )
    parser.add_argument("--protocol", default="open", choices=list(PROTOCOLS))
    parser.add_argument("--quoted", default="Table 2", help="which table of the paper is shown beside")
    chosen = parser.parse_args(arguments)
    try:
        print(tables(dict(_named(run) for run in chosen.runs), chosen.protocol, chosen.quoted))
    except RunError as error:
        print(f"benchmarks.table: {error}", file=sys.stderr)
        return 1
    return 0


def tables(runs: Mapping[str, Path], protocol: str = "open", quoted: str = "Table 2") -> str:
    """Markdown of the runs by column name. Raises RunError."""
    found = {name: read(path / "report") for name, path in runs.items()}
    lines = {name: _lines(evaluation, protocol) for name, evaluation in found.items()}
    places = {place: line for measured in lines.values() for place, line in measured.items()}  # in the order of the protocol
    if not places:
        raise RunError(f"{', '.join(map(str, runs.values()))}: nothing measured under protocol {protocol}; repeat `e4s report` with it")
    _require_alike(runs, lines)
    parts = [
        _table(["metric", "network", *found], [*_counts(found), *(_row(place, line, found, lines) for place, line in places.items())]),
        _statement(protocol, list(places.values())),
        _unmeasured(found, protocol),
        _quoted(quoted),
    ]
    return "\n\n".join(filter(None, parts))


def _named(argument: str) -> tuple[str, Path]:
    name, given, run = argument.partition("=")
    if not given or Path(argument).exists():
        return Path(argument).absolute().name, Path(argument)
    return name, Path(run)


Place = tuple[str, str]  # metric, network


def _lines(evaluation: Evaluation, protocol: str) -> dict[Place, MetricLine]:
    return {(line.measured.metric, line.measured.network): line for line in evaluation.lines if line.measured.protocol == protocol}


def _require_alike(runs: Mapping[str, Path], lines: Mapping[str, Mapping[Place, MetricLine]]) -> None:
    """Numbers stand side by side only where network, weights, crop and formula are the same."""
    first: dict[Place, tuple[str, MetricLine]] = {}
    for name, measured in lines.items():
        for place, line in measured.items():
            other, reference = first.setdefault(place, (name, line))
            other_settings = [setting.name for setting in differing(reference.state, line.state)]
            if other_settings:
                raise RunError(
                    f"{runs[name]}: {place[0]} with {place[1]} was measured with another {' and '.join(other_settings)} "
                    f"than in {runs[other]}; repeat `e4s report` on both with one version"
                )


def _counts(found: Mapping[str, Evaluation]) -> list[list[str]]:
    pairs = [f"{run.done} of {run.total}" for run in found.values()]
    rows = [["pairs done", "", *pairs], ["no face found in the result", "", *(str(len(run.no_face)) for run in found.values())]]
    for title, counts in (
        ("failed", [run.failed for run in found.values()]),
        ("left to do", [run.left for run in found.values()]),
        ("result missing or damaged", [len(run.unusable) for run in found.values()]),
    ):
        if any(counts):
            rows.append([title, "", *map(str, counts)])
    return rows


def _row(place: Place, line: MetricLine, found: Mapping[str, Evaluation], lines: Mapping[str, Mapping[Place, MetricLine]]) -> list[str]:
    arrow = {"higher": "↑", "lower": "↓"}[line.better]
    unit = f", {line.unit}" if line.unit and line.unit not in ("share", "cosine") else ""
    return [f"{line.title}{unit} {arrow}", line.measured.network, *(_cell(lines[name].get(place), found[name]) for name in found)]


def _cell(line: MetricLine | None, run: Evaluation) -> str:
    """0.420 [0.380, 0.462], or why there is no interval, and the number of pairs where it is not that of all done ones."""
    if line is None:
        return "not measured"
    measured = line.measured
    if measured.value is None:
        return f"none: {measured.reason}"
    if measured.low is not None and measured.high is not None:
        interval = f" [{number(measured.low)}, {number(measured.high)}]"
    else:
        interval = "" if measured.reason == OF_SET else f", no interval: {measured.reason}"
    return number(measured.value) + interval + (f" (n = {measured.count})" if measured.count != run.done else "")


def _statement(protocol: str, lines: Sequence[MetricLine]) -> str:
    """The protocol in one line, then what each network is and reads, and each metric's formula."""
    intervals = dict.fromkeys(line.state["interval"] for line in lines if line.state["interval"] != "none")
    text = (
        f"Protocol `{protocol}`: {PROTOCOLS[protocol].source}. Sample: {PROTOCOLS[protocol].sample}. In brackets: {'; '.join(intervals)}."
    )
    networks = {
        line.measured.network: [
            line.measured.network,
            f"`{line.state['sha256'][:16]}`" if line.state["sha256"] else "",
            line.state["crop"],
            line.state["resolution"],
        ]
        for line in lines
    }
    formulas = {line.title: [line.title, line.state["formula"]] for line in lines}
    return "\n\n".join(
        (
            text,
            _table(["network", "sha256 begins", "crop", "resolution"], networks.values()),
            _table(["metric", "formula"], formulas.values()),
        )
    )


def _unmeasured(found: Mapping[str, Evaluation], protocol: str) -> str:
    """One line per network that could not be run, and notes on what is partial."""
    reasons: dict[str, None] = {}
    for name, run in found.items():
        reasons |= {f"- {name}: {note}": None for note in run.notes}
        reasons |= {f"- {line.network}: {line.reason}": None for line in run.unavailable if line.protocol == protocol}
    return "\n".join(["Not measured, or in part:", "", *reasons]) if reasons else ""


def _quoted(name: str) -> str:
    rows = [row for row in load_quoted() if row.table == name]
    if not rows:
        known = ", ".join(dict.fromkeys(row.table for row in load_quoted()))
        raise RunError(f"--quoted {name!r}: no such table; quoted are {known}")
    metrics = list(rows[0].values)
    heading = [f"{METRICS[metric].title} {'↑' if METRICS[metric].better == 'higher' else '↓'}" for metric in metrics]
    digits = {metric: max(len(str(row.values[metric]).partition(".")[2]) for row in rows) for metric in metrics}
    body = [[f"{row.method} (quoted)", *(f"{row.values[metric]:.{digits[metric]}f}" for metric in metrics)] for row in rows]
    caption = (
        f"Quoted from the paper (arXiv 2310.15081, {name}: {rows[0].title}; protocol `{rows[0].protocol}`), not measured here; "
        "other networks and pictures, so comparable in kind only:"
    )
    return caption + "\n\n" + _table(["method", *heading], body)


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
