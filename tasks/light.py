"""Stage `light`: the colours of a face's bare skin at low resolution, which `recolor=guided` gathers its colour guidance from.

Backend `none` (default) writes nothing: then `recolor` looks at the target's face itself. Backend `skin` writes what it would see there, so
that in a video the guidance of one frame can be shared over the frames around it (tasks/steady.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from e4s_models.regions import Region
from tasks.stage import Cost, Float32, Inputs, ItemError, Outputs, Stage, UInt8, each

SKIN = (Region.SKIN, Region.NOSE)
LUMINANCE = np.array([0.2126, 0.7152, 0.0722], np.float32)  # Rec. 709, of linear RGB
DARKEST = 1e-3  # linear light; logarithms stop here


@dataclass(frozen=True)
class NoneConfig:
    """No settings."""


@dataclass(frozen=True, kw_only=True)
class SkinConfig:
    side: int = 64  # cells per row and column; as `recolor.side`


def to_linear() -> Float32:
    """sRGB byte -> linear light, (256,) in [0, 1] (IEC 61966-2-1)."""
    value = np.arange(256, dtype=np.float32) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4).astype(np.float32)


def shrink(image: UInt8, weights: npt.NDArray[np.bool_], side: int) -> tuple[Float32, npt.NDArray[np.bool_]]:
    """Mean linear colour of the weighted pixels in each of side x side cells, and which cells are mostly weighted."""
    weight = weights.astype(np.float32)
    linear = to_linear()[image] * weight[..., None]
    coverage = cv2.resize(weight, (side, side), interpolation=cv2.INTER_AREA)
    colour = cv2.resize(linear, (side, side), interpolation=cv2.INTER_AREA) / np.maximum(coverage, 1e-6)[..., None]
    return np.asarray(colour, np.float32), coverage > 0.5


def skin_cells(face: UInt8, regions: UInt8, side: int) -> Float32:
    """RGB (H, W, 3) and region ids (H, W) -> (side, side, 4): the mean linear colour of each cell's skin, and 1 where it is mostly skin."""
    colour, valid = shrink(face, np.isin(regions, SKIN), side)
    return np.dstack([colour, valid.astype(np.float32)])


def read_target_skin(inputs: Inputs, side: int) -> Float32:
    """Return the colours of the target's skin (side, side, 4) for `recolor`: `target_light` if `light` wrote it, else read off the face."""
    light: Float32 | None = inputs.get("target_light")
    if light is None:
        return skin_cells(inputs["target_face"], inputs["target_regions"], side)
    if len(light) != side:
        raise ItemError(f"recolor.side is {side}, light.side {len(light)}: set both to the same")
    return light


def share_light(cells: Float32, weights: Float32, here: int) -> Float32:
    """Cells (T, side, side, 4) of frames and their weights (T,) above 0 -> those of frame `here`, its colours averaged over all.

    Colours are averaged relative to each frame's median skin luminance: a light that flickers goes on to flicker. A cell counts as skin
    where most frames say so; where this frame shows no skin at all, nothing changes.
    """
    valid = cells[..., 3] > 0.5
    if not valid[here].any():
        return np.asarray(cells[here])
    logs = np.log(np.maximum(cells[..., :3], DARKEST))
    luminance = np.log(np.maximum(cells[..., :3] @ LUMINANCE, DARKEST))
    levels = np.array([np.median(each[at]) if at.any() else 0.0 for each, at in zip(luminance, valid, strict=True)], np.float32)
    share = weights[:, None, None] * valid
    total = share.sum(axis=0)
    mean = (share[..., None] * (logs - levels[:, None, None, None])).sum(axis=0) / np.maximum(total, 1e-6)[..., None]
    return np.dstack([np.exp(mean + levels[here]), total > 0.5 * weights.sum()]).astype(np.float32)


NONE = Stage(name="light", backend="none", version=1, config=NoneConfig, run=each(lambda model, config, inputs: {}), reads=(), writes={})


def _skin(model: None, config: SkinConfig, inputs: Inputs) -> Outputs:
    return {"skin": skin_cells(inputs["face"], inputs["regions"], config.side)}


OWN = Stage(
    name="light",
    backend="skin",
    version=1,
    config=SkinConfig,
    run=each(_skin),
    reads=("face", "regions"),
    writes={"skin": "array"},
    cost=Cost(threads=True),
)

BACKENDS: Mapping[str, Stage] = {"none": NONE, "skin": OWN}
