"""The recoloring network: names of the published checkpoint, the region correlation against a dense one, guidance seen by hand."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from e4s_models import recolor_net
from e4s_models.recolor_net import PUBLISHED_RECOLOR, REGIONS, RecolorNet, attend_chunked
from e4s_models.regions import Region

DATA = Path(__file__).parents[1] / "data"
SIDE = 64


@pytest.fixture(scope="module")
def network() -> RecolorNet:
    torch.manual_seed(0)
    small = RecolorNet(width=4).eval().requires_grad_(False)
    small.sharpness.fill_(5.0)  # far from a plain mean
    return small


def face(*parts: tuple[Region, int, int], side: int = SIDE) -> Tensor:
    """Region ids (1, side, side) with the given (region, first row, last row) in the middle columns, background elsewhere."""
    ids = torch.zeros(1, side, side, dtype=torch.uint8)
    for region, top, bottom in parts:
        ids[:, top:bottom, side // 4 : -side // 4] = region
    return ids


def pictures(seed: int, count: int = 1, side: int = SIDE) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


FACE = face((Region.HAIR, 12, 24), (Region.SKIN, 24, 48))
OTHER = face((Region.HAIR, 8, 24), (Region.SKIN, 24, 52), (Region.LIPS, 40, 44))


def test_names_are_the_published_ones() -> None:
    published = {PUBLISHED_RECOLOR.rename(key): shape for key, shape in json.loads((DATA / "recolor.json").read_text()).items()}
    with torch.device("meta"):
        network = RecolorNet()
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == published


def test_gives_a_picture_and_repeats_itself(network: RecolorNet) -> None:
    recolored = network(pictures(0), pictures(1), FACE, OTHER)
    assert recolored.shape == (1, 3, SIDE, SIDE)
    assert recolored.abs().max() <= 1
    assert torch.equal(recolored, network(pictures(0), pictures(1), FACE, OTHER))


def test_bfloat16_is_close(network: RecolorNet) -> None:
    exact = network(pictures(0), pictures(1), FACE, OTHER)
    with torch.autocast("cpu", torch.bfloat16):
        lower = network(pictures(0), pictures(1), FACE, OTHER)
    assert 0 < (lower.float() - exact).abs().max() < 0.1


def test_flip_mirrors_what_the_features_see(network: RecolorNet) -> None:
    plain, flipped = (network.guide(pictures(0), pictures(1), FACE, OTHER, flip) for flip in (False, True))
    assert not torch.allclose(plain[:, :6], flipped[:, :6], atol=1e-5)
    assert torch.equal(plain[:, 6:], flipped[:, 6:])


def test_batch_equals_singles(network: RecolorNet) -> None:
    empty = torch.zeros_like(FACE)
    animated, target = pictures(0, 4), pictures(1, 4)
    animated_ids, target_ids = torch.cat([FACE, OTHER, FACE, empty]), torch.cat([OTHER, OTHER, empty, FACE])
    together = network(animated, target, animated_ids, target_ids)
    alone = [network(*(item[None] for item in items)) for items in zip(animated, target, animated_ids, target_ids, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_guidance_takes_each_regions_own_color(network: RecolorNet) -> None:
    colors = {Region.SKIN: (1.0, -1.0, -1.0), Region.HAIR: (-1.0, -1.0, 1.0), Region.BACKGROUND: (-1.0, 1.0, -1.0)}
    target_ids = face((Region.HAIR, 8, 24), (Region.SKIN, 24, 52))
    target = sum((target_ids == region)[:, None] * torch.tensor(color).view(1, 3, 1, 1) for region, color in colors.items())
    assert isinstance(target, Tensor)
    guidance = network.guide(pictures(0), target, FACE, target_ids)
    head, ring, head_mask, ring_mask, gray, background = torch.split(guidance, [3, 3, 1, 1, 1, 3], dim=1)
    torch.testing.assert_close(head[0, :, 36, 32], torch.tensor([1.0, 0.0, 0.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(head[0, :, 18, 32], torch.tensor([0.0, 0.0, 1.0]), atol=1e-5, rtol=0)
    assert not head[0, :, 0, 0].any()
    torch.testing.assert_close(ring[0, 1][ring_mask[0, 0].bool()].max(), torch.tensor(1.0))
    assert torch.equal(head_mask[0, 0].bool(), FACE[0] != 0)
    margin = 3  # px, a twentieth of 64
    assert ring_mask[0, 0, 12 - 4 - margin : 12, 32].all()  # from the target's hair, 4 px above
    assert not ring_mask[0, 0, 12 - 4 - margin - 1, 32]
    rgb = (pictures(0)[0, :, 36, 32] + 1) / 2
    torch.testing.assert_close(gray[0, 0, 36, 32], rgb @ torch.tensor([0.299, 0.587, 0.114]))
    assert not background[0, :, 36, 32].any()
    torch.testing.assert_close(background[0, 1, 0, 0], torch.tensor((1 - 0.456) / 0.224))


def test_a_single_common_part_guides_nothing(network: RecolorNet) -> None:
    whole = torch.full_like(FACE, Region.SKIN)  # no ring is left
    assert not network.guide(pictures(0), pictures(1), whole, whole)[:, :6].any()
    half = whole.clone()
    half[:, : SIDE // 2] = Region.HAIR
    assert network.guide(pictures(0), pictures(1), half, half)[:, :3].any()


def test_regions_without_a_color_are_the_background() -> None:
    assert set(Region) - set(REGIONS) == {Region.BACKGROUND, Region.NECK, Region.GLASSES, Region.EAR_RINGS}


def rows(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    valid = torch.ones(2, 23, dtype=torch.bool)
    valid[1, 9:] = False
    return torch.randn(2, 17, 5, generator=rng), torch.randn(2, 23, 5, generator=rng), torch.rand(2, 23, 3, generator=rng), valid


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])
def test_chunked_correlation_equals_the_dense_one(chunk: int, grad: bool) -> None:
    query, key, colors, valid = rows()
    expected = torch.stack(
        [
            torch.softmax(query[0] @ key[0].T, dim=-1) @ colors[0],
            torch.softmax(query[1] @ key[1, :9].T, dim=-1) @ colors[1, :9],
        ]
    )
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(attend_chunked(query, key, colors, valid, chunk), expected)


def test_chunked_gradient_equals_the_dense_one() -> None:
    gradients = []
    for chunk in (100, 1 << 22):
        query, key, colors, valid = rows()
        attend_chunked(query.requires_grad_(), key.requires_grad_(), colors, valid, chunk).square().sum().backward()  # type: ignore[no-untyped-call]
        assert query.grad is not None and key.grad is not None
        gradients.append((query.grad, key.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_correlations_never_exceed_the_chunk(monkeypatch: pytest.MonkeyPatch, network: RecolorNet) -> None:
    sizes: list[int] = []
    attend, attend_rows = recolor_net._attend, recolor_net.attend_chunked

    def counted(query: Tensor, key: Tensor, colors: Tensor, valid: Tensor) -> Tensor:
        sizes.append(len(query) * query.shape[1] * key.shape[1])
        return attend(query, key, colors, valid)

    expected = network(pictures(0), pictures(1), FACE, OTHER)
    monkeypatch.setattr(recolor_net, "_attend", counted)
    monkeypatch.setattr(recolor_net, "attend_chunked", partial(attend_rows, chunk=200))
    torch.testing.assert_close(network(pictures(0), pictures(1), FACE, OTHER), expected, atol=1e-5, rtol=0)
    assert len(sizes) > 10
    assert max(sizes) <= 200


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    network = RecolorNet(width=4)
    network(pictures(0, 2), pictures(1, 2), FACE.expand(2, -1, -1), OTHER.expand(2, -1, -1)).square().sum().backward()
    assert [name for name, value in network.named_parameters() if value.grad is None or not value.grad.isfinite().all()] == []
    assert network.sharpness.grad
    assert network.features.conv1.weight.requires_grad


def test_says_what_does_not_fit(network: RecolorNet) -> None:
    with pytest.raises(ValueError, match=r"expected shape \(1, 3, 64, 64\), got \(1, 3, 32, 32\)"):
        network(pictures(0), pictures(0, side=32), FACE, FACE)
    with pytest.raises(ValueError, match=r"expected shape \(1, 64, 64\), got \(1, 1, 64, 64\)"):
        network(pictures(0), pictures(0), FACE[None], FACE)
    with pytest.raises(ValueError, match=r"multiples of 8, got 60 x 60"):
        network(pictures(0, side=60), pictures(0, side=60), FACE[:, :60, :60], FACE[:, :60, :60])
