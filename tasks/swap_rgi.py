"""Stage `swap`, backend `rgi`: style vectors exchanged region by region, the face generated over the recomposed mask (Sec. 3.1.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from e4s_models.checks import check_shape
from e4s_models.regions import INNER_FACE, NUM_REGIONS
from tasks.face_network import fit, to_labels, to_picture
from tasks.stage import Float32, Inputs, Outputs, Stage, each
from tasks.swap import SwapConfig, regions_named
from tasks.swap_codes import recompose

if TYPE_CHECKING:
    from e4s_models.rgi import RGI


@dataclass(frozen=True, kw_only=True)
class RGIConfig(SwapConfig):
    absent: tuple[str, ...] = ("mouth",)  # regions that keep the target's style where the driven face does not show them (published)

    def __post_init__(self) -> None:
        super().__post_init__()
        regions_named(self.absent)


def exchange_styles(driven: Float32, target: Float32, config: RGIConfig) -> Float32:
    """Target's style vectors (12, V) with the driven face's in the driven regions; a vector of zeros says that a region is absent."""
    size = check_shape(target, f"{NUM_REGIONS} V")["V"]
    check_shape(driven, f"{NUM_REGIONS} {size}")
    chosen = [
        region for region in regions_named(config.driven_regions) if driven[region].any() or region not in regions_named(config.absent)
    ]
    styles = target.copy()
    styles[chosen] = driven[chosen]
    return styles


def _load(config: RGIConfig, device: str) -> RGI:
    from e4s_models.added import load_added
    from e4s_models.rgi import RGI

    network = load_added("rgi", device)
    assert isinstance(network, RGI)
    del network.encoder  # only `encode` needs it
    return network


def swap_rgi(network: RGI, config: RGIConfig, inputs: Inputs) -> Outputs:
    """Generate the face of the exchanged styles over the recomposed mask.

    Reads `driven_styles`, `target_styles` (12, 1280) float32, `driven_regions`, `target_regions` (S, S) uint8 and `target_face`
    (S, S, 3); where the generator was tuned, `tuning` (`tasks/tune.py`). Writes `swapped` (S, S, 3) uint8 RGB, wholly generated;
    `swapped_regions`; `hole`, 255 in the mismatch region; `mask`, 255 in the rest of the driven inner face: both (S, S) uint8.
    """
    import torch

    from e4s_models.generator_tuning import run_tuned

    side = check_shape(inputs["target_face"], "S S 3")["S"]
    swapped_regions, mismatch = recompose(inputs, config)
    styles = torch.from_numpy(exchange_styles(inputs["driven_styles"], inputs["target_styles"], config))
    codes = network.style_codes(styles[None].to(network.mapper.latent_avg.device))  # [1, 12, 18, 512]
    picture = to_picture(run_tuned(network.generator, inputs.get("tuning"), codes, to_labels(swapped_regions, network)))
    inner = [region for region in INNER_FACE if region in regions_named(config.driven_regions)]
    face = np.isin(swapped_regions, inner) & (mismatch == 0)
    return {
        "swapped": fit(picture, side),
        "swapped_regions": swapped_regions,
        "hole": mismatch * np.uint8(255),
        "mask": face.astype(np.uint8) * np.uint8(255),
    }


STAGE = Stage(
    name="swap",
    backend="rgi",
    version=1,
    config=RGIConfig,
    load=_load,
    run=each(swap_rgi),
    reads=("driven_styles", "target_styles", "driven_regions", "target_regions", "target_face"),
    optional=("tuning",),
    writes={"swapped": "image", "swapped_regions": "labels", "hole": "labels", "mask": "labels"},
    weights=lambda config: ("rgi",),
    libraries=("numpy", "opencv-python-headless", "torch"),
    device="any",
)

BACKENDS = {"rgi": STAGE}
