"""Colour profiles of pictures: a picture's own colours <-> sRGB, which the networks are trained on."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from tasks.stage import ItemError, UInt8

Chromaticity = tuple[float, float]

D65: Final[Chromaticity] = (0.3127, 0.3290)
SRGB_PRIMARIES: Final = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))

# ITU-T H.273, as PNG's cICP chunk and video headers number them: red, green, blue and white.
_CICP_PRIMARIES: Final[Mapping[int, tuple[Chromaticity, Chromaticity, Chromaticity, Chromaticity]]] = {
    1: (*SRGB_PRIMARIES, D65),
    5: ((0.64, 0.33), (0.29, 0.60), (0.15, 0.06), D65),
    6: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), D65),
    7: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), D65),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), D65),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), D65),
}
_BRADFORD: Final = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_D50: Final = np.array([0.9642, 1.0, 0.8249])
_SRGB_TOLERANCE: Final = 1  # of 255: two profiles of sRGB differ by as much in their rounding


@lru_cache(maxsize=64)
def color_space(profile: bytes) -> str:
    """Return the colour space of an ICC profile (`RGB`, `GRAY`, `CMYK`, ...), "" for bytes that are no profile."""
    try:
        return str(ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space).strip()
    except (OSError, ValueError, ImageCms.PyCMSError):
        return ""


@lru_cache(maxsize=64)
def is_srgb(profile: bytes) -> bool:
    """Return whether an RGB profile means sRGB: over a grid of colours no channel changes by more than 1 of 255."""
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    return bool(abs(to_srgb(colors, profile).astype(int) - colors).max() <= _SRGB_TOLERANCE)


def to_srgb(pixels: UInt8, profile: bytes) -> UInt8:
    """Convert RGB (H, W, 3) uint8 in a profile's colours to sRGB. Of a gray profile the first channel counts."""
    if color_space(profile) == "GRAY":
        return _converted(Image.fromarray(np.ascontiguousarray(pixels[..., 0])), profile, _srgb(), "RGB")
    return _converted(Image.fromarray(pixels), profile, _srgb(), "RGB")


def from_srgb(pixels: UInt8, profile: bytes) -> UInt8:
    """Convert sRGB (H, W, 3) uint8 to a profile's colours; colours outside of its gamut are clipped. Gray has three equal channels."""
    if color_space(profile) == "GRAY":
        return np.repeat(_converted(Image.fromarray(pixels), _srgb(), profile, "L")[..., None], 3, axis=2)
    return _converted(Image.fromarray(pixels), _srgb(), profile, "RGB")


def cmyk_to_srgb(image: Image.Image, profile: bytes) -> UInt8:
    """Convert a CMYK picture by its profile to sRGB (H, W, 3) uint8."""
    return _converted(image, profile, _srgb(), "RGB")


def _converted(image: Image.Image, source: bytes, goal: bytes, mode: str) -> UInt8:
    """Convert by relative colorimetric intent with black point compensation. Raises ItemError for a profile that cannot be used."""
    own, wanted = (ImageCms.ImageCmsProfile(io.BytesIO(data)) for data in (source, goal))
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE
    try:
        converted = ImageCms.profileToProfile(image, own, wanted, ImageCms.Intent.RELATIVE_COLORIMETRIC, mode, flags=flags)
    except ImageCms.PyCMSError as error:
        raise ItemError(f"the picture's colour profile cannot be used ({error}): convert the picture to sRGB.") from None
    assert converted is not None
    return np.array(converted)


@lru_cache(maxsize=1)
def _srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def cicp_profile(code: bytes) -> bytes | None:
    """Return the profile that a PNG's cICP chunk means, None for sRGB. Raises ItemError for HDR and codes that are no RGB picture's."""
    primaries, transfer, matrix, full_range = code[:4]
    curve = _cicp_curve(transfer)
    if curve is None or primaries not in _CICP_PRIMARIES or matrix != 0 or full_range != 1:
        said = "HDR (PQ or HLG)" if transfer in (16, 18) else f"coded as CICP {primaries}/{transfer}/{matrix}/{full_range}"
        raise ItemError(f"the picture's colours are {said}, which cannot be read here: convert the picture to sRGB or Display P3.")
    red, green, blue, white = _CICP_PRIMARIES[primaries]
    return _unless_srgb(matrix_profile((red, green, blue), white, curve))


def gamma_profile(gamma: float, chromaticities: tuple[float, ...] | None) -> bytes | None:
    """Return the profile that a PNG's gAMA (0.45455 and the like) and cHRM (white, red, green, blue) mean, None for sRGB."""
    if gamma <= 0:
        return None
    given = chromaticities or (*D65, *SRGB_PRIMARIES[0], *SRGB_PRIMARIES[1], *SRGB_PRIMARIES[2])
    white, red, green, blue = ((given[at], given[at + 1]) for at in range(0, 8, 2))
    of_srgb = np.allclose((white, red, green, blue), (D65, *SRGB_PRIMARIES), atol=0.002)
    # 1 / 2.2 beside sRGB's primaries is how PNG writes sRGB itself.
    if of_srgb and abs(gamma - 0.45455) < 0.01:
        return None
    if min(white[1], red[1], green[1], blue[1]) <= 0:
        return None
    curve = np.linspace(0, 1, 1024) ** (1 / gamma)
    try:
        return matrix_profile((red, green, blue), white, curve)
    except np.linalg.LinAlgError:
        return None


def _unless_srgb(profile: bytes) -> bytes | None:
    return None if is_srgb(profile) else profile


def _cicp_curve(transfer: int) -> npt.NDArray[np.float64] | None:
    """Return the curve from signal to light of an H.273 transfer number, 1024 values [0, 1]; None for HDR and unknown ones."""
    signal = np.linspace(0, 1, 1024)
    if transfer in (1, 6, 14, 15):
        return np.where(signal < 0.081, signal / 4.5, ((signal + 0.099) / 1.099) ** (1 / 0.45))
    if transfer == 13:
        return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    powers = {4: 2.2, 5: 2.8, 8: 1.0}
    return signal ** powers[transfer] if transfer in powers else None


def matrix_profile(
    primaries: tuple[Chromaticity, Chromaticity, Chromaticity], white: Chromaticity, curve: npt.NDArray[np.float64]
) -> bytes:
    """Return an ICC profile (version 2, RGB) of three primaries, a white point and one curve from signal to light, values [0, 1].

    The same arguments give the same bytes. Raises LinAlgError for primaries on one line.
    """
    to_xyz = _xyz(np.array(primaries)).T
    white_xyz = _xyz(np.array([white]))[0]
    to_xyz = to_xyz * np.linalg.solve(to_xyz, white_xyz)
    adapt = np.linalg.inv(_BRADFORD) @ np.diag(_BRADFORD @ _D50 / (_BRADFORD @ white_xyz)) @ _BRADFORD
    columns = (adapt @ to_xyz).T
    name = b"e4s"
    description = b"desc" + bytes(4) + struct.pack(">I", len(name) + 1) + name + b"\0" + bytes(78)
    levels = np.rint(np.clip(curve, 0, 1) * 65535).astype(">u2").tobytes()
    table = b"curv" + bytes(4) + struct.pack(">I", len(curve)) + levels
    tags = {
        b"desc": description,
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": _xyz_tag(_D50),
        **{key: _xyz_tag(column) for key, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), table),
    }
    return _packed(tags)


def _xyz(xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(N, 2) chromaticities -> (N, 3) X, Y, Z with Y = 1."""
    x, y = xy[:, 0], xy[:, 1]
    return np.stack((x / y, np.ones_like(x), (1 - x - y) / y), axis=1)


def _xyz_tag(xyz: npt.NDArray[np.float64]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *np.rint(xyz * 65536).astype(int).tolist())


def _packed(tags: Mapping[bytes, bytes]) -> bytes:
    """Lay out the tags of a profile; equal ones are written once."""
    at = 128 + 4 + 12 * len(tags)
    places: dict[bytes, int] = {}
    table, body = b"", b""
    for name, data in tags.items():
        if data not in places:
            places[data] = at + len(body)
            body += data + bytes(-len(data) % 4)
        table += name + struct.pack(">II", places[data], len(data))
    header = struct.pack(">I4sI4s4s4s", at + len(body), bytes(4), 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body
