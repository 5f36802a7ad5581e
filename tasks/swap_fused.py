"""Stage `swap`, backend `fused`: the source's own texture where the driven face shows it, the generator's everywhere else.

The generated face (backend `codes`) covers the whole recomposed mask. Over it lies the driven face, weighted per pixel by how far it can be
trusted, and joined band by band, so that no seam shows. What the source's picture does not hold stays generated: a hidden cheek, the
forehead under a fringe, the mismatch region, what glasses cover, and bands finer than a small source's pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from e4s_models.checks import check_shape
from e4s_models.morphology import disc
from e4s_models.push_pull import blur_normalised, fill_low_frequencies
from e4s_models.regions import INNER_FACE, Region
from e4s_models.warp import scale_of
from tasks.stage import Float32, Inputs, Outputs, Stage, UInt8, each
from tasks.swap import Mask, eyes_behind, regions_named
from tasks.swap_codes import STAGE as CODES
from tasks.swap_codes import CodesConfig, swap_codes

if TYPE_CHECKING:
    from e4s_models.mobile_stylegan import MobileStyleGAN

_UNCOVERED = tuple(region for region in INNER_FACE if region != Region.GLASSES)


@dataclass(frozen=True, kw_only=True)
class FusedConfig(CodesConfig):
    """How far the driven face is trusted. Lengths are fractions of the crop's side."""

    target_layers: int = 0  # the source is in the target's pose already
    margin: float = 0.03  # strip around the mask that is generated, too, so that bands blend into the target
    gap: float = 0.004  # radius of gaps in what is trusted that are closed
    rim: float = 0.004  # strip along the border of what is trusted that is not
    feather: float = 0.008  # width of the ramp from there to full trust
    turned: tuple[float, float] = (45.0, 52.0)  # degrees between the heads: full trust below, none above
    sharp: tuple[float, float] = (0.45, 0.9)  # source px per px of a band's grid: the band is generated below, the source's above
    levels: int = 5  # bands that are joined
    shift: float = 40.0  # grey levels, largest change that takes the generated face to the driven face's colours
    texture: float = 1.0  # detail of generated skin, over what 10 % of the source's own skin exceed: more is cut off
    foreign: tuple[float, float] = (70.0, 120.0)  # grey levels from the continued skin: generated skin below, something else above
    off_colour: tuple[float, float] = (0.02, 0.045)  # likewise, of a channel's share of the sum of all three
    keep_source_glasses: bool = False  # carry the source's glasses where the target wears none

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.levels <= 8:
            raise ValueError(f"levels must be 1 to 8, got {self.levels}")


def band_shares(resolution: float, levels: int, limits: tuple[float, float]) -> list[float]:
    """Return per band, the finest first, the share that a source of this resolution can give, [0, 1].

    `resolution` is how many px of the source's picture one px of the crop has; every band has half the grid of the one before.
    """
    least, full = limits
    ratios = np.clip((resolution * 2.0 ** np.arange(levels) - least) / (full - least), 0, 1)
    return [float(ratio) for ratio in ratios]


def join_bands(driven: UInt8, generated: Float32, trust: Float32, shares: Sequence[float]) -> UInt8:
    """Join two pictures band by band: Laplacian pyramids weighted by the Gaussian pyramid of `trust`.

    `driven` and `generated` are RGB (H, W, 3) [0, 255], `trust` (H, W) [0, 1], 1 = driven; `shares` scales the trust of each band, the
    finest first, and says how many there are. Returns (H, W, 3) uint8.
    """
    size = check_shape(driven, "H W 3")
    check_shape(trust, f"{size['H']} {size['W']}")
    # The pyramid is linear: the difference of both is joined to the generated picture.
    bands = [np.asarray(driven.astype(np.float32) - generated, np.float32)]
    weights = [trust]
    for _ in shares[1:]:
        bands.append(np.asarray(cv2.pyrDown(bands[-1]), np.float32))
        weights.append(np.asarray(cv2.pyrDown(weights[-1]), np.float32))
    joined = bands[-1] * (shares[-1] * weights[-1])[..., None]
    for fine, coarse, weight, share in zip(bands[-2::-1], bands[:0:-1], weights[-2::-1], shares[-2::-1], strict=True):
        shape = (fine.shape[1], fine.shape[0])
        detail = fine - cv2.pyrUp(coarse, dstsize=shape)
        joined = cv2.pyrUp(joined, dstsize=shape) + (share * weight)[..., None] * detail
    return np.asarray(np.clip(np.rint(generated + joined), 0, 255), np.uint8)


GENERATED_WEIGHT = 0.5
"""Weight of generated skin beside the source's own where both go on below something foreign."""
TEXTURE_BLUR = 0.008
"""Standard deviation that parts the skin's detail from its shading, as a fraction of the crop's side."""
LEAST_TEXTURE = 4.0
"""Grey levels of detail that any skin may have."""


def continue_skin(driven: UInt8, generated: UInt8, trust: Float32, skin: Mask, config: FusedConfig) -> Float32:
    """Return `generated` fitted to the trusted part of `driven`: RGB (H, W, 3) float32.

    Its low frequencies move to those of the driven face, continued smoothly from where this is trusted, by at most `config.shift` grey
    levels. Where it is to show skin, (H, W), and is far from the continued colour of the trusted skin all the same, it shows something
    else: a lock of hair, a frame, what lies behind the face. There it is replaced by that colour.

    `trust` is (H, W) [0, 1].
    """
    base = generated.astype(np.float32)
    trusted_skin = np.asarray(trust * skin, np.float32)
    if not (trusted_skin > 0.5).any():
        return base
    own = driven.astype(np.float32)
    change = fill_low_frequencies(own - base, trust)
    base += np.clip(change, -config.shift, config.shift)
    continued = fill_low_frequencies(own, trusted_skin)
    local = np.asarray(cv2.GaussianBlur(base, (0, 0), 0.003 * max(skin.shape)), np.float32)
    foreign = _ramp(np.abs(local - continued).max(axis=2), config.foreign)
    foreign = np.maximum(foreign, _ramp(np.abs(_shares(local) - _shares(continued)).max(axis=2), config.off_colour)) * skin
    foreign = np.asarray(cv2.GaussianBlur(foreign, (0, 0), 0.003 * max(skin.shape)), np.float32)
    # What replaces it goes on from all skin around it, the source's own first: else its edge shows.
    sure = np.maximum(trusted_skin, GENERATED_WEIGHT * skin * (1 - foreign))
    around = fill_low_frequencies(base + trusted_skin[..., None] * (own - base), np.asarray(sure, np.float32))
    base += foreign[..., None] * (around - base)
    return _limit_texture(base, own, trusted_skin, skin, config)


def _ramp(difference: Float32, limits: tuple[float, float]) -> Float32:
    """Return 0 where a difference is below the first limit, 1 above the second."""
    near, far = limits
    return np.asarray(np.clip((difference - near) / (far - near), 0, 1), np.float32)


def _shares(image: Float32) -> Float32:
    """Return each channel's share of the sum of all three, (H, W, 3): the same in light and shadow."""
    light = np.maximum(image, 0) + 8
    return np.asarray(light / light.sum(axis=2, keepdims=True), np.float32)


def _limit_texture(generated: Float32, own: Float32, trusted_skin: Float32, skin: Mask, config: FusedConfig) -> Float32:
    """Limit the detail of generated skin to that of the source's own: strands of a fringe that the codes hold, frames, stubble.

    Pictures are (H, W, 3) float32 RGB, `trusted_skin` (H, W) [0, 1] is where `own` shows skin, `skin` (H, W) where there is to be skin.
    Detail is what a blur within the skin takes away, the same in all channels.
    """
    sigma = TEXTURE_BLUR * max(skin.shape)
    sure = trusted_skin > 0.9
    if not sure.any():
        return generated
    inside = skin.astype(np.float32)
    own_detail = np.abs(_detail(own, trusted_skin, sigma)[sure])
    limit = config.texture * max(float(np.percentile(own_detail, 90)), LEAST_TEXTURE)
    detail = _detail(generated, inside, sigma)
    excess = detail - np.clip(detail, -limit, limit)
    return np.asarray(generated - (excess * inside)[..., None], np.float32)


def _detail(image: Float32, skin: Float32, sigma: float) -> Float32:
    """Return what a blur within `skin` (H, W) takes away from the mean of the channels of an image (H, W, 3): (H, W)."""
    gray = image.mean(axis=2)[..., None]
    return np.asarray((gray - blur_normalised(gray, skin, sigma))[..., 0], np.float32)


def trust_driven(inputs: Inputs, mask: Mask, config: FusedConfig) -> Float32:
    """Return how far each driven pixel may stand in the result, (H, W) float32 [0, 1].

    It must be the source's own texture, unstretched (`visible`), labelled as inner face by the driven labels, inside `mask`, away from the
    border of all that; and the heads must not be turned too far from each other.
    """
    regions, visible = inputs["driven_regions"], inputs["visible"]
    wanted = [region for region in _UNCOVERED if region in regions_named(config.driven_regions)]
    seen = np.isin(regions, wanted)
    share = visible.astype(np.float32) / 255
    glasses = np.asarray(regions == Region.GLASSES)
    if config.keep_source_glasses:
        share = np.where(glasses, 1, share)
        seen |= glasses
    else:
        seen |= glasses & (visible > 127)  # skin behind clear lenses
    side = max(regions.shape)
    sure = seen & mask & (share > 0.5)
    closed = np.asarray(cv2.morphologyEx(sure.astype(np.uint8), cv2.MORPH_CLOSE, disc(config.gap * side)), np.uint8)
    depth = cv2.distanceTransform(closed & mask.astype(np.uint8), cv2.DIST_L2, 5)
    ramp = np.clip((depth - config.rim * side) / max(config.feather * side, 1), 0, 1)
    near, far = config.turned
    facing = float(np.clip((far - float(inputs.get("turned", [0.0])[0])) / (far - near), 0, 1))
    return np.asarray(ramp * ramp * (3 - 2 * ramp) * share * facing, np.float32)


def fuse(generator: MobileStyleGAN, config: FusedConfig, inputs: Inputs) -> Outputs:
    """Fuse the driven and the generated face.

    Reads what backend `codes` reads, and `driven` (H, W, 3) uint8 RGB, `visible` (H, W) uint8, `source_crop_to_frame` (3, 3); `turned`
    (1,) degrees where `reenact` writes it. Writes what `codes` writes; `trust` (H, W) uint8, 255 where the driven pixel stands; `facts`
    (3,) float32: degrees between the heads, width of the source's face in its picture, px; share of the mask that is generated.
    """
    outputs = swap_codes(generator, config, inputs, config.margin)
    regions = outputs["swapped_regions"]
    target_glasses = np.asarray(inputs["target_regions"] == Region.GLASSES)
    if target_glasses.any():
        grey = np.asarray(cv2.cvtColor(inputs["target_face"], cv2.COLOR_RGB2GRAY), np.uint8)
        eyes = eyes_behind(grey, target_glasses, inputs["target_regions"], inputs["driven_regions"])
        regions[eyes] = inputs["driven_regions"][eyes]
        outputs["mask"][eyes] = 255
    if config.keep_source_glasses and not target_glasses.any():
        glasses = (inputs["driven_regions"] == Region.GLASSES) & np.isin(regions, INNER_FACE)
        regions[glasses] = Region.GLASSES
        outputs["mask"][glasses] = 255
    mask = outputs["mask"] > 0
    kept = target_glasses & ~mask
    outputs["swapped"][kept] = inputs["target_face"][kept]  # nothing of generated lenses may bleed into the target's
    trust = trust_driven(inputs, mask, config)
    resolution = min(1.0, scale_of(inputs["source_crop_to_frame"]))
    generated = continue_skin(inputs["driven"], outputs["swapped"], trust, np.asarray(regions == Region.SKIN), config)
    outputs["swapped"] = join_bands(inputs["driven"], generated, trust, band_shares(resolution, config.levels, config.sharp))
    outputs["trust"] = np.rint(255 * trust).astype(np.uint8)
    generated_share = 1 - float(trust[mask].mean()) if mask.any() else 1.0
    turned = float(inputs["turned"][0]) if "turned" in inputs else 0.0
    face_size = FACE_IN_CROP * scale_of(inputs["source_crop_to_frame"]) * max(regions.shape)
    outputs["facts"] = np.array([turned, face_size, generated_share], np.float32)
    return outputs


FACE_IN_CROP = 0.5  # width of a face, as a share of its aligned crop's
NOTED_TURN = 45.0  # degrees
NOTED_FACE = 128.0  # px
NOTED_SHARE = 0.5  # of the mask


def describe_limits(facts: Float32) -> str:
    """Return what limits a fused face, from its `facts`: "" if nothing does."""
    turned, face_size, generated = (float(value) for value in facts)
    said = [
        f"heads turned by {turned:.0f} degrees" if turned >= NOTED_TURN else "",
        f"source face {face_size:.0f} px" if face_size < NOTED_FACE else "",
        f"{100 * generated:.0f} % of the face generated" if generated >= NOTED_SHARE else "",
    ]
    return "; ".join(filter(None, said))


STAGE = Stage(
    name="swap",
    backend="fused",
    version=2,
    config=FusedConfig,
    load=CODES.load,
    run=each(fuse),
    reads=(*CODES.reads, "driven", "visible", "source_crop_to_frame"),
    optional=(*CODES.optional, "turned"),
    writes={**CODES.writes, "trust": "labels", "facts": "array"},
    weights=CODES.weights,
    libraries=CODES.libraries,
    device="any",
    note=("facts", describe_limits),
)

BACKENDS = {"fused": STAGE}
