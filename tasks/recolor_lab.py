"""Stage `recolor`, backend `lab`: the target's skin tone, contrast and light by robust statistics in CIE Lab.

Each colour of the swapped face is moved as the skin's median and spread are. Then a smooth, limited shading follows where both faces show
skin. Lips, eyes and teeth keep their own relation to the skin. Occluders, hair and highlights do not vote: statistics are medians over
cells of bare skin, outliers left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape
from e4s_models.push_pull import blur_normalised
from e4s_models.regions import Region
from tasks.light import read_target_skin, skin_cells
from tasks.stage import Cost, Float32, Inputs, Outputs, Stage, UInt8, each

Mask = npt.NDArray[np.bool_]

_MIN_CELLS = 24  # cells of bare skin below which statistics mean nothing
_FEATURES = (Region.LIPS, Region.EYES, Region.MOUTH)  # colours of their own, not the skin's
_SMALLEST_SPREAD = np.array([1.5, 0.7, 0.7], np.float32)  # of L, a, b: below it a ratio of spreads means nothing


@dataclass(frozen=True, kw_only=True)
class LabConfig:
    """Limits of the transfer; L, a and b in CIE Lab units."""

    side: int = 64  # cells per row and column of the statistics; as `light.side`
    contrast: tuple[float, float] = (0.65, 1.2)  # factor by which the spread of L may change
    saturation: tuple[float, float] = (0.7, 1.3)  # likewise of a and b
    outlier: float = 3.0  # robust deviations beyond which a cell does not vote
    smooth: float = 0.07  # standard deviation of the shading, as a fraction of the side
    light: tuple[float, float] = (0.7, 16.0)  # share of the remaining shading that is followed, and its limit in L
    tint: tuple[float, float] = (0.8, 6.0)  # likewise of its colour, in a and b
    own_colour: float = 0.5  # share of the skin's change of a and b that eyes and teeth do not take
    gray: float = 3.0  # departure of a and b from what follows from L that 5 % exceed, below which a picture has no colours

    def __post_init__(self) -> None:
        if not 8 <= self.side <= 512:
            raise ValueError(f"side must be 8 to 512, got {self.side}")


def to_lab(image: UInt8) -> Float32:
    """RGB (H, W, 3) uint8 sRGB -> CIE Lab (H, W, 3) float32: L [0, 100], a and b about [-100, 100]."""
    return np.asarray(cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2Lab), np.float32)


def to_rgb(lab: Float32) -> UInt8:
    """CIE Lab (H, W, 3) -> RGB uint8; colours outside sRGB lose saturation, not hue or lightness."""
    lab = lab.copy()
    lab[..., 0] = np.clip(lab[..., 0], 0, 100)
    rgb = np.asarray(cv2.cvtColor(lab, cv2.COLOR_Lab2RGB), np.float32)
    return np.asarray(np.clip(np.rint(rgb * 255), 0, 255), np.uint8)


def cells_to_lab(cells: Float32) -> tuple[Float32, Mask]:
    """Mean linear colours of skin (side, side, 4), see `tasks.light.skin_cells` -> CIE Lab (side, side, 3), and which cells are skin."""
    linear = np.clip(cells[..., :3], 0, 1)
    srgb = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * np.maximum(linear, 1e-8) ** (1 / 2.4) - 0.055)
    return np.asarray(cv2.cvtColor(srgb.astype(np.float32), cv2.COLOR_RGB2Lab), np.float32), np.asarray(cells[..., 3] > 0.5)


def robust_statistics(values: Float32, outlier: float) -> tuple[Float32, Float32, Mask]:
    """Median (3,), robust standard deviation (3,) of colours (N, 3), and which of them are no outliers (N,).

    A colour counts as outlier when a channel lies more than `outlier` deviations from the median.
    """
    kept = np.ones(len(values), np.bool_)
    centre, spread = np.zeros(3, np.float32), _SMALLEST_SPREAD
    for _ in range(3):
        centre = np.median(values[kept], axis=0)
        spread = np.maximum(1.4826 * np.median(np.abs(values[kept] - centre), axis=0), _SMALLEST_SPREAD)
        kept = (np.abs(values - centre) < outlier * spread).all(axis=1)
    return np.asarray(centre, np.float32), np.asarray(spread, np.float32), kept


def colour_by_lightness(lab: Float32) -> tuple[Float32, Float32]:
    """Fit a and b of colours (N, 3) as a quadratic function of L: coefficients (3, 2), and the 95th percentile of what is left, (2,).

    A gray or toned picture (sepia) leaves almost nothing.
    """
    basis = _powers(lab[:, 0])
    coefficients, *_ = np.linalg.lstsq(basis, lab[:, 1:], rcond=None)
    left = np.abs(lab[:, 1:] - basis @ coefficients)
    return coefficients.astype(np.float32), np.asarray(np.percentile(left, 95, axis=0), np.float32)


def _powers(light: Float32) -> Float32:
    """Return 1, L and L squared, (..., 3), of L (...)."""
    return np.stack([np.ones_like(light), light, light**2], axis=-1)


def _feature_weight(regions: UInt8, which: Region) -> Float32:
    """Return the soft mask of a region: (H, W, 1)."""
    mask = (regions == which).astype(np.float32)
    return np.asarray(cv2.GaussianBlur(mask, (0, 0), 0.003 * max(regions.shape))[..., None], np.float32)


def _match_teeth(out: Float32, own: Float32, target: Float32) -> Float32:
    """Move colours `out` (H, W, 3) so that the brightest of `own` (N, 3) of them, the teeth, are those of `target` (M, 3)."""
    if min(len(own), len(target)) < _MIN_CELLS:
        return out
    light = np.percentile(target[:, 0], 90) - np.percentile(own[:, 0], 90)
    own_teeth, teeth = (values[values[:, 0] >= np.percentile(values[:, 0], 60), 1:] for values in (own, target))
    colour = np.median(teeth, axis=0) - np.median(own_teeth, axis=0)
    return np.asarray(out + np.array([light, *colour]), np.float32)


def recolor(inputs: Inputs, config: LabConfig) -> Outputs:
    """Give the pixels under `mask` the target's skin tone and light; all others stay bit-identical.

    Reads `swapped`, `target_face` (H, W, 3) uint8 RGB, `swapped_regions`, `target_regions`, `mask` (H, W) uint8, and `target_light`, if
    `light` wrote it. Writes `recolored`.
    """
    swapped, regions, mask = inputs["swapped"], inputs["swapped_regions"], inputs["mask"] > 0
    size = check_shape(swapped, "H W 3")
    recolored = swapped.copy()
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return {"recolored": recolored}
    own_cells = skin_cells(swapped, np.where(mask, regions, np.uint8(Region.BACKGROUND)), config.side)
    own, own_valid = cells_to_lab(own_cells)
    target, target_valid = cells_to_lab(read_target_skin(inputs, config.side))
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    before = to_lab(swapped[box])
    target_lab = to_lab(inputs["target_face"])
    if min(own_valid.sum(), target_valid.sum()) >= _MIN_CELLS:
        move, own_kept, kept = plan_move(own[own_valid], target[target_valid], config)
        own_valid[own_valid], target_valid[target_valid] = own_kept, kept
        moved = move.apply(own)
        shading = cv2.resize(
            _shading(moved, own_valid, target, target_valid, config), (size["W"], size["H"]), interpolation=cv2.INTER_CUBIC
        )
        after = np.asarray(move.apply(before) + shading[box], np.float32)
        after = _keep_features(after, before, regions[box], move, target_lab, inputs["target_regions"], config)
    else:
        after = before.copy()
    after = _match_colour_space(after, target_lab, config)
    recolored[box] = np.where(mask[box][..., None], to_rgb(_calm_highlights(after, before)), swapped[box])
    return {"recolored": recolored}


@dataclass(frozen=True)
class Move:
    """How colours follow when one skin is moved to another."""

    own: Float32
    """(3,) Lab, centre of the swapped skin."""
    spread: float
    """Robust deviation of its L."""
    target: Float32
    """(3,) Lab, centre of the target's skin."""
    gain: Float32
    """(3,) factors of the deviations from the centre."""

    def apply(self, lab: Float32) -> Float32:
        """Move colours (..., 3).

        Skin scales the light that falls on it: what is darker than the centre keeps its share of the centre's light, which in Lab is a
        share of L + 16. A highlight adds mirrored light, as much on bright skin as on dark, and the same light makes a step in L that
        shrinks with the square of the skin's L: so above the skin's own spread steps shrink on skin that becomes brighter. The darkest
        features take half of the change: their own tone has nothing to do with the skin's, only with its light. The chroma of a lit
        surface grows with its L: what is dark has little chroma, and so moves little in a and b.
        """
        slope = light_ratio(self.own, self.target)
        deviation = lab[..., 0] - self.own[0]
        skin = np.clip(deviation, -2 * self.spread, self.spread)
        depth = np.clip((-2 * self.spread - deviation) / (0.5 * self.own[0] + 1), 0, 1)  # 0: skin, 1: brows, beard, lashes
        feature = (lab[..., 0] + 16) * slope ** (-0.5 * depth) - (skin + self.own[0] + 16)
        feature = np.where(depth > 0, feature, 0)
        shine = np.maximum(deviation - self.spread, 0)
        light = slope * (self.gain[0] * skin + feature) + min(1.0, slope**-2) * shine + self.target[0]
        before, after = _share(lab[..., 0], self.own[0]), _share(light, self.target[0])
        chroma = (lab[..., 1:] - before * self.own[1:]) * self.gain[1:] + after * self.target[1:]
        return np.concatenate([light[..., None], chroma], axis=-1).astype(np.float32)

    def shift_chroma(self, chroma: Float32) -> Float32:
        """Shift a and b (..., 2) of features as those of the skin's centre; what loses them comes near to neutral, but not past it.

        Where the skin loses chroma, features with less than the skin lose the same share instead of the same amount: else a grey
        moustache under red light would turn cyan. On darker skin they differ less from it: chroma grows with light.
        """
        own, target = self.own[1:], self.target[1:]
        ratio = np.clip(target / np.where(np.abs(own) < 1e-3, 1, own), 0, 1)
        shares = (np.sign(own) == np.sign(target)) & (np.abs(target) < np.abs(own)) & (np.sign(own) * chroma < np.abs(own))
        shifted = np.where(shares, chroma * ratio, chroma + target - own)
        return np.asarray(target + min(1.0, light_ratio(self.own, self.target)) * (shifted - target), np.float32)


def light_ratio(own: Float32, target: Float32) -> float:
    """Return the factor of L + 16 from one colour (3,) to another: the cube root of the factor of its linear light (CIE 1976)."""
    return float((target[0] + 16) / (own[0] + 16))


def _share(light: Float32, centre: float) -> Float32:
    """Return the share of the skin's chroma that a surface of that L has: (..., 1) in [0, 1]."""
    return np.asarray(np.clip(light / max(float(centre), 1.0), 0, 1)[..., None], np.float32)


def plan_move(own: Float32, target: Float32, config: LabConfig) -> tuple[Move, Mask, Mask]:
    """Plan the move from the skin colours (N, 3) of one face to those (M, 3) of another, and say which of them are no outliers."""
    own_centre, own_spread, own_kept = robust_statistics(own, config.outlier)
    centre, spread, kept = robust_statistics(target, config.outlier)
    low, high = (np.array([a, b, b], np.float32) for a, b in zip(config.contrast, config.saturation, strict=True))
    own_spread_moved = own_spread * np.array([light_ratio(own_centre, centre), 1, 1], np.float32)
    gain = np.clip(spread / own_spread_moved, low, high)
    # Skin that loses chroma loses its variations, too: else neutral highlights of saturated skin turn blue.
    gain[1:] *= min(1.0, float(np.hypot(*centre[1:]) + 4) / float(np.hypot(*own_centre[1:]) + 4))
    return Move(own_centre, float(own_spread[0]), centre, gain.astype(np.float32)), own_kept, kept


def _shading(moved: Float32, own_valid: Mask, target: Float32, target_valid: Mask, config: LabConfig) -> Float32:
    """Return the smooth, limited change (side, side, 3) that is left between both faces' skin; 0 where only one shows skin."""
    sigma = config.smooth * config.side
    weights = own_valid.astype(np.float32), target_valid.astype(np.float32)
    own_low, target_low = (blur_normalised(lab, weight, sigma) for lab, weight in zip((moved, target), weights, strict=True))
    near = np.minimum(*(cv2.GaussianBlur(weight, (0, 0), sigma) for weight in weights))
    left = (target_low - own_low) * np.clip(3 * near, 0, 1)[..., None]
    (light, light_limit), (tint, tint_limit) = config.light, config.tint
    return np.dstack(
        [light * np.clip(left[..., :1], -light_limit, light_limit), tint * np.clip(left[..., 1:], -tint_limit, tint_limit)]
    ).astype(np.float32)


def _keep_features(
    after: Float32, before: Float32, regions: UInt8, move: Move, target: Float32, target_regions: UInt8, config: LabConfig
) -> Float32:
    """Let lips, eyes and teeth keep their own colour: lips relative to the skin, eyes and teeth in part; teeth take the target's light."""
    lips = _feature_weight(regions, Region.LIPS)
    change = move.shift_chroma(before[..., 1:]) - before[..., 1:]
    own_lips = np.dstack([after[..., :1], before[..., 1:] + change])
    after = np.asarray(after + lips * (own_lips - after), np.float32)
    for region in (Region.EYES, Region.MOUTH):
        here = regions == region
        if not here.any():
            continue
        kept = np.dstack([after[..., :1], before[..., 1:] + (1 - config.own_colour) * change]).astype(np.float32)
        if region == Region.MOUTH:
            kept = _match_teeth(kept, kept[here], target[target_regions == region])
        after = np.asarray(after + _feature_weight(regions, region) * (kept - after), np.float32)
    return after


def _match_colour_space(after: Float32, target: Float32, config: LabConfig) -> Float32:
    """Take the colours away where the target's picture (H, W, 3) has none: in a gray or toned one a and b follow from L."""
    sample = target[::8, ::8].reshape(-1, 3)
    coefficients, left = colour_by_lightness(sample)
    if float(left.max()) >= config.gray:
        return after
    light = np.clip(after[..., 0], *np.percentile(sample[:, 0], (1, 99)))  # a fit holds where it has seen something
    return np.dstack([after[..., :1], _powers(light) @ coefficients]).astype(np.float32)


def _calm_highlights(after: Float32, before: Float32) -> Float32:
    """Compress L above 90 that was not as bright before, so that nothing clips."""
    knee = np.maximum(before[..., 0], 90)
    over = np.maximum(after[..., 0] - knee, 0)
    room = np.maximum(100 - knee, 0) + 1e-3
    light = np.minimum(after[..., 0], knee) + room * over / (over + room)
    return np.dstack([light, after[..., 1:]]).astype(np.float32)


STAGE = Stage(
    name="recolor",
    backend="lab",
    version=3,
    config=LabConfig,
    run=each(lambda model, config, inputs: recolor(inputs, config)),
    reads=("swapped", "swapped_regions", "mask", "target_face", "target_regions"),
    optional=("target_light",),
    writes={"recolored": "image"},
    cost=Cost(threads=True),
)

BACKENDS: Mapping[str, Stage] = {"lab": STAGE}
