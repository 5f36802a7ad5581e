"""The inpainting network: names of the published checkpoint, its building blocks against plain formulas, filling of holes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from e4s_models.inpaint_net import PUBLISHED_INPAINT, InpaintNet, _Blur, _StyledConv

DATA = Path(__file__).parents[1] / "data"
SIDE = 64


@pytest.fixture(scope="module")
def network() -> InpaintNet:
    torch.manual_seed(0)
    return InpaintNet(channels=(8, 12, 16), code_dim=24).eval().requires_grad_(False)


def faces(seed: int, count: int = 1) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def holes(*sides: int) -> Tensor:
    mask = torch.zeros(len(sides), 1, SIDE, SIDE)
    for item, side in zip(mask, sides, strict=True):
        item[:, :side, :side] = 1
    return mask


def test_names_are_the_published_ones() -> None:
    renamed = {PUBLISHED_INPAINT.rename(key): shape for key, shape in json.loads((DATA / "inpaint.json").read_text()).items()}
    published = {key: shape for key, shape in renamed.items() if key is not None}  # None: noise, which inference leaves out
    with torch.device("meta"):
        network = InpaintNet()
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == published
    assert network.side == 256


def test_only_noise_is_left_out() -> None:
    dropped = {key for key in json.loads((DATA / "inpaint.json").read_text()) if PUBLISHED_INPAINT.rename(key) is None}
    assert dropped == {f"noises.noise{i}" for i in range(9)} | {"style_conv1.weight"} | {f"style_convs.{i}.weight" for i in range(8)}


def test_gives_a_picture_and_repeats_itself(network: InpaintNet) -> None:
    painted = network(faces(0), holes(20))
    assert painted.shape == (1, 3, SIDE, SIDE)
    assert torch.equal(painted, network(faces(0), holes(20)))


def test_batch_equals_singles(network: InpaintNet) -> None:
    together = network(faces(0, 2), holes(8, 40))
    alone = [network(face[None], hole[None]) for face, hole in zip(faces(0, 2), holes(8, 40), strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_what_lies_in_a_hole_is_not_seen(network: InpaintNet) -> None:
    face, hole = faces(0), holes(20)
    torch.testing.assert_close(network(face * (1 - hole), hole), network(face, hole))


def test_the_area_ratio_modulates_the_decoder(network: InpaintNet) -> None:
    unaware = InpaintNet(channels=(8, 12, 16), code_dim=24)
    unaware.load_state_dict({key: value * (not key.endswith("own_scale.weight")) for key, value in network.state_dict().items()})
    assert not torch.allclose(unaware(faces(0), holes(40)), network(faces(0), holes(40)), atol=1e-3)
    torch.testing.assert_close(unaware(faces(0), holes(0)), network(faces(0), holes(0)))  # at a ratio of 0 only the biases count


def test_fill_leaves_the_rest_alone(network: InpaintNet) -> None:
    face, hole = faces(0), holes(20)
    filled = network.fill(face, hole)
    assert torch.equal(filled[:, :, 20:], face[:, :, 20:])
    torch.testing.assert_close(filled[..., :20, :20], network(face, hole)[..., :20, :20].clamp(-1, 1))


def test_modulated_convolution_equals_one_kernel_per_sample() -> None:
    torch.manual_seed(0)
    conv, x, codes = _StyledConv(3, 5, 7), torch.randn(2, 3, 6, 6), torch.randn(2, 7)
    expected = []
    for item, code in zip(x, codes, strict=True):
        kernel = conv.weight[0] / 27**0.5 * conv.style(code[None])[0, :, None, None]  # (5, 3, 3, 3)
        kernel = kernel / (kernel.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        expected.append(conv2d(item[None], kernel, padding=1))
    torch.testing.assert_close(conv(x, codes), torch.cat(expected))


def test_doubling_keeps_a_constant() -> None:
    blur = _Blur(1, gain=4)
    assert torch.equal(blur.enlarge(torch.ones(1, 2, 4, 4))[:, :, 1:-1, 1:-1], torch.ones(1, 2, 6, 6))
    assert "kernel" not in blur.state_dict()


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    network = InpaintNet(channels=(8, 12, 16), code_dim=24)
    network.fill(faces(0, 2) / 2, holes(8, 64)).square().sum().backward()  # type: ignore[no-untyped-call]
    assert [name for name, value in network.named_parameters() if value.grad is None or not value.grad.any()] == []


def test_says_what_does_not_fit(network: InpaintNet) -> None:
    with pytest.raises(ValueError, match=r"expected shape \(B, 3, 64, 64\), got \(1, 3, 32, 32\)"):
        network(faces(0)[..., :32, :32], holes(1))
    with pytest.raises(ValueError, match=r"expected shape \(2, 1, 64, 64\), got \(1, 1, 64, 64\)"):
        network(faces(0, 2), holes(1))
