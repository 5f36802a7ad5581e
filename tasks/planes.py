"""Video frames in the decoder's own pixel format: planes, their RGB view, and pasting that leaves every other sample alone.

A pixel format is described as FFmpeg's are: each component (Y, U, V or R, G, B, A) is a strided view into one plane's bytes, so planar,
semi-planar and packed formats need no code of their own.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from math import ceil
from typing import Any, Final, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape
from tasks.stage import Float32, UInt8

_SUBSAMPLING: Final = {"410": (4, 4), "411": (4, 1), "420": (2, 2), "422": (2, 1), "440": (1, 2), "444": (1, 1)}
_MATRICES: Final = {  # AVColorSpace (ITU-T H.273) -> red and blue share of luma
    1: (0.2126, 0.0722),  # bt709
    4: (0.30, 0.11),  # fcc
    5: (0.299, 0.114),  # bt601, 625 lines
    6: (0.299, 0.114),  # bt601, 525 lines
    7: (0.212, 0.087),  # smpte240m
    9: (0.2627, 0.0593),  # bt2020, non-constant luminance
    10: (0.2627, 0.0593),  # bt2020, constant luminance: read as the other, as players do
}
_BT601, _BT709 = 6, 1
_UNSPECIFIED: Final = 2


class FormatError(ValueError):
    """The pixel format or colour space cannot be worked on; the sentence says which."""


class Component(NamedTuple):
    """Where one component lies: every `step` bytes of plane `plane`, from byte `offset`; its value is the sample >> `shift`."""

    plane: int
    step: int
    offset: int
    bits: int
    shift: int
    dtype: str
    across: int  # luma px per sample, horizontally
    down: int  # luma px per sample, vertically


@dataclass(frozen=True)
class PixelFormat:
    """A pixel format by FFmpeg's name."""

    name: str
    components: Mapping[str, Component]
    """By role: Y (U V) or R G B, and A."""
    full_range: bool | None = None
    """What the format itself says (yuvj420p, RGB, gray); None: the stream says it."""

    @property
    def block(self) -> tuple[int, int]:
        """px (across, down) that share a chroma sample."""
        return max(c.across for c in self.components.values()), max(c.down for c in self.components.values())

    def plane_shapes(self, width: int, height: int) -> list[tuple[int, int]]:
        """(rows, bytes per row) of every plane, without padding."""
        shapes: dict[int, tuple[int, int]] = {}
        for c in self.components.values():
            rows, row_bytes = ceil(height / c.down), ceil(width / c.across) * c.step
            known = shapes.get(c.plane, (0, 0))
            shapes[c.plane] = max(rows, known[0]), max(row_bytes, known[1])
        return [shapes[plane] for plane in sorted(shapes)]


@cache
def pixel_format(name: str) -> PixelFormat:
    """Describe a pixel format. Raises FormatError for those without plain samples (palettes, single bits, floats, hardware surfaces)."""
    if match := re.fullmatch(r"yuv(a?)(j?)(\d{3})p(\d*)(le|be)?", name):
        alpha, jpeg, chroma, bits, order = match.groups()
        if chroma in _SUBSAMPLING:
            across, down = _SUBSAMPLING[chroma]
            planes = [_planar(0, bits, order), _planar(1, bits, order, across, down), _planar(2, bits, order, across, down)]
            roles = dict(zip("YUV", planes, strict=True)) | ({"A": _planar(3, bits, order)} if alpha else {})
            return PixelFormat(name, roles, True if jpeg else None)
    if match := re.fullmatch(r"gray(\d*)(le|be)?", name):
        return PixelFormat(name, {"Y": _planar(0, match[1], match[2])})
    if match := re.fullmatch(r"gbr(a?)p(\d*)(le|be)?", name):
        alpha, bits, order = match.groups()
        return PixelFormat(name, {role: _planar(plane, bits, order) for plane, role in enumerate("GBRA" if alpha else "GBR")}, True)
    if match := re.fullmatch(r"nv(12|21|16|24|42)", name):
        across, down = {"12": (2, 2), "21": (2, 2), "16": (2, 1)}.get(match[1], (1, 1))
        first, second = "VU" if match[1] in ("21", "42") else "UV"
        chroma_at = {first: Component(1, 2, 0, 8, 0, "u1", across, down), second: Component(1, 2, 1, 8, 0, "u1", across, down)}
        return PixelFormat(name, {"Y": _planar(0), **chroma_at})
    if match := re.fullmatch(r"p([024])(10|12|16)(le|be)", name):
        across, down = {"0": (2, 2), "2": (2, 1), "4": (1, 1)}[match[1]]
        bits_, dtype = int(match[2]), _dtype(16, match[3])
        chroma_of = {role: Component(1, 4, 2 * at, bits_, 16 - bits_, dtype, across, down) for at, role in enumerate("UV")}
        return PixelFormat(name, {"Y": Component(0, 2, 0, bits_, 16 - bits_, dtype, 1, 1), **chroma_of})
    if name in ("yuyv422", "uyvy422", "yvyu422"):
        at = {role: name[:4].index(role) for role in "yuv"}
        packed = {role.upper(): Component(0, 4, at[role], 8, 0, "u1", 2, 1) for role in "uv"}
        return PixelFormat(name, {"Y": Component(0, 2, at["y"] % 2, 8, 0, "u1", 1, 1), **packed})
    if match := re.fullmatch(r"([rgba0]{3,4})(24|48|64)?(le|be)?", name):
        order_of, size, endian = match.groups()
        wide = 2 if size in ("48", "64") else 1
        if set("rgb") <= set(order_of) and len(set(order_of)) == len(order_of):
            step = len(order_of) * wide
            found = {
                role.upper(): Component(0, step, place * wide, 8 * wide, 0, _dtype(8 * wide, endian), 1, 1)
                for place, role in enumerate(order_of)
                if role != "0"
            }
            return PixelFormat(name, found, True)
    raise FormatError(f"the pixel format {name} cannot be worked on: convert the video to yuv420p")


def _planar(plane: int, bits: str = "", order: str | None = None, across: int = 1, down: int = 1) -> Component:
    depth = int(bits or 8)
    return Component(plane, 1 if depth == 8 else 2, 0, depth, 0, _dtype(depth, order), across, down)


def _dtype(bits: int, order: str | None) -> str:
    return "u1" if bits == 8 else ">u2" if order == "be" else "<u2"


class Turn(NamedTuple):
    """How a coded picture becomes upright: first transposed, then mirrored."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    @classmethod
    def of_matrix(cls, matrix: tuple[int, ...] | None) -> Turn:
        """The nearest quarter turn or mirroring of a display matrix (9 numbers, row by row, as MP4 has it)."""
        if matrix is None:
            return cls()
        a, b, _, c, d = matrix[:5]  # x' = a x + c y, y' = b x + d y
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(False, a < 0, d < 0)
        return cls(True, c < 0, b < 0)

    def upright(self, pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Coded (H, W[, C]) -> upright; a view."""
        if self.transpose:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]

    def coded(self, pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The inverse of `upright`."""
        pixels = pixels[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]
        return pixels.swapaxes(0, 1) if self.transpose else pixels

    def corner(self, left: int, top: int, size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
        """Top left corner in the coded picture of an upright rectangle of `size` (w, h) in an upright frame of `frame` (W, H)."""
        if self.mirror_x:
            left = frame[0] - left - size[0]
        if self.mirror_y:
            top = frame[1] - top - size[1]
        return (top, left) if self.transpose else (left, top)


@dataclass(frozen=True)
class Colour:
    """How Y, U, V stand for RGB."""

    matrix: int = _UNSPECIFIED
    """AVColorSpace (ITU-T H.273)."""
    range: int = 0
    """AVColorRange: 0 not said, 1 limited, 2 full."""
    centred: bool = False
    """Chroma samples lie between luma samples (JPEG) instead of on the left column (MPEG)."""

    def is_full(self, pixels: PixelFormat) -> bool:
        """Whether black and white are the ends of the scale; a format without chroma is full range unless the stream says otherwise."""
        if pixels.full_range is not None:
            return pixels.full_range
        return self.range == 2 or (self.range == 0 and "U" not in pixels.components)

    def shares(self, height: int) -> tuple[float, float]:
        """Red and blue share of luma; a stream that does not say is bt601 up to 576 lines, bt709 above. Raises FormatError."""
        matrix = self.matrix
        if matrix in (0, _UNSPECIFIED, 3):  # "RGB" on a stream with chroma is a mistake of its writer
            matrix = _BT601 if height <= 576 else _BT709
        if matrix not in _MATRICES:
            raise FormatError(f"the colour space {matrix} (ITU-T H.273) cannot be worked on: convert the video to bt709")
        return _MATRICES[matrix]


@dataclass(frozen=True, eq=False)
class PlanarFrame:
    """One decoded frame."""

    format: PixelFormat
    width: int
    """px of the coded picture, before `turn`."""
    height: int
    planes: tuple[UInt8, ...]
    """(rows, bytes) each, without padding; see `PixelFormat.plane_shapes`."""
    colour: Colour = field(default_factory=Colour)
    turn: Turn = field(default_factory=Turn)

    def __post_init__(self) -> None:
        shapes = [plane.shape for plane in self.planes]
        expected = self.format.plane_shapes(self.width, self.height)
        if shapes != expected:
            raise ValueError(f"{self.format.name} of {self.width} x {self.height} px has planes {expected}, got {shapes}")

    @property
    def size(self) -> tuple[int, int]:
        """Width, height of the upright picture, px."""
        return (self.height, self.width) if self.turn.transpose else (self.width, self.height)

    def component(self, role: str) -> npt.NDArray[Any]:
        """Samples of one component, a view (rows, columns) of the planes; shifted left by `Component.shift`."""
        c = self.format.components[role]
        samples = self.planes[c.plane].view(c.dtype)
        itemsize = samples.itemsize
        return samples[: ceil(self.height / c.down), c.offset // itemsize :: c.step // itemsize][:, : ceil(self.width / c.across)]

    def check(self) -> int:
        """CRC-32 of all samples: tells whether a frame was decoded again as before."""
        crc = zlib.crc32(f"{self.format.name} {self.width} {self.height}".encode())
        for plane in self.planes:
            crc = zlib.crc32(np.ascontiguousarray(plane).data, crc)
        return crc

    def rgb8(self) -> UInt8:
        """The upright picture, RGB (H, W, 3) uint8, full range: what the networks see."""
        return np.ascontiguousarray(self.turn.upright(self._coded_rgb8()))

    def _coded_rgb8(self) -> UInt8:
        if "R" in self.format.components:
            return np.dstack([_to_8_bits(self.component(role), self.format.components[role]) for role in "RGB"])
        codec = _Codec.of(self)
        layers = []
        for role in codec.roles:
            c = self.format.components[role]
            samples = (self.component(role) >> c.shift).astype(np.float32)
            layers.append(samples if (c.across, c.down) == (1, 1) else _enlarge(samples, c, self.width, self.height, self.colour.centred))
        samples = np.dstack(layers)  # [H, W, 1 | 3]
        rgb = cv2.transform(samples.reshape(*samples.shape[:2], -1), codec.to_rgb.astype(np.float32))
        return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


def paste_patch(frame: PlanarFrame, patch: npt.NDArray[Any], weights: Float32, left: int, top: int) -> PlanarFrame:
    """Blend an RGB picture into a frame, in the frame's own pixel format.

    `patch` RGB (h, w, 3) uint8 or float [0, 255], `weights` (h, w) float [0, 1] with 1 = patch; `left`, `top` place both in the upright
    picture and may lie outside. A luma (or RGB) sample changes only where its weight is above 0, a chroma sample only where one of the
    px that share it has such a weight: all others keep their bits, alpha always. Y, U, V are linear in R, G, B, so blending them equals
    blending RGB; chroma is blended with the weights that it has after subsampling.
    """
    shape = check_shape(patch, "h w 3")
    check_shape(weights, f"{shape['h']} {shape['w']}")
    window = _Window.of(frame, patch, weights, left, top)
    planes = tuple(plane.copy() for plane in frame.planes)
    result = replace(frame, planes=planes)
    if window is None:
        return result
    codec = _Codec.of(frame)
    values = cv2.transform(window.patch, codec.from_rgb.astype(np.float32))  # [h, w, 1 | 3]
    values = values.reshape(*window.weights.shape, -1)
    for index, role in enumerate(codec.roles):
        c = frame.format.components[role]
        rows = slice(window.top // c.down, ceil((window.top + window.weights.shape[0]) / c.down))
        columns = slice(window.left // c.across, ceil((window.left + window.weights.shape[1]) / c.across))
        place = result.component(role)[rows, columns]
        if (c.across, c.down) == (1, 1):
            weight, new, touched = window.weights, window.weights * values[..., index], window.weights > 0
        else:
            weight = _shrink(window.weights, c, frame.colour.centred)
            new = _shrink(window.weights * values[..., index], c, frame.colour.centred)
            touched = _any_in_block(window.weights > 0, c)
        blended = np.rint((place >> c.shift) * (1 - weight) + new)
        place[touched] = (np.clip(blended, 0, (1 << c.bits) - 1).astype(place.dtype) << c.shift)[touched]
    return result


def padded(frame: PlanarFrame, block: tuple[int, int]) -> PlanarFrame:
    """The coded picture grown to multiples of `block` (across, down) px by repeating its last column and row."""
    width, height = (-(-size // step) * step for size, step in zip((frame.width, frame.height), block, strict=True))
    if (width, height) == (frame.width, frame.height):
        return frame
    planes = tuple(np.zeros(shape, np.uint8) for shape in frame.format.plane_shapes(width, height))
    large = replace(frame, width=width, height=height, planes=planes)
    for role in frame.format.components:
        samples, small = large.component(role), frame.component(role)
        rows, columns = small.shape
        samples[:rows, :columns] = small
        samples[:rows, columns:] = small[:, -1:]
        samples[rows:] = samples[rows - 1 : rows]
    return large


@dataclass(frozen=True, eq=False)
class _Window:
    """A patch in the coded picture, cut to the frame, its edges on chroma blocks, with a margin of one block without weight."""

    patch: Float32
    weights: Float32
    left: int
    top: int

    @classmethod
    def of(cls, frame: PlanarFrame, patch: npt.NDArray[Any], weights: Float32, left: int, top: int) -> _Window | None:
        height, width = weights.shape
        left, top = frame.turn.corner(left, top, (width, height), frame.size)
        patch, weights = frame.turn.coded(patch), frame.turn.coded(weights)
        height, width = weights.shape
        across, down = frame.format.block
        x0, y0 = max(0, left), max(0, top)
        x1, y1 = min(frame.width, left + width), min(frame.height, top + height)
        if x0 >= x1 or y0 >= y1 or not (weights[y0 - top : y1 - top, x0 - left : x1 - left] > 0).any():
            return None
        outer_left, outer_top = max(0, (x0 // across - 1) * across), max(0, (y0 // down - 1) * down)
        outer_right = min(frame.width, (ceil(x1 / across) + 1) * across)
        outer_bottom = min(frame.height, (ceil(y1 / down) + 1) * down)
        inside = (slice(y0 - outer_top, y1 - outer_top), slice(x0 - outer_left, x1 - outer_left))
        seen = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        size = outer_bottom - outer_top, outer_right - outer_left
        full_patch, full_weights = np.zeros((*size, 3), np.float32), np.zeros(size, np.float32)
        full_patch[inside], full_weights[inside] = patch[seen], np.clip(weights[seen], 0, 1)
        return cls(full_patch, full_weights, outer_left, outer_top)


@dataclass(frozen=True, eq=False)
class _Codec:
    """Affine maps between sample values and RGB [0, 255]."""

    roles: str
    to_rgb: npt.NDArray[np.float64]
    """(3, n + 1)"""
    from_rgb: npt.NDArray[np.float64]
    """(n, 4)"""

    @classmethod
    def of(cls, frame: PlanarFrame) -> _Codec:
        components = frame.format.components
        if "R" in components:
            scale = np.array([((1 << components[role].bits) - 1) / 255 for role in "RGB"])
            zero = np.zeros((3, 1))
            return cls("RGB", np.hstack((np.diag(1 / scale), zero)), np.hstack((np.diag(scale), zero)))
        full, bits = frame.colour.is_full(frame.format), components["Y"].bits
        black, span, chroma = (0, (1 << bits) - 1, (1 << bits) - 1) if full else (16 << bits - 8, 219 << bits - 8, 224 << bits - 8)
        red, blue = frame.colour.shares(frame.height)
        luma = np.array((red, 1 - red - blue, blue))
        if "U" not in components:
            to_rgb = np.tile([[255 / span, -255 * black / span]], (3, 1))
            return cls("Y", to_rgb, np.array([[*(luma * span / 255), black]]))
        rows = np.stack((luma, ((0, 0, 1) - luma) / (2 * (1 - blue)), ((1, 0, 0) - luma) / (2 * (1 - red))))
        scale, shift = np.array((span, chroma, chroma)) / 255, np.array((black, 1 << bits - 1, 1 << bits - 1), np.float64)
        forward = rows * scale[:, None]
        back = np.linalg.inv(forward)
        return cls("YUV", np.hstack((back, (-back @ shift)[:, None])), np.hstack((forward, shift[:, None])))


def _to_8_bits(samples: npt.NDArray[Any], c: Component) -> UInt8:
    if c.bits == 8:
        return samples.astype(np.uint8)
    white = (1 << c.bits) - 1
    return (((samples >> c.shift).astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)


def _shift(step: int, centred: bool) -> float:
    """Where a chroma sample lies: px from the first luma px of its block."""
    return (step - 1) / 2 if centred else 0.0


def _enlarge(samples: Float32, c: Component, width: int, height: int, centred: bool) -> Float32:
    """Chroma at luma resolution, bilinear between the places where the samples lie; vertically they always lie between lines."""
    matrix = np.array(
        ((1 / c.across, 0, -_shift(c.across, centred) / c.across), (0, 1 / c.down, -_shift(c.down, True) / c.down)), np.float64
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(samples, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE), np.float32)


def _shrink(samples: Float32, c: Component, centred: bool) -> Float32:
    """Luma resolution -> chroma resolution: the block's mean, or a triangle about the left column where chroma lies on it."""
    across, anchor_x = _kernel(c.across, centred)
    down, anchor_y = _kernel(c.down, True)
    filtered = cv2.sepFilter2D(samples, -1, across, down, anchor=(anchor_x, anchor_y), borderType=cv2.BORDER_REPLICATE)
    return np.asarray(filtered[:: c.down, :: c.across], np.float32)


def _kernel(step: int, centred: bool) -> tuple[Float32, int]:
    if centred or step == 1:
        return np.full(step, 1 / step, np.float32), 0
    triangle = np.concatenate((np.arange(1, step + 1), np.arange(step - 1, 0, -1)))
    return (triangle / triangle.sum()).astype(np.float32), step - 1


def _any_in_block(touched: npt.NDArray[np.bool_], c: Component) -> npt.NDArray[np.bool_]:
    height, width = touched.shape
    padded = np.pad(touched, ((0, -height % c.down), (0, -width % c.across)))
    return np.asarray(padded.reshape(padded.shape[0] // c.down, c.down, -1, c.across).any(axis=(1, 3)))
