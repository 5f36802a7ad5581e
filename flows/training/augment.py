"""What a photograph has and a generated picture has not: other light, blur, compression, a crop a little off, something in front."""

from __future__ import annotations

import cv2
import numpy as np

from e4s_models.regions import Region
from tasks.stage import UInt8


def augment(image: UInt8, labels: UInt8, rng: np.random.Generator) -> tuple[UInt8, UInt8]:
    """A changed copy of a picture (H, W, 3) uint8 and its region ids (H, W) uint8. Each change comes with its own chance."""
    if rng.random() < 0.5:
        image, labels = _move(image, labels, rng)
    if rng.random() < 0.5:
        image = _light(image, rng)
    if rng.random() < 0.15:
        image, labels = _occlude(image, labels, rng)
    if rng.random() < 0.3:
        image = _lose_detail(image, rng)
    if rng.random() < 0.3:
        quality = int(rng.integers(35, 95))
        image = np.asarray(cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR), np.uint8)
    if rng.random() < 0.3:
        noise = rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(1, 7))
        image = np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)
    return image, labels


def _move(image: UInt8, labels: UInt8, rng: np.random.Generator) -> tuple[UInt8, UInt8]:
    side = image.shape[0]
    matrix = np.asarray(cv2.getRotationMatrix2D((side / 2, side / 2), rng.normal(0, 1.5), 1 + rng.normal(0, 0.015)), np.float64)
    matrix[:, 2] += rng.normal(0, side * 0.008, 2)
    moved = cv2.warpAffine(image, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    followed = cv2.warpAffine(labels, matrix, (side, side), flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT)
    return np.asarray(moved, np.uint8), np.asarray(followed, np.uint8)


def _light(image: UInt8, rng: np.random.Generator) -> UInt8:
    """Gamma, white balance and a slope of light across the picture, all weak: the code must still say which colour a skin has."""
    side = image.shape[0]
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    slope = rng.normal(0, 0.05, 2)
    field = 1 + slope[0] * axis[None, :] + slope[1] * axis[:, None]
    gain = (1 + rng.normal(0, 0.025, 3)).astype(np.float32)
    lit = (image / np.float32(255)) ** np.float32(np.exp(rng.normal(0, 0.06))) * gain * field[..., None]
    return np.asarray(np.clip(np.rint(lit * 255), 0, 255), np.uint8)


def _occlude(image: UInt8, labels: UInt8, rng: np.random.Generator) -> tuple[UInt8, UInt8]:
    """An ellipse of one colour, which a parser calls background (a hand, a microphone, a leaf)."""
    side = image.shape[0]
    mask = np.zeros((side, side), np.uint8)
    centre, axes = rng.integers(side // 6, side - side // 6, 2).tolist(), rng.integers(side // 20, side // 6, 2).tolist()
    cv2.ellipse(mask, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
    colour = rng.integers(0, 256, 3).astype(np.uint8)
    return np.where(mask[..., None] > 0, colour, image), np.where(mask > 0, np.uint8(Region.BACKGROUND), labels)


def _lose_detail(image: UInt8, rng: np.random.Generator) -> UInt8:
    side = image.shape[0]
    if rng.random() < 0.5:
        return np.asarray(cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.4, 1.6))), np.uint8)
    small = cv2.resize(image, (int(rng.integers(side // 4, side)),) * 2, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (side, side), interpolation=cv2.INTER_LINEAR), np.uint8)
