"""An evaluation of a run as plain data, and the files that hold it: `metrics.parquet`, `metrics.json`, `history.jsonl`."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from evaluation.metrics import Measured
from storage.parquet import read_parquet
from storage.run import RunError
from storage.store import write_atomic

Float64 = npt.NDArray[np.float64]

PAIRS_FILE = "metrics.parquet"  # a row per pair: id, sha256 of the output that was measured, and a column per line
METRICS_FILE = "metrics.json"  # every line with its protocol, what could not be measured, counts; the same for the same run
HISTORY_FILE = "history.jsonl"  # a line per evaluation that differs from the last one under the same protocols
HISTORY_LINES = 1000  # the latest are kept


@dataclass(frozen=True, kw_only=True)
class MetricLine:
    """One metric under one protocol with one network: the number, how it was taken, and the value of each pair."""

    measured: Measured
    title: str
    unit: str
    better: str  # higher or lower
    state: Mapping[str, str]  # `Line.state()`: protocol, network, sha256, crop, resolution, formula, interval
    values: Float64  # (N,) per pair, NaN where it has none

    @property
    def name(self) -> str:
        """What the line is called in files: metric/network/protocol."""
        return f"{self.measured.metric}/{self.measured.network}/{self.measured.protocol}"


@dataclass(frozen=True, kw_only=True)
class Unavailable:
    """A line of a protocol that could not be measured, and one sentence about what to do."""

    protocol: str
    metric: str
    network: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All numbers of one run as it stands."""

    run: str  # name of the run folder
    pairs: Sequence[str]  # ids of the done pairs, (N,)
    total: int
    done: int
    failed: int
    left: int
    lines: Sequence[MetricLine]
    unavailable: Sequence[Unavailable]
    computed: Mapping[str, int]  # features computed now, by network; not in the files
    no_face: Mapping[str, str]  # pair id -> reason: pairs without a usable face in the output
    unusable: Mapping[str, str] = field(default_factory=dict)  # pair id -> reason: its output or a picture is gone or damaged
    notes: Sequence[str] = ()  # sentences on what is partial about it
    outputs: Sequence[str] = ()  # sha256 of each pair's output as the manifest has it, (N,)

    @property
    def protocols(self) -> list[str]:
        """Names of those that it was asked for, in order."""
        measured = [line.measured.protocol for line in self.lines]
        return list(dict.fromkeys([*measured, *(line.protocol for line in self.unavailable)]))


def write(evaluation: Evaluation, folder: Path) -> Evaluation:
    """Write the three files into a folder, each as a whole; the history grows only when something differs.

    Returns what the files hold: the evaluation, and behind its lines those of other protocols that were measured before on the very same
    results. Those that were measured on other results are left out; a note says so (the history keeps their numbers).
    """
    whole, left_out = _with_others(evaluation, folder)
    stored = replace(  # in one order, whichever protocol was asked for last
        whole,
        lines=sorted(whole.lines, key=lambda line: line.measured.protocol),
        unavailable=sorted(whole.unavailable, key=lambda line: line.protocol),
    )
    table = {"id": pa.array(stored.pairs, pa.string()), "output_sha256": pa.array(stored.outputs or [""] * len(stored.pairs), pa.string())}
    for line in stored.lines:
        table[line.name] = pa.array(line.values, pa.float64(), mask=np.isnan(line.values))
    buffer = io.BytesIO()
    pq.write_table(pa.table(table), buffer, compression="zstd")
    write_atomic(folder / PAIRS_FILE, buffer.getvalue())
    write_atomic(folder / METRICS_FILE, _encoded(_as_json(stored)))
    _append_history(evaluation, folder / HISTORY_FILE)
    if not left_out:
        return whole
    again = " ".join(f"--protocol {name}" for name in sorted({*left_out, *evaluation.protocols}))
    before = f"protocol {' and '.join(left_out)} was measured before, on other results; measure it again beside this one: {again}"
    return replace(whole, notes=[*whole.notes, before])


def _with_others(evaluation: Evaluation, folder: Path) -> tuple[Evaluation, list[str]]:
    """The evaluation with what a folder holds of other protocols on the same results, and the protocols that it holds on other results."""
    try:
        earlier = read(folder)
    except RunError:
        return evaluation, []
    others = [name for name in earlier.protocols if name not in evaluation.protocols]
    same = (earlier.pairs, earlier.outputs, set(earlier.unusable)) == (
        list(evaluation.pairs),
        list(evaluation.outputs),
        set(evaluation.unusable),
    )
    if not (others and same):
        return evaluation, others
    lines = [line for line in earlier.lines if line.measured.protocol in others]
    valueless = {pair for line in lines for pair, none in zip(earlier.pairs, np.isnan(line.values).tolist(), strict=True) if none}
    faceless = {pair: reason for pair, reason in earlier.no_face.items() if pair in valueless}
    found = {**evaluation.no_face, **faceless}
    return replace(
        evaluation,
        lines=[*evaluation.lines, *lines],
        unavailable=[*evaluation.unavailable, *(line for line in earlier.unavailable if line.protocol in others)],
        no_face={pair: found[pair] for pair in evaluation.pairs if pair in found},
    ), []


def read(folder: Path) -> Evaluation:
    """The evaluation that `write` left in a folder, its `computed` empty. Raises RunError with the remedy."""
    path = folder / METRICS_FILE
    try:
        found = json.loads(path.read_bytes())
        table = read_parquet((folder / PAIRS_FILE).read_bytes())
        lines = [
            MetricLine(
                measured=Measured(**line["measured"]),
                title=line["title"],
                unit=line["unit"],
                better=line["better"],
                state=line["state"],
                values=table[line["column"]].to_numpy().astype(np.float64),
            )
            for line in found.pop("lines")
        ]
        unavailable = [Unavailable(**line) for line in found.pop("unavailable")]
        pairs, outputs = (table[name].to_pylist() for name in ("id", "output_sha256"))
        return Evaluation(**found, pairs=pairs, outputs=outputs, lines=lines, unavailable=unavailable, computed={})
    except FileNotFoundError:
        raise RunError(f"{folder}: not evaluated yet; run `e4s report` on the run first") from None
    except (ValueError, KeyError, TypeError, OSError, pa.ArrowException):
        raise RunError(f"{path}: damaged, or written by another version of e4s; repeat `e4s report`") from None


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Evaluations in order: time (ISO 8601, UTC), protocols, total, done, failed, left, and by line's name value, low, high, count. A line
    that cannot be read is left out."""
    path = folder / HISTORY_FILE
    history = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            history.append(json.loads(line))
        except ValueError:
            continue
    return history


def _as_json(evaluation: Evaluation) -> dict[str, Any]:
    """All but what happened while computing: the same for the same run."""
    return {
        "run": evaluation.run,
        **_counts(evaluation),
        "notes": list(evaluation.notes),
        "no_face": dict(evaluation.no_face),
        "unusable": dict(evaluation.unusable),
        "lines": [
            {
                "column": line.name,
                "title": line.title,
                "unit": line.unit,
                "better": line.better,
                "measured": asdict(line.measured),
                "state": dict(line.state),
            }
            for line in evaluation.lines
        ],
        "unavailable": [asdict(line) for line in evaluation.unavailable],
    }


def _encoded(data: dict[str, Any]) -> bytes:
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _append_history(evaluation: Evaluation, path: Path) -> None:
    """A line with the evaluation alone, unless the last one under its protocols says the same."""
    sha256, protocols = hashlib.sha256(_encoded(_as_json(evaluation))).hexdigest(), sorted(evaluation.protocols)
    earlier = read_history(path.parent)
    if next((line.get("metrics_sha256") for line in reversed(earlier) if line.get("protocols", protocols) == protocols), "") == sha256:
        return
    values = {line.name: {name: getattr(line.measured, name) for name in ("value", "low", "high", "count")} for line in evaluation.lines}
    time = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"time": time, "protocols": protocols, "metrics_sha256": sha256, **_counts(evaluation), "values": values}
    latest = [*earlier, entry][-HISTORY_LINES:]
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in latest).encode())


def _counts(evaluation: Evaluation) -> dict[str, int]:
    return {"total": evaluation.total, "done": evaluation.done, "failed": evaluation.failed, "left": evaluation.left}
