"""Ablation rows on one store: each run computes what it does not share with the full one, and so does its evaluation."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from e4s_models.weights import WeightsError, weight_path
from evaluation.protocols import Protocol
from flows.engine import execute
from flows.evaluate import evaluate
from flows.plan import Request, make_plan
from flows.progress import Lines
from storage.run import RunFolder

SMALL = Protocol(name="small", source="", sample="", networks={"identity": ("sface",)})


def carry_out(manifest: Path, run: Path, *stages: str) -> dict[str, int]:
    """Run the pairs on the common store; what was computed, by node."""
    store = str(run.parent / "store")
    plan = make_plan(Request(manifest=str(manifest), run=str(run), profile="fast", device="cpu", store=store, stages=stages))
    try:
        summary = execute(plan, Lines())
    finally:
        plan.close()
    assert (summary.done, summary.exit_code) == (2, 0)
    return summary.computed


def test_every_ablation_shares_what_it_can_with_the_full_run(people: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        weight_path("sface")
    except WeightsError as error:
        pytest.skip(str(error))
    manifest = tmp_path / "pairs.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([("source", "target"), people[:2], people[1:3]])
    full = carry_out(manifest, tmp_path / "full")
    after_swap = {"enhance": 2, "blend": 2, "inpaint": 2, "paste": 2}
    assert full == {"align": 3, "mesh": 3, "parse": 3, "reenact": 2, "swap": 2, "recolor": 2, **after_swap}
    assert carry_out(manifest, tmp_path / "inpaint", "inpaint=none") == {"inpaint": 2, "paste": 2}
    assert carry_out(manifest, tmp_path / "recolor", "recolor=none") == {"recolor": 2, **after_swap}
    without = carry_out(manifest, tmp_path / "reenact", "reenact=none")
    assert without == {name: count for name, count in full.items() if name not in ("align", "mesh", "parse")}
    computed = {run: evaluate(RunFolder(tmp_path / run), [SMALL], "cpu").computed for run in ("full", "inpaint", "recolor", "reenact")}
    assert [found["sface"] for found in computed.values()] == [5, 2, 2, 2]  # sources and targets are shared
    assert evaluate(RunFolder(tmp_path / "full"), [SMALL], "cpu").computed == {}
