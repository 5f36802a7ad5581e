"""The regional encoder: averages against a loop, absent regions, batches, and that the shipped weights know something."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from e4s_models.code_encoder import LAYER_GROUPS, CodeEncoder, region_average, region_masks, region_shapes
from e4s_models.mobile_stylegan import NUM_LAYERS, MobileStyleGAN
from e4s_models.regions import NUM_REGIONS, Region


def blocks(seed: int = 0, batch: int = 2) -> torch.Tensor:
    """Label maps (B, 128, 128) of patches in the regions 0..9: the last two are absent."""
    ids = np.random.default_rng(seed).integers(0, 10, (batch, 16, 16), np.uint8)
    return torch.from_numpy(ids.repeat(8, axis=1).repeat(8, axis=2))


@pytest.fixture(scope="module")
def encoder() -> CodeEncoder:
    torch.manual_seed(0)
    encoder = CodeEncoder(hidden=32, layout=4)
    encoder.mean_code.normal_()
    return encoder.eval()


@torch.no_grad()
def test_region_average_is_the_mean_under_the_mask() -> None:
    feature, ids = torch.randn(2, 5, 128, 128), blocks()
    averages = region_average(feature, region_masks(ids, 128, torch.float32))
    for item in range(2):
        for region in range(10):
            wanted = feature[item][:, ids[item] == region].mean(dim=1)
            torch.testing.assert_close(averages[item, region], wanted, rtol=1e-4, atol=1e-5)
    assert not averages[:, 10:].any()


def test_masks_of_larger_maps_are_shares_that_sum_to_one() -> None:
    ids = blocks().repeat_interleave(8, 1).repeat_interleave(8, 2)  # 1024 px
    masks = region_masks(ids, 256, torch.float32)
    torch.testing.assert_close(masks.sum(dim=1), torch.ones(2, 256, 256))
    torch.testing.assert_close(masks, region_masks(ids[:, ::4, ::4], 256, torch.float32))


def test_shapes_say_where_a_region_lies() -> None:
    ids = torch.zeros(1, 64, 64, dtype=torch.uint8)
    ids[0, 48:, :32] = int(Region.NOSE)  # bottom left
    area, x, y, spread_x, spread_y = region_shapes(region_masks(ids, 64, torch.float32))[0, Region.NOSE].tolist()
    assert area == pytest.approx((1 / 8) ** 0.5, abs=1e-3)
    assert (x, y) == (pytest.approx(-0.5, abs=0.02), pytest.approx(0.75, abs=0.02))
    assert spread_x > 1.5 * spread_y


@torch.no_grad()
def test_codes_per_region_and_layer_group(encoder: CodeEncoder) -> None:
    faces = torch.rand(2, 3, 256, 256) * 2 - 1
    codes = encoder.codes(faces, blocks())
    assert codes.shape == (2, NUM_REGIONS, NUM_LAYERS, 512)
    starts = (0, *LAYER_GROUPS[:-1])
    for start, end in zip(starts, LAYER_GROUPS, strict=True):
        assert torch.equal(codes[:, :, start:end], codes[:, :, start : start + 1].expand(-1, -1, end - start, -1))
    assert not torch.equal(codes[:, 0, 4], codes[:, 0, 5])
    assert torch.equal(codes[:, 10:], encoder.mean_code.expand_as(codes[:, 10:])), "absent regions take the mean code"
    assert not torch.equal(codes[:, 0], codes[:, 1])


@torch.no_grad()
def test_a_batch_gives_what_single_faces_give_and_size_hardly_matters(encoder: CodeEncoder) -> None:
    faces = torch.nn.functional.interpolate(torch.rand(2, 3, 64, 64) * 2 - 1, (512, 512), mode="bilinear")
    both = encoder(faces, blocks())
    for item in range(2):
        torch.testing.assert_close(encoder(faces[item : item + 1], blocks()[item : item + 1])[0], both[item], rtol=1e-3, atol=1e-4)
    small = torch.nn.functional.interpolate(faces, (256, 256), mode="area")
    torch.testing.assert_close(encoder(small, blocks()), both, rtol=1e-3, atol=1e-4)


def test_what_is_frozen_stays_as_it_is() -> None:
    torch.manual_seed(0)
    encoder = CodeEncoder(hidden=16, layout=4)
    encoder.freeze_early()
    encoder.train()
    before = encoder.trunk.layer2[0].bn1.running_mean.clone()
    late = encoder.trunk.layer4[0].bn1.running_mean.clone()
    encoder(torch.rand(2, 3, 256, 256), blocks())[:, :10].square().mean().backward()
    assert torch.equal(encoder.trunk.layer2[0].bn1.running_mean, before)
    assert not torch.equal(encoder.trunk.layer4[0].bn1.running_mean, late)
    assert encoder.trunk.conv1.weight.grad is None
    assert encoder.trunk.layer3[0].conv1.weight.grad is not None


@pytest.mark.parametrize(
    ("faces", "ids", "message"),
    [
        ((1, 3, 200, 200), (1, 64, 64), "at least 256 px"),
        ((1, 3, 256, 300), (1, 64, 64), "expected shape"),
        ((2, 3, 256, 256), (1, 64, 64), "2 label maps"),
        ((1, 3, 256, 256), (64, 64), "expected shape"),
    ],
)
def test_wrong_inputs_are_named(encoder: CodeEncoder, faces: tuple[int, ...], ids: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(torch.zeros(faces), torch.zeros(ids, dtype=torch.uint8))


def test_the_shipped_encoder_is_nearer_to_the_true_code_than_the_mean_is() -> None:
    from e4s_models.face_parser import FaceParser
    from tasks.parse import BISENET19_TO_REGIONS, parse_labels

    generator, encoder = MobileStyleGAN.load(), CodeEncoder.load()
    z = torch.from_numpy(np.random.default_rng(987654).standard_normal((3, 512), np.float32))
    w = generator.mean_w + 0.7 * (generator.map(z) - generator.mean_w)
    parser = FaceParser.load("cpu")
    gains = []
    with torch.inference_mode():
        for code in w:
            face = generator.synthesize(code.expand(1, NUM_LAYERS, -1).contiguous()).clamp(-1, 1)
            labels = BISENET19_TO_REGIONS[parse_labels(parser, [face[0]], 512)[0].numpy()]
            predicted = encoder(face, torch.from_numpy(labels)[None])[0, Region.SKIN]
            weight = generator.styles()[9].weight.float()
            errors = [(guess - code) @ weight.t() for guess in (predicted[1], encoder.mean_code)]
            gains.append(float(errors[0].norm() / errors[1].norm()))
    assert np.mean(gains) < 0.85
