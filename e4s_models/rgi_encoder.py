"""The regional GAN inversion's encoder: a face and its label map -> one style vector, then one set of style codes, per region.

Source: the paper's Sec. 3.2.1, Eq. 5-7, and the `encoder` and `MLPs` parts of the published `E4S/iteration_300000.pt`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e4s_models.checks import check_shape
from e4s_models.regions import NUM_REGIONS
from e4s_models.stylegan2 import CODE_DIM, NUM_REGION_LAYERS, EqualLinear, Regions

ENCODER_SIDE = 256  # px, at which the checkpoint was trained


class SqueezeExcite(nn.Module):
    """Scale of each channel from the mean of all (arXiv 1709.01507)."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.expand = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.expand(self.reduce(x.mean(dim=(2, 3), keepdim=True)).relu())
        return x * scale.sigmoid()


class Block(nn.Module):
    """IR-SE block with instance normalisation (no affine part) where ArcFace's has batch normalisation.

    The excitation sees channel means of normalised maps, which are 0: its scale is 1/2 and it does not train. Kept as published.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False)
        self.excite = SqueezeExcite(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        y = self.conv2(self.prelu(self.conv1(F.instance_norm(x))))
        y = self.excite(F.instance_norm(y))
        if self.shortcut is None:
            return cast(Tensor, y + x[:, :, :: self.stride, :: self.stride])
        return cast(Tensor, y + F.instance_norm(self.shortcut(x)))


def region_means(features: Tensor, regions: Regions) -> Tensor:
    """Eq. 6: mean of the features (B, C, S, S) under each region's mask; 0 for an absent region -> (B, R, C)."""
    masks = regions.masks(features.shape[-1], features.dtype).flatten(2)  # (B, R, S * S)
    sums = masks @ features.flatten(2).transpose(1, 2)  # (B, R, C)
    return sums / masks.sum(dim=2, keepdim=True).clamp(min=1)


class RegionEncoder(nn.Module):
    """Eq. 5-6: an IR-SE network's features at strides 4, 8 and 16, averaged per region and concatenated."""

    def __init__(
        self,
        widths: tuple[int, ...] = (64, 128, 256, 512, 512),
        depths: tuple[int, ...] = (3, 4, 14, 3),
        num_regions: int = NUM_REGIONS,
        side: int = ENCODER_SIDE,
    ) -> None:
        """Build with random weights.

        Args:
            widths: channels of the first layer and of the four stages, multiples of 16.
            depths: blocks of each stage; its first one halves the size.
            num_regions: R.
            side: px at which faces are encoded.
        """
        super().__init__()
        self.side, self.num_regions = side, num_regions
        self.conv = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.prelu = nn.PReLU(widths[0])
        blocks, self._ends = list[Block](), list[int]()
        for (inputs, outputs), depth in zip(pairwise(widths), depths, strict=True):
            blocks += [Block(inputs, outputs, 2), *(Block(outputs, outputs, 1) for _ in range(depth - 1))]
            self._ends.append(len(blocks) - 1)
        self.blocks = nn.ModuleList(blocks)
        self.vector_dim = sum(widths[2:])

    def forward(self, faces: Tensor, region_ids: Tensor) -> Tensor:
        """Style vectors (B, R, 1280), first those of the finest features.

        Args:
            faces: RGB (B, 3, S, S) float32 [-1, 1]; another size than the encoder's is resized as in the published training, bilinear
                without antialiasing.
            region_ids: (B, H, H) uint8 in 0..R-1, any size; resized (nearest) to each feature map.
        """
        batch = check_shape(faces, "B 3 S S")["B"]
        if check_shape(region_ids, "B H H")["B"] != batch:
            raise ValueError(f"expected {batch} label maps for {batch} faces, got {len(region_ids)}")
        regions = Regions(region_ids, self.num_regions)
        if faces.shape[-1] != self.side:
            faces = F.interpolate(faces, (self.side, self.side), mode="bilinear")
        x = self.prelu(F.instance_norm(self.conv(faces)))
        scales = []
        for k, block in enumerate(self.blocks):
            x = block(x)
            if k in self._ends[1:]:
                scales.append(region_means(x, regions))  # (B, R, 256), (B, R, 512), (B, R, 512)
        return torch.cat(scales, dim=2)


class RegionMLP(nn.Module):
    """Eq. 7 of one region: style vector (B, V) -> offsets of its codes (B, K, D)."""

    def __init__(self, vector_dim: int, num_codes: int, code_dim: int) -> None:
        super().__init__()
        self.hidden = EqualLinear(vector_dim, code_dim)
        self.out = EqualLinear(code_dim, num_codes * code_dim)
        self.code_dim = code_dim

    def forward(self, vectors: Tensor) -> Tensor:
        codes: Tensor = self.out(F.leaky_relu(self.hidden(vectors), 0.01))
        return codes.view(len(vectors), -1, self.code_dim)


class CodeMapper(nn.Module):
    """Eq. 7: style vectors of all regions -> their style codes, around the generator's average code.

    Codes of the layers that read no label map are the average code alone.
    """

    latent_avg: Tensor

    def __init__(
        self,
        vector_dim: int = 1280,
        num_regions: int = NUM_REGIONS,
        num_layers: int = 18,
        region_layers: int = NUM_REGION_LAYERS,
        code_dim: int = CODE_DIM,
    ) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(RegionMLP(vector_dim, min(region_layers, num_layers), code_dim) for _ in range(num_regions))
        self.vector_dim = vector_dim
        self.register_buffer("latent_avg", torch.zeros(num_layers, code_dim))

    def forward(self, vectors: Tensor) -> Tensor:
        """Style vectors (B, R, 1280) -> style codes (B, R, 18, 512)."""
        check_shape(vectors, f"B {len(self.mlps)} {self.vector_dim}")
        offsets = torch.stack([mlp(vectors[:, r]) for r, mlp in enumerate(self.mlps)], dim=1)  # (B, R, K, D)
        return self.latent_avg + F.pad(offsets, (0, 0, 0, len(self.latent_avg) - offsets.shape[2]))
