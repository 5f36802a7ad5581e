"""What makes a picture look like a photograph somebody took: light, camera, scaling and compression; and what lies on a face without
being in front of it. Labels follow the changes of place; everything is decided by `rng`.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from e4s_models.regions import INNER_FACE, Region
from tasks.stage import Float32, UInt8


def photograph(image: UInt8, rng: np.random.Generator) -> UInt8:
    """A picture (S, S, 3) uint8 as another camera in another light would show it; each change comes with its own chance."""
    picture = image.astype(np.float32) / np.float32(255)
    if rng.random() < 0.7:
        picture = expose(picture, rng)
    if rng.random() < 0.3:
        picture = picture * side_light(len(image), rng)[..., None]
    if rng.random() < 0.2:
        picture = picture * _vignette(len(image), rng)[..., None]
    changed = np.asarray(np.clip(np.rint(picture * 255), 0, 255), np.uint8)
    if rng.random() < 0.4:
        changed = _lose_detail(changed, rng)
    if rng.random() < 0.35:
        changed = _add_noise(changed, rng)
    if rng.random() < 0.4:
        changed = _compress(changed, rng)
    return changed


def expose(picture: Float32, rng: np.random.Generator) -> Float32:
    """Gamma, white balance, contrast and saturation of RGB (S, S, 3) in [0, 1]."""
    lit = np.clip(picture, 0, 1) ** np.float32(math.exp(rng.normal(0, 0.3)))
    warmth = rng.normal(0, 0.09)
    lit = lit * np.array([1 + warmth, 1 + rng.normal(0, 0.03), 1 - warmth], np.float32) * np.float32(math.exp(rng.normal(0, 0.12)))
    gray = lit.mean(axis=2, keepdims=True)
    saturation = 0.0 if rng.random() < 0.04 else math.exp(rng.normal(0, 0.25))
    lit = gray + np.float32(saturation) * (lit - gray)
    middle = np.float32(lit.mean())
    return np.asarray(middle + np.float32(math.exp(rng.normal(0, 0.15))) * (lit - middle), np.float32)


def side_light(side: int, rng: np.random.Generator) -> Float32:
    """Brightness (S, S) of a lamp to one side: a slope that may be as steep as the edge of a shadow."""
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    angle, steep = rng.uniform(0, 2 * math.pi), rng.uniform(1, 6)
    across = math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None] + np.float32(rng.normal(0, 0.3))
    return np.asarray(1 + np.float32(rng.uniform(0.1, 0.65)) * np.tanh(np.float32(steep) * across) * np.float32(0.7), np.float32)


def cast_shadow(image: UInt8, rng: np.random.Generator) -> UInt8:
    """A shadow with a sharp or a soft edge on the picture (S, S, 3): dark, but nothing is in front."""
    side = len(image)
    grid = rng.standard_normal((5, 5), np.float32)
    field = np.asarray(cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC), np.float32)
    if rng.random() < 0.5:
        axis = np.linspace(-1, 1, side, dtype=np.float32)
        angle = rng.uniform(0, 2 * math.pi)
        field = field * np.float32(0.15) + np.float32(math.cos(angle)) * axis[None, :] + np.float32(math.sin(angle)) * axis[:, None]
    shadow = 1 / (1 + np.exp(-np.clip((field - rng.normal(0.2, 0.3)) * rng.uniform(4, 60), -30, 30)))
    tint = np.array([1.0, 1.0, rng.uniform(0.9, 1.15)], np.float32)
    factor = 1 - shadow[..., None] * np.float32(rng.uniform(0.25, 0.75)) * tint
    return np.asarray(np.clip(np.rint(image * factor), 0, 255), np.uint8)


def make_up(image: UInt8, labels: UInt8, rng: np.random.Generator) -> UInt8:
    """Coloured lips, lids or cheeks, and stubble: part of the face."""
    region = (Region.LIPS, Region.EYES, Region.SKIN)[int(rng.integers(3))]
    mask = (labels == region).astype(np.uint8)
    if region == Region.EYES:
        mask = cv2.dilate(mask, np.ones((7, 7), np.uint8)) & (labels != Region.EYES)
    if region == Region.SKIN:
        rows = np.nonzero(np.isin(labels, INNER_FACE))[0]
        level = np.percentile(rows, 70) if len(rows) else len(image)
        mask = mask * (np.arange(len(image))[:, None] > level)
    soft = np.asarray(cv2.GaussianBlur(mask.astype(np.float32), (0, 0), len(image) / 100), np.float32)[..., None]
    if region == Region.SKIN:  # stubble
        soft = soft * (rng.random((*mask.shape, 1)) < rng.uniform(0.3, 0.8))
        colour = np.array([45, 35, 30], np.float32)
    else:
        colour = rng.uniform(20, 230, 3).astype(np.float32)
    return np.clip(np.rint(image + soft * rng.uniform(0.2, 0.7) * (colour - image)), 0, 255).astype(np.uint8)


def moved(image: UInt8, labels: UInt8, rng: np.random.Generator) -> tuple[UInt8, UInt8]:
    """Mirrored as often as not, and a little turned, scaled and shifted, as crops of real faces are."""
    if rng.random() < 0.5:
        image, labels = np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(labels[:, ::-1])
    side = len(image)
    matrix = np.asarray(cv2.getRotationMatrix2D((side / 2, side / 2), rng.normal(0, 4), 1 + rng.normal(0, 0.05)), np.float64)
    matrix[:, 2] += rng.normal(0, side * 0.02, 2)
    followed = cv2.warpAffine(labels, matrix, (side, side), flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT)
    turned = cv2.warpAffine(image, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return np.asarray(turned, np.uint8), np.asarray(followed, np.uint8)


def _vignette(side: int, rng: np.random.Generator) -> Float32:
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    return np.asarray(1 - np.float32(rng.uniform(0.1, 0.5)) * (axis[None, :] ** 2 + axis[:, None] ** 2) / 2, np.float32)


def _lose_detail(image: UInt8, rng: np.random.Generator) -> UInt8:
    side, way = len(image), rng.random()
    if way < 0.4:
        return np.asarray(cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.4, 2.0))), np.uint8)
    if way < 0.5:
        length = int(rng.integers(3, 9))
        kernel = np.eye(length, dtype=np.float32) if rng.random() < 0.5 else np.ones((1, length), np.float32)
        return np.asarray(cv2.filter2D(image, -1, kernel / kernel.sum()), np.uint8)
    ways = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)
    small = cv2.resize(image, (int(rng.integers(side // 4, side)),) * 2, interpolation=ways[int(rng.integers(2))])
    return np.asarray(cv2.resize(small, (side, side), interpolation=ways[int(rng.integers(1, 3))]), np.uint8)


def _add_noise(image: UInt8, rng: np.random.Generator) -> UInt8:
    shape = image.shape if rng.random() < 0.6 else (*image.shape[:2], 1)
    noise = rng.standard_normal(shape, np.float32) * np.float32(rng.uniform(1, 12))
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


def _compress(image: UInt8, rng: np.random.Generator) -> UInt8:
    encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(25, 95))])[1]
    return np.ascontiguousarray(np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), np.uint8)[..., ::-1])
