"""Label maps and colours over time: noise goes, motion and a flickering light stay, and groups change nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from video_clips import MS, make_video

from e4s_models.video_faces import VideoFaceDetector
from flows.profiles import make_settings
from flows.stages import FRAME_RESULT, VIDEO_NODES
from storage.store import Store
from tasks.graph import Graph, Settings
from tasks.light import LUMINANCE, share_light
from tasks.planes import PlanarFrame
from tasks.runner import Worker
from tasks.steady import Known, Steady, vote
from tasks.track import SmoothConfig, TrackConfig
from tasks.video import FrameTable, probe, read_frames
from tasks.video_pass import Way, detect_range, track_person

FRAMES, SIZE = 14, (224, 200)


def test_a_label_of_one_frame_alone_is_outvoted_and_motion_stays() -> None:
    edge = np.stack([np.repeat(np.arange(16) >= 4 + frame, 8).reshape(16, 8) for frame in range(7)]).astype(np.uint8)  # a row per frame
    weights = np.exp(-0.5 * (np.arange(7) - 3.0) ** 2).astype(np.float32)
    assert np.array_equal(vote(edge, weights, 3), edge[3])
    noisy = edge.copy()
    noisy[3, 12, 2] = 9
    noisy[3, 1, 5] = 4
    assert np.array_equal(vote(noisy, weights, 3), edge[3])
    two = np.stack([edge[0], edge[3]])
    assert np.array_equal(vote(two, np.ones(2, np.float32), 0), edge[0])  # even votes: its own
    assert np.array_equal(vote(two, np.ones(2, np.float32), 1), edge[3])


def cells_of(colours: np.ndarray) -> np.ndarray:
    """(T, 8, 8, 3) -> with skin everywhere but in the first column."""
    skin = np.ones((*colours.shape[:3], 1), np.float32)
    skin[:, :, 0] = 0
    return np.concatenate([colours, skin], axis=3).astype(np.float32)


def test_noise_of_colours_goes_and_a_flickering_light_stays() -> None:
    random = np.random.default_rng(0)
    true = random.uniform(0.2, 0.6, (8, 8, 3))
    flicker = np.array([1.0, 0.5, 1.1, 0.7, 1.3])
    noisy = cells_of(true * flicker[:, None, None, None] * np.exp(random.normal(0, 0.1, (5, 8, 8, 3))))
    weights = np.ones(5, np.float32)
    for frame in range(5):
        shared = share_light(noisy, weights, frame)
        before, after = (np.abs(np.log(each[:, 1:, :3] / (true * flicker[frame])[:, 1:])).mean() for each in (noisy[frame], shared))
        assert after < 0.7 * before
        level = [np.median(each[:, 1:, :3] @ LUMINANCE) for each in (noisy[frame], shared)]
        assert level[1] == pytest.approx(level[0], rel=0.06)
    assert (shared[:, 0, 3] == 0).all() and (shared[:, 1:, 3] == 1).all()


def test_a_cell_is_skin_where_most_frames_say_so() -> None:
    cells = cells_of(np.full((3, 8, 8, 3), 0.3))
    cells[1, 4, 4, 3] = 0
    cells[2, 6, 6, 3] = 0
    cells[1, 6, 6, 3] = 0
    shared = share_light(cells, np.ones(3, np.float32), 0)
    assert (shared[4, 4, 3], shared[6, 6, 3]) == (1, 0)
    cells[0, ..., 3] = 0
    assert np.array_equal(share_light(cells, np.ones(3, np.float32), 0), cells[0])  # no skin here: nothing is made up


@pytest.fixture(scope="module")
def clip(people: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FrameTable, Way]:
    """A face that wanders through noise of the camera."""
    with Image.open(people[1]) as picture:
        rgb = np.asarray(picture.convert("RGB").resize((SIZE[0] + 20, SIZE[0] + 20), Image.Resampling.BOX))
    random = np.random.default_rng(0)

    def shown(index: int) -> np.ndarray:
        left, top = 6 + round(5 * np.sin(index / 3)), 8 + index % 3
        window = rgb[top : top + SIZE[1], left : left + SIZE[0]].astype(np.float32)
        noise = cv2.GaussianBlur(random.normal(0, 25, window.shape).astype(np.float32), (0, 0), 1.5)
        return np.clip(window + noise, 0, 255).astype(np.uint8)

    path = tmp_path_factory.mktemp("clips") / "clip.mkv"
    make_video(path, [40 * frame for frame in range(FRAMES)], tick=MS, size=SIZE, shown=shown)
    table = probe(str(path))
    found = detect_range(VideoFaceDetector.load(), read_frames(str(path), table, 0, FRAMES), 0, FRAMES)
    return path, table, Way.of(track_person([found], FRAMES, 0, TrackConfig(), SmoothConfig(), 24, None))


def steady_of(clip: tuple[Path, FrameTable, Way], store: Path, **smooth: float) -> Steady:
    changes = ["align.side=160", "parse.side=160"]
    settings = make_settings("fast", ["light=skin", "swap=composite"], changes, "cpu")
    graph = Graph(VIDEO_NODES, FRAME_RESULT, Settings(settings.backends, settings.options, "cpu"))
    return Steady(Worker(graph, Store(str(store))), clip[2], SmoothConfig(**smooth))


def all_of(steady: Steady, clip: tuple[Path, FrameTable, Way], groups: list[tuple[int, int]]) -> dict[int, Known]:
    path, table, _ = clip

    def frames(start: int, stop: int) -> Iterator[PlanarFrame]:
        return read_frames(str(path), table, start, stop)

    return {frame: known for start, stop in groups for frame, known in steady.group(start, stop, frames).items()}


def test_groups_change_nothing_and_smoothing_calms(clip: tuple[Path, FrameTable, Way], tmp_path: Path) -> None:
    whole = all_of(steady_of(clip, tmp_path), clip, [(0, FRAMES)])
    in_order = steady_of(clip, tmp_path)
    parts, looks = {}, Counter[str]()
    for group in ((0, 5), (5, 6), (6, FRAMES)):
        parts |= all_of(in_order, clip, [group])
        looks.update({node: count for node, (count, _) in in_order.spent.items()})
    assert looks == {"mesh": FRAMES, "parse": FRAMES, "light": FRAMES}  # nothing is looked at twice
    alone = all_of(steady_of(clip, tmp_path), clip, [(5, 6)])
    assert whole.keys() == parts.keys() == set(range(FRAMES))
    for other in (parts, alone):
        for frame, known in other.items():
            assert known.keys() == {"mesh", "parse", "light"}
            for node, outputs in known.items():
                assert all(np.array_equal(value, whole[frame][node][name]) for name, value in outputs.items()), (frame, node)
    raw = all_of(steady_of(clip, tmp_path, mesh=0, mask=1e-3, light=1e-3), clip, [(0, FRAMES)])

    def unrest(found: dict[int, Known], node: str, name: str) -> float:
        values = np.stack([found[frame][node][name].astype(np.float64) for frame in range(FRAMES)])
        return float(np.abs(np.diff(values, 2, axis=0)).mean())

    labels = [np.stack([found[frame]["parse"]["regions"] for frame in range(FRAMES)]) for found in (raw, whole)]
    changes = [(each[1:] != each[:-1]).mean() for each in labels]
    assert changes[1] < 0.8 * changes[0]
    assert unrest(whole, "light", "skin") < 0.8 * unrest(raw, "light", "skin")


def test_what_is_switched_off_is_left_to_the_stages(clip: tuple[Path, FrameTable, Way], tmp_path: Path) -> None:
    off = steady_of(clip, tmp_path, mesh=0, mask=0, light=0)
    assert all_of(off, clip, [(0, 3)]) == {0: {}, 1: {}, 2: {}}
    assert off.spent == {}
