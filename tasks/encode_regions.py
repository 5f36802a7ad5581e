"""Stage `encode`, backend `encoder`: any aligned face and its label map -> regional style codes (paper Sec. 3.2.1).

The trained encoder gives a start, `passes` correct it by feeding its pictures back, `steps` of optimization bring it nearer to the face.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from e4s_models.checks import check_shape
from tasks.encode import GENERATOR_WEIGHTS, SIDE
from tasks.face_network import to_labels, to_tensor
from tasks.stage import Inputs, ItemError, Outputs, Stage, each

if TYPE_CHECKING:
    from torch import Tensor

    from e4s_models.code_encoder import CodeEncoder
    from e4s_models.mobile_stylegan import MobileStyleGAN
    from e4s_models.preview_head import PreviewHead
    from e4s_models.reconstruction_loss import ReconstructionLoss


_SHOWING = ("preview_head", *GENERATOR_WEIGHTS)
_COMPARING = ("lpips_alexnet", "face_parser")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    passes: int = 0  # through generator and encoder again, before the steps; each costs about half a step
    steps: int = 0  # of optimization at 128 px after the encoder; see docs/encoder.md for what each buys
    rate: float = 0.1  # of Adam, in standard deviations of W
    identity: float = 0.1  # weight of the identity network in what the steps minimise; 0 does without it

    def __post_init__(self) -> None:
        if not 0 <= self.passes <= 20:
            raise ValueError(f"passes must be 0 to 20, got {self.passes}")
        if not 0 <= self.steps <= 10000:
            raise ValueError(f"steps must be 0 to 10000, got {self.steps}")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, got {self.rate:g}")
        if not 0 <= self.identity <= 10:
            raise ValueError(f"identity must be 0 to 10, got {self.identity:g}")


@dataclass(frozen=True)
class Networks:
    """What encodes; for passes and steps, what shows the codes at 128 px; for steps, what compares faces."""

    encoder: CodeEncoder
    shows: tuple[MobileStyleGAN, PreviewHead] | None
    compares: ReconstructionLoss | None


def encode(networks: Networks, config: EncoderConfig, inputs: Inputs) -> Outputs:
    """Reads `face` (H, H, 3) uint8 RGB, aligned, and its `labels` (H, H) uint8 region ids.

    Writes `codes` (12, 23, 512) float16 and `to_canvas` (3, 3) float64, px of the face -> px of the picture made of them. Raises ItemError
    for a face smaller than the encoder's.
    """
    import torch
    from torch.nn.functional import interpolate

    from e4s_models.code_encoder import LAYER_GROUPS
    from e4s_models.inversion import RefineSettings, feed_back, refine
    from e4s_models.preview_head import SIDE as PREVIEW_SIDE
    from e4s_models.preview_head import preview

    encoder, compares = networks.encoder, networks.compares
    side = check_shape(inputs["face"], "H H 3")["H"]
    if side < encoder.side:
        raise ItemError(f"the aligned face has {side} px, the encoder needs {encoder.side}: raise align.side")
    with torch.inference_mode(False), torch.no_grad():  # refining needs gradients
        face = to_tensor(inputs["face"], encoder)
        regions = to_labels(inputs["labels"], encoder)
        codes = encoder.codes(face, regions)
        if networks.shows:
            show = partial(preview, *networks.shows, region_ids=regions)
            small = interpolate(face, (PREVIEW_SIDE, PREVIEW_SIDE), mode="area")

            def encode_small(pictures: Tensor) -> Tensor:
                return encoder.codes(interpolate(pictures, (encoder.side, encoder.side), mode="bilinear"), regions)

            codes = feed_back(codes, encode_small, show, small, config.passes)
        if networks.shows and compares:
            loss = partial(compares, wanted=compares.of(small))
            codes, _ = refine(codes, show, loss, encoder.basis, LAYER_GROUPS, RefineSettings(steps=config.steps, rate=config.rate))
    scale = SIDE / side
    to_canvas = np.array([[scale, 0, (scale - 1) / 2], [0, scale, (scale - 1) / 2], [0, 0, 1]])
    return {"codes": codes[0].cpu().numpy().astype(np.float16), "to_canvas": to_canvas}


def _load(config: EncoderConfig, device: str) -> Networks:
    import torch

    from e4s_models.code_encoder import CodeEncoder
    from e4s_models.mobile_stylegan import MobileStyleGAN
    from e4s_models.preview_head import PreviewHead
    from e4s_models.reconstruction_loss import LossWeights, ReconstructionLoss

    with torch.inference_mode(False):  # refining needs gradients
        shows = (MobileStyleGAN.load(device), PreviewHead.load(device)) if config.passes or config.steps else None
        compares = ReconstructionLoss.load(device, LossWeights(identity=config.identity)) if config.steps else None
        return Networks(CodeEncoder.load(device), shows, compares)


def _weights(config: EncoderConfig) -> tuple[str, ...]:
    names = ["code_encoder"]
    if config.passes or config.steps:
        names += _SHOWING
    if config.steps:
        names += [*_COMPARING, *(["arcface_mbf"] if config.identity else [])]
    return tuple(names)


STAGE = Stage(
    name="encode",
    backend="encoder",
    version=1,
    config=EncoderConfig,
    load=_load,
    run=each(encode),
    reads=("face", "labels"),
    writes={"codes": "array", "to_canvas": "array"},
    weights=_weights,
    libraries=("numpy", "torch"),
    device="any",
)

BACKENDS = {"encoder": STAGE}
