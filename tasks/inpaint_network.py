"""Stage `inpaint`, backend `network`: the published inpainting network paints the mismatch region at 256 px (paper Sec. 3.3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from e4s_models.checks import check_shape
from tasks.face_network import (
    Enhancer,
    Restore,
    check_enhancer,
    enhancer_weights,
    fit,
    load_enhancer,
    mix,
    soft_edge,
    to_picture,
    to_tensor,
)
from tasks.stage import Inputs, Outputs, Stage, UInt8, each

if TYPE_CHECKING:
    from e4s_models.inpaint_net import InpaintNet


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    enhance: Enhancer = "codeformer"  # restores the network's 256 px (published: codeformer)
    grow_hole: float = 0.002  # what the network paints beyond the mismatch region, as a fraction of the side (published: 1 px of 512)
    grow_paste: float = 0.006  # what of it replaces the picture there, likewise, before a soft edge (published: 3 px of 512)

    def __post_init__(self) -> None:
        check_enhancer(self.enhance)
        if not (0 <= self.grow_hole <= 0.1 and 0 <= self.grow_paste <= 0.1):
            raise ValueError(f"grow_hole and grow_paste must be in 0..0.1, got {self.grow_hole} and {self.grow_paste}")


def _grow(mask: UInt8, margin: float) -> UInt8:
    size = 2 * round(margin * len(mask)) + 1
    return np.asarray(cv2.dilate(mask, np.ones((size, size), np.uint8)), np.uint8)


def _load(config: NetworkConfig, device: str) -> tuple[InpaintNet, Restore]:
    from e4s_models.added import load_added
    from e4s_models.inpaint_net import InpaintNet

    network = load_added("inpaint", device)
    assert isinstance(network, InpaintNet)
    return network, load_enhancer(config.enhance, device)


def inpaint(model: tuple[InpaintNet, Restore], config: NetworkConfig, inputs: Inputs) -> Outputs:
    """Reads `blended` (S, S, 3) uint8 RGB, `hole` and `mask` (S, S) uint8 (non-zero: mismatch region, new pixels).

    Writes `inpainted` (S, S, 3), equal to `blended` except in the hole and its soft edge, and `mask` (S, S), 255 where the picture may
    differ from the target. Without a hole no network runs.
    """
    import torch

    network, restore = model
    blended, hole = inputs["blended"], (inputs["hole"] > 0).astype(np.uint8)
    side = check_shape(blended, "S S 3")["S"]
    changed = (inputs["mask"] > 0) | (hole > 0)
    if hole.any():
        covered = fit(_grow(hole, config.grow_hole) * np.uint8(255), network.side) > 0  # every cell that the hole touches
        faces = to_tensor(fit(blended, network.side), network)
        holes = torch.from_numpy(covered).to(faces)[None, None]  # [1, 1, 256, 256]
        painted = fit(restore(to_picture(network.fill(faces, holes))), side)
        weight = soft_edge(_grow(hole, config.grow_paste).astype(np.float32))
        blended = mix(blended, painted, weight)
        changed |= weight > 0
    return {"inpainted": blended, "mask": changed.astype(np.uint8) * np.uint8(255)}


STAGE = Stage(
    name="inpaint",
    backend="network",
    version=1,
    config=NetworkConfig,
    load=_load,
    run=each(inpaint),
    reads=("blended", "hole", "mask"),
    writes={"inpainted": "image", "mask": "labels"},
    weights=lambda config: ("inpaint", *enhancer_weights(config.enhance)),
    libraries=("numpy", "opencv-python-headless", "torch"),
    device="any",
)

BACKENDS = {"network": STAGE}
