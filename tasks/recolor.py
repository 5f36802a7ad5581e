"""Stage `recolor`: the target's skin tone and light on the swapped face, the source's own detail kept.

Backend `guided` follows the idea of Eq. 11-13 with hand-made features in place of learned ones: every swapped skin pixel attends, at
low resolution, to target skin pixels that lie near it and are as bright within their own face; the colours it gathers are the colour
guidance. Only the smooth, robust part of the change towards it is carried to full resolution, as a gain on linear light.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape
from e4s_models.regions import Region
from tasks.light import DARKEST, LUMINANCE, SKIN, read_target_skin, shrink, to_linear
from tasks.stage import Cost, Float32, Inputs, Outputs, Stage, UInt8, each

_MIN_PIXELS = 24  # low-resolution skin pixels below which a face's statistics mean nothing


@dataclass(frozen=True, kw_only=True)
class GuidedConfig:
    side: int = 64  # px, resolution of the correlation; cost grows with its 4th power (published: 64)
    near: float = 0.08  # standard deviation of the position weight, as a fraction of the crop's side
    alike: float = 1.0  # standard deviation of the luminance weight, in robust deviations of each face's skin luminance
    smooth: float = 0.045  # standard deviation of the local part of the change, as a fraction of the side
    local_limit: tuple[float, float] = (0.7, 0.3)  # nats, furthest a place may be darkened or brightened beyond the fitted change
    hue_limit: float = 0.35  # nats, furthest a channel may depart from the others locally
    least_contrast: float = 0.6  # share of its contrast that a face in hard light keeps at least
    side_smooth: float = 0.05  # standard deviation of the one-sided part of the change, as a fraction of the side
    side_limit: float = 1.0  # nats, furthest that part may go
    highlight: float = 1.12  # times the skin's level: light above this is mirrored and is not amplified
    max_gain: float = 6.0  # largest gain of linear light, up or down
    keep_white: float = 0.6  # share of the change of hue, and half that of a brightening, that eyes and teeth are spared
    keep_dark: float = 0.5  # share of a brightening that the darkest features (brows, beard, lashes) are spared


@dataclass(frozen=True)
class NoneConfig:
    """No settings."""


def _to_srgb(linear: Float32) -> UInt8:
    """Linear light [0, 1] -> sRGB byte."""
    steps = np.linspace(0, 1, 4097, dtype=np.float32)
    table = np.rint(255 * np.where(steps <= 0.0031308, steps * 12.92, 1.055 * steps ** (1 / 2.4) - 0.055)).astype(np.uint8)
    return np.asarray(table[(linear * 4096 + 0.5).astype(np.int32)], np.uint8)


def _spread(log_luminance: Float32) -> float:
    """Robust standard deviation: the scaled median absolute deviation, at least 0.05."""
    return max(1.4826 * float(np.median(np.abs(log_luminance - np.median(log_luminance)))), 0.05)


def _standardise(log_luminance: Float32) -> Float32:
    """Robust z-scores: median 0, robust deviation 1."""
    return np.asarray((log_luminance - np.median(log_luminance)) / _spread(log_luminance), np.float32)


def _trust(z: Float32) -> Float32:
    """Weight in (0, 1] that a pixel shows bare skin: dark outliers (beard, strands, moles) count little."""
    return np.exp(-0.5 * np.maximum(-z - 1, 0) ** 2).astype(np.float32)


def colour_guidance(
    swapped: Float32, target: Float32, swapped_at: Float32, target_at: Float32, config: GuidedConfig
) -> tuple[Float32, Float32]:
    """Target colour that each swapped pixel should take: softmax attention over target pixels (Eq. 11-13).

    `swapped` (N, 3) and `target` (M, 3) are linear RGB, `swapped_at` (N, 2) and `target_at` (M, 2) positions as fractions of the
    side. Returns the log colours gathered, (N, 3), and a weight in [0, 1] for each, (N,).
    """
    bright_s = _standardise(np.log(np.maximum(swapped @ LUMINANCE, DARKEST)))
    bright_t = _standardise(np.log(np.maximum(target @ LUMINANCE, DARKEST)))
    features_s = np.column_stack([swapped_at / config.near, np.clip(bright_s, -2, 2) / config.alike]).astype(np.float32)
    features_t = np.column_stack([target_at / config.near, np.clip(bright_t, -2, 2) / config.alike]).astype(np.float32)
    # -|a - b|^2 / 2 up to a term that the softmax over b cancels
    scores = features_s @ features_t.T - 0.5 * (features_t**2).sum(axis=1)
    attention = np.exp(scores - scores.max(axis=1, keepdims=True)) * _trust(bright_t)
    total = attention.sum(axis=1)
    gathered = attention @ np.log(np.maximum(target, DARKEST)) / np.maximum(total, 1e-12)[:, None]
    return gathered.astype(np.float32), (_trust(bright_s) * (total > 1e-6)).astype(np.float32)


def _basis(at: Float32) -> Float32:
    """Second-order polynomial in position, (N, 6)."""
    x, y = (at[:, 0] - 0.5) * 4, (at[:, 1] - 0.5) * 4  # the inner face spans about -1..1
    return np.column_stack([np.ones_like(x), x, y, x * x, x * y, y * y]).astype(np.float32)


def _fit(basis: Float32, change: Float32, weight: Float32) -> Float32:
    """Weighted ridge fit of `change` (N, 3), reweighted against outliers; returns coefficients (6, 3)."""
    penalty = np.diag([1e-3, 0.02, 0.02, 0.1, 0.1, 0.1]) * max(float(weight.sum()), 1e-6)
    robust = weight
    coefficients: npt.NDArray[np.floating] = np.zeros((6, 3))
    for _ in range(4):
        weighted = basis * robust[:, None]
        coefficients = np.linalg.solve(weighted.T @ basis + penalty, weighted.T @ change)
        residual = np.abs(change - basis @ coefficients).mean(axis=1)
        robust = weight / (1 + (residual / 0.2) ** 2)
    return coefficients.astype(np.float32)


def change_field(swapped: UInt8, swapped_skin: npt.NDArray[np.bool_], target: Float32, config: GuidedConfig) -> Float32:
    """Smooth change of log linear light, (side, side, 3), that brings swapped skin to the target's colour and light.

    `target` (side, side, 4): its skin, see `tasks.light.skin_cells`.
    A smooth field fitted to all skin, plus its blurred and limited local departure. Zero where either face shows too little skin.
    """
    side = config.side
    colour_s, valid_s = shrink(swapped, swapped_skin, side)
    colour_t, valid_t = target[..., :3], target[..., 3] > 0.5
    field = np.zeros((side, side, 3), np.float32)
    if min(valid_s.sum(), valid_t.sum()) < _MIN_PIXELS:
        return field
    centres = (np.arange(side, dtype=np.float32) + np.float32(0.5)) / side
    grid = np.asarray(np.stack(np.meshgrid(centres, centres), axis=-1), np.float32)  # (side, side, 2): x, y
    source = colour_s[valid_s]
    guidance, weight = colour_guidance(source, colour_t[valid_t], grid[valid_s], grid[valid_t], config)
    change = guidance - np.log(np.maximum(source, DARKEST))
    coefficients = _fit(_basis(grid[valid_s]), change, weight)
    # Outside the skin the polynomial is not extrapolated: far cells take the edge's values through the clipped position.
    at = grid[valid_s]
    clipped = np.asarray(np.clip(grid.reshape(-1, 2), at.min(axis=0), at.max(axis=0)), np.float32)
    field = (_basis(clipped) @ coefficients).reshape(side, side, 3)
    departure = change - _basis(at) @ coefficients
    light = departure.mean(axis=1, keepdims=True)
    hue = np.clip(departure - light, -config.hue_limit, config.hue_limit)
    darker, brighter = config.local_limit
    light = np.clip(light, -darker, brighter)
    # A dark place may be a beard, which is kept, or a shadow, which is softened where the target's face has less contrast.
    own, theirs = (np.log(np.maximum(colour @ LUMINANCE, DARKEST)) for colour in (source, colour_t[valid_t]))
    contrast = np.clip(_spread(theirs) / _spread(own), config.least_contrast, 1)
    softened = np.clip((contrast - 1) * (own - np.median(own)), -brighter, brighter)[:, None]
    light = weight[:, None] * light + (1 - weight[:, None]) * softened
    share = np.maximum(weight, 0.4)[:, None]
    local = np.zeros((side, side, 4), np.float32)
    local[valid_s] = np.column_stack([(light + hue) * share, share])
    local = np.asarray(cv2.GaussianBlur(local, (0, 0), config.smooth * side), np.float32)
    field = field + local[..., :3] / (local[..., 3:] + 0.05)
    field = field + side_light(colour_s, valid_s, colour_t, valid_t, field, config)
    limit = float(np.log(config.max_gain))
    return np.clip(field, -limit, limit).astype(np.float32)


def side_light(
    swapped: Float32,
    swapped_valid: npt.NDArray[np.bool_],
    target: Float32,
    target_valid: npt.NDArray[np.bool_],
    field: Float32,
    config: GuidedConfig,
) -> Float32:
    """What is still missing, after `field`, to light the face from the target's side: (side, side, 3) of log light.

    A shadow that falls on one side of a face is light; what is dark on both sides (beard, eye sockets) belongs to the person. So only
    what a place lacks more than its mirror place about the face's middle is taken, smoothed.
    """
    both = (swapped_valid & target_valid).astype(np.float32)
    own, theirs = np.log(np.maximum(swapped, DARKEST)) + field, np.log(np.maximum(target, DARKEST))
    stacked = np.asarray(np.concatenate([(theirs - own) * both[..., None], both[..., None]], axis=2), np.float32)
    blurred = np.asarray(cv2.GaussianBlur(stacked, (0, 0), config.side_smooth * config.side), np.float32)
    middle = 2 * np.average(np.arange(config.side), weights=both.sum(axis=0) + 1e-6)  # column + mirrored column
    mirror = np.array([[-1, 0, middle], [0, 1, 0]], np.float32)
    mirrored = np.asarray(cv2.warpAffine(blurred, mirror, (config.side, config.side), flags=cv2.INTER_LINEAR), np.float32)
    weight, weight_mirrored = blurred[..., 3:], mirrored[..., 3:]
    odd = blurred[..., :3] / (weight + 0.02) - mirrored[..., :3] / (weight_mirrored + 0.02)
    light = odd.mean(axis=2, keepdims=True)
    # The lit side was matched to the target already: only the other one is brought up to it.
    odd = odd * np.clip(light / 0.1, 0, 1) * np.clip(2 * np.minimum(weight, weight_mirrored), 0, 1)
    return np.asarray(np.clip(odd, -config.side_limit, config.side_limit), np.float32)


def recolor(inputs: Inputs, config: GuidedConfig) -> Outputs:
    """Give the pixels under `mask` the target's skin tone and light; all others stay bit-identical.

    Reads `swapped`, `target_face` (H, W, 3) uint8 RGB, `swapped_regions`, `target_regions`, `mask` (H, W) uint8, and `target_light`, if
    `light` wrote it. Writes `recolored`.
    Features other than skin get the change of the skin around them, so that brows, lips and teeth keep their relation to it.
    """
    swapped, mask = inputs["swapped"], inputs["mask"] > 0
    size = check_shape(swapped, "H W 3")
    skin = np.isin(inputs["swapped_regions"], SKIN) & mask
    target_skin = np.isin(inputs["target_regions"], SKIN)
    field = change_field(swapped, skin, read_target_skin(inputs, config.side), config)
    recolored = swapped.copy()
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return {"recolored": recolored}
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    change = np.asarray(cv2.resize(field, (size["W"], size["H"]), interpolation=cv2.INTER_CUBIC), np.float32)[box]
    target_mouth = inputs["target_face"][inputs["target_regions"] == Region.MOUTH]
    change = _spare_white(change, swapped[box], inputs["swapped_regions"][box], target_mouth, 0.002 * max(mask.shape), config)
    white = np.isin(inputs["swapped_regions"][box], (Region.EYES, Region.MOUTH)).astype(np.float32)  # bright by nature, not by a lamp
    mirrors = 1 - np.asarray(cv2.GaussianBlur(white, (0, 0), 0.002 * max(mask.shape)), np.float32)
    contrast = skin_contrast(swapped, skin, inputs["target_face"], target_skin, config)
    level = cv2.resize(light_level(swapped, skin, config.side), (size["W"], size["H"]), interpolation=cv2.INTER_CUBIC)[box]
    changed = _apply(swapped[box], change, np.asarray(level, np.float32), mirrors, contrast, config)
    recolored[box] = np.where(mask[box][..., None], changed, swapped[box])
    return {"recolored": recolored}


def _spare_white(change: Float32, image: UInt8, regions: UInt8, target_mouth: UInt8, feather: float, config: GuidedConfig) -> Float32:
    """Keep eyeballs and teeth from taking the hue of skin and from burning out: where the target shows teeth, these set their light."""
    light = (change @ LUMINANCE)[..., None]
    calm = light - 0.5 * np.maximum(light, 0)
    teeth_light = _teeth_change(image[regions == Region.MOUTH], target_mouth)
    for region, limit in ((Region.EYES, None), (Region.MOUTH, teeth_light)):
        weight = np.asarray(cv2.GaussianBlur((regions == region).astype(np.float32), (0, 0), feather))[..., None]
        if limit is None:
            change = change + config.keep_white * weight * (calm - change)
        else:
            change = change + weight * (np.clip(limit, np.minimum(light, 0), np.maximum(light, 0)) - change)
    return np.asarray(change, np.float32)


def _teeth_change(swapped: UInt8, target: UInt8) -> float | None:
    """Change of log light that brings the brightest of the mouth, (N, 3), to the target's, (M, 3); None if either shows too little."""
    if min(len(swapped), len(target)) < _MIN_PIXELS:
        return None
    own, theirs = (float(np.percentile(to_linear()[pixels] @ LUMINANCE, 90)) for pixels in (swapped, target))
    return float(np.log(max(theirs, DARKEST) / max(own, DARKEST)))


def skin_contrast(
    swapped: UInt8, swapped_skin: npt.NDArray[np.bool_], target: UInt8, target_skin: npt.NDArray[np.bool_], config: GuidedConfig
) -> float:
    """Contrast of the target's skin over that of the swapped face's, at most 1: a face from hard light is calmed for soft light."""
    spreads = []
    for image, skin in ((swapped, swapped_skin), (target, target_skin)):
        colour, valid = shrink(image, skin, config.side)
        if valid.sum() < _MIN_PIXELS:
            return 1.0
        level = light_level(image, skin, config.side)[valid]
        spreads.append(_spread(np.log(np.maximum(colour[valid] @ LUMINANCE, DARKEST) / level)))
    return float(np.clip(spreads[1] / spreads[0], config.least_contrast, 1))


def light_level(image: UInt8, skin: npt.NDArray[np.bool_], side: int) -> Float32:
    """Luminance of bare skin that the face's own light gives each place, (side, side): darker on the side turned from the lamp."""
    colour, valid = shrink(image, skin, side)
    if valid.sum() < _MIN_PIXELS:
        return np.full((side, side), 0.3, np.float32)
    centres = (np.arange(side, dtype=np.float32) + np.float32(0.5)) / side
    grid = np.asarray(np.stack(np.meshgrid(centres, centres), axis=-1), np.float32)
    bright = np.log(np.maximum(colour[valid] @ LUMINANCE, DARKEST))[:, None]
    coefficients = _fit(_basis(grid[valid]), bright, _trust(_standardise(bright[:, 0])))
    at = grid[valid]
    clipped = np.asarray(np.clip(grid.reshape(-1, 2), at.min(axis=0), at.max(axis=0)), np.float32)
    field = (_basis(clipped) @ coefficients).reshape(side, side)
    return np.asarray(np.exp(np.clip(field, bright.min(), bright.max())), np.float32)


def _apply(image: UInt8, change: Float32, level: Float32, mirrors: Float32, contrast: float, config: GuidedConfig) -> UInt8:
    """Apply a change of log light; features darker than the skin around them are spared part of a brightening, highlights are
    compressed instead of clipped."""
    linear = to_linear()[image]
    luminance = linear @ LUMINANCE
    relief = np.clip(np.log(np.maximum(luminance, DARKEST) / np.maximum(level, DARKEST)), -1.5, 1.5)
    change = change + (contrast - 1) * relief[..., None]
    dark = 1 - np.clip((luminance / np.maximum(level, DARKEST) - 0.1) / 0.5, 0, 1)  # 1: a tenth of the skin's light, 0: above six tenths
    share = 1 - config.keep_dark * dark
    change = np.where(change > 0, change * share[..., None], change)
    # Light mirrored by the skin's surface does not take part in its tone: brighter skin has no brighter highlights.
    shine = np.maximum(luminance / (config.highlight * np.maximum(level, DARKEST)), 1)
    matt = linear / (1 + mirrors * (shine - 1))[..., None]
    bright = matt * np.exp(change) + (linear - matt) * np.exp(np.minimum(change, 0))
    knee = np.maximum(linear, 0.7)  # what was brighter before may stay so
    over = np.maximum(bright - knee, 0)
    room = 1 - knee + 1e-6
    return _to_srgb(np.clip(np.minimum(bright, knee) + room * over / (over + room), 0, 1).astype(np.float32))


GUIDED = Stage(
    name="recolor",
    backend="guided",
    version=1,
    config=GuidedConfig,
    run=each(lambda model, config, inputs: recolor(inputs, config)),
    reads=("swapped", "swapped_regions", "mask", "target_face", "target_regions"),
    optional=("target_light",),
    writes={"recolored": "image"},
    cost=Cost(threads=True),
)

NONE = Stage(
    name="recolor",
    backend="none",
    version=1,
    config=NoneConfig,
    run=each(lambda model, config, inputs: {"recolored": inputs["swapped"]}),
    reads=("swapped",),
    writes={"recolored": "image"},
    libraries=(),
    cost=Cost(threads=True),
)

BACKENDS: Mapping[str, Stage] = {"guided": GUIDED, "none": NONE}
