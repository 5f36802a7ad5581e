"""The files of an evaluation: what is written is read back, the same run gives the same bytes, the history grows with changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from evaluation import results
from evaluation.metrics import Measured
from evaluation.results import Evaluation, MetricLine, Unavailable, read, read_history, write
from storage.run import RunError

MEASURED = Measured(
    metric="pose", protocol="open", network="6drepnet360", sha256="ab" * 32, value=1.5, low=1.0, high=2.0, count=2, failed={"no face": 1}
)
LINE = MetricLine(
    measured=MEASURED,
    title="Pose distance",
    unit="degrees",
    better="lower",
    state={"protocol": "open", "crop": "loose"},
    values=np.array([1.0, np.nan, 2.0]),
)
EVALUATION = Evaluation(
    run="bench",
    pairs=["a", "b", "c"],
    outputs=["1" * 64, "2" * 64, "3" * 64],
    total=5,
    done=3,
    failed=1,
    left=1,
    lines=[LINE],
    unavailable=[Unavailable(protocol="open", metric="fid", network="inception", reason="run `e4s models pull`")],
    computed={"6drepnet360": 5},
    no_face={"b": "no face"},
    notes=["the run is not finished"],
)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write(EVALUATION, tmp_path)
    found = read(tmp_path)
    np.testing.assert_array_equal(found.lines[0].values, LINE.values)
    assert replace(found.lines[0], values=LINE.values) == LINE
    assert replace(found, lines=EVALUATION.lines) == replace(EVALUATION, computed={})
    table = pq.read_table(tmp_path / "metrics.parquet")
    assert table.column_names == ["id", "output_sha256", "pose/6drepnet360/open"]
    assert table["output_sha256"].to_pylist() == EVALUATION.outputs
    assert table["pose/6drepnet360/open"].to_pylist() == [1.0, None, 2.0]


def test_the_same_run_gives_the_same_bytes_and_one_line_of_history(tmp_path: Path) -> None:
    write(EVALUATION, tmp_path)
    first = (tmp_path / "metrics.json").read_bytes()
    write(replace(EVALUATION, computed={}), tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == first
    assert len(read_history(tmp_path)) == 1
    write(replace(EVALUATION, lines=[replace(LINE, measured=replace(MEASURED, value=1.6))], done=4, left=0), tmp_path)
    history = read_history(tmp_path)
    assert [line["values"]["pose/6drepnet360/open"]["value"] for line in history] == [1.5, 1.6]
    assert [(line["total"], line["done"], line["left"]) for line in history] == [(5, 3, 1), (5, 4, 0)]
    assert all(line["time"] for line in history)
    assert "time" not in json.loads((tmp_path / "metrics.json").read_text())


def test_a_cut_line_of_history_is_left_out(tmp_path: Path) -> None:
    write(EVALUATION, tmp_path)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"time": "2026')
    assert len(read_history(tmp_path)) == 1
    write(replace(EVALUATION, done=4), tmp_path)
    assert [line["done"] for line in read_history(tmp_path)] == [3, 4]
    assert read_history(tmp_path / "nowhere") == []


def test_the_history_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "HISTORY_LINES", 3)
    for done in range(1, 6):
        write(replace(EVALUATION, done=done), tmp_path)
    assert [line["done"] for line in read_history(tmp_path)] == [3, 4, 5]  # the latest


@pytest.mark.parametrize("damage", ["", "{", '{"lines": []}', '{"lines": [{"column": "x"}]}'])
def test_what_cannot_be_read_says_what_to_do(tmp_path: Path, damage: str) -> None:
    with pytest.raises(RunError, match="not evaluated yet; run `e4s report`"):
        read(tmp_path)
    write(EVALUATION, tmp_path)
    (tmp_path / "metrics.json").write_text(damage)
    with pytest.raises(RunError, match=r"metrics\.json: damaged, or written by another version of e4s; repeat `e4s report`"):
        read(tmp_path)


PAPER = replace(
    EVALUATION,
    lines=[
        replace(
            LINE,
            measured=replace(MEASURED, protocol="paper", network="hopenet"),
            state={"protocol": "paper", "crop": "loose"},
            values=np.array([np.nan, 1.0, 3.0]),
        )
    ],
    unavailable=[Unavailable(protocol="paper", metric="id_top1", network="cosface", reason="run `e4s models add`")],
    no_face={"a": "no face"},
)


def names(evaluation: Evaluation) -> list[str]:
    return [line.name for line in evaluation.lines]


def test_another_protocol_on_the_same_results_is_added(tmp_path: Path) -> None:
    """open, paper, open again: both stay in the files, the history has a line for each and tells them apart."""
    opened, both = ["pose/6drepnet360/open"], ["pose/6drepnet360/open", "pose/hopenet/paper"]
    assert names(write(EVALUATION, tmp_path)) == opened
    whole = write(PAPER, tmp_path)
    assert names(whole) == both[::-1]  # what was asked last stands first
    assert [line.protocol for line in whole.unavailable] == ["paper", "open"]
    assert whole.no_face == {"a": "no face", "b": "no face"}
    assert names(read(tmp_path)) == both
    kept = (tmp_path / "metrics.json").read_bytes()
    assert names(write(EVALUATION, tmp_path)) == both
    assert (tmp_path / "metrics.json").read_bytes() == kept
    history = read_history(tmp_path)
    assert [(line["protocols"], list(line["values"])) for line in history] == [(["open"], opened), (["paper"], both[1:])]


@pytest.mark.parametrize(
    "changed",
    [
        replace(PAPER, outputs=["1" * 64, "2" * 64, "f" * 64]),
        replace(PAPER, pairs=["a", "b", "d"]),
        replace(PAPER, unusable={"c": "it is gone"}),
    ],
    ids=["another result", "another pair", "a result is gone"],
)
def test_numbers_of_other_results_are_not_mixed_in(changed: Evaluation, tmp_path: Path) -> None:
    write(EVALUATION, tmp_path)
    whole = write(changed, tmp_path)
    assert names(whole) == names(read(tmp_path)) == ["pose/hopenet/paper"]
    assert whole.no_face == read(tmp_path).no_face == {"a": "no face"}
    assert (
        whole.notes[-1]
        == "protocol open was measured before, on other results; measure it again beside this one: --protocol open --protocol paper"
    )
    assert list(read_history(tmp_path)[0]["values"]) == ["pose/6drepnet360/open"]  # the trend keeps it
    once = (tmp_path / "metrics.json").read_bytes()
    assert write(changed, tmp_path).notes == EVALUATION.notes
    assert (tmp_path / "metrics.json").read_bytes() == once
