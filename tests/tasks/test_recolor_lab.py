"""Stage `recolor=lab`: skin tone by robust statistics, and the faults of colour transfer that it must not have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from e4s_models.regions import Region
from tasks.recolor_lab import BACKENDS, STAGE, LabConfig, robust_statistics, to_lab
from tasks.stage import UInt8

CONFIG = LabConfig()
SIDE = 256
PALE, DARK, RED = (224, 184, 164), (120, 80, 60), (200, 110, 80)


def skin_image(colour: tuple[int, int, int], noise: int = 6, seed: int = 0) -> UInt8:
    """Skin of one colour with noise of its lightness."""
    rng = np.random.default_rng(seed)
    grain = rng.integers(-noise, noise + 1, (SIDE, SIDE, 1))
    return np.clip(np.array(colour) + grain, 0, 255).astype(np.uint8)


def face_inputs(swapped: UInt8, target: UInt8, *, beside: Any = None, **changes: Any) -> dict[str, Any]:
    """A square of skin; the target's picture has other colours beside it, as a photograph has."""
    target = target.copy()
    target[:32] = np.random.default_rng(2).integers(0, 256, (32, SIDE, 3)) if beside is None else beside
    regions = np.full((SIDE, SIDE), Region.BACKGROUND, np.uint8)
    regions[32:224, 32:224] = Region.SKIN
    mask = np.where(regions == Region.SKIN, 255, 0).astype(np.uint8)
    inputs = {
        "swapped": swapped,
        "swapped_regions": regions.copy(),
        "target_face": target,
        "target_regions": regions.copy(),
        "mask": mask,
    }
    return inputs | changes


def run(inputs: dict[str, Any], config: LabConfig = CONFIG) -> UInt8:
    (result,) = STAGE.run(None, config, [inputs])
    assert isinstance(result, dict)
    recolored: UInt8 = result["recolored"]
    return recolored


def centre(image: UInt8) -> Any:
    return np.median(image[40:216, 40:216].reshape(-1, 3), axis=0)


def test_declaration() -> None:
    assert BACKENDS == {"lab": STAGE}
    with pytest.raises(ValueError, match="side must be 8 to 512"):
        LabConfig(side=4)


@pytest.mark.parametrize(("own", "target"), [(PALE, DARK), (DARK, PALE), (RED, PALE)])
def test_skin_takes_the_median_of_the_targets_skin_and_nothing_else_changes(own: Any, target: Any) -> None:
    inputs = face_inputs(skin_image(own), skin_image(target, seed=1))
    result = run(inputs)
    assert np.abs(centre(result) - target).max() <= 4
    outside = inputs["mask"] == 0
    assert (result[outside] == inputs["swapped"][outside]).all()


def test_an_occluder_does_not_vote() -> None:
    target = skin_image(PALE, seed=1)
    target[32:224, 150:224] = (20, 160, 40)  # something green before two fifths of the face, labelled as skin
    assert np.abs(centre(run(face_inputs(skin_image(DARK), target))[:, :140]) - PALE).max() <= 12


def test_dark_brows_of_red_skin_do_not_turn_blue_on_pale_skin() -> None:
    swapped = skin_image(RED)
    swapped[60:70, 60:120] = (28, 20, 18)
    inputs = face_inputs(swapped, skin_image(PALE, seed=1))
    inputs["swapped_regions"][60:70, 60:120] = Region.BROWS
    brow = to_lab(run(inputs))[63:67, 70:110]
    assert brow[..., 2].min() > -8  # b: below 0 is blue


def test_white_highlights_of_saturated_skin_do_not_turn_blue_or_clip() -> None:
    swapped = skin_image(RED)
    swapped[100:110, 100:110] = (250, 246, 240)
    result = run(face_inputs(swapped, skin_image(PALE, seed=1)))[102:108, 102:108]
    assert to_lab(result)[..., 2].min() > -6
    assert (result < 255).any(axis=-1).all()


def test_a_gray_target_makes_a_gray_result_and_a_toned_one_a_toned_result() -> None:
    gray = skin_image((150, 150, 150), noise=30, seed=1)
    result = run(face_inputs(skin_image(RED), gray, beside=gray[:32]))[40:216, 40:216].astype(int)
    assert np.ptp(result, axis=-1).max() <= 3
    sepia = np.clip(gray * np.array([1.1, 0.95, 0.75]), 0, 255).astype(np.uint8)
    toned = centre(run(face_inputs(skin_image(RED), sepia, beside=sepia[:32])))
    assert np.abs(toned - np.array([165, 142, 112])).max() <= 8


def test_a_coloured_target_gives_a_gray_source_its_skin_tone() -> None:
    result = run(face_inputs(skin_image((140, 140, 140), noise=20), skin_image(PALE, seed=1)))
    assert np.abs(centre(result) - PALE).max() <= 6


def test_dark_features_are_neither_crushed_on_dark_skin_nor_gray_on_pale_skin() -> None:
    for own, target, low, high in ((PALE, DARK, 3, 20), (DARK, PALE, 15, 42)):
        swapped = skin_image(own)
        swapped[60:70, 60:120] = (40, 30, 26)  # L 13
        inputs = face_inputs(swapped, skin_image(target, seed=1))
        inputs["swapped_regions"][60:70, 60:120] = Region.BROWS
        assert low < to_lab(run(inputs))[63:67, 70:110, 0].mean() < high


def test_lips_keep_their_difference_to_the_skin() -> None:
    swapped = skin_image(PALE)
    swapped[160:180, 100:156] = (190, 90, 100)
    inputs = face_inputs(swapped, skin_image(DARK, seed=1))
    inputs["swapped_regions"][160:180, 100:156] = Region.LIPS
    lab = to_lab(run(inputs))
    redder = lab[168:172, 110:146, 1].mean() - lab[100:120, 100:120, 1].mean()
    assert redder > 15
    assert 8 < lab[168:172, 110:146, 0].mean() < lab[100:120, 100:120, 0].mean()


def test_a_grey_moustache_of_a_face_in_red_light_does_not_turn_cyan() -> None:
    swapped = skin_image(RED)
    inputs = face_inputs(swapped, skin_image(PALE))
    swapped[150:170, 96:160] = 120
    inputs["swapped_regions"][150:170, 96:160] = Region.LIPS
    lab = to_lab(STAGE.run(None, CONFIG, [inputs])[0]["recolored"])[152:168, 100:156]
    assert np.median(lab[..., 1:], axis=(0, 1)) == pytest.approx([0, 0], abs=2.5)


def test_light_from_the_targets_side_is_followed_within_its_limit() -> None:
    ramp = np.linspace(-50, 50, SIDE)[None, :, None]
    target = np.clip(skin_image((170, 130, 110), seed=1) + ramp, 0, 255).astype(np.uint8)
    lab = to_lab(run(face_inputs(skin_image(PALE), target)))[..., 0]
    left, right = lab[60:200, 50:70].mean(), lab[60:200, 186:206].mean()
    assert 8 < right - left < 30


def test_too_little_skin_leaves_the_colours_as_they_are() -> None:
    inputs = face_inputs(skin_image(PALE), skin_image(DARK))
    inputs["target_regions"][:] = Region.HAIR
    assert np.abs(run(inputs).astype(int) - inputs["swapped"]).max() <= 1


def test_light_given_by_another_stage_stands_for_the_targets_own() -> None:
    from tasks.light import skin_cells

    inputs = face_inputs(skin_image(PALE), skin_image(DARK, seed=1))
    cells = skin_cells(inputs["target_face"], inputs["target_regions"], CONFIG.side)
    assert (run(inputs | {"target_light": cells}) == run(inputs)).all()
    (error,) = STAGE.run(None, LabConfig(side=32), [inputs | {"target_light": cells}])
    assert "recolor.side is 32, light.side 64" in str(error)


def test_outliers_do_not_move_the_statistics() -> None:
    values = np.concatenate([np.full((90, 3), 50.0), np.full((30, 3), 90.0)]).astype(np.float32)
    middle, spread, kept = robust_statistics(values, 3.0)
    assert middle.tolist() == [50, 50, 50]
    assert spread[0] == pytest.approx(1.5)
    assert kept.sum() == 90
