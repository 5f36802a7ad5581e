"""`e4s report` on real runs: the page, two runs compared, a partial run, bad input, and the same as artifacts of a real Prefect server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e4s_models.weights import WeightsError, weight_path
from evaluation.protocols import PROTOCOLS, Protocol
from flows.cli import main
from flows.engine import execute
from flows.plan import Request, make_plan
from flows.progress import Lines
from flows.report import matched_pairs
from storage.run import Row, RunFolder

ROOT = Path(__file__).parents[2]
Text = pytest.CaptureFixture[str]
CHEAP = {"identity": ("dlib_face_id",), "expression": ("blendshapes",)}
PUBLISH = f"""
import base64, json, os, sys, urllib.request
from pathlib import Path
from flows.server import prefect_api
run, other, log = sys.argv[1:]
with prefect_api(Path(log), patience=900, server_home=Path(log).parent / "prefect") as url:
    os.environ["PREFECT_CLIENT_MAX_RETRIES"] = "20"  # a flow of Prefect's alone: a busy server may answer 503
    import flows.evaluate
    from evaluation.protocols import PROTOCOLS, Protocol
    flows.evaluate.PROTOCOLS = {{**PROTOCOLS, "cheap": Protocol(name="cheap", source="", sample="", networks={CHEAP!r})}}
    from flows.report_flow import report
    computed = report(run, protocols=["cheap"], device="cpu", compare=other)
    key = base64.b64encode(os.environ["PREFECT_API_AUTH_STRING"].encode()).decode()
    headers = {{"Content-Type": "application/json", "Authorization": "Basic " + key}}
    ask = urllib.request.Request(url + "/artifacts/filter", b"{{}}", headers)
    with urllib.request.urlopen(ask) as answer:
        print(json.dumps({{"computed": computed, "artifacts": json.load(answer)}}))
"""


@pytest.fixture(scope="module", autouse=True)
def cheap_protocol() -> Iterator[None]:
    """`open` with two networks only, so that a report takes seconds."""
    for name in ("dlib_face_id", "face_mesh"):
        try:
            weight_path(name)
        except WeightsError as error:
            pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        cheap = Protocol(name="open", source="two networks", sample="all pairs", networks=CHEAP)
        patch.setattr("flows.evaluate.PROTOCOLS", {**PROTOCOLS, "open": cheap})
        yield


def made(manifest: Path, run: Path, *stages: str, store: str = "") -> Path:
    plan = make_plan(Request(manifest=str(manifest), run=str(run), profile="fast", device="cpu", stages=stages, store=store))
    try:
        execute(plan, Lines())
    finally:
        plan.close()
    return run


@pytest.fixture(scope="module")
def runs(people_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The three pairs, and the same without recoloring."""
    folder = tmp_path_factory.mktemp("runs")
    first = made(people_folder, folder / "Full run")
    return first, made(people_folder, folder / "plain", "recolor=none", store=str(first / "store"))


def copied(run: Path, to: Path, **left: str) -> RunFolder:
    """The run with other statuses by pair id; its store is that of the first."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("store", "report"))
    folder = RunFolder(to)
    folder.write_settings({**folder.read_settings(), "store": str(run / "store")})
    rows = folder.read_rows()
    for row in rows:
        row.status = left.get(f"pair_{row.id}", row.status)
    folder.write_rows(rows)
    return folder


def fails_with(capsys: Text, *parts: str) -> None:
    """One line on stderr that holds all the parts and no traceback."""
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    [said] = [line for line in printed.splitlines() if line.startswith("e4s:")]
    for part in parts:
        assert part in said


def test_a_report_of_a_run(runs: tuple[Path, Path], capsys: Text) -> None:
    run, _ = runs
    assert main(["report", str(run), "--device", "cpu", "--limit", "2"]) == 0
    said = capsys.readouterr().out
    for name in ("metrics.json", "metrics.parquet", "index.html"):
        assert str(run / "report" / name) in said
        assert (run / "report" / name).stat().st_size > 1000
    assert "features computed anew: " in said
    assert "blendshapes" in said
    page = (run / "report/index.html").read_text()
    assert page.count("<img") == 2 * 14 + 5 * 3 * 3  # five metrics with two best pairs and a worst
    assert "The first 2 of 3 finished pairs" in page
    for part in (
        "e4s pairs: Full run",
        "Expression distance",
        "ID retrieval, top 5",
        "reenact: regions",
        "468e13ca13a9",
        "3 pairs: 3 done, 0 failed.",
    ):
        assert part in page
    assert "moved or changed" not in page
    assert main(["report", str(run), "--device", "cpu"]) == 0
    assert "features computed anew: none" in capsys.readouterr().out
    assert main(["report", str(run), "--no-metrics"]) == 0
    again = (run / "report/index.html").read_text()
    assert 'id="metrics"' in again  # what was measured still holds, so nothing is said of its age
    assert "as measured on" not in again


def test_pairs_measures_at_the_end_if_asked(runs: tuple[Path, Path], people_folder: Path, tmp_path: Path, capsys: Text) -> None:
    folder = copied(runs[0], tmp_path / "copy")
    arguments = ["pairs", str(people_folder), "--run", str(folder.path), "--store", str(runs[0] / "store"), "--profile", "fast"]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert not (folder.path / "report/metrics.json").exists()
    assert main([*arguments, "--device", "cpu", "--metrics"]) == 0
    assert json.loads((folder.path / "report/metrics.json").read_text())["done"] == 3
    page = (folder.path / "report/index.html").read_text()
    assert 'id="metrics"' in page


def test_new_pairs_leave_the_metrics_of_the_others_on_the_page(runs: tuple[Path, Path], tmp_path: Path, capsys: Text) -> None:
    """The manifest gains a pair: the page shows it at once, and keeps what was measured, saying of how many pairs."""
    manifest, run, store = tmp_path / "pairs.csv", tmp_path / "run", str(runs[0] / "store")
    lines = ["id,source,target", *(f"{row.id},{row.source},{row.target}" for row in RunFolder(runs[0]).read_rows())]
    manifest.write_text("\n".join(lines[:-1]))
    made(manifest, run, store=store)
    assert main(["report", str(run), "--device", "cpu"]) == 0
    numbers = [path.read_bytes() for path in sorted((run / "report").glob("metrics.*"))]
    manifest.write_text("\n".join(lines))
    pairs = ["pairs", str(manifest), "--run", str(run), "--store", store, "--profile", "fast", "--device", "cpu"]
    capsys.readouterr()
    assert main(pairs) == 0
    since, again = "he numbers are of 2 of the 3 finished pairs, as measured on ", f"`e4s report {run}` measures the others"
    assert since in capsys.readouterr().err
    page = run / "report/index.html"
    for part in ("3 pairs: 3 done, 0 failed.", 'id="metrics"', since, again, "Best and worst", "2 pairs measured: too few for intervals"):
        assert part in page.read_text()
    assert [path.read_bytes() for path in sorted((run / "report").glob("metrics.*"))] == numbers  # measured nothing
    before = page.stat().st_mtime_ns
    assert main(pairs) == 0
    assert page.stat().st_mtime_ns == before  # nothing new: not written again


def test_numbers_of_other_results_leave_the_page(runs: tuple[Path, Path], tmp_path: Path, capsys: Text) -> None:
    """A rerun with another setting makes other outputs: what was measured of the old ones is not shown as theirs."""
    folder = copied(runs[0], tmp_path / "copy")
    assert main(["report", str(folder.path), "--device", "cpu"]) == 0
    rows = folder.read_rows()
    rows[0].output_sha256 = "0" * 64
    folder.write_rows(rows)
    capsys.readouterr()
    assert main(["report", str(folder.path), "--no-metrics"]) == 0
    page = (folder.path / "report/index.html").read_text()
    assert 'id="metrics"' not in page
    said = f"1 of the 3 pairs that were measured has another result now, or none; `e4s report {folder.path}` measures them anew"
    assert said[2:] in page
    (folder.path / "report/metrics.parquet").write_bytes(b"PAR1")
    assert main(["report", str(folder.path), "--no-metrics"]) == 0
    page = (folder.path / "report/index.html").read_text()
    assert "metrics.json: damaged, or written by another version of e4s; repeat `e4s report`" in page


def test_a_run_whose_pairs_all_failed_has_a_page_and_exit_code_2(runs: tuple[Path, Path], tmp_path: Path, capsys: Text) -> None:
    folder = copied(runs[0], tmp_path / "bad", pair_000000="failed", pair_000001="failed", pair_000002="failed")
    assert main(["report", str(folder.path), "--device", "cpu"]) == 2
    assert "every pair failed: nothing was measured" in capsys.readouterr().out
    assert "3 pairs: 0 done, 3 failed" in (folder.path / "report/index.html").read_text()


def test_a_partial_run_says_so_and_a_later_report_shows_the_trend(runs: tuple[Path, Path], tmp_path: Path, capsys: Text) -> None:
    folder = copied(runs[0], tmp_path / "partial", pair_000001="left")
    assert main(["report", str(folder.path), "--device", "cpu"]) == 0
    assert "The run is not finished: 1 pair left, 2 measured." in capsys.readouterr().out
    assert "The run is not finished: 1 pair left, 2 measured." in (folder.path / "report/index.html").read_text()
    assert main(["report", str(folder.path), "--no-metrics"]) == 0
    assert "The run is not finished: 1 pair left, 2 shown." in (folder.path / "report/index.html").read_text()
    history = folder.path / "report/history.jsonl"
    first = json.loads(history.read_text())
    history.write_text(json.dumps({**first, "time": "2026-01-01T06:00:00+00:00"}) + "\n")
    rows = folder.read_rows()
    for row in rows:
        row.status = "done"
    folder.write_rows(rows)
    assert main(["report", str(folder.path), "--device", "cpu"]) == 0
    page = (folder.path / "report/index.html").read_text()
    assert "Over time" in page
    assert "(2 pairs) to " in page
    assert "not finished" not in page


def test_failures_are_grouped_and_what_is_gone_is_named(runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copied(runs[0], tmp_path / "damaged", pair_000002="failed")
    rows = folder.read_rows()
    rows[2].stage, rows[2].reason = "align", "no face <found>"
    folder.write_rows(rows)
    (folder.path / rows[1].output).unlink()
    assert main(["report", str(folder.path), "--device", "cpu"]) == 2  # a pair failed
    page = (folder.path / "report/index.html").read_text()
    assert "<td>align</td><td>no face &lt;found&gt;</td><td><code>000002</code>" in page
    assert "outputs/000001.png cannot be read" in page
    assert "result: moved or changed" in page
    assert "1 pair is too few (at least 10)" in page
    assert main(["report", str(folder.path), "--no-metrics"]) == 2
    page = (folder.path / "report/index.html").read_text()
    assert "outputs/000001.png cannot be read" in page, "known from the report before"
    assert "measures the others" not in page, "it could not"


def test_outputs_that_are_gone_give_exit_code_2(runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copied(runs[0], tmp_path / "gone")
    (folder.path / folder.read_rows()[1].output).unlink()
    for options in (["--device", "cpu"], ["--no-metrics"]):
        assert main(["report", str(folder.path), *options]) == 2


def test_two_runs_compared(runs: tuple[Path, Path], capsys: Text) -> None:
    a, b = runs
    assert main(["report", str(a), str(b), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "3 pairs in both runs; a difference is plain minus Full run." in said
    page, data = b / "report/compare-Full-run.html", b / "report/compare-Full-run.json"
    assert str(page) in said
    found = json.loads(data.read_text())
    assert [(one["name"], one["a"], one["b"]) for one in found["settings"]] == [("stages.recolor.backend", "guided v1", "none v1")]
    assert found["not_compared"] == []
    by_metric = {one["metric"]: one for one in found["differences"]}
    identity, expression = ("id_top1", "id_top5", "id_cosine", "id_target_cosine"), ("expression", "expression_mouth", "expression_eyes")
    assert set(by_metric) == {*identity, *expression}
    for one in by_metric.values():
        assert one["count"] == 3
        assert one["low"] is one["high"] is None
        assert one["reason"] == "3 pairs are too few (at least 10)"
        assert sum(one["deltas"]) / 3 == pytest.approx(one["delta"])
        assert any(one["deltas"]) or one["unit"] == "share"
    text = page.read_text()
    changed = sum(sum(delta != 0 for delta in one["deltas"]) for one in by_metric.values())
    assert text.count("<img") == 4 * changed > 0
    assert "guided v1" in text


def test_a_run_against_part_of_it_is_measured_on_the_common_pairs(runs: tuple[Path, Path], tmp_path: Path) -> None:
    part = copied(runs[0], tmp_path / "part", pair_000000="left")
    assert main(["report", str(runs[0]), str(part.path), "--device", "cpu"]) == 0
    found = json.loads((part.path / "report/compare-Full-run.json").read_text())
    assert found["pairs"] == [["000001", "000001"], ["000002", "000002"]]
    assert found["settings"] == found["not_compared"] == []  # one gallery and one set: retrieval is compared, too
    assert {one["delta"] for one in found["differences"]} == {0.0}
    assert found["notes"] == [
        "Full run has 3 pairs (3 done, 0 failed, 0 left); the numbers are over the 2 that both have done.",
        "part has 3 pairs (2 done, 0 failed, 1 left); the numbers are over the 2 that both have done.",
    ]


def test_pairs_are_matched_by_what_they_show() -> None:
    def row(name: str, source: str, target: str, status: str = "done", face: int = 0) -> Row:
        return Row(id=name, source="", target="", source_sha256=source, target_sha256=target, status=status, target_face=face)

    a = [row("1", "x", "y"), row("2", "x", "y"), row("3", "x", "z"), row("4", "p", "q", "failed"), row("5", "m", "n")]
    b = [row("2", "x", "y"), row("9", "x", "y"), row("8", "x", "y"), row("3", "z", "x"), row("4", "p", "q"), row("5", "m", "n", face=1)]
    assert matched_pairs(a, b) == [("2", "2"), ("1", "9")]


def test_bad_input(runs: tuple[Path, Path], tmp_path: Path, capsys: Text) -> None:
    run = str(runs[0])
    for arguments in ([str(tmp_path)], [run, str(tmp_path)], [str(tmp_path), "--no-metrics"]):
        assert main(["report", *arguments]) == 1
        fails_with(capsys, str(tmp_path), "not a run folder", "--run")
    waiting = copied(runs[0], tmp_path / "waiting", pair_000000="left", pair_000001="left", pair_000002="failed")
    assert main(["report", str(waiting.path), "--device", "cpu"]) == 1
    fails_with(capsys, "no pair is finished yet (1 failed, 2 left)")
    assert main(["report", str(waiting.path), "--no-metrics"]) == 2
    capsys.readouterr()
    assert main(["report", run, str(waiting.path), "--device", "cpu"]) == 1
    fails_with(capsys, "no pair of the same two pictures is finished in both", "compare runs of one manifest")
    assert main(["report", run, run]) == 1
    fails_with(capsys, "are one run; give two")
    assert main(["report", run, str(runs[1]), "--no-metrics"]) == 1
    fails_with(capsys, "--no-metrics", "leave it out")
    assert main(["report", run, "--protocol", "best"]) == 1
    fails_with(capsys, "unknown protocol 'best'", "open, paper")
    assert main(["report", run, "--limit", "-1"]) == 1
    fails_with(capsys, "--limit must be at least 0")


def test_a_run_of_another_version(runs: tuple[Path, Path], tmp_path: Path, capsys: Text) -> None:
    """What this version cannot read back is one sentence; a stage that the other version did not have is only left out."""
    folder = copied(runs[0], tmp_path / "old")
    written = folder.read_settings()
    nodes = {**written["nodes"], "recolor": {**written["nodes"]["recolor"], "backend": "sepia"}}
    for name, nodes_then, part in (
        ("0.0.1", nodes, "stage recolor has no backend 'sepia'"),
        ("0.0.2", None, "nothing is said of 'nodes'"),
    ):
        folder.write_settings(
            {
                **{key: value for key, value in written.items() if key != "nodes"},
                "e4s": name,
                **({"nodes": nodes_then} if nodes_then else {}),
            }
        )
        for more in ([], ["--no-metrics"]):
            assert main(["report", str(folder.path), "--device", "cpu", *more]) == 1
            fails_with(
                capsys, f"what e4s {name} wrote cannot be read back by this version", part, "repeat the run's command with this version"
            )
    fewer = {name: found for name, found in written["nodes"].items() if name != "enhance"}
    folder.write_settings({**written, "e4s": "0.0.3", "nodes": fewer})
    assert main(["report", str(folder.path), "--no-metrics"]) == 0
    page = (folder.path / "report/index.html").read_text()
    assert "The run was made by e4s 0.0.3, this page by " in page
    assert '<th scope="row">enhance</th><td>none' not in page
    assert '<th scope="row">recolor</th><td>guided' in page


BOUND = """
import sys
bound = []
sys.addaudithook(lambda event, arguments: bound.append(arguments[1]) if event == "socket.bind" else None)
from flows.cli import main
assert main(["report", sys.argv[1], "--no-metrics"]) == 0
print(bound)
"""


def test_a_report_listens_nowhere(runs: tuple[Path, Path]) -> None:
    done = subprocess.run([sys.executable, "-c", BOUND, str(runs[0])], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_flow_publishes_the_same_to_a_prefect_server(runs: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = runs
    command = [sys.executable, "-c", PUBLISH, str(b), str(a), str(tmp_path / "prefect.log")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    found = {artifact["key"]: artifact for artifact in said["artifacts"] if artifact["key"]}
    assert set(found) == {"plain-metrics", "plain-report", "plain-against-full-run-metrics", "plain-against-full-run-report"}
    rows = json.loads(found["plain-metrics"]["data"])
    lines = json.loads((b / "report/metrics.json").read_text())["lines"]
    assert [row["metric"] for row in rows] == [line["title"] for line in lines]
    assert {row["protocol"] for row in rows} == {"cheap"}
    assert rows[0]["pairs"] == "3"
    text = found["plain-report"]["data"]
    assert text.startswith("# e4s pairs: plain")
    assert "3 pairs: 3 done, 0 failed" in text
    assert "## Failures" in text
    assert rows[0]["value"] in text
    both = json.loads(found["plain-against-full-run-metrics"]["data"])
    said_of = {row["metric"]: row for row in both}
    assert said_of["Expression distance"]["B"] == next(row["value"] for row in rows if row["metric"] == "Expression distance")
    assert said_of["Expression distance"]["so"] == "no interval: 3 pairs are too few (at least 10)"
    assert "stages.recolor.backend" in found["plain-against-full-run-report"]["data"]
    assert (b / "report/compare-Full-run.html").exists()
