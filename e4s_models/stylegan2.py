"""Mask-guided StyleGAN2: a face generator whose first K style layers take another code in every region of a label map.

Source: the paper's Sec. 3.2.2, Eq. 8-9, and the `G` part of the published `E4S/iteration_300000.pt`; the plain layers are StyleGAN2's
(arXiv 1912.04958). The published code runs one full convolution per region and layer and masks their sum: `region_conv_ref`. The
layers here call `region_conv`, which gives the same for about the price of one convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e4s_models.checks import check_shape

CODE_DIM = 512
NUM_REGION_LAYERS = 13  # the paper's K
_BLUR = (1.0, 3.0, 3.0, 1.0)
_EPSILON = 1e-8  # of the demodulation
_SEAM_CHUNK = {"cpu": 1 << 21}  # elements of 3x3 patches gathered at a time, by device: what stays in a CPU's cache
_SEAM_CHUNK_ELSEWHERE = 1 << 28


@dataclass(frozen=True)
class Seams:
    """Output pixels whose 3x3 patch of input pixels belongs to more than one region. All (N,) int64; batch, height, width flattened."""

    outputs: Tensor  # row of the output pixel in (B * H_out * W_out)
    corners: Tensor  # row of the patch's first input pixel in the map padded by one pixel, (B * (H + 2) * (W + 2))
    codes: Tensor  # row of the output pixel's region in (B * R)


class Regions:
    """A batch of label maps, resized (nearest) once for each feature map that asks: ids (B, H, W) uint8 in 0..num - 1, any size."""

    def __init__(self, ids: Tensor, num: int) -> None:
        check_shape(ids, "B H W")
        if ids.numel() and int(ids.max()) >= num:
            raise ValueError(f"region ids go up to {int(ids.max())}, but there are codes of {num} regions only")
        self.num = num
        self._ids = ids
        self._resized: dict[int, Tensor] = {}
        self._seams: dict[tuple[int, int], list[Seams]] = {}

    def at(self, side: int) -> Tensor:
        """(B, side, side) int64."""
        if side not in self._resized:
            height, width = self._ids.shape[1:]
            steps = torch.arange(side, device=self._ids.device)
            self._resized[side] = self._ids[:, steps * height // side][:, :, steps * width // side].long()
        return self._resized[side]

    def masks(self, side: int, dtype: torch.dtype) -> Tensor:
        """One-hot (B, R, side, side)."""
        wanted = torch.arange(self.num, device=self._ids.device)[:, None, None]
        return (self.at(side)[:, None] == wanted).to(dtype)

    def spread(self, table: Tensor, side: int) -> Tensor:
        """Give every pixel the row of its region: (B, R, C) -> (B, C, side, side).

        Where a gradient is asked it is a product with the one-hot masks: exact too, as one factor is 1 and the others 0, and its
        gradient is a fast, deterministic product, unlike that of a look-up.
        """
        if table.requires_grad:
            rows = self.masks(side, table.dtype).flatten(2).transpose(1, 2) @ table  # (B, side * side, C)
        else:
            items = torch.arange(len(table), device=table.device)[:, None, None] * self.num
            rows = table.flatten(0, 1).index_select(0, (self.at(side) + items).flatten())
        return rows.view(len(table), side, side, -1).permute(0, 3, 1, 2)  # channels last in memory

    def seams(self, side: int, up: int) -> list[Seams]:
        """Seams of a layer with inputs of `side`: one entry for up = 1; for up = 2 one per parity of the output row and column.

        An input pixel counts to the region that its first output pixel has, which is what `at(side)` says.
        """
        if (side, up) not in self._seams:
            self._seams[side, up] = [self._find_seams(side, up, row, column) for row in range(up) for column in range(up)]
        return self._seams[side, up]

    def _find_seams(self, side: int, up: int, row: int, column: int) -> Seams:
        inputs, outputs = self.at(side), self.at(up * side)[:, row::up, column::up]  # (B, side, side) both
        around = inputs[:, None].float()
        highest, lowest = F.max_pool2d(around, 3, 1, 1)[:, 0], -F.max_pool2d(-around, 3, 1, 1)[:, 0]
        item, y, x = torch.nonzero((highest != outputs) | (lowest != outputs), as_tuple=True)
        return Seams(
            outputs=(item * up * side + y * up + row) * up * side + x * up + column,
            corners=(item * (side + 2) + y) * (side + 2) + x,
            codes=item * self.num + outputs[item, y, x],
        )


def _blur(gain: float, like: Tensor) -> Tensor:
    """The 4x4 low-pass kernel with the given sum, as one depthwise kernel per channel of `like` (B, C, H, W): (C, 1, 4, 4)."""
    line = like.new_tensor(_BLUR) / sum(_BLUR)
    return (gain * torch.outer(line, line)).expand(like.shape[1], 1, 4, 4)


def upsample(image: Tensor) -> Tensor:
    """Twice the size, interpolated with the blur kernel: (B, C, H, W) -> (B, C, 2H, 2W)."""
    return F.conv_transpose2d(image, _blur(4, image), stride=2, padding=1, groups=image.shape[1])


def _blur_upsampled(x: Tensor) -> Tensor:
    """Low-pass after a transposed convolution of stride 2: (B, C, 2H + 1, 2W + 1) -> (B, C, 2H, 2W)."""
    return F.conv2d(x, _blur(4, x), padding=1, groups=x.shape[1])


def plain_conv(x: Tensor, weight: Tensor, styles: Tensor, up: int, demodulate: bool) -> Tensor:
    """StyleGAN2's modulated convolution, one style per sample.

    Args:
        x: (B, C, H, W).
        weight: (C', C, k, k), scaled.
        styles: (B, C).
        up: 1, or 2 for a transposed convolution and a blur.
        demodulate: whether each output channel's kernel is brought to unit length.

    Returns (B, C', up * H, up * W).
    """
    batch, channels, height, width = x.shape
    kernels = weight * styles[:, None, :, None, None]  # (B, C', C, k, k)
    if demodulate:
        kernels = kernels * torch.rsqrt(kernels.square().sum(dim=(2, 3, 4), keepdim=True) + _EPSILON)
    x = x.reshape(1, batch * channels, height, width)
    if up == 1:
        y = F.conv2d(x, kernels.flatten(0, 1), padding=weight.shape[-1] // 2, groups=batch)
        return y.view(batch, -1, height, width)
    y = F.conv_transpose2d(x, kernels.transpose(1, 2).flatten(0, 1), stride=2, groups=batch)
    return _blur_upsampled(y.view(batch, -1, *y.shape[2:]))


def region_conv_ref(x: Tensor, weight: Tensor, styles: Tensor, regions: Regions, up: int, demodulate: bool) -> Tensor:
    """Eq. 8-9 as written: one convolution per region, masked and summed. As `plain_conv`, but styles (B, R, C)."""
    masks = regions.masks(up * x.shape[-1], x.dtype)
    parts = [plain_conv(x, weight, styles[:, r], up, demodulate) * masks[:, r, None] for r in range(regions.num)]
    return torch.stack(parts).sum(dim=0)


def region_conv(x: Tensor, weight: Tensor, styles: Tensor, regions: Regions, up: int, demodulate: bool) -> Tensor:
    """The same function as `region_conv_ref`, with one shared kernel.

    A style scales the kernel's input channels, so it may scale the input instead, and the demodulation the output. The scale is that
    of the OUTPUT pixel's region. Where a patch lies in one region, scaling the input map once is therefore exact. The output pixels
    at the seams, whose patch lies in several, are computed again from their own patches and overwritten.
    """
    side = x.shape[-1]
    y = x * regions.spread(styles, side)
    if up == 1:
        y = F.conv2d(y, weight, padding=weight.shape[-1] // 2)
    else:
        y = _blur_upsampled(F.conv_transpose2d(y, weight.transpose(0, 1), stride=2))
    lengths = styles.square() @ weight.square().sum(dim=(2, 3)).t() + _EPSILON  # (B, R, C'), squared lengths of the kernels
    if demodulate:
        y = y * regions.spread(lengths.rsqrt(), up * side)
    if weight.shape[-1] == 1:
        return y

    outputs = y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])  # (B * H_out * W_out, C')
    padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # (B * (H + 2) * (W + 2), C)
    steps = torch.arange(3, device=x.device)
    patch = (steps[:, None] * (side + 2) + steps).flatten()  # (9,), rows of a patch from its corner
    style_rows, scale_rows = styles.flatten(0, 1), lengths.rsqrt().flatten(0, 1)  # (B * R, C), (B * R, C')
    chunk = max(1, _SEAM_CHUNK.get(x.device.type, _SEAM_CHUNK_ELSEWHERE) // (9 * x.shape[1]))
    for kernel, seams in zip(_patch_kernels(weight, up), regions.seams(side, up), strict=True):
        for pixels, corners, codes in zip(*(torch.split(rows, chunk) for rows in (seams.outputs, seams.corners, seams.codes)), strict=True):
            patches = padded.index_select(0, (corners[:, None] + patch).flatten()).view(-1, 9, x.shape[1])  # (N, 9, C)
            fixed = (patches * style_rows.index_select(0, codes)[:, None]).flatten(1) @ kernel  # (N, C')
            if demodulate:
                fixed = fixed * scale_rows.index_select(0, codes)
            outputs = outputs.index_copy(0, pixels, fixed) if torch.is_grad_enabled() else outputs.index_copy_(0, pixels, fixed)
    return outputs.view(len(x), up * side, up * side, -1).permute(0, 3, 1, 2)


def _patch_kernels(weight: Tensor, up: int) -> list[Tensor]:
    """Kernels that make an output pixel from its 3x3 input pixels, (9 * C, C'): one for up = 1, else one per output parity.

    Row a of the output's parity: y[2i + a] = sum_k x[i - 1 + k] sum_n blur[n - a - 1 + 2k] w[n], from the transposed convolution
    u[m] = sum_i x[i] w[m - 2i] and the blur y[j] = sum_t blur[t] u[j - 1 + t].
    """
    if up == 1:
        return [weight.permute(2, 3, 1, 0).flatten(0, 2)]
    taps = weight.new_zeros(2, 3, 3)  # parity a, patch row k, kernel row n
    for a, k, n in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3)).tolist():
        if 0 <= n - a - 1 + 2 * k < 4:
            taps[a, k, n] = 2 * _BLUR[n - a - 1 + 2 * k] / sum(_BLUR)
    both = torch.einsum("akn,blm->abnmkl", taps, taps).reshape(4, 9, 9)  # parities, kernel pixel, patch pixel
    outputs, inputs = weight.shape[:2]
    kernels = torch.einsum("oin,pnk->pkio", weight.reshape(outputs, inputs, 9), both)  # (4, 9, C, C')
    return list(kernels.flatten(1, 2))


class EqualLinear(nn.Linear):
    """Linear layer whose weight of unit variance is scaled by 1 / sqrt(inputs) when used (equalised learning rate)."""

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0) -> None:
        super().__init__(inputs, outputs)
        nn.init.normal_(self.weight)
        nn.init.constant_(self.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / math.sqrt(self.in_features), self.bias)


class Modulated(nn.Module):
    """Modulated convolution, plain or per region."""

    def __init__(self, inputs: int, outputs: int, kernel: int, code_dim: int, up: int = 1, demodulate: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, kernel, kernel))
        self.style = EqualLinear(code_dim, inputs, bias=1.0)
        self.up, self.demodulate = up, demodulate

    def forward(self, x: Tensor, codes: Tensor, regions: Regions | None) -> Tensor:
        """x (B, C, H, W), codes (B, R, D) -> (B, C', up * H, up * W); without regions the first code holds everywhere."""
        weight = self.weight[0] / math.sqrt(self.weight[0, 0].numel())  # (C', C, k, k)
        styles = self.style(codes if regions else codes[:, 0])  # (B, R, C) or (B, C)
        if regions:
            return region_conv(x, weight, styles, regions, self.up, self.demodulate)
        return plain_conv(x, weight, styles, self.up, self.demodulate)


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
        x = x + (self.noise_strength * (self.noise if noise is None else noise) + self.bias[:, None, None])
        return F.leaky_relu(x, 0.2) * math.sqrt(2)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to colours, added to the enlarged picture of the previous size."""

    def __init__(self, inputs: int, code_dim: int) -> None:
        super().__init__()
        self.conv = Modulated(inputs, 3, 1, code_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, x: Tensor, codes: Tensor, regions: Regions | None, image: Tensor | None) -> Tensor:
        """x (B, C, H, W), codes (B, R, D), image (B, 3, H / 2, W / 2) or None -> RGB (B, 3, H, W)."""
        rgb: Tensor = self.conv(x, codes, regions) + self.bias
        return rgb if image is None else rgb + upsample(image)


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
        x = self.constant.expand(bound["B"], -1, -1, -1)
        image: Tensor | None = None
        for i, conv in enumerate(self.convs):
            x = conv(x, codes[:, :, i], self._regions_of(i, regions), noise[i] if noise else None)
            if i % 2 == 0:  # the last convolution of its size
                image = self.to_rgbs[i // 2](x, codes[:, :, i + 1], self._regions_of(i + 1, regions), image)
        assert image is not None
        return image

    def _regions_of(self, layer: int, regions: Regions | None) -> Regions | None:
        return regions if layer < self.region_layers else None
