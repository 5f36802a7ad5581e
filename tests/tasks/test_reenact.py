"""Stage `reenact`: planning by hand, drawing on synthetic people."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from e4s_models.face_mesh import BLENDSHAPE_NAMES, FaceMesh, Float32, Similarity
from e4s_models.regions import BISENET19_TO_REGIONS, Region
from tasks.parse import STAGE as PARSE
from tasks.parse import ParseConfig
from tasks.reenact import (
    _LOWER_LIP,
    _UPPER_LIP,
    BACKENDS,
    MESH,
    NONE,
    MeshConfig,
    Model,
    NoneConfig,
    _eye_loop,
    _eye_opening,
    _fill_loop,
    fit_plane,
    mouth_strength,
    plan_points,
    turned_by,
)
from tasks.stage import ItemError, Outputs, UInt8

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
    """Face, points, blendshapes and region ids of each person."""
    found = []
    parser = PARSE.load(ParseConfig(), "cpu")
    for path in people:
        face = np.ascontiguousarray(cv2.imread(str(path))[..., ::-1], np.uint8)
        points, _ = mesh.landmarks(face)
        (parsed,) = PARSE.run(parser, ParseConfig(), [{"face": face}])
        assert isinstance(parsed, dict)
        found.append({"face": face, "points": points, "blendshapes": mesh.blendshapes(points, 1024), "regions": parsed["regions"]})
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
    assert set(NONE.writes) == {"driven", "visible", "regions"}
    assert set(MESH.writes) == {*NONE.writes, "turned"}


def test_the_same_person_comes_back_unchanged(model: Model, seen: list[dict[str, Any]]) -> None:
    result = reenact(model, CONFIG, seen[0], seen[0])
    difference = (result["driven"].astype(float) - seen[0]["face"])[result["visible"] > 250]
    assert 10 * np.log10(255**2 / max((difference**2).mean(), 1e-9)) > 45  # dB
    inner = np.isin(seen[0]["regions"], (Region.SKIN, Region.NOSE)) & (result["regions"] == seen[0]["regions"])
    assert (result["visible"][inner] > 250).mean() > 0.9  # the rest lies beside hair
    assert (result["regions"] == seen[0]["regions"]).mean() > 0.97
    assert result["turned"] == pytest.approx(0, abs=1e-3)


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
        assert result["visible"].shape == result["regions"].shape == (1024, 1024)
        wanted = target["blendshapes"]
        change = wanted - source["blendshapes"]
        planned = plan_points(model, CONFIG, source["points"], target["points"], change, mouth_strength(wanted))
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
    assert (result["visible"][green] > 250).all()  # the target's own inner mouth is what shall be seen
    own = reenact(model, replace(CONFIG, borrow_mouth=-1.0), source, wide)
    assert not (own["driven"] == (0, 255, 0)).all(-1).any()


def test_a_mesh_that_is_no_mesh_is_an_item_error(model: Model, seen: list[dict[str, Any]]) -> None:
    far = {**seen[1], "points": seen[1]["points"] + np.array([5000, 0, 0], np.float32)}
    broken = {**seen[1], "points": np.full((478, 3), np.nan, np.float32)}
    for target, reason in ((far, "outside the crop"), (broken, "no numbers")):
        result, good = MESH.run(model, CONFIG, [pair(seen[0], target), pair(seen[0], seen[1])])
        assert isinstance(result, ItemError) and reason in str(result)
        assert isinstance(good, dict)


def test_none_keeps_the_source(seen: list[dict[str, Any]]) -> None:
    result = NONE.run(None, NoneConfig(), [{"source_face": seen[0]["face"], "source_regions": seen[0]["regions"]}])[0]
    assert isinstance(result, dict)
    np.testing.assert_array_equal(result["driven"], seen[0]["face"])
    assert (result["visible"] == 255).all()


def test_plane_similarity_by_hand() -> None:
    square = np.array([[0, 0], [2, 0], [2, 2], [0, 2]], np.float32)
    turned = np.array([[5, 5], [5, 9], [1, 9], [1, 5]], np.float32)  # a quarter turn, twice as large, moved by (5, 5)
    np.testing.assert_allclose(fit_plane(square, turned), [[0, -2, 5], [2, 0, 5]], atol=1e-6)


def with_lids(model: Model, person: dict[str, Any], openings: tuple[float, float]) -> Float32:
    """The person's mesh with the lids of both eyes scaled."""
    points: Float32 = person["points"].copy()
    upper_lids = ((246, 161, 160, 159, 158, 157, 173), (398, 384, 385, 386, 387, 388, 466))
    lower_lids = ((7, 163, 144, 145, 153, 154, 155), (382, 381, 380, 374, 373, 390, 249))
    for share, upper, lower in zip(openings, upper_lids, lower_lids, strict=True):
        points[list(upper)] = points[list(lower)] + share * (points[list(upper)] - points[list(lower)])
    return points


def planned_openings(model: Model, source: Float32, target: Float32) -> list[float]:
    planned = plan_points(model, CONFIG, source, target, np.zeros(52, np.float32))
    return [_eye_opening(planned, eye) for eye in (0, 1)]


def test_eyes_close_as_a_pair_and_a_wink_is_a_wink(model: Model, seen: list[dict[str, Any]]) -> None:
    person = seen[0]
    source = person["points"]
    usual = _eye_opening(source, 0)
    almost = with_lids(model, person, (0.15, 0.35))  # noise of the landmarks in closed eyes
    left, right = planned_openings(model, source, almost)
    assert abs(left - right) < 0.03
    assert max(left, right) < 0.6 * usual
    left, right = planned_openings(model, source, with_lids(model, person, (0.05, 1.0)))
    assert left < 0.4 * usual < 0.8 * usual < right


def test_closed_eyes_of_the_source_are_opened_and_left_to_the_generator(model: Model, seen: list[dict[str, Any]]) -> None:
    person = seen[0]
    closed = {**person, "points": with_lids(model, person, (0.1, 0.1))}
    result = reenact(model, CONFIG, closed, person)
    for eye in (0, 1):
        inside = _fill_loop(_eye_loop(person["points"], eye), (1024, 1024)) > 127
        assert (result["regions"][inside] == Region.EYES).mean() > 0.6
        assert (result["visible"][inside] < 30).all()


def test_labels_are_carried_by_the_map_that_carries_the_pixels(model: Model, seen: list[dict[str, Any]]) -> None:
    result = reenact(model, CONFIG, seen[0], seen[1])
    parser = PARSE.load(ParseConfig(), "cpu")
    (again,) = PARSE.run(parser, ParseConfig(), [{"face": result["driven"]}])
    assert isinstance(again, dict)
    own = BISENET19_TO_REGIONS[again["labels19"]]
    for region in (Region.SKIN, Region.NOSE, Region.LIPS, Region.EYES):
        here, there = result["regions"] == region, own == region
        assert (here & there).sum() / (here | there).sum() > (0.7 if region != Region.EYES else 0.55), region.name


def test_a_fringe_is_not_carried_and_the_skin_under_it_is_skin(model: Model, seen: list[dict[str, Any]]) -> None:
    person = seen[0]
    face, regions = person["face"].copy(), person["regions"].copy()
    left, top, right = person["points"][103], person["points"][10], person["points"][332]
    fringe = np.zeros((1024, 1024), np.uint8)
    cv2.rectangle(fringe, (int(left[0]), int(top[1])), (int(right[0]), int(top[1]) + 70), 1, -1)
    face[fringe > 0] = (20, 14, 10)
    regions[fringe > 0] = Region.HAIR
    result = reenact(model, CONFIG, {**person, "face": face, "regions": regions}, person)
    forehead = np.zeros((1024, 1024), np.uint8)
    cv2.rectangle(forehead, (int(left[0]) + 60, int(top[1]) + 35), (int(right[0]) - 60, int(top[1]) + 60), 1, -1)
    assert (result["regions"][forehead > 0] == Region.SKIN).mean() > 0.95
    assert (result["visible"][forehead > 0] == 0).all()
    skin = np.median(person["face"][person["regions"] == Region.SKIN], axis=0)
    assert np.abs(np.median(result["driven"][forehead > 0], axis=0) - skin).max() < 50


def draw_glasses(person: dict[str, Any], lens: tuple[int, int, int] | None) -> tuple[UInt8, UInt8]:
    """The person's face and labels with round glasses; clear ones without a lens."""
    face, regions = person["face"].copy(), person["regions"].copy()
    for corners in ((33, 133), (362, 263)):
        centre = person["points"][list(corners), :2].mean(0)
        at = (round(float(centre[0])), round(float(centre[1])))
        cv2.circle(regions, at, 95, int(Region.GLASSES), -1)
        if lens:
            cv2.circle(face, at, 95, lens, -1)
        cv2.circle(face, at, 95, (10, 10, 10), 12)
    return face, regions


def test_the_sources_frames_are_taken_off_and_eyes_behind_clear_lenses_stay(model: Model, seen: list[dict[str, Any]]) -> None:
    person = seen[0]
    face, regions = draw_glasses(person, None)
    result = reenact(model, CONFIG, {**person, "face": face, "regions": regions}, person)
    loop = _eye_loop(person["points"], 0)
    eye = _fill_loop(loop, (1024, 1024)) > 127
    assert (result["regions"][eye] == Region.EYES).mean() > 0.9
    assert (result["visible"][eye] > 200).mean() > 0.9
    x, y = (int(value) for value in loop.mean(axis=0))
    assert result["driven"][y + 95, x].min() > 40  # no frame
    assert result["visible"][y + 95, x] < 60


def test_eyes_behind_dark_lenses_are_the_generators(model: Model, seen: list[dict[str, Any]]) -> None:
    person = seen[0]
    face, regions = draw_glasses(person, (15, 15, 15))
    result = reenact(model, CONFIG, {**person, "face": face, "regions": regions}, person)
    eye = _fill_loop(_eye_loop(person["points"], 0), (1024, 1024)) > 127
    assert (result["visible"][eye] < 30).all()
    assert (result["regions"][eye] == Region.EYES).mean() > 0.9
    assert result["driven"][eye].mean() > 50  # the target lends its eyes, so that the encoder sees some


def test_an_o_stays_an_o(model: Model, seen: list[dict[str, Any]]) -> None:
    """The rim of the lips takes the form of a strong expression, whatever the person's mouth is like."""
    source = seen[0]["points"]
    target = seen[1]["points"].copy()
    rim = [78, 308, *_UPPER_LIP, *_LOWER_LIP]
    centre = target[rim].mean(0)
    angles = np.arctan2(*(target[rim] - centre)[:, 1::-1].T)
    target[rim, :2] = centre[:2] + 35 * np.column_stack([np.cos(angles), np.sin(angles)])

    def roundness(points: Float32) -> float:
        return opening(points) / float(np.linalg.norm(points[308, :2] - points[78, :2]))

    change = np.zeros(52, np.float32)
    round_mouth = plan_points(model, CONFIG, source, target, change, 1.0)
    at_rest = plan_points(model, CONFIG, source, target, change, 0.0)
    assert abs(roundness(round_mouth) - roundness(target)) < 0.5 * abs(roundness(at_rest) - roundness(target)) + 0.05


def test_strength_of_the_mouths_expression() -> None:
    blendshapes = np.zeros(52, np.float32)
    assert mouth_strength(blendshapes) == 0
    blendshapes[BLENDSHAPE_NAMES.index("eyeBlinkLeft")] = 1
    assert mouth_strength(blendshapes) == 0
    blendshapes[BLENDSHAPE_NAMES.index("mouthPucker")] = 0.325
    assert mouth_strength(blendshapes) == pytest.approx(0.5)
    blendshapes[BLENDSHAPE_NAMES.index("jawOpen")] = 0.9
    assert mouth_strength(blendshapes) == 1


def test_heads_turned_by_twenty_degrees(model: Model, seen: list[dict[str, Any]]) -> None:
    source = seen[0]["points"]
    yaw = np.radians(20)
    turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]], np.float32)
    target = Similarity(1.0, turn, np.zeros(3, np.float32)).apply(source)
    assert turned_by(model, source, target) == pytest.approx(20, abs=1.5)
