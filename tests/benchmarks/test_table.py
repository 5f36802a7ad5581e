"""Markdown tables of evaluated runs: what stands in each cell, and that unlike numbers are never set side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from benchmarks.table import main
from evaluation.bootstrap import mean_interval
from evaluation.metrics import METRICS, PairData, measure
from evaluation.protocols import PROTOCOLS
from evaluation.results import Evaluation, MetricLine, Unavailable, write

Text = pytest.CaptureFixture[str]


def evaluated(folder: Path, degrees: list[float], *, changes: Mapping[str, str] | None = None, failed: tuple[int, ...] = ()) -> Path:
    """A run folder with an evaluation of the pose alone: pair k is off by that many degrees of yaw."""
    line = next(line for line in PROTOCOLS["open"].lines() if line.metric.name == "pose")
    swapped = np.array([[value, 0, 0] for value in degrees])
    data = PairData(
        features={"swapped": swapped, "target": np.zeros_like(swapped)}, failures={"swapped": dict.fromkeys(failed, "no face found")}
    )
    outcome = measure(METRICS["pose"], data, protocol="open", network=line.network.name)
    state = {**line.state(), **(changes or {})}
    lines = [
        MetricLine(measured=outcome.measured, title="Pose distance", unit="degrees", better="lower", state=state, values=outcome.values)
    ]
    evaluation = Evaluation(
        run=folder.name,
        pairs=[f"{number:06d}" for number in range(len(degrees))],
        total=len(degrees) + 1,
        done=len(degrees),
        failed=0,
        left=1,
        lines=lines,
        unavailable=[Unavailable(protocol="open", metric="fid", network="inception_fid_helper", reason="not here: `e4s models pull`")],
        computed={},
        no_face={f"{number:06d}": "no face found" for number in failed},
        notes=["the run is not finished: 1 pair left"],
    )
    write(evaluation, folder / "report")
    return folder


def cells(printed: str, name: str) -> list[str]:
    row = next(line for line in printed.splitlines() if line.startswith(f"| {name}"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_a_column_per_run(tmp_path: Path, capsys: Text) -> None:
    degrees = [1.0, 2.0, 3.0] * 4
    full, other = evaluated(tmp_path / "full", degrees), evaluated(tmp_path / "no-recolor", [2, 4, 90], failed=(2,))
    assert main([f"full model={full}", str(other)]) == 0
    printed = capsys.readouterr().out
    assert cells(printed, "metric") == ["network", "full model", "no-recolor"]
    assert cells(printed, "pairs done") == ["", "12 of 13", "3 of 4"]
    assert cells(printed, "no face found") == ["", "0", "1"]
    assert cells(printed, "left to do") == ["", "1", "1"]
    assert cells(printed, "Pose distance, degrees ↓") == [
        "6drepnet360",
        "2.00 [{:.2f}, {:.2f}]".format(*mean_interval(np.array(degrees)) or ()),
        "3.00, no interval: 2 pairs are too few (at least 10) (n = 2)",
    ]
    assert "Protocol `open`" in printed
    assert "95% percentile bootstrap" in printed
    assert "- full model: the run is not finished: 1 pair left" in printed
    assert printed.count("- inception_fid_helper: not here: `e4s models pull`") == 1
    assert cells(printed, "6drepnet360")[1] == "square of 0.84 of the aligned crop, from (0.08, 0.12)"
    assert cells(printed, "Pose distance |") == ["L2 distance of (yaw, pitch, roll) to the target"]
    assert cells(printed, "E4S (quoted)") == ["0.42", "0.58", "3.28", "3.05"]
    assert cells(printed, "E4S without recoloring (quoted)")[0] == "0.40"
    widths = {table: {line.count("|") for line in table.splitlines() if line.startswith("|")} for table in printed.split("\n\n")}
    assert all(len(found) <= 1 for found in widths.values()), "every row of a table has as many cells as its heading"


def test_unlike_numbers_are_not_set_side_by_side(tmp_path: Path, capsys: Text) -> None:
    full, other = evaluated(tmp_path / "full", [1, 2]), evaluated(tmp_path / "other", [1, 2], changes={"sha256": "0" * 64})
    assert main([str(full), str(other)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "other: pose with 6drepnet360 was measured with another sha256 than in" in printed.err


def test_a_number_that_is_none_says_why(tmp_path: Path, capsys: Text) -> None:
    assert main([str(evaluated(tmp_path / "run", [1, 2], failed=(0, 1)))]) == 0
    assert cells(capsys.readouterr().out, "Pose distance")[1].startswith("none: ")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [([], "not evaluated yet"), (["--quoted", "Table 9"], "quoted are Table 1, Table 2"), (["--protocol", "paper"], "nothing measured")],
)
def test_one_sentence(arguments: list[str], part: str, tmp_path: Path, capsys: Text) -> None:
    run = evaluated(tmp_path / "run", [1, 2]) if arguments else tmp_path
    assert main([str(run), *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert part in printed.err
    assert len(printed.err.splitlines()) == 1
