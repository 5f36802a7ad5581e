"""Face reenactment: the published layout, and its parts on examples small enough to check by hand."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from e4s_models.facevid2vid import PUBLISHED_FACEVID2VID, FaceVid2Vid, FaceVid2VidConfig, _SpectralConv, rename
from e4s_models.facevid2vid_motion import DenseMotion, HeadMotion, KeypointDetector, bins_to_degrees, head_rotation, place_keypoints
from e4s_models.published import Amplified, Array, amplified_limit, check_case

SMALL = FaceVid2VidConfig(
    keypoints=3,
    bins=5,
    feature_channels=4,
    depth=4,
    width=8,
    residual_blocks=1,
    motion_width=4,
    motion_levels=3,
    compressed=2,
    pose_width=4,
    spade_hidden=8,
)


@pytest.fixture
def reenactor() -> FaceVid2Vid:
    torch.manual_seed(0)
    small = FaceVid2Vid(SMALL).eval()
    small.estimator.expression.weight.data *= 30  # so that untrained weights tell faces apart
    return small


def faces(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_published_keys_fit() -> None:
    table = json.loads((Path(__file__).parents[1] / "data" / "facevid2vid.json").read_text())
    assert tuple(table) == PUBLISHED_FACEVID2VID.parts
    published = {f"{part}.{key}": tuple(shape) for part, entries in table.items() for key, shape in entries.items()}
    with torch.device("meta"):
        ours = {key: tuple(value.shape) for key, value in FaceVid2Vid().state_dict().items()}
    assert {rename(key): shape for key, shape in published.items()} == ours
    assert len(ours) == len(published)


def test_published_pose_heads_are_swapped() -> None:
    assert rename("he_estimator.fc_roll.bias") == "estimator.yaw.bias"
    assert rename("he_estimator.fc_yaw.bias") == "estimator.roll.bias"


def test_driven_faces(reenactor: FaceVid2Vid) -> None:
    sources, drivings = faces(2), faces(2, seed=2)
    with torch.inference_mode():
        driven = reenactor(sources, drivings)
        singles = torch.cat([reenactor(sources[i : i + 1], drivings[i : i + 1]) for i in range(2)])
        other = reenactor(sources, drivings.flip(0))
        shared = reenactor.drive(reenactor.describe(sources[:1]), drivings)
    assert driven.shape == (2, 3, 64, 64)
    assert driven.abs().max() <= 1
    torch.testing.assert_close(driven, singles, atol=1e-4, rtol=0)
    torch.testing.assert_close(shared[:1], singles[:1], atol=1e-4, rtol=0)
    assert (driven - other).abs().max() > 1e-3


def test_gradient_reaches_both_faces(reenactor: FaceVid2Vid) -> None:
    sources, drivings = faces(1).requires_grad_(), faces(1, seed=2).requires_grad_()
    reenactor(sources, drivings).square().sum().backward()
    for picture in (sources, drivings):
        assert picture.grad is not None
        assert picture.grad.isfinite().all()
        assert picture.grad.abs().max() > 0


def test_head_motion_shapes(reenactor: FaceVid2Vid) -> None:
    with torch.inference_mode():
        motion = reenactor.estimate(faces(2))
    assert [tuple(part.shape) for part in motion] == [(2, 5), (2, 5), (2, 5), (2, 3), (2, 3, 3)]


@pytest.mark.parametrize(
    ("sources", "drivings", "message"),
    [
        ((3, 64, 64), (3, 64, 64), r"expected shape \(B, 3, H, W\), got \(3, 64, 64\)"),
        ((2, 3, 64, 64), (1, 3, 64, 64), r"expected shape \(1, 3, 64, 64\), got \(2, 3, 64, 64\)"),
        ((1, 3, 64, 48), (1, 3, 64, 48), "multiples of 32 px, got 48 x 64"),
    ],
)
def test_refuses_other_shapes(reenactor: FaceVid2Vid, sources: tuple[int, ...], drivings: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reenactor(torch.zeros(sources), torch.zeros(drivings))


def test_refuses_sources_that_do_not_match_the_drivings(reenactor: FaceVid2Vid) -> None:
    source = reenactor.describe(faces(2))
    with pytest.raises(ValueError, match=r"expected shape \(3, 3, 3\), got \(2, 3, 3\)"):
        reenactor.drive(source, faces(3))


def test_degrees_of_a_certain_bin() -> None:
    logits = torch.full((2, 66), -1e4)
    logits[0, 33], logits[1, 65] = 0, 0
    assert bins_to_degrees(logits).tolist() == [0, 96]


@pytest.mark.parametrize(
    ("angles", "point", "expected"),
    [
        ((90.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)),  # yaw: z to x
        ((0.0, 90.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),  # pitch: y to z
        ((0.0, 0.0, 90.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),  # roll: x to y
        ((90.0, 90.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)),  # yaw comes before pitch
        ((90.0, 0.0, 90.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),  # roll comes before yaw
    ],
)
def test_rotation(angles: tuple[float, float, float], point: tuple[float, ...], expected: tuple[float, ...]) -> None:
    turned = head_rotation(*(torch.tensor([angle]) for angle in angles))[0] @ torch.tensor(point)
    torch.testing.assert_close(turned, torch.tensor(expected), atol=2e-3, rtol=0)  # 90 degrees are 1.57, not pi / 2


def test_radians_use_the_published_constant() -> None:
    zero = torch.zeros(1)
    assert head_rotation(zero, zero, torch.tensor([90.0]))[0, 0, 0].item() == pytest.approx(math.cos(1.57), abs=1e-6)


def test_keypoints_turn_then_shift_then_deform() -> None:
    canonical = torch.tensor([[[1.0, 0.0, 0.0]]])
    straight, right = torch.full((1, 66), -1e4), torch.full((1, 66), -1e4)
    straight[0, 33], right[0, 63] = 0, 0  # 0 and 90 degrees
    motion = HeadMotion(straight, straight, right, torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([[[0.0, 0.0, 0.5]]]))
    torch.testing.assert_close(place_keypoints(canonical, motion), torch.tensor([[[0.1, 1.2, 0.8]]]), atol=1e-3, rtol=0)


def test_canonical_keypoints_are_the_centre_of_even_heat_maps() -> None:
    detector = KeypointDetector(keypoints=2, width=4, levels=2, depth=4).eval()
    torch.nn.init.zeros_(detector.heatmaps.weight)
    with torch.inference_mode():
        points = detector(torch.rand(1, 3, 32, 32))
    torch.testing.assert_close(points, torch.zeros(1, 2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(detector.blur.sum(dim=(1, 2, 3)), torch.ones(3))


def test_dense_motion_follows_its_masks() -> None:
    """Where one keypoint owns all of the volume, the grid is the still grid shifted by that keypoint's way back to the source."""
    torch.manual_seed(0)
    motion = DenseMotion(channels=4, depth=4, keypoints=2, width=4, levels=2, compressed=2).eval()
    torch.nn.init.zeros_(motion.mask.weight)
    assert motion.mask.bias is not None
    motion.mask.bias.data = torch.tensor([0.0, 100.0, 0.0])  # background, first and second keypoint
    source, driven = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    source[0, 0] = torch.tensor([0.1, 0.2, 0.3])
    with torch.inference_mode():
        grid, visibility = motion(torch.rand(1, 4, 4, 8, 8), source, driven)
    assert grid.shape == (1, 4, 8, 8, 3)
    assert visibility.shape == (1, 1, 8, 8)
    torch.testing.assert_close(grid[0, 0, 0, 0], torch.tensor([-0.9, -0.8, -0.7]))
    torch.testing.assert_close(grid[0, 3, 0, 7], torch.tensor([1.1, -0.8, 1.3]))


def test_spectral_convolution_divides_by_the_stored_singular_value() -> None:
    conv = _SpectralConv(2, 2, 1, bias=False)
    conv.weight.data = torch.diag(torch.tensor([4.0, 2.0]))[:, :, None, None]
    conv.left, conv.right = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])
    torch.testing.assert_close(conv(torch.ones(1, 2, 1, 1)).flatten(), torch.tensor([1.0, 0.5]))


def reference_case(seed: int) -> tuple[FaceVid2Vid, dict[str, Array]]:
    """A random small network and what it gives in float64, as the reference's cases are stored."""
    torch.manual_seed(seed)
    network = FaceVid2Vid(SMALL).eval().requires_grad_(False)
    for weight in (network.detector.heatmaps.weight, network.estimator.expression.weight, network.generator.motion.mask.weight):
        weight *= 10  # so that keypoints and motion matter
    rng = np.random.default_rng(seed)
    case = {name: rng.integers(0, 256, (64, 64, 3), np.uint8) for name in ("source_u8", "driving_u8")}
    exact = PUBLISHED_FACEVID2VID.run(copy.deepcopy(network).double(), case)
    return network, case | {name: value.astype(np.float32) for name, value in exact.items()}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_picture_is_compared_twice(seed: int) -> None:
    network, case = reference_case(seed)
    checks = check_case(PUBLISHED_FACEVID2VID, network, case, "case")
    assert [check.output for check in checks[-2:]] == ["prediction_sub", "prediction_sub from stored kp_source, kp_driving"]
    assert len(checks) == len(case) - 1  # two inputs, one output twice
    assert all(check.passed for check in checks), checks
    assert [check.limit for check in checks if check.output != "prediction_sub"] == [1e-4] * (len(checks) - 1)
    assert 1e-4 <= checks[-2].limit <= 5e-3


@pytest.mark.parametrize(
    ("weight", "noticed"),
    [
        ("generator.decoder.enter.weight", "prediction_sub from stored kp_source, kp_driving"),
        ("generator.appearance.lift.weight", "prediction_sub from stored kp_source, kp_driving"),
        ("detector.heatmaps.weight", "kp_canonical"),
        ("estimator.expression.weight", "he_source_exp"),
    ],
)
def test_a_weight_that_is_wrong_by_a_hundredth_is_noticed(weight: str, noticed: str) -> None:
    network, case = reference_case(0)
    network.get_parameter(weight).mul_(1.01)
    failed = {check.output for check in check_case(PUBLISHED_FACEVID2VID, network, case, "case") if not check.passed}
    assert noticed in failed
    assert "prediction_sub" in failed or not weight.startswith("generator")


def test_the_limit_grows_with_what_rounding_does() -> None:
    """A picture of slope 300 in the keypoint: noise of up to 1e-6 moves it by up to 3e-4; the limit never passes 5e-3."""
    case = {"point": np.array([1.0], np.float32)}
    limits = []
    for slope in (1.0, 300.0, 1e6):
        amplified = Amplified(output="o", given=("point",), run=lambda module, case, slope=slope: 1 + slope * (case["point"] - 1))
        limits.append(amplified_limit(amplified, torch.nn.Identity(), case, np.ones(1)))
    assert limits[0] == 1e-4
    assert 1e-4 < limits[1] <= 9.5e-4
    assert limits[2] == 5e-3
