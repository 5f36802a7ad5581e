"""Bad input on the real command line: one clear sentence, the documented exit code, the other pairs go on."""

from __future__ import annotations

import base64
import csv
import errno
import json
import os
import re
import shutil
import struct
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from flows.cli import main
from flows.progress import Lines, _Rate
from flows.server import prefect_api
from storage.codec import encode_png
from storage.files import Files
from storage.run import Row, RunFolder, unlock
from storage.store import Store

ROOT = Path(__file__).parents[2]
Text = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", autouse=True)
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server that runs already, as a user's would: every command here uses it through PREFECT_API_URL."""
    folder = tmp_path_factory.mktemp("prefect")
    with prefect_api(folder / "prefect.log", patience=900, server_home=folder) as url:
        yield url


def write_csv(path: Path, rows: list[tuple[object, ...]]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def pairs(manifest: str, run: Path, *more: str) -> int:
    return main(["pairs", manifest, "--run", str(run), "--profile", "fast", "--device", "cpu", "--no-report", *more])


def fails_with(capsys: Text, *parts: str) -> None:
    """One line on stderr that holds all the parts and no traceback."""
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("e4s:")]
    assert len(lines) == 1, lines
    for part in parts:
        assert part in lines[0]


def huge_png() -> bytes:
    """A valid PNG header that claims 50000 x 50000 px, with a few bytes behind it."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"0"))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--profile", "huge"], ["unknown profile 'huge'", "mobile", "fast"]),
        (["--stage", "swop=codes"], ["unknown stage 'swop'", "swap"]),
        (["--stage", "swap=magic"], ["swap", "no backend 'magic'", "composite"]),
        (["--stage", "swap"], ["stage=backend"]),
        (["--set", "blend.level=3"], ["blend", "no setting 'level'", "levels"]),
        (["--set", "blend.levels=many"], ["blend.levels must be int", "'many'"]),
        (["--set", "nonsense"], ["stage.setting=value"]),
        (["--device", "tpu"], ["auto, cpu or cuda"]),
        (["--chunk", "0"], ["--chunk must be at least 1"]),
        (["--max-attempts", "0"], ["--max-attempts must be at least 1"]),
    ],
)
def test_wrong_settings(arguments: list[str], parts: list[str], people_folder: Path, tmp_path: Path, capsys: Text) -> None:
    assert pairs(str(people_folder), tmp_path / "run", *arguments) == 1
    fails_with(capsys, *parts)


def test_cuda_without_a_gpu_is_an_error(people_folder: Path, tmp_path: Path, capsys: Text) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert pairs(str(people_folder), tmp_path / "run", "--device", "cuda") == 1
    fails_with(capsys, "finds no CUDA device")


def test_mistyped_and_contradicting_options_name_the_command_and_what_may_be_meant(tmp_path: Path, capsys: Text) -> None:
    for arguments, said in (
        (
            ["cache", "prune", str(tmp_path), "--unusd"],
            "unrecognized arguments: --unusd; did you mean --unused? (see e4s cache prune --help)",
        ),
        (["pairs", "a.csv", "--run", "r", "--retyr=failed"], "--retyr=failed; did you mean --retry? (see e4s pairs --help)"),
        (
            ["pairs", "a.csv", "--run", "r", "--refine", "5", "--set", "encode_driven.steps=9"],
            "encode_driven.steps=5 and encode_driven.steps=9 contradict each other; leave one out (see e4s pairs --help)",
        ),
        (
            ["stage", "swap", "--stage", "swap=codes", "--stage", "swap=composite"],
            "swap=codes and swap=composite contradict each other; leave one out (see e4s stage --help)",
        ),
        (["status", str(tmp_path), "--nothing-like-it"], "unrecognized arguments: --nothing-like-it (see e4s status --help)"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 1
        assert capsys.readouterr().err.endswith(f"{said}\n")


def test_usage_errors_exit_with_1(capsys: Text) -> None:
    with pytest.raises(SystemExit) as error:
        main(["pairs"])
    assert error.value.code == 1
    fails_with(capsys, "--run")


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([("source", "picture"), ("a.png", "b.png")], ["no column target", "source, picture"]),
        ([("source", "target")], ["no rows"]),
        ([("id", "source", "target"), ("../x", "a", "b")], ["row 1", "'../x'"]),
    ],
)
def test_unusable_manifests(rows: list[tuple[object, ...]], parts: list[str], tmp_path: Path, capsys: Text) -> None:
    assert pairs(write_csv(tmp_path / "pairs.csv", rows), tmp_path / "run") == 1
    fails_with(capsys, *parts)


def test_manifests_that_are_none(tmp_path: Path, capsys: Text) -> None:
    assert pairs(str(tmp_path / "nowhere.csv"), tmp_path / "run") == 1
    fails_with(capsys, "no such manifest")
    assert pairs(str(tmp_path), tmp_path / "run") == 1
    fails_with(capsys, "without pairs.parquet")
    (tmp_path / "pairs.parquet").write_bytes(b"PAR1 not really")
    assert pairs(str(tmp_path), tmp_path / "run") == 1
    fails_with(capsys, "cannot be read")
    pq.write_table(pa.table({"source": ["a.png"]}), tmp_path / "pairs.parquet")
    assert pairs(str(tmp_path), tmp_path / "run") == 1
    fails_with(capsys, "no column target")


def test_bad_pictures_fail_alone_and_the_others_go_on(people: list[Path], tmp_path: Path, capsys: Text) -> None:
    good, other = str(people[0]), str(people[1])
    (tmp_path / "cut.png").write_bytes(people[0].read_bytes()[:200_000])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "huge.png").write_bytes(huge_png())
    (tmp_path / "folder.png").mkdir()
    names = ["missing.png", "cut.png", "text.png", "empty.png", "huge.png", "folder.png"]
    rows = [("id", "source", "target"), *((name.split(".")[0], good, name) for name in names), ("blank", good, ""), ("good", good, other)]
    run = tmp_path / "run"
    assert pairs(write_csv(tmp_path / "pairs.csv", rows), run) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    found = {row.id: row for row in RunFolder(run).read_rows()}
    assert found.pop("good").status == "done"
    assert {row.status for row in found.values()} == {"failed"}
    reasons = {name: row.reason for name, row in found.items()}
    for name, part in {
        "missing": "does not exist",
        "cut": "cut short",
        "text": "not an image",
        "empty": "is empty",
        "huge": "50000 x 50000",
        "folder": "is a folder",
        "blank": "the cell target is empty in row 7",
    }.items():
        assert part in reasons[name]
        assert f"pair {name} failed" in printed
    done = (run / "outputs/good.png").stat().st_mtime_ns
    assert pairs(str(tmp_path / "pairs.csv"), run) == 2  # nothing is tried again, the list is given again
    assert "1 done before, 0 to do, 7 cannot be done" in capsys.readouterr().err
    assert (run / "outputs/good.png").stat().st_mtime_ns == done


def test_run_folders_that_cannot_be_used(people_folder: Path, tmp_path: Path, capsys: Text) -> None:
    (tmp_path / "file").touch()
    assert pairs(str(people_folder), tmp_path / "file") == 1
    fails_with(capsys, str(tmp_path / "file"), "choose another --run")
    assert pairs(str(people_folder), Path("/proc/e4s-run")) == 1
    fails_with(capsys, "/proc/e4s-run", "cannot be written", "choose another --run")
    assert main(["status", str(tmp_path)]) == 1
    fails_with(capsys, "not a run folder")


def test_a_second_process_on_one_run_folder_is_refused(people_folder: Path, tmp_path: Path, capsys: Text) -> None:
    from flows.plan import Request, make_plan

    plan = make_plan(Request(manifest=str(people_folder), run=str(tmp_path), profile="fast", device="cpu"))
    assert pairs(str(people_folder), tmp_path) == 1
    fails_with(capsys, "another process is working on this run")
    plan.close()


def test_a_full_disk_stops_the_run_and_loses_nothing(
    people_folder: Path, tmp_path: Path, capsys: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Files.write
    room = [6_000_000]

    def limited(self: Files, file: str, data: bytes, **how: bool) -> None:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device", file)
        write(self, file, data, **how)

    run = tmp_path / "run"
    monkeypatch.setattr(Files, "write", limited)
    assert pairs(str(people_folder), run, "--chunk", "1") == 1
    fails_with(capsys, "no space left", "repeat the same command")
    finished = {artifact.key for artifact in Store(str(run / "store")).all()}
    assert finished
    monkeypatch.undo()
    assert pairs(str(people_folder), run, "--chunk", "1") == 0
    assert [row.status for row in RunFolder(run).read_rows()] == ["done"] * 3


def found(server: str, what: str) -> list[dict[str, Any]]:
    """All that a server has of a kind, the oldest first."""
    key = base64.b64encode(os.environ["PREFECT_API_AUTH_STRING"].encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {key}"}
    with urllib.request.urlopen(urllib.request.Request(f"{server}/{what}/filter", b"{}", headers)) as answer:
        return sorted(json.load(answer), key=lambda one: str(one["created"]))


def artifacts(server: str, flow_run: str = "") -> list[tuple[str, str, object]]:
    """(key, kind, data) of the artifacts that a server has, of one flow run if it is named."""
    return [(one["key"], one["type"], one["data"]) for one in found(server, "artifacts") if flow_run in ("", one["flow_run_id"])]


def test_the_running_server_has_seen_the_flows(running_server: str, people_folder: Path, tmp_path: Path) -> None:
    def runs() -> list[dict[str, str]]:
        return found(running_server, "flow_runs")

    before = len(runs())
    assert pairs(str(people_folder), tmp_path / "run") == 0
    assert len(runs()) == before + 1
    last = max(runs(), key=lambda run: run["created"])
    assert last["state_type"] == "COMPLETED"
    assert artifacts(running_server, last["id"]) == [("pairs-run", "progress", 100.0)]


def test_the_running_server_shows_what_failed(running_server: str, people: list[Path], tmp_path: Path) -> None:
    (tmp_path / "blank.png").write_bytes(encode_png(np.full((64, 64, 3), 90, np.uint8)))
    manifest = write_csv(tmp_path / "pairs.csv", [("id", "source", "target"), ("blank", "blank.png", people[0])])
    assert pairs(manifest, tmp_path / "Bad run") == 2
    (table,) = [data for key, kind, data in artifacts(running_server) if (key, kind) == ("failed-bad-run", "table")]
    (row,) = json.loads(str(table))
    assert (row["pair"], row["stage"], row["attempts"], row["quarantined"]) == ("blank", "align", 1, False)
    state = found(running_server, "flow_runs")[-1]["state"]  # that no pair could be done is no success
    assert (state["type"], state["message"]) == ("FAILED", "Flow run encountered an exception: AllFailed: 1 of 1 pair failed")
    some = write_csv(tmp_path / "some.csv", [("id", "source", "target"), ("blank", "blank.png", people[0]), ("good", people[1], people[0])])
    assert pairs(some, tmp_path / "Some") == 2
    state = found(running_server, "flow_runs")[-1]["state"]
    assert (state["type"], state["message"]) == ("COMPLETED", "1 of 2 pairs failed")


def test_a_scheduled_run_is_left_out_while_another_is_at_work(running_server: str, people_folder: Path, tmp_path: Path) -> None:
    """The run folder's lock decides, which the system releases with its process: no slot of Prefect's, which a power loss keeps."""
    from flows.pairs import pairs as pairs_flow

    folder = RunFolder(tmp_path / "run")
    folder.create()
    lock = folder.lock()
    state = pairs_flow(str(people_folder), str(folder.path), profile="fast", device="cpu", return_state=True)
    assert (state.type.value, "another process is working on this run" in str(state.message)) == ("CANCELLED", True)
    unlock(lock)
    assert found(running_server, "flow_runs")[-1]["state"]["type"] == "CANCELLED"
    assert "concurrency_limit" not in json.dumps(yaml.safe_load((ROOT / "prefect.yaml").read_text()))


def test_a_server_that_does_not_answer(people_folder: Path, tmp_path: Path, capsys: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert pairs(str(people_folder), tmp_path / "run") == 1
    fails_with(capsys, "http://127.0.0.1:9/api does not answer", "PREFECT_API_URL")


def test_swap_one_face(people: list[Path], tmp_path: Path, capsys: Text) -> None:
    output = tmp_path / "out.png"
    arguments = ["swap", str(people[0]), str(people[1]), "-o", str(output), "--profile", "fast", "--device", "cpu"]
    assert main(arguments) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    assert main([*arguments[:4], str(tmp_path / "out.jpg"), *arguments[5:]]) == 0
    assert (tmp_path / "out.jpg").read_bytes().startswith(b"\xff\xd8\xff")
    assert main([*arguments[:4], str(tmp_path / "out.gif"), *arguments[5:]]) == 1
    capsys.readouterr()
    for where, part in ((tmp_path / "nowhere", "not a file name in an existing folder"), (Path("/proc"), "cannot be written")):
        assert main([*arguments[:4], str(where / "out.png"), *arguments[5:], "--run", str(tmp_path / "run")]) == 1
        fails_with(capsys, str(where), part)
        assert not (tmp_path / "run").exists(), "nothing was computed"
    assert main([*arguments, "--face", "3"]) == 2
    fails_with(capsys, "align: target", "face 3 was asked for but 1 face was found")


def test_swap_leaves_no_registration_in_a_shared_store(people: list[Path], tmp_path: Path) -> None:
    arguments = ["swap", str(people[0]), str(people[1]), "-o", str(tmp_path / "out.png"), "--profile", "fast", "--device", "cpu"]
    store = Store(str(tmp_path / "store"))
    assert main([*arguments, "--store", store.url]) == 0
    assert store.runs.registered() == []
    assert main([*arguments, "--store", store.url, "--run", str(tmp_path / "run")]) == 0
    assert [run.path for run in store.runs.registered()] == [str(tmp_path / "run")]  # its folder stays


def test_status_report_cache_doctor_and_models(people_folder: Path, tmp_path: Path, capsys: Text) -> None:
    run = tmp_path / "run"
    assert pairs(str(people_folder), run) == 0
    assert main(["status", str(run)]) == 0
    assert "3 pairs: 3 done, 0 failed, 0 left" in capsys.readouterr().out
    assert main(["report", str(run), "--no-metrics"]) == 0
    page = (run / "report/index.html").read_text()
    assert page.count("<img") >= 3 * 10
    assert 'src="data:image/webp;base64,' in page
    assert "://" not in page  # self-contained
    assert main(["cache", "list", str(run)]) == 0
    assert main(["cache", "verify", str(run / "store")]) == 0
    assert "0 damaged" in capsys.readouterr().out
    path = next((run / "store/payload").rglob("*.png"))
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["cache", "verify", str(run)]) == 2
    assert main(["cache", "list", str(tmp_path / "nothing")]) == 1
    assert main(["doctor"]) == 0
    shutil.rmtree(run)


def test_models_that_can_be_added_are_listed_too(tmp_path: Path, capsys: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E4S_HOME", str(tmp_path))
    assert main(["models", "list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    known = {line[1]: line[3] for line in lines if len(line) > 3}
    assert "face_parser*" in known
    assert known["irse50"] == "absent"
    assert known["rgi*"] == "absent", "the star says that --profile paper needs it"
    assert "E4S/iteration_300000.pt" in next(line for line in lines if "rgi*" in line)
    assert known["cosface"] == "absent"
    assert main(["models", "verify", "cosface"]) == 2
    fails_with(capsys, "cosface", "models add --network cosface")


def test_no_rate_is_told_before_a_pair_is_done(capsys: Text) -> None:
    lines = Lines()
    lines.rate, lines.node, lines.printed = _Rate(4), "encode_driven", 0.0
    lines.within(0.5)
    assert capsys.readouterr().err == "0 of 4 pairs (encode_driven)\n"
    lines.advance([Row(id="0", source="a.png", target="b.png", status="done")])
    lines.printed = 0.0
    lines.within(0.5)
    first, second = capsys.readouterr().err.splitlines()
    assert "1 of 4 pairs, " in first
    assert "pairs/min" in second


def test_a_training_stopped_by_a_program_error_says_so_in_one_sentence(tmp_path: Path, capsys: Text) -> None:
    """With shards that hold something else, the first part that reads them meets what nobody foresaw."""
    (tmp_path / "data").mkdir()
    for number in range(3):
        np.savez(tmp_path / f"data/shard-{number:05d}.npz", nothing=0)
    assert main(["train", "rgi", "--out", str(tmp_path), "--people", "48", "--head-steps", "1", "--device", "cpu"]) == 1
    fails_with(capsys, "the training stopped in its part fit_head by a program error (KeyError", "error.txt", "continues")
    assert "read_shard" in (tmp_path / "error.txt").read_text()


def test_a_run_with_nothing_to_compute_is_a_run_too(tmp_path: Path, capsys: Text) -> None:
    manifest = write_csv(tmp_path / "pairs.csv", [("source", "target"), ("missing.png", "missing.png")])
    assert main(["pairs", manifest, "--run", str(tmp_path / "run"), "--profile", "fast", "--device", "cpu"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["status", str(tmp_path / "run")]) == 2
    assert "1 failed" in capsys.readouterr().out


def test_a_run_folder_can_be_moved_and_read_from_anywhere(
    people_folder: Path, tmp_path: Path, capsys: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert pairs(str(people_folder), Path("ein Lauf mit ü")) == 0
    (tmp_path / "here/ein Lauf mit ü").rename(tmp_path / "elsewhere/moved")
    monkeypatch.chdir(tmp_path)
    assert main(["cache", "verify", "elsewhere/moved"]) == 0
    checked = capsys.readouterr().out
    assert "0 damaged" in checked
    assert not checked.startswith("0 artifacts")
    assert main(["report", "elsewhere/moved", "--no-metrics"]) == 0
    assert (tmp_path / "elsewhere/moved/report/index.html").read_text().count("<img") == 3 * 14
    assert pairs(str(people_folder), tmp_path / "elsewhere/moved") == 0
    assert "3 done before, 0 to do" in capsys.readouterr().err


def test_a_report_names_what_is_gone(people_folder: Path, tmp_path: Path, capsys: Text) -> None:
    run = tmp_path / "run"
    assert pairs(str(people_folder), run) == 0
    (run / "outputs/000001.png").unlink()
    assert main(["report", str(run), "--no-metrics"]) == 0
    assert "result: moved or changed" in (run / "report/index.html").read_text()


def test_verify_finds_damage_in_what_is_finished_and_mends_it(people_folder: Path, tmp_path: Path, capsys: Text) -> None:
    run = tmp_path / "run"
    assert pairs(str(people_folder), run) == 0
    output = run / "outputs/000001.png"
    whole = output.read_bytes()
    output.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    capsys.readouterr()
    assert pairs(str(people_folder), run) == 0
    assert "3 done before, 0 to do" in capsys.readouterr().err
    assert output.read_bytes() != whole
    assert pairs(str(people_folder), run, "--verify") == 0
    assert output.read_bytes() == whole


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--store", "foo://bucket"], ["store foo://bucket"]),
        (["--set", "recolor.local_limit=[1.0]"], ["recolor.local_limit must be like"]),
        (["--set", "paste.feather=nan"], ["paste.feather must be float"]),
        (["--set", "parse.weights='nothing'"], ["nothing"]),
        (["--profile", "/etc/passwd/x.toml"], ["unknown profile"]),
    ],
)
def test_more_wrong_settings(arguments: list[str], parts: list[str], people_folder: Path, tmp_path: Path, capsys: Text) -> None:
    assert pairs(str(people_folder), tmp_path / "run", *arguments) == 1
    fails_with(capsys, *parts)


def test_swap_refuses_to_write_over_another_run(people: list[Path], tmp_path: Path, capsys: Text) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/manifest.parquet").touch()
    arguments = ["swap", str(people[0]), str(people[1]), "-o", str(tmp_path / "out.png"), "--run"]
    assert main([*arguments, str(tmp_path / "run")]) == 1
    fails_with(capsys, "choose another --run")
    assert main([*arguments, "/proc/e4s-run"]) == 1
    fails_with(capsys, "cannot be written")


def test_an_output_that_no_longer_stands_for_its_row_is_never_lost(people: list[Path], tmp_path: Path, capsys: Text) -> None:
    run, manifest = tmp_path / "run", tmp_path / "pairs.csv"
    write_csv(manifest, [("id", "source", "target"), ("a", people[0], people[1]), ("b", people[1], people[0])])
    assert pairs(str(manifest), run) == 0
    (run / "outputs/mine.txt").touch()
    write_csv(manifest, [("id", "source", "target", "target_face"), ("a", people[0], people[1], 5)])
    capsys.readouterr()
    assert pairs(str(manifest), run) == 2
    assert "outputs of other inputs or settings: 2 removed; the store keeps their results, " in capsys.readouterr().err
    assert [path.name for path in (run / "outputs").iterdir()] == ["mine.txt"]
    write_csv(manifest, [("id", "source", "target"), ("a", people[0], people[1]), ("b", people[1], people[0])])
    assert pairs(str(manifest), run) == 0  # taken from the store again
    results = {path.stem: path.read_bytes() for path in (run / "outputs").glob("*.png")}
    assert results.keys() == {"a", "b"}
    assert main(["cache", "prune", str(run), "--stage", "paste", "--yes"]) == 0
    write_csv(manifest, [("id", "source", "target"), ("a", people[0], people[1])])
    assert pairs(str(manifest), run) == 0
    assert f"outputs of other inputs or settings: 1 moved to {run}/replaced; " in capsys.readouterr().err
    (moved,) = (run / "replaced").iterdir()  # nothing else holds it
    assert moved.name.startswith("b-")
    assert moved.read_bytes() == results["b"]


def test_a_command_that_cannot_begin_leaves_the_outputs(people: list[Path], tmp_path: Path, capsys: Text) -> None:
    run, manifest, source = tmp_path / "run", tmp_path / "pairs.csv", tmp_path / "source.png"
    shutil.copy(people[0], source)
    write_csv(manifest, [("id", "source", "target"), ("a", source, people[1])])
    assert pairs(str(manifest), run) == 0
    result = (run / "outputs/a.png").read_bytes()
    dead = ("--dask", "tcp://127.0.0.1:9", "--dask-wait", "1")
    assert pairs(str(manifest), run, "--set", "blend.levels=3", *dead) == 1
    assert (run / "outputs/a.png").read_bytes() == result
    assert main(["status", str(run)]) == 0
    source.rename(tmp_path / "away.png")  # its disk is away for a moment
    assert pairs(str(manifest), run) == 2
    assert (run / "outputs/a.png").read_bytes() == result
    (tmp_path / "away.png").rename(source)
    assert pairs(str(manifest), run) == 0
    assert "removed" not in capsys.readouterr().err
    assert [path.name for path in (run / "outputs").iterdir()] == ["a.png"]


def test_files_where_run_folders_are_expected(tmp_path: Path, capsys: Text) -> None:
    (tmp_path / "file").touch()
    for command in ("status", "report"):
        assert main([command, str(tmp_path / "file")]) == 1
        fails_with(capsys, "file/run.json")


def test_synth_says_what_it_made_and_refuses_nothing(tmp_path: Path, capsys: Text) -> None:
    assert main(["synth", "--count", "0", "--out", str(tmp_path / "people")]) == 1
    fails_with(capsys, "count")


def test_settings_are_listed_with_defaults_and_units(capsys: Text) -> None:
    assert main(["settings"]) == 0
    assert "swap: composite, fused, codes, rgi" in capsys.readouterr().out.splitlines()
    assert main(["settings", "blend"]) == 0
    assert re.search(r"^blend\.levels +\d+ +\S", capsys.readouterr().out, re.M)
    assert main(["settings", "output"]) == 0
    assert re.search(r"^output\.b_frames +2 +$", capsys.readouterr().out, re.M)  # no comment of its neighbour
    assert main(["settings", "swop"]) == 1
    assert "unknown stage 'swop' (did you mean swap?)" in capsys.readouterr().err


def test_every_setting_says_what_it_means() -> None:
    from flows.settings_table import list_settings, stage_names

    settings = [setting for stage in stage_names() for setting in list_settings(stage) if setting.name]
    silent = [f"{setting.stage}.{setting.name}" for setting in settings if not setting.meaning]
    assert len(silent) < 0.1 * len(settings), silent


def test_the_version(capsys: Text) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"e4s \d+\.\d+\.\d+\n", capsys.readouterr().out)
