"""The pairs pipeline on the `fast` profile: same bytes twice, resume after kills, damage, sharing, reruns that touch nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows.engine import execute
from flows.execution.summary import Summary
from flows.plan import Request, make_plan
from flows.progress import Lines
from storage.codec import decode_png
from storage.run import RunFolder
from storage.store import Store

ROOT = Path(__file__).parents[2]
CARRY_ON = """
import sys
from flows.engine import execute
from flows.plan import Request, make_plan
from flows.progress import Lines
plan = make_plan(Request(manifest=sys.argv[1], run=sys.argv[2], profile="fast", device="cpu", chunk=2))
print(execute(plan, Lines()).computed)
"""


def request(people_folder: Path, run: Path, **changes: object) -> Request:
    return replace(Request(manifest=str(people_folder), run=str(run), profile="fast", device="cpu", chunk=2), **changes)


def heed_interrupts() -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit that: undo it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def carry_out(wanted: Request) -> Summary:
    plan = make_plan(wanted)
    try:
        return execute(plan, Lines())
    finally:
        plan.close()


def digests(run: Path) -> dict[str, str]:
    return {row.id: row.output_sha256 for row in RunFolder(run).read_rows()}


@pytest.fixture(scope="module")
def finished(people_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """An undisturbed run of the three pairs."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    return run, carry_out(request(people_folder, run))


def test_every_pair_is_done_and_written(finished: tuple[Path, Summary]) -> None:
    run, summary = finished
    assert (summary.done, summary.failed, summary.left, summary.exit_code) == (3, 0, 0, 0)
    rows = RunFolder(run).read_rows()
    assert len(rows) == len({row.output_sha256 for row in rows}) == 3
    for row in rows:
        result = decode_png((run / row.output).read_bytes())
        with Image.open(row.target) as picture:
            target = np.asarray(picture.convert("RGB"))
        assert result.shape == target.shape == (1024, 1024, 3)
        changed = (result != target).any(axis=2)
        assert 0.05 < changed.mean() < 0.6  # a face was repainted, and only a face
        assert not changed[:40].any()
    settings = json.loads((run / "run.json").read_text())
    assert settings["nodes"]["parse"]["weights"]["face_parser"].startswith("468e13ca")


def test_a_picture_shared_by_pairs_is_worked_on_once(finished: tuple[Path, Summary]) -> None:
    run, summary = finished
    rows = RunFolder(run).read_rows()
    images = {row.source_sha256 for row in rows} | {row.target_sha256 for row in rows}
    assert len(images) < 6
    assert summary.computed["align"] == summary.computed["mesh"] == summary.computed["parse"] == len(images)
    assert summary.computed["paste"] == 3


def test_a_second_run_from_scratch_gives_the_same_bytes(finished: tuple[Path, Summary], people_folder: Path, tmp_path: Path) -> None:
    carry_out(request(people_folder, tmp_path / "again", chunk=3, keep="final"))  # another chunk size and retention, too
    assert digests(tmp_path / "again") == digests(finished[0])


def test_another_run_on_the_same_store_computes_nothing(finished: tuple[Path, Summary], people_folder: Path, tmp_path: Path) -> None:
    summary = carry_out(request(people_folder, tmp_path / "shared", store=str(finished[0] / "store")))
    assert summary.computed == {}
    assert digests(tmp_path / "shared") == digests(finished[0])


def test_a_changed_setting_recomputes_only_what_depends_on_it(finished: tuple[Path, Summary], people_folder: Path, tmp_path: Path) -> None:
    summary = carry_out(request(people_folder, tmp_path / "changed", store=str(finished[0] / "store"), changes=["blend.levels=3"]))
    assert summary.computed == {"blend": 3, "inpaint": 3, "paste": 3}
    assert digests(tmp_path / "changed") != digests(finished[0])


@pytest.mark.parametrize("point", ["mid-stage:9", "mid-write:20", "before-index:4", "before-manifest"])
def test_killed_anywhere_the_same_command_continues(
    finished: tuple[Path, Summary], people_folder: Path, tmp_path: Path, point: str
) -> None:
    run = tmp_path / "killed"
    command = [sys.executable, "-c", CARRY_ON, str(people_folder), str(run)]
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, "E4S_FAULT": point}, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = {artifact.key for artifact in Store(str(run / "store")).all()}
    assert before or point == "mid-write:20"
    summary = carry_out(request(people_folder, run))
    assert digests(run) == digests(finished[0])
    everything = {artifact.key for artifact in Store(str(run / "store")).all()}
    assert sum(summary.computed.values()) == len(everything - before)  # nothing that was finished is computed again
    assert [row.status for row in RunFolder(run).read_rows()] == ["done"] * 3


def test_a_flipped_byte_in_an_artifact_that_is_read_is_caught(
    people_folder: Path, tmp_path: Path, finished: tuple[Path, Summary], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    carry_out(request(people_folder, run))
    store = Store(str(run / "store"))
    swapped = next(artifact for artifact in store.all() if artifact.stage == "swap")
    path = run / "store" / swapped.payloads["mask"].file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for row in RunFolder(run).read_rows():
        (run / row.output).unlink()
    for artifact in store.all():
        if artifact.stage in ("blend", "inpaint", "paste"):
            store.void(artifact)  # as `e4s cache prune` would: now the mask must be read again
    summary = carry_out(request(people_folder, run))
    assert "does not match its digest; computing it again" in capsys.readouterr().err
    assert summary.computed["swap"] == 1
    assert digests(run) == digests(finished[0])


def test_a_deleted_output_is_restored_without_computing(people_folder: Path, tmp_path: Path, finished: tuple[Path, Summary]) -> None:
    run, _ = finished
    row = RunFolder(run).read_rows()[0]
    whole = (run / row.output).read_bytes()
    (run / row.output).unlink()
    assert carry_out(request(people_folder, run)).computed == {}
    assert (run / row.output).read_bytes() == whole


def test_a_rerun_with_nothing_to_do_reads_no_artifact_and_loads_nothing(finished: tuple[Path, Summary], people_folder: Path) -> None:
    run, _ = finished
    code = f"""
import sys
import storage.store
def refuse(*arguments): raise AssertionError("an artifact was read")
storage.store.Store.read = storage.store.Store.read_bytes = refuse
from flows.cli import main
assert main(["pairs", {str(people_folder)!r}, "--run", {str(run)!r}, "--profile", "fast", "--device", "cpu", "--no-report"]) == 0
print([name for name in ("torch", "prefect", "dlib", "ai_edge_litert") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "3 done before, 0 to do" in done.stderr


def test_a_stage_alone_runs_on_stored_inputs(finished: tuple[Path, Summary], tmp_path: Path) -> None:
    run, _ = finished
    command = [sys.executable, "-m", "flows.cli", "stage", str(run), "blend", "000000", "-o", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    stored = {artifact.stage: artifact for artifact in Store(str(run / "store")).all()}
    assert "blend" in stored
    alone = (tmp_path / "blend.blended.png").read_bytes()
    assert any(
        (run / "store" / a.payloads["blended"].file).read_bytes() == alone for a in Store(str(run / "store")).all() if a.stage == "blend"
    )


def test_ctrl_c_leaves_a_run_that_the_same_command_continues(finished: tuple[Path, Summary], people_folder: Path, tmp_path: Path) -> None:
    """The whole command, with its own Prefect server: interrupted in the middle, then repeated."""
    run = tmp_path / "interrupted"
    arguments = ["pairs", str(people_folder), "--run", str(run), "--profile", "fast", "--device", "cpu", "--chunk", "1"]
    command = [sys.executable, "-m", "flows.cli", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed_interrupts)
    log = run / "log.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and '"event": "chunk"' in log.read_text()) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    statuses = [row.status for row in RunFolder(run).read_rows()]
    assert "done" in statuses
    assert "left" in statuses
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
    assert digests(run) == digests(finished[0])
    assert (run / "report/index.html").stat().st_size > 100_000


def test_a_program_error_fails_its_pair_and_the_next_run_tries_again(
    people_folder: Path, tmp_path: Path, finished: tuple[Path, Summary], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tasks.blend

    whole = tasks.blend.BACKENDS["multiband"]
    calls = []

    def broken(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("a bug in blend")
        return whole.run(*arguments)

    monkeypatch.setitem(tasks.blend.BACKENDS, "multiband", replace(whole, run=broken))
    run = tmp_path / "run"
    summary = carry_out(request(people_folder, run, chunk=1))
    assert (summary.done, summary.failed, summary.exit_code) == (2, 1, 2)
    assert RunFolder(run).read_rows()[0].reason.startswith("program error: RuntimeError: a bug in blend")
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.undo()
    assert carry_out(request(people_folder, run, chunk=1)).computed == {"blend": 1, "inpaint": 1, "paste": 1}
    assert digests(run) == digests(finished[0])
