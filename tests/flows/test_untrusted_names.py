"""Paths and names in data files: nothing outside of the run folder is touched, no password is kept or shown, names stay as they are."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.cli import main
from flows.engine import execute
from flows.inputs import read_pairs
from flows.plan import Request, make_plan
from flows.progress import Lines, counted
from flows.video_plan import read_videos
from storage.codec import encode_png
from storage.files import Files, StoreError
from storage.run import DamagedFile, Row, RunFolder
from storage.store import Store
from storage.video_run import VideoRow, VideoRunFolder

Text = pytest.CaptureFixture[str]
SECRET = "hunter2"
NAMED = "[bold]a[/b] :smile:"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A manifest of one pair whose pictures hold no face, so that it fails at once."""
    (tmp_path / "blank.png").write_bytes(encode_png(np.full((64, 64, 3), 90, np.uint8)))
    (tmp_path / "pairs.csv").write_text("id,source,target\na,blank.png,blank.png\n")
    return tmp_path / "pairs.csv"


def carry_out(manifest: Path, run: str | Path, store: str = "") -> None:
    plan = make_plan(Request(manifest=str(manifest), run=str(run), profile="fast", device="cpu", store=store))
    assert execute(plan, Lines()).failed == 1
    plan.close()


@pytest.mark.parametrize(
    "output", ["../victim", "outputs/../../victim", "{folder}/victim", "outputs", "run.json", "outputs/a/b.png", "outputs/.."]
)
def test_an_output_outside_of_the_folder_of_outputs_is_not_believed(output: str, manifest: Path, tmp_path: Path, capsys: Text) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run = RunFolder(tmp_path / "run")
    run.create()
    row = Row(id="old", source="s.png", target="t.png", status="done", key="k", output=output.format(folder=tmp_path))
    run.write_rows([row])
    with pytest.raises(DamagedFile, match=r"'old' names .* as its output"):
        run.read_rows()
    carry_out(manifest, run.path)
    assert "manifest.parquet: damaged; made again" in capsys.readouterr().err
    assert victim.read_text() == "precious"
    assert list((tmp_path / "run").glob("replaced/*")) == []


def test_an_id_that_is_a_path_is_not_believed(tmp_path: Path) -> None:
    run = VideoRunFolder(tmp_path)
    run.write_rows([VideoRow(id="../../victim", source="s.png", video="v.mkv")])
    with pytest.raises(DamagedFile, match=r"the id '../../victim' is no file name"):
        run.read_rows()


def test_a_payload_outside_of_the_store_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"precious")
    files = Files(str(tmp_path / "store"))
    for file in ("../secret", "payload/../../secret"):
        with pytest.raises(StoreError, match="outside of it"):
            files.read(file)


def test_a_relative_store_is_saved_absolute(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    carry_out(manifest, "run", "common")
    saved = json.loads((tmp_path / "run/run.json").read_bytes())
    assert saved["store"] == saved["request"]["store"] == str(tmp_path / "common")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["cache", "list", str(tmp_path / "run")]) == 0
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("given", "saved"),
    [
        ("", ""),
        ("s3://bucket/a", "s3://bucket/a"),
        ("memory://a", "memory://a"),
        ("/a/b/", "/a/b"),
        ("a/b", "{cwd}/a/b"),
        ("file:///a", "/a"),
        ("~/a", "{home}/a"),
        ("ftp://me@host:21/a@b:c", "ftp://me@host:21/a@b:c"),
    ],
)
def test_stores_as_they_are_saved(given: str, saved: str) -> None:
    request = Request(manifest="m", run="r", store=given)
    assert request.store == saved.format(cwd=Path.cwd(), home=Path.home())
    assert replace(request).store == request.store


@pytest.mark.parametrize(
    "url", [f"ftp://me:{SECRET}@127.0.0.1:1/a", f"memory://me:{SECRET}/x@host/a", f"simplecache::ftp://me:{SECRET}@h/a"]
)
def test_a_password_in_a_url_is_refused_and_shown_nowhere(url: str, manifest: Path, tmp_path: Path, capsys: Text) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for arguments in (
        ["pairs", str(manifest), "--run", str(run), "--profile", "fast", "--store", url],
        ["swap", str(manifest), str(manifest), "-o", str(tmp_path / "o.png"), "--store", url],
        ["cache", "list", url],
    ):
        assert main(arguments) == 1
        said = capsys.readouterr()
        assert SECRET not in said.out + said.err
        assert "://me:***@" in said.err and "FSSPEC_" in said.err
        assert len(said.err.splitlines()) == 1
    assert not any(SECRET in path.read_text(errors="replace") for path in run.rglob("*") if path.is_file())
    with pytest.raises(StoreError):
        Store(url)


@pytest.mark.parametrize(("cell", "name"), [(0, "0"), (7, "7"), ("0", "0"), (None, "000000"), ("", "000000")])
def test_an_id_is_kept_as_it_is(cell: object, name: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [cell], "source": ["s.png"], "target": ["t.png"], "video": ["v.mkv"]}), tmp_path / "m.parquet")
    assert [pair.id for pair in read_pairs(str(tmp_path / "m.parquet"))] == [name]
    assert [row.id for row in read_videos(str(tmp_path / "m.parquet"))] == [name]


def test_names_that_look_like_markup_are_printed_as_they_are(manifest: Path, tmp_path: Path, capsys: Text) -> None:
    folder = tmp_path / NAMED
    folder.mkdir(parents=True)
    carry_out(manifest, folder / "run", str(folder / "store"))
    capsys.readouterr()
    assert main(["status", str(folder / "run")]) == 2
    printed = capsys.readouterr().out
    assert f"{folder}/run: 1 pair: " in printed
    assert f"store {folder}/store" in printed
    assert main(["status", str(folder / "run"), "--follow"]) == 2
    assert f"{folder}/run: 1 pair: " in capsys.readouterr().out.replace("\n", "")
    assert main(["cache", "list", str(folder / "store")]) == 0
    assert f"run {folder}/run on" in capsys.readouterr().out


def test_bars_show_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "200")
    with counted("frames") as show:
        show(1, 2, NAMED)
    assert NAMED in screen.getvalue()
