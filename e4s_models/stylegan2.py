"""Mask-guided StyleGAN2: a face generator whose first K style layers take another code in every region of a label map.

Source: the paper's Sec. 3.2.2, Eq. 8-9, and the `G` part of the published `E4S/iteration_300000.pt`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from e4s_models.checks import check_shape
from e4s_models.stylegan2_layers import EqualLinear, Modulated, Regions, ToRGB, activate

__all__ = ["CODE_DIM", "NUM_REGION_LAYERS", "EqualLinear", "Regions", "StyleGAN2"]

CODE_DIM = 512
NUM_REGION_LAYERS = 13  # the paper's K


class StyledConv(nn.Module):
    """Modulated 3x3 convolution, noise, bias, LeakyReLU of gain sqrt 2."""

    noise: Tensor

    def __init__(self, inputs: int, outputs: int, side: int, code_dim: int, up: int = 1) -> None:
        super().__init__()
        self.conv = Modulated(inputs, outputs, 3, code_dim, up)
        self.noise_strength = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("noise", torch.randn(1, 1, side, side))

    def forward(self, x: Tensor, codes: Tensor, regions: Regions | None, noise: Tensor | None) -> Tensor:
        """x (B, C, H, W), codes (B, R, D), noise (1 or B, 1, side, side), None: the stored map -> (B, C', side, side)."""
        x = self.conv(x, codes, regions)
        return activate(x, self.bias, self.noise_strength * (self.noise if noise is None else noise))


class StyleGAN2(nn.Module):
    """Style codes per region and a label map -> a face. Deterministic: the noise maps are stored with the weights.

    Style layer i, which takes code i, reads the label map when i < `region_layers`; later layers take region 0's code everywhere.
    With the published 13 these are the convolutions up to 256 px and the ToRGB layers up to 128 px. To make every layer regional (the
    published option 17) give 18.
    """

    def __init__(
        self,
        side: int = 1024,
        region_layers: int = NUM_REGION_LAYERS,
        max_width: int = 512,
        width_times_side: int = 1 << 15,
        code_dim: int = CODE_DIM,
    ) -> None:
        """Build with random weights.

        Args:
            side: px of the picture, a power of two; published: 1024.
            region_layers: the paper's K; layers below it are regional.
            max_width: channels of the small feature maps.
            width_times_side: bounds the channels of the large ones: 32 at 1024 px.
            code_dim: D, length of a style code.
        """
        super().__init__()
        if side < 8 or side & (side - 1):
            raise ValueError(f"the picture's side must be a power of two from 8 px on, got {side}")
        self.side, self.region_layers, self.code_dim = side, region_layers, code_dim
        self.num_layers = 2 * int(math.log2(side)) - 2  # codes; 18 at 1024 px
        sides = [4 << k for k in range(self.num_layers // 2)]
        widths = [min(max_width, width_times_side // s) for s in sides]
        self.constant = nn.Parameter(torch.randn(1, widths[0], 4, 4))
        convs = [StyledConv(widths[0], widths[0], 4, code_dim)]
        for k in range(1, len(sides)):
            convs.append(StyledConv(widths[k - 1], widths[k], sides[k], code_dim, up=2))
            convs.append(StyledConv(widths[k], widths[k], sides[k], code_dim))
        self.convs = nn.ModuleList(convs)  # num_layers - 1
        self.to_rgbs = nn.ModuleList(ToRGB(width, code_dim) for width in widths)

    def forward(self, codes: Tensor, region_ids: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        """Generate RGB (B, 3, side, side), about [-1, 1] (not clipped).

        Args:
            codes: (B, R, num_layers, D), one per region and style layer.
            region_ids: (B, H, W) uint8 in 0..R-1, square, any size; each layer reads them at its own size (nearest). None: region 0
                everywhere, which needs R = 1.
            noise: maps (1 or B, 1, s, s) to use instead of the stored ones, one per convolution; training draws them.

        Raises ValueError on other shapes and on region ids without a code.
        """
        bound = check_shape(codes, f"B R {self.num_layers} {self.code_dim}")
        regions = None
        if region_ids is not None:
            ids = check_shape(region_ids, "B H H")
            if ids["B"] != bound["B"]:
                raise ValueError(f"expected {bound['B']} label maps for {bound['B']} codes, got {ids['B']}")
            regions = Regions(region_ids, bound["R"])
        elif bound["R"] != 1:
            raise ValueError(f"codes of {bound['R']} regions need region_ids (B, H, W)")
        if noise is not None and len(noise) != len(self.convs):
            raise ValueError(f"expected {len(self.convs)} noise maps, one per convolution, got {len(noise)}")
        x = self.constant.expand(bound["B"], -1, -1, -1).contiguous(memory_format=torch.channels_last)
        image: Tensor | None = None
        for i, conv in enumerate(self.convs):
            x = conv(x, codes[:, :, i], self._regions_of(i, regions), noise[i] if noise else None)
            if i % 2 == 0:  # the last convolution of its size
                image = self.to_rgbs[i // 2](x, codes[:, :, i + 1], self._regions_of(i + 1, regions), image)
        assert image is not None
        return image

    def _regions_of(self, layer: int, regions: Regions | None) -> Regions | None:
        return regions if layer < self.region_layers else None
