"""The stages that the published networks serve, on small networks: order, sizes, what may change, error paths."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import torch

from e4s_models.facevid2vid import FaceVid2Vid
from e4s_models.facevid2vid import FaceVid2VidConfig as NetworkSize
from e4s_models.gpen import Gpen
from e4s_models.inpaint_net import InpaintNet
from e4s_models.recolor_net import RecolorNet
from e4s_models.regions import NUM_REGIONS, Region
from e4s_models.rgi import RGI
from e4s_models.rgi_encoder import RegionEncoder
from e4s_models.stylegan2 import StyleGAN2
from tasks import encode_rgi, enhance, face_network, inpaint_network, recolor_network, reenact_network, swap_rgi
from tasks.stage import Inputs, ItemError, Outputs, Stage, UInt8

SIDE = 128


def run(stage: Stage, model: object, inputs: Inputs, config: object = None) -> Outputs:
    with torch.inference_mode():
        (result,) = stage.run(model, config or stage.config(), [inputs])
    assert not isinstance(result, ItemError), result
    assert result.keys() == stage.writes.keys()
    return result


def noise(seed: int, side: int = SIDE) -> UInt8:
    """A smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return np.asarray(cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC), np.uint8)


def face_map(chin: int = 110) -> UInt8:
    """Skin on rows 40 to `chin`, hair above, a band of eyes."""
    regions = np.zeros((SIDE, SIDE), np.uint8)
    regions[10:40, 20:108] = Region.HAIR
    regions[40:chin, 20:108] = Region.SKIN
    regions[48:64, 40:90] = Region.EYES
    return regions


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def small_rgi() -> RGI:
    encoder = RegionEncoder(widths=(16, 16, 16, 32, 32), depths=(1, 1, 1, 1), side=64)
    return RGI(encoder=encoder, generator=StyleGAN2(64, region_layers=7, max_width=16, code_dim=16)).eval().requires_grad_(False)


def test_fit_and_conversion_keep_pictures() -> None:
    face = noise(0)
    network = Gpen(side=32, widest=8, latent=16, mapping_layers=1)
    np.testing.assert_array_equal(face_network.to_picture(face_network.to_tensor(face, network)), face)
    assert face_network.fit(face, SIDE) is face
    assert face_network.fit(face, 32)[3, 5].tolist() == np.rint(face[12:16, 20:24].mean(axis=(0, 1)) - 1e-3).tolist()
    assert set(np.unique(face_network.fit_labels(face_map(), 50))) <= set(np.unique(face_map()))
    with pytest.raises(ValueError, match=r"expected shape \(S, S, 3\), got \(4, 5, 3\)"):
        face_network.to_tensor(np.zeros((4, 5, 3), np.uint8), network)


def test_soft_edge_is_one_inside_and_zero_far_outside() -> None:
    mask = np.zeros((1024, 1024), np.float32)
    mask[300:700, 300:700] = 1
    soft = face_network.soft_edge(mask)
    assert (soft[305:695, 305:695] == 1).all()
    assert not soft[:292].any() and not soft[708:].any()
    edge = soft[500, 290:312]
    assert (np.diff(edge) >= 0).all() and edge[0] == 0 and edge[-1] == 1 and ((edge > 0) & (edge < 1)).sum() >= 5
    assert not face_network.soft_edge(np.zeros((64, 64), np.float32)).any()


def test_reenacted_face_has_the_targets_pose_at_full_size() -> None:
    size = NetworkSize(
        keypoints=3, feature_channels=4, depth=4, width=8, residual_blocks=1, motion_width=8, motion_levels=2, pose_width=8, spade_hidden=8
    )
    reenactor = FaceVid2Vid(size).eval()
    reenactor.estimator.expression.weight.data *= 30
    seen: list[tuple[int, ...]] = []

    def restore(face: UInt8) -> UInt8:
        seen.append(face.shape)
        return np.ascontiguousarray(face[::-1])

    inputs = {"source_face": noise(0), "target_face": noise(1)}
    driven = run(reenact_network.STAGE, (reenactor, restore), inputs)
    plain = run(reenact_network.STAGE, (reenactor, lambda face: face), inputs)
    assert seen == [(256, 256, 3)]  # the network's own size, before it is enlarged
    assert driven["driven"].shape == (SIDE, SIDE, 3)
    assert (driven["visible"] == 255).all()
    assert np.abs(driven["driven"][::-1].astype(int) - plain["driven"]).max() <= 1
    other = run(reenact_network.STAGE, (reenactor, lambda face: face), inputs | {"target_face": noise(2)})
    assert (other["driven"] != plain["driven"]).any()
    with pytest.raises(ValueError, match="side must be a multiple of 128, got 200"):
        reenact_network.FaceVid2VidConfig(side=200)
    with pytest.raises(ValueError, match="enhance must be one of gpen, codeformer, none, got 'gfpgan'"):
        reenact_network.FaceVid2VidConfig(enhance="gfpgan")  # type: ignore[arg-type]


def test_styles_are_the_networks_and_zero_where_a_region_is_absent() -> None:
    network = small_rgi()
    styles = run(encode_rgi.STAGE, network.encoder, {"face": noise(0), "labels": face_map()})["styles"]
    assert (styles.shape, styles.dtype) == ((NUM_REGIONS, 80), np.float32)
    present = {int(region) for region in np.unique(face_map())}
    assert {region for region in range(NUM_REGIONS) if styles[region].any()} == present
    with torch.inference_mode():
        face = torch.from_numpy(noise(0)).permute(2, 0, 1)[None] / 127.5 - 1
        expected = network.style_vectors(face, torch.from_numpy(face_map())[None])[0]
    np.testing.assert_array_equal(styles, expected.numpy())


def test_exchange_of_styles_by_hand() -> None:
    """All but background, hair and ear rings, with the glasses of the paper's profile; a mouth that is closed stays the target's."""
    driven, target = np.full((NUM_REGIONS, 4), 2, np.float32), np.ones((NUM_REGIONS, 4), np.float32)
    names = ("lips", "brows", "eyes", "nose", "skin", "ears", "neck", "mouth", "glasses")
    config = swap_rgi.RGIConfig(driven_regions=names)
    assert swap_rgi.exchange_styles(driven, target, config)[:, 0].tolist() == [1, 2, 2, 2, 1, 2, 2, 2, 2, 2, 2, 1]
    driven[[Region.MOUTH, Region.NOSE]] = 0
    assert swap_rgi.exchange_styles(driven, target, config)[:, 0].tolist() == [1, 2, 2, 2, 1, 0, 2, 2, 2, 1, 2, 1]
    kept = swap_rgi.RGIConfig(driven_regions=names, absent=("mouth", "nose"))
    assert swap_rgi.exchange_styles(driven, target, kept)[:, 0].tolist() == [1, 2, 2, 2, 1, 1, 2, 2, 2, 1, 2, 1]
    with pytest.raises(ValueError, match=r"expected shape \(12, V\), got \(3, 4\)"):
        swap_rgi.exchange_styles(driven, target[:3], config)
    with pytest.raises(ValueError, match="unknown regions"):
        swap_rgi.RGIConfig(absent=("chin",))


def test_swap_generates_over_the_recomposed_mask_and_marks_the_mismatch() -> None:
    network = small_rgi()
    rng = np.random.default_rng(0)
    inputs = {
        "driven_styles": rng.standard_normal((NUM_REGIONS, 80)).astype(np.float32),
        "target_styles": rng.standard_normal((NUM_REGIONS, 80)).astype(np.float32),
        "driven_regions": face_map(chin=90),
        "target_regions": face_map(),
        "target_face": noise(1),
    }
    result = run(swap_rgi.STAGE, network, inputs)
    chin = np.zeros((SIDE, SIDE), bool)
    chin[90:110, 20:108] = True
    np.testing.assert_array_equal(result["hole"] > 0, chin)
    assert (result["swapped_regions"][chin] == Region.SKIN).all()
    np.testing.assert_array_equal(result["mask"] > 0, np.isin(face_map(), (Region.SKIN, Region.EYES)) & ~chin)
    styles = swap_rgi.exchange_styles(inputs["driven_styles"], inputs["target_styles"], swap_rgi.RGIConfig())
    with torch.inference_mode():
        codes = network.style_codes(torch.from_numpy(styles)[None])
        picture = network.generate(codes, torch.from_numpy(result["swapped_regions"])[None])
    np.testing.assert_array_equal(result["swapped"], face_network.fit(face_network.to_picture(picture), SIDE))
    (nobody,) = swap_rgi.STAGE.run(network, swap_rgi.RGIConfig(), [inputs | {"driven_regions": np.zeros((SIDE, SIDE), np.uint8)}])
    assert isinstance(nobody, ItemError)
    assert "no face region was found in the driven face" in str(nobody)


def test_smooth_paste_keeps_edges_and_what_is_no_face() -> None:
    """Flat skin takes 75 % of the recolored pixels, a step in brightness less: its two columns, spread over seven, are 41 % edge."""
    swapped = np.full((256, 256, 3), 100, np.uint8)
    swapped[:, 128:] = 200
    regions = np.zeros((256, 256), np.uint8)
    regions[40:] = Region.SKIN
    result = recolor_network.paste_smooth(swapped, np.full_like(swapped, 60), regions, 0.75)
    assert (result[100, 20] == 70).all() and (result[100, 230] == 95).all()
    assert recolor_network.edges(swapped)[100, 127] == pytest.approx(0.41, abs=0.02)
    np.testing.assert_allclose(result[100, 127], 100 - 0.75 * (1 - 0.41) * 40, atol=1)
    np.testing.assert_array_equal(result[:35], swapped[:35])
    assert not recolor_network.edges(swapped)[:, :124].any()


def test_recolor_asks_the_network_with_what_the_parser_sees() -> None:
    network = RecolorNet(width=4).eval().requires_grad_(False)
    inputs = {
        "swapped": noise(0),
        "target_face": noise(1),
        "swapped_regions": face_map(),
        "seen_regions": face_map(chin=100),
        "target_regions": face_map(),
    }
    model = (network, lambda face: face)
    result = run(recolor_network.STAGE, model, inputs)["recolored"]
    assert result.shape == (SIDE, SIDE, 3)
    np.testing.assert_array_equal(result, run(recolor_network.STAGE, model, inputs)["recolored"])
    assert (result != run(recolor_network.STAGE, model, inputs | {"seen_regions": face_map(chin=60)})["recolored"]).any()
    kept = run(recolor_network.STAGE, model, inputs, recolor_network.NetworkConfig(amount=0))["recolored"]
    np.testing.assert_array_equal(kept, inputs["swapped"])
    with pytest.raises(ValueError, match=r"amount must be in 0\.\.1, got 2"):
        recolor_network.NetworkConfig(amount=2)


def test_only_the_hole_and_its_soft_edge_are_painted() -> None:
    network = InpaintNet(channels=(8, 8, 8, 8, 16), code_dim=16).eval().requires_grad_(False)
    asked: list[float] = []

    def fill(faces: torch.Tensor, holes: torch.Tensor) -> torch.Tensor:
        asked.append(float(holes.mean()))
        return torch.full_like(faces, -1)

    network.fill = fill  # type: ignore[method-assign]
    hole, mask = np.zeros((512, 512), np.uint8), np.zeros((512, 512), np.uint8)
    hole[200:300, 200:300], mask[100:200, 100:400] = 255, 255
    inputs: dict[str, Any] = {"blended": noise(0, 512) // 2 + 100, "hole": hole, "mask": mask}
    result = run(inpaint_network.STAGE, (network, lambda face: face), inputs)
    assert asked[0] == pytest.approx(51**2 / 256**2, rel=0.05)  # the area ratio, of the hole grown by a pixel
    assert not result["inpainted"][hole > 0].any()
    reach = np.zeros((512, 512), bool)
    reach[192:308, 192:308] = True
    np.testing.assert_array_equal(result["inpainted"][~reach], inputs["blended"][~reach])
    changed = (result["inpainted"] != inputs["blended"]).any(axis=2)
    np.testing.assert_array_equal(result["mask"] > 0, changed | (hole > 0) | (mask > 0))
    nothing = run(inpaint_network.STAGE, (network, lambda face: face), inputs | {"hole": np.zeros_like(hole)})
    np.testing.assert_array_equal(nothing["inpainted"], inputs["blended"])
    np.testing.assert_array_equal(nothing["mask"], mask)
    assert len(asked) == 1


def test_the_painted_part_comes_from_the_network() -> None:
    network = InpaintNet(channels=(8, 8, 8, 8, 16), code_dim=16).eval().requires_grad_(False)
    hole = np.zeros((256, 256), np.uint8)
    hole[100:150, 100:150] = 255
    blended = noise(0, 256)
    config = inpaint_network.NetworkConfig(grow_hole=0, grow_paste=0)
    inputs = {"blended": blended, "hole": hole, "mask": hole}
    result = run(inpaint_network.STAGE, (network, lambda face: face), inputs, config)["inpainted"]
    with torch.inference_mode():
        face, holes = torch.from_numpy(blended).permute(2, 0, 1)[None] / 127.5 - 1, torch.from_numpy(hole > 0)[None, None].float()
        painted = face_network.to_picture(network.fill(face, holes))
    np.testing.assert_array_equal(result[105:145, 105:145], painted[105:145, 105:145])


@pytest.mark.parametrize("backend", ["gpen", "codeformer"])
def test_enhance_mixes_the_restored_face_in(backend: str) -> None:
    stage, face = enhance.BACKENDS[backend], noise(0)

    def restore(face: UInt8) -> UInt8:
        return np.full((64, 64, 3), 40, np.uint8)

    assert (run(stage, restore, {"face": face})["enhanced"] == 40).all()
    half = run(stage, restore, {"face": face}, stage.config(amount=0.5))["enhanced"]
    assert np.abs(half.astype(float) - (face * 0.5 + 20)).max() <= 0.5
    assert stage.weights(stage.config()) == (backend,)
    with pytest.raises(ValueError, match=r"amount must be in 0\.\.1, got 3"):
        stage.config(amount=3)
