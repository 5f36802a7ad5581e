"""The paper's reconstruction objective with its real networks, on noise and on generated faces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from e4s_models.lpips_net import Lpips
from e4s_models.mobile_stylegan import NUM_LAYERS, MobileStyleGAN
from e4s_models.preview_head import PreviewHead, preview
from e4s_models.reconstruction_loss import LossWeights, ReconstructionLoss


@pytest.fixture(scope="module")
def loss() -> ReconstructionLoss:
    return ReconstructionLoss.load()


@pytest.fixture(scope="module")
def generator() -> MobileStyleGAN:
    return MobileStyleGAN.load()


@pytest.fixture(scope="module")
def people(generator: MobileStyleGAN) -> torch.Tensor:
    """(2, 3, 1024, 1024)"""
    z = torch.from_numpy(np.random.default_rng(5).standard_normal((2, 512), np.float32))
    with torch.no_grad():
        w = generator.mean_w + 0.7 * (generator.map(z) - generator.mean_w)
        return torch.cat([generator.synthesize(code.expand(1, NUM_LAYERS, -1).contiguous()) for code in w]).clamp(-1, 1)


def test_zero_for_the_face_itself_and_more_for_others(loss: ReconstructionLoss, people: torch.Tensor) -> None:
    small = torch.nn.functional.avg_pool2d(people, 8)
    wanted = loss.of(small)
    torch.testing.assert_close(loss(small, wanted), torch.zeros(2), rtol=0, atol=1e-5)
    noisy = loss(small + 0.05 * torch.randn(small.shape, generator=torch.Generator().manual_seed(0)), wanted)
    other = loss(small.flip(0), wanted)
    assert (noisy > 0.01).all()
    assert (other > noisy).all()


def test_terms_and_their_gradients(people: torch.Tensor) -> None:
    small = torch.nn.functional.avg_pool2d(people[:1], 8)
    made = (torch.nn.functional.avg_pool2d(people[1:], 8)).requires_grad_(True)
    values = {}
    for name in ("lpips", "identity", "parsing"):
        weights = LossWeights(**({"lpips": 0.0, "identity": 0.0, "parsing": 0.0} | {name: 1.0}))
        one = ReconstructionLoss.load(weights=weights)
        value = one(made, one.of(small))
        (gradient,) = torch.autograd.grad(value.sum(), made)
        values[name] = float(value.detach()) - float((made.detach() - small).square().mean())
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0
    assert all(0.05 < value < 6 for value in values.values()), values


def test_gradients_are_finite_where_nothing_is_activated() -> None:
    network = Lpips()
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    picture = torch.rand(1, 3, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(picture, torch.rand(1, 3, 64, 64)).sum(), picture)
    assert torch.isfinite(gradient).all()


def test_the_preview_is_the_picture_shrunk(generator: MobileStyleGAN) -> None:
    head = PreviewHead.load()
    z = torch.from_numpy(np.random.default_rng(6).standard_normal((4, 512), np.float32))
    ids = torch.zeros(1, 256, 256, dtype=torch.uint8)
    ids[:, :, 128:] = 1
    with torch.inference_mode():
        w = generator.mean_w + 0.7 * (generator.map(z) - generator.mean_w)
        quality = []
        for code in w:
            codes = code.expand(1, NUM_LAYERS, -1).contiguous()
            small = torch.nn.functional.avg_pool2d(generator.synthesize(codes), 8)
            quality.append(10 * torch.log10(4 / (preview(generator, head, codes, None) - small).square().mean()))
        mixed = torch.stack([w[0], w[1]])[None, :, None].expand(1, 2, NUM_LAYERS, -1).contiguous()
        small = torch.nn.functional.avg_pool2d(generator.synthesize(mixed, ids), 8)
        quality.append(10 * torch.log10(4 / (preview(generator, head, mixed, ids) - small).square().mean()))
    assert torch.stack(quality).min() > 22
    assert torch.stack(quality).mean() > 25.5
