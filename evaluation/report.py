"""The report page: one self-contained HTML file, and the same in Markdown, from plain data."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from itertools import groupby
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from e4s_models.regions import REGION_COLORS
from evaluation.charts import Point, histogram, number, trend
from evaluation.fid import FULL_RANK
from evaluation.protocols import INTERVAL, PROTOCOLS, Quoted
from evaluation.results import Evaluation, MetricLine, Unavailable

Picture = npt.NDArray[np.uint8]

TILES = ("id_top1", "id_top5", "pose", "expression", "fid", "preserved_lpips")  # metrics that the page opens with, where measured


@dataclass(frozen=True)
class PairPictures:
    """Pictures of one pair by name, in order; which of them are the ones to compare; a value that belongs to them."""

    title: str
    pictures: Mapping[str, Picture]
    main: Sequence[str] = ("source", "target", "result")
    value: str = ""


@dataclass(frozen=True, kw_only=True)
class Extremes:
    """The pairs at both ends of one metric."""

    title: str
    better: str
    best: Sequence[PairPictures]
    worst: Sequence[PairPictures]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Pairs that share a reason."""

    where: str
    reason: str
    pairs: Sequence[str]  # ids


@dataclass(frozen=True, kw_only=True)
class StageRan:
    """One stage as it ran."""

    name: str
    backend: str
    settings: str
    weights: Mapping[str, str]  # name -> sha256


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that the page says."""

    title: str
    summary: Sequence[str]
    notes: Sequence[str] = ()  # what is partial or missing
    as_of: str = ""  # that of them which says when and of how many pairs the numbers are, where these are an earlier report's
    evaluation: Evaluation | None = None
    history: Sequence[Mapping[str, Any]] = ()  # as `evaluation.results.read_history` gives it
    quoted: Sequence[Quoted] = ()
    extremes: Sequence[Extremes] = ()
    failures: Sequence[Failure] = ()
    limits: Sequence[Failure] = ()
    """What limits results that are done: the rows' notes."""
    pairs: Sequence[PairPictures] = ()
    pairs_text: str = ""
    stage_seconds: Mapping[str, tuple[int, float]] = field(default_factory=dict)  # stage -> items computed, seconds
    settings: Mapping[str, str] = field(default_factory=dict)
    stages: Sequence[StageRan] = ()

    @property
    def evaluated(self) -> bool:
        return self.evaluation is not None


def render(report: Report) -> str:
    """The page as HTML text; pictures are embedded in the size they come in (see `thumbnail`)."""
    evaluation = report.evaluation
    lines = evaluation.lines if evaluation else []
    firsts = first_lines(lines)
    quoted = _quoted_tables(report.quoted, lines) if evaluation else []
    contents = {
        "report": report,
        "title": report.title,
        "tiles": [firsts[name] for name in TILES if name in firsts],
        "tables": _tables(evaluation) if evaluation else [],
        "interval_text": INTERVAL,
        "quoted": [table for table in quoted if table["ours"]],
        "other_quoted": [table for table in quoted if not table["ours"]],
        "trends": _trends(report.history, lines),
        "histograms": [_histogram(line) for line in _each_once(lines) if has_spread(line)],
        "total_seconds": sum(seconds for _, seconds in report.stage_seconds.values()),
    }
    shown = {
        "metrics": ("Metrics", contents["tables"]),
        "trend": ("Over time", contents["trends"]),
        "distributions": ("Distributions", contents["histograms"]),
        "pairs": ("Best and worst pairs", report.extremes),
        "failures": ("Failures", True),
        "sheet": ("Contact sheet", report.pairs),
        "time": ("Time per stage", report.stage_seconds),
        "ran": ("What ran", True),
    }
    return render_page("report.html", **contents, sections=[(name, text) for name, (text, there) in shown.items() if there])


def render_page(name: str, **contents: Any) -> str:
    """One of `evaluation/pages` with these contents; everything that is not markup already is escaped."""
    return _pages().get_template(name).render(**contents)


@cache
def _pages() -> Environment:
    pages = Environment(
        loader=PackageLoader("evaluation", "pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters.update(amount=number, embedded=embedded, pairs=plural_pairs, some=some)
    return pages


def markdown(report: Report) -> str:
    """Summary, numbers and failures of the page as Markdown, for where HTML cannot go."""
    parts = [f"# {plain(report.title)}", *map(plain, report.summary), *(f"> {plain(note)}" for note in report.notes)]
    if report.evaluation:
        parts.append(markdown_table(table_rows(report)))
        missing = [f"- {plain(f'{line.metric}, {line.network}: {line.reason}')}" for line in _merged(report.evaluation.unavailable)]
        if missing:
            parts += ["## Not measured", "\n".join(missing)]
    failures = [
        f"- {plural_pairs(len(failure.pairs))}, {plain(failure.where)}: {plain(failure.reason)} ({plain(some(failure.pairs))})"
        for failure in report.failures
    ]
    return "\n\n".join([*parts, "## Failures", "\n".join(failures) if failures else "None."]) + "\n"


def table_rows(report: Report) -> list[dict[str, str]]:
    """The numbers as rows of text by column; none without an evaluation."""
    return [
        {
            "metric": line.title,
            "network": line.measured.network,
            "protocol": line.measured.protocol,
            "value": shown(line),
            "95% interval": spread(line),
            "pairs": str(line.measured.count),
            "better": line.better,
            "sha256": line.measured.sha256[:12],
        }
        for line in (report.evaluation.lines if report.evaluation else ())
    ]


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of one set of columns as a Markdown table; "" without rows."""
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([plain(cell) for cell in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -- words and numbers -------------------------------------------------------------------------------------------------------------------


def headline(evaluation: Evaluation, sources: int) -> str:
    """The numbers that matter first, in one sentence; "" where there are none. `sources`: distinct ones among the pairs."""
    said = []
    firsts = first_lines(evaluation.lines)
    if top := firsts.get("id_top1"):
        value, around = top.measured.value or 0.0, _around(top, 100, "%")
        said.append(f"{100 * value:.0f}% of the results find their own source first among {sources}{around}, by {top.measured.network}")
    for name, words in (("pose", "pose is {} off the target's"), ("expression", "expression {}"), ("fid", "FID {}")):
        if line := firsts.get(name):
            said.append(words.format(shown(line)) + _around(line))
            if name == "fid" and line.measured.count < FULL_RANK:
                said[-1] += f" of {plural_pairs(line.measured.count)} (compare with as many only)"
    if not said:
        return ""
    sentence = "; ".join(said)
    return sentence[0].upper() + sentence[1:] + "."


def shown(line: MetricLine) -> str:
    """A line's number with its unit: 3.21°, 41.2 dB, 0.45; "none" without one."""
    value = line.measured.value
    return "none" if value is None else with_unit(value, line.unit)


def with_unit(value: float, unit: str) -> str:
    """3.21 degrees -> 3.21°; units that are only names of a kind (share, cosine) are left out."""
    return number(value) + {"degrees": "°", "dB": " dB", "%": " %"}.get(unit, "")


def spread(line: MetricLine) -> str:
    """A line's interval, or why it has none."""
    low, high = line.measured.low, line.measured.high
    return f"none: {line.measured.reason}" if low is None or high is None else f"{number(low)} to {number(high)}"


def _around(line: MetricLine, scale: float = 1, unit: str = "") -> str:
    low, high = line.measured.low, line.measured.high
    if low is None or high is None:
        return ""
    ends = (f"{scale * low:.0f}", f"{scale * high:.0f}") if unit else (number(low), number(high))
    return f" (95% interval {ends[0]} to {ends[1]}{unit})"


def first_lines(lines: Sequence[MetricLine]) -> dict[str, MetricLine]:
    """The first line of each metric that has a value: that of its protocol's first network."""
    firsts: dict[str, MetricLine] = {}
    for line in lines:
        if line.measured.value is not None:
            firsts.setdefault(line.measured.metric, line)
    return firsts


def _each_once(lines: Sequence[MetricLine]) -> list[MetricLine]:
    """Without what the same network measured under another protocol, too."""
    return list({(line.measured.metric, line.measured.network): line for line in reversed(lines)}.values())[::-1]


def has_spread(line: MetricLine) -> bool:
    """Whether pairs differ in a way worth a picture: not for a share (pairs are 0 or 1), not for a number of the whole set."""
    values = finite(line.values)
    return line.unit != "share" and len(values) > 1 and bool(np.ptp(values) > 1e-9 * max(abs(values).max(), 1e-300))


def finite(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The values without NaN."""
    return values[np.isfinite(values)]


def extreme_rows(line: MetricLine, count: int = 3) -> tuple[list[int], list[int]]:
    """Rows of the best and of the worst pairs, best first and worst first; no pair stands in both, equal ones keep their order."""
    rows = np.flatnonzero(np.isfinite(line.values))
    order = rows[np.argsort(line.values[rows] * (-1 if line.better == "higher" else 1), kind="stable")].tolist()
    best = min(count, math.ceil(len(order) / 2))
    worst = min(count, len(order) // 2)
    return order[:best], order[::-1][:worst]


def plural_pairs(count: int) -> str:
    """1 pair, 2 pairs."""
    return f"{count} pair" if count == 1 else f"{count} pairs"


def some(ids: Sequence[str], most: int = 12) -> str:
    """The first ids, and how many more there are."""
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")


def plain(text: str) -> str:
    """Text that no Markdown reader takes for markup."""
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


# -- parts of the page -------------------------------------------------------------------------------------------------------------------


def _tables(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One table per protocol: its lines, what could not be measured, and what must be stated below."""
    tables = []
    named = [line.measured.protocol for line in evaluation.lines] + [line.protocol for line in evaluation.unavailable]
    for name in dict.fromkeys(named):
        lines = [line for line in evaluation.lines if line.measured.protocol == name]
        protocol = PROTOCOLS.get(name)
        noted = {reason: None for line in lines if line.measured.value is not None for reason in [line.measured.reason] if reason}
        tables.append(
            {
                "name": name,
                "source": protocol.source if protocol else "a protocol that this version does not know",
                "sample": protocol.sample if protocol else "not known",
                "groups": [list(group) for _, group in groupby(lines, lambda line: (line.title, line.better))],
                "unavailable": _merged([line for line in evaluation.unavailable if line.protocol == name]),
                "networks": list({line.state["network"]: line.state for line in lines}.values()),
                "formulas": list({line.title: line.state["formula"] for line in lines}.items()),
                "reasons": [f"No interval: {reason}." for reason in noted],
            }
        )
    return tables


def _merged(lines: Sequence[Unavailable]) -> list[Unavailable]:
    """Metrics that lack the same network for the same reason in one row."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for line in lines:
        grouped.setdefault((line.protocol, line.network, line.reason), []).append(line.metric)
    return [
        Unavailable(protocol=protocol, metric=", ".join(metrics), network=network, reason=reason)
        for (protocol, network, reason), metrics in grouped.items()
    ]


def _quoted_tables(rows: Sequence[Quoted], lines: Sequence[MetricLine]) -> list[dict[str, Any]]:
    """The paper's tables with this run's own numbers on top, a row per protocol (of each metric's first network); printed decimals."""
    tables = []
    protocols = dict.fromkeys(line.measured.protocol for line in lines)
    firsts = {name: first_lines([line for line in lines if line.measured.protocol == name]) for name in protocols}
    for name in dict.fromkeys(row.table for row in rows):
        mine = [row for row in rows if row.table == name]
        metrics = list(mine[0].values)
        decimals = {metric: max(len(repr(row.values[metric]).partition(".")[2]) for row in mine) for metric in metrics}
        tables.append(
            {
                "table": name,
                "title": mine[0].title,
                "titles": [_short_title(metric) for metric in metrics],
                "ours": [row for name in protocols if (row := _own_row(name, [firsts[name].get(metric) for metric in metrics]))],
                "rows": [(row.method, [f"{row.values[metric]:.{decimals[metric]}f}" for metric in metrics]) for row in mine],
            }
        )
    return tables


def _own_row(protocol: str, lines: Sequence[MetricLine | None]) -> tuple[str, list[float | None]] | None:
    """Protocol with networks, and the numbers that may stand above the paper's; None without any.

    An expression distance on another network's coefficients has another scale and stays away.
    """
    fitting = [line if line and (line.measured.metric != "expression" or protocol == "paper") else None for line in lines]
    networks = dict.fromkeys(line.measured.network for line in fitting if line)
    return (f"{protocol}: {', '.join(networks)}", [line.measured.value if line else None for line in fitting]) if networks else None


def _short_title(metric: str) -> str:
    from evaluation.metrics import METRICS

    return METRICS[metric].title if metric in METRICS else metric


def _histogram(line: MetricLine) -> dict[str, Any]:
    values, measured = finite(line.values), line.measured
    mean = float(values.mean())
    interval = None if measured.low is None or measured.high is None else (measured.low, measured.high)
    low, quarter, middle, three, high = np.percentile(values, [0, 25, 50, 75, 100]).tolist()
    said = (
        f"{line.title}, {measured.network}: {plural_pairs(len(values))} from {number(low)} to {number(high)}, "
        f"median {number(middle)}, middle half {number(quarter)} to {number(three)}"
    )
    chart = histogram(values, label=axis_label(line), mean=mean, interval=interval, spoken=f"{said}, mean {number(mean)}")
    return {"svg": chart, "caption": said}


def axis_label(line: MetricLine) -> str:
    """What an axis of this line's values says."""
    return f"{line.title}{', ' + line.unit if line.unit and line.unit != 'cosine' else ''} ({line.measured.network})"


def _trends(history: Sequence[Mapping[str, Any]], lines: Sequence[MetricLine]) -> list[dict[str, Any]]:
    """A chart for each metric's first line that was measured more than once."""
    charts = []
    for line in first_lines(lines).values():
        points, counts = [], []
        for entry in history:
            found = entry.get("values", {}).get(line.name)
            if found and found["value"] is not None:
                points.append(Point(datetime.fromisoformat(entry["time"]), found["value"], found["low"], found["high"]))
                counts.append(found["count"])
        if len({point.time for point in points}) > 1:
            first, last = points[0], points[-1]
            said = (
                f"{line.title}, {line.measured.network}: from {number(first.value)} ({plural_pairs(counts[0])}) "
                f"to {number(last.value)} ({plural_pairs(counts[-1])})"
            )
            charts.append({"svg": trend(points, label=axis_label(line), spoken=said), "caption": said})
    return charts


# -- pictures ----------------------------------------------------------------------------------------------------------------------------


def show_regions(regions: Picture) -> Picture:
    """Label map (H, W) uint8 -> RGB (H, W, 3) uint8."""
    return np.asarray(REGION_COLORS[np.minimum(regions, len(REGION_COLORS) - 1)])


def embedded(picture: Picture) -> Markup:
    """RGB (H, W, 3) uint8 -> a data URL, WebP."""
    done, data = cv2.imencode(".webp", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_WEBP_QUALITY, 82])
    if not done:
        raise ValueError(f"OpenCV could not encode a {picture.shape} picture")
    return Markup("data:image/webp;base64,") + base64.b64encode(data.tobytes()).decode()


def thumbnail(picture: Picture, side: int = 224) -> Picture:
    """RGB (H, W, 3) -> longest side `side` px, with antialiasing."""
    scale = side / max(picture.shape[:2])
    size = (max(round(picture.shape[1] * scale), 1), max(round(picture.shape[0] * scale), 1))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR), dtype=np.uint8)
