"""One item never stops the others: a stage that raises costs the item that made it raise, in this process and on Dask workers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.cheap import make_inputs
from benchmarks.poisoned import BLEND, CLIPS, VIDEO_CULPRITS, make_videos
from flows.engine import execute
from flows.execution.summary import Summary
from flows.plan import Request, make_plan
from flows.progress import Lines
from flows.status import print_status
from flows.video_engine import execute_videos
from flows.video_plan import VideoRequest, make_video_plan
from storage.codec import encode_png
from storage.run import RunError, RunFolder
from storage.video_run import VideoRunFolder
from tasks.video import probe

FRAMES = 4  # of each video
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


@pytest.mark.parametrize("dask", ["", "local:2"])
def test_many_culprits_stop_nothing(dask: str, poisoned: tuple[str, str], tmp_path: Path) -> None:
    rows = pq.read_table(poisoned[0]).to_pylist()
    for row in rows[:7]:
        row["target"] = "green.png"
    pq.write_table(pa.Table.from_pylist(rows), poisoned[0])
    summary = carry_out(poisoned, tmp_path / "run", chunk=2, dask=dask)
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


def test_six_videos_of_which_one_makes_a_stage_raise(people: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """First on Dask, then, where nothing but the culprit is left, in this process."""
    run = tmp_path / "run"
    manifest = make_videos(tmp_path / "films", people[1], FRAMES)
    settings: dict[str, Any] = {"profile": "fast", "device": "cpu", "stages": ("swap=composite", BLEND), "threads": 1}
    cheap = ("align.side=160", "parse.side=160", "output.preset=ultrafast")
    found = []
    for dask in ("local:1", ""):
        plan = make_video_plan(VideoRequest(manifest=str(manifest), run=str(run), changes=cheap, dask=dask, **settings))
        try:
            found.append(execute_videos(plan))
        finally:
            plan.close()
    for attempt, summary in enumerate(found, 1):
        assert (summary.done, summary.failed, summary.left, summary.exit_code) == (5, 1, 0, 2), attempt
    assert found[1].computed["segment"] == 1  # the culprit's
    assert not found[1].computed.keys() & {"probe", "sound", "detect", "track", "align", "blend", "inpaint"}
    folder = VideoRunFolder(run)
    rows = {row.id: row for row in folder.read_rows()}
    assert (rows["green"].status, rows["green"].stage, rows["green"].attempts) == ("failed", "blend", 2)
    assert rows["green"].reason.startswith(f"frames 0-{FRAMES - 1}: program error: ZeroDivisionError: a poisoned picture")
    crashes = [(event["item"], event["stage"]) for event in folder.read_log() if event["event"] == "crash"]
    assert crashes == [(VIDEO_CULPRITS[0], "blend")] * 2
    for name, clip in CLIPS.items():
        row = rows[Path(name).stem]
        if row.id in VIDEO_CULPRITS:
            continue
        assert (row.swapped, row.passed) == ((FRAMES, 0) if clip.shows == "person" else (0, FRAMES))
        output = probe(str(run / row.output))
        assert (len(output), output.codec, Path(row.output).suffix) == (FRAMES, "h264", ".mp4")
        assert [track.codec for track in output.tracks] == ["mp3float" if clip.sound == "mp3" else "aac"]
        again = f"no face was found: the video is encoded again, since {clip.codec} can be copied neither"
        assert (again in row.note) == (clip.shows == "nobody")
        assert (f"sound converted to AAC: {clip.sound} cannot be copied into Matroska" in row.note) == (clip.sound not in ("aac", "mp3"))
    assert print_status(str(run)) == 2
    assert "1 noted: sound converted to AAC: pcm_alaw cannot be copied into Matroska" in capsys.readouterr().out


def test_room_and_places_are_looked_at_before_the_work(
    poisoned: tuple[str, str], people: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    (run / "outputs/000001.png").mkdir(parents=True)
    summary = carry_out(poisoned, run)
    row = RunFolder(run).read_rows()[1]
    assert (summary.done, summary.failed, row.stage) == (8, 2, "output")
    assert row.reason == f"a folder stands where {run}/outputs/000001.png would be written: move it away"
    assert row.attempts == 0  # nothing was tried
    (run / "outputs/000001.png").rmdir()
    monkeypatch.setattr("flows.room.shutil.disk_usage", lambda path: SimpleNamespace(free=50))
    with pytest.raises(RunError, match=r"run: at least 0.205 kB are needed for what is left, 0.05 kB are free; free some"):
        carry_out(poisoned, run)
    assert not any(event["event"] == "start" for event in RunFolder(run).read_log()[-3:])
    monkeypatch.undo()
    assert carry_out(poisoned, run).done == 9
    make_videos(tmp_path / "films", people[0], 2)
    (tmp_path / "films/one.csv").write_text(f"source,video\n{people[0]},wmv.wmv\n")
    (tmp_path / "films_run/frames/000000.parquet").mkdir(parents=True)
    wanted = VideoRequest(manifest=str(tmp_path / "films/one.csv"), run=str(tmp_path / "films_run"), profile="fast", device="cpu")
    plan = make_video_plan(wanted)
    try:
        assert execute_videos(plan).computed == {"probe": 1}
    finally:
        plan.close()
    assert (plan.rows["000000"].stage, plan.rows["000000"].reason.split(" would")[0]) == (
        "output",
        f"a folder stands where {tmp_path}/films_run/frames/000000.parquet",
    )
