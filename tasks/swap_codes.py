"""Stage `swap`, backend `codes`: style codes exchanged region by region, the picture generated anew (paper Sec. 3.1.2).

Everything that the composite backend cannot know, such as skin that the driven
face does not show, the generator draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from e4s_models.checks import check_shape
from e4s_models.morphology import Mask, grow
from e4s_models.regions import INNER_FACE, NUM_REGIONS
from e4s_models.warp import Matrix, resample
from tasks.encode import GENERATOR_WEIGHTS, NUM_LAYERS, SIDE
from tasks.face_network import to_picture
from tasks.stage import Array, Inputs, ItemError, Outputs, Stage, UInt8, each
from tasks.swap import SwapConfig, recompose_mask, regions_named

if TYPE_CHECKING:
    from e4s_models.mobile_stylegan import MobileStyleGAN


@dataclass(frozen=True, kw_only=True)
class CodesConfig(SwapConfig):
    target_layers: int = 5  # first style layers (up to 8 px) that take the target's code everywhere: its pose and outline
    draw_hole: bool = True  # the generator draws the mismatch region as skin; False leaves it to inpaint, as published

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.target_layers <= NUM_LAYERS:
            raise ValueError(f"target_layers must be 0 to {NUM_LAYERS}, got {self.target_layers}")


def recompose(inputs: Inputs, config: SwapConfig) -> tuple[UInt8, UInt8]:
    """`recompose_mask` of an item's label maps. Raises ItemError if the driven one shows no face."""
    if not np.isin(inputs["driven_regions"], INNER_FACE).any():
        raise ItemError("no face region was found in the driven face; check that source and target show a face")
    return recompose_mask(inputs["driven_regions"], inputs["target_regions"], driven=regions_named(config.driven_regions), hole=config.hole)


def exchange_codes(driven: Array, target: Array, config: CodesConfig) -> Array:
    """Target's codes (12, 23, 512) with the driven face's in the driven regions, from style layer `target_layers` on."""
    for codes in (driven, target):
        check_shape(codes, f"{NUM_REGIONS} {NUM_LAYERS} 512")
    codes = target.copy()
    chosen = sorted(regions_named(config.driven_regions))
    codes[chosen, config.target_layers :] = driven[chosen, config.target_layers :]
    return codes


def generate(generator: MobileStyleGAN, codes: Array, regions: UInt8, tuning: UInt8 | None = None, seen: Mask | None = None) -> UInt8:
    """Codes (12, 23, 512), region ids (H, W) uint8 and maybe packed changes of weights -> RGB (1024, 1024, 3) uint8.

    With `seen` (H, W) only the smallest square around it is drawn from features of 128 px on; outside of that square the picture is 0.
    """
    import torch

    from e4s_models.generator_tuning import TunableMobile, Window, changed, run_tuned, unpack

    with torch.inference_mode():
        device = generator.mean_w.device
        codes_on, regions_on = torch.from_numpy(codes.astype(np.float32)).to(device), torch.from_numpy(regions).to(device)
        if seen is None:
            return to_picture(run_tuned(generator, tuning, codes_on[None], regions_on[None]))
        window = Window.around(torch.from_numpy(seen), SIDE)
        weights = {} if tuning is None else changed(generator, unpack(tuning))
        part = to_picture(TunableMobile(generator).render(codes_on[None], regions_on[None], 8, window)(weights))
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    picture[window.top : window.top + window.side, window.left : window.left + window.side] = part
    return picture


def regions_in_picture(regions: UInt8, to_canvas: Matrix) -> UInt8:
    """Label map of an aligned crop (H, W) moved to the generator's own square (1024, 1024)."""
    return cv2.warpAffine(regions, to_canvas[:2], (SIDE, SIDE), flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE).astype(
        np.uint8, copy=False
    )


def swap_codes(generator: MobileStyleGAN, config: CodesConfig, inputs: Inputs, margin: float | None = None) -> Outputs:
    """Generate the swap in the generator's own square and cut it out like the target's face.

    With a `margin`, a fraction of the side, only the inner face with that margin is drawn; beyond it `swapped` is the target's face.

    Reads `driven_codes`, `target_codes` (12, 23, 512), `driven_regions`, `target_regions` (H, W) uint8, `target_face` (H, W, 3) and
    `target_to_canvas` (3, 3) px of the crop -> px of the generated picture; where the generator was tuned, `tuning` (`tasks/tune.py`).
    Writes `swapped` (H, W, 3) uint8 RGB, `swapped_regions`; `hole`, 255 where `inpaint` shall draw; `mask`, 255 in the driven inner face:
    both (H, W) uint8.
    """
    swapped_regions, mismatch = recompose(inputs, config)
    codes = exchange_codes(inputs["driven_codes"], inputs["target_codes"], config)
    to_canvas = inputs["target_to_canvas"]
    target = inputs["target_face"]
    height, width, _ = target.shape
    face = np.isin(swapped_regions, [region for region in INNER_FACE if region in regions_named(config.driven_regions)])
    on_canvas = regions_in_picture(swapped_regions, to_canvas)
    if margin is None:
        picture = generate(generator, codes, on_canvas, inputs.get("tuning"))
        swapped = resample(picture, to_canvas, height, width)
    else:
        near = grow(face, margin * max(face.shape))
        seen = regions_in_picture(near.astype(np.uint8), to_canvas) > 0
        picture = generate(generator, codes, on_canvas, inputs.get("tuning"), seen)
        swapped = np.where(near[..., None], resample(picture, to_canvas, height, width), target)
    return {
        "swapped": swapped,
        "swapped_regions": swapped_regions,
        "hole": mismatch * np.uint8(0 if config.draw_hole else 255),
        "mask": face.astype(np.uint8) * np.uint8(255),
    }


def _load(config: CodesConfig, device: str) -> MobileStyleGAN:
    from e4s_models.mobile_stylegan import MobileStyleGAN

    return MobileStyleGAN.load(device)


STAGE = Stage(
    name="swap",
    backend="codes",
    version=2,
    config=CodesConfig,
    load=_load,
    run=each(swap_codes),
    reads=("driven_codes", "target_codes", "driven_regions", "target_regions", "target_face", "target_to_canvas"),
    optional=("tuning",),
    writes={"swapped": "image", "swapped_regions": "labels", "hole": "labels", "mask": "labels"},
    weights=lambda config: GENERATOR_WEIGHTS,
    libraries=("numpy", "opencv-python-headless", "torch"),
    device="any",
)

BACKENDS = {"codes": STAGE}
