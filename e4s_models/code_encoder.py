"""The encoder F of regional GAN inversion for the embedded generator: a face and its label map -> style codes per region (Eq. 5-7).

Features of a ResNet-18 at four scales are averaged over every region (Eq. 5-6); an MLP per region, whose last layers the regions share,
turns them into a code (Eq. 7). The ResNet starts from the trunk of the published face parser; how it was trained: `docs/encoder.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e4s_models.checks import check_shape
from e4s_models.face_parser import ResNet18
from e4s_models.regions import NUM_REGIONS

CODE_DIM = 512
LAYER_GROUPS = (5, 11, 17, 23)
"""Ends of the groups of style layers that share one predicted code: features up to 8, 32, 128 and 1024 px."""
_SHAPE = 5  # numbers of a region's shape: area, centre, extent
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB in [0, 1]
_FEATURES = 3 + 3 + 64 + 128 + 256 + 512  # colour mean and deviation, then the trunk's scales


class CodeEncoder(nn.Module):
    """RGB and region ids -> codes around the mean code; an absent region gets the mean code itself."""

    side = 256
    """px: faces are shrunk to this square."""

    mean: Tensor
    std: Tensor
    mean_code: Tensor
    basis: Tensor

    def __init__(self, hidden: int = 384, layout: int = 48, groups: Sequence[int] = LAYER_GROUPS) -> None:
        """Build with random weights.

        Args:
            hidden: width of the MLPs.
            layout: channels that keep where in the face something is.
            groups: ends of the groups of the generator's style layers that share a predicted code.
        """
        super().__init__()
        self.groups = tuple(groups)
        self._frozen = False
        self.trunk = ResNet18()
        self.layout = nn.Conv2d(512, layout, 1)
        whole = layout * 64 + 512 + _SHAPE * NUM_REGIONS
        self.norm_region = nn.LayerNorm(_FEATURES)
        self.norm_whole = nn.LayerNorm(whole)
        self.whole = nn.Linear(whole, hidden)
        self.region_weight = nn.Parameter(torch.randn(NUM_REGIONS, _FEATURES, hidden) / _FEATURES**0.5)
        self.region_bias = nn.Parameter(torch.zeros(NUM_REGIONS, hidden))
        self.shared = nn.ModuleList(nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU()) for _ in range(2))
        self.out = nn.Linear(hidden, len(self.groups) * CODE_DIM)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("mean_code", torch.zeros(CODE_DIM))
        self.register_buffer("basis", torch.eye(CODE_DIM))  # rows: principal components of W times their standard deviation

    @classmethod
    def load(cls, device: str = "cpu") -> Self:
        """The shipped encoder, trained by `e4s train rgi`, ready for inference. Raises WeightsError."""
        from e4s_models.weights import load_shipped

        return load_shipped(cls(), "code_encoder", device)

    def freeze_early(self) -> None:
        """Keep the trunk's first half (to stride 8) as the face parser has it: half of the backward pass, and less to forget."""
        for part in (self.trunk.conv1, self.trunk.bn1, self.trunk.layer1, self.trunk.layer2):
            part.requires_grad_(False)
        self._frozen = True

    def train(self, mode: bool = True) -> Self:
        """As usual, but what is frozen keeps its statistics."""
        super().train(mode)
        if self._frozen:
            for part in (self.trunk.bn1, self.trunk.layer1, self.trunk.layer2):
                part.eval()
        return self

    def forward(self, faces: Tensor, region_ids: Tensor) -> Tensor:
        """Codes per region and group of style layers.

        Args:
            faces: (B, 3, H, W) RGB float32 in [-1, 1], aligned as FFHQ is; H = W, at least 256.
            region_ids: (B, H', W') uint8 in 0..11, of any size.

        Returns (B, 12, G, 512), one code per region and group of style layers. Raises ValueError on other shapes.
        """
        bound = check_shape(faces, "B 3 H H")
        if check_shape(region_ids, "B H W")["B"] != bound["B"]:
            raise ValueError(f"expected {bound['B']} label maps for {bound['B']} faces, got {len(region_ids)}")
        if bound["H"] < self.side:
            raise ValueError(f"a face must be at least {self.side} px wide, got {bound['H']}")
        if bound["H"] != self.side:
            faces = F.interpolate(faces, (self.side, self.side), mode="area")
        masks = region_masks(region_ids, self.side, faces.dtype)  # (B, 12, 256, 256)
        areas = masks.mean(dim=(2, 3))  # (B, 12)
        rgb = ((faces + 1) / 2 - self.mean) / self.std
        features = self.trunk(rgb)  # strides 4, 8, 16, 32
        averages = [region_average(feature, masks) for feature in (rgb, rgb.square(), *features)]
        averages[1] = (averages[1] - averages[0].square()).clamp(min=1e-6).sqrt()
        local = self.norm_region(torch.cat(averages, dim=2))  # (B, 12, F)
        last = features[-1]  # (B, 512, 8, 8)
        seen = [self.layout(last).flatten(1), last.mean(dim=(2, 3)), region_shapes(masks).flatten(1)]
        whole = self.whole(self.norm_whole(torch.cat(seen, dim=1)))  # (B, hidden)
        x = torch.einsum("brf,rfh->brh", local, self.region_weight) + self.region_bias + whole[:, None]
        x = F.gelu(x)
        for block in self.shared:
            x = x + block(x)
        deviations = self.out(x).unflatten(2, (len(self.groups), CODE_DIM)).float() @ self.basis  # (B, 12, 4, 512)
        codes: Tensor = self.mean_code + deviations * (areas > 0)[..., None, None]
        return codes

    def codes(self, faces: Tensor, region_ids: Tensor) -> Tensor:
        """As `forward`, one code per style layer: (B, 12, L, 512)."""
        return per_layer(self(faces, region_ids), self.groups)


def per_layer(grouped: Tensor, groups: Sequence[int]) -> Tensor:
    """Codes (B, R, G, D) of groups of style layers, given by the ends of the groups, to each of their layers: (B, R, L, D)."""
    counts = torch.tensor([end - start for start, end in zip((0, *groups[:-1]), groups, strict=True)], device=grouped.device)
    return grouped.repeat_interleave(counts, dim=2)


def region_masks(region_ids: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """(B, H, W) uint8 region ids -> shares (B, 12, side, side) in [0, 1]; sums to 1 over the regions."""
    if max(region_ids.shape[1:]) > 2 * side:  # thin the ids first: shares of up to 2 x 2 px are fine enough
        height, width = region_ids.shape[1:]
        steps = torch.arange(2 * side, device=region_ids.device)
        region_ids = region_ids[:, steps * height // (2 * side)][:, :, steps * width // (2 * side)]
    masks = (region_ids[:, None] == torch.arange(NUM_REGIONS, device=region_ids.device).view(1, -1, 1, 1)).to(dtype)
    return masks if masks.shape[-2:] == (side, side) else F.interpolate(masks, (side, side), mode="area")


def region_average(feature: Tensor, masks: Tensor) -> Tensor:
    """Means of a feature map (B, C, h, w) over soft masks (B, R, H, W), each at least h x w: (B, R, C); 0 for an empty region (Eq. 5)."""
    small = F.adaptive_avg_pool2d(masks, (feature.shape[-2], feature.shape[-1])).flatten(2)  # (B, R, h * w)
    sums = small @ feature.flatten(2).transpose(1, 2).to(small.dtype)
    return sums / small.sum(dim=2, keepdim=True).clamp(min=1e-6)


def region_shapes(masks: Tensor) -> Tensor:
    """Where each region lies: root of the area, centre (x, y) and extent (x, y) as a standard deviation, in [-1, 1]: (B, R, 5)."""
    small = F.adaptive_avg_pool2d(masks, (64, 64))
    axis = torch.linspace(-1, 1, 64, device=masks.device, dtype=masks.dtype)
    area = small.sum(dim=(2, 3)).clamp(min=1e-6)
    rows, columns = small.sum(dim=3) / area[..., None], small.sum(dim=2) / area[..., None]  # (B, R, 64): shares along y, along x
    x, y = columns @ axis, rows @ axis
    spread_x = (columns @ axis.square() - x.square()).clamp(min=0).sqrt()
    spread_y = (rows @ axis.square() - y.square()).clamp(min=0).sqrt()
    return torch.stack([(area / 64**2).sqrt(), x, y, spread_x, spread_y], dim=2)
