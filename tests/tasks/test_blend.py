from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from e4s_models.regions import Region
from tasks.blend import STAGE, BlendConfig, multiband_blend, soften

DATA = Path(__file__).parents[1] / "data"


def test_multiband_equals_the_published_one() -> None:
    with np.load(DATA / "blend_case0.npz") as case:
        full, other = (cv2.resize(case[name], (1024, 1024), interpolation=cv2.INTER_CUBIC) for name in ("full_u8_256", "other_u8_256"))
        mask, sub, crop = case["mask_u8"], case["blended_sub_u8"], case["blended_crop_u8"]
    blended = multiband_blend(full, other, mask, levels=10)
    assert np.abs(blended[::4, ::4].astype(int) - sub).max() <= 1
    assert np.abs(blended[400:528, 400:528].astype(int) - crop).max() <= 1
    assert np.abs(multiband_blend(full, other, mask, levels=6)[::4, ::4].astype(int) - sub).max() > 1


@pytest.mark.parametrize("shape", [(64, 64), (37, 50)])
def test_whole_and_empty_masks_give_the_pictures_back(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    full, other = (rng.integers(0, 256, (*shape, 3), np.uint8) for _ in range(2))
    assert np.array_equal(multiband_blend(full, other, np.ones(shape)), full)
    assert np.array_equal(multiband_blend(full, other, np.zeros(shape)), other)


def test_one_level_is_alpha_blending() -> None:
    full, other = np.full((2, 2, 3), 200, np.uint8), np.full((2, 2, 3), 100, np.uint8)
    assert multiband_blend(full, other, np.array([[0, 0.25], [0.5, 1]]), levels=1)[..., 0].tolist() == [[100, 125], [150, 200]]


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"agree in size, got \(4, 4, 3\), \(4, 4, 3\) and \(4, 5\)"):
        multiband_blend(np.zeros((4, 4, 3)), np.zeros((4, 4, 3)), np.zeros((4, 5)))


def test_ramp_is_inside_and_wide_only_towards_skin() -> None:
    side = 200
    config = BlendConfig(feather_skin=0.1, feather=0.01, feather_hole=0.0)
    mask, regions, hole = (np.zeros((side, side), np.uint8) for _ in range(3))
    mask[50:150, 50:150] = 255
    regions[:50] = Region.SKIN  # above: skin; left and right: background; below: the mismatch region
    hole[150:] = 255
    ramp = soften(mask, regions, hole, config)
    assert ramp.dtype == np.float32 and ramp.min() == 0 and ramp.max() == 1
    assert not ramp[(mask == 0) & (hole == 0)].any()
    assert 0 < ramp[58, 100] < 1 and ramp[80, 100] == 1  # 20 px
    assert ramp[105, 54] == 1 and (ramp[148:160, 100] == 1).all()
    soft = soften(mask, regions, hole, BlendConfig(feather_hole=0.02))
    assert not soft[150:].any() and 0 < soft[148, 100] < 1


def test_a_mask_without_an_edge_stays_whole() -> None:
    full = np.full((8, 8), 255, np.uint8)
    assert (soften(full, full * 0, full * 0, BlendConfig()) == 1).all()


def test_stage_leaves_what_is_far_and_takes_what_is_inside() -> None:
    shape = (256, 256)
    mask = np.zeros(shape, np.uint8)
    mask[96:160, 96:160] = 255
    inputs = {
        "face": np.full((*shape, 3), 200, np.uint8),
        "target_face": np.full((*shape, 3), 100, np.uint8),
        "mask": mask,
        "swapped_regions": np.zeros(shape, np.uint8),
        "hole": np.zeros(shape, np.uint8),
    }
    config = BlendConfig()
    first, again = (STAGE.run(None, config, [inputs])[0] for _ in range(2))
    assert isinstance(first, dict) and isinstance(again, dict)
    blended = first["blended"]
    assert (blended[:40] == 100).all() and (blended[120:136, 120:136] >= 195).all()
    assert (np.diff(blended[128, :128, 0].astype(int)) >= 0).all()  # no halo
    assert np.array_equal(blended, again["blended"])


def test_levels_must_be_positive() -> None:
    with pytest.raises(ValueError, match="1 to 10, got 0"):
        BlendConfig(levels=0)
