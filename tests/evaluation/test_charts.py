"""Charts are valid SVG, say the same in words, and keep what they are given in bounds."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from xml.etree import ElementTree

import numpy as np
import pytest

from evaluation.charts import HEIGHT, LEFT, WIDTH, Point, bins, histogram, number, ticks, trend, whisker

HOSTILE = '<script>alert("1")</script> & more'


def numbers(root: ElementTree.Element, tag: str, name: str) -> list[float]:
    return [float(element.attrib[name]) for element in root.iter(tag)]


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 10) == [0, 5, 10]
    assert ticks(0.12, 0.61) == [0.2, 0.4, 0.6]
    assert ticks(-3, 3, 3) == [-2, 0, 2]
    assert ticks(1.3, 2.7, 2) == [1.5, 2, 2.5]  # steps of 1 would leave one
    with pytest.raises(ValueError, match="low < high, got 1 and 1"):
        ticks(1, 1)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.12345, "0.123"), (12.345, "12.3"), (1234.5, "1234"), (-0.00112, "-0.00112"), (120, "120")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_every_value_is_in_one_bin() -> None:
    for values in (np.array([0.0, 1.0]), np.random.Generator(np.random.PCG64(0)).standard_normal(500), np.r_[np.zeros(499), 100.0]):
        counts, edges = bins(values)
        assert counts.sum() == len(values)
        assert 5 <= len(counts) == len(edges) - 1 <= 24


def test_a_histogram_stands_inside_its_frame_and_says_what_it_shows() -> None:
    values = np.random.Generator(np.random.PCG64(0)).gamma(2, 3, 500)
    low, high = float(values.mean()) - 0.3, float(values.mean()) + 0.3
    svg = histogram(values, label=HOSTILE, mean=float(values.mean()), interval=(low, high), spoken=f"{HOSTILE}: 500 pairs")
    root = ElementTree.fromstring(svg)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == f"{HOSTILE}: 500 pairs"
    assert "<script" not in svg
    bars = [element for element in root.iter("rect") if element.attrib["class"] == "bar"]
    counts = [int(re.findall(r": (\d+) pair", element[0].text or "")[0]) for element in bars]
    assert sum(counts) == 500
    heights = [float(element.attrib["height"]) for element in bars]
    assert heights[counts.index(max(counts))] == max(heights)
    assert heights[0] / heights[1] == pytest.approx(counts[0] / counts[1], rel=0.01)
    assert min(numbers(root, "rect", "x")) >= LEFT
    assert max(float(e.attrib["x"]) + float(e.attrib["width"]) for e in root.iter("rect")) <= WIDTH
    assert HOSTILE in [element.text for element in root.iter("text")]


def test_a_trend_runs_true_to_time() -> None:
    times = [datetime(2026, 11, day, tzinfo=UTC) for day in (1, 2, 4)]
    points = [Point(times[0], 1.0, 0.8, 1.2), Point(times[1], 2.0), Point(times[2], 1.5, 1.4, 1.6)]
    root = ElementTree.fromstring(trend(points, label="pose, degrees", spoken="pose over time"))
    x, y = numbers(root, "circle", "cx"), numbers(root, "circle", "cy")
    assert (x[1] - x[0]) * 2 == pytest.approx(x[2] - x[1], abs=0.1)
    assert y[1] < y[2] < y[0]
    assert all(0 < value < HEIGHT for value in y)
    assert "2026-11-01 00:00" in [element.text for element in root.iter("text")]
    assert len(list(root.iter("polygon"))) == 1


def test_a_trend_without_change_is_a_flat_line() -> None:
    points = [Point(datetime(2026, 11, day, tzinfo=UTC), 0.0) for day in (1, 2)]
    assert len(set(numbers(ElementTree.fromstring(trend(points, label="", spoken="")), "circle", "cy"))) == 1


def test_a_whisker_has_zero_in_the_middle() -> None:
    root = ElementTree.fromstring(whisker(0.5, (-0.5, 1.5), spoken="pose"))
    axis, bar = next(iter(root.iter("line"))), list(root.iter("line"))[1]
    assert float(axis.attrib["x1"]) == 70
    assert float(bar.attrib["x1"]) < 70 < float(next(root.iter("circle")).attrib["cx"]) < float(bar.attrib["x2"])
    assert ElementTree.fromstring(whisker(0.0, (0.0, 0.0), spoken="no change")) is not None
