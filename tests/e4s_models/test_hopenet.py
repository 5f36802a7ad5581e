"""The head pose network against the published one, and the angle its bins mean."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from e4s_models.hopenet import NUM_BINS, PUBLISHED_HOPENET, HopeNet, PoseBins, bins_to_degrees
from e4s_models.published import compare, filled_state, load_published

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def small() -> HopeNet:
    torch.manual_seed(0)
    return HopeNet(counts=(1, 1, 2, 1), width=4).eval()


def test_equals_the_published_network() -> None:
    with np.load(DATA / "hopenet_case0.npz") as stored:
        case = dict(stored)
    spec = json.loads((DATA / "hopenet.json").read_text())
    network = load_published(PUBLISHED_HOPENET, filled_state(PUBLISHED_HOPENET, spec, case))  # refuses keys that do not fit
    with torch.inference_mode():
        outputs = PUBLISHED_HOPENET.run(network, case)
    assert set(outputs) == {"yaw_bins", "pitch_bins", "roll_bins", "degrees"}
    for name, value in outputs.items():
        check = compare("hopenet", "case0", name, value, case[name])
        assert check.passed, check


def test_a_certain_bin_is_its_angle() -> None:
    certain = 1e4 * torch.eye(NUM_BINS)
    bins = PoseBins(yaw=certain[[0, 33]], pitch=certain[[33, 34]], roll=certain[[65, 1]])
    assert bins_to_degrees(bins).tolist() == [[-99, 0, 96], [0, 3, -96]]


def test_two_equal_bins_are_the_angle_between() -> None:
    bins = torch.full((1, NUM_BINS), -1e4)
    bins[0, [40, 42]] = 0
    assert bins_to_degrees(PoseBins(bins, bins, bins)).tolist() == [[24, 24, 24]]


def test_a_batch_equals_its_singles(small: HopeNet) -> None:
    faces = torch.rand(2, 3, 224, 224) * 2 - 1
    with torch.inference_mode():
        degrees = small.degrees(faces)
        assert degrees.shape == (2, 3)
        singles = torch.cat([small.degrees(faces[:1]), small.degrees(faces[1:])])
        torch.testing.assert_close(degrees, singles, rtol=0, atol=1e-3)  # degrees


def test_refuses_another_size(small: HopeNet) -> None:
    with pytest.raises(ValueError, match=r"expected shape \(B, 3, 224, 224\), got \(1, 3, 112, 112\)"):
        small(torch.zeros(1, 3, 112, 112))
