"""BiSeNet face parsing (19 classes), the network of the published `faceseg/79999_iter.pth`, with its key names."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from e4s_models.checks import check_shape
from e4s_models.published import Array, Case, Published

NUM_CLASSES = 19
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB in [0, 1]


class _Block(nn.Module):
    """ResNet basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return cast(Tensor, self.downsample(x) + y).relu()


class ResNet18(nn.Module):
    """Trunk without pooling and classifier: features at strides 4, 8, 16 and 32 (64, 128, 256 and 512 channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(_Block(64, 64, 1), _Block(64, 64, 1))
        self.layer2 = nn.Sequential(_Block(64, 128, 2), _Block(128, 128, 1))
        self.layer3 = nn.Sequential(_Block(128, 256, 2), _Block(256, 256, 1))
        self.layer4 = nn.Sequential(_Block(256, 512, 2), _Block(512, 512, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        feat4 = self.layer1(self.maxpool(self.bn1(self.conv1(x)).relu()))
        feat8 = self.layer2(feat4)
        feat16 = self.layer3(feat8)
        return feat4, feat8, feat16, self.layer4(feat16)


class _ConvBNReLU(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.bn(self.conv(x))).relu()


class _AttentionRefinement(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = _ConvBNReLU(inputs, outputs, 3)
        self.conv_atten = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        feat = self.conv(x)
        attention: Tensor = self.bn_atten(self.conv_atten(adaptive_avg_pool2d(feat, 1)))
        return cast(Tensor, feat * attention.sigmoid())


class _ContextPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resnet = ResNet18()
        self.arm16 = _AttentionRefinement(256, 128)
        self.arm32 = _AttentionRefinement(512, 128)
        self.conv_head32 = _ConvBNReLU(128, 128, 3)
        self.conv_head16 = _ConvBNReLU(128, 128, 3)
        self.conv_avg = _ConvBNReLU(512, 128, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, feat8, feat16, feat32 = self.resnet(x)
        context = self.conv_avg(adaptive_avg_pool2d(feat32, 1))  # [B, 128, 1, 1]
        up32 = self.conv_head32(interpolate(self.arm32(feat32) + context, feat16.shape[-2:]))
        up16 = self.conv_head16(interpolate(self.arm16(feat16) + up32, feat8.shape[-2:]))
        return feat8, up16


class _FeatureFusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convblk = _ConvBNReLU(256, 256, 1)
        self.conv1 = nn.Conv2d(256, 64, 1, bias=False)
        self.conv2 = nn.Conv2d(64, 256, 1, bias=False)

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        feat = self.convblk(torch.cat([spatial, context], dim=1))
        attention: Tensor = self.conv2(self.conv1(adaptive_avg_pool2d(feat, 1)).relu())
        return cast(Tensor, feat * attention.sigmoid() + feat)


class _Head(nn.Module):
    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.conv = _ConvBNReLU(inputs, hidden, 3)
        self.conv_out = nn.Conv2d(hidden, NUM_CLASSES, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv_out(self.conv(x)))


class FaceParser(nn.Module):
    """BiSeNet with a ResNet-18 context path (Yu et al., ECCV 2018), as trained on CelebAMask-HQ at 512 px."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.cp = _ContextPath()
        self.ffm = _FeatureFusion()
        self.conv_out = _Head(256, 256)
        self.conv_out16 = _Head(128, 64)  # supervise the training only; here so that the checkpoint loads strictly
        self.conv_out32 = _Head(128, 64)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, faces: Tensor) -> Tensor:
        """Class scores of the first head: RGB (B, 3, H, W) float32 [-1, 1] -> logits (B, 19, H, W).

        H and W are multiples of 32, at least 64; the checkpoint was trained at 512. The ImageNet normalisation happens here.
        """
        check_shape(faces, "B 3 H W")
        feat8, context = self.cp(((faces + 1) / 2 - self.mean) / self.std)
        logits = self.conv_out(self.ffm(feat8, context))  # [B, 19, H/8, W/8]
        return interpolate(logits, faces.shape[-2:], mode="bilinear", align_corners=True)

    @classmethod
    def load(cls, device: str, weights: str = "face_parser") -> FaceParser:
        """The published parser, ready for inference on `device`. Raises if the weight file is missing or does not fit."""
        from e4s_models.weights import load_state_dict, load_strict

        parser = cls()
        load_strict(parser, load_state_dict(weights), weights)
        return parser.to(device).eval().requires_grad_(False)


def _run_reference(parser: nn.Module, case: Case) -> dict[str, Array]:
    faces = torch.from_numpy(case["image_u8"]).permute(2, 0, 1)[None] / 127.5 - 1
    logits = parser(faces)
    return {"logits_sub": logits[:, :, ::16, ::16].numpy(), "argmax_u8": logits[0].argmax(0).to(torch.uint8).numpy()}


PUBLISHED_BISENET = Published(name="bisenet", file="faceseg/79999_iter.pth", build=FaceParser, run=_run_reference)
