"""The package `e4s`: what notebooks and scripts call. docs/api.md is typed as it stands."""

from __future__ import annotations

import doctest
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import e4s
from flows.api import Options, PairOptions, VideoOptions
from flows.plan import Request
from flows.video_plan import VideoRequest
from tasks.frame import hash_file

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small(people_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four people at 256 px."""
    folder = tmp_path_factory.mktemp("small")
    for path in sorted(people_folder.rglob("*.png")):
        with Image.open(path) as image:
            image.resize((256, 256), Image.Resampling.LANCZOS).save(folder / path.name)
    return folder


@pytest.mark.parametrize(("options", "request_class"), [(PairOptions, Request), (VideoOptions, VideoRequest)])
def test_options_are_those_of_a_request(options: type, request_class: type) -> None:
    given = {"manifest", "run", "stages", "changes"}
    assert {*Options.__annotations__, *options.__annotations__} | given == {field.name for field in fields(request_class)}


def test_a_swap_is_the_commands(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = small / "000000.png", small / "000001.png"
    swapped = e4s.swap(source, target, tmp_path / "out.png", profile="fast", device="cpu", progress=False)
    assert swapped.image.shape == (256, 256, 3)
    assert swapped.image.dtype == np.uint8
    with Image.open(tmp_path / "out.png") as written:
        assert np.array_equal(np.asarray(written.convert("RGB")), swapped.image)
    assert capsys.readouterr() == ("", "")
    from flows.cli import main

    assert main(["swap", str(source), str(target), "-o", str(tmp_path / "again.png"), "--profile", "fast", "--device", "cpu"]) == 0
    assert hash_file(str(tmp_path / "again.png")) == hash_file(str(tmp_path / "out.png"))


def test_what_cannot_be_is_said_before_any_work(small: Path, tmp_path: Path) -> None:
    source, target = small / "000000.png", small / "000001.png"
    with pytest.raises(e4s.UsageError, match=r"unknown option 'chunks' \(did you mean chunk\?\)"):
        e4s.swap(source, target, chunks=3)  # type: ignore[call-arg]
    with pytest.raises(e4s.UsageError, match=r"--set blend.levels=many|blend"):
        e4s.swap(source, target, settings={"blend.levels": "many"}, device="cpu", progress=False)
    with pytest.raises(e4s.UsageError, match=r"out.bmp: the result is a .png, .jpg or .webp file"):
        e4s.swap(source, target, tmp_path / "out.bmp")
    with pytest.raises(e4s.RunError, match="nowhere"):
        e4s.open_run(tmp_path / "nowhere")
    Image.new("RGB", (256, 256)).save(tmp_path / "black.png")
    with pytest.raises(e4s.ItemError, match=r"align: .*no face"):
        e4s.swap(tmp_path / "black.png", target, profile="fast", device="cpu", progress=False)


def test_pairs_go_on_and_are_read_as_tables(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    people = sorted(small.glob("*.png"))
    Image.new("RGB", (256, 256)).save(tmp_path / "black.png")
    pairs = [(people[0], people[1]), (tmp_path / "black.png", people[1])]
    run = e4s.pairs(pairs, tmp_path / "run", profile="fast", device="cpu", progress=False)
    assert run.kind == "pairs"
    assert run.counts() == {"done": 1, "failed": 1, "left": 0}
    assert repr(run) == f"<e4s run of pairs {str(tmp_path / 'run')!r}: 1 done, 1 failed>"
    table = run.table()
    assert table.column("status").to_pylist() == ["done", "failed"]
    before = hash_file(str(run.output("000000")))
    with pytest.raises(e4s.ItemError, match=r"000001 is failed \(align: .*no face"):
        run.output("000001")
    with pytest.raises(e4s.UsageError, match="no item '00001'"):
        run.output("00001")
    with pytest.raises(e4s.RunError, match="nothing was measured yet"):
        run.metrics()
    again = e4s.pairs(pairs, tmp_path / "run", profile="fast", device="cpu", progress=False)
    columns = ["id", "status", "output_sha256"]
    assert again.table().select(columns).equals(table.select(columns))
    assert hash_file(str(again.output("000000"))) == before
    written = e4s.report(run, measure=False, progress=False)
    assert written.page.stat().st_size > 10_000
    assert e4s.open_run(tmp_path / "run").counts()["done"] == 1
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "run/prefect.log").exists()  # no server, no database in the user's home


def test_the_page_runs_as_it_stands(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "people").symlink_to(small)
    found = doctest.testfile(str(ROOT / "docs/api.md"), module_relative=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 5
    assert not found.failed


def test_importing_is_light() -> None:
    code = "import sys, e4s; print([m for m in ('torch', 'prefect', 'dlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
