"""GPEN face restoration (Yang et al., CVPR 2021), the network of the published `GPEN/weights/GPEN-BFR-512.pth`.

A StyleGAN2 generator whose noise inputs are the features of an encoder: the picture's global content arrives as the latent code, its
detail as those features, joined to the generator's own by concatenation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, leaky_relu, linear

from e4s_models.checks import check_shape
from e4s_models.published import Array, Case, Published

_MAPPING_RATE = 0.01  # learning rate of the mapping network in relation to the others', part of its weights' scale
_EPSILON = 1e-8


def _activate(x: Tensor, bias: Tensor) -> Tensor:
    """StyleGAN2's biased leaky ReLU, which keeps the variance."""
    return leaky_relu(x + bias.view(1, -1, *[1] * (x.ndim - 2)), 0.2) * math.sqrt(2)


def _blur_kernel(gain: float) -> Tensor:
    """The (4, 4) binomial low-pass filter of StyleGAN2; its entries sum to `gain`."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(taps, taps) * (gain / 64)


def _blur(x: Tensor, kernel: Tensor, padding: int) -> Tensor:
    channels = x.shape[1]
    return conv2d(x, kernel.expand(channels, 1, 4, 4), padding=padding, groups=channels)


class _Linear(nn.Module):
    """Linear layer with equalised learning rate (Karras et al., ICLR 2018)."""

    def __init__(self, inputs: int, outputs: int, *, activation: bool, rate: float = 1.0) -> None:
        super().__init__()
        self.activation, self.rate = activation, rate
        self.scale = rate / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight * self.scale, self.bias * self.rate
        return _activate(linear(x, weight), bias) if self.activation else linear(x, weight, bias)


class _EncoderLayer(nn.Module):
    """Convolution with equalised learning rate; with `downsample`, blurred before and at half the size after."""

    kernel: Tensor

    def __init__(self, inputs: int, outputs: int, size: int, *, downsample: bool) -> None:
        super().__init__()
        self.downsample = downsample
        self.scale = 1 / math.sqrt(inputs * size**2)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, size, size))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("kernel", _blur_kernel(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.scale
        x = conv2d(_blur(x, self.kernel, padding=2), weight, stride=2) if self.downsample else conv2d(x, weight)
        return _activate(x, self.bias)


class _ModulatedConv(nn.Module):
    """StyleGAN2's convolution whose input channels a latent code scales.

    The code scales the features and the demodulation the result, which equals scaling each sample's own weights.
    """

    kernel: Tensor

    def __init__(self, inputs: int, outputs: int, size: int, latent: int, *, demodulate: bool, upsample: bool = False) -> None:
        super().__init__()
        self.demodulate, self.upsample = demodulate, upsample
        self.padding = size // 2
        self.scale = 1 / math.sqrt(inputs * size**2)
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, size, size))  # leading 1 as published
        self.modulation = _Linear(latent, inputs, activation=False)
        nn.init.ones_(self.modulation.bias)
        self.register_buffer("kernel", _blur_kernel(4), persistent=False)  # 4: the up-sampling leaves 3 of 4 pixels empty

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        weight = self.weight[0] * self.scale  # [O, I, k, k]
        gains = self.modulation(latent)  # [B, I]
        x = x * gains[:, :, None, None]
        if self.upsample:
            x = conv_transpose2d(x, weight.transpose(0, 1), stride=2)  # [B, O, 2H + 1, 2W + 1]
            x = _blur(x, self.kernel, padding=1)  # [B, O, 2H, 2W]
        else:
            x = conv2d(x, weight, padding=self.padding)
        if self.demodulate:
            energy = gains.square() @ weight.square().sum((2, 3)).T  # [B, O]
            x = x * (energy + _EPSILON).rsqrt()[:, :, None, None]
        return x


class _StyledLayer(nn.Module):
    """Modulated convolution, joined with the encoder's features of that size: `outputs` channels of each."""

    def __init__(self, inputs: int, outputs: int, latent: int, *, upsample: bool) -> None:
        super().__init__()
        self.conv = _ModulatedConv(inputs, outputs, 3, latent, demodulate=True, upsample=upsample)
        self.detail_gain = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(2 * outputs))

    def forward(self, x: Tensor, latent: Tensor, detail: Tensor) -> Tensor:
        return _activate(torch.cat([self.conv(x, latent), self.detail_gain * detail], dim=1), self.bias)


class _ToRgb(nn.Module):
    """Features to colours, added to the enlarged picture of the size before."""

    kernel: Tensor

    def __init__(self, inputs: int, latent: int) -> None:
        super().__init__()
        self.conv = _ModulatedConv(inputs, 3, 1, latent, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.register_buffer("kernel", _blur_kernel(4), persistent=False)

    def forward(self, x: Tensor, latent: Tensor, picture: Tensor | None) -> Tensor:
        rgb: Tensor = self.conv(x, latent) + self.bias
        if picture is None:
            return rgb
        return rgb + conv_transpose2d(picture, self.kernel.expand(3, 1, 4, 4), stride=2, padding=1, groups=3)


class Gpen(nn.Module):
    """Blind restoration of an aligned face. The defaults are the published network; smaller ones are for tests."""

    def __init__(self, side: int = 512, widest: int = 512, latent: int = 512, mapping_layers: int = 8) -> None:
        super().__init__()
        levels = side.bit_length() - 1
        if side != 1 << levels or levels < 3:
            raise ValueError(f"expected a side that is a power of 2 from 8 on, got {side}")
        self.side = side
        widths = [min(widest, 32 * 1024 // (1 << level)) for level in range(levels, 1, -1)]  # from `side` to 4 px: 64 ... 512
        self.encoder = nn.ModuleList([_EncoderLayer(3, widths[0], 1, downsample=False)])
        self.encoder.extend(_EncoderLayer(inputs, outputs, 3, downsample=True) for inputs, outputs in pairwise(widths))
        self.to_latent = _Linear(widths[-1] * 4 * 4, latent, activation=True)
        self.mapping = nn.Sequential(*(_Linear(latent, latent, activation=True, rate=_MAPPING_RATE) for _ in range(mapping_layers)))

        widths.reverse()
        self.constant = nn.Parameter(torch.randn(1, widths[0], 4, 4))
        self.layers = nn.ModuleList([_StyledLayer(widths[0], widths[0], latent, upsample=False)])
        self.to_rgb = nn.ModuleList([_ToRgb(2 * widths[0], latent)])
        for inputs, outputs in pairwise(widths):
            self.layers.append(_StyledLayer(2 * inputs, outputs, latent, upsample=True))
            self.layers.append(_StyledLayer(2 * outputs, outputs, latent, upsample=False))
            self.to_rgb.append(_ToRgb(2 * outputs, latent))

    def forward(self, faces: Tensor) -> Tensor:
        """Restore aligned faces: RGB (B, 3, 512, 512) float32 [-1, 1] -> the same; the result can overshoot the range a little."""
        check_shape(faces, f"B 3 {self.side} {self.side}")
        details, x = [], faces
        for layer in self.encoder:
            x = layer(x)
            details.append(x)
        latent = self.to_latent(x.flatten(1))  # [B, 512]
        latent = self.mapping(latent * (latent.square().mean(1, keepdim=True) + _EPSILON).rsqrt())

        detail = details.pop()  # 4 px
        x = self.layers[0](self.constant.expand(faces.shape[0], -1, -1, -1), latent, detail)
        picture: Tensor = self.to_rgb[0](x, latent, None)
        for index, to_rgb in enumerate(self.to_rgb[1:], start=1):
            detail = details.pop()
            x = self.layers[2 * index - 1](x, latent, detail)
            x = self.layers[2 * index](x, latent, detail)
            picture = to_rgb(x, latent, picture)
        return picture


_NAMES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"ecd(\d+)\.0\.\d\.", lambda found: f"encoder.{found[1]}."),
    (r"final_linear\.0\.", lambda _: "to_latent."),
    (r"generator\.style\.(\d+)\.", lambda found: f"mapping.{int(found[1]) - 1}."),  # 0 normalises
    (r"generator\.input\.input", lambda _: "constant"),
    (r"generator\.conv1\.", lambda _: "layers.0."),
    (r"generator\.convs\.(\d+)\.", lambda found: f"layers.{int(found[1]) + 1}."),
    (r"generator\.to_rgb1\.", lambda _: "to_rgb.0."),
    (r"generator\.to_rgbs\.(\d+)\.", lambda found: f"to_rgb.{int(found[1]) + 1}."),
    (r"\.noise\.weight", lambda _: ".detail_gain"),
    (r"\.activate\.", lambda _: "."),
)


def _rename(key: str) -> str | None:
    if key.endswith(".kernel"):
        return None  # the blur, a constant
    for pattern, name in _NAMES:
        key = re.sub(pattern, name, key)
    return key


def _run_reference(network: nn.Module, case: Case) -> dict[str, Array]:
    restored = network(torch.from_numpy(case["image_u8"]).permute(2, 0, 1)[None] / 127.5 - 1)
    return {"out_sub": restored[:, :, ::4, ::4].numpy(), "out_crop": restored[:, :, 200:264, 200:264].numpy()}


PUBLISHED_GPEN = Published(name="gpen", file="GPEN/weights/GPEN-BFR-512.pth", build=Gpen, rename=_rename, run=_run_reference)
