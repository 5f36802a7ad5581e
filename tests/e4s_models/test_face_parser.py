"""The parser against what the published network computes, and on real weights."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from e4s_models.face_parser import NUM_CLASSES, FaceParser
from e4s_models.weights import WeightsError, load_strict

DATA = Path(__file__).parents[1] / "data"


def filled_state(seed: int) -> dict[str, torch.Tensor]:
    """A state dict with the published keys, filled by key from `seed` as the reference was."""
    state = {}
    for key, entry in json.loads((DATA / "bisenet.json").read_text())["keys"].items():
        rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())]))
        value = np.zeros(entry["shape"], entry["dtype"])
        if entry["kind"] != "zero":
            value = rng.standard_normal(entry["shape"]).astype(np.float32) * np.float32(entry["std"]) + np.float32(entry["mean"])
        if entry["kind"] == "positive":
            value = np.abs(value) + np.float32(0.5)
        state[key] = torch.from_numpy(np.asarray(value))
    return state


def test_keys_are_the_published_ones() -> None:
    published = {key: tuple(entry["shape"]) for key, entry in json.loads((DATA / "bisenet.json").read_text())["keys"].items()}
    assert {key: tuple(value.shape) for key, value in FaceParser().state_dict().items()} == published


def test_equals_the_published_network() -> None:
    with np.load(DATA / "bisenet_case0.npz") as case:
        image, expected, classes, seed = case["image_u8"], case["logits_sub"], case["argmax_u8"], int(case["weight_seed"])
    parser = FaceParser().eval()
    load_strict(parser, filled_state(seed), "bisenet")
    with torch.inference_mode():
        logits = parser(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1)
    assert logits.shape == (1, NUM_CLASSES, 512, 512)
    assert np.abs(logits[:, :, ::16, ::16].numpy() - expected).max() <= 1e-4 * np.abs(expected).max()
    assert (logits.argmax(dim=1)[0].numpy() == classes).mean() >= 0.999


def test_refuses_a_checkpoint_that_does_not_fit() -> None:
    state = filled_state(0)
    del state["ffm.conv1.weight"]
    state["conv_out.conv_out.weight"] = torch.zeros(12, 256, 1, 1)
    with pytest.raises(WeightsError, match=r"missing ffm\.conv1\.weight.*misshapen conv_out\.conv_out\.weight"):
        load_strict(FaceParser(), state, "bisenet")


def test_refuses_a_picture_without_batch() -> None:
    with pytest.raises(ValueError, match=r"expected shape \(B, 3, H, W\), got \(3, 64, 64\)"):
        FaceParser()(torch.zeros(3, 64, 64))


def test_load_gives_a_frozen_network_that_repeats_itself() -> None:
    parser = FaceParser.load("cpu")
    assert not parser.training
    assert not any(parameter.requires_grad for parameter in parser.parameters())
    face = torch.linspace(-1, 1, 3 * 64 * 96).reshape(1, 3, 64, 96)
    assert torch.equal(parser(face), parser(face))
    assert parser(face).shape == (1, NUM_CLASSES, 64, 96)
