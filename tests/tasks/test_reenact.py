"""Stage `reenact`: planning by hand, drawing on synthetic people."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from e4s_models.face_mesh import BLENDSHAPE_NAMES, FaceMesh, Float32, Similarity
from tasks.reenact import _LOWER_LIP, _UPPER_LIP, BACKENDS, MESH, NONE, MeshConfig, Model, NoneConfig, fit_plane, plan_points
from tasks.stage import ItemError, Outputs

CONFIG = MeshConfig()


@pytest.fixture(scope="module")
def mesh() -> FaceMesh:
    return FaceMesh.load()


@pytest.fixture(scope="module")
def model() -> Model:
    loaded: Model = MESH.load(CONFIG, "cpu")
    return loaded


@pytest.fixture(scope="module")
def seen(people: list[Path], mesh: FaceMesh) -> list[dict[str, Any]]:
    """Face, points and blendshapes of each person."""
    found = []
    for path in people:
        face = np.ascontiguousarray(cv2.imread(str(path))[..., ::-1], np.uint8)
        points, _ = mesh.landmarks(face)
        found.append({"face": face, "points": points, "blendshapes": mesh.blendshapes(points, 1024)})
    return found


def pair(source: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    return {f"source_{k}": v for k, v in source.items()} | {f"target_{k}": v for k, v in target.items()}


def reenact(model: Model, config: MeshConfig, source: dict[str, Any], target: dict[str, Any]) -> Outputs:
    result = MESH.run(model, config, [pair(source, target)])[0]
    assert isinstance(result, dict)
    return result


def opening(points: Float32) -> float:
    return float(np.linalg.norm(points[list(_UPPER_LIP), :2] - points[list(_LOWER_LIP), :2], axis=1).mean())


def test_declaration() -> None:
    assert list(BACKENDS) == ["mesh", "none"]
    assert set(MESH.writes) == set(NONE.writes) == {"driven", "visible"}


def test_the_same_person_comes_back_unchanged(model: Model, seen: list[dict[str, Any]]) -> None:
    result = reenact(model, CONFIG, seen[0], seen[0])
    difference = result["driven"].astype(float) - seen[0]["face"]
    assert 10 * np.log10(255**2 / max((difference**2).mean(), 1e-9)) > 45  # dB
    assert (result["visible"] == 255).all()


def test_plan_takes_the_pose_and_keeps_the_shape(model: Model, seen: list[dict[str, Any]]) -> None:
    source = seen[0]["points"]
    yaw, roll = np.radians(20), np.radians(5)
    turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    turn = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]]) @ turn
    centre = source.mean(0)
    target = Similarity(1.1, turn.astype(np.float32), (centre - 1.1 * turn @ centre + [10, 20, 0]).astype(np.float32)).apply(source)
    planned = plan_points(model, CONFIG, source, target, np.zeros(52, np.float32))
    np.testing.assert_allclose(planned[:, :2], target[:, :2], atol=3)  # the same person turned: the plan is that turned head


def test_plan_opens_the_mouth_as_the_target_does(model: Model, seen: list[dict[str, Any]]) -> None:
    source, jaw = seen[0]["points"], BLENDSHAPE_NAMES.index("jawOpen")
    pose = model.geometry.pose(source)
    shape = pose.inverse().apply(source)
    shape[:468] += 0.8 * model.basis[jaw]
    target = pose.apply(shape)
    change = np.zeros(52, np.float32)
    change[jaw] = 0.8
    planned = plan_points(model, CONFIG, source, target, change)
    assert opening(planned) == pytest.approx(opening(target), rel=0.1)
    assert opening(planned) > opening(source) + 10
    assert planned[152, 1] > source[152, 1] + 5  # the chin sinks
    closed = plan_points(model, CONFIG, target, source, -change)
    assert opening(closed) == pytest.approx(opening(source), abs=4)
    still = plan_points(model, replace(CONFIG, expression=0.0), source, target, change)
    assert opening(still) == pytest.approx(opening(source), rel=0.1)


def test_driven_face_has_the_planned_landmarks_and_the_target_pose(model: Model, mesh: FaceMesh, seen: list[dict[str, Any]]) -> None:
    for source, target in ((seen[0], seen[1]), (seen[1], seen[2])):
        result = reenact(model, CONFIG, source, target)
        assert result["driven"].shape == (1024, 1024, 3) and result["driven"].dtype == np.uint8
        assert result["visible"].shape == (1024, 1024) and set(np.unique(result["visible"])) <= {0, 255}
        planned = plan_points(model, CONFIG, source["points"], target["points"], target["blendshapes"] - source["blendshapes"])
        found, presence = mesh.landmarks(result["driven"])
        assert presence > 0.99
        assert np.linalg.norm(found[:468, :2] - planned[:468, :2], axis=1).mean() < 15  # px
        asked, had, got = (np.array(mesh.geometry.pose(p).angles) for p in (target["points"], source["points"], found))
        assert np.abs(got - asked).sum() < 0.6 * np.abs(had - asked).sum() + 3  # degrees: most of the turn is made


def test_bytes_are_reproducible_in_and_out_of_a_batch(model: Model, seen: list[dict[str, Any]]) -> None:
    a, b = pair(seen[0], seen[1]), pair(seen[2], seen[1])
    alone = [MESH.run(model, CONFIG, [item])[0] for item in (a, b)]
    for one, many in zip(alone, MESH.run(model, CONFIG, [a, b]), strict=True):
        assert isinstance(one, dict) and isinstance(many, dict)
        for name in MESH.writes:
            np.testing.assert_array_equal(one[name], many[name])


def test_closed_lips_borrow_the_mouth_of_an_open_target(model: Model, seen: list[dict[str, Any]]) -> None:
    person = seen[0]
    jaw = BLENDSHAPE_NAMES.index("jawOpen")
    pose = model.geometry.pose(person["points"])

    def with_opening(change: float) -> Float32:
        shape = pose.inverse().apply(person["points"])
        shape[:468] += change * model.basis[jaw]
        return pose.apply(shape)

    shut = person["points"].copy()
    middle = (shut[list(_UPPER_LIP)] + shut[list(_LOWER_LIP)]) / 2
    shut[list(_UPPER_LIP)], shut[list(_LOWER_LIP)] = middle, middle + np.array([0, 1, 0], np.float32)
    wide = {**person, "points": with_opening(1.0), "face": np.full((1024, 1024, 3), (0, 255, 0), np.uint8)}
    source = {**person, "points": shut}
    result = reenact(model, CONFIG, source, wide)
    green = (result["driven"] == (0, 255, 0)).all(-1)
    assert green.sum() > 300  # the target's pixels fill the opening
    assert (result["visible"][green] == 0).all()
    own = reenact(model, replace(CONFIG, borrow_mouth=0.0), source, wide)
    assert not (own["driven"] == (0, 255, 0)).all(-1).any()


def test_a_mesh_that_is_no_mesh_is_an_item_error(model: Model, seen: list[dict[str, Any]]) -> None:
    far = {**seen[1], "points": seen[1]["points"] + np.array([5000, 0, 0], np.float32)}
    broken = {**seen[1], "points": np.full((478, 3), np.nan, np.float32)}
    for target, reason in ((far, "outside the crop"), (broken, "no numbers")):
        result, good = MESH.run(model, CONFIG, [pair(seen[0], target), pair(seen[0], seen[1])])
        assert isinstance(result, ItemError) and reason in str(result)
        assert isinstance(good, dict)


def test_none_keeps_the_source(seen: list[dict[str, Any]]) -> None:
    result = NONE.run(None, NoneConfig(), [{"source_face": seen[0]["face"]}])[0]
    assert isinstance(result, dict)
    np.testing.assert_array_equal(result["driven"], seen[0]["face"])
    assert (result["visible"] == 255).all()


def test_plane_similarity_by_hand() -> None:
    square = np.array([[0, 0], [2, 0], [2, 2], [0, 2]], np.float32)
    turned = np.array([[5, 5], [5, 9], [1, 9], [1, 5]], np.float32)  # a quarter turn, twice as large, moved by (5, 5)
    np.testing.assert_allclose(fit_plane(square, turned), [[0, -2, 5], [2, 0, 5]], atol=1e-6)
