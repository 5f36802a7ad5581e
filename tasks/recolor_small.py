"""Stage `recolor`, backend `learned`: the project's own recoloring network, its smooth change of colour at full size (Eq. 11-14).

The network paints the swapped face at 64 px from its luminance and from the target's colours, region by region; `recolored` carries the
change, not the picture, to the face, so that every detail stays and nothing has to be restored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from e4s_models.checks import check_shape
from e4s_models.regions import Region
from tasks.face_network import fit, fit_labels, to_labels, to_tensor
from tasks.stage import Float32, Inputs, Outputs, Stage, UInt8, each

if TYPE_CHECKING:
    from e4s_models.recolor_small import SmallRecolorNet

_FEATURES = (Region.EYES, Region.BROWS, Region.LIPS, Region.MOUTH)


@dataclass(frozen=True, kw_only=True)
class LearnedConfig:
    amount: float = 1.0  # share of the change
    own_features: float = 0.5  # share of their own look that eyes, brows, lips and mouth keep: they make the likeness

    def __post_init__(self) -> None:
        for name in ("amount", "own_features"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")


def share_of_change(regions: UInt8, config: LearnedConfig) -> Float32:
    """How much of the change each pixel takes: (H, W) region ids -> (H, W) in [0, 1], soft at the outlines."""
    features = np.isin(regions, _FEATURES).astype(np.float32)
    soft = np.asarray(cv2.GaussianBlur(features, (0, 0), 0.004 * max(regions.shape)), np.float32)
    return np.float32(config.amount) * (1 - np.float32(config.own_features) * soft)


def recolor(network: SmallRecolorNet, config: LearnedConfig, inputs: Inputs) -> Outputs:
    """Give the pixels under `mask` the target's colours and light; all others stay bit-identical.

    Reads `swapped`, `target_face` (S, S, 3) uint8 RGB, `swapped_regions`, `target_regions`, `mask` (S, S) uint8. Writes `recolored`.
    """
    import torch

    from e4s_models.recolor_small import recolored

    swapped, mask = inputs["swapped"], inputs["mask"] > 0
    check_shape(swapped, "S S 3")
    side = network.side
    faces = [to_tensor(fit(inputs[name], side), network) for name in ("swapped", "target_face")]
    ids = [to_labels(fit_labels(inputs[name], side), network) for name in ("swapped_regions", "target_regions")]
    with torch.inference_mode():
        painted = network(*faces, *ids)
        changed = recolored(to_tensor(swapped, network), painted)[0].permute(1, 2, 0).cpu().numpy()
    share = share_of_change(inputs["swapped_regions"], config)[..., None]
    mixed = swapped + share * ((changed + 1) * np.float32(127.5) - swapped)
    return {"recolored": np.where(mask[..., None], np.clip(np.rint(mixed), 0, 255).astype(np.uint8), swapped)}


def _load(config: LearnedConfig, device: str) -> SmallRecolorNet:
    from e4s_models.recolor_small import SmallRecolorNet

    return SmallRecolorNet.load(device)


STAGE = Stage(
    name="recolor",
    backend="learned",
    version=1,
    config=LearnedConfig,
    load=_load,
    run=each(recolor),
    reads=("swapped", "target_face", "swapped_regions", "target_regions", "mask"),
    writes={"recolored": "image"},
    weights=lambda config: ("recolor_small",),
    libraries=("numpy", "opencv-python-headless", "torch"),
    device="any",
)

BACKENDS = {"learned": STAGE}
