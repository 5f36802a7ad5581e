"""LPIPS against what the `lpips` package computes (see record_lpips.py), and the metric on pictures in [0, 1]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from record_lpips import SHAPES, pictures

from e4s_models.lpips_net import Lpips
from evaluation.lpips import lpips

RECORDED = np.load(Path(__file__).parents[1] / "data" / "lpips.npz")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.inference_mode()
def test_equals_the_package(network: Lpips, shape: tuple[int, int]) -> None:
    first, second = pictures(*shape)[:, None] * 2 - 1
    name = f"{shape[0]}x{shape[1]}"
    expected = float(RECORDED[f"value_{name}"])
    assert expected > 0.05
    assert network(first, second).item() == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(network.spatial(first, second)[0, 3::16, 5::16].numpy(), RECORDED[f"map_{name}"], rtol=0, atol=1e-5)


def test_equals_the_package_where_it_imports(network: Lpips) -> None:
    try:
        import lpips as package
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"lpips does not import here, the recorded values stand for it: {error}")
    first, second = pictures(64, 64)[:, None] * 2 - 1
    with torch.inference_mode():
        expected = package.LPIPS(net="alex", verbose=False)(first, second).item()
    assert network(first, second).item() == pytest.approx(expected, abs=1e-6)


def test_metric_reads_unit_pictures_one_by_one(network: Lpips) -> None:
    first, second = pictures(64, 64)[:, None]
    a, b = torch.cat([first, second, first]), torch.cat([second, second, first])
    values = lpips(network, a, b)
    assert values.dtype == torch.float64 and values.tolist()[1:] == [0, 0]
    assert values[0].item() == pytest.approx(float(RECORDED["value_64x64"]), abs=1e-6)
    assert torch.equal(values, torch.cat([lpips(network, a[i : i + 1], b[i : i + 1]) for i in range(3)]))


def test_only_the_region_counts(network: Lpips) -> None:
    first, second = pictures(200, 256)[:, None]
    left = torch.zeros(1, 200, 256, dtype=torch.bool)
    left[..., :20] = True
    changed = torch.where(torch.arange(256) >= 240, second, first)
    assert lpips(network, changed, first, left).item() < 1e-3 < lpips(network, changed, first, ~left).item()


def test_gradients_reach_the_picture(network: Lpips) -> None:
    first, second = (picture.clone().requires_grad_() for picture in pictures(64, 64)[:, None])
    network(first, second.detach()).sum().backward()
    assert first.grad is not None and float(first.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in network.parameters())


def test_wrong_inputs_are_refused(network: Lpips) -> None:
    with pytest.raises(ValueError, match="at least 35 px, got 32x64 px"):
        network(torch.zeros(1, 3, 64, 32), torch.zeros(1, 3, 64, 32))
    with pytest.raises(ValueError, match=r"expected shape \(1, 3, 64, 64\), got \(2, 3, 64, 64\)"):
        network(torch.zeros(1, 3, 64, 64), torch.zeros(2, 3, 64, 64))
