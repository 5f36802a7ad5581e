"""Runs of videos: why something is computed, which failures are remembered, what is kept of a run whose settings were changed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from video_clips import make_video

from flows.cli import main
from flows.execution.summary import Summary
from flows.status import print_status
from flows.video_engine import execute_videos
from flows.video_plan import VideoRequest, make_video_plan
from flows.video_why import explain_videos, video_headline
from storage.codec import encode_png
from storage.store import Store
from storage.video_run import VideoRunFolder

ROOT = Path(__file__).parents[2]
Text = pytest.CaptureFixture[str]
CHEAP = ("align.side=160", "parse.side=160", "output.gop=4", "output.codec=ffv1")
FRAMES, SEGMENTS, SIDE = 6, 2, 232
CARRY_ON = """
import json, sys
from flows.video_engine import execute_videos
from flows.video_plan import VideoRequest, make_video_plan
execute_videos(make_video_plan(VideoRequest(**json.loads(sys.argv[1]))))
"""
BLIND = """
from tasks.reenact import BACKENDS as OURS
from dataclasses import replace
from tasks.stage import each
BACKENDS = {"blind:STAGE": replace(OURS["none"], backend="blind:STAGE", reads=("target_face",),
                                   run=each(lambda model, config, inputs: {"driven": inputs["target_face"]}))}
"""


def request(manifest: Path, run: Path, *more: str, **changes: object) -> VideoRequest:
    wanted = VideoRequest(
        manifest=str(manifest),
        run=str(run),
        profile="fast",
        device="cpu",
        stages=["swap=composite"],
        changes=(*CHEAP, *more),
        threads=1,
    )
    return replace(wanted, **changes)


def carry_out(wanted: VideoRequest) -> Summary:
    plan = make_video_plan(wanted)
    try:
        return execute_videos(plan)
    finally:
        plan.close()


def reasons(wanted: VideoRequest) -> dict[str, tuple[str, str]]:
    """Pass -> (how often, why) of a dry plan in which every pass has one reason."""
    found = explain_videos(make_video_plan(wanted, dry=True))
    assert len({reason.node for reason in found}) == len(found), found
    return {reason.node: (reason.number, reason.why) for reason in found}


@pytest.fixture(scope="module")
def films(people: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip.mkv of person 1, videos.csv that lists it, blank.png without a face."""
    folder = tmp_path_factory.mktemp("films")
    with Image.open(people[1]) as picture:
        person = np.asarray(picture.convert("RGB").resize((SIDE + 10, SIDE + 10), Image.Resampling.BOX))

    def shown(index: int) -> np.ndarray:
        return np.ascontiguousarray(person[index : index + SIDE, 5 : 5 + SIDE])

    times = [40 * index for index in range(FRAMES)]
    make_video(folder / "clip.mkv", times, size=(SIDE, SIDE), codec="libx264", shown=shown, options={"crf": "12"})
    (folder / "blank.png").write_bytes(encode_png(np.full((64, 64, 3), 90, np.uint8)))
    (folder / "videos.csv").write_text(f"id,source,video\nfilm,{people[0]},clip.mkv\n")
    return folder


@pytest.fixture(scope="module")
def finished(films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the clip; tests read it or work on a copy."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    summary = carry_out(request(films / "videos.csv", run))
    assert (summary.done, summary.computed["segment"]) == (1, SEGMENTS)
    return run


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_why_names_the_changed_field_and_what_follows_from_it(finished: Path, films: Path, capsys: Text) -> None:
    manifest = films / "videos.csv"
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    assert reasons(request(manifest, finished)) == {}
    assert reasons(request(manifest, finished, "blend.levels=3")) == {
        "segment": ("2", "blend: config changed: levels 6 -> 3"),
        "join": ("1", "upstream changed: segment"),
    }
    assert reasons(request(manifest, finished, "smooth.centre=0.5")) == {
        "track": ("1", "config changed: smooth.centre 1.0 -> 0.5"),
        "segment": ("?", "config changed: smooth.centre 1.0 -> 0.5"),
        "join": ("1", "upstream changed: track, segment"),
    }
    found = reasons(request(manifest, finished, "align.min_face=33"))
    assert found["align (source)"] == ("1", "config changed: min_face 40 -> 33")
    assert found["mesh (source)"] == ("1", "upstream changed: align")
    assert found["track"] == ("1", "config changed: align.min_face 40 -> 33")
    assert list(found) == ["align (source)", "mesh (source)", "parse (source)", "track", "segment", "join"]
    assert reasons(request(manifest, finished, "output.container=mp4", "output.codec=libx264"))["segment"] == (
        "2",
        "config changed: output.codec ffv1 -> libx264",
    )
    assert reasons(request(manifest, finished, "output.container=mkv")) == {"join": ("1", "config changed: output.container auto -> mkv")}
    assert reasons(request(manifest, finished, "paste.feather=0.1"))["segment"][1] == "config changed: paste.feather 0.016 -> 0.1"
    assert main(["status", str(finished), "--why"]) == 0
    assert "nothing would be computed" in capsys.readouterr().out
    assert main(["status", str(finished), "--why", str(manifest), "--set", "output.gop=3"]) == 0
    printed = capsys.readouterr().out
    assert "1 video: 0 done, 1 to do, 0 not tried" in printed
    assert "config changed: output.gop 4 -> 3" in printed
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before  # it only reads


def test_why_names_weights_libraries_and_new_videos(finished: Path, films: Path, people: list[Path], tmp_path: Path) -> None:
    other = VideoRunFolder(tmp_path / "run")
    other.create()
    settings = VideoRunFolder(finished).read_settings()
    settings["videos"]["prints"]["detect"]["weights"]["dlib_landmarks68"] = "0123456789abcdef"
    settings["videos"]["prints"]["probe"]["libraries"]["av"] = "1.0"
    other.write_settings(settings)
    other.write_rows(VideoRunFolder(finished).read_rows())
    found = reasons(request(films / "videos.csv", other.path))
    assert found["probe"][1].startswith("library changed: av 1.0 -> ")
    assert found["detect"][0] == "?"
    assert found["detect"][1].startswith("weights changed: dlib_landmarks68 0123456789ab -> ")
    assert found["track"] == ("?", "upstream changed: probe, detect")
    (tmp_path / "more.csv").write_text(f"id,source,video\nfilm,{people[2]},{films}/clip.mkv\nfresh,{people[2]},{films}/clip.mkv\n")
    plan = make_video_plan(request(tmp_path / "more.csv", finished), dry=True)
    found = {(reason.node, reason.why): reason.number for reason in explain_videos(plan)}
    assert found == {
        ("align (source)", "new picture"): "1",
        ("mesh (source)", "new picture"): "1",
        ("parse (source)", "new picture"): "1",
        ("segment", "input changed: source"): "2",
        ("segment", "new"): "2",
        ("join", "input changed: source"): "1",
        ("join", "new"): "1",
    }
    assert video_headline(plan).startswith("1 finished video computed again (align (source): new picture")


def test_why_names_what_is_pruned_damaged_or_gone(copy: Path, films: Path, capsys: Text) -> None:
    wanted, folder = request(films / "videos.csv", copy), VideoRunFolder(copy)
    (row,) = folder.read_rows()
    (copy / row.output).unlink()
    assert reasons(wanted) == {"join": ("1", "output gone or changed")}
    store = Store(str(copy / "store"))
    artifact = next(artifact for artifact in store.artifacts() if artifact.stage == "track")
    payload = copy / "store" / artifact.payloads["centre"].file
    whole = payload.read_bytes()
    payload.write_bytes(whole[:-20])
    assert reasons(wanted) == {
        "track": ("1", "damaged"),
        "segment": ("?", "upstream not there: track"),
        "join": ("1", "upstream not there: segment"),
    }
    assert len(list(store.artifacts())) == len(list(Store(str(copy / "store")).artifacts()))  # nothing was cancelled
    payload.write_bytes(whole)
    for stage in ("probe", "segment", "mesh"):
        assert main(["cache", "prune", str(copy), "--stage", stage, "--yes"]) == 0
    assert reasons(wanted) == {  # how many frames there are says the row
        "probe": ("1", "pruned"),
        "mesh (source)": ("1", "pruned"),
        "segment": ("2", "pruned"),
        "join": ("1", "upstream not there: segment"),
    }
    summary = carry_out(wanted)
    assert {name: summary.computed.get(name, 0) for name in ("probe", "detect", "track", "segment")} == {
        "probe": 1,
        "detect": 0,
        "track": 0,
        "segment": 2,
    }
    assert folder.read_rows()[0].output_sha256 == row.output_sha256


def test_what_a_killed_run_left_is_unfinished(films: Path, tmp_path: Path) -> None:
    wanted = request(films / "videos.csv", tmp_path / "run")
    text = json.dumps(
        {name: getattr(wanted, name) for name in ("manifest", "run", "profile", "device", "stages", "changes", "chunk", "threads")}
    )
    fault = {**os.environ, "E4S_FAULT": "before-join"}
    assert subprocess.run([sys.executable, "-c", CARRY_ON, text], cwd=ROOT, env=fault, check=False).returncode == -signal.SIGKILL
    assert reasons(wanted) == {"join": ("1", "not finished before")}
    assert main(["cache", "prune", str(tmp_path / "run"), "--stage", "track", "--yes"]) == 0
    assert reasons(wanted)["segment"] == ("?", "not finished before")
    assert main(["cache", "prune", str(tmp_path / "run"), "--unused"]) == 0  # an interrupted run's work is in use


def test_a_remembered_failure_is_not_announced_as_work(films: Path, people: list[Path], tmp_path: Path, capsys: Text) -> None:
    (tmp_path / "videos.csv").write_text(
        f"id,source,video,face\nblank,{films}/blank.png,{films}/clip.mkv,\nthird,{people[0]},{films}/clip.mkv,3\n"
    )
    wanted = request(tmp_path / "videos.csv", tmp_path / "run", max_attempts=2)
    assert carry_out(wanted).failed == 2
    first = VideoRunFolder(tmp_path / "run").read_rows()

    def rerun(*retry: str) -> tuple[dict[str, int], list[int]]:
        summary = carry_out(replace(wanted, retry=retry))
        assert summary.failed == 2
        return summary.computed, [row.attempts for row in VideoRunFolder(tmp_path / "run").read_rows()]

    plan = make_video_plan(wanted)
    assert (plan.todo, plan.lease) == ([], None)
    assert [(row.status, row.stage, row.reason) for row in plan.rows.values()] == [(row.status, row.stage, row.reason) for row in first]
    assert [row.frames for row in plan.rows.values()] == [FRAMES, FRAMES]
    plan.close()
    command = ["videos", wanted.manifest, "--run", wanted.run, "--profile", "fast", "--device", "cpu", "--stage", "swap=composite"]
    for change in CHEAP:
        command += ["--set", change]
    capsys.readouterr()
    assert main([*command, "--threads", "1"]) == 2  # needs no Prefect server: there is nothing to do
    assert "2 videos: 0 done before, 0 to do, 2 cannot be done" in capsys.readouterr().err
    assert rerun() == ({}, [1, 1])
    assert reasons(replace(wanted, retry=("failed",)))["track"] == ("2", "failed before, tried again")
    assert rerun("failed") == ({"align": 1, "track": 1}, [2, 2])
    assert rerun("failed") == ({}, [2, 2])  # in quarantine
    assert rerun("quarantined") == ({"align": 1, "track": 1}, [1, 1])


def test_status_lists_stages_as_a_video_goes_through_them(finished: Path, capsys: Text) -> None:
    assert print_status(str(finished)) == 0
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    done = {line[1].strip(): line[2].strip() for line in lines}
    assert list(done)[:7] == ["probe", "align (source)", "mesh (source)", "parse (source)", "detect", "track", "mesh"]
    assert list(done)[-2:] == ["inpaint", "segment"]
    assert (done["align (source)"], done["blend"], done["segment"]) == ("1", str(FRAMES), str(SEGMENTS))


def test_changed_settings_lose_nothing_and_what_they_leave_can_be_pruned(copy: Path, films: Path, people: list[Path], capsys: Text) -> None:
    folder, store = VideoRunFolder(copy), Store(str(copy / "store"))
    (row,) = folder.read_rows()
    whole = (copy / row.output).read_bytes()
    segments = {artifact.key for artifact in store.artifacts() if artifact.stage == "segment"}
    manifest = copy / "videos.csv"
    manifest.write_text(f"id,source,video\nfilm,{people[0]},{films}/clip.mkv\nblank,{films}/blank.png,{films}/clip.mkv\n")
    assert carry_out(request(manifest, copy)).done == 1
    for other in store.runs.registered():  # that this one is a copy of
        if other.path != str(copy):
            store.runs.forget(other)
    capsys.readouterr()
    assert main(["cache", "prune", str(copy), "--unused", "--yes"]) == 0
    assert "removed 0 artifacts" in capsys.readouterr().out  # what is done is in use, though only the other video was worked on
    carry_out(request(manifest, copy, "paste.feather=0.1"))
    assert "outputs of other inputs or settings: 1 moved to" in capsys.readouterr().err
    (moved,) = (copy / "replaced").iterdir()
    assert moved.read_bytes() == whole
    assert main(["cache", "prune", str(copy), "--unused", "--yes"]) == 0
    assert capsys.readouterr().out.startswith("segment: 2 artifacts\n")
    kept = {artifact.key for artifact in Store(str(copy / "store")).artifacts()}
    assert not kept & segments
    assert reasons(request(manifest, copy, "paste.feather=0.1")) == {}


def test_frames_that_need_nothing_of_the_source_are_refused(
    films: Path, tmp_path: Path, capsys: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blind.py").write_text(BLIND)
    monkeypatch.syspath_prepend(tmp_path)
    command = ["videos", str(films / "videos.csv"), "--run", str(tmp_path / "run"), "--profile", "fast", "--device", "cpu"]
    assert main([*command, "--stage", "reenact=blind:STAGE", "--stage", "swap=composite", "--why"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "with reenact=blind:STAGE and swap=composite no frame needs work on the source picture" in line
