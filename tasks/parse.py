"""Stage `parse`: aligned faces -> region labels (BiSeNet's 19 classes merged to 12)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from e4s_models.checks import check_shape
from e4s_models.regions import BISENET19_TO_REGIONS
from tasks.stage import Cost, Inputs, Outputs, Stage

if TYPE_CHECKING:
    import torch

    from e4s_models.face_parser import FaceParser


@dataclass(frozen=True, kw_only=True)
class ParseConfig:
    weights: str = "face_parser"  # key in e4s_models.weights.WEIGHTS, or bisenet: the same network as the user added it
    side: int = 512  # px, multiple of 32; 512 is the square the parser was trained on

    def __post_init__(self) -> None:
        if self.side < 64 or self.side % 32:
            raise ValueError(f"side must be a multiple of 32 and at least 64, got {self.side}")


def parse_labels(parser: FaceParser, faces: Sequence[torch.Tensor], side: int) -> list[torch.Tensor]:
    """Classify every pixel of aligned faces: RGB (3, H, W) float32 [-1, 1] each, of any sizes -> (H, W) uint8 in BiSeNet's 19 classes.

    The parser sees squares of `side` pixels; its scores, not its labels, are enlarged, so that outlines are smooth at H x W.
    """
    import torch
    from torch.nn.functional import interpolate

    with torch.inference_mode():
        small = [interpolate(face[None], (side, side), mode="bilinear", antialias=True) for face in faces]  # [1, 3, side, side]
        logits = parser(torch.cat(small))  # [B, 19, side, side]
        labels = []
        for scores, face in zip(logits, faces, strict=True):
            seen = scores.argmax(dim=0).unique()  # sorted; a class that wins nowhere need not be enlarged
            large = interpolate(scores[None, seen], face.shape[-2:], mode="bilinear")[0]  # [seen, H, W]
            labels.append(seen[large.argmax(dim=0)].to(torch.uint8))  # [H, W]
        return labels


def _load(config: ParseConfig, device: str) -> FaceParser:
    from e4s_models.added import load_added
    from e4s_models.face_parser import FaceParser

    if config.weights != "bisenet":
        return FaceParser.load(device, config.weights)
    parser = load_added("bisenet", device)
    assert isinstance(parser, FaceParser)
    return parser


def _run(parser: FaceParser, config: ParseConfig, batch: Sequence[Inputs]) -> list[Outputs]:
    import torch

    faces = []
    for inputs in batch:
        check_shape(inputs["face"], "H W 3")
        face = torch.from_numpy(np.ascontiguousarray(inputs["face"])).to(parser.mean.device)
        faces.append(face.permute(2, 0, 1).float() / 127.5 - 1)
    labels = [label.cpu().numpy() for label in parse_labels(parser, faces, config.side)]
    return [{"labels19": label, "regions": BISENET19_TO_REGIONS[label]} for label in labels]


STAGE = Stage(
    name="parse",
    backend="bisenet",
    version=1,
    config=ParseConfig,
    load=_load,
    run=_run,
    reads=("face",),
    writes={"labels19": "labels", "regions": "labels"},
    weights=lambda config: (config.weights,),
    libraries=("numpy", "torch"),
    device="any",
    cost=Cost(gpu_batch=8),
)

BACKENDS = {"bisenet": STAGE}
