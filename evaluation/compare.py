"""Two evaluations against each other: B minus A over the pairs that both have, pair by pair."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from evaluation.bootstrap import LEVEL, MIN_SAMPLE, RESAMPLES, SEED, interval_or_reason
from evaluation.charts import number, whisker
from evaluation.metrics import OF_SET
from evaluation.report import PairPictures, markdown_table, plain, plural_pairs, render_page, with_unit
from evaluation.results import Evaluation, MetricLine

Float64 = npt.NDArray[np.float64]

PAIRED_INTERVAL = (
    f"{LEVEL:.0%} percentile bootstrap of the mean of the pairs' differences, {RESAMPLES} resamples, PCG64 seed {SEED}; "
    f"none for fewer than {MIN_SAMPLE} pairs or equal differences"
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of B minus that of A."""

    metric: str
    protocol: str
    network: str
    title: str
    unit: str
    better: str
    state: Mapping[str, str]  # as in both
    a: float
    b: float
    delta: float
    low: float | None  # of the interval of delta
    high: float | None
    count: int  # of the pairs in it
    reason: str  # why there is no interval
    deltas: Float64  # (N,) by matched pair, NaN where either has no value

    @property
    def verdict(self) -> str:
        """What the interval says: B better, B worse, no clear difference; equal where no pair differs; "" without an interval."""
        known = self.deltas[np.isfinite(self.deltas)]
        if len(known) and not known.any():
            return "equal"
        if self.low is None or self.high is None:
            return ""
        if self.low <= 0 <= self.high:
            return "no clear difference"
        return "B better" if (self.low > 0) == (self.better == "higher") else "B worse"

    @property
    def so(self) -> str:
        """The verdict, or why there is none."""
        return self.verdict or f"no interval: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class NotCompared:
    """A line that stands in either evaluation and was not compared, and one sentence why."""

    metric: str
    protocol: str
    network: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What differs between the two runs."""

    name: str
    a: str
    b: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """B against A."""

    a: str  # names of the run folders
    b: str
    pairs: Sequence[tuple[str, str]]  # ids in A and in B of the matched pairs, (N,)
    differences: Sequence[Difference]
    not_compared: Sequence[NotCompared]
    settings: Sequence[Setting]
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Changed:
    """The pairs that changed most in one metric."""

    title: str
    better: str
    pairs: Sequence[PairPictures]


def compare(a: Evaluation, b: Evaluation, pairs: Sequence[tuple[str, str]]) -> tuple[list[Difference], list[NotCompared]]:
    """Differences over matched pairs (ids in A and in B). Only lines of one protocol, network, digest, crop and formula are compared.

    Numbers that hang on the whole set (retrieval, FID) are compared only where both sets are the matched pairs and nothing else:
    evaluate both runs on these pairs first.
    """
    in_a, in_b = _by_key(a), _by_key(b)
    differences, not_compared = [], []
    for key in dict.fromkeys([*in_b, *in_a]):
        reason = _obstacle(in_a.get(key), in_b.get(key), a, b, key)
        if not reason:
            found = _difference(in_a[key], in_b[key], a, b, pairs)
            if isinstance(found, Difference):
                differences.append(found)
                continue
            reason = found
        metric, network, protocol = key
        not_compared.append(NotCompared(metric=metric, protocol=protocol, network=network, reason=reason))
    return differences, not_compared


def _by_key(evaluation: Evaluation) -> dict[tuple[str, str, str], MetricLine]:
    return {(line.measured.metric, line.measured.network, line.measured.protocol): line for line in evaluation.lines}


def _obstacle(a: MetricLine | None, b: MetricLine | None, run_a: Evaluation, run_b: Evaluation, key: tuple[str, str, str]) -> str:
    """Why two lines must not be compared, "" if they may."""
    _, network, protocol = key
    if a is None or b is None:
        has, lacks = (run_b, run_a) if a is None else (run_a, run_b)
        return f"{has.run} was measured with {network} under protocol {protocol}, {lacks.run} was not; evaluate both under one protocol"
    for name in dict.fromkeys([*a.state, *b.state]):
        said = [str(line.state.get(name, "not stated")) for line in (a, b)]
        if said[0] != said[1]:
            said = [text[:12] for text in said] if name == "sha256" else said
            return f"{network}'s {name} differs: {said[0]} for {run_a.run}, {said[1]} for {run_b.run}; evaluate both on one machine"
    return ""


def _difference(a: MetricLine, b: MetricLine, run_a: Evaluation, run_b: Evaluation, pairs: Sequence[tuple[str, str]]) -> Difference | str:
    of_set = not (np.isfinite(a.values).any() or np.isfinite(b.values).any())
    if of_set or a.unit == "share":
        matched = [set(side) for side in zip(*pairs, strict=True)] or [set(), set()]
        if matched != [set(run_a.pairs), set(run_b.pairs)]:
            return (
                f"it hangs on the whole set of pairs, and the sets differ: {len(run_a.pairs)} in {run_a.run}, {len(run_b.pairs)} in "
                f"{run_b.run}, {len(pairs)} in both"
            )
    rows_a, rows_b = ({pair: row for row, pair in enumerate(run.pairs)} for run in (run_a, run_b))
    values_a = np.array([a.values[rows_a[pair]] for pair, _ in pairs], np.float64)
    values_b = np.array([b.values[rows_b[pair]] for _, pair in pairs], np.float64)
    deltas = values_b - values_a
    both = np.isfinite(deltas)
    if of_set:
        for run, line in ((run_a, a), (run_b, b)):
            if line.measured.value is None:
                return f"{run.run} has no value: {line.measured.reason}"
        mean_a, mean_b = a.measured.value or 0.0, b.measured.value or 0.0
        interval, reason, count = None, OF_SET, min(a.measured.count, b.measured.count)
    elif not both.any():
        return "no pair has a value in both runs"
    else:
        mean_a, mean_b = float(values_a[both].mean()), float(values_b[both].mean())
        (interval, reason), count = interval_or_reason(deltas[both], "difference"), int(both.sum())
    low, high = interval or (None, None)
    measured = b.measured
    return Difference(
        metric=measured.metric,
        protocol=measured.protocol,
        network=measured.network,
        title=b.title,
        unit=b.unit,
        better=b.better,
        state=b.state,
        a=mean_a,
        b=mean_b,
        delta=mean_b - mean_a,
        low=low,
        high=high,
        count=count,
        reason=reason,
        deltas=deltas,
    )


def changed_rows(difference: Difference, count: int = 3) -> list[int]:
    """Rows of the matched pairs that changed most, either way; those that did not change are left out."""
    moved = np.flatnonzero(np.nan_to_num(np.abs(difference.deltas)) > 0)
    order: list[int] = moved[np.argsort(-np.abs(difference.deltas[moved]), kind="stable")].tolist()
    return order[:count]


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Setting]:
    """Leaves of two nested mappings that differ, by dotted name; a missing one is shown as "-"."""
    flat_a, flat_b = _flat(a), _flat(b)
    names = dict.fromkeys([*flat_a, *flat_b])
    return [
        Setting(name=name, a=flat_a.get(name, "-"), b=flat_b.get(name, "-"))
        for name in names
        if flat_a.get(name, "-") != flat_b.get(name, "-")
    ]


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        return {key: text for part, inner in value.items() for key, text in _flat(inner, f"{name}.{part}" if name else str(part)).items()}
    return {name: str(value)}


def as_json(comparison: Comparison) -> bytes:
    """The comparison as JSON: numbers, what was not compared, settings, and every pair's differences."""
    differences = []
    for found in comparison.differences:
        plain = {name: getattr(found, name) for name in found.__dataclass_fields__ if name not in ("deltas", "state")}
        deltas = [None if np.isnan(delta) else delta for delta in found.deltas.tolist()]
        differences.append({**plain, "state": dict(found.state), "verdict": found.verdict, "deltas": deltas})
    data = {
        "a": comparison.a,
        "b": comparison.b,
        "interval": PAIRED_INTERVAL,
        "pairs": [list(pair) for pair in comparison.pairs],
        "differences": differences,
        "not_compared": [asdict(line) for line in comparison.not_compared],
        "settings": [asdict(setting) for setting in comparison.settings],
        "notes": list(comparison.notes),
    }
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def comparison_rows(comparison: Comparison) -> list[dict[str, str]]:
    """The differences as rows of text by column, what was not compared below."""
    rows = [
        {
            "metric": found.title,
            "network": found.network,
            "protocol": found.protocol,
            "A": with_unit(found.a, found.unit),
            "B": with_unit(found.b, found.unit),
            "B minus A": with_unit(found.delta, found.unit),
            "95% interval": "none" if found.low is None or found.high is None else f"{number(found.low)} to {number(found.high)}",
            "pairs": str(found.count),
            "so": found.so,
        }
        for found in comparison.differences
    ]
    without = dict.fromkeys(("A", "B", "B minus A", "95% interval", "pairs"), "")
    return rows + [
        {"metric": line.metric, "network": line.network, "protocol": line.protocol, **without, "so": f"not compared: {line.reason}"}
        for line in comparison.not_compared
    ]


def comparison_markdown(comparison: Comparison) -> str:
    """The page in Markdown, for where HTML cannot go."""
    title = plain(f"{comparison.b} against {comparison.a}")
    settings = [{"setting": setting.name, "A": setting.a, "B": setting.b} for setting in comparison.settings]
    parts = [
        f"# {title}",
        *map(plain, summary(comparison)),
        *(f"> {plain(note)}" for note in comparison.notes),
        f"A is {plain(comparison.a)}, B is {plain(comparison.b)}.",
        markdown_table(comparison_rows(comparison)),
        "## What differs in the runs",
        markdown_table(settings) or "Nothing.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def summary(comparison: Comparison) -> list[str]:
    """What the page opens with."""
    sentences = [f"{plural_pairs(len(comparison.pairs))} in both runs; a difference is {comparison.b} minus {comparison.a}."]
    for verdict, words in (("B better", "better"), ("B worse", "worse")):
        found = [
            f"{line.title} ({line.network}) by {with_unit(abs(line.delta), line.unit)}"
            for line in comparison.differences
            if line.verdict == verdict
        ]
        if found:
            sentences.append(f"{comparison.b} is {words} in {', '.join(found)}.")
    unclear = sum(line.verdict == "no clear difference" for line in comparison.differences)
    if unclear:
        sentences.append(f"No clear difference in {_lines(unclear)}: the interval of the difference holds zero.")
    without = Counter(line.reason for line in comparison.differences if not line.verdict and line.reason != OF_SET)
    sentences += [f"No verdict on {_lines(count)}: {reason}." for reason, count in without.items()]
    if comparison.not_compared:
        are = "is" if len(comparison.not_compared) == 1 else "are"
        sentences.append(f"{_lines(len(comparison.not_compared))} {are} not compared: {comparison.not_compared[0].reason}.")
    return sentences


def _lines(count: int) -> str:
    return "1 line" if count == 1 else f"{count} lines"


def render_comparison(comparison: Comparison, changed: Sequence[Changed]) -> str:
    """The page as HTML text."""
    rows = []
    for found in comparison.differences:
        interval = None if found.low is None or found.high is None else (found.low, found.high)
        around = f", 95% interval {number(interval[0])} to {number(interval[1])}" if interval else ""
        spoken = f"{found.title}, {found.network}: difference {number(found.delta)}{around}"
        rows.append({"line": found, "whisker": whisker(found.delta, interval, spoken=spoken) if interval else ""})
    return render_page(
        "comparison.html",
        title=f"{comparison.b} against {comparison.a}",
        comparison=comparison,
        summary=summary(comparison),
        rows=rows,
        networks=list({(found.network, found.protocol): found for found in comparison.differences}.values()),
        interval_text=PAIRED_INTERVAL,
        changed=changed,
    )
