"""Video metrics on clips small enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.video import frames_without_face, identity_jitter, landmark_jitter


def clip(places: list[float]) -> np.ndarray:
    """Landmarks (T, 68, 2): outer eye corners 100 px apart, the whole face at these x places."""
    face = np.zeros((68, 2))
    face[45, 0] = 100
    return np.stack([face + np.array([place, 0]) for place in places])


def test_frames_without_a_face_are_counted() -> None:
    assert frames_without_face(np.array([True, False, False, True])) == (2, 0.5)
    assert frames_without_face(np.zeros(0, bool)) == (0, 0.0)


def test_a_steady_motion_does_not_jitter() -> None:
    found = np.ones(5, bool)
    assert landmark_jitter(clip([0, 7, 14, 21, 28]), found).value == pytest.approx(0, abs=1e-12)
    jumps = landmark_jitter(clip([0, 0, 3, 0, 0]), found)  # second differences 3, -6, 3
    assert (jumps.value, jumps.count) == (pytest.approx(4.0), 3)  # percent of 100 px


def test_frames_without_a_face_are_not_bridged() -> None:
    found = np.array([True, True, True, False, True, True, True])
    steady = landmark_jitter(clip([0, 0, 0, 999, 50, 50, 50]), found)
    assert (steady.value, steady.count) == (0, 2)
    features = np.array([[1.0, 0], [1, 0], [2, 0], [0, 0], [0, 1], [0, 1], [1, 0]])
    identity = identity_jitter(features, found)
    assert (identity.value, identity.count) == (pytest.approx(0.25), 4)  # one turn of 90 degrees among four neighbours


@pytest.mark.parametrize("found", [np.zeros(0, bool), np.zeros(4, bool), np.array([True]), np.array([True, False, True, False])])
def test_clips_without_neighbours_say_so(found: np.ndarray) -> None:
    identity = identity_jitter(np.ones((len(found), 2)), found)
    assert identity.value is None and "no 2 frames in a row with a face" in identity.reason
    landmarks = landmark_jitter(np.ones((len(found), 68, 2)), found)
    assert landmarks.value is None and f"of {len(found)} frames" in landmarks.reason
