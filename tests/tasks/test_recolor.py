from __future__ import annotations

import numpy as np
import pytest

from e4s_models.regions import Region
from tasks.recolor import BACKENDS, GuidedConfig, colour_guidance, recolor
from tasks.stage import Inputs, Outputs, UInt8

SIDE = 128
CONFIG = GuidedConfig()


def face(colour: tuple[int, int, int], slope: float = 0.0) -> tuple[UInt8, UInt8]:
    """A face of skin with two brows, its light falling off from left (1 + slope) to right (1 - slope)."""
    regions = np.zeros((SIDE, SIDE), np.uint8)
    regions[16:112, 24:104] = Region.SKIN
    regions[40:46, 36:56] = regions[40:46, 72:92] = Region.BROWS
    light = 1 + slope * np.linspace(1, -1, SIDE)[None, :, None] + 0.04 * np.sin(np.arange(SIDE) / 7)[:, None, None]
    image = np.array(colour) * light
    image[regions == Region.BROWS] *= 0.25
    image[regions == Region.BACKGROUND] = 64
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), regions


def run(swapped: UInt8, target: UInt8, regions: UInt8, target_regions: UInt8 | None = None, config: GuidedConfig = CONFIG) -> UInt8:
    inputs: Inputs = {
        "swapped": swapped,
        "swapped_regions": regions,
        "mask": np.where(regions > 0, 255, 0).astype(np.uint8),
        "target_face": target,
        "target_regions": regions if target_regions is None else target_regions,
    }
    outputs: Outputs = recolor(inputs, config)
    assert set(outputs) == {"recolored"}
    return np.asarray(outputs["recolored"], np.uint8)


def test_the_targets_own_face_is_left_nearly_as_it_is() -> None:
    image, regions = face((190, 140, 120), slope=0.15)
    assert np.abs(run(image, image, regions).astype(int) - image).mean() < 1.5


@pytest.mark.parametrize(("source", "target"), [((130, 95, 80), (215, 170, 150)), ((215, 170, 150), (110, 75, 60))])
def test_skin_takes_the_targets_tone(source: tuple[int, int, int], target: tuple[int, int, int]) -> None:
    (swapped, regions), (wanted, _) = face(source), face(target)
    skin = regions == Region.SKIN
    recolored = run(swapped, wanted, regions)
    assert np.abs(recolored[skin].mean(axis=0) - wanted[skin].mean(axis=0)).max() < 4
    brows = regions == Region.BROWS
    assert recolored[brows].mean() < 0.5 * recolored[skin].mean()  # brows stay brows
    assert np.array_equal(recolored[regions == 0], swapped[regions == 0])


def test_light_comes_from_the_targets_side() -> None:
    (swapped, regions), (wanted, _) = face((180, 140, 120), slope=-0.25), face((180, 140, 120), slope=0.25)
    recolored = run(swapped, wanted, regions).astype(float)
    left, right = (recolored[60:100, columns].mean() for columns in (slice(30, 45), slice(83, 98)))
    assert swapped[60:100, 30:45].mean() < swapped[60:100, 83:98].mean()
    assert left > 1.1 * right


def test_a_beard_stays_on_clean_targets_skin() -> None:
    (swapped, regions), (wanted, _) = face((200, 150, 130)), face((200, 150, 130))
    swapped[90:112, 40:88] = swapped[90:112, 40:88] // 3
    recolored = run(swapped, wanted, regions).astype(float)
    assert recolored[95:110, 45:83].mean() < 0.6 * recolored[60:80, 45:83].mean()


@pytest.mark.parametrize("missing", ["swapped", "target"])
def test_without_skin_on_one_side_nothing_changes(missing: str) -> None:
    (swapped, regions), (wanted, target_regions) = face((110, 75, 60)), face((215, 170, 150))
    bare = regions if missing == "swapped" else target_regions.copy()
    bare[bare == Region.SKIN] = Region.BROWS
    recolored = run(swapped, wanted, *((bare, target_regions.copy()) if missing == "swapped" else (regions, bare)))
    assert np.abs(recolored.astype(int) - swapped).max() <= 1


def test_gain_is_limited_and_highlights_are_not_clipped_away() -> None:
    (swapped, regions), (wanted, _) = face((20, 12, 10)), face((250, 240, 235))
    recolored = run(swapped, wanted, regions, config=GuidedConfig(max_gain=2.0))
    skin = regions == Region.SKIN
    assert recolored[skin].mean() < 1.8 * swapped[skin].mean()  # twice the light is at most 1.4 to 1.8 times the byte
    bright, _ = face((230, 220, 210))
    assert (run(bright, wanted, regions)[skin] < 255).mean() > 0.9


def test_teeth_become_no_brighter_than_the_targets() -> None:
    (swapped, regions), (wanted, _) = face((110, 75, 60)), face((215, 170, 150))
    regions[90:98, 50:78] = Region.MOUTH
    swapped[90:98, 50:78], wanted[90:98, 50:78] = 200, 210
    recolored = run(swapped, wanted, regions)[92:96, 56:72].astype(int)
    assert np.abs(recolored - 210).max() <= 3
    hidden = np.where(regions == Region.MOUTH, Region.LIPS, regions).astype(np.uint8)  # a closed target mouth
    recolored = run(swapped, wanted, regions, hidden)[92:96, 56:72].astype(int)
    assert 200 < recolored.mean() < 253 and np.ptp(recolored.mean(axis=(0, 1))) < 20


def test_empty_mask_and_determinism() -> None:
    (swapped, regions), (wanted, _) = face((110, 75, 60)), face((215, 170, 150))
    assert np.array_equal(run(swapped, wanted, regions), run(swapped, wanted, regions))
    assert np.array_equal(run(swapped, wanted, np.zeros_like(regions), regions), swapped)


def test_guidance_attends_to_what_is_near() -> None:
    target = np.array([[0.1, 0.1, 0.1], [0.4, 0.4, 0.4]], np.float32)
    at = np.array([[0.2, 0.5], [0.8, 0.5]], np.float32)
    source = np.array([[0.2, 0.2, 0.2], [0.2, 0.2, 0.2]], np.float32)
    guidance, weight = colour_guidance(source, target, at, at, GuidedConfig(alike=100.0))
    assert np.allclose(np.exp(guidance), target, rtol=1e-3)
    assert guidance.shape == (2, 3) and (weight > 0.99).all()


def test_backends() -> None:
    assert list(BACKENDS) == ["guided", "none"]
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    (result,) = BACKENDS["none"].run(None, BACKENDS["none"].config(), [{"swapped": image}])
    assert isinstance(result, dict) and np.array_equal(result["recolored"], image)
