"""Smooth interpolation of scattered pixel values: normalised blurs and the push-pull pyramid (Gortler et al. 1996)."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


def shrink_area(values: Float32, size: tuple[int, int]) -> Float32:
    """Return `values` (H, W[, C]) averaged by area to `size` (width, height)."""
    return np.asarray(cv2.resize(values, size, interpolation=cv2.INTER_AREA), np.float32)


def blur_normalised(values: Float32, weight: Float32, sigma: float) -> Float32:
    """Return the blur of `values` (H, W, C) weighted by `weight` (H, W) [0, 1]; nothing leaks in where the weight is 0.

    `sigma` is the standard deviation of the Gaussian, px.
    """
    total = cv2.GaussianBlur(weight, (0, 0), sigma)
    blurred = cv2.GaussianBlur(values * weight[..., None], (0, 0), sigma).reshape(values.shape)  # OpenCV drops a single channel
    return np.asarray(blurred / np.maximum(total, 1e-6)[..., None], np.float32)


def fill(values: Float32, weight: Float32) -> Float32:
    """Extend `values` (H, W, C) smoothly from where `weight` (H, W) [0, 1] is high to everywhere."""
    stack = [np.dstack([values * weight[..., None], weight]).astype(np.float32)]
    while min(stack[-1].shape[:2]) > 2:
        stack.append(np.asarray(cv2.pyrDown(stack[-1]), np.float32))
    filled = stack[-1][..., :-1] / np.maximum(stack[-1][..., -1:], 1e-6)
    for level in reversed(stack[:-1]):
        known = np.clip(level[..., -1:], 0, 1)
        up = cv2.pyrUp(filled, dstsize=(level.shape[1], level.shape[0]))
        filled = level[..., :-1] / np.maximum(level[..., -1:], 1e-6) * known + up * (1 - known)
    return np.asarray(filled, np.float32)


def fill_low_frequencies(values: Float32, weight: Float32) -> Float32:
    """Return `fill` of the low frequencies of `values` (H, W, C): computed at a quarter of the resolution."""
    size = (weight.shape[1], weight.shape[0])
    small = (max(2, size[0] // 4), max(2, size[1] // 4))
    share = shrink_area(weight, small)
    coarse = shrink_area(values * weight[..., None], small) / np.maximum(share, 1e-6)[..., None]
    certain = np.clip(2 * cv2.GaussianBlur(share, (0, 0), 4.0) - 0.2, 0, 1).astype(np.float32)
    filled = fill(blur_normalised(np.asarray(coarse, np.float32), share, 4.0), certain)
    return np.asarray(cv2.resize(filled, size, interpolation=cv2.INTER_LINEAR), np.float32)
