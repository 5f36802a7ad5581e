"""Stage `reenact`, backend `facevid2vid`: the source takes the target's pose and expression (paper Sec. 3.1.1).

As published: both faces at 256 px through face-vid2vid with absolute motion, then a face restoration network. The published code finds
and aligns the face again before that restoration and enlarges what lies around it with Real-ESRNet; here the crop is aligned as the
restoration network was trained (FFHQ), so it takes the whole of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from e4s_models.checks import check_shape
from tasks.face_network import Enhancer, Restore, check_enhancer, enhancer_weights, fit, load_enhancer, to_picture, to_tensor
from tasks.stage import Inputs, Outputs, Stage, each

if TYPE_CHECKING:
    from e4s_models.facevid2vid import FaceVid2Vid


@dataclass(frozen=True, kw_only=True)
class FaceVid2VidConfig:
    side: int = 256  # px, multiple of 128; 256 is what the network was trained at
    enhance: Enhancer = "gpen"  # restores what 256 px lose (published: gpen)

    def __post_init__(self) -> None:
        check_enhancer(self.enhance)
        if self.side < 128 or self.side % 128:
            raise ValueError(f"side must be a multiple of 128, got {self.side}")


def _load(config: FaceVid2VidConfig, device: str) -> tuple[FaceVid2Vid, Restore]:
    from e4s_models.added import load_added
    from e4s_models.facevid2vid import FaceVid2Vid

    reenactor = load_added("facevid2vid", device)
    assert isinstance(reenactor, FaceVid2Vid)
    return reenactor, load_enhancer(config.enhance, device)


def reenact(model: tuple[FaceVid2Vid, Restore], config: FaceVid2VidConfig, inputs: Inputs) -> Outputs:
    """Reads `source_face`, `target_face` (S, S, 3) uint8 RGB. Writes `driven` (S, S, 3) and `visible` (S, S): 255, all of it is drawn."""
    reenactor, restore = model
    side = check_shape(inputs["target_face"], "S S 3")["S"]
    source, target = (to_tensor(fit(inputs[name], config.side), reenactor) for name in ("source_face", "target_face"))
    driven = to_picture(reenactor(source, target))  # [256, 256, 3]
    return {"driven": fit(restore(driven), side), "visible": np.full((side, side), 255, np.uint8)}


STAGE = Stage(
    name="reenact",
    backend="facevid2vid",
    version=1,
    config=FaceVid2VidConfig,
    load=_load,
    run=each(reenact),
    reads=("source_face", "target_face"),
    writes={"driven": "image", "visible": "labels"},
    weights=lambda config: ("facevid2vid", *enhancer_weights(config.enhance)),
    libraries=("numpy", "opencv-python-headless", "torch"),
    device="any",
)

BACKENDS = {"facevid2vid": STAGE}
