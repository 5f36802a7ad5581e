"""Regional GAN inversion: key names, encoder, code mapper and the whole on a small configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from e4s_models.published import load_published
from e4s_models.regions import NUM_REGIONS
from e4s_models.rgi import PUBLISHED_RGI, RGI, rename
from e4s_models.rgi_encoder import CodeMapper, RegionEncoder, region_means
from e4s_models.stylegan2 import Regions, StyleGAN2
from e4s_models.weights import WeightsError

DATA = Path(__file__).parents[1] / "data"


def small() -> RGI:
    torch.manual_seed(0)
    encoder = RegionEncoder(widths=(16, 16, 16, 32, 32), depths=(1, 2, 1, 2), side=64)
    network = RGI(encoder=encoder, generator=StyleGAN2(16, region_layers=4, max_width=16, code_dim=8))
    network.mapper.latent_avg.normal_()
    return network


def faces_and_ids(batch: int = 2) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, NUM_REGIONS, (batch, 32, 32), generator=draw)
    return torch.rand(batch, 3, 64, 64, generator=draw) * 2 - 1, ids.to(torch.uint8)


def test_keys_are_the_published_ones() -> None:
    shapes: dict[str, list[int]] = json.loads((DATA / "rgi_keys.json").read_text()) | {"latent_avg": [18, 512]}
    renamed = {ours: tuple(shape) for key, shape in shapes.items() if (ours := rename(key)) is not None}
    with torch.device("meta"):
        network = RGI()
    assert renamed == {key: tuple(value.shape) for key, value in network.state_dict().items()}
    dropped = [key for key in shapes if rename(key) is None]
    assert all(key.startswith("G.style.") or key.endswith(".kernel") for key in dropped)


def test_refuses_a_checkpoint_that_does_not_fit() -> None:
    declared = replace(PUBLISHED_RGI, build=small)
    with pytest.raises(WeightsError, match="missing"):
        load_published(declared, {"module.encoder.input_layer.0.weight": torch.zeros(16, 3, 3, 3)})


def test_region_means_of_a_known_map() -> None:
    features = torch.tensor([[[[1.0, 2.0], [3.0, 8.0]]]])
    ids = torch.tensor([[[0, 0], [0, 2]]], dtype=torch.uint8)
    assert region_means(features, Regions(ids, 3)).tolist() == [[[2.0], [0.0], [8.0]]]


def test_absent_regions_have_zero_vectors() -> None:
    faces, _ = faces_and_ids(1)
    vectors = small().style_vectors(faces, torch.full((1, 32, 32), 5, dtype=torch.uint8))
    assert vectors.shape == (1, NUM_REGIONS, 16 + 32 + 32)
    assert [bool(row.any()) for row in vectors[0]] == [region == 5 for region in range(NUM_REGIONS)]


def test_later_layers_take_the_average_code() -> None:
    mapper = CodeMapper(vector_dim=6, num_regions=2, num_layers=5, region_layers=3, code_dim=4)
    mapper.latent_avg.copy_(torch.arange(20.0).view(5, 4))
    codes = mapper(torch.randn(2, 2, 6))
    assert codes.shape == (2, 2, 5, 4)
    assert torch.equal(codes[:, :, 3:], mapper.latent_avg[3:].expand(2, 2, -1, -1))
    assert not torch.isclose(codes[:, :, :3], mapper.latent_avg[:3]).any()
    assert not torch.isclose(mapper(torch.ones(1, 2, 6))[0, 0, :3], mapper(torch.ones(1, 2, 6))[0, 1, :3]).any()


def test_batch_of_two_is_two_singles() -> None:
    network, (faces, ids) = small(), faces_and_ids()
    with torch.inference_mode():
        both = network(faces, ids)
        assert both.shape == (2, 3, 16, 16)
        singles = torch.cat([network(faces[i : i + 1], ids[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(both, singles, rtol=1e-3, atol=1e-4)


def test_larger_faces_are_resized() -> None:
    network, (faces, ids) = small(), faces_and_ids(1)
    twice = faces.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # bilinear halving of it gives back the face
    torch.testing.assert_close(network.style_vectors(twice, ids), network.style_vectors(faces, ids), rtol=1e-4, atol=1e-5)


def test_training_reaches_every_parameter() -> None:
    network, (faces, ids) = small(), faces_and_ids(1)
    network(faces, ids).square().mean().backward()
    idle = [key for key, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert [key for key in idle if ".excite." not in key] == []


def test_refuses_what_does_not_fit() -> None:
    network, (faces, ids) = small(), faces_and_ids()
    with pytest.raises(ValueError, match=r"expected shape \(B, 3, S, S\), got \(3, 64, 64\)"):
        network.style_vectors(faces[0], ids)
    with pytest.raises(ValueError, match="expected 2 label maps for 2 faces, got 1"):
        network.style_vectors(faces, ids[:1])
    with pytest.raises(ValueError, match="region ids go up to 12"):
        network.style_vectors(faces, torch.full_like(ids, 12))
    with pytest.raises(ValueError, match=r"expected shape \(B, 12, 80\), got \(2, 11, 80\)"):
        network.style_codes(torch.zeros(2, 11, 80))
