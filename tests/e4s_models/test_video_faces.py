from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from e4s_models.dlib_face import Detection
from e4s_models.video_faces import VideoFaceDetector

SIZE = (240, 320)


@pytest.fixture(scope="module")
def detector() -> VideoFaceDetector:
    return VideoFaceDetector.load()


@pytest.fixture(scope="module")
def person(people: list[Path]) -> np.ndarray:
    return np.asarray(Image.open(people[0]).convert("RGB"))


def frame(person: np.ndarray, side: int, x: int, turned: bool = False) -> np.ndarray:
    """A gray frame with the person's picture of `side` px at column x."""
    canvas = np.full((*SIZE, 3), 128, np.uint8)
    small = cv2.resize(person, (side, side), interpolation=cv2.INTER_AREA)
    canvas[20 : 20 + side, x : x + side] = np.rot90(small) if turned else small
    return canvas


def detect(detector: VideoFaceDetector, frames: list[np.ndarray], start: int, stop: int) -> list[list[Detection]]:
    return list(detector.detect_chunk(frames[start : stop + 1], stop - start, every=4))


def same(one: list[list[Detection]], other: list[list[Detection]]) -> bool:
    return [[face.landmarks.tobytes() for face in faces] for faces in one] == [
        [face.landmarks.tobytes() for face in faces] for faces in other
    ]


def test_every_frame_shows_the_face_whatever_the_chunk(detector: VideoFaceDetector, person: np.ndarray) -> None:
    frames = [frame(person, 200, 10 + 6 * index) for index in range(11)]
    whole = detect(detector, frames, 0, 11)
    assert [len(faces) for faces in whole] == [1] * 11
    assert same(whole, detect(detector, frames, 0, 4) + detect(detector, frames, 4, 11))
    centres = np.array([faces[0].landmarks.mean(axis=0) for faces in whole])
    assert np.abs(np.diff(centres[:, 0]) - 6).max() < 2


def test_small_and_turned_faces_are_found_between_full_searches(detector: VideoFaceDetector, person: np.ndarray) -> None:
    for side, turned in ((76, False), (200, True)):
        frames = [frame(person, side, 20 + 4 * index, turned) for index in range(5)]
        assert detector.detect_near(frames[1], [], 1) == []
        assert [len(faces) for faces in detect(detector, frames, 0, 4)] == [1] * 4


def test_a_face_that_appears_is_found_by_what_the_other_end_shows(detector: VideoFaceDetector, person: np.ndarray) -> None:
    empty = np.full((*SIZE, 3), 128, np.uint8)
    frames = [empty, empty, frame(person, 76, 30), frame(person, 76, 34), frame(person, 76, 38)]
    assert [len(faces) for faces in detect(detector, frames, 0, 4)] == [0, 0, 1, 1]


def test_full_searches_are_few_and_few_frames_are_held(detector: VideoFaceDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []
    monkeypatch.setattr(VideoFaceDetector, "detect", lambda self, rgb, at_least=1: searched.append(int(rgb[0, 0, 0])) or [])
    ahead: list[int] = []

    def frames() -> Iterator[np.ndarray]:
        for index in range(10):
            ahead.append(index)
            yield np.full((64, 64, 3), index, np.uint8)

    found = 0
    for _ in detector.detect_chunk(frames(), 9, every=4):
        found += 1
        assert len(ahead) <= (found - 1) // 4 * 4 + 5
    assert found == 9
    assert searched == [0, 4, 8]
    assert list(detector.detect_chunk([], 0)) == []
