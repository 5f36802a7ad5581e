"""The restoration network's names and shapes against the published file, its arithmetic on small configurations.

`check_reference` compares its pictures with the published network's.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import conv2d

from e4s_models.gpen import PUBLISHED_GPEN, Gpen, _blur, _blur_kernel, _ModulatedConv, _ToRgb

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def small() -> Gpen:
    torch.manual_seed(0)
    network = Gpen(side=32, widest=8, latent=16, mapping_layers=2).eval()
    for name, parameter in network.named_parameters():
        if name.endswith(("bias", "detail_gain")):
            torch.nn.init.normal_(parameter)
    return network.requires_grad_(False)


def test_names_and_shapes_are_the_published_ones() -> None:
    entries = json.loads((DATA / "gpen.json").read_text())["keys"]
    published = {ours: tuple(entry["shape"]) for key, entry in entries.items() if (ours := PUBLISHED_GPEN.rename(key)) is not None}
    with torch.device("meta"):
        network = Gpen()
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == published


def test_a_batch_equals_its_singles(small: Gpen) -> None:
    faces = torch.rand(2, 3, 32, 32) * 2 - 1
    restored = small(faces)
    assert restored.shape == faces.shape
    torch.testing.assert_close(restored, torch.cat([small(faces[:1]), small(faces[1:])]))
    assert not torch.allclose(restored[0], restored[1])
    assert torch.equal(restored, small(faces))  # no random noise


def test_modulated_convolution_equals_one_with_each_samples_own_weights() -> None:
    torch.manual_seed(0)
    layer = _ModulatedConv(4, 5, 3, 6, demodulate=True)
    x, latent = torch.randn(2, 4, 7, 9), torch.randn(2, 6)
    expected = []
    for features, gains in zip(x, layer.modulation(latent), strict=True):
        weight = layer.scale * layer.weight[0] * gains[None, :, None, None]
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        expected.append(conv2d(features[None], weight, padding=1))
    torch.testing.assert_close(layer(x, latent), torch.cat(expected))


def test_blur_and_enlarging_keep_a_flat_picture() -> None:
    flat = torch.full((1, 3, 8, 8), 0.7)
    torch.testing.assert_close(_blur(flat, _blur_kernel(1), padding=0), flat[:, :, :5, :5])
    layer = _ToRgb(2, 4)
    torch.nn.init.zeros_(layer.conv.weight)
    enlarged = layer(torch.zeros(1, 2, 16, 16), torch.zeros(1, 4), flat)
    torch.testing.assert_close(enlarged[:, :, 1:-1, 1:-1], torch.full((1, 3, 14, 14), 0.7))


def test_refuses_another_size(small: Gpen) -> None:
    with pytest.raises(ValueError, match=r"expected shape \(B, 3, 32, 32\), got \(1, 3, 64, 64\)"):
        small(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="power of 2"):
        Gpen(side=500)
