"""Keypoints, head pose and dense motion of one-shot free-view talking heads, the networks of `faceVid2Vid/00000189-checkpoint.pth.tar`.

Points and sampling grids are (x, y, z) in [-1, 1]: right, down, into the feature volume's depth.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, grid_sample, interpolate

from e4s_models.checks import check_shape

_RADIANS_PER_DEGREE = 3.14 / 180  # the published networks were trained with 3.14, not pi
_DEGREES_PER_BIN, _FIRST_BIN_DEGREES = 3, -99
_HEATMAP_VARIANCE = 0.01
_BLUR_RADIUS, _BLUR_SIGMA = 6, 1.5  # px, before every fourth pixel is kept


class ConvBlock(nn.Module):
    """Same-size convolution of an image or a volume, batch norm and a (leaky) rectifier."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, *, dims: int = 2, slope: float = 0.0) -> None:
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.conv = conv(inputs, outputs, kernel, padding=kernel // 2)
        self.norm = norm(outputs)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return nn.functional.leaky_relu(x, self.slope) if self.slope else x.relu()


class DownBlock(ConvBlock):
    """`ConvBlock` that halves height and width; the depth of a volume stays."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return nn.functional.avg_pool2d(x, 2) if x.ndim == 4 else nn.functional.avg_pool3d(x, (1, 2, 2))


class UpBlock(ConvBlock):
    """`ConvBlock` of a volume at twice the height and width; its depth stays."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(interpolate(x, scale_factor=(1, 2, 2)))


def _axis(size: int, like: Tensor) -> Tensor:
    """Coordinates of `size` samples from -1 to 1, both ends included: (size,)."""
    return 2 * (torch.arange(size, dtype=like.dtype, device=like.device) / (size - 1)) - 1


class KeypointDetector(nn.Module):
    """Canonical keypoints: the points of a face in neutral pose and expression (Wang et al., CVPR 2021, L)."""

    blur: Tensor

    def __init__(self, keypoints: int = 15, width: int = 32, levels: int = 5, depth: int = 16, temperature: float = 0.1) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        self.depth, self.temperature = depth, temperature
        taps = torch.exp(-((torch.arange(2 * _BLUR_RADIUS + 1) - _BLUR_RADIUS) ** 2) / (2 * _BLUR_SIGMA**2))
        kernel = torch.outer(taps, taps) / taps.sum() ** 2
        self.register_buffer("blur", kernel.expand(3, 1, -1, -1).clone())  # part of the published state
        self.down = nn.Sequential(*(DownBlock(3 if level == 0 else widths[level], widths[level + 1]) for level in range(levels)))
        self.lift = nn.Conv2d(widths[-1], widths[-1] * depth, 1)
        self.up = nn.Sequential(*(UpBlock(widths[level + 1], widths[level], dims=3) for level in reversed(range(levels))))
        self.heatmaps = nn.Conv3d(width, keypoints, 3, padding=1)

    def forward(self, faces: Tensor) -> Tensor:
        """RGB (B, 3, H, W) float32 [0, 1] -> expected places under a softmax over the volume, (B, K, 3) float32."""
        check_shape(faces, "B 3 H W")
        quarter = conv2d(faces, self.blur, padding=_BLUR_RADIUS, groups=3)[:, :, ::4, ::4]
        flat: Tensor = self.lift(self.down(quarter))  # [B, C * D, h, w]
        volume = flat.view(len(flat), -1, self.depth, *flat.shape[2:])
        scores: Tensor = self.heatmaps(self.up(volume))  # [B, K, D, H/4, W/4]
        heat = (scores / self.temperature).flatten(2).softmax(dim=2).view_as(scores)
        along = [(heat.sum(dim=others) * _axis(heat.shape[axis], heat)).sum(-1) for axis, others in ((4, (2, 3)), (3, (2, 4)), (2, (3, 4)))]
        return torch.stack(along, dim=-1)


class HeadMotion(NamedTuple):
    """What the estimator reads from one face: how its keypoints differ from the canonical ones."""

    yaw: Tensor
    """(B, 66) logits of pose bins; likewise the next two."""
    pitch: Tensor
    roll: Tensor
    translation: Tensor
    """(B, 3)"""
    expression: Tensor
    """(B, K, 3), offset of each keypoint after rotation"""


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        inner = channels // 4
        self.conv1 = nn.Conv2d(channels, inner, 1)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1)
        self.norm3 = nn.BatchNorm2d(channels)
        self.skip: nn.Module = nn.Identity()
        if stride != 1:
            self.skip = nn.Sequential(nn.Conv2d(channels, channels, 1, stride), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu()
        return cast(Tensor, self.norm3(self.conv3(y)) + self.skip(x)).relu()


class MotionEstimator(nn.Module):
    """Head pose and expression, a ResNet-50 whose stages begin with a widening 1x1 convolution (Wang et al., CVPR 2021, H and Delta)."""

    def __init__(self, keypoints: int = 15, bins: int = 66, width: int = 64) -> None:
        super().__init__()
        widths = [width, *(width * 4 * 2**stage for stage in range(4))]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        stages = []
        for stage, blocks in enumerate((3, 4, 6, 3)):
            strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
            bottlenecks = (_Bottleneck(widths[stage + 1], stride) for stride in strides)
            stages.append(nn.Sequential(ConvBlock(widths[stage], widths[stage + 1], 1), *bottlenecks))
        self.stages = nn.Sequential(*stages)
        self.yaw = nn.Linear(widths[-1], bins)
        self.pitch = nn.Linear(widths[-1], bins)
        self.roll = nn.Linear(widths[-1], bins)
        self.translation = nn.Linear(widths[-1], 3)
        self.expression = nn.Linear(widths[-1], 3 * keypoints)

    def forward(self, faces: Tensor) -> HeadMotion:
        """RGB (B, 3, H, W) float32 [0, 1] -> head pose and expression."""
        check_shape(faces, "B 3 H W")
        feat: Tensor = self.stages(self.stem(faces)).mean(dim=(2, 3))
        expression: Tensor = self.expression(feat)
        return HeadMotion(self.yaw(feat), self.pitch(feat), self.roll(feat), self.translation(feat), expression.view(len(feat), -1, 3))


def bins_to_degrees(logits: Tensor) -> Tensor:
    """Expected angle under the softmax over bins of 3 degrees from -99: (B, bins) -> (B,) degrees."""
    check_shape(logits, "B N")
    bins = torch.arange(logits.shape[1], dtype=logits.dtype, device=logits.device)
    return (logits.softmax(dim=1) * bins).sum(dim=1) * _DEGREES_PER_BIN + _FIRST_BIN_DEGREES


def head_rotation(yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """Rotation about x by pitch, times about y by yaw, times about z by roll: three (B,) degrees -> (B, 3, 3)."""
    angles = torch.stack([pitch, yaw, roll]) * _RADIANS_PER_DEGREE
    (cx, cy, cz), (sx, sy, sz) = angles.cos(), angles.sin()
    zero, one = torch.zeros_like(cx), torch.ones_like(cx)
    about_x = torch.stack([one, zero, zero, zero, cx, -sx, zero, sx, cx], dim=-1).view(-1, 3, 3)
    about_y = torch.stack([cy, zero, sy, zero, one, zero, -sy, zero, cy], dim=-1).view(-1, 3, 3)
    about_z = torch.stack([cz, -sz, zero, sz, cz, zero, zero, zero, one], dim=-1).view(-1, 3, 3)
    rotation: Tensor = about_x @ about_y @ about_z
    return rotation


def place_keypoints(canonical: Tensor, motion: HeadMotion) -> Tensor:
    """Rotate, shift and deform canonical keypoints (B, K, 3) by a head motion (Wang et al., CVPR 2021, eq. 1): (B, K, 3)."""
    check_shape(canonical, "B K 3")
    check_shape(motion.expression, f"{len(canonical)} {canonical.shape[1]} 3")
    rotation = head_rotation(*(bins_to_degrees(logits) for logits in (motion.yaw, motion.pitch, motion.roll)))
    return canonical @ rotation.transpose(1, 2) + motion.translation[:, None] + motion.expression


class _Hourglass(nn.Module):
    """U-Net over a volume that keeps the depth; each level's input, the first one's too, is appended to the output of that level."""

    def __init__(self, inputs: int, width: int, levels: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        self.outputs = width + inputs
        self.down = nn.ModuleList(DownBlock(inputs if level == 0 else widths[level], widths[level + 1], dims=3) for level in range(levels))
        self.up = nn.ModuleList(
            UpBlock(widths[level + 1] * (1 if level == levels - 1 else 2), widths[level], dims=3) for level in reversed(range(levels))
        )
        self.last = ConvBlock(self.outputs, self.outputs, dims=3)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        for up in self.up:
            x = torch.cat([up(x), skips.pop()], dim=1)
        return cast(Tensor, self.last(x))


class DenseMotion(nn.Module):
    """Where each place of the driven volume comes from in the source volume, and what the source does not show (CVPR 2021, M)."""

    def __init__(
        self, channels: int = 32, depth: int = 16, keypoints: int = 15, width: int = 32, levels: int = 5, compressed: int = 4
    ) -> None:
        super().__init__()
        self.compress = ConvBlock(channels, compressed, 1, dims=3)
        self.hourglass = _Hourglass((keypoints + 1) * (compressed + 1), width, levels)
        self.mask = nn.Conv3d(self.hourglass.outputs, keypoints + 1, 7, padding=3)
        self.occlusion = nn.Conv2d(self.hourglass.outputs * depth, 1, 7, padding=3)

    def forward(self, volume: Tensor, source: Tensor, driven: Tensor) -> tuple[Tensor, Tensor]:
        """Source volume (B, C, D, H, W), source and driven keypoints (B, K, 3) -> sampling grid (B, D, H, W, 3), visibility (B, 1, H, W).

        The grid mixes the K keypoints' shifts and the still background; visibility lies in [0, 1].
        """
        sizes = check_shape(volume, "B C D H W")
        for points in (source, driven):
            check_shape(points, f"{sizes['B']} {self.mask.out_channels - 1} 3")
        feat: Tensor = self.compress(volume)  # [B, c, D, H, W]
        shifts = nn.functional.pad(source - driven, (0, 0, 1, 0))  # [B, K+1, 3], the background stays
        grid = _identity_grid(feat)  # [D, H, W, 3]
        moved = grid + shifts[:, :, None, None, None]  # [B, K+1, D, H, W, 3]
        # One call samples all K+1 shifted copies: they lie along the depth of the grid.
        copies = grid_sample(feat, moved.flatten(1, 2), align_corners=False).view(
            *feat.shape[:2], *moved.shape[1:5]
        )  # [B, c, K+1, D, H, W]
        heat = nn.functional.pad(_gaussians(driven, feat) - _gaussians(source, feat), (0, 0, 0, 0, 0, 0, 1, 0))
        stacked = torch.cat([heat[:, :, None], copies.transpose(1, 2)], dim=2)  # [B, K+1, 1+c, D, H, W]
        feat = self.hourglass(stacked.flatten(1, 2))
        mask = cast(Tensor, self.mask(feat)).softmax(dim=1)  # [B, K+1, D, H, W]
        # The masks sum to 1, so that the mixed grids are the still grid and the mixed shifts.
        mixed = grid + torch.einsum("bkdhw,bkc->bdhwc", mask, shifts)
        return mixed, cast(Tensor, self.occlusion(feat.flatten(1, 2))).sigmoid()


def _identity_grid(volume: Tensor) -> Tensor:
    """Coordinates of a volume's places: (D, H, W, 3). Its ends lie at -1 and 1, as the published grid's do."""
    z, y, x = torch.meshgrid(*(_axis(size, volume) for size in volume.shape[2:]), indexing="ij")
    return torch.stack([x, y, z], dim=-1)


def _gaussians(points: Tensor, volume: Tensor) -> Tensor:
    """A Gaussian bell around each point, (B, K, 3) -> (B, K, D, H, W); it is the product of one bell per axis."""
    x, y, z = (
        torch.exp(-((_axis(size, volume) - points[..., axis, None]) ** 2) / (2 * _HEATMAP_VARIANCE))
        for axis, size in enumerate(reversed(volume.shape[2:]))
    )
    return torch.einsum("bkz,bky,bkx->bkzyx", z, y, x)
