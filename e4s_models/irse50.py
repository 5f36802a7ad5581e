"""IR-SE-50, the face recognition network of the published `pixel2style2pixel/model_ir_se50.pth`: how alike two faces are in identity."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from e4s_models.checks import check_shape
from e4s_models.published import Array, Case, Published

EMBEDDING = 512
_SQUEEZE = 16  # channels per hidden channel of a squeeze-and-excitation gate


class _ChannelGate(nn.Module):
    """Squeeze-and-excitation: channels weighted by what the whole picture holds (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // _SQUEEZE, 1, bias=False)
        self.excite = nn.Conv2d(channels // _SQUEEZE, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu())  # [B, C, 1, 1]
        return x * gate.sigmoid()


class _Shortcut(nn.Module):
    """The input of a unit at its output's width and size: every `stride`-th pixel, projected where the width changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.projection: nn.Module = nn.Identity()
        if inputs != outputs:
            self.projection = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.projection(x[:, :, :: self.stride, :: self.stride]))


class _Unit(nn.Module):
    """ArcFace's improved residual unit (Deng et al., CVPR 2019, section 3.1) with a channel gate."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.shortcut = _Shortcut(inputs, outputs, stride)
        self.norm_in = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False)
        self.norm_out = nn.BatchNorm2d(outputs)
        self.gate = _ChannelGate(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_out(self.conv2(self.prelu(self.conv1(self.norm_in(x)))))
        return cast(Tensor, self.gate(y) + self.shortcut(x))


class IrSe50(nn.Module):
    """Identity embedding of an aligned face; differentiable, so that it also serves as the identity term of a training loss.

    The defaults are the published network. Smaller ones are for tests.
    """

    def __init__(
        self,
        units: Sequence[int] = (3, 4, 14, 3),
        widths: Sequence[int] = (64, 128, 256, 512),
        side: int = 112,  # px
    ) -> None:
        super().__init__()
        self.side = side
        self.conv = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.prelu = nn.PReLU(widths[0])
        self.units = nn.Sequential()
        inputs = widths[0]
        for count, outputs in zip(units, widths, strict=True):
            for index in range(count):
                self.units.append(_Unit(inputs, outputs, stride=2 if index == 0 else 1))
                inputs = outputs
        self.head_norm_in = nn.BatchNorm2d(inputs)
        self.head = nn.Linear(inputs * (side >> len(widths)) ** 2, EMBEDDING)
        self.head_norm_out = nn.BatchNorm1d(EMBEDDING)

    def forward(self, faces: Tensor) -> Tensor:
        """Embed aligned faces: RGB (B, 3, 112, 112) float32 [-1, 1] -> unit vectors (B, 512); dot product = cosine similarity."""
        check_shape(faces, f"B 3 {self.side} {self.side}")
        x = self.head_norm_in(self.units(self.prelu(self.norm(self.conv(faces)))))  # [B, 512, 7, 7]
        return normalize(self.head_norm_out(self.head(x.flatten(1))))


_NAMES = {
    "input_layer.0": "conv",
    "input_layer.1": "norm",
    "input_layer.2": "prelu",
    "output_layer.0": "head_norm_in",
    "output_layer.3": "head",  # 1 is dropout, 2 flattens
    "output_layer.4": "head_norm_out",
    "shortcut_layer": "shortcut.projection",
    "res_layer.0": "norm_in",
    "res_layer.1": "conv1",
    "res_layer.2": "prelu",
    "res_layer.3": "conv2",
    "res_layer.4": "norm_out",
    "res_layer.5.fc1": "gate.squeeze",
    "res_layer.5.fc2": "gate.excite",
}


def _rename(key: str) -> str:
    match = re.fullmatch(r"(body\.\d+\.)?(input_layer\.\d|output_layer\.\d|shortcut_layer|res_layer\.\d(?:\.fc\d)?)\.(.+)", key)
    if match is None:
        return key
    unit, layer, rest = match.groups(default="")
    return f"{unit.replace('body', 'units')}{_NAMES.get(layer, layer)}.{rest}"


def _run_reference(network: nn.Module, case: Case) -> dict[str, Array]:
    faces = torch.from_numpy(case["image_u8"]).permute(2, 0, 1)[None] / 127.5 - 1
    return {"embedding": network(faces).numpy()}


PUBLISHED_IRSE50 = Published(name="irse50", file="pixel2style2pixel/model_ir_se50.pth", build=IrSe50, rename=_rename, run=_run_reference)
