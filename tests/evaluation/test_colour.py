"""Colour outliers: hand-checkable colours, then pictures with a patch."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from e4s_models.regions import Region
from evaluation.answer import inside_face
from evaluation.colour import chroma_outliers, skin_outliers
from evaluation.metrics import METRICS, PairData, measure

SIDE = 512
SKIN_RGB, YELLOW, RED = (205, 160, 140), (230, 210, 60), (190, 60, 70)


def landmarks() -> np.ndarray:
    """68 points on an ellipse around the middle of the crop."""
    angles = np.linspace(0, 2 * np.pi, 68, endpoint=False)
    return np.stack([256 + 110 * np.cos(angles), 290 + 130 * np.sin(angles)], axis=1).astype(np.float32)


def face_of(colour: tuple[int, int, int], light: tuple[float, float] = (0.6, 1.1)) -> tuple[np.ndarray, np.ndarray]:
    """A crop whose skin is an ellipse of one colour with red lips, lit from left to right by `light`, and its label map."""
    face, regions = np.full((SIDE, SIDE, 3), 90, np.uint8), np.full((SIDE, SIDE), Region.BACKGROUND, np.uint8)
    for axes, middle, region, painted in (((140, 180), (256, 270), Region.SKIN, colour), ((40, 15), (256, 360), Region.LIPS, RED)):
        shape = cv2.ellipse(np.zeros((SIDE, SIDE), np.uint8), middle, axes, 0, 0, 360, 1, -1) > 0
        face[shape], regions[shape] = painted, region
    lit = np.linspace(*light, SIDE)[None, :, None]
    return np.clip(face * lit, 0, 255).astype(np.uint8), regions


def test_the_range_is_that_of_the_target_widened_by_three_robust_deviations() -> None:
    # a: 0 to 100, median 50, MAD 25, so 1 - 3 x 37.065 to 99 + 3 x 37.065; b: constant 7, deviation 1 at least: 4 to 10
    of_target = np.stack([np.arange(101), np.full(101, 7)], axis=1).astype(np.float32)
    asked = np.array([[50, 7], [-110, 7], [-110.3, 7], [210, 7], [210.3, 7], [50, 4.1], [50, 3.9], [50, 9.9], [50, 10.1]], np.float32)
    assert chroma_outliers(asked, of_target).tolist() == [False, False, True, False, True, False, True, False, True]


def test_light_and_features_do_not_count() -> None:
    target, regions = face_of(SKIN_RGB)
    darker, _ = face_of(SKIN_RGB, light=(0.65, 0.65))
    assert skin_outliers(target, regions, landmarks(), target, regions) == 0
    assert skin_outliers(darker, regions, landmarks(), target, regions) == 0


@pytest.mark.parametrize("seen_as", [Region.SKIN, Region.BACKGROUND])
def test_a_patch_of_another_colour_counts_whatever_the_parser_takes_it_for(seen_as: Region) -> None:
    target, target_regions = face_of(SKIN_RGB)
    swapped, regions = target.copy(), target_regions.copy()
    swapped[240:280, 200:240], regions[240:280, 200:240] = YELLOW, seen_as
    share = skin_outliers(swapped, regions, landmarks(), target, target_regions)
    skin = (target_regions == Region.SKIN).sum()
    assert share == pytest.approx(1600 / skin, rel=0.15)  # the skin's rim does not count


def test_a_gray_target_wants_a_gray_result() -> None:
    target, regions = face_of((150, 150, 150))
    swapped, _ = face_of(SKIN_RGB)
    assert skin_outliers(target, regions, landmarks(), target, regions) == 0
    assert skin_outliers(swapped, regions, landmarks(), target, regions) == 1


def test_no_skin_is_no_number() -> None:
    target, regions = face_of(SKIN_RGB)
    nothing = np.full_like(regions, Region.HAIR)
    assert math.isnan(skin_outliers(target, nothing, landmarks(), target, regions))
    assert math.isnan(skin_outliers(target, regions, landmarks(), target, nothing))


def test_a_pair_is_faulty_above_half_a_percent() -> None:
    data = PairData(features={"skin": np.array([[0.0], [0.004], [0.006], [0.2]])})
    assert measure(METRICS["colour_faults"], data).values.tolist() == [0, 0, 1, 1]
    assert measure(METRICS["skin_outliers"], data).measured.value == pytest.approx(5.25)


def test_inside_the_face_is_the_hull_of_its_landmarks() -> None:
    points = np.tile(np.array([[10, 10], [20, 10], [20, 20], [10, 20]], np.float32), (17, 1))
    inside = inside_face(points, 32)
    assert inside.sum() == 11 * 11 and inside[10, 10] and inside[20, 20] and not inside[9, 15] and not inside[15, 21]
