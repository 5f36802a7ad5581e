"""Stage `visibility`: aligned faces -> where nothing is in front of them.

Backend `none` (default) writes nothing: then everything that the parser calls face is taken for it. Backend `network` writes `visible`,
and `regions`, which other stages read in place of the parser's where they are there. In them what is in front is labelled as hair: the
label of what lies before a face. So every stage treats it as it treats a fringe: the target's stays, the source's is not carried, and
neither counts for colours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from e4s_models.checks import check_shape
from e4s_models.morphology import grow
from e4s_models.regions import INNER_FACE, Region
from tasks.face_network import fit, to_tensor
from tasks.stage import Float32, Inputs, ItemError, Outputs, Stage, UInt8, each

if TYPE_CHECKING:
    from e4s_models.visibility_net import VisibilityNet


@dataclass(frozen=True)
class NoneConfig:
    """No settings."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    certain: float = 0.8  # probability that a thing must reach somewhere to be believed
    least_thing: float = 3e-4  # share of the crop that it must cover
    least_face: float = 0.02  # share of the crop in which the face must show
    margin: float = 0.012  # strip around things that is left to them, as a fraction of the side: more than `paste.dilate`

    def __post_init__(self) -> None:
        for name in ("certain", "least_thing", "least_face", "margin"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")


def believed(in_front: Float32, certain: float, least_thing: float) -> Float32:
    """Keep of probabilities (S, S) that something is in front only things that are certain somewhere and not specks."""
    _, things, facts, _ = cv2.connectedComponentsWithStats((in_front > 0.5).astype(np.uint8), connectivity=8)
    highest = np.array([in_front[things == thing].max(initial=0) for thing in range(len(facts))], np.float32)
    kept = (highest >= certain) & (facts[:, cv2.CC_STAT_AREA] >= least_thing * in_front.size)
    kept[0] = True  # what is below one half
    return np.asarray(np.where(kept[things], in_front, 0), np.float32)


def visible_of(network: VisibilityNet, face: UInt8, config: NetworkConfig) -> UInt8:
    """Probability that nothing is in front of each pixel of an aligned face (H, H, 3) uint8: (H, H) uint8, 255 is 1."""
    import torch

    from e4s_models.visibility_net import Seen

    side = check_shape(face, "H H 3")["H"]
    with torch.inference_mode():
        in_front = network(to_tensor(fit(face, network.side), network)).softmax(dim=1)[0, Seen.OCCLUDER].cpu().numpy()
    share = 1 - believed(in_front, config.certain, config.least_thing)
    return np.rint(255 * np.clip(cv2.resize(share, (side, side), interpolation=cv2.INTER_LINEAR), 0, 1)).astype(np.uint8)


def _run(network: VisibilityNet, config: NetworkConfig, inputs: Inputs) -> Outputs:
    """Find what is in front of a face.

    Reads `face` (H, H, 3) and `regions` (H, H) uint8. Writes `visible` (H, H) uint8, see `visible_of`, and `regions` with things in front.
    Raises ItemError if no face is left.
    """
    visible = visible_of(network, inputs["face"], config)
    shown = (visible >= 128) & np.isin(inputs["regions"], INNER_FACE)
    if shown.mean() < config.least_face:
        raise ItemError(
            f"the face is covered: only {100 * shown.mean():.1f} % of the crop show it, {100 * config.least_face:g} % are needed; "
            "give a picture with less in front of the face, or lower visibility.least_face."
        )
    things = visible < 128
    before = things | (grow(things, config.margin * len(visible)) & np.isin(inputs["regions"], INNER_FACE))
    return {"visible": visible, "regions": np.where(before, np.uint8(Region.HAIR), inputs["regions"])}


def _load(config: NetworkConfig, device: str) -> VisibilityNet:
    from e4s_models.visibility_net import VisibilityNet

    return VisibilityNet.load(device)


NONE = Stage(
    name="visibility", backend="none", version=1, config=NoneConfig, run=each(lambda model, config, inputs: {}), reads=(), writes={}
)

NETWORK = Stage(
    name="visibility",
    backend="network",
    version=1,
    config=NetworkConfig,
    load=_load,
    run=each(_run),
    reads=("face", "regions"),
    writes={"visible": "labels", "regions": "labels"},
    weights=lambda config: ("visibility",),
    libraries=("numpy", "opencv-python-headless", "torch"),
    device="any",
)

BACKENDS: Mapping[str, Stage] = {"none": NONE, "network": NETWORK}
