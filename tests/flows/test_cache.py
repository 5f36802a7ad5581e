"""`e4s cache` on the command line: what is shown, what is done, what is refused."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from flows.cache import parse_age, parse_size, size
from flows.cli import main
from storage.run import RunFolder
from storage.store import Finished, Store
from tasks.graph import UsageError

Text = pytest.CaptureFixture[str]


@pytest.fixture
def place(tmp_path: Path) -> str:
    store = Store(str(tmp_path / "store"))
    noise = np.random.default_rng(0)
    for key, stage in (("a", "align"), ("b", "swap"), ("c", "swap")):
        store.publish([Finished(key, stage, {"face": ("image", noise.integers(0, 255, (64, 64), np.uint8))})])
    store.publish([Finished("d", "align", reason="no face found")])
    store.publish([Finished("e", "deep3d_expression_of_a_swapped_face", reason="no face found")])  # the longest names are those of networks
    return store.url


def test_list_shows_stages_index_and_runs(place: str, tmp_path: Path, capsys: Text) -> None:
    with Store(place).register(tmp_path, ["a"]):
        assert main(["cache", "list", place]) == 0
    printed = capsys.readouterr().out
    table = [line for line in printed.split("\n") if not line.startswith((place, "run "))]
    rows = {line.split()[0]: line.split()[1:] for line in table if line}
    assert rows["align"][:2] == ["2", "1"]
    assert rows["swap"][:2] == ["2", "0"]
    assert max(map(len, table)) <= 80
    for row in (rows["align"], rows["swap"]):
        first, last = (datetime.fromisoformat(" ".join(words)) for words in (row[-4:-2], row[-2:]))
        assert first <= last  # both are shown whole
    assert "5 artifacts" in printed
    assert "index: 5 parts" in printed
    assert f"run {tmp_path} on" in printed
    assert "running" in printed


def test_verify_names_what_is_damaged_and_cancels_it(place: str, capsys: Text) -> None:
    assert main(["cache", "verify", place]) == 0
    assert "5 artifacts checked, 0 damaged" in capsys.readouterr().out
    artifact = Store(place).lookup(["b"])["b"]
    (Path(place) / artifact.payloads["face"].file).write_bytes(b"")
    min((Path(place) / "index").glob("*.parquet")).write_bytes(b"")  # the first: that of a
    assert main(["cache", "verify", place]) == 2
    printed = capsys.readouterr().out
    assert f"swap: {artifact.payloads['face'].file} does not match its digest; it will be computed again when needed" in printed
    assert "4 artifacts checked, 1 damaged; 1 index part damaged" in printed
    assert Store(place).lookup(["a", "b", "c"]).keys() == {"c"}


def test_compact(place: str, capsys: Text) -> None:
    assert main(["cache", "compact", place]) == 0
    assert "5 index parts" in (printed := capsys.readouterr().out)
    assert "merged into 1" in printed
    assert len(Store(place).all()) == 5


def test_prune_shows_first_and_does_it_with_yes(place: str, capsys: Text) -> None:
    assert main(["cache", "prune", place, "--stage", "swap"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "swap: 2 artifacts"
    assert shown[1].startswith("would remove 2 artifacts with 2 files (")
    assert shown[2] == "this was a dry run, nothing was removed; the same command with --yes removes it"
    assert len(Store(place).all()) == 5
    assert main(["cache", "prune", place, "--stage", "swap", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == shown
    assert main(["cache", "prune", place, "--stage", "swap", "--yes"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("removed 2 artifacts with 2 files (")
    assert {artifact.key for artifact in Store(place).all()} == {"a", "d", "e"}
    assert len(list(Path(place).rglob("*.png"))) == 1


def test_prune_by_run_age_failure_and_size(place: str, tmp_path: Path, capsys: Text) -> None:
    run = tmp_path / "run"
    RunFolder(run).create()
    Store(place).register(run, ["b"]).close()
    assert main(["cache", "prune", place, "--older-than", "1d", "--yes"]) == 0
    assert len(Store(place).all()) == 5
    assert main(["cache", "prune", place, "--run", str(run), "--yes"]) == 0
    assert {artifact.key for artifact in Store(place).all()} == {"a", "c", "d", "e"}
    assert main(["cache", "prune", place, "--failed", "--yes"]) == 0
    assert {artifact.key for artifact in Store(place).all()} == {"a", "c"}
    assert main(["cache", "prune", place, "--max-size", "5kB", "--yes"]) == 0
    assert {artifact.key for artifact in Store(place).all()} == {"c"}
    assert "kept" in capsys.readouterr().out


def test_prune_what_no_run_uses(place: str, tmp_path: Path, capsys: Text) -> None:
    for name, keys in (("one", ["a", "b"]), ("two", ["b"])):
        RunFolder(tmp_path / name).create()
        Store(place).register(tmp_path / name, keys).close()
    shutil.rmtree(tmp_path / "two")
    assert main(["cache", "prune", place]) == 0
    assert "only what crashed writers left was looked for: --unused, " in capsys.readouterr().out
    assert main(["cache", "prune", place, "--unused", "--yes"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("align: 1 artifact\nswap: 1 artifact\nremoved 2 artifacts with 1 file (")
    assert f"{tmp_path / 'two'} is gone, what it used counts all the same" in printed.err
    assert {artifact.key for artifact in Store(place).all()} == {"a", "b", "e"}  # e was measured: no run says whether it uses it


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--max-size", "50"], "--max-size '50': give a number with a unit"),
        (["--max-size", "lots"], "--max-size 'lots': give a number with a unit"),
        (["--older-than", "30"], "--older-than '30': give a number with a unit"),
        (["--stage", "swop"], "swop: the store holds nothing of such a stage"),
        (["--run", "nowhere"], "--run nowhere: no such run"),
        (["--with-shared"], "--with-shared goes with --run"),
        (["--unused"], "no run is registered in this store, so all of it would count as unused"),
        (["--unused", "--run", "nowhere"], "--unused is about all runs: leave --run out"),
        (["--unused", "--stage", "deep3d_expression_of_a_swapped_face"], "no run says whether it uses what deep3d"),
    ],
)
def test_bad_input_is_one_sentence(place: str, capsys: Text, arguments: list[str], part: str) -> None:
    assert main(["cache", "prune", place, *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("e4s: ")
    assert part in line


@pytest.mark.parametrize("action", ["list", "verify", "compact", "prune"])
def test_no_store_there(tmp_path: Path, capsys: Text, action: str) -> None:
    assert main(["cache", action, str(tmp_path / "nothing")]) == 1
    assert "neither a run folder nor a store" in capsys.readouterr().err


def test_sizes_and_ages() -> None:
    assert [parse_size(text) for text in ("50GB", "1.5 MiB", "800kb", "12B")] == [50 * 10**9, 3 * 2**19, 800_000, 12]
    assert [parse_age(text) for text in ("30d", "12h", "2w", "45m")] == [30 * 86400, 43200, 14 * 86400, 2700]
    with pytest.raises(UsageError):
        parse_size("GB")
    assert [size(count) for count in (999, 1000, 2.5e9, 3e15)] == ["999 B", "1.0 kB", "2.5 GB", "3000.0 TB"]
