"""Small SVG charts for the report: histogram, trend, curves, timeline, whisker. Plain data in, inline SVG out.

Colours and fonts are the page's (classes).

Colours carry nothing alone: bars, lines and bands differ in shape as well, and every chart has its numbers as text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

Float64 = npt.NDArray[np.float64]

WIDTH, HEIGHT = 340, 178  # viewBox units; the page scales them
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 20, 40  # margins around the plot
MIN_BINS, MAX_BINS = 5, 24


@dataclass(frozen=True)
class Point:
    """One number of a trend."""

    time: datetime
    value: float
    low: float | None = None  # of the interval
    high: float | None = None


@dataclass(frozen=True, eq=False)
class Series:
    """A number over time, one of several in a chart."""

    name: str
    x: Float64  # (n,) s, ascending
    y: Float64  # (n,), NaN leaves a gap


@dataclass(frozen=True)
class _Axis:
    """From data to viewBox units along one direction."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers within [low, high], about so many and at least two: steps of 1, 2 or 5 times a power of ten."""
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"expected finite low < high, got {low} and {high}")
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)] if last > first else ticks(low, high, about * 2)


def number(value: float) -> str:
    """Three significant digits, no exponent for what a person reads: 0.123, 12.3, 1230, 0.00012."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def bins(values: Float64) -> tuple[npt.NDArray[np.int64], Float64]:
    """Counts (K,) and edges (K + 1,): Freedman and Diaconis's width or Sturges's, within 5 to 24 bins. Values must differ."""
    edges = np.histogram_bin_edges(values, "auto")
    if not MIN_BINS <= len(edges) - 1 <= MAX_BINS:
        edges = np.linspace(values.min(), values.max(), min(max(len(edges) - 1, MIN_BINS), MAX_BINS) + 1)
    counts, edges = np.histogram(values, edges)
    return counts, edges


def histogram(values: Float64, *, label: str, mean: float, interval: tuple[float, float] | None, spoken: str) -> Markup:
    """Distribution of finite values (N,) that are not all equal; the mean as a line, its interval as a band.

    `label` stands under the axis (what and in which unit), `spoken` is what a screen reader says.
    """
    counts, edges = bins(values)
    x = _Axis(float(edges[0]), float(edges[-1]), LEFT, WIDTH - RIGHT)
    y = _Axis(0, float(counts.max()) * 1.05, HEIGHT - BOTTOM, TOP)
    parts = [_y_axis(y, [tick for tick in ticks(0, y.high, 3) if tick == int(tick)], "pairs")]
    if interval:
        low, high = (min(max(value, x.low), x.high) for value in interval)
        band = Markup('<rect class="band" x="{}" y="{}" width="{:.2f}" height="{}"/>')
        parts.append(band.format(x(low), TOP, max(x(high) - x(low), 1), HEIGHT - TOP - BOTTOM))
    for count, left, right in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if count:
            width = max(x(right) - x(left) - 1, 1)
            bar = Markup('<rect class="bar" x="{}" y="{}" width="{:.2f}" height="{:.2f}"><title>{} to {}: {}</title></rect>')
            parts.append(bar.format(x(left) + 0.5, y(count), width, y(0) - y(count), number(left), number(right), _pairs(count)))
    at = x(min(max(mean, x.low), x.high))
    parts.append(Markup('<line class="mean" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(at, TOP, HEIGHT - BOTTOM))
    parts.append(_text("mean " + number(mean), min(max(at, LEFT + 26), WIDTH - RIGHT - 30), TOP - 6, "middle", "strong"))
    parts.append(_x_axis(x, [(tick, f"{tick:g}") for tick in ticks(x.low, x.high)], label))
    return _svg(parts, spoken)


def trend(points: Sequence[Point], *, label: str, spoken: str) -> Markup:
    """A number over time, its interval as a band. At least two points of different times; time runs true to scale."""
    moments = [point.time.timestamp() for point in points]
    ends = [value for point in points for value in (point.value, point.low, point.high) if value is not None]
    room = (max(ends) - min(ends)) * 0.08 or abs(max(ends)) * 0.05 or 1.0
    x = _Axis(min(moments), max(moments), LEFT + 6, WIDTH - RIGHT - 6)
    y = _Axis(min(ends) - room, max(ends) + room, HEIGHT - BOTTOM, TOP)
    parts = [_y_axis(y, ticks(y.low, y.high, 3), "")]
    known = [(x(moment), point) for moment, point in zip(moments, points, strict=True)]
    banded = [(at, point.low, point.high) for at, point in known if point.low is not None and point.high is not None]
    if len(banded) > 1:
        outline = [f"{at},{y(high)}" for at, _, high in banded] + [f"{at},{y(low)}" for at, low, _ in reversed(banded)]
        parts.append(Markup('<polygon class="band" points="{}"/>').format(" ".join(outline)))
    parts.append(Markup('<polyline class="line" points="{}"/>').format(" ".join(f"{at},{y(point.value)}" for at, point in known)))
    for at, point in known:
        dot = Markup('<circle class="dot" cx="{}" cy="{}" r="3"><title>{}: {}</title></circle>')
        parts.append(dot.format(at, y(point.value), _moment(point.time), number(point.value)))
    parts.append(_text(number(points[-1].value), WIDTH - RIGHT, TOP - 6, "end", "strong"))
    parts.append(_text(_moment(points[0].time), LEFT, HEIGHT - BOTTOM + 14, "start"))
    parts.append(_text(_moment(points[-1].time), WIDTH - RIGHT, HEIGHT - BOTTOM + 14, "end"))
    parts.append(_text(label, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "middle", "label"))
    parts.append(Markup('<line class="axis" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM))
    return _svg(parts, spoken)


def curves(series: Sequence[Series], span: tuple[float, float], *, label: str, spoken: str, from_zero: bool = False) -> Markup:
    """Two or three numbers over the same `span` of seconds, each drawn in its own stroke. At least one value must be finite."""
    values = np.concatenate([one.y[np.isfinite(one.y)] for one in series])
    low, high = (0.0 if from_zero else float(values.min())), float(values.max())
    room = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    x = _Axis(span[0], max(span[1], span[0] + 1e-3), LEFT, WIDTH - RIGHT)
    y = _Axis(low if from_zero else low - room, high + room, HEIGHT - BOTTOM, TOP)
    parts = [_y_axis(y, ticks(y.low, y.high, 3), "")]
    width = (WIDTH - LEFT - RIGHT) / len(series)
    for one, stroke, place in zip(series, ("line", "line other", "line third"), range(len(series)), strict=False):
        known = np.flatnonzero(np.isfinite(one.y))
        for run in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1):
            points = " ".join(f"{x(at)},{y(value)}" for at, value in zip(one.x[run].tolist(), one.y[run].tolist(), strict=True))
            parts.append(Markup('<polyline class="thin {}" points="{}"/>').format(stroke, points))
        at = LEFT + place * width
        parts.append(Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(stroke, at, at + 20, TOP - 10, TOP - 10))
        parts.append(_text(one.name, at + 25, TOP - 6, "start", "label"))
    parts.append(_x_axis(x, [(tick, f"{tick:g}") for tick in ticks(x.low, x.high)], label))
    return _svg(parts, spoken)


def timeline(spans: Sequence[tuple[str, float, float]], *, spoken: str) -> Markup:
    """Which stretches of time are of which kind: (kind, from, to) in s, ascending. The kind is the bar's class and decides its height."""
    x = _Axis(spans[0][1], max(spans[-1][2], spans[0][1] + 1e-3), 0, 2 * WIDTH)
    heights = {"swapped": 10, "passed": 4}
    parts = []
    for kind, start, end in spans:
        height = heights.get(kind, 16)
        bar = Markup('<rect class="{}" x="{}" y="{}" width="{:.2f}" height="{}"><title>{}: {:.2f} to {:.2f} s</title></rect>')
        parts.append(bar.format(kind, x(start), 16 - height, max(x(end) - x(start), 0.5), height, kind, start, end))
    return _svg(parts, spoken, 2 * WIDTH, 16)


def whisker(delta: float, interval: tuple[float, float], *, spoken: str) -> Markup:
    """A difference and its interval against zero, on a scale of its own: zero in the middle."""
    reach = max(map(abs, (delta, *interval))) * 1.1 or 1.0
    x = _Axis(-reach, reach, 4, 136)
    low, high = map(x, interval)
    parts = [
        Markup('<line class="axis" x1="70" x2="70" y1="1" y2="21"/>'),
        Markup('<line class="line" x1="{}" x2="{}" y1="11" y2="11"/>').format(low, high),
        *(Markup('<line class="line" x1="{0}" x2="{0}" y1="6" y2="16"/>').format(end) for end in (low, high)),
        Markup('<circle class="dot" cx="{}" cy="11" r="4"/>').format(x(delta)),
    ]
    return _svg(parts, spoken, 140, 22)


def _y_axis(y: _Axis, marks: Sequence[float], label: str) -> Markup:
    lines = [Markup('<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(LEFT, WIDTH - RIGHT, y(mark)) for mark in marks]
    names = [_text(f"{mark:g}", LEFT - 5, y(mark) + 3.5, "end") for mark in marks]
    return Markup("").join([*lines, *names, *([_text(label, 4, TOP - 6, "start", "label")] if label else [])])


def _x_axis(x: _Axis, marks: Sequence[tuple[float, str]], label: str) -> Markup:
    bottom = HEIGHT - BOTTOM
    parts = [Markup('<line class="axis" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(LEFT, WIDTH - RIGHT, bottom)]
    for mark, name in marks:
        parts.append(Markup('<line class="axis" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(x(mark), bottom, bottom + 4))
        parts.append(_text(name, x(mark), bottom + 15, "middle"))
    parts.append(_text(label, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "middle", "label"))
    return Markup("").join(parts)


def _text(content: str, x: float, y: float, anchor: str, kind: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, content)


def _moment(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M}"


def _pairs(count: int) -> str:
    return f"{count} pair" if count == 1 else f"{count} pairs"


def _svg(parts: Sequence[Markup], spoken: str, width: int = WIDTH, height: int = HEIGHT) -> Markup:
    head = Markup('<svg class="chart" role="img" viewBox="0 0 {} {}" aria-label="{}">').format(width, height, spoken)
    return head + Markup("").join(parts) + Markup("</svg>")
