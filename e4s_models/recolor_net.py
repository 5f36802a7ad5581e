"""Face recoloring: the target's skin tone and light on the swapped face, the network of the published `face_blender/latest_netG.pth`.

Every pixel of the swapped face takes a weighted mean of the target's colors in the same region (Eq. 11-13); a U-Net paints the face
from that guidance, the face in gray and the target's background (Eq. 14).
"""

from __future__ import annotations

import re
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import instance_norm, interpolate, leaky_relu, max_pool2d, normalize
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from e4s_models.checks import check_shape
from e4s_models.published import Array, Case, Published
from e4s_models.regions import BISENET19_TO_REGIONS, Region

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB in [0, 1]
_GRAY = (0.299, 0.587, 0.114)
_STRIDE = 4  # px of the picture per feature
_CHUNK = 1 << 22  # correlations held at a time
REGIONS = (Region.SKIN, Region.HAIR, Region.EYES, Region.NOSE, Region.LIPS, Region.MOUTH, Region.EARS, Region.BROWS)
"""Regions that are recolored, together the head."""


class _SpatialNorm(nn.Module):
    """SPADE (Park et al., CVPR 2019): instance normalisation whose scale and shift come from the picture itself."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.shared = nn.Conv2d(3, hidden, 3, padding=1, padding_mode="reflect")
        self.gamma = nn.Conv2d(hidden, channels, 3, padding=1, padding_mode="reflect")
        self.beta = nn.Conv2d(hidden, channels, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor, picture: Tensor) -> Tensor:
        hidden = cast(Tensor, self.shared(picture)).relu()
        return cast(Tensor, instance_norm(x) * (1 + self.gamma(hidden)) + self.beta(hidden))


class _SpatialBlock(nn.Module):
    """Residual block with two such normalisations, a third on the shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, hidden: int) -> None:
        super().__init__()
        middle = min(inputs, outputs)
        self.norm0, self.norm1 = _SpatialNorm(inputs, hidden), _SpatialNorm(middle, hidden)
        self.conv0 = spectral_norm(nn.Conv2d(inputs, middle, 3, padding=1, padding_mode="reflect"))
        self.conv1 = spectral_norm(nn.Conv2d(middle, outputs, 3, padding=1, padding_mode="reflect"))
        self.has_shortcut = inputs != outputs
        if self.has_shortcut:
            self.norm_shortcut = _SpatialNorm(inputs, hidden)
            self.shortcut = spectral_norm(nn.Conv2d(inputs, outputs, 1, bias=False))

    def forward(self, x: Tensor, picture: Tensor) -> Tensor:
        y: Tensor = self.conv0(leaky_relu(self.norm0(x, picture), 0.2))
        y = self.conv1(leaky_relu(self.norm1(y, picture), 0.2))
        return y + (self.shortcut(self.norm_shortcut(x, picture)) if self.has_shortcut else x)


class _Features(nn.Module):
    """Feature extractor at a quarter of the side (Eq. 11)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = spectral_norm(nn.Conv2d(3, width, 3, 1, 1, bias=False))
        self.conv2 = spectral_norm(nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False))
        self.conv3 = spectral_norm(nn.Conv2d(2 * width, 4 * width, 3, 1, 1, bias=False))
        self.conv4 = spectral_norm(nn.Conv2d(4 * width, 8 * width, 3, 2, 1, bias=False))
        self.conv5 = spectral_norm(nn.Conv2d(8 * width, 8 * width, 3, 1, 1, bias=False))
        self.block1 = _SpatialBlock(8 * width, 8 * width, 2 * width)
        self.block2 = _SpatialBlock(8 * width, 8 * width, 2 * width)
        self.block3 = _SpatialBlock(8 * width, 4 * width, 2 * width)

    def forward(self, picture: Tensor) -> Tensor:
        x = instance_norm(self.conv1(picture))
        for conv in (self.conv2, self.conv3, self.conv4, self.conv5):
            x = instance_norm(conv(leaky_relu(x, 0.2)))
        small = picture[..., ::_STRIDE, ::_STRIDE]
        for block in (self.block1, self.block2, self.block3):
            x = block(x, small)
        return x  # (B, 4 * width, H/4, W/4)


class _EntryBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm1(self.conv1(x))
        return cast(Tensor, self.conv2(y.relu()) + self.shortcut(x))


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm2(self.conv1(cast(Tensor, self.norm1(x)).relu()))
        return cast(Tensor, self.conv2(y.relu()) + self.shortcut(x))


class _UNet(nn.Module):
    """Residual U-Net of three halvings: guidance (B, 12, H, W) -> RGB (B, 3, H, W) in [0, 1]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.entry = _EntryBlock(12, width)
        self.down1 = _ResidualBlock(width, 2 * width, 2)
        self.down2 = _ResidualBlock(2 * width, 4 * width, 2)
        self.down3 = _ResidualBlock(4 * width, 8 * width, 2)
        self.up3 = _ResidualBlock(12 * width, 4 * width, 1)
        self.up2 = _ResidualBlock(6 * width, 2 * width, 1)
        self.up1 = _ResidualBlock(3 * width, width, 1)
        self.exit = nn.Conv2d(width, 3, 1)

    def forward(self, guidance: Tensor) -> Tensor:
        full = self.entry(guidance)
        half = self.down1(full)
        quarter = self.down2(half)
        x = self.down3(quarter)
        for up, skip in ((self.up3, quarter), (self.up2, half), (self.up1, full)):
            x = up(torch.cat([interpolate(x, scale_factor=2, mode="bilinear", align_corners=True), skip], dim=1))
        return cast(Tensor, self.exit(x)).sigmoid()


def _attend(query: Tensor, key: Tensor, colors: Tensor, valid: Tensor) -> Tensor:
    """Softmax of query (B, n, C) times key (B, m, C) over the valid (B, m) keys, applied to colors (B, m, 3): (B, n, 3)."""
    correlation = query @ key.mT  # (B, n, m)
    # finite, not -inf: a sample without keys then gives the mean of its colors, which are 0
    correlation = correlation.masked_fill(~valid[:, None], torch.finfo(correlation.dtype).min)
    return correlation.softmax(dim=-1) @ colors


def attend_chunked(query: Tensor, key: Tensor, colors: Tensor, valid: Tensor, chunk: int = _CHUNK) -> Tensor:
    """Eq. 12-13 in blocks of rows: query (B, n, C), key (B, m, C), colors (B, m, 3), valid (B, m) bool -> (B, n, 3).

    At most `chunk` correlations (or one row) exist at a time, in training too, where they are computed again for the gradient.
    """
    bound = check_shape(query, "B N C")
    keys = check_shape(key, f"{bound['B']} M {bound['C']}")["M"]
    check_shape(colors, f"{bound['B']} {keys} 3")
    check_shape(valid, f"{bound['B']} {keys}")
    rows = max(1, chunk // (bound["B"] * keys))
    parts = torch.split(query, rows, dim=1)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(_attend, part, key, colors, valid, use_reentrant=False) for part in parts], dim=1)
    # one output: small results between large temporaries keep the allocator from giving these back (1 GB at 20 000 pixels)
    blended = query.new_empty(bound["B"], bound["N"], 3)
    for out, part in zip(torch.split(blended, rows, dim=1), parts, strict=True):
        out.copy_(_attend(part, key, colors, valid))
    return blended


def _positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where a mask (B, N) bool is set: positions (B, n) and which of them count (B, n), n being the largest number in the batch."""
    counts = mask.sum(dim=1)
    most = int(counts.max())
    positions = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    return positions, torch.arange(most, device=mask.device) < counts[:, None]


def _take(values: Tensor, positions: Tensor) -> Tensor:
    """Rows of values (B, N, C) at positions (B, n): (B, n, C)."""
    return values.gather(1, positions[..., None].expand(-1, -1, values.shape[-1]))


def _region_guidance(query: Tensor, key: Tensor, colors: Tensor, animated: Tensor, target: Tensor) -> Tensor:
    """Color guidance of one region: features (B, N, C), colors (B, N, 3), masks (B, N) bool -> (B, N, 3), 0 outside the region."""
    guidance = torch.zeros_like(colors)
    here, here_counts = _positions(animated)
    there, there_counts = _positions(target)
    if here.shape[1] == 0 or there.shape[1] == 0:
        return guidance
    # the published network was trained with the target's features cut by the animated mask: outside it a key is 0
    keys = _take(key * animated[..., None], there)
    blended = attend_chunked(_take(query, here), keys, _take(colors, there) * there_counts[..., None], there_counts)
    return guidance.scatter(1, here[..., None].expand(-1, -1, 3), (blended * here_counts[..., None]).to(guidance.dtype))


def _dilate(mask: Tensor) -> Tensor:
    """Widen a mask (B, H, W) bool by a twentieth of its width on every side."""
    margin = int(mask.shape[-1] * 0.1 / 2)
    return max_pool2d(mask[:, None].float(), 2 * margin + 1, 1, margin)[:, 0] > 0


class RecolorNet(nn.Module):
    """Recoloring network B_psi (E4S, section 3.3.1), trained at 256 px. It is deterministic: no random mirroring."""

    mean: Tensor
    std: Tensor
    gray: Tensor

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.features = _Features(width)
        self.sharpness = nn.Parameter(torch.ones(()))  # of the softmax
        self.unet = _UNet(width)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("gray", torch.tensor(_GRAY).view(1, 3, 1, 1), persistent=False)

    def guide(self, animated: Tensor, target: Tensor, animated_ids: Tensor, target_ids: Tensor, flip: bool = False) -> Tensor:
        """The U-Net's input (B, 12, H, W); arguments as for `forward`.

        Channels: color guidance of the head, of the ring around it, the head's mask, the ring's mask, the head in gray (all in
        [0, 1]) and the target without the dilated heads (ImageNet-normalised).
        """
        bound = check_shape(animated, "B 3 H W")
        batch, height, width = bound["B"], bound["H"], bound["W"]
        check_shape(target, f"{batch} 3 {height} {width}")
        check_shape(animated_ids, f"{batch} {height} {width}")
        check_shape(target_ids, f"{batch} {height} {width}")
        if height % 8 or width % 8:
            raise ValueError(f"height and width must be multiples of 8, got {height} x {width}")

        animated, target = (animated + 1) / 2, (target + 1) / 2
        animated_parts = torch.stack([animated_ids == region for region in REGIONS], dim=1)  # (B, 8, H, W)
        target_parts = torch.stack([target_ids == region for region in REGIONS], dim=1)
        animated_head, target_head = animated_parts.any(dim=1), target_parts.any(dim=1)  # (B, H, W)
        heads = _dilate(animated_head | target_head)
        ring = heads & ~animated_head
        target_ring = _dilate(target_head) & ~target_head
        gray = (animated.clamp(0, 1) * self.gray).sum(dim=1).clamp(0, 1) * animated_head
        background = (target - self.mean) / self.std * ~heads[:, None]

        animated_parts = torch.cat([animated_parts, ring[:, None]], dim=1)[..., ::_STRIDE, ::_STRIDE]  # (B, 9, H/4, W/4)
        target_parts = torch.cat([target_parts, target_ring[:, None]], dim=1)[..., ::_STRIDE, ::_STRIDE]
        guidance = self._guidance(animated, target.flip(-1) if flip else target, target, animated_parts, target_parts)
        guidance = interpolate(guidance, (height, width), mode="bilinear", align_corners=True)
        return torch.cat([guidance, animated_head[:, None], ring[:, None], gray[:, None], background], dim=1)

    def _guidance(self, animated: Tensor, seen: Tensor, target: Tensor, animated_parts: Tensor, target_parts: Tensor) -> Tensor:
        """Colors of the target for the head and the ring: (B, 6, H/4, W/4). `seen` is the target as the feature extractor sees it."""
        features = self.features((torch.cat([animated, seen]) - self.mean) / self.std)  # (2B, C, h, w)
        features = features.flatten(2).mT  # (2B, N, C)
        query, key = normalize(features - features.mean(dim=-1, keepdim=True), dim=-1, eps=1e-8).chunk(2)
        colors = target[..., ::_STRIDE, ::_STRIDE].clamp(0, 1).flatten(2).mT  # (B, N, 3)
        here, there = animated_parts.flatten(2), target_parts.flatten(2)  # (B, 9, N)
        query = query * self.sharpness
        parts = [_region_guidance(query, key, colors, here[:, part], there[:, part]) for part in range(len(REGIONS) + 1)]
        guidance = torch.cat([torch.stack(parts[:-1]).sum(dim=0), parts[-1]], dim=-1)  # (B, N, 6)
        shared = (here.any(dim=-1) & there.any(dim=-1)).sum(dim=1)  # (B,), parts that both faces have
        guidance = guidance * (shared > 1)[:, None, None]  # as published: a single common part guides nothing
        return guidance.mT.reshape(len(colors), 6, *animated_parts.shape[-2:])

    def forward(self, animated: Tensor, target: Tensor, animated_ids: Tensor, target_ids: Tensor, flip: bool = False) -> Tensor:
        """Recolor the animated (swapped) faces after the target: (B, 3, H, W) RGB float32 [-1, 1] -> the same.

        Args:
            animated: faces to recolor, (B, 3, H, W) RGB float32 [-1, 1]; H and W are multiples of 8, 256 as trained.
            target: faces whose colors to take, likewise.
            animated_ids: their region ids (B, H, W), as in `e4s_models.regions`.
            target_ids: region ids of the targets, likewise.
            flip: mirror the target for the feature extractor, a training augmentation (Eq. 10).
        """
        return cast(Tensor, self.unet(self.guide(animated, target, animated_ids, target_ids, flip))) * 2 - 1


_RENAMES = (
    (r"^referencer\.trainable_tao$", "sharpness"),
    (r"^referencer\.FPN\.layer(\d)\.0\.", r"features.conv\1."),
    (r"^referencer\.FPN\.head_0\.", "features.block1."),
    (r"^referencer\.FPN\.G_middle_0\.", "features.block2."),
    (r"^referencer\.FPN\.G_middle_1\.", "features.block3."),
    (r"\.conv_s\.", ".shortcut."),
    (r"\.norm_s\.", ".norm_shortcut."),
    (r"\.(conv|norm)_(\d)\.", r".\1\2."),
    (r"\.mlp_shared\.1\.", ".shared."),
    (r"\.mlp_(gamma|beta)\.", r".\1."),
    (r"\.weight_orig$", ".parametrizations.weight.original"),
    (r"\.weight_([uv])$", r".parametrizations.weight.0._\1"),
    (r"^unet\.input_encoder_layer\.", "unet.entry."),
    (r"^unet\.res_en_layer2\.", "unet.down1."),
    (r"^unet\.res_en_layer3\.", "unet.down2."),
    (r"^unet\.res_bridge_layer\.", "unet.down3."),
    (r"^unet\.res_de_layer(\d)\.", r"unet.up\1."),
    (r"^unet\.output_decoder_layer\.0\.", "unet.exit."),
    (r"\.bn(\d)\.", r".norm\1."),
    (r"\.sqz_layer\.", ".shortcut."),
)


def _rename(key: str) -> str:
    for pattern, ours in _RENAMES:
        key = re.sub(pattern, ours, key)
    return key


def _run_reference(network: nn.Module, case: Case) -> dict[str, Array]:
    assert isinstance(network, RecolorNet)
    animated, target = (torch.from_numpy(case[name]).permute(2, 0, 1)[None] / 127.5 - 1 for name in ("animated_u8", "target_u8"))
    ids = [torch.from_numpy(BISENET19_TO_REGIONS[case[name]])[None] for name in ("animated_label19_u8", "target_label19_u8")]
    outputs: dict[str, Array] = {}
    for name, flip in (("noflip", False), ("flip", True)):
        guidance = network.guide(animated, target, ids[0], ids[1], flip)
        outputs[f"packages_{name}_sub"] = guidance[:, :, ::4, ::4].numpy()
        outputs[f"pred_{name}"] = network.unet(guidance)[:, :, ::2, ::2].numpy()
    return outputs


PUBLISHED_RECOLOR = Published(name="recolor", file="face_blender/latest_netG.pth", build=RecolorNet, rename=_rename, run=_run_reference)
