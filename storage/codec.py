"""Artifact values <-> bytes: images and label maps as PNG, arrays as little-endian raw bytes with dtype and shape."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Container, Iterable
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

Kind = Literal["image", "labels", "array"]
Array = npt.NDArray[Any]


class CodecError(ValueError):
    """The bytes are not what the codec wrote."""


def encode_png(image: Array) -> bytes:
    """(H, W) or RGB(A) (H, W, 3 | 4), uint8 or uint16 -> PNG bytes. The same array gives the same bytes."""
    if image.dtype not in (np.uint8, np.uint16) or image.ndim not in (2, 3):
        raise CodecError(f"expected a (H, W), (H, W, 3) or (H, W, 4) array of uint8 or uint16, got {image.dtype} {image.shape}")
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR if image.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)
    # Level 1: a third of the time of the default for a few per cent more bytes.
    done, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not done:
        raise CodecError(f"OpenCV could not encode a {image.dtype} {image.shape} array as PNG")
    return bytes(data)


def decode_png(data: bytes) -> Array:
    """The exact inverse of `encode_png`. Raises CodecError on anything else."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    if image is None:
        raise CodecError("the bytes are not a readable PNG")
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB if image.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)
    return np.asarray(image)


def array_bytes(array: Array) -> bytes:
    """Raw little-endian bytes in C order: what an array's digest is taken of (with dtype and shape beside it)."""
    array = np.ascontiguousarray(array)
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


_PNG_HEAD = 8 + 25  # the signature and IHDR, which comes first


def add_chunks(png: bytes, chunks: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Put chunks (kind, body) behind the header of a PNG; its pixel data stay as they are."""
    packed = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks]
    return png[:_PNG_HEAD] + b"".join(packed) + png[_PNG_HEAD:]


def without_chunks(png: bytes, kinds: Container[bytes]) -> bytes:
    """Take the chunks of these kinds out of a PNG: what `add_chunks` was given. Bytes that are no PNG come back as they are."""
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        return png
    kept, at = [png[:8]], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])
        if png[at + 4 : at + 8] not in kinds:
            kept.append(png[at:end])
        at = end
    return b"".join(kept)
