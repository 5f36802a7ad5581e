"""Stage `blend`: the recolored face into the target's picture by multi-band blending (Eq. 16)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from e4s_models.checks import check_shape
from e4s_models.regions import Region
from tasks.stage import Array, Cost, Float32, Inputs, Outputs, Stage, UInt8, each


@dataclass(frozen=True, kw_only=True)
class BlendConfig:
    levels: int = 6  # pyramid levels at 1024 px, one fewer for every halving of the side (published: 10)
    feather_skin: float = 0.04  # width of the mask's ramp where the target's skin goes on, as a fraction of the side
    feather_glasses: float = 0.012  # likewise at glasses, which have skin behind them
    feather: float = 0.006  # likewise at hair, neck and background
    feather_hole: float = 0.0  # likewise at the mismatch region; 0: a hard edge, for `inpaint` fills it from this side

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= 10:
            raise ValueError(f"levels must be 1 to 10, got {self.levels}")


def multiband_blend(full: Array, other: Array, mask: Array, levels: int = 10) -> UInt8:
    """Blend two pictures band by band: Laplacian pyramids weighted by the mask's Gaussian pyramid (published: 10 levels at 1024).

    `full` and `other` are (H, W, 3) RGB in [0, 255], `mask` (H, W) in [0, 1], 1 = `full`. Returns (H, W, 3) uint8, rounded. Where the
    mask's coarsest blur is 0 the result equals `other`.
    """
    size = check_shape(full, "H W 3")
    if other.shape != full.shape or mask.shape != (size["H"], size["W"]):
        raise ValueError(f"pictures and mask must agree in size, got {full.shape}, {other.shape} and {mask.shape}")
    # The pyramid is linear: blending the difference to `other` needs half the work.
    bands = [np.asarray(full.astype(np.float32) - other, np.float32)]
    weights = [mask.astype(np.float32)]
    while len(bands) < levels and max(bands[-1].shape[:2]) > 1:
        bands.append(np.asarray(cv2.pyrDown(bands[-1]), np.float32))
        weights.append(np.asarray(cv2.pyrDown(weights[-1]), np.float32))
    blended = bands[-1].reshape(*weights[-1].shape, 3) * weights[-1][..., None]
    for fine, coarse, weight in zip(bands[-2::-1], bands[:0:-1], weights[-2::-1], strict=True):
        shape = (fine.shape[1], fine.shape[0])
        blended = cv2.pyrUp(blended, dstsize=shape) + (fine - cv2.pyrUp(coarse, dstsize=shape)) * weight[..., None]
    return np.asarray(np.clip(np.rint(blended + other), 0, 255), np.uint8)


def soften(mask: UInt8, regions: UInt8, hole: UInt8, config: BlendConfig) -> Float32:
    """Ramp a mask down to 0 at its edge, from inside only, so that nothing outside it is repainted.

    `mask` (H, W) uint8, non-zero = face; `regions` (H, W) uint8 says what lies beyond the edge: where it is skin the ramp is wide,
    elsewhere narrow; `hole` (H, W) uint8 has a width of its own. Returns (H, W) float32 [0, 1].
    """
    side = max(mask.shape)
    # In the hole both pictures show the target. Counted as face, it keeps the target's texture out of the face beside it.
    inside = ((mask > 0) | ((hole > 0) & (config.feather_hole == 0))).astype(np.uint8)
    if inside.all():
        return inside.astype(np.float32)
    distance, nearest = cv2.distanceTransformWithLabels(inside, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    outside = inside == 0
    width_at = np.zeros(int(nearest.max()) + 1, np.float32)  # ramp width per outside pixel, by its label
    beyond = regions[outside]
    widths = np.full(len(beyond), config.feather, np.float32)
    widths[np.isin(beyond, (Region.SKIN, Region.NOSE))] = config.feather_skin
    widths[beyond == Region.GLASSES] = config.feather_glasses
    widths[hole[outside] > 0] = config.feather_hole
    width_at[nearest[outside]] = widths
    width = cv2.blur(width_at[nearest] * side, (2 * max(round(config.feather_skin * side), 1) + 1,) * 2)
    ramp = np.clip((distance - 0.5) / np.maximum(width, 1), 0, 1)
    return np.asarray(ramp * ramp * (3 - 2 * ramp), np.float32)  # smoothstep


def blend(inputs: Inputs, config: BlendConfig) -> Outputs:
    """Reads `face` (recolored) and `target_face` (H, W, 3) uint8 RGB, `mask`, `swapped_regions`, `hole` (H, W) uint8; writes `blended`."""
    face = inputs["face"]
    weight = soften(inputs["mask"], inputs["swapped_regions"], inputs["hole"], config)
    levels = max(config.levels + round(np.log2(max(face.shape) / 1024)), 1)
    return {"blended": multiband_blend(face, inputs["target_face"], weight, levels)}


STAGE = Stage(
    name="blend",
    backend="multiband",
    version=1,
    config=BlendConfig,
    run=each(lambda model, config, inputs: blend(inputs, config)),
    reads=("face", "target_face", "mask", "swapped_regions", "hole"),
    writes={"blended": "image"},
    cost=Cost(threads=True),
)

BACKENDS = {"multiband": STAGE}
