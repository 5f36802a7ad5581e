"""Stage `encode`, backend `rgi`: a face and its regions -> one style vector per region (paper Eq. 5 and 6).

Style vectors are kept, not style codes: the network's MLPs work region by region, so vectors can be exchanged as well, and a face's are
61 kB instead of 442.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tasks.face_network import to_labels, to_tensor
from tasks.stage import Inputs, Outputs, Stage, each

if TYPE_CHECKING:
    from e4s_models.rgi_encoder import RegionEncoder


@dataclass(frozen=True, kw_only=True)
class RGIConfig:
    """No settings."""


def _load(config: RGIConfig, device: str) -> RegionEncoder:
    from e4s_models.added import load_added
    from e4s_models.rgi import RGI

    network = load_added("rgi", device)
    assert isinstance(network, RGI)
    return network.encoder


def encode(encoder: RegionEncoder, config: RGIConfig, inputs: Inputs) -> Outputs:
    """Reads `face` (S, S, 3) uint8 RGB, `labels` (S, S) uint8 region ids; writes `styles` (12, 1280) float32, 0 for an absent region."""
    styles = encoder(to_tensor(inputs["face"], encoder), to_labels(inputs["labels"], encoder))  # [1, 12, 1280]
    return {"styles": styles[0].cpu().numpy().astype(np.float32, copy=False)}


STAGE = Stage(
    name="encode",
    backend="rgi",
    version=1,
    config=RGIConfig,
    load=_load,
    run=each(encode),
    reads=("face", "labels"),
    writes={"styles": "array"},
    weights=lambda config: ("rgi",),
    libraries=("numpy", "torch"),
    device="any",
)

BACKENDS = {"rgi": STAGE}
