"""HopeNet head pose, the network of the published `pose/hopenet_robust_alpha1.pkl` (Ruiz et al., CVPR workshops 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from e4s_models.checks import check_shape
from e4s_models.published import Array, Case, Published

NUM_BINS = 66
BIN_DEGREES, FIRST_DEGREES = 3.0, -99.0  # bin i stands for i x 3 - 99 degrees
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB in [0, 1]
_EXPANSION = 4


class PoseBins(NamedTuple):
    """Scores of the angle bins, each (B, 66)."""

    yaw: Tensor
    pitch: Tensor
    roll: Tensor


class _Bottleneck(nn.Module):
    """ResNet bottleneck, stride on the 3x3 convolution."""

    def __init__(self, inputs: int, hidden: int, stride: int) -> None:
        super().__init__()
        outputs = hidden * _EXPANSION
        self.conv1 = nn.Conv2d(inputs, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return cast(Tensor, self.downsample(x) + self.bn3(self.conv3(y))).relu()


def _layer(inputs: int, hidden: int, count: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        _Bottleneck(inputs, hidden, stride), *(_Bottleneck(hidden * _EXPANSION, hidden, stride=1) for _ in range(count - 1))
    )


class HopeNet(nn.Module):
    """ResNet-50 with one classifier of angle bins per axis. The defaults are the published network; smaller ones are for tests."""

    mean: Tensor
    std: Tensor

    def __init__(self, counts: Sequence[int] = (3, 4, 6, 3), width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _layer(width, width, counts[0], stride=1)
        self.layer2 = _layer(width * 4, width * 2, counts[1], stride=2)
        self.layer3 = _layer(width * 8, width * 4, counts[2], stride=2)
        self.layer4 = _layer(width * 16, width * 8, counts[3], stride=2)
        self.fc_yaw = nn.Linear(width * 32, NUM_BINS)
        self.fc_pitch = nn.Linear(width * 32, NUM_BINS)
        self.fc_roll = nn.Linear(width * 32, NUM_BINS)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, faces: Tensor) -> PoseBins:
        """Score the angle bins: RGB (B, 3, 224, 224) float32 [-1, 1] -> logits. The ImageNet normalisation happens here."""
        check_shape(faces, "B 3 224 224")
        x = self.maxpool(self.bn1(self.conv1(((faces + 1) / 2 - self.mean) / self.std)).relu())
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [B, 2048, 7, 7]
        features = x.mean((2, 3))
        return PoseBins(self.fc_yaw(features), self.fc_pitch(features), self.fc_roll(features))

    def degrees(self, faces: Tensor) -> Tensor:
        """Head pose: RGB (B, 3, 224, 224) float32 [-1, 1] -> yaw, pitch, roll (B, 3) in degrees."""
        return bins_to_degrees(self(faces))


def bins_to_degrees(bins: PoseBins) -> Tensor:
    """The expected angle under the softmax of the bins (paper, section 3.2): logits -> yaw, pitch, roll (B, 3) in degrees."""
    probabilities = torch.stack(bins, dim=1).softmax(dim=2)  # [B, 3, 66]
    index = torch.arange(NUM_BINS, dtype=probabilities.dtype, device=probabilities.device)
    return probabilities @ index * BIN_DEGREES + FIRST_DEGREES


def _rename(key: str) -> str | None:
    return None if key.startswith("fc_finetune.") else key  # left over from the authors' experiments, computes nothing


def _run_reference(network: nn.Module, case: Case) -> dict[str, Array]:
    bins: PoseBins = network(torch.from_numpy(case["image_u8"]).permute(2, 0, 1)[None] / 127.5 - 1)
    outputs = {f"{axis}_bins": logits.numpy() for axis, logits in bins._asdict().items()}
    return outputs | {"degrees": bins_to_degrees(bins)[0].numpy()}


PUBLISHED_HOPENET = Published(name="hopenet", file="pose/hopenet_robust_alpha1.pkl", build=HopeNet, rename=_rename, run=_run_reference)
