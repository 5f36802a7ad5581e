"""Pictures as users have them -> frames of RGB pixels: the root input of the stages."""

from __future__ import annotations

import hashlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

from tasks.stage import ItemError, PassingError

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

MAX_PIXELS: Final = 120_000_000  # px; a frame of 4 bytes per pixel is then 480 MB

# No format that runs a program (EPS, WMF) or is recognised by luck (TGA).
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "AVIF")
_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_PNG_PIXEL_CHUNKS: Final = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture, upright (EXIF orientation applied)."""

    pixels: Pixels
    """RGB (H, W, 3) uint8 or uint16, full range; a gray picture has three equal channels."""
    alpha: Pixels | None = None
    """(H, W) of the same dtype, straight (not premultiplied); None for an opaque picture."""

    @property
    def rgb8(self) -> npt.NDArray[np.uint8]:
        """RGB (H, W, 3) uint8, what the networks see; 16 bits are rounded (65535 -> 255)."""
        if self.pixels.dtype == np.uint8:
            return self.pixels.view(np.uint8)
        return ((self.pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


@dataclass(frozen=True)
class ImageFile:
    """A picture on disk as the plan saw it: the root input `image` of the stages."""

    path: str
    sha256: str
    max_pixels: int = MAX_PIXELS

    def read(self) -> Frame:
        """Decode the file. Raises ItemError if it changed since it was planned, is damaged or too large."""
        return _decode(self._bytes(), "the picture", self.max_pixels)

    def text(self) -> dict[str, str]:
        """The PNG text chunks (keyword -> text), {} for other formats. Raises ItemError as `read` does."""
        data = self._bytes()
        with _open(io.BytesIO(data), "the picture", self.max_pixels) as image:
            return {keyword: str(text) for keyword, text in image.text.items()} if isinstance(image, PngImageFile) else {}

    def _bytes(self) -> bytes:
        with _readable(self.path):
            data = Path(self.path).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise PassingError(f"{self.path} was changed while running: leave the inputs alone during a run and start it again.")
        return data


def hash_file(path: str) -> str:
    """sha256 of a file's bytes, as hex: the identity of an image. Raises ItemError if it cannot be read."""
    with _readable(path), Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def probe(path: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Read only the header of a picture: its two sides, px (height, width, or the reverse if EXIF turns it).

    Raises ItemError for a file that is missing, a folder, empty, not an image or larger than `max_pixels`.
    """
    with _readable(path), Path(path).open("rb") as file, _open(file, path, max_pixels) as image:
        return image.height, image.width


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turn what the file system refuses into sentences."""
    try:
        if Path(path).is_dir():
            raise PassingError(f"{path} is a folder: give the path of one image file.")
        if Path(path).exists() and not Path(path).is_file():
            raise PassingError(f"{path} is a pipe or a device: give the path of one image file.")
        yield
    except FileNotFoundError:
        raise PassingError(f"{path} does not exist: correct its path.") from None
    except PermissionError:
        raise PassingError(f"{path} may not be read: change its permissions.") from None
    except (OSError, ValueError) as error:
        raise PassingError(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or error}): correct its path or check the disk."
        ) from None


@contextmanager
def _open(file: IO[bytes], path: str, max_pixels: int) -> Iterator[Image.Image]:
    """Header of an image file; the limit is checked before a pixel is decoded. What Pillow raises inside the block becomes ItemError."""
    # One line per bad file is ours to say; these settings are the same in every thread and every call.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(file, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ItemError(
                    f"{path} claims {width} x {height} px, more than the limit of {max_pixels} px: shrink it, or raise --max-pixels."
                )
            yield image
    except ItemError:
        raise
    except UnidentifiedImageError:
        raise ItemError(_not_an_image(path, file)) from None
    except Exception as error:  # a damaged file can raise nearly anything from inside a decoder
        raise ItemError(f"{path} is damaged or cut short ({error}): fetch or export it again.") from None


def _not_an_image(path: str, file: IO[bytes]) -> str:
    file.seek(0)
    head = file.read(12)
    if not head:
        return f"{path} is empty: fetch or export it again."
    if head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif"):
        return f"{path} is a HEIC picture, which cannot be read here: convert it to JPEG or PNG."
    return f"{path} is not an image that can be read here: give a PNG, JPEG, WebP, TIFF, BMP, GIF, JPEG 2000, PPM or AVIF file."


def _decode(data: bytes, path: str, max_pixels: int) -> Frame:
    with _open(io.BytesIO(data), path, max_pixels) as image:
        if isinstance(image, Jpeg2KImageFile):
            _check_jpeg2000(data, path)
        deep, maximum = _is_deep_color(image, data), _ppm_maximum(image)
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        image.load()  # also of deep files: OpenCV takes a file that is cut short for a whole one
        if deep:
            return _decode_deep(data, path, orientation, maximum)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
            gray, clear = np.asarray(image).astype(np.uint16), image.info.get("transparency")  # the level that is transparent
            alpha = None if clear is None else np.where(gray == clear, 0, 65535).astype(np.uint16)
            return Frame(np.repeat(gray[..., None], 3, axis=2), alpha)
        if image.mode in ("I", "F"):
            raise ItemError(f"{path} has 32 bits per channel: convert it to 8 or 16 bits.")
        if not image.has_transparency_data:
            return Frame(np.array(image.convert("RGB")))
        rgba = np.array(image.convert("RGBA"))
        return Frame(np.ascontiguousarray(rgba[..., :3]), np.ascontiguousarray(rgba[..., 3]))


def _is_deep_color(image: Image.Image, data: bytes) -> bool:
    """Whether the file has 16 bits per channel and more than one channel: Pillow would drop the lower 8."""
    if isinstance(image, PngImageFile):
        bit_depth, color_type = data[24], data[25]  # of IHDR, always the first chunk
        return bit_depth == 16 and color_type != 0
    if isinstance(image, Jpeg2KImageFile):
        return len(_jpeg2000_depths(data)) > 1 and max(_jpeg2000_depths(data)) > 8
    if isinstance(image, PpmImageFile):
        return image.mode == "RGB" and _ppm_maximum(image) > 255
    return isinstance(image, TiffImageFile) and image.mode in ("RGB", "RGBA") and 16 in image.tag_v2[BITSPERSAMPLE]


def _jpeg2000_depths(data: bytes) -> list[int]:
    """Return bits per channel, negative for channels with a sign, as the codestream's SIZ marker says."""
    size = data.index(b"\xff\x4f\xff\x51") + 2  # right behind the marker that begins the codestream
    channels = int.from_bytes(data[size + 38 : size + 40])
    bits = [data[size + 40 + 3 * channel] for channel in range(channels)]
    return [-(one & 0x7F) - 1 if one & 0x80 else one + 1 for one in bits]


def _check_jpeg2000(data: bytes, path: str) -> None:
    """Refuse what neither decoder reads right: Pillow scales only 8 bits, OpenCV only 8 and 16. Raises ItemError."""
    depths = _jpeg2000_depths(data)
    if not depths or (max(depths) <= 8 and min(depths) > 0) or (set(depths) == {16} and len(depths) in (1, 3, 4)):
        return
    shown = [f"{abs(depth)}" for depth in depths]
    bits = f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else shown[0]
    sign = ", with a sign" if min(depths) < 0 else ""
    raise ItemError(f"{path} is JPEG 2000 of {bits} bits per channel{sign}: convert it to a 16-bit PNG.")


def _ppm_maximum(image: Image.Image) -> int:
    """Return the value that means white in a PPM file, as long as its pixels are not loaded; 65535 for other files."""
    if not isinstance(image, PpmImageFile):
        return 65535
    arguments = image.tile[0][3] if image.tile else None
    return int(arguments[1]) if isinstance(arguments, tuple) else 255


def _decode_deep(data: bytes, path: str, orientation: int, maximum: int) -> Frame:
    """Decode more than 8 bits per channel by OpenCV; the file's `maximum` becomes 65535."""
    is_png = data.startswith(_PNG_SIGNATURE)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # of TIFF tags it does not know; failures are still returned
    bgr = cv2.imdecode(np.frombuffer(_png_pixel_chunks(data) if is_png else data, np.uint8), cv2.IMREAD_UNCHANGED)
    if bgr is None or bgr.dtype != np.uint16 or bgr.ndim != 3:
        raise ItemError(f"{path} is a 16-bit file of a rare kind: convert it to a 16-bit PNG.")
    if maximum != 65535:
        bgr = ((np.minimum(bgr, maximum).astype(np.uint32) * 65535 + maximum // 2) // maximum).astype(np.uint16)
    bgr = _upright(bgr.view(np.uint16), orientation if is_png else 1)  # (H, W, 3 or 4); OpenCV turns TIFF itself
    return Frame(np.ascontiguousarray(bgr[..., 2::-1]), np.ascontiguousarray(bgr[..., 3]) if bgr.shape[2] == 4 else None)


def _png_pixel_chunks(data: bytes) -> bytes:
    """Drop the chunks that do not decide pixels: OpenCV would print warnings about odd colour profiles and the like."""
    kept, at = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])  # length, type, body, checksum
        if data[at + 4 : at + 8] in _PNG_PIXEL_CHUNKS:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _upright(pixels: npt.NDArray[np.uint16], orientation: int) -> npt.NDArray[np.uint16]:
    """Apply EXIF orientation 1..8 to (H, W, C): transpose (5..8), then flip rows and columns."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
