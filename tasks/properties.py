"""What a picture's file says beside its pixels (colours, EXIF, density), and how a result says the same."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

from storage.codec import add_chunks, decode_png, encode_png
from tasks.color_profile import color_space
from tasks.frame import ImageFile, decode, open_picture, own_profile, png_chunks
from tasks.stage import ItemError

_COLOR_CHUNKS: Final = (b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM")
ADDED_CHUNKS: Final = (*_COLOR_CHUNKS, b"pHYs", b"eXIf")
"""Chunks of a result's PNG that repeat what its target says."""

# Tags of EXIF's first directory that say something of the picture; not its orientation, which is applied, nor where pixels lie in a TIFF.
_EXIF_TAGS: Final = (270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 18246, 33432, 34665, 34853, 40091, 40092, 40093, 40094, 40095)
_EXIF_SIDES: Final = (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight)
_WEBP_SIDE: Final = 16383  # px
_JPEG_SIDE: Final = 65500  # px


@dataclass(frozen=True)
class Properties:
    """What the results of a target say beside their pixels."""

    chunks: tuple[tuple[bytes, bytes], ...] = ()
    """Of a PNG: (kind, body)."""
    gray: bool = False
    """Whether the colour profile is one of gray, so that the PNG must be gray, too."""
    lost: tuple[str, ...] = ()
    """Sentences without a full stop: what the result does not keep."""


def read_properties(file: ImageFile) -> Properties:
    """Read what a picture says. Raises ItemError as `ImageFile.read` does."""
    with open_picture(io.BytesIO(file.data()), "the picture", file.max_pixels) as image:
        lost = []
        chunks: dict[bytes, bytes] = {}
        profile = image.info.get("icc_profile")
        honored = own_profile(image)
        if image.mode == "CMYK":
            lost.append("the target's CMYK colours are sRGB in the result")
        elif isinstance(image, PngImageFile):
            found = png_chunks(image)
            chunks = {kind: found[kind] for kind in (*_COLOR_CHUNKS, b"pHYs") if kind in found}
        space = color_space(profile) if isinstance(profile, bytes) else ""
        of_gray = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
        gray = of_gray and space == "GRAY" and honored == profile
        if isinstance(profile, bytes) and (gray or (space == "RGB" and not of_gray and image.mode != "CMYK")):
            chunks.setdefault(b"iCCP", b"ICC profile\0\0" + zlib.compress(profile, 9))
        else:
            # No profile of the picture's colours: a PNG must not have it, and it was not honoured.
            chunks.pop(b"iCCP", None)
        if b"pHYs" not in chunks and (density := _density(image)):
            chunks[b"pHYs"] = struct.pack(">IIB", *density, 1)
        if exif := _exif(image):
            chunks[b"eXIf"] = exif
        if "xmp" in image.info or "XML:com.adobe.xmp" in image.info:
            lost.append("the target's XMP metadata are not kept")
        if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
            lost.append("the target has several pages: the first is swapped, the others are not kept")
        return Properties(tuple(chunks.items()), gray, tuple(lost))


def _density(image: Image.Image) -> tuple[int, int] | None:
    """Return px per metre in x and y, None where the file says none; Pillow invents 72 dpi for some JPEGs."""
    dpi = image.info.get("dpi")
    if not dpi or (image.format == "JPEG" and not image.info.get("jfif_unit") and ExifTags.Base.XResolution not in image.getexif()):
        return None
    x, y = (round(float(value) / 0.0254) for value in dpi)
    return (x, y) if 0 < x < 2**31 and 0 < y < 2**31 else None


def _exif(image: Image.Image) -> bytes:
    """Return the EXIF block without orientation and thumbnail, b"" if there is nothing to say."""
    given = image.getexif()
    kept = Image.Exif()
    for tag in _EXIF_TAGS:
        if tag in given:
            value: Any = given.get_ifd(tag) if tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo) else given[tag]
            if tag == ExifTags.IFD.Exif:
                value = {key: entry for key, entry in value.items() if key not in _EXIF_SIDES}
            if value not in ("", {}, None):
                kept[tag] = value
    # A TIFF without EXIF says only its density there, which has its own chunk.
    if not set(kept) - {ExifTags.Base.XResolution, ExifTags.Base.YResolution, ExifTags.Base.ResolutionUnit}:
        return b""
    try:
        return kept.tobytes().removeprefix(b"Exif\0\0")
    except (ValueError, TypeError, KeyError, struct.error, OverflowError):
        return b""  # entries of types that cannot be written again


def with_properties(png: bytes, properties: Properties) -> bytes:
    """Add to the PNG of a result what its target says; the pixels stay as they are. Same arguments, same bytes."""
    if not properties.gray:
        return add_chunks(png, properties.chunks)
    pixels = decode_png(png)
    if pixels.shape[2] == 3:
        return add_chunks(encode_png(pixels[..., 0]), properties.chunks)
    if pixels.dtype != np.uint8:
        return add_chunks(png, [(kind, body) for kind, body in properties.chunks if kind != b"iCCP"])
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[..., [0, 3]]), "LA").save(buffer, "PNG", compress_level=1)
    return add_chunks(buffer.getvalue(), properties.chunks)


def convert_result(png: bytes, suffix: str) -> tuple[bytes, list[str]]:
    """Turn a result's PNG into a JPEG (quality 95, all colours) or a WebP (lossless), with its colours, EXIF and density.

    Returns the bytes, and sentences about what that format cannot keep. Raises ItemError for a picture that is too large for it.
    """
    jpeg = suffix in (".jpg", ".jpeg")
    frame = decode(png, "the result", 2**62)
    lost = []
    height, width = frame.pixels.shape[:2]
    if max(height, width) > (limit := _JPEG_SIDE if jpeg else _WEBP_SIDE):
        raise ItemError(f"the result has {width} x {height} px, and a {suffix} file at most {limit} px a side: choose .png")
    pixels = frame.pixels
    alpha = frame.alpha
    if pixels.dtype == np.uint16:
        lost.append(f"16 bits per channel became 8 in the {suffix} file; .png keeps them")
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
        alpha = None if alpha is None else ((alpha.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if jpeg and alpha is not None:
        lost.append("a JPEG has no transparency: the picture lies on white; .png and .webp keep it")
        weight = alpha[..., None].astype(np.uint32)
        pixels = ((pixels * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)
        alpha = None
    with open_picture(io.BytesIO(png), "the result", 2**62) as stored:
        options: dict[str, Any] = {"exif": stored.getexif()} if stored.getexif() else {}
        if profile := frame.profile or stored.info.get("icc_profile"):
            options["icc_profile"] = profile
        if "dpi" in stored.info:
            options["dpi"] = tuple(round(value) for value in stored.info["dpi"])
        one_channel = jpeg and stored.mode in ("L", "I;16", "LA")
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., 0]) if one_channel else pixels)
    if alpha is not None:
        picture = Image.fromarray(np.dstack((pixels, alpha)))
    if not one_channel and options.get("icc_profile") and stored.mode in ("L", "I;16", "LA"):
        # A WebP has three channels: gray in its own profile becomes sRGB.
        picture = Image.fromarray(frame.rgb8 if alpha is None else np.dstack((frame.rgb8, alpha)))
        del options["icc_profile"]
    buffer = io.BytesIO()
    if jpeg:
        picture.save(buffer, "JPEG", quality=95, subsampling=0, **options)
    else:
        picture.save(buffer, "WEBP", lossless=True, exact=True, **options)
    return buffer.getvalue(), lost
