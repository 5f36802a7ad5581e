"""Two evaluations against each other: by hand, against scipy, and what must not be compared."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats
from made import evaluation, line, restated

from evaluation.bootstrap import RESAMPLES, SEED
from evaluation.compare import (
    Changed,
    Comparison,
    Setting,
    as_json,
    changed_rows,
    compare,
    comparison_markdown,
    comparison_rows,
    differing,
    render_comparison,
    summary,
)
from evaluation.report import PairPictures
from evaluation.results import Evaluation

HOSTILE = '"><script>alert(1)</script>'
SAME = [(name, name) for name in "abcd"]


def both(a: Evaluation, b: Evaluation, pairs: list[tuple[str, str]] = SAME) -> Comparison:
    differences, not_compared = compare(a, b, pairs)
    return Comparison(a=a.run, b=b.run, pairs=pairs, differences=differences, not_compared=not_compared, settings=[])


def test_by_hand() -> None:
    """Ids differ, B has another order, each lacks a value: only the two pairs with a value in both count."""
    a = evaluation([line("pose", [1.0, 2.0, None, 9.0])], ["a", "b", "c", "d"], "A")
    b = evaluation([line("pose", [5.0, None, 4.0, 3.0])], ["w", "x", "y", "z"], "B")
    [found] = both(a, b, [("a", "z"), ("b", "y"), ("c", "w"), ("d", "x")]).differences
    np.testing.assert_array_equal(found.deltas, [2.0, 2.0, np.nan, np.nan])
    assert (found.a, found.b, found.delta, found.count) == (1.5, 3.5, 2.0, 2)
    assert (found.low, found.high) == (None, None)
    assert (found.reason, found.verdict) == ("2 pairs are too few (at least 10)", "")


@pytest.mark.parametrize(("shift", "verdict"), [(0.5, "B better"), (-0.5, "B worse"), (0.0, "no clear difference")])
def test_interval_equals_scipy_on_pairs(shift: float, verdict: str) -> None:
    random = np.random.Generator(np.random.PCG64(5))
    before = random.standard_normal(60)
    after = before + shift + random.standard_normal(60) * 0.3
    ids = [str(index) for index in range(60)]
    a, b = evaluation([line("id_cosine", before.tolist())], ids), evaluation([line("id_cosine", after.tolist())], ids)
    [found] = both(a, b, list(zip(ids, ids, strict=True))).differences

    def mean_difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(y - x, axis=axis)

    expected = scipy.stats.bootstrap(
        (before, after),
        mean_difference,
        paired=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.Generator(np.random.PCG64(SEED)),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-9)
    assert found.delta == pytest.approx((after - before).mean())
    assert found.verdict == verdict


def test_a_pair_with_itself_is_equal() -> None:
    a = evaluation([line("pose", [1.0, 2.0, 3.0, 4.0]), line("fid", [0.0] * 4, whole=7.0)], "abcd")
    pose, fid = both(a, a).differences
    assert (pose.delta, pose.low, pose.high, pose.verdict) == (0.0, None, None, "equal")  # whatever their number
    assert (fid.a, fid.delta, fid.low, fid.verdict) == (7.0, 0.0, None, "")
    assert fid.reason == "a number of the whole set"
    assert changed_rows(pose) == []


@pytest.mark.parametrize(
    ("state", "parts"),
    [
        ({"sha256": "f" * 64}, ["net's sha256 differs", "abababababab for A", "ffffffffffff for B"]),
        ({"crop": "another crop"}, ["net's crop differs: a crop for A, another crop for B"]),
        ({"formula": "another"}, ["net's formula differs"]),
    ],
)
def test_numbers_taken_differently_are_not_compared(state: dict[str, str], parts: list[str]) -> None:
    pose = line("pose", [1.0, 2.0, 3.0, 4.0])
    found = both(evaluation([pose], "abcd", "A"), evaluation([restated(pose, **state)], "abcd", "B"))
    assert found.differences == []
    [one] = found.not_compared
    for part in parts:
        assert part in one.reason


def test_other_protocols_and_networks_are_not_compared() -> None:
    values = [1.0, 2.0, 3.0, 4.0]
    a = evaluation([line("pose", values, protocol="paper"), line("id_cosine", values, "sface")], "abcd", "A")
    b = evaluation([line("pose", values), line("id_cosine", values, "arcface")], "abcd", "B")
    found = both(a, b)
    assert found.differences == []
    assert [(one.metric, one.protocol, one.network) for one in found.not_compared] == [
        ("pose", "open", "net"),
        ("id_cosine", "open", "arcface"),
        ("pose", "paper", "net"),
        ("id_cosine", "open", "sface"),
    ]
    assert found.not_compared[0].reason == "B was measured with net under protocol open, A was not; evaluate both under one protocol"
    assert summary(found)[0] == "4 pairs in both runs; a difference is B minus A."
    assert "4 lines are not compared" in summary(found)[-1]


def test_numbers_of_the_whole_set_need_the_same_set() -> None:
    values = [1.0, 0.0, 1.0, 0.0]
    lines = [line("id_top1", values), line("fid", values, whole=3.0), line("id_cosine", values)]
    found = both(evaluation(lines, "abcd", "A"), evaluation([line(one.measured.metric, [*values, 1.0]) for one in lines], "abcde", "B"))
    assert [one.metric for one in found.differences] == ["id_cosine"]
    assert [one.metric for one in found.not_compared] == ["id_top1", "fid"]
    assert "4 in A, 5 in B, 4 in both" in found.not_compared[0].reason


def test_no_value_in_common() -> None:
    a, b = evaluation([line("pose", [1.0, None])], "ab", "A"), evaluation([line("pose", [None, 1.0])], "ab", "B")
    assert both(a, b, SAME[:2]).not_compared[0].reason == "no pair has a value in both runs"
    [one] = both(a, a, SAME[:2]).differences
    assert (one.count, one.low, one.reason, one.verdict) == (1, None, "1 pair is too few (at least 10)", "equal")


def test_pairs_that_changed_most() -> None:
    a, b = evaluation([line("pose", [0.0] * 4)], "abcd"), evaluation([line("pose", [1.0, -3.0, 0.0, 2.0])], "abcd")
    [found] = both(a, b).differences
    assert changed_rows(found) == [1, 3, 0]
    assert changed_rows(found, 1) == [1]


def test_settings_that_differ() -> None:
    a = {"profile": "fast", "stages": {"blend": {"levels": 6, "edge": 1.0}, "tune": {"steps": 3}}}
    b = {"profile": "fast", "stages": {"blend": {"levels": 3, "edge": 1.0}}, "device": "cuda"}
    assert [(one.name, one.a, one.b) for one in differing(a, b)] == [
        ("stages.blend.levels", "6", "3"),
        ("stages.tune.steps", "3", "-"),
        ("device", "-", "cuda"),
    ]


def test_the_page_the_rows_and_the_json_say_the_same() -> None:
    ids = [str(index) for index in range(12)]
    a = evaluation([line("pose", [*np.arange(11.0), None], sha256="")], ids, HOSTILE)
    b = evaluation([line("pose", [*np.arange(11.0) * 0.9 - 1, None], sha256=""), line("expression", [1.0] * 12)], ids, "B")
    differences, not_compared = compare(a, b, [(name, name) for name in ids])
    found = Comparison(
        a=HOSTILE,
        b="B",
        pairs=SAME,
        differences=differences,
        not_compared=not_compared,
        settings=[Setting(name=HOSTILE, a="1", b="2")],
        notes=[HOSTILE],
    )
    picture = np.zeros((8, 8, 3), np.uint8)
    page = render_comparison(found, [Changed(title=HOSTILE, better="lower", pairs=[PairPictures(HOSTILE, {HOSTILE: picture}, (HOSTILE,))])])
    assert "<script" not in page + comparison_markdown(found)
    assert "https:" not in page
    assert "nothing learnt" in page
    assert "-1.50°" in page
    assert "B better" in page
    [row, missing] = comparison_rows(found)
    assert (row["A"], row["B"], row["B minus A"], row["pairs"], row["so"]) == ("5.00°", "3.50°", "-1.50°", "11", "B better")
    assert missing["so"].startswith("not compared: B was measured with net")
    data = json.loads(as_json(found))
    assert data["differences"][0]["deltas"] == pytest.approx([*(-1 - np.arange(11) / 10), None])
    assert data["differences"][0]["verdict"] == "B better"
    assert data["not_compared"][0]["metric"] == "expression"


def test_few_pairs_have_no_verdict() -> None:
    """Three differences of one sign are no proof: the table, the page and the JSON say why there is none."""
    a, b = evaluation([line("pose", [3.0, 3.5, 4.0])], "abc", "A"), evaluation([line("pose", [1.0, 2.0, 3.0])], "abc", "B")
    found = both(a, b, SAME[:3])
    [one] = found.differences
    assert (one.delta, one.low, one.verdict) == (-1.5, None, "")
    reason = "no interval: 3 pairs are too few (at least 10)"
    assert comparison_rows(found)[0]["so"] == reason
    assert reason in render_comparison(found, [])
    assert reason in comparison_markdown(found)
    assert json.loads(as_json(found))["differences"][0]["reason"] in reason
    assert "No verdict on 1 line: 3 pairs are too few (at least 10)." in summary(found)
