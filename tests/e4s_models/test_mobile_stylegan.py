from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from e4s_models.mobile_stylegan import MobileStyleGAN, RegionRows, inverse_haar

RECORDED = np.load(Path(__file__).parents[1] / "data" / "mobile_stylegan.npz")  # see record_mobile_stylegan.py


@pytest.fixture(scope="module")
def generator() -> MobileStyleGAN:
    return MobileStyleGAN.load()


@pytest.fixture(scope="module")
def codes(generator: MobileStyleGAN) -> torch.Tensor:
    """(12, 512): twelve people."""
    z = torch.from_numpy(np.random.Generator(np.random.PCG64(3)).standard_normal((12, 512), np.float32))
    with torch.inference_mode():
        return generator.mean_w + 0.7 * (generator.map(z) - generator.mean_w)


def per_layer(codes: torch.Tensor) -> torch.Tensor:
    """(..., 512) -> (..., 23, 512)."""
    return codes[..., None, :].expand(*codes.shape[:-1], 23, 512)


def halves(side: int = 1024, left: int = 0, right: int = 1) -> torch.Tensor:
    labels = torch.full((1, side, side), left, dtype=torch.uint8)
    labels[:, :, side // 2 :] = right
    return labels


def test_mapping_equals_the_published_graph(generator: MobileStyleGAN) -> None:
    w = generator.map(torch.from_numpy(RECORDED["z"]))
    assert w.shape == (3, 512)
    np.testing.assert_allclose(w.numpy(), RECORDED["w"], rtol=0, atol=2e-5)


@torch.inference_mode()
def test_synthesis_equals_the_published_graph(generator: MobileStyleGAN) -> None:
    w = torch.from_numpy(RECORDED["w"])
    for index in range(2):
        image = generator.synthesize(per_layer(w[index : index + 1])).numpy()[0]
        assert image.shape == (3, 1024, 1024)
        np.testing.assert_allclose(image[:, 5::32, 7::32], RECORDED["image_sub"][index], rtol=0, atol=1e-4)
        np.testing.assert_allclose(image[:, 496:528, 496:528], RECORDED["image_crop"][index], rtol=0, atol=1e-4)
        stats = [image.mean(), image.std(), image.min(), image.max()]
        np.testing.assert_allclose(stats, RECORDED["image_stats"][:, index], rtol=0, atol=1e-4)


@torch.inference_mode()
def test_twelve_equal_codes_equal_one(generator: MobileStyleGAN, codes: torch.Tensor) -> None:
    labels = torch.from_numpy(np.random.Generator(np.random.PCG64(0)).integers(0, 12, (1, 1024, 1024), np.uint8))
    one = generator.synthesize(per_layer(codes[:1]))
    twelve = generator.synthesize(per_layer(codes[None, :1].expand(1, 12, 512)), labels)
    assert float((one - twelve).abs().max()) <= 1e-5


@torch.inference_mode()
def test_a_region_follows_its_own_code(generator: MobileStyleGAN, codes: torch.Tensor) -> None:
    """Far from the border each half equals, up to what early layers spread, the half of the plain picture of its code."""
    mixed = generator.synthesize(per_layer(codes[None]), halves(), stop_after=256)
    left, right = (generator.synthesize(per_layer(codes[k : k + 1]), stop_after=256) for k in (0, 1))

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).abs().mean())

    assert distance(mixed[..., :64], left[..., :64]) < 0.5 * distance(mixed[..., :64], right[..., :64])
    assert distance(mixed[..., -64:], right[..., -64:]) < 0.5 * distance(mixed[..., -64:], left[..., -64:])


@torch.inference_mode()
def test_only_the_styles_of_the_last_layer_differ(generator: MobileStyleGAN, codes: torch.Tensor) -> None:
    """The last layer is pointwise: with other codes in it alone, each pixel equals the plain picture of its own region's code."""
    late = per_layer(codes[None, :1].expand(1, 12, 512)).clone()
    late[:, 5, -1] = codes[1]
    mixed = generator.synthesize(late, halves(left=0, right=5))
    left, right = generator.synthesize(late[:, 0]), generator.synthesize(late[:, 5])
    assert float((left - right).abs().max()) > 0.1
    torch.testing.assert_close(mixed[..., :512], left[..., :512], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[..., 512:], right[..., 512:], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_batch_equals_singles(generator: MobileStyleGAN, codes: torch.Tensor) -> None:
    labels = torch.cat([halves(), halves(left=3, right=2)])
    regional = torch.stack([per_layer(codes), per_layer(codes.flip(0))])
    both = generator.synthesize(regional, labels, stop_after=64)
    plain = generator.synthesize(regional[:, 0], stop_after=64)
    for k in range(2):
        torch.testing.assert_close(
            both[k : k + 1], generator.synthesize(regional[k : k + 1], labels[k : k + 1], stop_after=64), rtol=0, atol=1e-4
        )
        torch.testing.assert_close(plain[k : k + 1], generator.synthesize(regional[k : k + 1, 0], stop_after=64), rtol=0, atol=1e-4)


def test_gradients_reach_present_regions_only(generator: MobileStyleGAN, codes: torch.Tensor) -> None:
    regional = per_layer(codes[None]).clone().requires_grad_()
    features = generator.synthesize(regional, halves(left=0, right=1), stop_after=32)
    with torch.inference_mode():
        torch.testing.assert_close(features.detach(), generator.synthesize(regional.detach(), halves(), stop_after=32), rtol=0, atol=1e-4)
    features.square().mean().backward()
    assert regional.grad is not None
    gradient = regional.grad[0].abs().sum(dim=2)  # (12, 23)
    used = 1 + 3 * 3  # style layers of 4 px and of the 8, 16 and 32 px blocks
    assert (gradient[:2, :used] > 0).all()
    assert (gradient[2:] == 0).all()
    assert (gradient[:, used:] == 0).all()


def test_the_mean_code_is_fixed(generator: MobileStyleGAN) -> None:
    again = MobileStyleGAN.load().mean_w
    assert generator.mean_w.shape == (512,)
    assert torch.equal(generator.mean_w, again)
    assert 0.1 < float(again.abs().mean()) < 1


def test_inverse_haar_by_hand() -> None:
    low, vertical, horizontal, diagonal = 10.0, 1.0, 2.0, 4.0
    block = inverse_haar(torch.tensor([low, vertical, horizontal, diagonal]).view(1, 4, 1, 1))
    assert block[0, 0].tolist() == [[17, 5], [7, 11]]  # 11 + 6, 11 - 6; 9 - 2, 9 + 2


def test_labels_are_resized_to_the_nearest_at_the_top_left() -> None:
    labels = torch.arange(16, dtype=torch.uint8).view(1, 4, 4)
    rows = RegionRows(labels)
    assert rows.at(2).tolist() == [[0, 2, 8, 10]]
    assert rows.at(8).view(8, 8)[:2, :4].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.synthesize(torch.zeros(1, 12, 23, 512)), "codes of 12 regions need region_ids"),
        (lambda g: g.synthesize(torch.zeros(1, 18, 512)), r"expected shape \(B, R, 23, 512\), got \(1, 1, 18, 512\)"),
        (lambda g: g.synthesize(torch.zeros(1, 2, 23, 512), halves(8, 0, 2)), "region ids go up to 2, but there are codes of 2 regions"),
        (lambda g: g.synthesize(torch.zeros(2, 12, 23, 512), halves(8)), "expected 2 label maps for 2 codes, got 1"),
        (lambda g: g.synthesize(torch.zeros(1, 23, 512), stop_after=100), "stop_after must be one of"),
        (lambda g: g.map(torch.zeros(1, 500)), r"expected shape \(B, 512\)"),
    ],
)
def test_what_does_not_fit_is_said(generator: MobileStyleGAN, call: Callable[[MobileStyleGAN], torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(generator)
