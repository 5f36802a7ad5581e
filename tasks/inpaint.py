"""Stage `inpaint`: fill the mismatch region M_r, where the target's old face would show beside the new one (Eq. 17).

Backend `membrane` (default) needs no weights. It keeps the target's shading there, which follows the target's outline, lifts it to the
new face by a smooth membrane, and puts the new face's own skin texture, mirrored at its edge, in place of the target's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape
from e4s_models.regions import INNER_FACE, Region
from tasks.stage import Cost, Float32, Inputs, Outputs, Stage, UInt8, each

Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class MembraneConfig:
    grain: float = 0.012  # standard deviation of the blur that parts texture from shading, as a fraction of the side
    edge: float = 0.002  # strip of the new face along its edge that is not trusted, as a fraction of the side
    shade: float = 0.2  # share by which the target's shading may darken or lighten the new face's colour
    reach: float = 0.12  # distance from the new face at which the target is left as it is, as a fraction of the side
    outline: float = 0.003  # ramp at the outline (hair, neck, background), as a fraction of the side


@dataclass(frozen=True)
class NoneConfig:
    """No settings."""


def _half(values: Float32) -> Float32:
    return np.asarray(cv2.pyrDown(values), np.float32)


def _blur_within(values: Float32, weight: Float32, sigma: float) -> Float32:
    """Normalised blur: the mean of the weighted pixels around; where none is near, that of ever wider surroundings (pull-push)."""
    total = cv2.GaussianBlur(weight, (0, 0), sigma)
    known = cv2.GaussianBlur(values * weight[..., None], (0, 0), sigma) / np.maximum(total, 1e-6)[..., None]
    levels: list[tuple[Float32, Float32]] = [(np.asarray(known * total[..., None], np.float32), np.asarray(total, np.float32))]
    while min(levels[-1][1].shape) > 4:
        levels.append((_half(levels[-1][0]), _half(levels[-1][1])))
    coarse = levels[-1][0] / np.maximum(levels[-1][1], 1e-6)[..., None]
    for value, share in reversed(levels[:-1]):
        wide = cv2.pyrUp(coarse, dstsize=share.shape[::-1])
        certain = np.minimum(share * 4, 1)[..., None]
        coarse = certain * value / np.maximum(share, 1e-6)[..., None] + (1 - certain) * wide
    return np.asarray(coarse, np.float32)


def _mirror(face: Bool) -> tuple[Float32, Float32, Float32]:
    """For every pixel outside `face`: its mirror image in the face's nearest edge, (H, W) x and y, and its distance to it, px."""
    distance, nearest = cv2.distanceTransformWithLabels((~face).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    y, x = np.nonzero(face)
    edge = np.zeros((int(nearest.max()) + 1, 2), np.float32)
    edge[nearest[y, x]] = np.column_stack([x, y])
    at = edge[nearest]  # (H, W, 2)
    rows, columns = (np.asarray(index, np.float32) for index in np.indices(face.shape))
    return 2 * at[..., 0] - columns, 2 * at[..., 1] - rows, np.asarray(distance, np.float32)


def fill_membrane(blended: UInt8, target: UInt8, hole: Bool, face: Bool, target_inner: Bool, config: MembraneConfig) -> UInt8:
    """Fill `hole` beside the new `face`; every pixel outside the hole keeps its bytes.

    `blended`, `target` (H, W, 3) uint8 RGB; `hole`, `face` (the new pixels) and `target_inner` (H, W) bool.
    """
    side = max(hole.shape)
    filled = blended.copy()
    rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
    if not rows.size:
        return filled
    margin = round(0.06 * side)  # enough of the face around the hole to take colour and texture from
    box = (
        slice(max(rows[0] - margin, 0), rows[-1] + margin + 1),
        slice(max(columns[0] - margin, 0), columns[-1] + margin + 1),
    )
    blended, target, hole, face, target_inner = blended[box], target[box], hole[box], face[box], target_inner[box]
    sure = cv2.distanceTransform(np.pad(face, 1, mode="edge").astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1] > config.edge * side
    if not sure.any():
        return filled
    new, old = blended.astype(np.float32), target.astype(np.float32)
    grain = config.grain * side
    shading = _blur_within(old, target_inner.astype(np.float32), grain)
    both = (sure & target_inner).astype(np.float32)
    lift = _blur_within(new - shading, both if both.any() else sure.astype(np.float32), grain)
    smooth = _blur_within(new, sure.astype(np.float32), grain)  # outside the face: its colour, continued
    texture = (new - smooth) * sure[..., None]
    lifted = np.clip(shading + lift, (1 - config.shade) * smooth, (1 + config.shade) * smooth)  # an outline, but no beard
    x, y, distance = _mirror(sure)
    mirrored = cv2.remap(texture, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    near = np.clip(2 - 2 * distance / (config.reach * side), 0, 1)[..., None]  # full to half the reach, then less
    near = near * near * (3 - 2 * near)
    fill = near * (lifted + mirrored) + (1 - near) * old
    inside = cv2.distanceTransform((hole | face).astype(np.uint8), cv2.DIST_L2, 5)
    ramp = np.clip((inside - 0.5) / max(config.outline * side, 1), 0, 1)[..., None]
    mixed = np.clip(np.rint(new + ramp * (fill - new)), 0, 255).astype(np.uint8)
    filled[box] = np.where(hole[..., None], mixed, blended)
    return filled


def inpaint(inputs: Inputs, config: MembraneConfig) -> Outputs:
    """Reads `blended`, `target_face` (H, W, 3) uint8 RGB, `target_regions`, `hole`, `mask` (H, W) uint8 (255: mismatch, new pixels).

    Writes `inpainted` (H, W, 3), equal to `blended` outside the hole, and `mask` (H, W), 255 where the picture may differ from the
    target: inner face or mismatch region, what paste-back needs.
    """
    check_shape(inputs["blended"], "H W 3")
    hole, face = inputs["hole"] > 0, inputs["mask"] > 0
    hole &= ~face
    target_inner = np.isin(inputs["target_regions"], [region for region in INNER_FACE if region != Region.GLASSES])
    filled = fill_membrane(inputs["blended"], inputs["target_face"], hole, face, target_inner, config)
    return {"inpainted": filled, "mask": _paste_mask(inputs)}


def _paste_mask(inputs: Inputs) -> UInt8:
    return np.where((inputs["mask"] > 0) | (inputs["hole"] > 0), 255, 0).astype(np.uint8)


MEMBRANE = Stage(
    name="inpaint",
    backend="membrane",
    version=1,
    config=MembraneConfig,
    run=each(lambda model, config, inputs: inpaint(inputs, config)),
    reads=("blended", "target_face", "target_regions", "hole", "mask"),
    writes={"inpainted": "image", "mask": "labels"},
    cost=Cost(threads=True),
)

NONE = Stage(
    name="inpaint",
    backend="none",
    version=1,
    config=NoneConfig,
    run=each(lambda model, config, inputs: {"inpainted": inputs["blended"], "mask": _paste_mask(inputs)}),
    reads=("blended", "hole", "mask"),
    writes={"inpainted": "image", "mask": "labels"},
    libraries=("numpy",),
    cost=Cost(threads=True),
)

BACKENDS: Mapping[str, Stage] = {"membrane": MEMBRANE, "none": NONE}
