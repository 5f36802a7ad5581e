"""MobileStyleGAN: a 1024 px face generator (FFHQ) whose 23 style layers may take another code in every region of the face.

Source: arXiv 2104.04767; weights and graph: the OpenVINO files of the `random-face` package (MappingNetwork and SynthesisNetwork).
Demodulation is already folded into the published weights, so a modulation is one scale per channel of a layer's input.

The regional pass costs little more than the plain one, because a per-channel scale commutes with a depthwise convolution: one
multiply per layer gives each OUTPUT pixel the style of its own region, and the kernels stay shared (E4S Eq. 8-9 with one weight).
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e4s_models.checks import check_shape
from e4s_models.openvino_ir import Graph, Layer, read_ir
from e4s_models.weights import weight_path

Array = npt.NDArray[Any]

CODE_DIM = 512
NUM_BLOCKS = 7  # 8, 16, ... 512 px
NUM_LAYERS = 2 + 3 * NUM_BLOCKS
MEAN_CODES = 4096  # mapped codes that `mean_w` averages
_FOLD_SIDE = (
    256  # px from which one code's style goes into the kernel; below, a multiply costs nothing and rounds as the regional pass does
)
_CHUNK = 1 << 21  # elements scaled at a time: few enough to stay in the cache and to be allocated without page faults


class RegionRows:
    """Region ids of a batch, resized (nearest) once per feature map: (B, H, W) uint8 -> (B, side * side) int32."""

    def __init__(self, region_ids: Tensor) -> None:
        self._ids = region_ids
        self._rows: dict[int, Tensor] = {}

    def at(self, side: int) -> Tensor:
        if side not in self._rows:
            height, width = self._ids.shape[1:]
            steps = torch.arange(side, device=self._ids.device)
            resized = self._ids[:, steps * height // side][:, :, steps * width // side]
            self._rows[side] = resized.flatten(1).int()
        return self._rows[side]


def _scale(x: Tensor, styles: Tensor, regions: RegionRows | None) -> Tensor:
    """Multiply every pixel of x (B, C, H, W) by the style (B, R, C) of its region; consumes x (in place where autograd allows)."""
    if regions is None:
        styles = styles[:, 0, :, None, None]
        return x * styles if torch.is_grad_enabled() else x.mul_(styles)
    rows = regions.at(x.shape[-1])
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H * W, C), a view of a channels-last x
    if torch.is_grad_enabled():
        scaled = torch.stack([p * table.index_select(0, ids) for p, table, ids in zip(pixels, styles, rows, strict=True)])
        return scaled.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
    chunk = max(1, _CHUNK // x.shape[1]) if x.device.type == "cpu" else rows.shape[1]
    for item, table, ids in zip(pixels, styles, rows, strict=True):
        for part, part_ids in zip(item.split(chunk), ids.split(chunk), strict=True):
            part.mul_(table.index_select(0, part_ids))
    return x


def inverse_haar(x: Tensor) -> Tensor:
    """Twice the inverse Haar wavelet transform: bands LL, LH, HL, HH (B, 4C, H, W) -> (B, C, 2H, 2W), channels last."""
    low, vertical, horizontal, diagonal = x.permute(0, 2, 3, 1).chunk(4, dim=-1)  # (B, H, W, C) each
    batch, height, width, channels = low.shape
    out = x.new_empty(batch, height, 2, width, 2, channels)
    left, right = low + vertical, horizontal + diagonal
    out[:, :, 0, :, 0], out[:, :, 0, :, 1] = left + right, left - right
    left, right = low - vertical, horizontal - diagonal
    out[:, :, 1, :, 0], out[:, :, 1, :, 1] = left + right, left - right
    return out.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


class Style(nn.Linear):
    """Codes (B, R, 512) -> scale of each input channel (B, R, C) float32.

    Computed in float64: then a code gives the same bits whether it is mapped alone or among twelve. In float32 the product's
    order of summation depends on that, and 22 more layers make 4e-5 of the last bit.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(CODE_DIM, channels, dtype=torch.float64)

    def forward(self, codes: Tensor) -> Tensor:
        return super().forward(codes.double()).float()


class StyledInput(nn.Module):
    """The learned constant and its full 3x3 convolution at 4x4."""

    constant: Tensor
    noise: Tensor

    def __init__(self, channels: int = 512, side: int = 4) -> None:
        super().__init__()
        self.style = Style(channels)
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.empty(channels))
        self.register_buffer("constant", torch.empty(1, channels, side, side))
        self.register_buffer("noise", torch.empty(1, 1, side, side))

    def forward(self, codes: Tensor, regions: RegionRows | None) -> Tensor:
        """codes (B, R, 512) -> (B, C, 4, 4)."""
        styles = self.style(codes)  # (B, R, C)
        channels, side = self.constant.shape[1], self.constant.shape[-1]
        if regions is None:
            styles = styles[:, :1].expand(-1, side * side, -1)
        else:
            styles = torch.stack([table.index_select(0, ids) for table, ids in zip(styles, regions.at(side), strict=True)])  # (B, 16, C)
        # the output pixel's style scales the whole 3x3 patch under it, so patches are made before the scale
        patches = F.unfold(self.constant, 3, padding=1).view(channels, 9, side * side).permute(2, 0, 1)  # (16, C, 9)
        x = (patches * styles[..., None]).flatten(2) @ self.weight.flatten(1).t() + self.bias  # (B, 16, C)
        x = x.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        return F.leaky_relu(x + self.noise, 0.2)


class StyledConv(nn.Module):
    """Modulated depthwise 3x3, pointwise 1x1, stored noise, bias, LeakyReLU."""

    noise: Tensor

    def __init__(self, in_channels: int, out_channels: int, side: int) -> None:
        super().__init__()
        self.style = Style(in_channels)
        self.depthwise = nn.Parameter(torch.empty(in_channels, 1, 3, 3))
        self.pointwise = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.register_buffer("noise", torch.empty(1, 1, side, side))

    def forward(self, x: Tensor, codes: Tensor, regions: RegionRows | None) -> Tensor:
        """x (B, C, side, side), codes (B, R, 512) -> (B, C', side, side)."""
        styles = self.style(codes)  # (B, R, C)
        if regions is None and len(x) == 1 and x.shape[-1] >= _FOLD_SIDE:
            x = F.conv2d(x, self.depthwise * styles[0, 0, :, None, None, None], padding=1, groups=x.shape[1])
        else:
            x = _scale(F.conv2d(x, self.depthwise, padding=1, groups=x.shape[1]), styles, regions)
        x = F.conv2d(x, self.pointwise, self.bias)
        return F.leaky_relu_(x.add_(self.noise), 0.2)


class WaveletUp(nn.Module):
    """Modulation, then the inverse Haar wavelet: (B, 4C, H, W) -> (B, C, 2H, 2W). Holds half the published scale, see `inverse_haar`.

    The style is that of the input pixel, i.e. of each 2x2 block of the output.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.style = Style(in_channels)

    def forward(self, x: Tensor, codes: Tensor, regions: RegionRows | None) -> Tensor:
        return inverse_haar(_scale(x, self.style(codes), regions))


class ToImage(nn.Module):
    """Modulated 1x1 to four colours per pixel, which make the 1024 px image: (B, C, H, W) -> RGB (B, 3, 2H, 2W)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.style = Style(in_channels)
        self.pointwise = nn.Parameter(torch.empty(12, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.empty(12))

    def forward(self, x: Tensor, codes: Tensor, regions: RegionRows | None) -> Tensor:
        styles = self.style(codes)
        if regions is None and len(x) == 1:
            x = F.conv2d(x, self.pointwise * styles[0, 0, :, None, None], self.bias)
        else:
            x = F.conv2d(_scale(x, styles, regions), self.pointwise, self.bias)
        return F.pixel_shuffle(x, 2)


class Block(nn.Module):
    """One resolution: up, conv1, conv2."""

    def __init__(self, in_channels: int, out_channels: int, side: int) -> None:
        super().__init__()
        self.up = WaveletUp(in_channels)
        self.conv1 = StyledConv(in_channels // 4, out_channels, side)
        self.conv2 = StyledConv(out_channels, out_channels, side)

    def forward(self, x: Tensor, codes: Tensor, regions: RegionRows | None) -> Tensor:
        """x (B, C, side / 2, side / 2), codes (B, R, 3, 512) -> (B, C', side, side)."""
        x = self.up(x, codes[:, :, 0], regions)
        x = self.conv1(x, codes[:, :, 1], regions)
        return self.conv2(x, codes[:, :, 2], regions)  # type: ignore[no-any-return]


class MobileStyleGAN(nn.Module):
    """Mapping and synthesis; float32, deterministic (the noise maps are stored). Weights are frozen; gradients flow to the codes."""

    num_layers = NUM_LAYERS

    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.ModuleList(nn.Linear(CODE_DIM, CODE_DIM) for _ in range(8))
        self.input = StyledInput()
        widths = [512, 512, 512, 512, 512, 256, 128, 64]
        self.blocks = nn.ModuleList(Block(widths[k], widths[k + 1], 8 << k) for k in range(NUM_BLOCKS))
        self.to_image = ToImage(widths[-1])

    @classmethod
    def load(cls, device: str = "cpu") -> MobileStyleGAN:
        """The published weights, verified by the registry. Raises ValueError when the graphs are not the ones this port was made from."""
        files = [weight_path(f"mobile_stylegan_{part}_{kind}") for part in ("mapping", "synthesis") for kind in ("xml", "bin")]
        return cls.from_files(*files).to(device)

    @classmethod
    def from_files(cls, mapping_xml: Path, mapping_bin: Path, synthesis_xml: Path, synthesis_bin: Path) -> MobileStyleGAN:
        network = cls()
        values = _mapping_values(read_ir(mapping_xml, mapping_bin)) | _synthesis_values(read_ir(synthesis_xml, synthesis_bin))
        network.load_state_dict({key: torch.tensor(value) for key, value in values.items()})
        return network.eval().requires_grad_(False)

    def styles(self) -> list[Style]:
        """What maps a code to channel scales, one per style layer, in the layers' order."""
        return [layer for layer in self.modules() if isinstance(layer, Style)]

    def map(self, z: Tensor) -> Tensor:
        """Normal codes z (B, 512) -> style codes w (B, 512)."""
        check_shape(z, "B 512")
        x = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)
        for layer in self.mapping:
            x = F.leaky_relu(layer(x), 0.2) * 2**0.5
        return x

    @cached_property
    def mean_w(self) -> Tensor:
        """(512,): mean of the style codes of 4096 fixed normal codes (PCG64, seed 0); truncation pulls codes towards it."""
        z = np.random.Generator(np.random.PCG64(0)).standard_normal((MEAN_CODES, CODE_DIM), np.float32)
        with torch.inference_mode(False), torch.no_grad():  # kept for callers of any mode
            return self.map(torch.from_numpy(z).to(self.input.noise.device)).mean(dim=0)

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """As `synthesize`, so that `torch.func.functional_call` can run it with other weights."""
        return self.synthesize(*arguments, **named)

    def synthesize(
        self,
        codes: Tensor,
        region_ids: Tensor | None = None,
        stop_after: int | None = None,
        go_on: tuple[int, Tensor] | None = None,
    ) -> Tensor:
        """Style codes -> RGB (B, 3, 1024, 1024), about [-1, 1].

        Args:
            codes: (B, R, 23, 512), one code per region and style layer; or (B, 23, 512) for one region.
            region_ids: (B, H, W) uint8 in 0..R-1, any size; each layer reads them at its own size (nearest). None asks for one region.
            stop_after: side in px (4, 8, ... 512) after whose last convolution to stop and return the features (B, C, side, side).
            go_on: a `stop_after` and the features that an earlier call returned for it: the layers up to there are not run again.

        Raises ValueError on other shapes, on region ids without a code and on another side in `stop_after` or `go_on`.
        """
        if codes.ndim == 3:
            codes = codes[:, None]
        bound = check_shape(codes, f"B R {NUM_LAYERS} {CODE_DIM}")
        regions = None
        if region_ids is not None:
            if check_shape(region_ids, "B H W")["B"] != bound["B"]:
                raise ValueError(f"expected {bound['B']} label maps for {bound['B']} codes, got {len(region_ids)}")
            if int(region_ids.max()) >= bound["R"]:
                raise ValueError(f"region ids go up to {int(region_ids.max())}, but there are codes of {bound['R']} regions only")
            regions = RegionRows(region_ids)
        elif bound["R"] != 1:
            raise ValueError(f"codes of {bound['R']} regions need region_ids (B, H, W)")
        sides = [4 << k for k in range(NUM_BLOCKS + 1)]
        if stop_after is not None and stop_after not in sides:
            raise ValueError(f"stop_after must be one of {sides} px, got {stop_after}")
        if go_on is not None and go_on[0] not in sides:
            raise ValueError(f"go_on must start from features of one of {sides} px, got {go_on[0]}")
        if go_on is None:
            x: Tensor = self.input(codes[:, :, 0], regions)
        else:
            x = go_on[1] if torch.is_grad_enabled() else go_on[1].clone()  # layers overwrite what they read where they may
        for k, block in enumerate(self.blocks):
            if stop_after == sides[k]:
                return x
            if go_on is None or go_on[0] <= sides[k]:
                x = block(x, codes[:, :, 1 + 3 * k : 4 + 3 * k], regions)
        return x if stop_after is not None else self.to_image(x, codes[:, :, -1], regions)


def _mapping_values(graph: Graph) -> dict[str, Array]:
    """State dict values of the eight Linear layers of the mapping network."""
    values: dict[str, Array] = {}
    for k, product in enumerate(layer for layer in graph if layer.kind == "MatMul"):
        bias = next(source for source in graph.sources(graph.following(product, "Add")) if source.kind == "Reshape")
        values[f"mapping.{k}.weight"] = graph.constant_of(product)
        values[f"mapping.{k}.bias"] = graph.constant_of(bias)
    return values


def _synthesis_values(graph: Graph) -> dict[str, Array]:
    """State dict values of the synthesis network, its channels put in the order that `inverse_haar` and `pixel_shuffle` want."""
    values: dict[str, Array] = {}
    for weight in graph:
        prefix, found, _ = weight.name.partition(".modulation.weight")
        if found:
            key = prefix.removeprefix("m.").removesuffix(".conv").replace("layers.", "blocks.")
            key = {"conv1": "input", "blocks.6.to_img": "to_image"}.get(key, key)
            values |= {f"{key}.{name}": value for name, value in _layer_values(graph, weight).items()}
    values["input.constant"] = graph.constant(next(layer for layer in graph if layer.name == "m.input.input"))
    for k in range(NUM_BLOCKS):
        up, producer = f"blocks.{k}.up", f"blocks.{k - 1}.conv2" if k else "input"
        kernel = f"{producer}.pointwise" if k else f"{producer}.weight"
        quarter = len(values[f"{up}.style.bias"]) // 4
        # published order: LL of every channel, then LH, HL, HH of channel 0, of channel 1, ...
        order = np.concatenate([np.arange(quarter), *(quarter + 3 * np.arange(quarter) + band for band in range(3))])
        for name in (kernel, f"{producer}.bias"):
            values[name] = values[name][order]
        for name in (f"{up}.style.weight", f"{up}.style.bias"):
            values[name] = values[name][order] / 2
    for name in ("to_image.pointwise", "to_image.bias"):  # the last wavelet is linear on the image: fold it into the 1x1
        low, details = np.split(values[name].astype(np.float64), [3])
        vertical, horizontal, diagonal = details.reshape(3, 3, *low.shape[1:]).swapaxes(0, 1)
        corners = (low + vertical + horizontal + diagonal, low + vertical - horizontal - diagonal,
                   low - vertical + horizontal - diagonal, low - vertical - horizontal + diagonal)  # fmt: skip
        values[name] = np.stack(corners, axis=1).reshape(12, *low.shape[1:]).astype(np.float32) / 2
    return values


def _layer_values(graph: Graph, modulation: Layer) -> dict[str, Array]:
    """Values of one style layer, found by walking the graph on from the weight of its modulation."""
    product = graph.following(modulation, "MatMul")
    shifted = graph.following(product, "Add")
    factor = graph.following(graph.following(shifted, "Reshape"), "Multiply")
    scale, modulated = np.float32(1), factor
    if any(source.kind == "Const" for source in graph.sources(factor)):
        scale, modulated = graph.constant_of(factor).ravel()[0], graph.following(factor, "Multiply")
    values = {
        "style.weight": graph.constant(modulation) * np.float64(scale),
        "style.bias": graph.constant_of(shifted)[0] * np.float64(scale),
    }
    [step] = graph.consumers(modulated)
    if step.kind == "VariadicSplit":  # `up`: the wavelet has no weights of its own
        return values
    if step.kind == "GroupConvolution":
        values["depthwise"] = graph.constant_of(step)[:, 0]
        step = graph.following(step, "Convolution")
    kernel = graph.constant_of(step)
    values["weight" if kernel.shape[-1] == 3 else "pointwise"] = kernel
    while (step := graph.consumers(step)[0]).kind == "Add":
        term = graph.constant_of(step)[0]
        if term.shape[0] == len(kernel):
            values["bias"] = term[:, 0, 0]
        else:
            values["noise"] = term[None]
    return values
