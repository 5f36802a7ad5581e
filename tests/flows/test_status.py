"""`e4s status` on run folders as runs leave them: failures grouped by reason, and how far a video is."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from flows.attempts import Attempts
from flows.progress import counted
from flows.status import RunState, print_failed, print_status
from storage.run import Row, RunFolder
from storage.video_run import KIND, VideoRow, VideoRunFolder

Text = pytest.CaptureFixture[str]
FACELESS = "source: no face was found; give a picture that shows one"


def failed(name: str, reason: str, stage: str = "align") -> Row:
    return Row(id=name, source="s.png", target="t.png", key="k" * 64, status="failed", stage=stage, reason=reason)


def test_failures_are_grouped_by_reason(tmp_path: Path, capsys: Text) -> None:
    """A reason that many pairs share is said once; what an attempt failed with stands there only where it was something else."""
    folder = RunFolder(tmp_path)
    folder.create()
    folder.write_settings({})
    rows = [failed("a", FACELESS), failed("b", "the mouth is hidden", "mesh"), failed("c", FACELESS), failed("d", FACELESS)]
    attempts = Attempts(folder, limit=2)
    attempts.add([failed("d", "no memory", "parse")])
    attempts.add(rows)
    folder.write_rows(rows)
    assert print_failed(str(tmp_path)) == 2
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"3 pairs failed in align: {FACELESS}"
    assert [line.split()[0] for line in said[1:4]] == ["a", "c", "d"]
    for line in said[1:3]:
        assert line.endswith("UTC  attempt 1")
    assert said[3] == "    d (quarantined)"
    assert said[4].endswith("UTC  attempt 1: parse: no memory")
    assert said[5].endswith("UTC  attempt 2")
    assert said[6] == "1 pair failed in mesh: the mouth is hidden"
    assert said[7].startswith("    b  20")
    assert said[8:] == ["4 failed pairs; --retry failed tries the failed again, --retry quarantined tries the quarantined again"]


def video_run(path: Path) -> VideoRunFolder:
    """Two videos, the first of 100 frames 40 of which went through the pass `segment` in 20 s; this process works on it."""
    folder = VideoRunFolder(path)
    folder.create()
    folder.write_settings({"kind": KIND, "store": "", "device": "cpu", "request": {"profile": "fast"}})
    folder.write_rows([VideoRow(id=name, source="s.png", video=f"{name}.mp4") for name in ("film", "clip")])
    (path / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}")
    return folder


def test_a_running_video_has_a_rate_and_a_time_left(tmp_path: Path, capsys: Text) -> None:
    events = [
        {"event": "begin", "time": 100.0, "items": 2, "todo": 2, "chunk": 1},
        {"event": "start", "time": 101.0, "chunk": 0, "stage": "segment"},
        {"event": "pass", "time": 101.0, "chunk": 0, "item": "film", "stage": "segment", "frames": 10, "of": 100},
        {"event": "pass", "time": 121.0, "chunk": 0, "item": "film", "stage": "segment", "frames": 50, "of": 100},
    ]
    state = RunState()
    state.feed(events)
    said = "film, segment: 50 of 100 frames, 120.0 frames/min, about 25 s left of this pass"
    assert state.passing(now=121.0) == said
    state.feed([{"event": "chunk", "time": 150.0, "chunk": 0, "done": 1, "failed": 0}])
    assert state.passing(now=150.0) == ""
    folder = video_run(tmp_path)
    for event in events:
        folder.append_log(event["event"], **{name: value for name, value in event.items() if name not in ("event", "time")})
    assert print_status(str(tmp_path)) == 2
    assert "film, segment: 50 of 100 frames" in capsys.readouterr().out


def test_lines_of_progress_name_what_is_worked_on(capsys: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a log: every 10 s a line with the video, its pass, the rate and the time left."""
    now = 1000.0
    monkeypatch.setattr("flows.progress.time.monotonic", lambda: now)
    with counted("frames") as progress:
        progress(0, 100, "film, detect")
        now += 12
        progress(20, 100, "film, detect")
        progress(21, 100, "film, detect")  # 10 s have not passed since
        now += 12
        progress(10, 100, "film, segment")  # another pass: no rate yet
        now += 12
        progress(40, 100, "film, segment")
    assert capsys.readouterr().err.splitlines() == [
        "film, detect: 20 of 100 frames, 100.0/min, 48 s left",
        "film, segment: 10 of 100 frames",
        "film, segment: 40 of 100 frames, 150.0/min, 24 s left",
    ]
    with counted("pairs measured") as progress:
        progress(0, 4)
        now += 20
        progress(1, 4)
    assert capsys.readouterr().err.splitlines() == ["1 of 4 pairs measured, 3.0/min, 1 min 0 s left"]
