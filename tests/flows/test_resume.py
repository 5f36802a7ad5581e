"""Unattended: what is tried again and how often, why something is computed, and run folders that a power loss left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tasks.align
from flows.engine import execute
from flows.execution.summary import Summary
from flows.plan import Request, make_plan
from flows.progress import Lines
from flows.status import print_failed, print_status
from flows.why import explain, headline, why_again
from storage.codec import encode_png
from storage.run import RunError, RunFolder, append_lines, read_lines
from storage.store import Store
from tasks.graph import UsageError
from tasks.stage import ItemError, PassingError, each

ROOT = Path(__file__).parents[2]
Text = pytest.CaptureFixture[str]


def request(manifest: Path, run: Path, **changes: object) -> Request:
    return replace(Request(manifest=str(manifest), run=str(run), profile="fast", device="cpu"), **changes)


def carry_out(wanted: Request) -> Summary:
    plan = make_plan(wanted)
    try:
        return execute(plan, Lines())
    finally:
        plan.close()


def reasons(wanted: Request) -> dict[str, tuple[int, str]]:
    """Node -> (works, why) of a dry plan in which every node has one reason."""
    found = explain(make_plan(wanted, dry=True))
    assert len({reason.node for reason in found}) == len(found), found
    return {reason.node: (reason.works, reason.why) for reason in found}


@pytest.fixture(scope="module")
def finished(people_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three pairs; tests copy nothing and change nothing in it but read it, or share its store."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    carry_out(request(people_folder, run))
    return run


@pytest.fixture
def faceless(tmp_path: Path) -> Path:
    """A manifest of one pair whose pictures hold no face, so that `align` fails at once."""
    for name, level in (("a.png", 90), ("b.png", 120)):
        (tmp_path / name).write_bytes(encode_png(np.full((64, 64, 3), level, np.uint8)))
    (tmp_path / "pairs.csv").write_text("id,source,target\nblank,a.png,b.png\n")
    return tmp_path / "pairs.csv"


@pytest.fixture
def failing_align(monkeypatch: pytest.MonkeyPatch) -> Callable[[ItemError], None]:
    """Make the align stage fail with an error of the test's choice, as a sick machine would."""

    def fail(error: ItemError) -> None:
        def run(*arguments: object) -> dict[str, object]:
            raise error

        monkeypatch.setitem(tasks.align.BACKENDS, "dlib", replace(tasks.align.BACKENDS["dlib"], run=each(run)))  # type: ignore[arg-type]

    return fail


def test_failed_pairs_are_tried_again_on_request_until_quarantine(faceless: Path, tmp_path: Path, capsys: Text) -> None:
    run = tmp_path / "run"

    def rerun(**changes: object) -> tuple[dict[str, int], int, bool]:
        summary = carry_out(request(faceless, run, **changes))
        assert (summary.failed, summary.exit_code) == (1, 2)
        (row,) = RunFolder(run).read_rows()
        assert "no face" in row.reason
        return summary.computed, row.attempts, row.quarantined

    assert rerun() == ({"align": 2}, 1, False)
    assert rerun() == ({}, 1, False)  # remembered: no attempt
    assert rerun(retry=("failed",)) == ({"align": 2}, 2, False)
    assert rerun(retry=("failed",)) == ({"align": 2}, 3, True)
    assert rerun(retry=("failed",)) == ({}, 3, True)  # in quarantine
    assert rerun(retry=("failed",), max_attempts=4) == ({"align": 2}, 4, True)
    assert rerun() == ({}, 4, True)
    assert rerun(retry=("quarantined",)) == ({"align": 2}, 1, False)
    capsys.readouterr()
    assert print_failed(str(run)) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 pair failed in align: source")
    assert lines[1] == "    blank"
    assert [line.split("UTC  ")[1].split(":")[0] for line in lines[2:-1]] == [
        *(f"attempt {n}" for n in (1, 2, 3, 4)),
        "released",
        "attempt 1",
    ]
    assert "--retry failed" in lines[-1]
    assert rerun(changes=["align.side=320"]) == ({"align": 2}, 1, False)  # another question: counting starts anew


def test_a_failure_whose_cause_is_gone_is_forgotten_by_all_runs(
    finished: Path, people_folder: Path, tmp_path: Path, failing_align: Callable[[ItemError], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "people").symlink_to(people_folder)
    manifest, shared = tmp_path / "people", str(tmp_path / "store")
    failing_align(ItemError("a sick library"))
    assert carry_out(request(manifest, tmp_path / "one", store=shared)).failed == 3
    monkeypatch.undo()
    assert carry_out(request(manifest, tmp_path / "one", store=shared)).failed == 3
    assert carry_out(request(manifest, tmp_path / "two", store=shared)).computed == {}  # the other run is told the same
    assert carry_out(request(manifest, tmp_path / "one", store=shared, retry=("failed",))).done == 3
    changed = carry_out(request(manifest, tmp_path / "two", store=shared, changes=["paste.feather=0.09"]))
    assert (changed.done, changed.computed) == (3, {"paste": 3})  # builds on what is no failure any more
    assert [row.attempts for row in RunFolder(tmp_path / "one").read_rows()] == [1, 1, 1]  # said of done rows, too


def test_what_may_pass_is_tried_on_every_rerun_and_counted(
    people_folder: Path, tmp_path: Path, failing_align: Callable[[ItemError], None]
) -> None:
    failing_align(PassingError("no memory"))
    computed = [carry_out(request(people_folder, tmp_path / "run", max_attempts=2)).computed for _ in range(3)]
    assert [bool(by_node) for by_node in computed] == [True, True, False]
    assert {(row.attempts, row.quarantined, row.reason.split(": ")[1]) for row in RunFolder(tmp_path / "run").read_rows()} == {
        (2, True, "no memory")
    }


def test_a_missing_file_is_looked_for_on_every_rerun(people: list[Path], tmp_path: Path, finished: Path, capsys: Text) -> None:
    (tmp_path / "pairs.csv").write_text(f"id,source,target\n000000,{people[0]},away.png\n")
    wanted = request(tmp_path / "pairs.csv", tmp_path / "run", max_attempts=2, store=str(finished / "store"))
    for _ in range(4):
        assert carry_out(wanted).failed == 1
    (row,) = RunFolder(tmp_path / "run").read_rows()
    assert (row.stage, row.attempts, row.quarantined) == ("input", 0, False)  # nothing was tried
    capsys.readouterr()
    assert print_failed(str(tmp_path / "run")) == 2
    _, said, remedy = capsys.readouterr().out.splitlines()  # once, not four times
    assert said.startswith("    000000  20") and said.endswith("UTC  not tried")
    assert remedy == "1 failed pair; what cannot be read is looked at on every rerun"
    (tmp_path / "away.png").write_bytes(people[1].read_bytes())
    assert carry_out(wanted).done == 1


def test_the_same_pair_in_two_rows_is_computed_once(finished: Path, people: list[Path], tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("id,source,target\n" + "".join(f"{name},{people[0]},{people[1]}\n" for name in ("one", "two")))
    summary = carry_out(
        request(tmp_path / "pairs.csv", tmp_path / "run", store=str(finished / "store"), chunk=1, changes=["paste.feather=0.05"])
    )
    assert summary.done == 2
    assert summary.computed["paste"] == 1
    assert set(summary.computed.values()) == {1}
    one, two = ((tmp_path / f"run/outputs/{name}.png").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_picture_that_changes_while_running_fails_its_pair_and_is_new_to_the_next_run(
    finished: Path, people: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "t.png").write_bytes(people[1].read_bytes())
    (tmp_path / "pairs.csv").write_text(f"id,source,target\none,{people[0]},t.png\n")
    wanted = request(tmp_path / "pairs.csv", tmp_path / "run", store=str(finished / "store"), changes=["paste.feather=0.07"])
    plan = make_plan(wanted)
    (tmp_path / "t.png").write_bytes(people[2].read_bytes())
    assert execute(plan, Lines()).failed == 1
    plan.close()
    (row,) = RunFolder(tmp_path / "run").read_rows()
    assert "t.png was changed while running" in row.reason
    assert reasons(wanted)["paste"] == (1, "input changed: target")
    assert carry_out(wanted).done == 1


def test_why_names_the_changed_field_and_what_follows_from_it(finished: Path, people_folder: Path, capsys: Text) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    assert reasons(request(people_folder, finished)) == {}
    found = reasons(request(people_folder, finished, changes=["blend.levels=3", "paste.feather=0.1"]))
    assert found["blend"] == (3, "config changed: levels 6 -> 3")
    assert found["inpaint"] == (3, "upstream changed: blend")
    assert found["paste"][1].startswith("config changed: feather")
    assert set(found) == {"blend", "inpaint", "paste"}
    found = reasons(request(people_folder, finished, stages=["swap=codes"]))
    assert found["swap"] == (3, "backend changed: composite -> codes")
    assert found["encode"] == (3, "stage not used before")
    assert why_again(str(finished), "", profile="", stages=[], changes=["blend.levels=3"], verify=False) == 0
    assert "config changed: levels 6 -> 3" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no setting"):
        why_again(str(finished), "", profile="", stages=[], changes=["blend.nonsense=3"], verify=False)
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before  # it only reads


def test_why_names_weights_libraries_and_new_items(finished: Path, people_folder: Path, people: list[Path], tmp_path: Path) -> None:
    settings = RunFolder(finished).read_settings()
    other = RunFolder(tmp_path / "run")
    other.create()
    settings["nodes"]["parse"]["weights"]["face_parser"] = "0123456789abcdef"
    settings["nodes"]["mesh"]["libraries"]["numpy"] = "1.0"
    other.write_settings(settings)
    other.write_rows(RunFolder(finished).read_rows())
    found = reasons(request(people_folder, other.path))
    assert found["parse"][1].startswith("weights changed: face_parser 0123456789ab -> 468e13ca13a9")
    assert found["mesh"][1].startswith("library changed: numpy 1.0 -> ")
    assert found["reenact"][1] == "upstream changed: mesh, parse"
    (tmp_path / "more.csv").write_text(f"id,source,target\nfresh,{people[0]},{people[3]}\n")
    found = reasons(request(tmp_path / "more.csv", finished))
    assert found["swap"] == (1, "new")


def test_why_names_what_is_damaged_pruned_or_not_kept(people_folder: Path, tmp_path: Path, finished: Path, capsys: Text) -> None:
    run = tmp_path / "run"
    wanted = request(people_folder, run, keep="resume")
    carry_out(wanted)
    store = Store(str(run / "store"))
    result = next(artifact for artifact in store.all() if artifact.stage == "paste")
    path = run / "store" / result.payloads["result"].file
    path.write_bytes(path.read_bytes()[:-20])
    for row in RunFolder(run).read_rows():
        if row.key == result.key:
            (run / row.output).unlink()
    found = reasons(wanted)
    assert found["paste"] == (1, "damaged")
    assert found["swap"] == (1, "not kept (--keep resume)")
    assert "align" not in found
    plan = make_plan(wanted)
    line = headline(plan)
    plan.close()
    assert line.startswith("1 finished pair computed again (paste: damaged): reenact 1, ")
    assert path.stat().st_size  # still there: nothing was computed yet


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, None], ids=["empty", "zeros", "cut"])
def test_run_files_that_a_power_loss_damaged_are_made_again(
    content: bytes | None, finished: Path, people_folder: Path, tmp_path: Path, capsys: Text
) -> None:
    run = RunFolder(tmp_path / "run")
    wanted = request(people_folder, run.path, store=str(finished / "store"))
    carry_out(wanted)
    rows = {row.id: row.output_sha256 for row in run.read_rows()}
    for path in (run.manifest, run.settings, run.log):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 2 // 3] if content is None else content)
    run.attempts.write_bytes(content or b'{"item": "000000", "att')
    capsys.readouterr()
    for command in (print_status, print_failed):
        with pytest.raises(RunError, match="repeat the run's command"):
            command(str(run.path))
    assert carry_out(wanted).computed == {}
    told = capsys.readouterr().err
    assert "manifest.parquet: damaged; made again" in told
    assert "run.json: damaged; written again" in told
    again = run.read_rows()
    assert {row.id: row.output_sha256 for row in again} == rows
    assert len(again) == 3
    assert run.read_log()[-1]["event"] == "end"
    assert print_status(str(run.path)) == 0


def test_a_cut_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_lines(path, [{"n": 1}, {"n": 2}])
    path.write_bytes(path.read_bytes()[:-4])
    found, at = read_lines(path)
    assert found == [{"n": 1}]  # the second may still be growing
    append_lines(path, [{"n": 3}])
    assert read_lines(path)[0] == [{"n": 1}, {"n": 3}]
    assert read_lines(path, at)[0] == [{"n": 3}]


def test_the_lock_names_its_holder_and_ends_with_it(tmp_path: Path, capsys: Text) -> None:
    folder = RunFolder(tmp_path)
    code = (
        "import sys; from storage.run import RunFolder; lock = RunFolder(sys.argv[1]).lock(); print('has it', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "has it\n"
        with pytest.raises(RunError, match=rf"another process is working on this run \(process {process.pid} on .+\)"):
            folder.lock()
        assert folder.holder().startswith(f"process {process.pid} on ")
        process.kill()
    assert folder.holder() == ""
    folder.lock().close()  # the dead process's lock does not block


def test_where_there_are_no_locks_the_run_says_so_and_goes_on(tmp_path: Path, capsys: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    RunFolder(tmp_path).lock().close()
    assert "this file system has no locks" in capsys.readouterr().err
