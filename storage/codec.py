"""Artifact values <-> bytes: images and label maps as PNG, arrays as little-endian raw bytes with dtype and shape."""

from __future__ import annotations

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
