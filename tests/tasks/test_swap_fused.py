"""Stage `swap=fused`: what is trusted, how bands are joined, what replaces what is foreign to the skin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from e4s_models.regions import Region
from tasks.stage import UInt8
from tasks.swap_fused import (
    BACKENDS,
    STAGE,
    FusedConfig,
    band_shares,
    continue_skin,
    describe_limits,
    join_bands,
    trust_driven,
)

CONFIG = FusedConfig()
SIDE = 128


def gray(level: int) -> UInt8:
    return np.full((SIDE, SIDE, 3), level, np.uint8)


def face_inputs(**changes: Any) -> dict[str, Any]:
    """A face that fills the picture's middle and is seen everywhere."""
    regions = np.full((SIDE, SIDE), Region.BACKGROUND, np.uint8)
    regions[16:112, 16:112] = Region.SKIN
    inputs = {"driven_regions": regions, "visible": np.full((SIDE, SIDE), 255, np.uint8), "turned": np.array([0.0], np.float32)}
    return inputs | changes


def test_declaration() -> None:
    assert BACKENDS == {"fused": STAGE}
    assert {"trust", "facts", "swapped", "mask"} <= STAGE.writes.keys()


def test_bad_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="levels must be 1 to 8, got 9"):
        FusedConfig(levels=9)


def test_a_source_at_full_resolution_gives_all_bands_and_a_small_one_only_coarse_ones() -> None:
    assert band_shares(1.0, 5, CONFIG.sharp) == [1, 1, 1, 1, 1]
    shares = band_shares(0.1, 5, CONFIG.sharp)  # 90 px of face in 1024
    assert shares[:3] == [0, 0, 0]
    assert 0 < shares[3] < 1
    assert shares[4] == 1


def test_bands_of_full_trust_are_the_driven_face_and_of_none_the_generated() -> None:
    rng = np.random.default_rng(0)
    driven, generated = (rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for _ in range(2))
    for trust, expected in ((1, driven), (0, generated)):
        weight = np.full((SIDE, SIDE), trust, np.float32)
        joined = join_bands(driven, generated.astype(np.float32), weight, [1.0] * 5)
        assert np.abs(joined.astype(int) - expected).max() <= 1


def test_fine_bands_come_from_the_generator_where_the_source_is_small() -> None:
    pattern = gray(100)
    pattern[:, ::2] += 60  # as fine as can be
    weight = np.ones((SIDE, SIDE), np.float32)
    joined = join_bands(gray(150), pattern.astype(np.float32), weight, [0.0, 0.0, 1.0, 1.0, 1.0])
    middle = joined[40:80, 40:80].astype(int)
    assert abs(middle.mean() - 150) < 3  # the driven face's colour
    assert np.abs(np.diff(middle[..., 0], axis=1)).mean() > 30  # the generator's texture


def test_trust_ends_before_the_border_of_labels_mask_and_visibility() -> None:
    mask = np.ones((SIDE, SIDE), np.bool_)
    trust = trust_driven(face_inputs(), mask, CONFIG)
    assert trust[64, 64] == 1
    assert trust[15, 64] == 0 < trust[16, 64] < trust[18, 64]
    mask[:, :64] = False
    visible = np.full((SIDE, SIDE), 255, np.uint8)
    visible[90:] = 0
    trust = trust_driven(face_inputs(visible=visible), mask, CONFIG)
    assert trust[64, 40] == 0 == trust[100, 80]
    assert trust[64, 90] == 1


def test_regions_that_are_not_driven_and_glasses_are_not_trusted() -> None:
    inputs = face_inputs()
    inputs["driven_regions"][40:60, 40:90] = Region.GLASSES
    inputs["visible"][40:60, 40:90] = 0
    mask = np.ones((SIDE, SIDE), np.bool_)
    assert trust_driven(inputs, mask, CONFIG)[50, 64] == 0
    assert trust_driven(inputs, mask, FusedConfig(keep_source_glasses=True))[50, 64] == 1
    inputs = face_inputs()
    inputs["driven_regions"][80:90, 50:80] = Region.LIPS
    without_lips = tuple(name for name in CONFIG.driven_regions if name != "lips")
    assert trust_driven(inputs, mask, FusedConfig(driven_regions=without_lips))[85, 64] == 0


def test_heads_turned_far_from_each_other_are_left_to_the_generator() -> None:
    mask = np.ones((SIDE, SIDE), np.bool_)
    assert trust_driven(face_inputs(turned=np.array([60.0], np.float32)), mask, CONFIG).max() == 0
    assert trust_driven(face_inputs(turned=np.array([30.0], np.float32)), mask, CONFIG).max() == 1


def test_generated_skin_takes_the_colour_of_the_trusted_skin() -> None:
    trust = np.zeros((SIDE, SIDE), np.float32)
    trust[:, :64] = 1
    skin = np.ones((SIDE, SIDE), np.bool_)
    fitted = continue_skin(gray(150), gray(130), trust, skin, CONFIG)
    assert np.abs(fitted - 150).max() < 1.5


def test_a_lock_of_hair_on_the_generated_skin_is_replaced_and_one_in_the_hair_stays() -> None:
    trust = np.zeros((SIDE, SIDE), np.float32)
    trust[64:] = 1
    generated = gray(150)
    generated[20:40, 20:100] = 10  # far darker than the skin
    skin = np.ones((SIDE, SIDE), np.bool_)
    fitted = continue_skin(gray(150), generated, trust, skin, CONFIG)
    assert np.abs(fitted[28:32, 40:80] - 150).max() < 3
    skin[:50] = False
    assert continue_skin(gray(150), generated, trust, skin, CONFIG)[30, 60].max() < 60


def test_background_in_the_skins_light_is_replaced_by_skin() -> None:
    trust = np.zeros((SIDE, SIDE), np.float32)
    trust[:, :80] = 1
    own = np.full((SIDE, SIDE, 3), (225, 180, 160), np.uint8)
    generated = own.copy()
    generated[:, 100:] = (195, 195, 190)  # hardly darker than the skin, but grey
    fitted = continue_skin(own, generated, trust, np.ones((SIDE, SIDE), np.bool_), CONFIG)
    assert np.abs(fitted[:, 105:] - own[:, 105:]).max() < 12


def test_strands_on_generated_skin_are_cut_to_the_texture_of_the_sources_own() -> None:
    trust = np.zeros((SIDE, SIDE), np.float32)
    trust[64:] = 1
    own, generated = gray(150), gray(150)
    own[64:] += np.random.default_rng(0).integers(-5, 6, (64, SIDE, 1)).astype(np.uint8)
    generated[10:50, 20:100:10] = 110
    skin = np.ones((SIDE, SIDE), np.bool_)
    fitted = continue_skin(own, generated, trust, skin, CONFIG)
    assert 125 < fitted[12:48, 20:100:10].mean() < 150
    assert fitted[12:48, 25:100:10].mean() > 140
    assert np.ptp(continue_skin(own, generated, trust, skin, FusedConfig(texture=1000))[30]) > 30


def test_nothing_trusted_leaves_the_generated_face_as_it_is() -> None:
    generated = gray(90)
    fitted = continue_skin(gray(150), generated, np.zeros((SIDE, SIDE), np.float32), np.ones((SIDE, SIDE), np.bool_), CONFIG)
    assert (fitted == 90).all()


def test_limits_are_said_with_their_numbers() -> None:
    assert describe_limits(np.array([10, 400, 0.2], np.float32)) == ""
    said = describe_limits(np.array([51.3, 90, 0.76], np.float32))
    assert said == "heads turned by 51 degrees; source face 90 px; 76 % of the face generated"
