"""GPEN face restoration (Yang et al., CVPR 2021), the network of the published `GPEN/weights/GPEN-BFR-512.pth`.

A StyleGAN2 generator whose noise inputs are the features of an encoder: the picture's global content arrives as the latent code, its
detail as those features, joined to the generator's own by concatenation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from e4s_models.checks import check_shape
from e4s_models.published import Array, Case, Published
from e4s_models.stylegan2_layers import EPSILON, EqualConv, EqualLinear, Modulated, ToRGB, activate

_MAPPING_RATE = 0.01  # learning rate of the mapping network in relation to the others', part of its weights' scale


class _StyledLayer(nn.Module):
    """Modulated convolution, joined with the encoder's features of that size: `outputs` channels of each."""

    def __init__(self, inputs: int, outputs: int, latent: int, *, upsample: bool) -> None:
        super().__init__()
        self.conv = Modulated(inputs, outputs, 3, latent, up=2 if upsample else 1)
        self.detail_gain = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(2 * outputs))

    def forward(self, x: Tensor, codes: Tensor, detail: Tensor) -> Tensor:
        return activate(torch.cat([self.conv(x, codes), self.detail_gain * detail], dim=1), self.bias)


class Gpen(nn.Module):
    """Blind restoration of an aligned face. The defaults are the published network; smaller ones are for tests."""

    def __init__(self, side: int = 512, widest: int = 512, latent: int = 512, mapping_layers: int = 8) -> None:
        super().__init__()
        levels = side.bit_length() - 1
        if side != 1 << levels or levels < 3:
            raise ValueError(f"expected a side that is a power of 2 from 8 on, got {side}")
        self.side = side
        widths = [min(widest, 32 * 1024 // (1 << level)) for level in range(levels, 1, -1)]  # from `side` to 4 px: 64 ... 512
        self.encoder = nn.ModuleList([EqualConv(3, widths[0], 1)])
        self.encoder.extend(EqualConv(inputs, outputs, 3, down=True) for inputs, outputs in pairwise(widths))
        self.to_latent = EqualLinear(widths[-1] * 4 * 4, latent, activation=True)
        self.mapping = nn.Sequential(*(EqualLinear(latent, latent, activation=True, rate=_MAPPING_RATE) for _ in range(mapping_layers)))

        widths.reverse()
        self.constant = nn.Parameter(torch.randn(1, widths[0], 4, 4))
        self.layers = nn.ModuleList([_StyledLayer(widths[0], widths[0], latent, upsample=False)])
        self.to_rgb = nn.ModuleList([ToRGB(2 * widths[0], latent)])
        for inputs, outputs in pairwise(widths):
            self.layers.append(_StyledLayer(2 * inputs, outputs, latent, upsample=True))
            self.layers.append(_StyledLayer(2 * outputs, outputs, latent, upsample=False))
            self.to_rgb.append(ToRGB(2 * outputs, latent))

    def forward(self, faces: Tensor) -> Tensor:
        """Restore aligned faces: RGB (B, 3, 512, 512) float32 [-1, 1] -> the same; the result can overshoot the range a little."""
        check_shape(faces, f"B 3 {self.side} {self.side}")
        details, x = [], faces.contiguous(memory_format=torch.channels_last)
        for layer in self.encoder:
            x = layer(x)
            details.append(x)
        latent = self.to_latent(x.flatten(1))  # [B, 512]
        latent = self.mapping(latent * (latent.square().mean(1, keepdim=True) + EPSILON).rsqrt())

        codes = latent[:, None]  # [B, 1, 512]

        detail = details.pop()  # 4 px
        x = self.layers[0](self.constant.expand(faces.shape[0], -1, -1, -1), codes, detail)
        picture: Tensor = self.to_rgb[0](x, codes, None, None)
        for index, to_rgb in enumerate(self.to_rgb[1:], start=1):
            detail = details.pop()
            x = self.layers[2 * index - 1](x, codes, detail)
            x = self.layers[2 * index](x, codes, detail)
            picture = to_rgb(x, codes, None, picture)
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
    (r"\.modulation\.", lambda _: ".style."),
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
