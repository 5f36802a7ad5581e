"""One item never stops the others: a stage that raises costs the item that made it raise, in this process and on Dask workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.cheap import make_inputs
from flows.engine import Summary, execute
from flows.plan import Request, make_plan
from flows.progress import Lines
from storage.codec import encode_png
from storage.run import RunFolder

CULPRIT = 4  # row of the pair whose target makes `align` raise


@pytest.fixture
def poisoned(tmp_path: Path) -> tuple[str, str]:
    """Manifest and profile of ten pairs of tiny pictures."""
    manifest, profile = make_inputs(tmp_path / "inputs", 10)
    rows = pq.read_table(manifest).to_pylist()
    rows[CULPRIT]["target"] = "green.png"
    (tmp_path / "inputs/green.png").write_bytes(encode_png(np.full((8, 8, 3), (20, 200, 80), np.uint8)))
    pq.write_table(pa.Table.from_pylist(rows), manifest)
    text = Path(profile).read_text("utf-8").replace("benchmarks.cheap:align", "benchmarks.poisoned:align")
    Path(profile).write_text(text, "utf-8")
    return manifest, profile


def carry_out(inputs: tuple[str, str], run: Path, **changes: Any) -> Summary:
    manifest, profile = inputs
    settings: dict[str, Any] = {"manifest": manifest, "run": str(run), "profile": profile, "device": "cpu", "chunk": 3, "threads": 1}
    plan = make_plan(Request(**{**settings, **changes}))
    try:
        return execute(plan, Lines())
    finally:
        plan.close()


@pytest.mark.parametrize("more", [{}, {"keep": "final"}, {"chunk": 1}, {"dask": "local:1"}, {"chunk": 10, "fail_fast": True}])
def test_the_culprit_of_a_chunk_is_found_and_the_others_are_done(
    more: dict[str, Any], poisoned: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = carry_out(poisoned, tmp_path / "run", **more)
    assert (summary.done, summary.failed, summary.left, summary.exit_code) == ((CULPRIT, 1, 5, 1) if "fail_fast" in more else (9, 1, 0, 2))
    folder = RunFolder(tmp_path / "run")
    culprit = folder.read_rows()[CULPRIT]
    assert (culprit.status, culprit.stage, culprit.attempts) == ("failed", "align", 1)
    assert culprit.reason == "program error: ZeroDivisionError: a poisoned picture (its traceback is in log.jsonl)"
    crashes = [event for event in folder.read_log() if event["event"] == "crash" and event.get("item")]
    assert [event["item"] for event in crashes] == [culprit.id]
    assert crashes[0]["traceback"].startswith("Traceback (most recent call last):")
    assert "Traceback" not in capsys.readouterr().err


def test_what_crashes_again_and_again_is_quarantined_and_nothing_else_is_computed(poisoned: tuple[str, str], tmp_path: Path) -> None:
    first = carry_out(poisoned, tmp_path / "run")
    assert first.computed["paste"] == 9
    for attempts in (2, 3, 3):
        summary = carry_out(poisoned, tmp_path / "run")
        assert (summary.done, summary.failed, summary.computed) == (9, 1, {})
        assert RunFolder(tmp_path / "run").read_rows()[CULPRIT].attempts == attempts
    assert RunFolder(tmp_path / "run").read_rows()[CULPRIT].quarantined


def test_many_culprits_stop_nothing(poisoned: tuple[str, str], tmp_path: Path) -> None:
    rows = pq.read_table(poisoned[0]).to_pylist()
    for row in rows[:7]:
        row["target"] = "green.png"
    pq.write_table(pa.Table.from_pylist(rows), poisoned[0])
    summary = carry_out(poisoned, tmp_path / "run", chunk=2)
    assert (summary.done, summary.failed, summary.left, summary.exit_code) == (3, 7, 0, 2)


def test_a_model_that_cannot_be_loaded_is_no_items_fault(
    poisoned: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr("tasks.runner.Worker.model", fail)
    summary = carry_out(poisoned, tmp_path / "run")
    assert "RuntimeError: the device is gone" in summary.crash
    assert (summary.left, summary.exit_code) == (10, 1)
    assert not any(row.attempts for row in RunFolder(tmp_path / "run").read_rows())
