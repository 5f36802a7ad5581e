"""The mask-guided generator: fast regional layers against the per-region loop, gradients, shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from e4s_models import stylegan2_layers
from e4s_models.stylegan2 import StyleGAN2
from e4s_models.stylegan2_layers import (
    Modulated,
    Regions,
    activate,
    blur,
    plain_conv,
    region_conv,
    region_conv_ref,
    shared_conv,
    upsample,
)

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
    monkeypatch.setitem(stylegan2_layers._CHUNK, "cpu", 9 * 3 * 7)  # 7 patches at a time
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


@pytest.mark.parametrize("up", [1, 2])
def test_an_absent_region_costs_and_changes_nothing(up: int) -> None:
    x, weight, styles, ids = (value.detach() for value in layer_inputs(3))
    ids = ids.clamp(max=2)
    regions = Regions(ids, 4)
    with torch.inference_mode():
        expected = region_conv(x, weight, styles[:, :3], Regions(ids, 3), up, True)
        styles[:, 3] = torch.nan
        torch.testing.assert_close(region_conv(x, weight, styles, regions, up, True), expected)
    seams = regions.seams(8, up)
    assert 3 not in torch.cat([seams.codes, *seams.corner_codes]) % 4


def test_only_pixels_at_a_border_are_seams() -> None:
    ids = torch.zeros(2, 8, 8, dtype=torch.uint8)
    ids[1, :, 4:] = 1  # the first sample has one region
    regions = Regions(ids, 2)
    assert regions.seams(8, 1).outputs.tolist() == [64 + 8 * row + column for row in range(8) for column in (3, 4)]
    assert regions.seams(4, 2).outputs.tolist() == [64 + 8 * row + column for row in range(8) for column in (2, 3, 4, 5)]
    assert regions.seams(4, 2).codes.tolist() == [2, 2, 3, 3] * 8


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("kernel", "up", "demodulate"), LAYERS)
def test_bfloat16_is_close(kernel: int, up: int, demodulate: bool, grad: bool) -> None:
    x, weight, styles, ids = layer_inputs(kernel)
    x, weight, styles = x.float(), weight.float(), styles.float()
    with torch.set_grad_enabled(grad):
        exact = region_conv(x, weight, styles, Regions(ids, 4), up, demodulate)
        with torch.autocast("cpu", torch.bfloat16):
            lower = region_conv(x, weight, styles, Regions(ids, 4), up, demodulate)
    assert 0 < (lower.float() - exact).abs().max() < 0.03 * exact.abs().max()


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


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("demodulate", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_plain_layer_equals_one_with_each_samples_own_kernel(batch: int, demodulate: bool, grad: bool) -> None:
    torch.manual_seed(0)
    layer = Modulated(4, 5, 3, 6, demodulate=demodulate)
    x, codes = torch.randn(batch, 4, 7, 9), torch.randn(batch, 1, 6)
    expected = []
    for features, gains in zip(x, layer.style(codes[:, 0]), strict=True):
        kernel = layer.weight[0] / 36**0.5 * gains[None, :, None, None]
        if demodulate:
            kernel = kernel / (kernel.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        expected.append(conv2d(features[None], kernel, padding=1))
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(x, codes), torch.cat(expected))


def test_enlarging_layer_by_hand() -> None:
    """Zeros between the pixels, then the kernel's mirror image and the low-pass filter among zeros, all as plain sums."""
    rng = np.random.Generator(np.random.PCG64(0))
    x, weight = rng.standard_normal((3, 4)), rng.standard_normal((3, 3))
    taps = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 16  # of sum 4
    spaced = np.zeros((5, 7))
    spaced[::2, ::2] = x
    enlarged = np.zeros((7, 9))
    for row, column in np.ndindex(5, 7):
        enlarged[row : row + 3, column : column + 3] += spaced[row, column] * weight
    padded = np.pad(enlarged, 1)
    expected = [[(padded[row : row + 4, column : column + 4] * taps).sum() for column in range(8)] for row in range(6)]
    ours = shared_conv(torch.from_numpy(x)[None, None], torch.from_numpy(weight)[None, None], up=2)
    torch.testing.assert_close(ours[0, 0], torch.tensor(expected, dtype=torch.float64))


def test_activation_adds_bias_and_noise() -> None:
    x, bias, noise = torch.tensor([[[[1.0, -4.0]]]]), torch.tensor([1.0]), torch.tensor([[0.0, 1.0]])
    expected = torch.tensor([[[[2.0, -0.4]]]]) * 2**0.5
    torch.testing.assert_close(activate(x, bias, noise), expected)
    assert x.tolist() == [[[[1.0, -4.0]]]]
    with torch.no_grad():
        torch.testing.assert_close(activate(x, bias, noise), expected)


def test_blur_and_enlarging_keep_a_flat_picture() -> None:
    flat = torch.full((1, 3, 8, 8), 0.7)
    torch.testing.assert_close(blur(flat, 1, padding=0), flat[:, :, :5, :5])
    enlarged = upsample(flat)
    assert enlarged.shape == (1, 3, 16, 16)
    torch.testing.assert_close(enlarged[:, :, 1:-1, 1:-1], torch.full((1, 3, 14, 14), 0.7))


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
