"""The mask-guided generator: fast regional layers against the per-region loop, gradients, shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from e4s_models import stylegan2
from e4s_models.stylegan2 import Regions, StyleGAN2, plain_conv, region_conv, region_conv_ref, upsample

LAYERS = [(3, 1, True), (3, 2, True), (1, 1, False), (3, 1, False)]  # kernel, up, demodulate


def layer_inputs(kernel: int, side: int = 8, batch: int = 2, num: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, styles in float64 and blocky region ids; the second sample's labels are noise, region 3 is absent from the first."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, side, side, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, kernel, kernel, generator=draw, dtype=torch.float64, requires_grad=True)
    styles = torch.randn(batch, num, 3, generator=draw, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, num, (batch, 16, 16), generator=draw)
    ids[0] = 0
    ids[0, 2:9, 3:], ids[0, 9:, :6] = 1, 2
    return x, weight, styles, ids.to(torch.uint8)


def small_generator(region_layers: int = 5, side: int = 16) -> StyleGAN2:
    torch.manual_seed(0)
    network = StyleGAN2(side, region_layers, max_width=16, width_times_side=128, code_dim=8)
    for name, parameter in network.named_parameters():
        if name.endswith(("noise_strength", ".bias")):
            torch.nn.init.normal_(parameter)
    return network


@pytest.mark.parametrize(("kernel", "up", "demodulate"), LAYERS)
def test_region_layer_and_its_gradients_equal_the_loop(kernel: int, up: int, demodulate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stylegan2._SEAM_CHUNK, "cpu", 9 * 3 * 7)  # 7 pixels at a time
    x, weight, styles, ids = layer_inputs(kernel)
    fast = region_conv(x, weight, styles, Regions(ids, 4), up, demodulate)
    loop = region_conv_ref(x, weight, styles, Regions(ids, 4), up, demodulate)
    assert fast.shape == loop.shape == (2, 5, 8 * up, 8 * up)
    torch.testing.assert_close(fast, loop)
    loss = torch.randn(loop.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for ours, expected in zip(
        torch.autograd.grad((fast * loss).sum(), (x, weight, styles)),
        torch.autograd.grad((loop * loss).sum(), (x, weight, styles)),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)
    with torch.inference_mode():
        torch.testing.assert_close(region_conv(x, weight, styles, Regions(ids, 4), up, demodulate), loop.detach())


@pytest.mark.parametrize("up", [1, 2])
def test_gradcheck(up: int) -> None:
    x, weight, styles, ids = layer_inputs(3, side=2, batch=1, num=3)
    x, weight, styles = (value.detach()[:, :2].requires_grad_() for value in (x, weight[:2], styles.transpose(1, 2)))
    assert torch.autograd.gradcheck(
        lambda x, weight, styles: region_conv(x, weight, styles.transpose(1, 2), Regions(ids, 3), up, True), (x, weight, styles)
    )


def test_one_region_is_the_plain_layer() -> None:
    x, weight, styles, ids = layer_inputs(3)
    fast = region_conv(x, weight, styles[:, :1], Regions(torch.zeros_like(ids), 1), 2, True)
    torch.testing.assert_close(fast, plain_conv(x, weight, styles[:, 0], 2, True))


def test_each_region_takes_its_own_code() -> None:
    """Left half scaled by 2, right half by 3: with a kernel of one tap and no demodulation the answer is known."""
    ids = torch.tensor([[[0, 1], [0, 1]]], dtype=torch.uint8)
    styles = torch.tensor([[[2.0], [3.0]]])
    weight = torch.zeros(1, 1, 3, 3)
    weight[..., 1, 0] = 1  # the left neighbour: its own style must not matter, only the output pixel's
    x = torch.ones(1, 1, 4, 4)
    out = region_conv(x, weight, styles, Regions(ids, 2), 1, False)
    assert out[0, 0, 0].tolist() == [0, 2, 3, 3]


def test_regions_are_resized_by_nearest() -> None:
    ids = torch.arange(16, dtype=torch.uint8).view(1, 4, 4)
    assert Regions(ids, 16).at(2)[0].tolist() == [[0, 2], [8, 10]]
    assert Regions(ids, 16).at(8)[0, 1].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert Regions(ids, 16).masks(4, torch.float32).sum(dim=1).eq(1).all()


def test_upsample_keeps_a_flat_picture() -> None:
    out = upsample(torch.ones(1, 3, 6, 6))
    assert out.shape == (1, 3, 12, 12)
    torch.testing.assert_close(out[..., 2:-2, 2:-2], torch.ones(1, 3, 8, 8))


def test_batch_of_two_is_two_singles() -> None:
    network = small_generator()
    codes, ids = torch.randn(2, 3, network.num_layers, 8), torch.randint(0, 3, (2, 32, 32)).to(torch.uint8)
    with torch.inference_mode():
        both = network(codes, ids)
        assert both.shape == (2, 3, 16, 16)
        singles = torch.cat([network(codes[i : i + 1], ids[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(both, singles, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("region_layers", [0, 1, 3, 4, 6])
def test_first_k_layers_are_regional(region_layers: int) -> None:
    network = small_generator(region_layers)
    codes, ids = torch.randn(1, 2, network.num_layers, 8), torch.zeros(1, 16, 16, dtype=torch.uint8)
    ids[:, :, 8:] = 1
    codes.requires_grad_()
    gradient = torch.autograd.grad(network(codes, ids).square().sum(), codes)[0].abs().sum(dim=-1)[0]  # (R, L)
    assert gradient[0].gt(0).all()
    assert gradient[1].gt(0).tolist() == [layer < region_layers for layer in range(network.num_layers)]


def test_one_code_for_all_regions_is_the_plain_picture() -> None:
    network, ids = small_generator(), torch.randint(0, 3, (1, 32, 32)).to(torch.uint8)
    codes = torch.randn(1, 1, network.num_layers, 8)
    torch.testing.assert_close(network(codes.expand(-1, 3, -1, -1), ids), network(codes), rtol=1e-4, atol=1e-4)


def test_training_reaches_every_parameter_and_may_draw_noise() -> None:
    network = small_generator()
    codes, ids = torch.randn(1, 3, network.num_layers, 8), torch.randint(0, 3, (1, 32, 32)).to(torch.uint8)
    noise = [torch.randn_like(stored) for stored in network.buffers()]
    out = network(codes, ids, noise)
    assert not torch.equal(out, network(codes, ids))
    out.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())


@pytest.mark.parametrize("side", [256, 512, 1024])
def test_sizes_have_the_published_widths(side: int) -> None:
    with torch.device("meta"):
        network = StyleGAN2(side)
    assert network.num_layers == {256: 14, 512: 16, 1024: 18}[side]
    widths = [512, 512, 512, 512, 512, 256, 128, 64, 32][: len(network.to_rgbs)]
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert [shapes[f"to_rgbs.{k}.conv.weight"][2] for k in range(len(network.to_rgbs))] == widths
    assert shapes[f"convs.{len(network.convs) - 1}.noise"][-1] == side


def test_refuses_what_does_not_fit() -> None:
    network = small_generator()
    codes, ids = torch.zeros(1, 3, network.num_layers, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="power of two"):
        StyleGAN2(100)
    with pytest.raises(ValueError, match=r"expected shape \(B, R, 6, 8\)"):
        network(codes[:, 0], ids)
    with pytest.raises(ValueError, match="codes of 3 regions need region_ids"):
        network(codes)
    with pytest.raises(ValueError, match="expected 1 label maps for 1 codes, got 2"):
        network(codes, ids.expand(2, -1, -1))
    with pytest.raises(ValueError, match="region ids go up to 3"):
        network(codes, ids + 3)
    with pytest.raises(ValueError, match="expected 5 noise maps"):
        network(codes, ids, [])
