"""StyleGAN2's building blocks (arXiv 1912.04958), shared by the generators, the discriminator and GPEN.

Among them the modulated convolution, plain and with a style per region of a label map (the paper's Eq. 8-9). The published E4S code
runs one full convolution per region and layer and masks their sum: `region_conv_ref`. `region_conv` gives the same for little more
than the price of one convolution.

Everything keeps the memory format that it is given. Channels-last is 1.5 to 3 times faster for large feature maps on CPU, and makes
pixels rows; the networks use it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e4s_models.checks import check_shape

_BLUR = (1.0, 3.0, 3.0, 1.0)
EPSILON = 1e-8  # under the root of a normalisation
_CHUNK = {"cpu": 1 << 21}  # elements of looked-up rows at a time, by device: what stays in a CPU's cache
_CHUNK_ELSEWHERE = 1 << 28


class EqualLinear(nn.Linear):
    """Linear layer with equalised learning rate (Karras et al., ICLR 2018): weights of unit variance, scaled by rate / sqrt(inputs)."""

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, *, rate: float = 1.0, activation: bool = False) -> None:
        super().__init__(inputs, outputs)
        self.rate, self.activation = rate, activation
        nn.init.normal_(self.weight, std=1 / rate)
        nn.init.constant_(self.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight * (self.rate / math.sqrt(self.in_features)), self.bias * self.rate
        return activate(F.linear(x, weight), bias) if self.activation else F.linear(x, weight, bias)


def activate(x: Tensor, bias: Tensor, noise: Tensor | None = None) -> Tensor:
    """LeakyReLU of slope 0.2 and gain sqrt 2, which keeps the variance, after adding a bias and a noise map.

    Args:
        x: (B, C, ...); overwritten where no gradient is recorded.
        bias: (C,).
        noise: anything that broadcasts to `x`.
    """
    terms = [bias.view(-1, *[1] * (x.ndim - 2)), *([] if noise is None else [noise])]
    if torch.is_grad_enabled():
        return F.leaky_relu(sum(terms, x), 0.2) * math.sqrt(2)
    for term in terms:
        x.add_(term.to(x.dtype))  # sums of mixed types are slow on CPU
    return F.leaky_relu_(x, 0.2).mul_(math.sqrt(2))


def blur(x: Tensor, gain: float, padding: int) -> Tensor:
    """The 4x4 low-pass filter of StyleGAN2 with the given sum: (B, C, H, W) -> (B, C, H - 3 + 2 * padding, W - 3 + 2 * padding)."""
    return F.conv2d(x, _blur_kernels(gain, x), padding=padding, groups=x.shape[1])


def upsample(image: Tensor) -> Tensor:
    """Twice the size, interpolated with the blur kernel: (B, C, H, W) -> (B, C, 2H, 2W)."""
    return F.conv_transpose2d(image, _blur_kernels(4, image), stride=2, padding=1, groups=image.shape[1])


def _blur_kernels(gain: float, like: Tensor) -> Tensor:
    """One kernel of sum `gain` per channel of `like` (B, C, H, W): (C, 1, 4, 4)."""
    line = like.new_tensor(_BLUR) / sum(_BLUR)
    return (gain * torch.outer(line, line)).expand(like.shape[1], 1, 4, 4)


@dataclass(frozen=True)
class Seams:
    """Output pixels of a layer whose 3x3 patch of input pixels belongs to more than one region. All int64; rows count flattened pixels.

    They are linear combinations of places where the kernel meets the input. With up = 1 a place is the pixel itself. With up = 2 it is
    a pixel of the map between transposed convolution and blur, together with the region whose style is meant, and there are four
    kinds: in an even row or column (kind's bit 0) of the map padded by one pixel a kernel's middle line meets one input line, in an
    odd one its outer lines meet two.
    """

    outputs: Tensor  # (N,), row of the output pixel in (B * H_out * W_out)
    codes: Tensor  # (N,), row of its region in (B * R)
    corners: tuple[Tensor, ...]  # per kind (M,), row of the first input pixel in the map padded by one pixel, (B * (H + 2) * (W + 2))
    corner_codes: tuple[Tensor, ...]  # per kind (M,), row of the region in (B * R)
    blurred: Tensor | None  # (N, 16), which places, in order of kind, make an output pixel; None: one each


class Regions:
    """A batch of label maps, resized (nearest) once for each feature map that asks: ids (B, H, W) uint8 in 0..num - 1, any size."""

    def __init__(self, ids: Tensor, num: int) -> None:
        check_shape(ids, "B H W")
        if ids.numel() and int(ids.max()) >= num:
            raise ValueError(f"region ids go up to {int(ids.max())}, but there are codes of {num} regions only")
        self.num = num
        self._ids = ids
        self._resized: dict[int, Tensor] = {}
        self._seams: dict[tuple[int, int], Seams] = {}

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

    def scale(self, x: Tensor, table: Tensor, *, overwrite: bool = False) -> Tensor:
        """Multiply every pixel with its region's row: x (B, C, side, side), table (B, R, C); `overwrite` allows to do so in `x` itself.

        Where a gradient is recorded the rows come from a product with the one-hot masks: exact too, as one factor is 1 and the others 0,
        and its gradient is a fast, deterministic product, unlike that of a look-up. Elsewhere they are looked up, a chunk at a time.
        """
        batch, channels, side = x.shape[:3]
        if torch.is_grad_enabled():
            spread = self.masks(side, table.dtype).flatten(2).transpose(1, 2) @ table  # (B, side * side, C)
            return x * spread.view(batch, side, side, channels).permute(0, 3, 1, 2)
        items = torch.arange(batch, device=table.device)[:, None, None] * self.num
        codes, table = (self.at(side) + items).flatten(), table.flatten(0, 1)
        pixels = x.permute(0, 2, 3, 1).reshape(-1, channels)  # a view if channels lie last in memory
        out = pixels if overwrite else torch.empty_like(pixels, dtype=torch.result_type(x, table))
        chunk = max(1, _chunk(x.device) // channels)
        for part, scaled, code in zip(torch.split(pixels, chunk), torch.split(out, chunk), torch.split(codes, chunk), strict=True):
            torch.mul(part, table.index_select(0, code), out=scaled)
        return out.view(batch, side, side, channels).permute(0, 3, 1, 2)

    def seams(self, side: int, up: int) -> Seams:
        """Seams of a layer with inputs of `side`.

        An input pixel counts to the region that its first output pixel has, which is what `at(side)` says.
        """
        if (side, up) not in self._seams:
            self._seams[side, up] = self._find_seams(side, up)
        return self._seams[side, up]

    def _find_seams(self, side: int, up: int) -> Seams:
        inputs, outputs = self.at(side), self.at(up * side)
        batch, wide = len(inputs), side + 2
        around = inputs[:, None].float()
        highest, lowest = F.max_pool2d(around, 3, 1, 1)[:, 0], -F.max_pool2d(-around, 3, 1, 1)[:, 0]
        blocks = outputs.view(batch, side, up, side, up)
        crossed = (highest[:, :, None, :, None] != blocks) | (lowest[:, :, None, :, None] != blocks)
        item, y, x = torch.nonzero(crossed.view(outputs.shape), as_tuple=True)  # (N,)
        rows, codes = (item * up * side + y) * up * side + x, item * self.num + outputs[item, y, x]
        if up == 1:
            return Seams(rows, codes, ((item * wide + y) * wide + x,), (codes,), None)
        steps = torch.arange(4, device=item.device)
        row, column = y[:, None, None] + steps[:, None], x[:, None, None] + steps  # (N, 4, 1), (N, 1, 4), under the blur
        kind = row % 2 * 2 + column % 2  # (N, 4, 4)
        pixels, maps = wide * wide, batch * self.num
        places = ((kind * maps + codes[:, None, None]) * pixels + row // 2 * wide + column // 2).flatten(1)  # (N, 16)
        needed = places.new_zeros(4 * maps * pixels, dtype=torch.bool)
        needed[places] = True
        found = torch.split(torch.nonzero(needed)[:, 0], needed.view(4, -1).sum(dim=1).tolist())
        corner_codes = tuple(place // pixels % maps for place in found)
        corners = tuple(code // self.num * pixels + place % pixels for code, place in zip(corner_codes, found, strict=True))
        return Seams(rows, codes, corners, corner_codes, (needed.cumsum(0) - 1)[places])


def _chunk(device: torch.device) -> int:
    return _CHUNK.get(device.type, _CHUNK_ELSEWHERE)


def shared_conv(x: Tensor, weight: Tensor, up: int) -> Tensor:
    """One kernel for all samples: x (B, C, H, W), weight (C', C, k, k) -> (B, C', up * H, up * W); up = 2: transposed, then the blur."""
    if up == 1:
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    return blur(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), gain=4, padding=1)  # 4: three of four pixels were empty


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
    lengths = _kernel_lengths(weight, styles) if demodulate else None  # (B, C')
    if len(x) == 1:  # one sample: the factors go into the kernel, which is smaller than the maps
        weight = weight * styles[0, :, None, None]
        return shared_conv(x, weight if lengths is None else weight / lengths[0, :, None, None, None], up)
    y = shared_conv(x * styles[:, :, None, None], weight, up)
    return y if lengths is None else y / lengths[:, :, None, None]


def _kernel_lengths(weight: Tensor, styles: Tensor) -> Tensor:
    """Lengths of the modulated kernels: weight (C', C, k, k), styles (..., C) -> (..., C')."""
    return (styles.square() @ weight.square().sum(dim=(2, 3)).t() + EPSILON).sqrt()


def region_conv_ref(x: Tensor, weight: Tensor, styles: Tensor, regions: Regions, up: int, demodulate: bool) -> Tensor:
    """Eq. 8-9 as written: one convolution per region, masked and summed. As `plain_conv`, but styles (B, R, C)."""
    masks = regions.masks(up * x.shape[-1], x.dtype)
    parts = (plain_conv(x, weight, styles[:, r], up, demodulate) * masks[:, r, None] for r in range(regions.num))
    return sum(parts, start=x.new_zeros(()))


def region_conv(x: Tensor, weight: Tensor, styles: Tensor, regions: Regions, up: int, demodulate: bool) -> Tensor:
    """The same function as `region_conv_ref`, with one shared kernel.

    A style scales the kernel's input channels, so it may scale the input instead, and the demodulation the output. The scale is that
    of the OUTPUT pixel's region. Where a patch lies in one region, scaling the input map once is therefore exact. The output pixels
    at the seams, whose patch lies in several, are computed again from their own patches and overwritten.
    """
    side, width = x.shape[-1], len(weight)
    y = shared_conv(regions.scale(x, styles), weight, up)
    gains = _kernel_lengths(weight, styles).reciprocal()  # (B, R, C')
    if demodulate:
        y = regions.scale(y, gains, overwrite=True)
    if weight.shape[-1] == 1:
        return y

    seams = regions.seams(side, up)
    padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # (B * (H + 2) * (W + 2), C)
    style_rows, gain_rows = styles.flatten(0, 1), gains.flatten(0, 1)  # (B * R, C), (B * R, C')
    parts = []
    for (lines, columns), all_corners, all_codes in zip(_MEETINGS[up], seams.corners, seams.corner_codes, strict=True):
        kernel = torch.cat([weight[:, :, i, j] for i, _ in lines for j, _ in columns], dim=1).t()  # (T * C, C')
        steps = torch.tensor([i * (side + 2) + j for _, i in lines for _, j in columns], device=x.device)  # (T,)
        chunk = max(1, _chunk(x.device) // len(kernel))
        for corners, codes in zip(torch.split(all_corners, chunk), torch.split(all_codes, chunk), strict=True):
            patches = padded.index_select(0, (corners[:, None] + steps).flatten()).view(-1, len(steps), x.shape[1])  # (M, T, C)
            parts.append((patches * style_rows.index_select(0, codes)[:, None]).flatten(1) @ kernel)  # (M, C')
    fixed = torch.cat(parts)
    if seams.blurred is not None:
        fixed = _combine(fixed, seams.blurred, _blur_kernels(4, y)[0, 0].flatten())
    if demodulate:
        fixed = fixed * gain_rows.index_select(0, seams.codes)
    outputs, fixed = y.permute(0, 2, 3, 1).reshape(-1, width), fixed.to(y.dtype)  # (B * H_out * W_out, C'), (N, C')
    outputs = outputs.index_copy(0, seams.outputs, fixed) if torch.is_grad_enabled() else outputs.index_copy_(0, seams.outputs, fixed)
    return outputs.view(len(x), up * side, up * side, width).permute(0, 3, 1, 2)


_ALL, _MIDDLE, _OUTER = ((0, 0), (1, 1), (2, 2)), ((1, 0),), ((2, 0), (0, 1))
_MEETINGS = {1: ((_ALL, _ALL),), 2: tuple((lines, columns) for lines in (_MIDDLE, _OUTER) for columns in (_MIDDLE, _OUTER))}
"""For `up` and each kind of `Seams`: which (kernel line, input line from the corner) meet in rows, and in columns."""


def _combine(rows: Tensor, which: Tensor, factors: Tensor) -> Tensor:
    """Weighted sums of rows: rows (M, C), which (N, K), factors (K,) -> (N, C)."""
    if torch.is_grad_enabled():
        return factors @ rows.index_select(0, which.flatten()).view(*which.shape, rows.shape[1])
    return F.embedding_bag(which, rows, mode="sum", per_sample_weights=factors.to(rows.dtype).expand_as(which))


class EqualConv(nn.Module):
    """Convolution with equalised learning rate, then `activate`; with `down`, blurred before and at half the size after."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, down: bool = False, activation: bool = True) -> None:
        super().__init__()
        self.down = down
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if activation else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W), or half of both sides."""
        kernel = self.weight.shape[-1]
        weight = self.weight / math.sqrt(self.weight[0].numel())
        x = F.conv2d(blur(x, 1, kernel // 2 + 1), weight, stride=2) if self.down else F.conv2d(x, weight, padding=kernel // 2)
        return x if self.bias is None else activate(x, self.bias)


class Modulated(nn.Module):
    """Modulated convolution, plain or per region."""

    def __init__(self, inputs: int, outputs: int, kernel: int, code_dim: int, up: int = 1, demodulate: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, kernel, kernel))  # leading 1 as published
        self.style = EqualLinear(code_dim, inputs, bias=1.0)
        self.up, self.demodulate = up, demodulate

    def forward(self, x: Tensor, codes: Tensor, regions: Regions | None = None) -> Tensor:
        """x (B, C, H, W), codes (B, R, D) -> (B, C', up * H, up * W); without regions the first code holds everywhere."""
        weight = self.weight[0] / math.sqrt(self.weight[0, 0].numel())  # (C', C, k, k)
        styles = self.style(codes if regions else codes[:, 0])  # (B, R, C) or (B, C)
        if regions:
            return region_conv(x, weight, styles, regions, self.up, self.demodulate)
        return plain_conv(x, weight, styles, self.up, self.demodulate)


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
