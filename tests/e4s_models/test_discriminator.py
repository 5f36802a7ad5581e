"""The discriminator: names and shapes of the published layout, its arithmetic against a plain one, the training's gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from e4s_models.discriminator import Discriminator, minibatch_spread, rename
from e4s_models.weights import load_strict

Array = NDArray[np.float64]
WIDTHS = {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128, 512: 64, 1024: 32}


def published_shapes(side: int, widths: dict[int, int]) -> dict[str, tuple[int, ...]]:
    """Entries of a published checkpoint: the layers lie in sequences in which a blur comes first and a bias last."""
    shapes: dict[str, tuple[int, ...]] = {"convs.0.0.weight": (widths[side], 3, 1, 1), "convs.0.1.bias": (widths[side],)}
    size, number = side, 1
    while size > 4:
        inputs, outputs, block = widths[size], widths[size // 2], f"convs.{number}"
        shapes |= {f"{block}.conv1.0.weight": (inputs, inputs, 3, 3), f"{block}.conv1.1.bias": (inputs,)}
        shapes |= {
            f"{block}.conv2.0.kernel": (4, 4),
            f"{block}.conv2.1.weight": (outputs, inputs, 3, 3),
            f"{block}.conv2.2.bias": (outputs,),
        }
        shapes |= {f"{block}.skip.0.kernel": (4, 4), f"{block}.skip.1.weight": (outputs, inputs, 1, 1)}
        size, number = size // 2, number + 1
    last = widths[4]
    shapes |= {"final_conv.0.weight": (last, last + 1, 3, 3), "final_conv.1.bias": (last,)}
    shapes |= {"final_linear.0.weight": (last, 16 * last), "final_linear.0.bias": (last,)}
    return shapes | {"final_linear.1.weight": (1, last), "final_linear.1.bias": (1,)}


@pytest.mark.parametrize("side", [256, 512, 1024])
def test_names_and_shapes_are_the_published_ones(side: int) -> None:
    with torch.device("meta"):
        network = Discriminator(side)
    published = {ours: shape for key, shape in published_shapes(side, WIDTHS).items() if (ours := rename(key)) is not None}
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == published


def correlate(x: Array, weight: Array, padding: int, stride: int = 1) -> Array:
    """(B, C, H, W) with (C', C, k, k), written as sums over shifted pictures."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    size = weight.shape[-1]
    height, width = x.shape[2] - size + 1, x.shape[3] - size + 1
    total = sum(
        np.einsum("bchw,oc->bohw", x[:, :, i : i + height, j : j + width], weight[:, :, i, j]) for i in range(size) for j in range(size)
    )
    return np.asarray(total)[:, :, ::stride, ::stride]


def low_pass(x: Array, padding: int) -> Array:
    """Every channel alone with the outer product of (1, 3, 3, 1) / 8: rows, then columns, of the picture among zeros."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    taps = np.array([1, 3, 3, 1]) / 8
    rows = np.apply_along_axis(np.convolve, 2, x, taps, "valid")
    return np.apply_along_axis(np.convolve, 3, rows, taps, "valid")


def rectify(x: Array, bias: Array) -> Array:
    x = x + bias.reshape(1, -1, *[1] * (x.ndim - 2))
    return np.where(x > 0, x, 0.2 * x) * 2**0.5


def plain_scores(state: dict[str, Array], x: Array, blocks: int) -> Array:
    """The network from published entries, in float64 NumPy."""

    def scaled(key: str) -> Array:
        return state[key] / np.sqrt(np.prod(state[key].shape[1:]))

    x = rectify(correlate(x, scaled("convs.0.0.weight"), 0), state["convs.0.1.bias"])
    for number in range(1, blocks + 1):
        block = f"convs.{number}"
        y = rectify(correlate(x, scaled(f"{block}.conv1.0.weight"), 1), state[f"{block}.conv1.1.bias"])
        y = rectify(correlate(low_pass(y, 2), scaled(f"{block}.conv2.1.weight"), 0, 2), state[f"{block}.conv2.2.bias"])
        x = (y + correlate(low_pass(x, 1), scaled(f"{block}.skip.1.weight"), 0, 2)) / 2**0.5
    group = min(4, len(x))
    spread = np.empty((len(x), 1, *x.shape[2:]))
    for item in range(len(x)):
        members = x[item % (len(x) // group) :: len(x) // group]
        spread[item] = np.sqrt(members.var(axis=0) + 1e-8).mean()
    x = rectify(correlate(np.concatenate([x, spread], axis=1), scaled("final_conv.0.weight"), 1), state["final_conv.1.bias"])
    x = rectify(x.reshape(len(x), -1) @ scaled("final_linear.0.weight").T, state["final_linear.0.bias"])
    return x @ scaled("final_linear.1.weight").T + state["final_linear.1.bias"]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_scores_equal_a_plain_network_on_published_entries(batch: int) -> None:
    widths = {4: 6, 8: 6, 16: 6, 32: 3}
    rng = np.random.Generator(np.random.PCG64(batch))
    state = {key: rng.standard_normal(shape) for key, shape in published_shapes(32, widths).items()}
    network = Discriminator(32, max_width=6, width_times_side=96).double()
    load_strict(network, {ours: torch.from_numpy(value) for key, value in state.items() if (ours := rename(key))}, "discriminator")
    faces = rng.uniform(-1, 1, (batch, 3, 32, 32))
    scores = network(torch.from_numpy(faces))
    assert scores.shape == (batch, 1)
    np.testing.assert_allclose(scores.detach().numpy(), plain_scores(state, faces, blocks=3), rtol=1e-9, atol=1e-9)
    with torch.no_grad():  # where activations are overwritten
        torch.testing.assert_close(network(torch.from_numpy(faces)), scores)


def test_spread_by_hand() -> None:
    x = torch.tensor([1.0, 5.0, 3.0, 5.0]).view(4, 1, 1, 1).expand(4, 2, 1, 1)
    spread = minibatch_spread(x, group=2)  # samples 0 and 2, samples 1 and 3
    assert spread.shape == (4, 3, 1, 1)
    torch.testing.assert_close(spread[:, 2, 0, 0], torch.tensor([1.0, 1e-4, 1.0, 1e-4]))
    assert torch.equal(spread[:, :2], x)


def test_gradient_penalty_reaches_every_weight() -> None:
    torch.manual_seed(0)
    network = Discriminator(16, max_width=4, width_times_side=64)
    faces = torch.rand(2, 3, 16, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(faces).sum(), faces, create_graph=True)
    gradient.square().sum().backward()  # R1, which trains StyleGAN2's discriminator
    weights = {name: value.grad for name, value in network.named_parameters() if name.endswith("weight")}
    assert [name for name, value in weights.items() if value is None or not value.abs().sum() > 0] == []


def test_says_what_does_not_fit() -> None:
    network = Discriminator(8, max_width=4)
    with pytest.raises(ValueError, match=r"expected shape \(B, 3, 8, 8\), got \(1, 3, 16, 16\)"):
        network(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="a batch of 6 cannot be split into groups of 4"):
        network(torch.zeros(6, 3, 8, 8))
    with pytest.raises(ValueError, match="power of two"):
        Discriminator(100)
