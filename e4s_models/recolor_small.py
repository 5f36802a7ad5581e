"""Face recoloring small enough for every pair: color guidance by attention within each region, then a U-Net (E4S, Eq. 11-14).

The published network (`e4s_models.recolor_net`) compares 4096 places at 256 features each and paints 256 px; this one compares 1024
places and paints 64 px, because only the smooth change of colour is taken from what it paints: `recolored` carries it to any size, along
the edges of the face itself. Trained by `e4s train recolor`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, interpolate, normalize, silu

from e4s_models.checks import check_shape
from e4s_models.regions import NUM_REGIONS

_GRAY = (0.299, 0.587, 0.114)
_GRID = 32  # places per row and column that are compared
_LEAST_SHARED = 1e-6  # how much of another region's colours a place may take
_DARK = 0.05  # added to colours in [0, 1] before their logarithm: black has no colour to change
_FURTHEST = 1.5  # largest change of log colour
_WINDOW = 5  # px of the small picture over which a change follows the face's own luminance
_CALM = 4e-3  # variance of luminance in [0, 1] below which it does not


class _Block(nn.Module):
    """Residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.norm = nn.GroupNorm(8, outputs)
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(silu(self.norm(self.conv1(x))))
        return silu(y + cast(Tensor, self.shortcut(x)))


class _Features(nn.Sequential):
    """Features of gray faces and of where in the picture they are, at half the side (Eq. 11)."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Conv2d(3, width, 3, 2, 1), nn.SiLU(), _Block(width, width), nn.Conv2d(width, width, 3, 1, 1))


class _UNet(nn.Module):
    """Three halvings: (B, C, H, W) -> (B, 3, H, W)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.entry = _Block(inputs, width)
        self.downs = nn.ModuleList((_Block(width, 2 * width, 2), _Block(2 * width, 3 * width, 2), _Block(3 * width, 4 * width, 2)))
        self.ups = nn.ModuleList((_Block(7 * width, 3 * width), _Block(5 * width, 2 * width), _Block(3 * width, width)))
        self.exit = nn.Conv2d(width, 3, 3, 1, 1)
        nn.init.zeros_(self.exit.weight)
        nn.init.zeros_(cast(Tensor, self.exit.bias))

    def forward(self, x: Tensor) -> Tensor:
        features = [self.entry(x)]
        for down in self.downs:
            features.append(down(features[-1]))
        x = features.pop()
        for up in self.ups:
            x = up(torch.cat([interpolate(x, scale_factor=2, mode="bilinear"), features.pop()], dim=1))
        return cast(Tensor, self.exit(x))


class SmallRecolorNet(nn.Module):
    """The swapped face, seen in gray, in the target's colours and light."""

    side = 64
    """px of the picture that is painted."""

    gray: Tensor
    places: Tensor

    def __init__(self, width: int = 24, feature_width: int = 48) -> None:
        """Build with random weights; `width` of the U-Net at full side."""
        super().__init__()
        self.features = _Features(feature_width)
        self.sharpness = nn.Parameter(torch.tensor(8.0))  # of the softmax
        self.unet = _UNet(4 + NUM_REGIONS, width)
        self.register_buffer("gray", torch.tensor(_GRAY).view(1, 3, 1, 1), persistent=False)
        axis = torch.linspace(-1, 1, self.side)
        self.register_buffer("places", torch.stack(torch.meshgrid(axis, axis, indexing="xy"))[None], persistent=False)  # x, y

    def guide(self, swapped: Tensor, target: Tensor, swapped_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Color guidance (B, 3, 32, 32): each place takes the target's colours from places alike in its region (Eq. 12-13)."""
        features = self.features(torch.cat([self._seen(swapped), self._seen(target)]))  # (2B, C, 32, 32)
        query, key = normalize(features.flatten(2).mT, dim=-1).chunk(2)  # (B, 1024, C)
        shares = [adaptive_avg_pool2d(_one_hot(ids, swapped.dtype), _GRID).flatten(2) for ids in (swapped_ids, target_ids)]  # (B, 12, 1024)
        # Places that straddle two regions take from both: their shares, not a label, say how much they have in common.
        shared = shares[0].mT @ shares[1]  # (B, 1024, 1024)
        correlation = self.sharpness * (query @ key.mT) + (shared + _LEAST_SHARED).log()
        colors = adaptive_avg_pool2d(target, _GRID).flatten(2).mT  # (B, 1024, 3)
        return (correlation.softmax(dim=-1) @ colors).mT.reshape(len(colors), 3, _GRID, _GRID)

    def forward(self, swapped: Tensor, target: Tensor, swapped_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Paint the swapped faces, of which only the luminance is looked at, in the targets' colours: (B, 3, 64, 64), about [-1, 1].

        Args:
            swapped: faces to recolor, (B, 3, 64, 64) RGB float32 [-1, 1].
            target: faces whose colours and light to take, likewise.
            swapped_ids: region ids (B, 64, 64) uint8 of the swapped faces.
            target_ids: region ids of the targets, likewise.
        """
        batch = check_shape(swapped, f"B 3 {self.side} {self.side}")["B"]
        check_shape(target, f"{batch} 3 {self.side} {self.side}")
        for ids in (swapped_ids, target_ids):
            check_shape(ids, f"{batch} {self.side} {self.side}")
        guidance = interpolate(self.guide(swapped, target, swapped_ids, target_ids), (self.side, self.side), mode="bilinear")
        gray = (swapped * self.gray).sum(dim=1, keepdim=True)
        painted: Tensor = self.unet(torch.cat([gray, guidance, _one_hot(swapped_ids, swapped.dtype)], dim=1))
        return guidance + painted

    def _seen(self, faces: Tensor) -> Tensor:
        """Gray faces and the places of their pixels: (B, 3, 64, 64)."""
        return torch.cat([(faces * self.gray).sum(dim=1, keepdim=True), self.places.expand(len(faces), -1, -1, -1)], dim=1)


def _one_hot(ids: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, W) region ids -> (B, 12, H, W)."""
    return (ids[:, None] == torch.arange(NUM_REGIONS, device=ids.device).view(1, -1, 1, 1)).to(dtype)


def recolored(faces: Tensor, painted: Tensor) -> Tensor:
    """Carry the change of colour from a small painted picture to the faces themselves; every detail of theirs stays.

    The change is a factor per channel, smooth but for edges of the face's own luminance, which it follows (guided filter, He et al. 2013,
    with coefficients found in small and enlarged).

    Args:
        faces: (B, 3, H, W) RGB float32 [-1, 1]; H and W multiples of the small side.
        painted: (B, 3, h, w) RGB, about [-1, 1]: the same faces as they should look.

    Returns (B, 3, H, W) in [-1, 1].
    """
    light = (faces.clamp(-1, 1) + 1) / 2
    small = adaptive_avg_pool2d(light, (painted.shape[-2], painted.shape[-1]))
    change = (((painted.clamp(-1, 1) + 1) / 2 + _DARK) / (small + _DARK)).log().clamp(-_FURTHEST, _FURTHEST)
    guide = _luminance(small)
    mean_guide, mean_change = _box(guide), _box(change)
    slope = (_box(guide * change) - mean_guide * mean_change) / (_box(guide.square()) - mean_guide.square() + _CALM)
    offset = mean_change - slope * mean_guide
    size = (faces.shape[-2], faces.shape[-1])
    slope, offset = (interpolate(_box(part), size, mode="bilinear") for part in (slope, offset))
    factor = (slope * _luminance(light) + offset).clamp(-_FURTHEST, _FURTHEST).exp()
    return ((light + _DARK) * factor - _DARK).clamp(0, 1) * 2 - 1


def _luminance(light: Tensor) -> Tensor:
    return (light * light.new_tensor(_GRAY).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


def _box(x: Tensor) -> Tensor:
    """Means over windows; at the border over what of them is inside."""
    return avg_pool2d(x, _WINDOW, 1, _WINDOW // 2, count_include_pad=False)
