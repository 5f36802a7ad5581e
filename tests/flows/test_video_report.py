"""`e4s report` on a run of videos: what is measured, what is kept, what is said of files that are gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_videos import FAILED, PASSED, REASON, made_run

import flows.video_report
from flows.cli import main
from flows.synth import make_clip
from flows.video_report import MeasureConfig, PreviewConfig, clip_range, measured_windows, strip_frames, write_video_report
from storage.video_run import VideoRunFolder
from tasks.video import probe

FRAMES = 12


@pytest.fixture(scope="module")
def run(people: list[Path], tmp_path_factory: pytest.TempPathFactory) -> VideoRunFolder:
    """A run whose output shakes by 1 px to and fro, and what lies beside it; the measures are in its store."""
    folder = tmp_path_factory.mktemp("videos")
    clip = make_clip(0, folder / "clip.mp4", seconds=FRAMES / 24, fps=24, size=256)
    return made_run(folder / "night", people[0], clip, shake=1.0)


def copied(run: VideoRunFolder, to: Path) -> VideoRunFolder:
    return VideoRunFolder(shutil.copytree(run.path, to / "night"))


def test_a_run_of_videos_is_measured_and_shown(run: VideoRunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run.path)]) == 2  # one of them failed
    said = capsys.readouterr().out
    assert f"3 videos: 1 done, 1 failed, 1 left. {FRAMES} frames: {FRAMES - 3} swapped, 2 without the face, 1 failed." in said
    (found, *_) = json.loads((run.path / "report/videos.json").read_text())["videos"]
    assert found["measured_frames"] == FRAMES - len(PASSED) - len(FAILED)  # all: the video is short
    assert found["faceless_frames"] == 0
    assert found["jitter_ratio"] > 1.5  # it shakes
    assert found["identity_network"] == "sface"
    assert -1 <= found["identity"] <= 1
    html = (run.path / "report/index.html").read_text()
    assert 'src="data:video/mp4' in html
    assert REASON in html
    assert "video: gone.mp4 is not a file" in html


def test_a_second_report_decodes_nothing(run: VideoRunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video_report(run)
    mine = copied(run, tmp_path)
    page = (mine.path / "report/index.html").read_bytes()

    def forbidden(path: str) -> None:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(flows.video_report, "probe", forbidden)
    write_video_report(mine)
    assert (mine.path / "report/index.html").read_bytes() == page


def test_large_clips_lie_beside_the_page(run: VideoRunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video_report(run, measure=False)
    mine = copied(run, tmp_path)
    monkeypatch.setattr(flows.video_report, "EMBEDDED", 1)
    write_video_report(mine, measure=False)
    assert 'src="clips/a.mp4"' in (mine.path / "report/index.html").read_text()
    assert len(probe(str(mine.path / "report/clips/a.mp4"))) == FRAMES


def test_an_output_that_was_changed_is_said(run: VideoRunFolder, tmp_path: Path) -> None:
    mine = copied(run, tmp_path)
    shutil.rmtree(mine.path / "store", ignore_errors=True)
    shutil.copy(mine.read_rows()[0].video, mine.path / "outputs/a.mp4")
    (part, *_) = write_video_report(mine).videos
    assert part.note == "The output a.mp4 was changed since the run."
    assert part.not_measured == "The output a.mp4 was changed since the run."
    (mine.path / "outputs/a.mp4").unlink()
    (part, *_) = write_video_report(mine).videos
    assert part.note.startswith("The output a.mp4 cannot be read")


def test_two_runs_of_videos_are_not_compared(run: VideoRunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run.path), str(run.path)]) == 1
    assert "is a run of videos" in capsys.readouterr().err


def test_no_metrics_measures_nothing(run: VideoRunFolder, tmp_path: Path) -> None:
    mine = copied(run, tmp_path)
    assert main(["report", str(mine.path), "--no-metrics", "--limit", "0"]) == 2
    html = (mine.path / "report/index.html").read_text()
    assert "data:video/mp4" not in html
    assert "landmark jitter" not in html
    assert "Previews of the first 0 of 1 finished videos" in html


def test_windows_lie_within_shots_and_are_spread() -> None:
    config = MeasureConfig(frames=10, window=5)
    shot = np.zeros(60, np.int64)
    status = ["swapped"] * 60
    assert measured_windows(status, shot, config) == [(0, 5), (55, 60)]
    status[4], status[20:58] = "passed", ["failed"] * 38
    assert measured_windows(status, shot, config) == [(0, 4), (15, 20)]  # two frames in a row have no second difference
    assert measured_windows(["swapped"] * 4, np.array([0, 0, 1, 1]), config) == []
    assert measured_windows(["swapped"] * 8, np.array([0, 0, 0, 1, 1, 1, 1, 1]), config) == [(0, 3), (3, 8)]
    assert measured_windows(["passed"] * 8, shot[:8], config) == []


def test_the_clip_shows_the_stretch_with_most_swaps() -> None:
    config, time = PreviewConfig(clip=1.0), np.arange(100) / 10
    status = ["passed"] * 100
    assert clip_range(status, time, config) == (0, 10, 1)
    status[95:] = ["swapped"] * 5
    assert clip_range(status, time, config) == (90, 100, 1)
    status[42:50] = ["swapped"] * 8
    start, stop, _ = clip_range(status, time, config)
    assert start <= 42
    assert (stop, stop - start) == (50, 10)
    assert clip_range(["swapped"], time[:1], config) == (0, 1, 1)
    assert clip_range(["swapped"] * 120, np.arange(120) / 60, config)[2] == 2  # 60 frames a second


def test_the_strip_is_spread_over_the_face() -> None:
    assert strip_frames(["passed", "swapped", "swapped", "failed", "passed"], 8) == [1, 2, 3]
    assert strip_frames(["swapped"] * 100, 3) == [0, 50, 99]
    assert strip_frames(["passed"] * 5, 2) == [0, 4]
