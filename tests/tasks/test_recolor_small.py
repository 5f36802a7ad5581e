"""Stage `recolor`, backend `learned`: colours come from the target, detail and everything outside the mask from the swapped face."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from e4s_models.face_parser import FaceParser
from e4s_models.regions import INNER_FACE, Region
from tasks import parse
from tasks.recolor_small import STAGE, LearnedConfig, share_of_change
from tasks.stage import ItemError, UInt8

SIDE = 256


@pytest.fixture(scope="module")
def faces(people: list[Path]) -> list[tuple[UInt8, UInt8]]:
    """Two synthetic faces and their regions."""
    images = [cv2.resize(cv2.imread(str(path)), (SIDE, SIDE), interpolation=cv2.INTER_AREA)[..., ::-1].copy() for path in people[:2]]
    parsed = [parse.STAGE.run(FaceParser.load("cpu"), parse.ParseConfig(), [{"face": image}])[0] for image in images]
    return [(image, result["regions"]) for image, result in zip(images, parsed, strict=True) if not isinstance(result, ItemError)]


def run(swapped: tuple[UInt8, UInt8], target: tuple[UInt8, UInt8], config: LearnedConfig) -> UInt8:
    mask = np.where(np.isin(swapped[1], INNER_FACE), 255, 0).astype(np.uint8)
    named = {"swapped": swapped[0], "swapped_regions": swapped[1], "target_face": target[0], "target_regions": target[1], "mask": mask}
    (result,) = STAGE.run(STAGE.load(config, "cpu"), config, [named])
    assert not isinstance(result, ItemError)
    return np.asarray(result["recolored"], np.uint8)


def test_skin_takes_the_targets_tone_and_the_rest_stays(faces: list[tuple[UInt8, UInt8]]) -> None:
    swapped, (target, target_regions) = faces[0], faces[1]
    blue = np.clip(target * np.array([0.5, 0.7, 1.2]), 0, 255).astype(np.uint8)
    made = run(swapped, (blue, target_regions), LearnedConfig())
    outside = ~np.isin(swapped[1], INNER_FACE)
    assert np.array_equal(made[outside], swapped[0][outside])
    skin, target_skin = swapped[1] == Region.SKIN, target_regions == Region.SKIN
    before, after = (np.abs(picture[skin].mean(axis=0) - blue[target_skin].mean(axis=0)).mean() for picture in (swapped[0], made))
    assert after < 0.4 * before
    assert np.array_equal(made, run(swapped, (blue, target_regions), LearnedConfig()))


def test_no_amount_changes_nothing(faces: list[tuple[UInt8, UInt8]]) -> None:
    assert np.array_equal(run(faces[0], faces[1], LearnedConfig(amount=0)), faces[0][0])


def test_features_keep_part_of_their_own_look() -> None:
    regions = np.full((200, 200), int(Region.SKIN), np.uint8)
    regions[50:150, 50:150] = Region.LIPS
    share = share_of_change(regions, LearnedConfig(amount=0.8, own_features=0.5))
    assert share[100, 100] == pytest.approx(0.4)
    assert share[10, 10] == pytest.approx(0.8)
    with pytest.raises(ValueError, match=r"amount must be in 0\.\.1, got 3"):
        LearnedConfig(amount=3)
