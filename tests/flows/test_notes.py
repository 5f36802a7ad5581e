"""What limits a result is kept with its row, whoever computed it, and said by `e4s status`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.cheap import make_inputs
from flows.engine import execute
from flows.plan import Request, make_plan
from flows.progress import Lines
from flows.status import limits
from storage.run import Row, RunFolder

NOTED = '''
"""A stage `swap` that says how dark its input is."""
import numpy as np
from benchmarks.cheap import CheapConfig
from tasks.stage import Stage, each


def _swap(model, config, inputs):
    return {"hole": inputs["driven"], "facts": np.array([inputs["driven"].mean()], np.float32)}


STAGE = Stage(
    name="swap", backend="noted:swap", version=1, config=CheapConfig, run=each(_swap), reads=("driven",),
    writes={"hole": "array", "facts": "array"}, note=("facts", lambda facts: f"{facts[0]:.0f} gray" if facts[0] > 43.1 else ""),
)
BACKENDS = {"noted:swap": STAGE}
'''


def carry_out(manifest: str, profile: str, run: Path, store: Path) -> tuple[dict[str, int], list[Row]]:
    plan = make_plan(Request(manifest=manifest, run=str(run), profile=profile, store=str(store), stages=["swap=noted:swap"]))
    try:
        computed = execute(plan, Lines()).computed
    finally:
        plan.close()
    return computed, RunFolder(run).read_rows()


def test_notes_come_back_from_the_row_and_from_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "noted.py").write_text(NOTED)
    monkeypatch.syspath_prepend(tmp_path)
    manifest, profile = make_inputs(tmp_path / "inputs", 6)
    computed, rows = carry_out(manifest, profile, tmp_path / "run", tmp_path / "store")
    assert computed["swap"] == 6
    notes = {row.id: row.note for row in rows}
    assert set(notes.values()) == {"", "43 gray"}
    assert dict(limits(rows)) == {"N gray": sum(note != "" for note in notes.values())}
    computed, rows = carry_out(manifest, profile, tmp_path / "run", tmp_path / "store")  # all rows are done
    assert not computed
    assert {row.id: row.note for row in rows} == notes
    shutil.rmtree(tmp_path / "run")
    computed, rows = carry_out(manifest, profile, tmp_path / "run", tmp_path / "store")  # all results are in the store
    assert not computed
    assert {row.id: row.note for row in rows} == notes
