"""What a browser makes of the files that are written: length, upright size, sound."""

from __future__ import annotations

from pathlib import Path

import pytest
from playback import CHROMIUM, play
from video_clips import make_video

from tasks.video import probe, read_frames
from tasks.video_write import EncodeConfig, encode_chunk, join, remux

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: install chromium")

TIMES = [0, 40, 80, 120, 200, 240, 280, 360, 400, 440, 480, 500]  # ms, uneven
QUARTER = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)  # display matrix of a picture that lies on its side


def clip(folder: Path, *, sound: bool = True, matrix: tuple[int, ...] | None = None) -> Path:
    return make_video(
        folder / "in.mp4",
        TIMES,
        size=(66, 50),
        codec="libx264",
        sound=[("aac", 0.6)] if sound else [],
        matrix=matrix,
        smooth=True,
    )


def written(source: Path, out: Path) -> Path:
    table, config = probe(str(source)), EncodeConfig(gop=5)
    segments = encode_chunk(table, 0, read_frames(str(source), table, 0, len(table)), config)
    return join(table, str(source), segments, out, config)


def test_a_joined_video_plays_with_its_sound(tmp_path: Path) -> None:
    played = play(written(clip(tmp_path, matrix=QUARTER), tmp_path / "out.mp4"))
    assert played.state == "ended", played.reason
    assert (played.width, played.height) == (50, 66)  # upright
    assert played.duration == pytest.approx(0.6, abs=0.05)  # the sound is longer than the pictures
    assert played.tracks == ["audio", "video"]
    assert played.audio_bytes > 0
    assert played.video_bytes > 0


def test_a_video_without_sound_shows_one_track(tmp_path: Path) -> None:
    source = clip(tmp_path, sound=False)
    played = play(remux(probe(str(source)), str(source), tmp_path / "out.mp4"))
    assert (played.state, played.tracks, played.audio_bytes) == ("ended", ["video"], 0)
    assert played.duration == pytest.approx(0.5, abs=0.05)


def test_a_file_that_cannot_be_played_is_told(tmp_path: Path) -> None:
    source = make_video(tmp_path / "in.mkv", TIMES, size=(66, 50))  # FFV1: no browser decodes it
    assert play(source).state == "error"
