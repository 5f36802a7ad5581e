"""How far a generated face is from the one it shall show: pixels, LPIPS, identity and parsing features at several scales (Eq. 18-22)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e4s_models.checks import check_shape
from e4s_models.face_crops import arcface_squares
from e4s_models.face_parser import FaceParser
from e4s_models.lpips_net import MIN_SIDE, Lpips
from e4s_models.onnx_network import OnnxNetwork

if TYPE_CHECKING:
    from typing import Self

_ID_TENSORS = ("418", "451", "473", "658", "515")  # of w600k_mbf: 14, 14, 14, 7 px and the embedding
_PARSER_SIDE = 256  # px; larger pictures are shrunk to it for the parser's trunk


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Eq. 22's lambdas, as published."""

    lpips: float = 0.8
    identity: float = 0.1
    parsing: float = 0.1


@dataclass(frozen=True)
class Wanted:
    """A batch of faces and their features, computed once."""

    faces: Tensor
    lpips: list[list[Tensor]]  # per size, per layer
    identity: list[Tensor]
    parsing: list[Tensor]

    @property
    def side(self) -> int:
        return self.faces.shape[-1]


class ReconstructionLoss(nn.Module):
    """Frozen networks; gradients flow to the pictures."""

    mean: Tensor
    std: Tensor

    def __init__(self, lpips: Lpips, identity: OnnxNetwork | None, parser: FaceParser, weights: LossWeights | None = None) -> None:
        """`identity` may be None where its weight is 0."""
        super().__init__()
        self.lpips, self.identity, self.trunk = lpips, identity, parser.cp.resnet
        self.register_buffer("mean", parser.mean, persistent=False)
        self.register_buffer("std", parser.std, persistent=False)
        self.weights = weights or LossWeights()

    @classmethod
    def load(cls, device: str = "cpu", weights: LossWeights | None = None) -> Self:
        """Open the verified weights lpips_alexnet, face_parser and, where it counts, arcface_mbf."""
        weights = weights or LossWeights()
        identity = OnnxNetwork.load("arcface_mbf") if weights.identity else None
        loss = cls(Lpips.load(), identity, FaceParser.load("cpu"), weights)
        return loss.to(device).eval().requires_grad_(False)

    def of(self, faces: Tensor) -> Wanted:
        """Features of faces (B, 3, S, S) RGB [-1, 1], FFHQ-aligned, that pictures of the same size shall have."""
        check_shape(faces, "B 3 S S")
        w = self.weights
        return Wanted(
            faces,
            [self.lpips.activations(small) for small in _pyramid(faces)] if w.lpips else [],
            self._identity(faces) if w.identity else [],
            self._parsing(faces) if w.parsing else [],
        )

    def forward(self, pictures: Tensor, wanted: Wanted) -> Tensor:
        """(B,): Eq. 22 of pictures (B, 3, S, S), with LPIPS at S and S / 2."""
        check_shape(pictures, f"{len(wanted.faces)} 3 {wanted.side} {wanted.side}")
        w = self.weights
        loss = (pictures - wanted.faces).square().mean(dim=(1, 2, 3))
        for small, reference in zip(_pyramid(pictures), wanted.lpips, strict=False):
            layers = zip(self.lpips.heads, self.lpips.activations(small), reference, strict=True)
            distance = torch.stack([head((a - b).square()).mean(dim=(1, 2, 3)) for head, a, b in layers]).sum(dim=0)
            loss = loss + w.lpips / len(wanted.lpips) * distance
        if w.identity:
            loss = loss + w.identity * _one_minus_cosine(self._identity(pictures), wanted.identity)
        if w.parsing:
            loss = loss + w.parsing * _one_minus_cosine(self._parsing(pictures), wanted.parsing)
        return loss

    def _identity(self, faces: Tensor) -> list[Tensor]:
        assert self.identity is not None
        return self.identity.tensors(arcface_squares(faces), _ID_TENSORS)

    def _parsing(self, faces: Tensor) -> list[Tensor]:
        if faces.shape[-1] > _PARSER_SIDE:
            faces = F.interpolate(faces, (_PARSER_SIDE, _PARSER_SIDE), mode="bilinear", antialias=True)
        return list(self.trunk(((faces + 1) / 2 - self.mean) / self.std))


def _pyramid(faces: Tensor) -> list[Tensor]:
    half = faces.shape[-1] // 2
    return [faces, F.avg_pool2d(faces, 2)] if half >= MIN_SIDE else [faces]


def _one_minus_cosine(features: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    """Sum over levels of one minus the cosine of the flattened features: (B,)."""
    return torch.stack([1 - F.cosine_similarity(a.flatten(1), b.flatten(1)) for a, b in zip(features, references, strict=True)]).sum(dim=0)
