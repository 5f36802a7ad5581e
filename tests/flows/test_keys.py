"""How keys are composed, of pairs and of videos: digests pinned on the commit before the redesign of the orchestration (dfb9c2d).

What belongs to single stages (version, config, weights, libraries) is left out, so that a stage can change without a change here. Where
one of these digests changes, finished work of every run folder is computed again: say so in the CHANGELOG.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.plan import Request, make_plan
from flows.video_plan import VideoPlan, VideoRequest, make_video_plan
from storage.keys import digest
from tasks.graph import Graph

# 1 x 1 px; bytes behind the end of a PNG make other files of it.
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
PAIRS = {
    "codes": "09fcbb87eec065235bfd466e8224635e4a91e896297d9a6058c28cf898d770db",
    "fast": "09eb13daf9ea32f997a6441c05a3068cf09f882aeacc9106ddac195101754cbe",
    "mobile": "a3aad407ba4a834c0991003ef45f9d7bbb43d977f6cc523b0e54c7bbdffd75e1",
}
VIDEOS = {
    "codes": "053cd93edb0ce916f2c48beba121055694ee61cb5baf3a16ce9bd05a08b71c06",
    "fast": "966f0f6d15b6a7d465112a8fc5c4e14ca6f5d9204843ebb5c694ad399a495316",
    "mobile": "edda7fdf9b4419aee9b5499362dc8df413f14b407dbbc6371d108035e4d83de4",
}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Manifests of two pairs and two videos, and stages without versions."""
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(PNG + b"trailing" * number)
    (tmp_path / "clip.mp4").write_bytes(b"decoded by nobody")
    (tmp_path / "pairs.csv").write_text("id,source,target\na,0.png,1.png\nb,2.png,1.png\n")
    (tmp_path / "videos.csv").write_text("id,source,video\na,0.png,clip.mp4\nb,2.png,clip.mp4\n")

    def fingerprint(graph: Graph, name: str) -> dict[str, Any]:
        return {"stage": graph.stages[name].name, "weights": {}, "libraries": {}}

    monkeypatch.setattr(Graph, "_fingerprint", fingerprint)
    monkeypatch.setattr("flows.video_recipe._prints", lambda graph, configs: {kind: kind for kind in KINDS})
    monkeypatch.setattr("flows.video_recipe.library_version", lambda *names: "1")
    return tmp_path


KINDS = ("probe", "detect", "track", "tuning", "segment")


@pytest.mark.parametrize("profile", PAIRS)
def test_keys_of_pairs(profile: str, inputs: Path) -> None:
    plan = make_plan(Request(manifest=str(inputs / "pairs.csv"), run=str(inputs / "run"), profile=profile, device="cpu"), dry=True)
    keys = {item.id: {".".join(place): work.key for place, work in plan.graph.works(item).items()} for item in plan.todo}
    assert [plan.rows[name].key for name in keys] == [keys[name]["paste."] for name in keys]
    assert digest(keys) == PAIRS[profile]


class Still:
    """The course of a face that stays where it is."""

    state = np.zeros(40)
    run = np.arange(40)

    def course(self, frame: int) -> list[float]:
        return [frame, 1.5]


def keys_of_video(plan: VideoPlan) -> dict[str, Any]:
    row = plan.rows["a"]
    given = {("align", "target"): "2" * 64}
    return {
        "rows": [row.key for row in plan.rows.values()],
        "probe": plan.probe_key(row),
        "sound": plan.sound_key(row, [1]),
        "detect": plan.detect_key(row, 0, 64),
        "track": plan.track_key(row, ["0" * 64]),
        "tuning": plan.tuning_key(row, "1" * 64),
        "segment": plan.segment_key(row, 5, 20, Still(), ""),  # type: ignore[arg-type]
        "frame": {".".join(place): work.key for place, work in plan.graph.works(plan.item(row, 3, "3", given)).items()},
    }


@pytest.mark.parametrize("profile", VIDEOS)
def test_keys_of_videos(profile: str, inputs: Path) -> None:
    wanted = VideoRequest(manifest=str(inputs / "videos.csv"), run=str(inputs / "run"), profile=profile, device="cpu")
    assert digest(keys_of_video(make_video_plan(wanted, dry=True))) == VIDEOS[profile]
