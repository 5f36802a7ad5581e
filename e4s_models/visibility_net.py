"""Which pixels of an aligned face show the face itself, and which something in front of it.

The first three stages of the face parser's ResNet-18 and a small decoder at half the side. How it was trained: `docs/visibility.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from e4s_models.checks import check_shape
from e4s_models.face_parser import ResNet18

if TYPE_CHECKING:
    from e4s_models.face_parser import FaceParser

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB in [0, 1]
_TRUNK = (64, 64, 128, 256)  # channels at strides 2, 4, 8 and 16
_WIDTHS = (24, 48, 64, 96, 128)  # of the decoder, at strides 2, 4, 8, 16 and 32


class Seen(IntEnum):
    """What a pixel shows."""

    OTHER = 0  # hair, clothes, what is behind
    FACE = 1  # the person's inner face (`e4s_models.regions.INNER_FACE`)
    OCCLUDER = 2  # something in front


class _Block(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class VisibilityNet(nn.Module):
    """Aligned faces -> scores of `Seen` per pixel."""

    side = 256
    """px: faces are shrunk to this square."""

    mean: Tensor
    std: Tensor

    def __init__(self, widths: Sequence[int] = _WIDTHS) -> None:
        """Build with random weights; `widths` of the decoder at strides 2, 4, 8, 16 and 32."""
        super().__init__()
        trunk = ResNet18()
        self.stem = nn.Sequential(trunk.conv1, trunk.bn1, nn.ReLU())
        self.levels = nn.ModuleList((nn.Sequential(trunk.maxpool, trunk.layer1), trunk.layer2, trunk.layer3))
        self.deepest = nn.Sequential(_Block(_TRUNK[-1], widths[-1], 2), _Block(widths[-1], widths[-1]))
        self.sides = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels, width in zip(_TRUNK, widths[:-1], strict=True))
        self.ups = nn.ModuleList(nn.Conv2d(deep, shallow, 1) for shallow, deep in pairwise(widths))
        self.mixes = nn.ModuleList(nn.Sequential(nn.ReLU(), _Block(width, width)) for width in widths[:-1])
        self.out = nn.Conv2d(widths[0], len(Seen), 1)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def load(cls, device: str = "cpu") -> Self:
        """The shipped network, trained by `e4s train visibility`, ready for inference. Raises WeightsError."""
        from e4s_models.weights import load_shipped

        return load_shipped(cls(), "visibility", device)

    def start_from(self, parser: FaceParser) -> None:
        """Take the trunk of the face parser and keep its first half (to stride 8) as it is."""
        trunk = parser.cp.resnet
        parts = {"0": trunk.conv1, "1": trunk.bn1}
        for name, part in parts.items():
            self.stem.get_submodule(name).load_state_dict(part.state_dict())
        self.levels[0].get_submodule("1").load_state_dict(trunk.layer1.state_dict())
        self.levels[1].load_state_dict(trunk.layer2.state_dict())
        self.levels[2].load_state_dict(trunk.layer3.state_dict())
        for part in (self.stem, self.levels[0], self.levels[1]):
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """As usual, but the trunk keeps its statistics: batches are small."""
        super().train(mode)
        for part in (self.stem, *self.levels):
            part.eval()
        return self

    def forward(self, faces: Tensor) -> Tensor:
        """RGB (B, 3, H, W) float32 [-1, 1], FFHQ-aligned -> scores (B, 3, H, W) in the order of `Seen`.

        Made for squares of `side` px; H and W must be multiples of 32.
        """
        shape = check_shape(faces, "B 3 H W")
        if shape["H"] % 32 or shape["W"] % 32:
            raise ValueError(f"height and width must be multiples of 32, got {shape['H']} x {shape['W']}")
        x = self.stem(((faces + 1) / 2 - self.mean) / self.std)
        features = [x]
        for level in self.levels:
            features.append(level(features[-1]))
        x = self.deepest(features[-1])
        for feature, side, up, mix in zip(features[::-1], self.sides[::-1], self.ups[::-1], self.mixes[::-1], strict=True):
            x = mix(side(feature) + interpolate(up(x), feature.shape[-2:], mode="bilinear"))
        scores: Tensor = self.out(x)  # (B, 3, H/2, W/2)
        return interpolate(scores, faces.shape[-2:], mode="bilinear")
