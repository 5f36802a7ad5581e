"""Stage `swap`: the driven face's regions set into the target's picture over a recomposed mask.

Backend `composite` (default) moves pixels. It needs no generator: what the driven face does not show is left to the target and
marked in `hole` for `inpaint`. Other backends share `SwapConfig` and `recompose_mask`, and write the same four artifacts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape
from e4s_models.morphology import disc
from e4s_models.regions import INNER_FACE, Region
from tasks.stage import Cost, Inputs, ItemError, Outputs, Stage, UInt8, each

DRIVEN = (Region.LIPS, Region.BROWS, Region.EYES, Region.NOSE, Region.SKIN, Region.EARS, Region.NECK, Region.MOUTH)
"""Regions taken from the driven face by default (the paper's list, Sec. 3.1.2)."""

_CANVAS = (Region.LIPS, Region.BROWS, Region.EYES, Region.NOSE, Region.SKIN, Region.MOUTH)  # driven shapes
_TARGET_INNER = tuple(region for region in INNER_FACE if region != Region.GLASSES)  # the target's glasses are never a mismatch
_EMPTY = 255

Mask = npt.NDArray[np.bool_]
HoleRule = Literal["published", "eq17"]


@dataclass(frozen=True, kw_only=True)
class SwapConfig:
    driven_regions: tuple[str, ...] = tuple(region.name.lower() for region in DRIVEN)  # names of e4s_models.regions.Region
    hole: HoleRule = "published"  # "published" drops what lies above the driven eyes; "eq17" keeps the whole of Eq. 17

    def __post_init__(self) -> None:
        regions_named(self.driven_regions)
        if self.hole not in ("published", "eq17"):
            raise ValueError(f"hole must be published or eq17, got {self.hole!r}")


@dataclass(frozen=True, kw_only=True)
class LensConfig:
    """Where the driven eyes are seen behind the target's lenses."""

    clear_lens: float = 0.6  # gray level of lenses, as a share of the skin's, below which they are dark
    frame: float = 0.016  # width of the strip along the glasses' outline that stays the target's, as a fraction of the side
    around_eyes: float = 0.03  # reach of the patch around the driven eyes, likewise


@dataclass(frozen=True, kw_only=True)
class CompositeConfig(SwapConfig, LensConfig):
    driven_glasses: bool = True  # carry the driven face's glasses if the target wears none
    through_glasses: bool = True  # show the driven eyes behind the target's lenses, unless these are dark
    bridge_contrast: int = 20  # gray levels by which a bridge is darker than the skin around it
    round_corners: float = 0.006  # standard deviation that takes spikes off the outline, as a fraction of the side
    hair_margin: float = 0.015  # strip along the driven hair that is left to the target, as a fraction of the side
    rim_margin: float = 0.008  # strip along the rest of the driven outline that is left to the target, likewise


def recompose_mask(
    driven_regions: UInt8, target_regions: UInt8, *, driven: Collection[Region] = DRIVEN, hole: HoleRule = "published"
) -> tuple[UInt8, UInt8]:
    """Recompose a label map from the driven face's inner shapes and the target's surroundings (paper Sec. 3.1.2, published `swap` code).

    Both maps are (H, W) uint8 region ids, aligned to each other. A region of the inner face that is not in `driven` keeps the
    target's shape; ears and neck always do, whatever their texture.

    Returns the swapped map, (H, W) uint8 region ids, and the mismatch region, (H, W) uint8 in {0, 1}: target inner face that the
    driven inner face does not cover (Eq. 17), under `hole="published"` only from the lowest row of the driven eyes downwards.
    """
    size = check_shape(driven_regions, "H W")
    if (size["H"], size["W"]) != target_regions.shape:
        raise ValueError(f"the driven label map is {driven_regions.shape}, the target's {target_regions.shape}: they must be aligned")
    swapped = np.full_like(target_regions, _EMPTY)
    for region in (Region.BACKGROUND, Region.NECK, Region.EARS, Region.EAR_RINGS):
        swapped[target_regions == region] = region
    # All driven shapes come from one map, so their order matters only if some are the target's: those give way, and skin to all.
    for region in sorted(_CANVAS, key=lambda region: (region != Region.SKIN, region in driven)):
        swapped[(driven_regions if region in driven else target_regions) == region] = region
        if region == Region.BROWS:  # driven hair hides the driven brow: the target's is kept
            swapped[(driven_regions == Region.HAIR) & (target_regions == Region.BROWS)] = region
    skin = target_regions == Region.SKIN
    top = np.where(skin.any(axis=0), skin.argmax(axis=0), -1)  # row of the highest skin pixel per column, -1: none
    hat = (target_regions == Region.BACKGROUND) & (np.arange(size["H"])[:, None] < top)
    swapped[hat] = Region.BACKGROUND
    for region in (Region.HAIR, Region.GLASSES):  # in front of the face
        swapped[target_regions == region] = region
    swapped[swapped == _EMPTY] = Region.SKIN

    mismatch = np.isin(target_regions, _TARGET_INNER) & ~np.isin(driven_regions, INNER_FACE)
    eyes = Region.EYES if (driven_regions == Region.EYES).any() else Region.GLASSES  # the parser labels whole lenses as glasses
    eye_rows = np.flatnonzero((driven_regions == eyes).any(axis=1))
    if hole == "published" and eye_rows.size:
        mismatch[: eye_rows[-1]] = False
    return swapped, mismatch.astype(np.uint8)


def regions_named(names: Collection[str]) -> frozenset[Region]:
    """Regions by their lower-case names. Raises ValueError that lists the known ones."""
    known = {region.name.lower(): region for region in Region}
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"unknown regions {unknown} in driven_regions; choose from {sorted(known)}")
    return frozenset(known[name] for name in names)


def _near(where: Mask, margin: float) -> Mask:
    """Dilate by `margin`, a fraction of the side."""
    return np.asarray(cv2.dilate(where.astype(np.uint8), disc(margin * max(where.shape))) > 0)


def _left_to_target(driven_regions: UInt8, target_regions: UInt8, config: CompositeConfig) -> Mask:
    """Edges of the driven face that spoil the skin, where the target has skin of its own.

    Strands of hair and their shadow reach into what the parser calls skin, and along its outline a face turns dark.
    """
    outside = ~np.isin(driven_regions, INNER_FACE)
    edges = _near(driven_regions == Region.HAIR, config.hair_margin) | _near(outside, config.rim_margin)
    return np.asarray(edges & (target_regions == Region.SKIN))


def _bridge(target: UInt8, glasses: Mask, config: CompositeConfig) -> Mask:
    """Dark lines of the target (H, W) gray between its two lenses: the parser leaves thin bridges out of the glasses."""
    side = max(target.shape)
    gap = cv2.morphologyEx(glasses.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((1, round(0.12 * side) | 1), np.uint8)) > 0
    lines = cv2.morphologyEx(target, cv2.MORPH_BLACKHAT, disc(0.01 * side)) > config.bridge_contrast
    return gap & _near(lines & gap & ~glasses, 0.003) & ~glasses


def eyes_behind(target: UInt8, glasses: Mask, target_regions: UInt8, driven_regions: UInt8, config: LensConfig = LensConfig()) -> Mask:
    """Where driven eyes are shown behind the target's clear lenses; the frame and what is near it stay the target's.

    The parser labels a whole lens as glasses, and the published canvas keeps all of it: the target's eyes in the source's face. Dark
    lenses hide eyes and are kept.
    """
    skin = target_regions == Region.SKIN
    if not skin.any() or np.median(target[glasses]) < config.clear_lens * np.median(target[skin]):
        return np.zeros_like(glasses)
    lens = cv2.erode(glasses.astype(np.uint8), disc(config.frame * max(glasses.shape))) > 0
    return lens & _near(driven_regions == Region.EYES, config.around_eyes) & np.isin(driven_regions, _CANVAS)


def composite(inputs: Inputs, config: CompositeConfig) -> Outputs:
    """Set driven pixels over the recomposed mask, target pixels elsewhere.

    Reads `driven`, `target_face` (H, W, 3) uint8 RGB and `driven_regions`, `target_regions` (H, W) uint8. Writes `swapped`
    (H, W, 3); `swapped_regions`; `hole`, 255 in the mismatch region and the strip of the driven outline beside it; `mask`, 255 where
    pixels are the driven face's: both (H, W) uint8.

    Ears and neck stay the target's whatever `driven_regions` says: `blend` keeps the target outside the inner face (Eq. 15), and a
    warped ear or neck would not meet the target's body.
    """
    driven_regions, target_regions = inputs["driven_regions"], inputs["target_regions"]
    chosen = regions_named(config.driven_regions)
    swapped_regions, hole = recompose_mask(driven_regions, target_regions, driven=chosen, hole=config.hole)

    inner = np.isin(driven_regions, _CANVAS)
    if config.driven_glasses and not (target_regions == Region.GLASSES).any():
        # What is behind the driven glasses is unknown. Without them the target's eyes would look out of the source's face.
        glasses = (driven_regions == Region.GLASSES) & np.isin(swapped_regions, (*_CANVAS, Region.GLASSES))
        swapped_regions[glasses] = Region.GLASSES
        inner |= glasses
    features = [*(set(_CANVAS) & chosen), Region.GLASSES]
    from_driven = inner & np.isin(swapped_regions, features)
    # Where a chosen feature of the target lies, driven skin covers it, also if skin itself is not chosen: no second mouth.
    from_driven |= inner & (swapped_regions == Region.SKIN) & np.isin(target_regions, features)
    target_glasses = target_regions == Region.GLASSES
    if target_glasses.any():
        target_face = np.asarray(cv2.cvtColor(inputs["target_face"], cv2.COLOR_RGB2GRAY), np.uint8)
        from_driven &= ~target_glasses & ~_bridge(target_face, target_glasses, config)
        if config.through_glasses and Region.EYES in chosen:
            eyes = eyes_behind(target_face, target_glasses, target_regions, driven_regions, config)
            swapped_regions[eyes] = driven_regions[eyes]
            from_driven |= eyes
    if not from_driven.any():
        raise ItemError("no face region was found in the driven face; check that source and target show a face")
    from_driven &= ~_left_to_target(driven_regions, target_regions, config)
    # Spikes of the outline are cut off, slits stay: hair of the target may lie there.
    from_driven &= cv2.GaussianBlur(from_driven.astype(np.float32), (0, 0), config.round_corners * max(from_driven.shape)) > 0.4
    rim = inner & ~from_driven & np.isin(target_regions, _TARGET_INNER) & _near(hole > 0, 2 * config.rim_margin)
    swapped = np.asarray(np.where(from_driven[..., None], inputs["driven"], inputs["target_face"]), np.uint8)
    return {
        "swapped": swapped,
        "swapped_regions": swapped_regions,
        "hole": np.where((hole > 0) | rim, 255, 0).astype(np.uint8),
        "mask": np.where(from_driven, 255, 0).astype(np.uint8),
    }


STAGE = Stage(
    name="swap",
    backend="composite",
    version=1,
    config=CompositeConfig,
    run=each(lambda model, config, inputs: composite(inputs, config)),
    reads=("driven", "driven_regions", "target_face", "target_regions"),
    writes={"swapped": "image", "swapped_regions": "labels", "hole": "labels", "mask": "labels"},
    cost=Cost(threads=True),
)

BACKENDS = {"composite": STAGE}
