"""Pictures as users have them -> frames of RGB pixels: the root input of the stages."""

from __future__ import annotations

import hashlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Final

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, PLANAR_CONFIGURATION, SAMPLEFORMAT, TiffImageFile

from tasks.color_profile import cicp_profile, cmyk_to_srgb, color_space, from_srgb, gamma_profile, is_srgb, to_srgb
from tasks.stage import ItemError, PassingError, UInt8

try:
    # The extra `e4s[heic]`.
    from pillow_heif import register_heif_opener
except ImportError:
    _HEIF: tuple[str, ...] = ()
else:
    register_heif_opener()
    _HEIF = ("HEIF",)

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

MAX_PIXELS: Final = 120_000_000  # px; a frame of 4 bytes per pixel is then 480 MB

# No format that runs a program (EPS, WMF) or is recognised by luck (TGA).
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "AVIF", *_HEIF)
_MOVING: Final = ("PNG", "WEBP", "GIF", "AVIF")
_PLANES: Final = 2  # of TIFF's PlanarConfiguration: each channel lies apart
READING: Final = "2"
"""How pictures are read that an earlier version read otherwise: those take it into their keys, see `Header.reading`."""

_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_CHUNK_BYTES: Final = 16_000_000  # of a PNG's metadata; a longer chunk is passed over
_PNG_PIXEL_CHUNKS: Final = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture, upright (EXIF orientation applied)."""

    pixels: Pixels
    """RGB (H, W, 3) uint8 or uint16, full range; a gray picture has three equal channels."""
    alpha: Pixels | None = None
    """(H, W) of the same dtype, straight (not premultiplied); None for an opaque picture."""
    profile: bytes | None = None
    """ICC profile of the colours that `pixels` are in; None: sRGB."""

    @property
    def rgb8(self) -> UInt8:
        """RGB (H, W, 3) uint8 in sRGB, what the networks see; 16 bits are rounded (65535 -> 255)."""
        eight = self.pixels.view(np.uint8)
        if self.pixels.dtype != np.uint8:
            eight = ((self.pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return eight if self.profile is None else to_srgb(eight, self.profile)

    def in_own_colors(self, rgb8: UInt8) -> UInt8:
        """Convert sRGB (h, w, 3) uint8 to the colours of this frame's pixels; a gray profile gives three equal channels."""
        return rgb8 if self.profile is None else from_srgb(rgb8, self.profile)


@dataclass(frozen=True)
class Header:
    """What a picture's header says."""

    height: int
    width: int
    """px; the two are exchanged where EXIF turns the picture."""
    reading: str = ""
    """READING for a picture that an earlier version decoded to other pixels, which must not share its artifacts; else ""."""


@dataclass(frozen=True)
class ImageFile:
    """A picture on disk as the plan saw it: the root input `image` of the stages."""

    path: str
    sha256: str
    max_pixels: int = MAX_PIXELS

    def read(self) -> Frame:
        """Decode the file. Raises ItemError if it changed since it was planned, is damaged or too large."""
        return decode(self.data(), "the picture", self.max_pixels)

    def text(self) -> dict[str, str]:
        """The PNG text chunks (keyword -> text), {} for other formats. Raises ItemError as `read` does."""
        data = self.data()
        with open_picture(io.BytesIO(data), "the picture", self.max_pixels) as image:
            return {keyword: str(text) for keyword, text in image.text.items()} if isinstance(image, PngImageFile) else {}

    def data(self) -> bytes:
        """Return the file's bytes. Raises ItemError if it is gone or changed since it was planned."""
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
    """Read only the header of a picture: its two sides, px (height, width, or the reverse if EXIF turns it). Raises as `read_header`."""
    header = read_header(path, max_pixels)
    return header.height, header.width


def read_header(path: str, max_pixels: int = MAX_PIXELS) -> Header:
    """Read only the header of a picture.

    Raises ItemError for a file that is missing, a folder, empty, not an image, an animation or larger than `max_pixels`.
    """
    with _readable(path), Path(path).open("rb") as file, open_picture(file, path, max_pixels) as image:
        other = own_profile(image) is not None or _is_other_tiff(image)
        return Header(image.height, image.width, READING if other else "")


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
def open_picture(file: IO[bytes], path: str, max_pixels: int) -> Iterator[Image.Image]:
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
            if image.format in _MOVING and getattr(image, "is_animated", False):
                raise ItemError(
                    f"{path} is an animated {image.format}, which is a video: save the frame that is meant as a PNG, "
                    "or convert the animation to MP4 for `e4s videos`."
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
        return f"{path} is a HEIC picture: install the extra for them (pip install 'e4s[heic]'), or convert it to JPEG or PNG."
    return f"{path} is not an image that can be read here: give a PNG, JPEG, WebP, TIFF, BMP, GIF, JPEG 2000, PPM or AVIF file."


def own_profile(image: Image.Image) -> bytes | None:
    """Return the ICC profile of a picture's colours, None for sRGB and for a picture that says nothing (or nonsense, as viewers do).

    A PNG says it by cICP, an ICC profile, sRGB or gAMA and cHRM, in this order. Raises ItemError for colours that cannot be read.
    """
    profile = image.info.get("icc_profile")
    if isinstance(image, PngImageFile):
        code = png_chunks(image).get(b"cICP")
        if code is not None and len(code) == 4:
            return cicp_profile(code)
        if not profile and "srgb" not in image.info and "gamma" in image.info:
            return gamma_profile(float(image.info["gamma"]), image.info.get("chromaticity"))
    if not isinstance(profile, bytes):
        return None
    space = color_space(profile)
    if image.mode == "CMYK":
        return profile if space == "CMYK" else None
    gray = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
    if space == "GRAY":
        return profile if gray else None
    return profile if space == "RGB" and not gray and not is_srgb(profile) else None


def png_chunks(image: Image.Image) -> dict[bytes, bytes]:
    """Chunks of a PNG before its pixels, kind -> body; the last of each kind."""
    file: IO[bytes] = getattr(image, "fp")  # noqa: B009  Pillow's types give it to files only
    place = file.tell()
    file.seek(len(_PNG_SIGNATURE))
    found: dict[bytes, bytes] = {}
    while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
        length = int.from_bytes(head[:4])
        if length > _CHUNK_BYTES:
            file.seek(length, io.SEEK_CUR)
        else:
            found[head[4:]] = file.read(length)
        file.seek(4, io.SEEK_CUR)
    file.seek(place)
    return found


def _is_other_tiff(image: Image.Image) -> bool:
    """Return whether a TIFF is of a kind that an earlier version took for something else: 16 bits in planes, or with 0 as white."""
    if not isinstance(image, TiffImageFile) or 16 not in image.tag_v2.get(BITSPERSAMPLE, ()):
        return False
    in_planes = image.tag_v2.get(PLANAR_CONFIGURATION) == _PLANES and image.mode in ("RGB", "RGBA")
    return in_planes or image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0


def decode(data: bytes, path: str, max_pixels: int) -> Frame:
    with open_picture(io.BytesIO(data), path, max_pixels) as image:
        if isinstance(image, Jpeg2KImageFile):
            _check_jpeg2000(data, path)
        if isinstance(image, TiffImageFile):
            _check_tiff(image, path)
        sides, bits, profile = sorted(image.size), _header_bits(image, data), own_profile(image)
        deep, maximum = _is_deep_color(image, data), _ppm_maximum(image)
        white_is_zero = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        image.load()  # also of deep files: OpenCV takes a file that is cut short for a whole one
        frame = _decode_deep(data, path, orientation, maximum, image) if deep else _decoded(image, path, white_is_zero, profile)
        if sorted(frame.pixels.shape[1::-1]) != sides or (bits > 8) != (frame.pixels.dtype == np.uint16):
            raise ItemError(f"{path} is of a rare kind ({bits} bits per channel) that is not read right: convert it to a 16-bit PNG.")
        return frame if profile is None or image.mode == "CMYK" else replace(frame, profile=profile)


def _decoded(image: Image.Image, path: str, white_is_zero: bool, profile: bytes | None) -> Frame:
    """Turn a loaded picture of one channel, or of 8 bits, into a frame; `profile` is that of CMYK colours."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        gray, clear = np.asarray(image).astype(np.uint16), image.info.get("transparency")  # the level that is transparent
        alpha = None if clear is None else np.where(gray == clear, 0, 65535).astype(np.uint16)
        gray = 65535 - gray if white_is_zero else gray
        return Frame(np.repeat(gray[..., None], 3, axis=2), alpha)
    if image.mode in ("I", "F"):
        raise ItemError(f"{path} has 32 bits per channel: convert it to 8 or 16 bits.")
    if image.mode == "LAB":
        raise ItemError(f"{path} has Lab colours, which cannot be read here: convert it to RGB.")
    if image.mode == "CMYK" and profile is not None:
        return Frame(cmyk_to_srgb(image, profile))
    if not image.has_transparency_data:
        return Frame(np.array(image.convert("RGB")))
    rgba = np.array(image.convert("RGBA"))
    return Frame(np.ascontiguousarray(rgba[..., :3]), np.ascontiguousarray(rgba[..., 3]))


def _header_bits(image: Image.Image, data: bytes) -> int:
    """Return the bits per channel that the decoder's answer must have, as the header says; 8 for less and for formats of 8 bits."""
    if isinstance(image, PngImageFile):
        return max(8, data[24])
    if isinstance(image, TiffImageFile):
        return int(max(8, *image.tag_v2.get(BITSPERSAMPLE, (1,))))
    if isinstance(image, Jpeg2KImageFile):
        return max(8, *_jpeg2000_depths(data))
    if isinstance(image, PpmImageFile):
        return 16 if image.mode.startswith("I") or _ppm_maximum(image) > 255 else 8
    return 8


def _check_tiff(image: TiffImageFile, path: str) -> None:
    """Refuse numbers that Pillow takes for others: 12 bits are not scaled, signs not seen. Raises ItemError."""
    bits, kinds = set(image.tag_v2.get(BITSPERSAMPLE, (1,))), set(image.tag_v2.get(SAMPLEFORMAT, (1,)))
    if image.mode not in ("I", "F") and (not bits <= {1, 2, 4, 8, 16} or kinds - {1, 4}):
        numbers = "numbers with a sign" if kinds - {1, 4} else "bits"
        raise ItemError(f"{path} is a TIFF of {max(bits)} {numbers} per channel: convert it to a 16-bit PNG.")


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


def _decode_deep(data: bytes, path: str, orientation: int, maximum: int, eight: Image.Image) -> Frame:
    """Decode more than 8 bits per channel by OpenCV, else by FFmpeg; the file's `maximum` becomes 65535.

    `eight`: the picture as Pillow loaded it, the upper 8 bits of PNG and TIFF, which must be the same. Raises ItemError if no decoder
    agrees with it.
    """
    is_png, is_tiff = data.startswith(_PNG_SIGNATURE), isinstance(eight, TiffImageFile)
    upper = np.asarray(eight.convert("RGBA" if "A" in eight.getbands() else "RGB")) if is_png or is_tiff else None
    for decoder in (_decode_opencv, _decode_ffmpeg) if is_tiff else (_decode_opencv,):
        rgb = decoder(data, is_png)
        if rgb is None:
            continue
        if decoder is _decode_ffmpeg:
            rgb = _upright(rgb, orientation)
        if upper is None or (rgb.shape == upper.shape and np.array_equal(rgb >> 8, upper)):
            break
    else:
        raise ItemError(f"{path} is a 16-bit file of a rare kind: convert it to a 16-bit PNG.")
    if maximum != 65535:
        rgb = ((np.minimum(rgb, maximum).astype(np.uint32) * 65535 + maximum // 2) // maximum).astype(np.uint16)
    rgb = _upright(rgb, orientation if is_png else 1)  # (H, W, 3 or 4); OpenCV and Pillow turn TIFF themselves
    return Frame(np.ascontiguousarray(rgb[..., :3]), np.ascontiguousarray(rgb[..., 3]) if rgb.shape[2] == 4 else None)


def _decode_opencv(data: bytes, is_png: bool) -> npt.NDArray[np.uint16] | None:
    """Return RGB(A) (H, W, 3 or 4), None if OpenCV makes something else of it."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # of TIFF tags it does not know; failures are still returned
    bgr = cv2.imdecode(np.frombuffer(_png_pixel_chunks(data) if is_png else data, np.uint8), cv2.IMREAD_UNCHANGED)
    if bgr is None or bgr.dtype != np.uint16 or bgr.ndim != 3:
        return None
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB if bgr.shape[2] == 3 else cv2.COLOR_BGRA2RGBA), np.uint16)


def _decode_ffmpeg(data: bytes, is_png: bool) -> npt.NDArray[np.uint16] | None:
    """Return RGB(A) (H, W, 3 or 4) of a TIFF, whose channels may lie in planes; None if FFmpeg makes something else of it."""
    import av

    try:
        with av.open(io.BytesIO(data), "r", format="tiff_pipe") as file:
            pixels = next(file.decode(video=0)).to_ndarray()
    except (av.FFmpegError, StopIteration, ValueError):
        return None
    return np.asarray(pixels, np.uint16) if pixels.dtype == np.uint16 and pixels.ndim == 3 else None


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
