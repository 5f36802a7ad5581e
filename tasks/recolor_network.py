"""Stage `recolor`, backend `network`: the published recoloring network at 256 px, its smooth part pasted at full size (paper Sec. 3.3.1).

The network's picture is blurred, so it is restored and then laid over the swapped face except where that has edges: a low-pass mask from
a Sobel filter keeps the generator's detail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from e4s_models.checks import check_shape
from e4s_models.regions import Region
from tasks.face_network import (
    Enhancer,
    Restore,
    check_enhancer,
    enhancer_weights,
    fit,
    fit_labels,
    load_enhancer,
    mix,
    soft_edge,
    to_labels,
    to_picture,
    to_tensor,
)
from tasks.stage import Float32, Inputs, Outputs, Stage, UInt8, each

if TYPE_CHECKING:
    from e4s_models.recolor_net import RecolorNet

_SIDE = 256  # px, what the network was trained at
_PASTED = (Region.LIPS, Region.BROWS, Region.EYES, Region.NOSE, Region.SKIN, Region.NECK, Region.MOUTH)
_EDGE = 128  # gray levels of the Sobel picture from which a pixel is an edge


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    enhance: Enhancer = "codeformer"  # restores the network's 256 px (the paper's choice; the published script enlarges with Real-ESRGAN)
    amount: float = 0.75  # share of the recolored picture where there are no edges (published)

    def __post_init__(self) -> None:
        check_enhancer(self.enhance)
        if not 0 <= self.amount <= 1:
            raise ValueError(f"amount must be in 0..1, got {self.amount}")


def edges(picture: UInt8) -> Float32:
    """Strength of edges, (S, S) [0, 1], of RGB (S, S, 3) uint8: sum of absolute Sobel derivatives, gray, strengthened and blurred."""
    across, down = (cv2.convertScaleAbs(cv2.Sobel(picture, cv2.CV_16S, *order, ksize=3)) for order in ((1, 0), (0, 1)))
    edge = np.asarray(cv2.cvtColor(cv2.add(across, down), cv2.COLOR_RGB2GRAY), np.uint8)
    blurred = np.asarray(cv2.GaussianBlur(edge, (3, 3), 5), np.float32)
    strengthened = np.where(edge >= _EDGE, np.minimum(blurred * np.float32(1.05), 255), blurred).astype(np.uint8)
    return np.asarray(cv2.GaussianBlur(strengthened, (5, 5), 11), np.float32) / np.float32(255)


def paste_smooth(swapped: UInt8, recolored: UInt8, regions: UInt8, amount: float) -> UInt8:
    """Lay the recolored face over the swapped one where this is face and has no edges.

    `swapped`, `recolored` (S, S, 3) uint8 RGB, `regions` (S, S) uint8 of the swapped face -> (S, S, 3) uint8.
    """
    face = soft_edge(np.isin(regions, _PASTED).astype(np.float32))
    return mix(swapped, recolored, np.float32(amount) * np.clip(face - edges(swapped), 0, 1))


def _load(config: NetworkConfig, device: str) -> tuple[RecolorNet, Restore]:
    from e4s_models.added import load_added
    from e4s_models.recolor_net import RecolorNet

    network = load_added("recolor", device)
    assert isinstance(network, RecolorNet)
    return network, load_enhancer(config.enhance, device)


def recolor(model: tuple[RecolorNet, Restore], config: NetworkConfig, inputs: Inputs) -> Outputs:
    """Give the swapped face the target's skin tone and light.

    Reads `swapped`, `target_face` (S, S, 3) uint8 RGB; `swapped_regions` (S, S) uint8, the recomposed map that says where to paste;
    `seen_regions`, what the parser sees in `swapped`, and `target_regions`, which the network compares. Writes `recolored`.
    """
    network, restore = model
    swapped = inputs["swapped"]
    side = check_shape(swapped, "S S 3")["S"]
    faces = (to_tensor(fit(inputs[name], _SIDE), network) for name in ("swapped", "target_face"))
    ids = (to_labels(fit_labels(inputs[name], _SIDE), network) for name in ("seen_regions", "target_regions"))
    recolored = fit(restore(to_picture(network(*faces, *ids))), side)
    return {"recolored": paste_smooth(swapped, recolored, inputs["swapped_regions"], config.amount)}


STAGE = Stage(
    name="recolor",
    backend="network",
    version=1,
    config=NetworkConfig,
    load=_load,
    run=each(recolor),
    reads=("swapped", "target_face", "swapped_regions", "seen_regions", "target_regions"),
    writes={"recolored": "image"},
    weights=lambda config: ("recolor", *enhancer_weights(config.enhance)),
    libraries=("numpy", "opencv-python-headless", "torch"),
    device="any",
)

BACKENDS = {"network": STAGE}
