"""Stage `visibility`: what is believed, and what the shipped network makes of a face with and without something in front."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from e4s_models.face_parser import FaceParser
from e4s_models.regions import INNER_FACE, Region
from tasks import parse, visibility
from tasks.stage import ItemError, UInt8
from tasks.visibility import NetworkConfig, believed

SIDE = 512


@pytest.fixture(scope="module")
def person(people: list[Path]) -> tuple[UInt8, UInt8]:
    """A synthetic face (the generator's pictures are aligned) and its regions."""
    face = np.asarray(cv2.resize(cv2.imread(str(people[0])), (SIDE, SIDE), interpolation=cv2.INTER_AREA)[..., ::-1], np.uint8).copy()
    (parsed,) = parse.STAGE.run(FaceParser.load("cpu"), parse.ParseConfig(), [{"face": face}])
    assert not isinstance(parsed, ItemError)
    return face, parsed["regions"]


def run(face: UInt8, regions: UInt8) -> UInt8:
    stage = visibility.BACKENDS["network"]
    (result,) = stage.run(stage.load(NetworkConfig(), "cpu"), NetworkConfig(), [{"face": face, "regions": regions}])
    if isinstance(result, ItemError):
        raise result
    return np.asarray(result["visible"], np.uint8)


def test_specks_and_guesses_are_not_believed() -> None:
    in_front = np.full((64, 64), 0.1, np.float32)
    in_front[4:20, 4:20] = 0.9  # a thing
    in_front[10, 10] = 0.95
    in_front[40:56, 40:56] = 0.6  # a guess
    in_front[60, 2] = 1.0  # a speck
    kept = believed(in_front, certain=0.8, least_thing=0.01)
    assert (kept[4:20, 4:20] >= np.float32(0.9)).all()
    assert not kept[40:56, 40:56].any()
    assert kept[60, 2] == 0
    assert kept[0, 0] == np.float32(0.1), "what is below one half stays as it is"


def test_the_default_reads_and_writes_nothing() -> None:
    stage = next(iter(visibility.BACKENDS.values()))
    assert (stage.backend, stage.reads, dict(stage.writes)) == ("none", (), {})
    assert stage.run(None, stage.config(), [{}]) == [{}]


def test_a_drawn_microphone_is_seen_and_the_face_beside_it_stays(person: tuple[UInt8, UInt8]) -> None:
    face, regions = person
    thing = np.zeros((SIDE, SIDE), np.uint8)
    cv2.circle(thing, (256, 380), 55, 255, -1)
    cv2.line(thing, (256, 380), (300, 511), 255, 26)
    covered = np.where(thing[..., None] > 0, np.uint8(25), face)
    inner = np.isin(regions, INNER_FACE)
    visible = run(covered, regions)
    assert visible.shape == (SIDE, SIDE)
    assert (visible[(thing > 0) & inner] < 128).mean() > 0.85
    away = inner & (cv2.dilate(thing, np.ones((41, 41), np.uint8)) == 0)
    assert (visible[away] < 128).mean() < 0.03
    assert np.array_equal(visible, run(covered, regions))


def test_things_and_a_strip_of_the_face_around_them_are_labelled_as_what_is_before_it(person: tuple[UInt8, UInt8]) -> None:
    face, regions = person
    thing = np.zeros((SIDE, SIDE), np.uint8)
    cv2.circle(thing, (256, 330), 60, 255, -1)
    covered = np.where(thing[..., None] > 0, np.uint8(25), face)
    stage, config = visibility.BACKENDS["network"], NetworkConfig()
    (result,) = stage.run(stage.load(config, "cpu"), config, [{"face": covered, "regions": regions}])
    assert not isinstance(result, ItemError)
    seen = result["visible"] < 128
    assert (result["regions"][seen] == Region.HAIR).all()
    changed = result["regions"] != regions
    assert changed.sum() > seen.sum()
    assert (result["regions"][changed] == Region.HAIR).all()
    reach = cv2.distanceTransform((~seen).astype(np.uint8), cv2.DIST_L2, 5)
    assert reach[changed].max() <= config.margin * SIDE + 1


def test_nothing_is_seen_in_front_of_a_bare_face(person: tuple[UInt8, UInt8]) -> None:
    face, regions = person
    assert (run(face, regions)[np.isin(regions, INNER_FACE)] < 128).mean() < 0.02


def test_a_face_wholly_covered_fails_with_a_sentence(person: tuple[UInt8, UInt8]) -> None:
    face, regions = person
    with pytest.raises(ItemError, match=r"the face is covered: only 0\.0 % of the crop show it"):
        run(face, np.zeros_like(regions))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"certain must be in 0\.\.1, got 2"):
        NetworkConfig(certain=2)
