"""The videos pipeline on the `fast` profile: what an output holds, resume after kills, who is swapped, rows that fail."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import cv2
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from dask_processes import Processes, processes
from PIL import Image
from video_clips import frame_times, make_video, packets

import tasks.mesh
from flows.cli import main
from flows.execution.dask_worker import check_compatibility
from flows.execution.summary import Summary
from flows.status import RunState, print_status
from flows.video_context import make_video_run_context
from flows.video_engine import execute_videos
from flows.video_plan import VideoRequest, make_video_plan
from flows.video_segments import Segment
from flows.video_units import Desk, Detecting, Probing, SourceSide, Tables, Tracking, Unit, outcome_of
from storage.codec import encode_png
from storage.run import RunError, RunFolder
from storage.store import Artifact, Damaged, Store, StoreError
from storage.video_run import VideoRow, VideoRunFolder, open_run
from tasks.frame import hash_file
from tasks.graph import UsageError
from tasks.runner import DiskFull, JobResult
from tasks.stage import ItemError

ROOT = Path(__file__).parents[2]
Pixels = npt.NDArray[np.uint8]
CHEAP = ("align.side=160", "parse.side=160", "output.gop=6", "output.codec=ffv1", "output.pixel_format=same")
WITH, WITHOUT = 14, 6  # frames with the face, then without
TIMES = [0, 40, 75, 120, 160, 205, 240, 280, 321, 360, 400, 440, 480, 560, 600, 640, 680, 720, 750, 800]  # ms
SIZE = (240, 208)
CARRY_ON = """
import json, sys
from flows.video_engine import execute_videos
from flows.video_plan import VideoRequest, make_video_plan
plan = make_video_plan(VideoRequest(**json.loads(sys.argv[1])))
execute_videos(plan)
"""


def request(manifest: Path, run: Path, **changes: object) -> VideoRequest:
    wanted = VideoRequest(
        manifest=str(manifest), run=str(run), profile="fast", device="cpu", stages=["swap=composite"], changes=CHEAP, threads=1
    )
    return replace(wanted, **changes)


def carry_out(wanted: VideoRequest) -> tuple[Summary, dict[str, VideoRow]]:
    plan = make_video_plan(wanted)
    try:
        return execute_videos(plan), plan.rows
    finally:
        plan.close()


def without_segments(finished: Path, run: Path) -> Path:
    """A copy of a finished run that lacks the segments and the output."""
    shutil.copytree(finished, run)
    store = Store(str(run / "store"))
    store.void(*(artifact for artifact in store.artifacts() if artifact.stage == "segment"))
    (run / VideoRunFolder(run).read_rows()[0].output).unlink()
    return run


def walking(person: Path) -> Pixels:
    """The person's picture, with room for a window of SIZE to move in."""
    with Image.open(person) as picture:
        rgb = np.asarray(picture.convert("RGB").resize((SIZE[0] + 20, SIZE[0] + 20), Image.Resampling.BOX))
    return np.ascontiguousarray(rgb)


def decoded(path: Path) -> list[list[Pixels]]:
    """The planes of every frame."""
    with av.open(str(path)) as container:
        return [
            [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, : plane.width].copy() for plane in frame.planes]
            for frame in container.decode(video=0)
        ]


@pytest.fixture(scope="module")
def films(people: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip.mkv of person 1 who leaves, with uneven times and sound; nobody.mp4 without a face; videos.csv that lists the clip."""
    folder = tmp_path_factory.mktemp("films")
    person = walking(people[1])
    empty = cv2.GaussianBlur(np.roll(person, 90, axis=1)[::-1, :, ::-1], (0, 0), 12)

    def shown(index: int) -> Pixels:
        left, top = 6 + round(5 * np.sin(index / 3)), 8 + index % 3
        window = (empty if index >= WITH else person)[top : top + SIZE[1], left : left + SIZE[0]]
        return np.ascontiguousarray(window)

    make_video(folder / "clip.mkv", TIMES, size=SIZE, codec="libx264", sound=[("aac", 0.9)], shown=shown, options={"crf": "12", "g": "9"})
    make_video(folder / "nobody.mp4", [0, 40, 80, 120], size=(64, 48), codec="libx264", sound=[("aac", 0.2)], smooth=True)
    (folder / "videos.csv").write_text(f"id,source,video\nfilm,{people[0]},clip.mkv\n")
    return folder


@pytest.fixture(scope="module")
def finished(films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of the clip; tests read it and share its store."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    summary, _ = carry_out(request(films / "videos.csv", run))
    assert (summary.done, summary.exit_code) == (1, 0)
    assert summary.computed["segment"] == 4
    assert summary.computed["blend"] == WITH
    assert summary.computed["align"] == 1  # the source; of the frames the course tells
    assert (summary.computed["mesh"], summary.computed["parse"]) == (WITH + 1, WITH + 1)  # nothing twice where groups reach into each other
    return run


def test_every_frame_gives_one_frame_at_its_time_with_the_sound(finished: Path, films: Path) -> None:
    (row,) = VideoRunFolder(finished).read_rows()
    assert (row.frames, row.swapped, row.passed, row.failed, row.repaired, row.shots) == (20, WITH, WITHOUT, 0, 0, 2)
    output = finished / row.output
    assert output.stat().st_size == row.output_size
    before, after = frame_times(films / "clip.mkv"), frame_times(output)
    assert len(after) == 20
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) <= 0.001
    assert [data for data, _ in packets(output, "audio")] == [data for data, _ in packets(films / "clip.mkv", "audio")]


def test_outside_the_face_every_plane_keeps_its_bits(finished: Path, films: Path) -> None:
    (row,) = VideoRunFolder(finished).read_rows()
    frames = VideoRunFolder(finished).read_frames("film").to_pylist()
    assert [frame["status"] for frame in frames] == ["swapped"] * WITH + ["passed"] * WITHOUT
    assert [index for index, frame in enumerate(frames) if frame["cut"]] == [0, WITH]
    assert frames[3]["time"] == pytest.approx(0.120, abs=0.002)
    for frame, old, new in zip(frames, decoded(films / "clip.mkv"), decoded(finished / row.output), strict=True):
        if frame["status"] == "passed":
            assert all(np.array_equal(a, b) for a, b in zip(old, new, strict=True))
            assert frame["x"] is frame["box"] is frame["score"] is None
            continue
        left, _, right, _ = frame["box"]
        assert abs((left + right) / 2 - frame["x"]) < 0.2 * frame["size"]
        changed = old[0] != new[0]
        assert 0.04 < changed.mean() < 0.5
        rows, columns = np.nonzero(changed)
        reach = frame["size"] / 2 + 2
        assert np.abs(columns - frame["x"]).max() <= reach
        assert np.abs(rows - frame["y"]).max() <= reach
        around = cv2.dilate(changed.astype(np.uint8), np.ones((3, 3)))[::2, ::2] > 0  # luma that rounds to what it was
        for role in (1, 2):
            assert not (old[role] != new[role])[~around[: old[role].shape[0]]].mean() > 0.002


def test_a_rerun_has_nothing_to_do_and_a_lost_output_is_only_joined_again(finished: Path, films: Path) -> None:
    (row,) = VideoRunFolder(finished).read_rows()
    plan = make_video_plan(request(films / "videos.csv", finished))
    assert (plan.todo, plan.done_before) == ([], 1)
    plan.close()
    (finished / row.output).unlink()
    summary, rows = carry_out(request(films / "videos.csv", finished))
    assert (summary.done, summary.computed) == (1, {})
    assert rows["film"].output_sha256 == row.output_sha256


def test_a_damaged_segment_is_made_again_and_other_runs_are_refused(finished: Path, films: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (row,) = VideoRunFolder(run).read_rows()
    segment = next(artifact for artifact in Store(str(run / "store")).artifacts() if artifact.stage == "segment")
    file = run / "store" / segment.payloads["segment"].file
    file.write_bytes(file.read_bytes()[:-9] + b"123456789")
    (run / row.output).unlink()
    summary, rows = carry_out(request(films / "videos.csv", run))
    assert (summary.done, summary.computed["segment"]) == (1, 1)
    assert set(summary.computed) & {"probe", "detect", "track"} == set()
    assert rows["film"].output_sha256 == row.output_sha256
    with pytest.raises(RunError, match="not a run of pairs"):
        RunFolder(run).read_rows()


def test_what_steps_read_is_made_again_where_it_is_damaged(
    finished: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (row,) = VideoRunFolder(run).read_rows()
    (run / row.output).unlink()
    store = Store(str(run / "store"))
    found = {artifact.stage: artifact for artifact in store.artifacts()}
    store.void(found["track"])
    for stage, output in (("probe", "table"), ("detect", "box")):  # read by the planning process, and by a step
        file = run / "store" / found[stage].payloads[output].file
        file.write_bytes(file.read_bytes()[:-9] + b"123456789")
    summary, rows = carry_out(request(films / "videos.csv", run))
    assert summary.computed == {"probe": 1, "detect": 1, "track": 1}
    assert rows["film"].output_sha256 == row.output_sha256
    assert capsys.readouterr().err.count("computing it again") == 2


def test_a_program_error_fails_its_video_and_is_seen_by_the_task(
    finished: Path,
    films: Path,
    people: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object) -> bytes:
        raise RuntimeError("the encoder stands on its head")

    run, seen = without_segments(finished, tmp_path / "run"), list[str]()

    def hook(name: str, part: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            seen.append(f"{name} of {part}: {type(error).__name__}")
            raise

    monkeypatch.setattr("flows.video_segments.encode_group", fail)
    videos = {"film": "clip.mkv", "again": "clip.mkv", "nobody": "nobody.mp4"}
    lines = [f"{name},{people[0]},{films / video}" for name, video in videos.items()]
    (tmp_path / "videos.csv").write_text("\n".join(["id,source,video", *lines]))
    for attempt in (1, 2, 3, 3):
        seen.clear()
        plan = make_video_plan(request(tmp_path / "videos.csv", run))
        summary = execute_videos(plan, hook=hook)
        plan.close()
        assert (summary.done, summary.failed, summary.left, summary.exit_code, summary.crash) == (1, 2, 0, 2, "")
        for name in ("film", "again"):  # two program errors in a row stop nothing
            row = plan.rows[name]
            assert (row.status, row.stage, row.attempts, row.quarantined) == ("failed", "segment", attempt, attempt == 3)
            sentence = "program error: RuntimeError: the encoder stands on its head (its traceback is in log.jsonl)"
            assert row.reason == f"frames 0-5: {sentence}"
    assert not seen  # in quarantine
    assert plan.rows["nobody"].status == "done"
    assert "Traceback" not in capsys.readouterr().err
    crashes = [event for event in plan.folder.read_log() if event["event"] == "crash"]
    assert [event["item"] for event in crashes] == ["film", "again"] * 3
    assert all("RuntimeError: the encoder stands on its head" in event["traceback"] for event in crashes)


def test_killed_anywhere_the_same_command_gives_the_same_bytes(finished: Path, films: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    wanted = request(films / "videos.csv", run, chunk=5)  # another division into chunks, too
    text = json.dumps(
        {name: getattr(wanted, name) for name in ("manifest", "run", "profile", "device", "stages", "changes", "chunk", "threads")}
    )

    def segments() -> int:
        return Counter(artifact.stage for artifact in Store(str(run / "store")).artifacts())["segment"]

    for fault, expected in (("mid-write:28", 0), ("before-index:5", 2), ("before-join", 4)):
        killed = subprocess.run([sys.executable, "-c", CARRY_ON, text], cwd=ROOT, env={**os.environ, "E4S_FAULT": fault}, check=False)
        assert killed.returncode == -signal.SIGKILL, fault
        assert segments() >= expected, fault
        assert not list((run / "outputs").iterdir())
    summary, rows = carry_out(wanted)
    assert (summary.done, summary.computed) == (1, {})  # every segment was finished once
    assert rows["film"].output_sha256 == VideoRunFolder(finished).read_rows()[0].output_sha256
    assert VideoRunFolder(run).read_frames("film").equals(VideoRunFolder(finished).read_frames("film"))


def list_videos(folder: Path, *lines: str) -> Path:
    """A manifest, beside text.mp4, which is no video, and blank.png, which shows no face."""
    (folder / "text.mp4").write_text("not a video at all")
    (folder / "blank.png").write_bytes(encode_png(np.full((64, 64, 3), 90, np.uint8)))
    manifest = folder / "videos.csv"
    manifest.write_text("\n".join(lines))
    return manifest


def test_bad_rows_fail_with_a_sentence_and_the_rest_go_on(
    finished: Path, films: Path, people: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        f"film,{people[0]},{films}/clip.mkv,",
        f"text,{people[0]},text.mp4,",
        f"blank,blank.png,{films}/clip.mkv,",
        f"nobody,{people[0]},{films}/nobody.mp4,",
        f"away,{people[0]},away.mp4,",
        f"empty,,{films}/clip.mkv,",
        f"third,{people[0]},{films}/clip.mkv,3",
        f"person,{people[0]},{films}/clip.mkv,{people[1]}",
        f"stranger,{people[0]},{films}/clip.mkv,{people[2]}",
    ]
    wanted = request(list_videos(tmp_path, "id,source,video,face", *lines), tmp_path / "run", store=str(finished / "store"))
    summary, rows = carry_out(wanted)
    assert (summary.done, summary.failed, summary.exit_code) == (3, 6, 2)
    reasons = {row.id: f"{row.stage}: {row.reason}" for row in rows.values() if row.status == "failed"}
    for name, part in {
        "text": "probe: the file is not a video",
        "blank": "align: source",
        "away": "input: video: ",
        "empty": "the cell source is empty in row 6",
        "third": "track: face 3 was asked for",
        "stranger": "track: nobody in the video is like",
    }.items():
        assert part in reasons[name]
    nobody = rows["nobody"]
    assert (nobody.frames, nobody.swapped, nobody.passed) == (4, 0, 4)
    assert nobody.note.startswith("no face was found")
    for kind in ("video", "audio"):
        assert [data for data, _ in packets(tmp_path / "run" / nobody.output, kind)] == [
            data for data, _ in packets(films / "nobody.mp4", kind)
        ]
    same = VideoRunFolder(finished).read_rows()[0].output_sha256
    assert rows["film"].output_sha256 == rows["person"].output_sha256 == same
    assert "segment" not in summary.computed
    again, _ = carry_out(wanted)
    assert (again.failed, again.computed) == (6, {})  # remembered
    assert {row.id: row.attempts for row in open_run(tmp_path / "run").read_rows()}["text"] == 1
    capsys.readouterr()
    assert print_status(str(tmp_path / "run")) == 2
    assert "9 videos: 3 done, 6 failed, 0 left" in capsys.readouterr().out


def test_a_frame_that_fails_passes_through_and_is_counted(
    finished: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = tasks.mesh.BACKENDS["mediapipe"]
    seen: list[bytes] = []

    def run(model: object, config: object, batch: list[dict[str, Pixels]]) -> list[object]:
        seen.append(batch[0]["face"].tobytes())
        if len(seen) > 2 and seen[-1] == seen[2]:  # source, frame 0, frame 1
            return [ItemError("it is turned away")]
        return list(mesh.run(model, config, batch))

    monkeypatch.setitem(tasks.mesh.BACKENDS, "mediapipe", replace(mesh, run=run, version=99))
    wanted = request(films / "videos.csv", tmp_path / "run", keep="all", workers=1)
    (tmp_path / "store").symlink_to(finished / "store")
    _, rows = carry_out(wanted)
    row = rows["film"]
    assert (row.status, row.swapped, row.passed, row.failed) == ("done", WITH - 1, WITHOUT, 1)
    frame = VideoRunFolder(tmp_path / "run").read_frames("film").to_pylist()[1]
    assert (frame["status"], frame["stage"]) == ("failed", "mesh")
    assert frame["reason"].endswith("it is turned away")
    old, new = decoded(films / "clip.mkv"), decoded(tmp_path / "run" / row.output)
    assert all(np.array_equal(a, b) for a, b in zip(old[1], new[1], strict=True))
    assert not np.array_equal(old[2][0], new[2][0])
    kept = Counter(artifact.stage for artifact in Store(str(tmp_path / "run/store")).artifacts())
    assert kept["inpaint"] == WITH - 1
    assert "inpaint" not in Counter(artifact.stage for artifact in Store(str(finished / "store")).artifacts())


def test_what_is_wrong_with_the_whole_is_said_at_once(
    films: Path, people: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "videos.csv").write_text("id,source,target\na,b,c\n")
    with pytest.raises(UsageError, match="no column video"):
        make_video_plan(request(tmp_path / "videos.csv", tmp_path / "run"))
    good = films / "videos.csv"
    for changes, part in (
        (["output.gop=0"], "gop must be at least 1"),
        (["smooth.nonsense=1"], "has no setting 'nonsense'"),
        (["output.quality=fine"], "output.quality must be int"),
    ):
        with pytest.raises(UsageError, match=part):
            make_video_plan(request(good, tmp_path / "run", changes=changes))
    assert main(["videos", str(good), "--run", str(tmp_path / "run"), "--set", "align.side=12"]) == 1
    assert "align: side must be at least 64" in capsys.readouterr().err
    assert not isinstance(open_run(tmp_path / "run"), RunFolder) or not (tmp_path / "run/run.json").exists()


def test_the_command_runs_the_flow_and_says_what_came_of_it(
    finished: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    command = ["videos", str(films / "videos.csv"), "--run", str(run), "--profile", "fast", "--device", "cpu", "--stage", "swap=composite"]
    command += ["--codec", "ffv1", "--pixel-format", "same", "--threads", "1", "--store", str(finished / "store")]
    for change in ("align.side=160", "parse.side=160", "output.gop=6"):
        command += ["--set", change]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "20 frames: 14 swapped, 6 without the face, 0 failed" in out
    assert VideoRunFolder(run).read_rows()[0].output_sha256 == VideoRunFolder(finished).read_rows()[0].output_sha256
    assert json.loads((run / "run.json").read_text())["kind"] == "videos"
    assert print_status(str(run)) == 0
    assert "1 video: 1 done, 0 failed, 0 left" in capsys.readouterr().out


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """A scheduler without workers."""
    with processes(tmp_path_factory.mktemp("dask")) as started:
        started.scheduler()
        yield started


def listed(run: Path) -> Counter[tuple[str, str]]:
    """How often the index lists each output of each key."""
    tables = [pq.read_table(file) for file in (run / "store/index").glob("*.parquet")]
    return Counter(pair for table in tables for pair in zip(table["key"].to_pylist(), table["output"].to_pylist(), strict=True))


def workers_of(run: Path, stage: str) -> list[str]:
    events = VideoRunFolder(run).read_log()
    return [event["worker"] for event in events if (event["event"], event.get("stage")) == ("stage", stage)]


def test_processes_of_our_own_make_the_same_bytes_and_nothing_twice(
    finished: Path, films: Path, people: list[Path], tmp_path: Path
) -> None:
    lines = [
        f"film,{people[0]},{films}/clip.mkv",
        f"nobody,{people[0]},{films}/nobody.mp4",
        f"text,{people[0]},text.mp4",
        f"blank,blank.png,{films}/clip.mkv",
        f"again,{people[0]},{films}/clip.mkv",
    ]
    manifest, run = list_videos(tmp_path, "id,source,video", *lines), tmp_path / "run"
    told: list[tuple[int, int]] = []
    calls: list[str] = []

    def hook(name: str, part: str, work: Callable[[], None]) -> None:
        calls.append(f"{name} of {part}")
        work()

    plan = make_video_plan(request(manifest, run, dask="local:2"))
    try:
        summary = execute_videos(plan, lambda done, total, part: told.append((done, total)), hook)
    finally:
        plan.close()
    assert (summary.done, summary.failed, summary.left, summary.exit_code) == (3, 2, 0, 2)
    before = VideoRunFolder(finished).read_rows()[0]
    for name in ("film", "again"):
        assert plan.rows[name].output_sha256 == before.output_sha256
        assert VideoRunFolder(run).read_frames(name).equals(VideoRunFolder(finished).read_frames("film"))
    assert plan.rows["film"].seconds > 0.5
    assert plan.rows["text"].reason.startswith("the file is not a video")
    assert (plan.rows["blank"].stage, plan.rows["text"].stage) == ("align", "probe")
    assert summary.computed["segment"] == 4  # of one of the two rows that are alike
    assert summary.computed["blend"] == WITH
    assert summary.computed["align"] == 2  # the two sources
    assert set(listed(run).values()) == {1}
    assert set(workers_of(run, "segment")) == {"cpu-0", "cpu-1"}
    assert len({call for call in calls if call.startswith("segment")}) == 4
    assert "join of film" in calls
    assert (20, 20) in told
    assert all(0 <= done <= total for done, total in told)
    assert not list((run / "store/probe").iterdir())
    assert carry_out(request(manifest, run))[0].computed == {}


def test_a_worker_killed_in_mid_group_costs_that_group_only(
    outside: Processes, finished: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = without_segments(finished, tmp_path / "run")
    before = set(listed(run))
    # In the midst of the second group: a group of 6 frames passes 7 stages or 8.
    victim = outside.worker("victim", E4S_FAULT="mid-stage:50")
    outside.wait_for(1)

    def replace_the_victim() -> None:
        victim.wait()
        outside.worker("heir")

    # Only then, or a fast heir takes so many groups that the victim never gets to its fault.
    replacement = threading.Thread(target=replace_the_victim)
    replacement.start()
    plan = make_video_plan(request(films / "videos.csv", run, dask=outside.address, dask_wait=60.0))
    try:
        summary = execute_videos(plan)
    finally:
        plan.close()
        victim.kill()
        replacement.join()
    assert (summary.done, summary.crash) == (1, "")
    assert plan.rows["film"].output_sha256 == VideoRunFolder(finished).read_rows()[0].output_sha256
    assert summary.computed["segment"] == 4
    assert set(summary.computed) & {"probe", "detect", "track"} == set()
    assert "worker victim is lost" in capsys.readouterr().err
    assert "heir" in workers_of(run, "segment")
    assert all(listed(run)[pair] == 1 for pair in set(listed(run)) - before)


def test_an_interruption_stops_the_workers_and_the_same_command_goes_on(
    outside: Processes, finished: Path, films: Path, tmp_path: Path
) -> None:
    run = without_segments(finished, tmp_path / "run")
    outside.ready("last")

    def interrupt(done: int, total: int, part: str) -> None:
        assert part in ("film, segment", "film, tune")
        if done >= 6:
            raise KeyboardInterrupt

    wanted = request(films / "videos.csv", run, dask=outside.address, dask_wait=30.0)
    plan = make_video_plan(wanted)
    with pytest.raises(KeyboardInterrupt):
        execute_videos(plan, interrupt)
    plan.close()
    assert VideoRunFolder(run).read_rows()[0].status == "left"
    state = RunState()
    state.feed(VideoRunFolder(run).read_log())
    assert state.passing(time.time()).startswith(f"film, segment: 6 of {WITH + WITHOUT} frames")
    summary, rows = carry_out(wanted)
    assert 0 < summary.computed["segment"] < 4
    assert rows["film"].output_sha256 == VideoRunFolder(finished).read_rows()[0].output_sha256


def test_what_a_unit_came_to_is_small_and_crosses_processes() -> None:
    artifact = Artifact("0" * 64, "probe")

    def after(error: Exception) -> JobResult:
        def work(result: JobResult) -> None:
            result.count("segment", 1, 0.0)
            result.count("swap", 3, 0.0)
            raise error

        found: JobResult = pickle.loads(pickle.dumps(outcome_of("segment", "store", work)))
        assert found.spent > 0
        return found

    assert after(Damaged(artifact, "it is damaged")).damaged == (artifact, "it is damaged")
    assert after(Damaged(artifact, "it is damaged")).computed == {"swap": 3}
    failed = after(ItemError("no face"))
    assert (failed.stage, failed.reason) == ("segment", "no face")
    assert failed.seconds == {"segment": failed.spent, "swap": 0.0}
    assert "RuntimeError: oh" in after(RuntimeError("oh")).crash
    assert "PermissionError" in after(PermissionError("not allowed")).crash
    with pytest.raises(DiskFull, match=r"^store: no space left"):
        after(OSError(errno.ENOSPC, "full"))
    with pytest.raises(StoreError):
        after(StoreError("it is gone"))


def test_a_failure_is_remembered_of_the_planned_file_only(finished: Path, films: Path, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    film.write_text("not a video at all")
    row = VideoRow(id="a", source="", video=str(film), video_sha256=hash_file(str(film)))
    plan = make_video_plan(request(films / "videos.csv", finished))
    store = Store(str(tmp_path / "store"))
    desk = Desk(plan, Tables(store), keep="final", chunk=4, max_pixels=100, at_once=1)
    notes = SimpleNamespace(worker="", progress=lambda share: None, uses=lambda keys: None)
    try:
        changed = Probing(number=0, row=replace(row, video_sha256="0" * 64), key="1" * 64)
        assert desk.run(changed, notes).reason.endswith("start it again.")
        assert not store.lookup(["1" * 64])
        first = desk.run(Probing(number=1, row=row, key="1" * 64), notes)
        assert store.lookup(["1" * 64])["1" * 64].reason == first.reason
        again = desk.run(Probing(number=1, row=row, key="1" * 64).for_retry(), notes)
        assert (again.reason, again.computed) == (first.reason, {})
    finally:
        desk.close()
        plan.close()


def test_units_for_the_gpu_and_the_handshake(films: Path, tmp_path: Path) -> None:
    plan = make_video_plan(request(films / "videos.csv", tmp_path / "run", stages=[], device="cuda", dask="tcp://nowhere:1"))
    try:
        assert (plan.graph.settings.device, plan.request.compute_threads()) == ("cuda", 1)
        (row,) = plan.rows.values()
        base: dict[str, Any] = {"number": 0, "row": row, "key": ""}
        table = Artifact("", "probe")
        units: list[Unit] = [
            Probing(**base),
            SourceSide(**base, source={}, made=()),
            Detecting(**base, table=table, start=0, stop=2),
            Tracking(**base, table=table, detected=()),
            Segment(**base, table=table, start=0, stop=2, way=table, source={}),
        ]
        assert [unit.name for unit in units if unit.on_gpu(plan)] == ["source", "segment"]  # the source is parsed
        assert units[-1].part == "film frames 0-1"
        kit = make_video_run_context(plan)
        for run in (kit.run, "1", "2"):
            plan.store.files.write(f"probe/{run}", run.encode())
        assert check_compatibility(pickle.loads(pickle.dumps(kit)), False) == ""
        assert "gone.mp4 does not exist" in check_compatibility(replace(kit, run="1", video=str(tmp_path / "gone.mp4")), False)
        other = replace(kit, run="2", fingerprints={**kit.fingerprints, "detect": {**kit.fingerprints["detect"], "version": 99}})
        assert "it would compute other bytes: stage detect" in check_compatibility(other, False)
    finally:
        plan.close()
