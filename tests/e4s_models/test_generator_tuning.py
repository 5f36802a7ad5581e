"""Tuning weights: on a small differentiable painter, and through both generators."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from e4s_models.generator_tuning import (
    STRIDE,
    Render,
    Tunable,
    TunableMobile,
    TunableStyleGAN2,
    TuneSettings,
    WeightLoss,
    Weights,
    Window,
    changed,
    face_loss,
    pack,
    run_tuned,
    tune,
    unpack,
)
from e4s_models.mobile_stylegan import MobileStyleGAN
from e4s_models.reconstruction_loss import LossWeights, ReconstructionLoss
from e4s_models.stylegan2 import StyleGAN2

SIDE = 64  # px at which the small case compares


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def mobile() -> MobileStyleGAN:
    return MobileStyleGAN.load()


@pytest.fixture(scope="module")
def stylegan2() -> StyleGAN2:
    torch.manual_seed(0)
    return StyleGAN2(64, region_layers=7, max_width=16, code_dim=16).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def reconstruction() -> ReconstructionLoss:
    return ReconstructionLoss.load(weights=LossWeights(identity=0))


def two_regions(side: int) -> Tensor:
    """(1, side, side) uint8: 1 in a square off the middle."""
    ids = torch.zeros(1, side, side, dtype=torch.uint8)
    ids[:, side // 4 : side // 2, side // 2 : side * 3 // 4] = 1
    return ids


def quadratic(goal: Weights) -> WeightLoss:
    return lambda weights: torch.stack([(weights[name] - value).square().sum() for name, value in goal.items()]).sum()


def test_more_steps_come_nearer_and_the_weights_stay_as_they_are() -> None:
    weights = {"a": noise(3, 4), "b": noise(5, seed=1)}
    before = {name: value.clone() for name, value in weights.items()}
    loss = quadratic({name: value + 0.2 for name, value in weights.items()})
    lasts = [tune(weights, [loss], TuneSettings(steps=steps, rate=0.02))[1][-1] for steps in (1, 10, 60)]
    assert lasts[0] > 1.5 * lasts[1] > 10 * lasts[2]
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    changes, _ = tune(weights, [loss], TuneSettings(steps=60, rate=0.02))
    assert {name: (change.dtype, change.shape) for name, change in changes.items()} == {
        "a": (torch.float16, (3, 4)),
        "b": (torch.float16, (5,)),
    }
    torch.testing.assert_close(changes["a"].float(), torch.full((3, 4), 0.2), atol=0.02, rtol=0)


def test_the_rate_is_in_units_of_each_tensors_size() -> None:
    weights = {"large": 100 * noise(50), "small": noise(50) / 100}
    changes, _ = tune(weights, [quadratic({name: value + 1e6 for name, value in weights.items()})], TuneSettings(steps=1, rate=0.01))
    for name, value in weights.items():
        torch.testing.assert_close(changes[name].float().mean(), 0.01 * value.square().mean().sqrt(), rtol=0.01, atol=0)


def test_all_faces_share_one_change_and_every_step_visits_each() -> None:
    weights, asked = {"a": noise(4)}, []

    def towards(goal: Tensor, name: str) -> WeightLoss:
        def loss(now: Weights) -> Tensor:
            asked.append(name)
            return (now["a"] - goal).square().sum()

        return loss

    one, two = weights["a"] + 0.1, weights["a"] - 0.3
    changes, curve = tune(weights, [towards(one, "one"), towards(two, "two")], TuneSettings(steps=200, rate=0.01))
    assert asked == ["one", "two"] * 200
    assert len(curve) == 200
    torch.testing.assert_close(changes["a"].float(), torch.full((4,), -0.1), atol=0.03, rtol=0)


def test_windows_by_hand() -> None:
    mask = torch.zeros(128, 128, dtype=torch.bool)
    mask[20:40, 64:70] = True
    window = Window.around(mask, 1024)  # rows 160 to 320, columns 512 to 560: a square of 160 and one stride
    assert window == Window(160, 512, 160 + STRIDE)
    assert Window.around(torch.zeros_like(mask), 1024) == Window(0, 0, 1024)
    assert Window.around(torch.ones_like(mask), 1024) == Window(0, 0, 1024)
    mask[:, -1] = True
    assert Window.around(mask, 1024) == Window(0, 0, 1024)
    maps = torch.arange(16.0).view(4, 4)
    assert Window(256, 512, 512).of(maps, 1024).tolist() == [[6, 7], [10, 11]]
    assert Window(0, 768, 256).grown(16, 1024) == Window(0, 736, 288)


@pytest.mark.parametrize("first_side", [8, 128, 512])
@pytest.mark.parametrize("window", [Window(256, 512, 272), Window(0, 752, 272)])
def test_a_window_is_the_whole_pictures_part(mobile: MobileStyleGAN, first_side: int, window: Window) -> None:
    codes = mobile.mean_w + 0.3 * noise(1, 2, 23, 512)
    ids = two_regions(256)
    with torch.no_grad():
        whole = mobile.synthesize(codes, ids)
        part = TunableMobile(mobile).render(codes, ids, first_side, window)({})
    torch.testing.assert_close(part, window.of(whole, 1024), atol=1e-5, rtol=0)


def test_going_on_from_features_is_the_same_and_leaves_them_alone(mobile: MobileStyleGAN) -> None:
    codes, ids = mobile.mean_w + 0.3 * noise(1, 2, 23, 512), two_regions(64)
    with torch.no_grad():
        start = mobile.synthesize(codes, ids, stop_after=16)
        kept = start.clone()
        assert torch.equal(mobile.synthesize(codes, ids, 64, (16, start)), mobile.synthesize(codes, ids, 64))
        assert torch.equal(start, kept)
        with pytest.raises(ValueError, match="go_on must start from features of one of"):
            mobile.synthesize(codes, ids, go_on=(20, start))


def generators(mobile: MobileStyleGAN, stylegan2: StyleGAN2) -> Iterator[tuple[Tunable, Tensor, int]]:
    """Either generator with codes of two regions and the side from which it is tuned."""
    yield TunableMobile(mobile), mobile.mean_w + 0.3 * noise(1, 2, 23, 512), 256
    yield TunableStyleGAN2(stylegan2), noise(1, 2, 10, 16), 32


def test_chosen_weights_are_those_of_late_layers_and_no_styles(mobile: MobileStyleGAN, stylegan2: StyleGAN2) -> None:
    late = TunableMobile(mobile).weights(256, 1024)
    assert {name.rsplit(".", 1)[0] for name in late} == {f"blocks.{k}.conv{n}" for k in (5, 6) for n in (1, 2)} | {"to_image"}
    assert {name.rsplit(".", 1)[1] for name in late} == {"depthwise", "pointwise", "bias"}
    assert sum(value.numel() for value in TunableMobile(mobile).weights(32, 1024).values()) < 1_000_000
    assert {name.split(".")[1] for name in TunableMobile(mobile).weights(32, 128)} == {"2", "3", "4"}
    published = TunableStyleGAN2(stylegan2).weights(64, 64)
    assert {name.split(".")[0] + "." + name.split(".")[1] for name in published} == {"convs.7", "convs.8", "to_rgbs.4"}


def test_the_gradient_reaches_the_chosen_weights_only(mobile: MobileStyleGAN, stylegan2: StyleGAN2) -> None:
    for tunable, codes, first_side in generators(mobile, stylegan2):
        chosen = {name: value.clone().requires_grad_() for name, value in tunable.weights(first_side, tunable.side).items()}
        window = Window(0, 0, tunable.side // 4)
        draw: Render = tunable.render(codes.requires_grad_(False), two_regions(64), first_side, window)
        torch.autograd.backward(draw(chosen).square().mean())
        assert all(value.grad is not None and value.grad.any() for name, value in chosen.items()), tunable
        network = tunable.generator  # type: ignore[attr-defined]
        assert all(value.grad is None for value in network.parameters())


def test_tuning_lowers_the_loss_inside_the_mask_and_repeats(
    mobile: MobileStyleGAN, stylegan2: StyleGAN2, reconstruction: ReconstructionLoss
) -> None:
    """Towards a face that the generator makes of other codes; the same bytes twice, whatever was tuned between."""
    for tunable, codes, first_side in generators(mobile, stylegan2):
        ids, size = two_regions(64), tunable.side
        with torch.no_grad():
            wanted = run_tuned(tunable.generator, None, codes + noise(*codes.shape, seed=3), ids)  # type: ignore[attr-defined]
        window = Window.around(ids[0] == 1, size)
        draw = tunable.render(codes, ids, first_side, window)
        loss = face_loss(draw, window, wanted, ids == 1, SIDE, reconstruction)
        settings = TuneSettings(steps=4, rate=0.003)
        with torch.no_grad():  # as a stage is run
            changes, curve = tune(tunable.weights(first_side, tunable.side), [loss], settings)
            other, _ = tune(tunable.weights(first_side, tunable.side), [loss], TuneSettings(steps=1, rate=0.1))
            again, _ = tune(tunable.weights(first_side, tunable.side), [loss], settings)
            after = loss(changed(tunable.generator, changes))  # type: ignore[attr-defined]
        assert after < 0.97 * curve[0], (tunable, curve)
        assert pack(changes).tobytes() == pack(again).tobytes() != pack(other).tobytes()


def test_what_lies_outside_the_mask_does_not_count(reconstruction: ReconstructionLoss) -> None:
    face, mask, window = noise(1, 3, SIDE, SIDE).clamp(-1, 1), torch.zeros(1, SIDE, SIDE, dtype=torch.bool), Window(0, 0, SIDE)
    mask[:, 20:40, 20:40] = True
    picture = face.clone()
    loss = face_loss(lambda weights: picture, window, face, mask, SIDE, reconstruction)
    assert loss({}) < 1e-6
    picture[..., :16, :] = 0
    assert loss({}) < 1e-6
    picture[..., 30, 30] = -picture[..., 30, 30] + 1
    assert loss({}) > 1e-4


def test_what_is_finer_than_the_compared_size_counts_too(reconstruction: ReconstructionLoss) -> None:
    """A checked pattern that vanishes when the picture is shrunk."""
    face, mask = noise(1, 3, 2 * SIDE, 2 * SIDE).clamp(-1, 1), torch.ones(1, 2 * SIDE, 2 * SIDE, dtype=torch.bool)
    checked = 0.1 * (1 - 2 * ((torch.arange(2 * SIDE)[:, None] + torch.arange(2 * SIDE)) % 2))
    loss = face_loss(lambda weights: face + checked, Window(0, 0, 2 * SIDE), face, mask, SIDE, reconstruction)
    torch.testing.assert_close(loss({}), torch.tensor(0.01), atol=1e-4, rtol=0)


def test_packed_changes_come_back_and_only_their_own_network_takes_them(mobile: MobileStyleGAN, stylegan2: StyleGAN2) -> None:
    changes = {name: 0.01 * noise(*value.shape).half() for name, value in TunableMobile(mobile).weights(512, 512).items()}
    packed = pack(changes)
    assert (packed.dtype, packed.ndim) == (np.uint8, 1)
    back = unpack(packed)
    assert all(torch.equal(back[name], change) for name, change in changes.items()) and back.keys() == changes.keys()
    codes, ids = mobile.mean_w.expand(1, 2, 23, 512), two_regions(64)
    with torch.inference_mode():
        plain = mobile.synthesize(codes, ids)
        nothing = {name: torch.zeros_like(change) for name, change in changes.items()}
        assert torch.equal(run_tuned(mobile, pack(nothing), codes, ids), plain)
        assert not torch.allclose(run_tuned(mobile, packed, codes, ids), plain, atol=0.01)
        assert torch.equal(mobile.synthesize(codes, ids), plain), "the network itself is not touched"
        with pytest.raises(ValueError, match="the network has none: it was made for another generator"):
            run_tuned(stylegan2, packed, noise(1, 2, 10, 16), ids)


def test_what_cannot_work_is_said() -> None:
    weights = {"a": noise(4)}
    with pytest.raises(ValueError, match="at least one face, got none"):
        tune(weights, [], TuneSettings())
    with torch.inference_mode(), pytest.raises(ValueError, match="inference mode"):
        tune(weights, [quadratic(weights)], TuneSettings())
