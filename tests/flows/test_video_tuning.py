"""The generator tuned once per video: cached, in the keys, in every frame."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from video_clips import make_video

from flows.execution.summary import Summary
from flows.video_engine import execute_videos
from flows.video_plan import VideoRequest, make_video_plan
from flows.video_why import explain_videos
from storage.store import Store
from storage.video_run import VideoRow
from tasks.graph import UsageError

FRAMES, SIZE = 4, (240, 208)
CHANGES = ("align.side=256", "parse.side=160", "output.gop=2", "output.codec=ffv1", "output.pixel_format=same", "encode_driven.steps=0")
TUNED = ("tune.steps=1", "tune.first_side=128", "tune.rate=0.02", "tuning.frames=2")


@pytest.fixture(scope="module")
def manifest(people: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    with Image.open(people[1]) as picture:
        rgb = np.asarray(picture.convert("RGB").resize((SIZE[0] + 20, SIZE[0] + 20), Image.Resampling.BOX))
    make_video(
        folder / "clip.mkv",
        [40 * frame for frame in range(FRAMES)],
        size=SIZE,
        shown=lambda index: np.ascontiguousarray(rgb[8 : 8 + SIZE[1], 2 * index : 2 * index + SIZE[0]]),
    )
    (folder / "videos.csv").write_text(f"id,source,video\nfilm,{people[0]},clip.mkv\n")
    return folder / "videos.csv"


def carry_out(wanted: VideoRequest) -> tuple[Summary, VideoRow]:
    plan = make_video_plan(wanted)
    try:
        return execute_videos(plan), plan.rows["film"]
    finally:
        plan.close()


def test_one_tuning_serves_all_frames_and_later_runs(manifest: Path, tmp_path: Path) -> None:
    plain = VideoRequest(
        manifest=str(manifest),
        run=str(tmp_path / "plain"),
        store=str(tmp_path / "store"),
        profile="fast",
        device="cpu",
        stages=["swap=codes"],
        changes=CHANGES,
        threads=1,
    )
    tuned = replace(plain, run=str(tmp_path / "tuned"), stages=["swap=codes", "tune=pti"], changes=[*CHANGES, *TUNED])
    _, before = carry_out(plain)
    summary, row = carry_out(tuned)
    assert (before.swapped, row.swapped) == (FRAMES, FRAMES)
    assert row.output_sha256 != before.output_sha256
    assert (summary.computed["tuning"], summary.computed["tune"], summary.computed["swap"]) == (1, 2, FRAMES)
    store = Store(str(tmp_path / "store"))
    (artifact,) = [artifact for artifact in store.artifacts() if artifact.stage == "tuning"]
    assert 10_000 < store.read(artifact, "tuning").nbytes < 5_000_000
    again, other = carry_out(replace(tuned, run=str(tmp_path / "again"), changes=[*CHANGES, *TUNED, "blend.levels=3"]))
    assert "tuning" not in again.computed and "tune" not in again.computed
    assert other.output_sha256 not in (row.output_sha256, before.output_sha256)
    plan = make_video_plan(replace(tuned, changes=[*CHANGES, *TUNED, "tuning.frames=1"]), dry=True)
    assert {reason.node: reason.why for reason in explain_videos(plan)} == {
        "tuning": "config changed: tuning.frames 2 -> 1",
        "segment": "upstream changed: tuning",
        "join": "upstream changed: tuning",
    }
    with pytest.raises(UsageError, match="tuning: frames must be at least 1, got 0"):
        make_video_plan(replace(tuned, changes=["tuning.frames=0"]), dry=True)
