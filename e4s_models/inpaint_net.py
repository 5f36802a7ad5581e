"""Face inpainting where swapped and target masks mismatch, the network of the published `inpainting/net_g_50000.pth`.

An encoder and a StyleGAN2 decoder; how much of the encoder's features enters each level of the decoder depends on the area ratio of
the hole (E4S, section 3.3.3).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, leaky_relu, linear

from e4s_models.checks import check_shape
from e4s_models.published import Array, Case, Published

_CHANNELS = (128, 256, 512, 512, 512)  # at 256, 128, ... 16 px
_CODE_DIM = 512
_LAST_SIDE = 16  # px, where the encoder ends and the decoder begins


def _activate(x: Tensor) -> Tensor:
    return leaky_relu(x, 0.2) * math.sqrt(2)


class _Blur(nn.Module):
    """Binomial 4 x 4 kernel with gain, on `padding` zeros at every side."""

    kernel: Tensor

    def __init__(self, padding: int, gain: float = 1) -> None:
        super().__init__()
        self.padding = padding
        taps = torch.tensor((1.0, 3.0, 3.0, 1.0)) / 8
        self.register_buffer("kernel", (gain * torch.outer(taps, taps))[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.kernel.expand(x.shape[1], -1, -1, -1), padding=self.padding, groups=x.shape[1])

    def enlarge(self, x: Tensor) -> Tensor:
        """Insert zeros between the pixels of x (B, C, H, W), then blur: (B, C, 2H, 2W)."""
        return conv_transpose2d(x, self.kernel.expand(x.shape[1], -1, -1, -1), stride=2, padding=1, groups=x.shape[1])


class _Conv(nn.Module):
    """3 x 3 convolution with equalised learning rate, halving the side after a blur if asked."""

    def __init__(self, inputs: int, outputs: int, *, halve: bool = False, activate: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.gain = 1 / math.sqrt(9 * inputs)
        self.blur = _Blur(2) if halve else None
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        if self.blur is None:
            x = conv2d(x, self.weight * self.gain, self.bias, padding=1)
        else:
            x = conv2d(self.blur(x), self.weight * self.gain, self.bias, stride=2)
        return _activate(x) if self.activate else x


class _Linear(nn.Module):
    """Linear layer with equalised learning rate."""

    def __init__(self, inputs: int, outputs: int, bias: float = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.full((outputs,), float(bias)))
        self.gain = 1 / math.sqrt(inputs)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight * self.gain, self.bias)


class _StyledConv(nn.Module):
    """Modulated and demodulated 3 x 3 convolution of StyleGAN2, doubling the side if asked; without bias and activation.

    Styles scale the input and the demodulation the output, so that one weight serves the whole batch.
    """

    def __init__(self, inputs: int, outputs: int, code_dim: int, *, double: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.style = _Linear(code_dim, inputs, bias=1)
        self.gain = 1 / math.sqrt(9 * inputs)
        self.blur = _Blur(1, gain=4) if double else None

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """x (B, C, H, W), codes (B, D) -> (B, C', H, W) or (B, C', 2H, 2W), before `finish`."""
        weight = self.weight[0] * self.gain  # (C', C, 3, 3)
        styles = self.style(codes)  # (B, C)
        demodulation = (styles.square() @ weight.square().sum(dim=(2, 3)).mT + 1e-8).rsqrt()  # (B, C')
        x = x * styles[:, :, None, None]
        x = conv2d(x, weight, padding=1) if self.blur is None else self.blur(conv_transpose2d(x, weight.transpose(0, 1), stride=2))
        return cast(Tensor, x * demodulation[:, :, None, None])

    def finish(self, x: Tensor) -> Tensor:
        return _activate(x + self.bias[:, None, None])


class _ToImage(nn.Module):
    """Modulated 1 x 1 convolution to RGB."""

    def __init__(self, inputs: int, code_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 3, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.style = _Linear(code_dim, inputs, bias=1)
        self.gain = 1 / math.sqrt(inputs)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        styles: Tensor = self.style(codes)  # (B, C)
        return conv2d(x * styles[:, :, None, None], self.weight[0] * self.gain) + self.bias


class _Level(nn.Module):
    """One resolution of the decoder: a doubling (none at the first), a convolution mixed with the encoder's features, RGB."""

    def __init__(self, inputs: int, outputs: int, code_dim: int, *, first: bool) -> None:
        super().__init__()
        self.up = None if first else _StyledConv(inputs, outputs, code_dim, double=True)
        self.blur = None if first else _Blur(1, gain=4)
        self.conv = _StyledConv(outputs, outputs, code_dim)
        self.to_image = _ToImage(outputs, code_dim)
        self.own_scale = _Linear(1, outputs, bias=1)  # of the decoder's features
        self.skip_scale = _Linear(1, outputs, bias=1)  # of the encoder's
        self.skip = _Conv(outputs, outputs, activate=False)

    def forward(self, x: Tensor, image: Tensor | None, feature: Tensor, ratio: Tensor, codes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W), image (B, 3, H, W), codes of up, conv, image -> both at twice the side, that of `feature`."""
        if self.up is not None:
            x = self.up.finish(self.up(x, codes[0]))
        own, skip = self.own_scale(ratio), self.skip_scale(ratio)  # (B, C')
        norm = (own.square() + skip.square() + 1e-8).rsqrt()
        x = self.conv(x, codes[1]) * (own * norm)[:, :, None, None] + self.skip(feature) * (skip * norm)[:, :, None, None]
        x = self.conv.finish(x)
        rgb: Tensor = self.to_image(x, codes[2])
        if image is not None and self.blur is not None:
            rgb = rgb + self.blur.enlarge(image)
        return x, rgb


class InpaintNet(nn.Module):
    """Inpainting network P_tau (E4S, section 3.3.3), at 256 px with the published channels.

    The published decoder adds random noise of a learned strength; this one adds its mean, none, and so is deterministic.
    """

    def __init__(self, channels: Sequence[int] = _CHANNELS, code_dim: int = _CODE_DIM) -> None:
        """Args: channels: width of every level, from the input's side down to 16 px; code_dim: of the style codes."""
        super().__init__()
        last = channels[-1]
        self.side = _LAST_SIDE << (len(channels) - 1)
        self.code_dim = code_dim
        self.entry = _Conv(4, channels[0])
        self.downs = nn.ModuleList(_Conv(a, b, halve=True) for a, b in pairwise(channels))
        self.start = _Conv(last, last)
        self.squeeze1 = _Conv(last, last, halve=True)
        self.squeeze2 = _Conv(last, last // 2, halve=True)
        self.to_codes = _Linear(last // 2 * 16, 2 * len(channels) * code_dim)
        widths = [last, *reversed(channels)]
        self.levels = nn.ModuleList(_Level(a, b, code_dim, first=i == 0) for i, (a, b) in enumerate(pairwise(widths)))

    def forward(self, faces: Tensor, holes: Tensor) -> Tensor:
        """Paint whole faces anew: RGB (B, 3, 256, 256) float32 [-1, 1], holes (B, 1, 256, 256) float32 {0, 1} -> (B, 3, 256, 256).

        The output is not clipped; pixels outside the holes are only close to the input. `fill` composes the two.
        """
        batch = check_shape(faces, f"B 3 {self.side} {self.side}")["B"]
        check_shape(holes, f"{batch} 1 {self.side} {self.side}")
        ratio = holes.mean(dim=(2, 3))  # (B, 1), area of the hole
        x = self.entry(torch.cat([(faces + 1) / 2 * (1 - holes), holes], dim=1))
        features: list[Tensor] = [x]
        for down in self.downs:
            features.append(down(features[-1]))
        x = features[-1]  # (B, C, 16, 16)
        codes = torch.split(_activate(self.to_codes(self.squeeze2(self.squeeze1(x)).flatten(1))), self.code_dim, dim=1)  # 10 of (B, D)
        x, image = self.start(x), None
        for index, (level, feature) in enumerate(zip(self.levels, reversed(features), strict=True)):
            first = 2 * index - 1  # level i uses codes 2i - 1, 2i, 2i + 1; the first level has no `up` to take one
            x, image = level(x, image, feature, ratio, (codes[max(first, 0)], codes[first + 1], codes[first + 2]))
        return cast(Tensor, image) * 2 - 1

    def fill(self, faces: Tensor, holes: Tensor) -> Tensor:
        """The faces with only their holes painted, (B, 3, 256, 256) in [-1, 1]; arguments as for `forward`."""
        return faces * (1 - holes) + self.forward(faces, holes).clamp(-1, 1) * holes


_LAST = len(_CHANNELS) - 1
_RENAMES = (
    (r"^conv_body_first\.\d\.", "entry."),
    (r"^conv_body_down\.(\d)\.\d\.", r"downs.\1."),
    (r"^final_conv\.\d\.", "start."),
    (r"^final_down(\d)\.\d\.", r"squeeze\1."),
    (r"^final_linear\.", "to_codes."),
    (r"^style_conv1\.", "levels.0.conv."),
    (r"^to_rgb1\.", "levels.0.to_image."),
    (r"\.modulated_conv\.weight$", ".weight"),
    (r"\.modulated_conv\.modulation\.", ".style."),
    (r"\.activate\.bias$", ".bias"),
)
_CONDITIONS = {"condition_scale1": "own_scale", "condition_scale2": "skip_scale", "condition_shift": "skip"}
_NOISE = re.compile(r"^(noises\..*|style_conv1\.weight|style_convs\.\d\.weight)$")


def _rename(key: str) -> str | None:
    if _NOISE.match(key):
        return None
    for pattern, ours in _RENAMES:
        key = re.sub(pattern, ours, key)
    if match := re.match(r"^(condition_\w+)\.(\d)\.(?:0\.)?(\w+)$", key):  # counted from the encoder's first level
        return f"levels.{_LAST - int(match[2])}.{_CONDITIONS[match[1]]}.{match[3]}"
    if match := re.match(r"^style_convs\.(\d)\.(.+)$", key):
        return f"levels.{int(match[1]) // 2 + 1}.{'conv' if int(match[1]) % 2 else 'up'}.{match[2]}"
    if match := re.match(r"^to_rgbs\.(\d)\.(.+)$", key):
        return f"levels.{int(match[1]) + 1}.to_image.{match[2]}"
    return key


def _run_reference(network: nn.Module, case: Case) -> dict[str, Array]:
    faces = torch.from_numpy(case["image_u8"]).permute(2, 0, 1)[None] / 127.5 - 1
    holes = torch.from_numpy(case["mask_u8"])[None, None].float()
    return {"out_sub": ((network(faces, holes) + 1) / 2)[:, :, ::2, ::2].numpy()}


PUBLISHED_INPAINT = Published(
    name="inpaint", file="inpainting/net_g_50000.pth", parts=("params_ema",), build=InpaintNet, rename=_rename, run=_run_reference
)
