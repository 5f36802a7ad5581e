from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from e4s_models.regions import Region
from tasks.stage import ItemError, Outputs, UInt8
from tasks.swap import BACKENDS, STAGE, CompositeConfig, composite, recompose_mask

DATA = Path(__file__).parents[1] / "data"
B, L, W, E, H, N, S, A, K, M, G, R = range(12)  # background, lips, brows, eyes, hair, nose, skin, ears, neck, mouth, glasses, ear rings
EXACT = CompositeConfig(round_corners=1e-6, hair_margin=0, rim_margin=0)  # no margins: every label counts


def labels(rows: list[list[int]]) -> UInt8:
    return np.array(rows, np.uint8)


def run(driven: UInt8, target: UInt8, config: CompositeConfig = EXACT) -> Outputs:
    pictures = {name: np.full((*driven.shape, 3), value, np.uint8) for name, value in (("driven", 200), ("target_face", 100))}
    return composite({**pictures, "driven_regions": driven, "target_regions": target}, config)


@pytest.mark.parametrize("case", [0, 1])
def test_recomposition_equals_the_published_one(case: int) -> None:
    with np.load(DATA / f"mask_swap_case{case}.npz") as data:
        driven, target, expected, hole = (data[f"{name}_u8"] for name in ("driven_label", "target_label", "swapped_label", "hole"))
    swapped, mismatch = recompose_mask(driven, target)
    assert swapped.dtype == mismatch.dtype == np.uint8
    assert np.array_equal(swapped, expected)
    assert np.array_equal(mismatch, hole)


def test_painting_order_on_one_row() -> None:
    #                 hat over skin  fringe  glasses  leftover  driven chin over neck   driven hair on a target brow
    driven = labels([[S, S, S, E, H, S, H], [S, S, S, S, B, B, B]])
    target = labels([[B, H, G, S, S, K, W], [S, S, S, S, S, K, S]])
    swapped, _ = recompose_mask(driven, target)
    assert swapped[0].tolist() == [B, H, G, E, S, S, W]
    assert swapped[1].tolist() == [S, S, S, S, S, K, S]


def test_ears_neck_and_rings_are_the_targets() -> None:
    swapped, _ = recompose_mask(labels([[A, K, R, H]]), labels([[B, A, K, R]]))
    assert swapped.tolist() == [[B, A, K, R]]


def test_a_region_that_is_not_driven_keeps_the_targets_shape() -> None:
    driven, target = labels([[L, S, S]]), labels([[S, L, S]])
    assert recompose_mask(driven, target)[0].tolist() == [[L, S, S]]
    assert recompose_mask(driven, target, driven=(Region.SKIN,))[0].tolist() == [[S, L, S]]
    assert recompose_mask(driven, target, driven=(Region.LIPS,))[0].tolist() == [[L, S, S]]
    only_lips = CompositeConfig(driven_regions=("lips",), round_corners=1e-6, hair_margin=0, rim_margin=0)
    assert run(driven, target, only_lips)["mask"][0].tolist() == [255, 255, 0]  # no second mouth


def test_hole_rules() -> None:
    driven = labels([[H, S], [E, S], [H, S], [B, S]])
    target = labels([[S, S], [S, S], [S, S], [S, G]])
    assert recompose_mask(driven, target)[1].tolist() == [[0, 0], [0, 0], [1, 0], [1, 0]]
    assert recompose_mask(driven, target, hole="eq17")[1].tolist() == [[1, 0], [0, 0], [1, 0], [1, 0]]
    hidden = np.where(driven == E, G, driven).astype(np.uint8)  # eyes behind glasses: the glasses' row counts
    assert recompose_mask(hidden, target)[1].tolist() == [[0, 0], [0, 0], [1, 0], [1, 0]]


def test_maps_of_different_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 3\).*aligned"):
        recompose_mask(labels([[S, S]]), labels([[S, S, S]]))


def test_composite_takes_driven_pixels_inside_and_target_pixels_elsewhere() -> None:
    out = run(labels([[S, E, H, S, B, S]]), labels([[S, S, S, H, S, K]]))
    assert out["swapped"][0, :, 0].tolist() == [200, 200, 100, 100, 100, 200]
    assert out["mask"][0].tolist() == [255, 255, 0, 0, 0, 255]
    assert out["hole"][0].tolist() == [0, 0, 255, 0, 255, 0]
    assert set(out) == set(STAGE.writes)


def test_driven_glasses_come_along_unless_the_target_wears_some() -> None:
    out = run(labels([[S, G, S]]), labels([[S, E, S]]))
    assert out["mask"][0].tolist() == [255, 255, 255] and out["swapped_regions"][0, 1] == G
    assert run(
        labels([[S, G, S]]), labels([[S, E, S]]), CompositeConfig(round_corners=1e-6, hair_margin=0, rim_margin=0, driven_glasses=False)
    )["mask"][0].tolist() == [255, 0, 255]
    assert run(labels([[S, G, S, S]]), labels([[S, E, S, G]]))["mask"][0].tolist() == [255, 0, 255, 0]


@pytest.mark.parametrize(("lens", "shown"), [(100, True), (30, False)])
def test_driven_eyes_show_behind_clear_lenses_only(lens: int, shown: bool) -> None:
    driven, target = np.full((100, 100), S, np.uint8), np.full((100, 100), S, np.uint8)
    driven[48:52, 40:60] = E
    target[30:70, 20:80] = G
    face = np.where((target == G)[..., None], lens, 120).astype(np.uint8).repeat(3, axis=2)
    out = composite(
        {"driven": np.full_like(face, 200), "target_face": face, "driven_regions": driven, "target_regions": target}, CompositeConfig()
    )
    assert (out["mask"][50, 50] == 255) == shown
    assert (out["swapped_regions"][50, 50] == E) == shown
    assert (out["mask"][target == G].mean() < 130) and not out["mask"][31, 20:80].any()  # the frame stays the target's


def test_a_thin_dark_bridge_between_the_lenses_stays() -> None:
    driven, target = np.full((200, 200), S, np.uint8), np.full((200, 200), S, np.uint8)
    target[90:110, 50:90] = target[90:110, 105:150] = G
    face = np.full((200, 200, 3), 180, np.uint8)
    face[99:101, 90:105] = 40
    out = composite(
        {"driven": np.full_like(face, 200), "target_face": face, "driven_regions": driven, "target_regions": target}, CompositeConfig()
    )
    assert not out["mask"][99:101, 90:105].any()
    assert out["mask"][150, 97] == 255


def test_strands_and_dark_rim_are_left_to_the_target() -> None:
    driven, target = np.full((200, 200), S, np.uint8), np.full((200, 200), S, np.uint8)
    driven[:50] = H
    driven[:, 180:] = B
    driven[60, 100] = E
    out = run(driven, target, CompositeConfig())
    assert not out["mask"][50:52, :170].any() and out["mask"][60, 100] == 255  # hair_margin 0.015: 3 px
    assert out["mask"][100, 178] == 0 and out["hole"][100, 178] == 255 and out["mask"][100, 170] == 255


def test_a_driven_picture_without_a_face_is_a_bad_item() -> None:
    config = STAGE.config()
    inputs = {name: np.zeros((8, 8, 3), np.uint8) for name in ("driven", "target_face")}
    inputs |= {name: np.zeros((8, 8), np.uint8) for name in ("driven_regions", "target_regions")}
    (result,) = STAGE.run(None, config, [inputs])
    assert isinstance(result, ItemError) and "no face region" in str(result)


def test_config_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"unknown regions \['beard'\].*brows"):
        CompositeConfig(driven_regions=("lips", "beard"))
    with pytest.raises(ValueError, match="published or eq17, got 'all'"):
        CompositeConfig(hole="all")  # type: ignore[arg-type]


def test_composite_is_the_default_backend() -> None:
    assert next(iter(BACKENDS)) == "composite"
