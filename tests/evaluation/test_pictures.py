"""SSIM, PSNR and RMSE: against scikit-image, by hand, over regions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from evaluation.psnr import MAX_DB, psnr
from evaluation.rmse import rmse
from evaluation.ssim import ssim

METRICS = (ssim, psnr, rmse)
EQUAL = {ssim: 1.0, psnr: MAX_DB, rmse: 0.0}


def pictures(count: int = 3, height: int = 48, width: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth pictures and noisier ones, the noise growing with the index: two of (B, 3, H, W) float64 [0, 1]."""
    random = np.random.Generator(np.random.PCG64(seed))
    smooth = np.cumsum(random.standard_normal((count, 3, height, width)), axis=3)
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    noise = random.standard_normal(smooth.shape) * np.linspace(0.01, 0.3, count)[:, None, None, None]
    return torch.from_numpy(smooth), torch.from_numpy((smooth + noise).clip(0, 1))


def test_ssim_equals_scikit_image() -> None:
    a, b = pictures()
    expected = [
        structural_similarity(
            x.numpy(), y.numpy(), gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=0
        )
        for x, y in zip(a, b, strict=True)
    ]
    assert expected[0] > 0.9 > expected[1] > expected[2]
    np.testing.assert_allclose(ssim(a, b).numpy(), expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(ssim(a.float(), b.float()).numpy(), expected, rtol=0, atol=1e-6)


def test_psnr_equals_scikit_image() -> None:
    a, b = pictures()
    expected = [peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=1.0) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(a, b).numpy(), expected, rtol=0, atol=1e-10)


def test_error_by_hand() -> None:
    a, b = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    b[0, :, 0, 0] = 0.2  # one pixel of four: MSE 0.01
    assert rmse(a, b).item() == pytest.approx(0.1, abs=1e-8)
    assert psnr(a, b).item() == pytest.approx(20, abs=1e-6)
    corner = torch.tensor([[[True, False], [False, False]]])
    assert rmse(a, b, corner).item() == pytest.approx(0.2, abs=1e-8)
    assert rmse(a, b, ~corner).item() == 0


def test_the_least_difference_of_8_bit_pictures_is_below_equality() -> None:
    a = torch.zeros(1, 3, 1024, 1024, dtype=torch.float64)
    b = a.clone()
    b[0, 0, 0, 0] = 1 / 255
    assert psnr(a, b).item() == pytest.approx(113.1, abs=0.05)
    assert psnr(a, b).item() < MAX_DB


@pytest.mark.parametrize("metric", METRICS)
def test_equal_pictures(metric: Callable[..., Tensor]) -> None:
    a, _ = pictures()
    assert metric(a, a).tolist() == [EQUAL[metric]] * 3


@pytest.mark.parametrize("metric", METRICS)
def test_batch_equals_singles(metric: Callable[..., Tensor]) -> None:
    a, b = pictures()
    where = torch.rand(3, 48, 40, generator=torch.Generator().manual_seed(0)) > 0.5
    for arguments in ((a, b), (a, b, where)):
        singles = [metric(*(argument[index : index + 1] for argument in arguments)) for index in range(3)]
        assert torch.equal(metric(*arguments), torch.cat(singles))


@pytest.mark.parametrize("metric", METRICS)
def test_only_the_region_counts(metric: Callable[..., Tensor]) -> None:
    a, b = pictures(1)
    where = torch.zeros(1, 48, 40, dtype=torch.bool)
    where[..., :16] = True
    mixed = torch.where(torch.arange(40) < 16 + 5, a, b)  # equal in the region and as far as a window reaches beyond it
    assert metric(mixed, a, where).item() == EQUAL[metric]
    assert metric(mixed, a).item() != EQUAL[metric]
    everything = torch.ones_like(where)
    torch.testing.assert_close(metric(a, b, everything), metric(a, b), rtol=1e-12, atol=0)
    assert metric(a, b, ~everything).isnan().all()  # an empty region has no value


@pytest.mark.parametrize("metric", METRICS)
def test_an_empty_batch_gives_no_values(metric: Callable[..., Tensor]) -> None:
    assert metric(torch.zeros(0, 3, 16, 16), torch.zeros(0, 3, 16, 16)).shape == (0,)


@pytest.mark.parametrize("metric", METRICS)
def test_wrong_inputs_are_refused(metric: Callable[..., Tensor]) -> None:
    a, b = pictures(1)
    with pytest.raises(ValueError, match=r"\[0, 1\], got values from -1 to"):
        metric(a * 2 - 1 - a.min() * 2, b)
    with pytest.raises(ValueError, match="of one shape"):
        metric(a, b[..., 1:])
    with pytest.raises(ValueError, match=r"dtype bool, got torch\.float64"):
        metric(a, b, a[:, 0])
    with pytest.raises(ValueError, match=r"expected shape \(B, 3, H, W\)"):
        metric(a[0], b[0])


def test_ssim_of_a_picture_smaller_than_its_window_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 11 px, got 10x16 px"):
        ssim(torch.zeros(1, 3, 16, 10), torch.zeros(1, 3, 16, 10))
