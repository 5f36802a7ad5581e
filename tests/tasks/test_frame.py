from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from tasks.frame import Frame, ImageFile, hash_file, probe
from tasks.stage import ItemError

STEPS = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)  # 2 x 3: every turn of it is told apart
DEEP = np.random.default_rng(0).integers(0, 65536, (2, 3, 4), dtype=np.uint16)  # RGBA

# EXIF orientation -> what a viewer shows of STEPS, written out by hand
UPRIGHT: dict[int, list[list[int]]] = {
    1: [[10, 20, 30], [40, 50, 60]],
    2: [[30, 20, 10], [60, 50, 40]],
    3: [[60, 50, 40], [30, 20, 10]],
    4: [[40, 50, 60], [10, 20, 30]],
    5: [[10, 40], [20, 50], [30, 60]],
    6: [[40, 10], [50, 20], [60, 30]],
    7: [[60, 30], [50, 20], [40, 10]],
    8: [[30, 60], [20, 50], [10, 40]],
}


def image_file(path: Path) -> ImageFile:
    return ImageFile(str(path), hash_file(str(path)))


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def png(width: int, height: int, depth: int, color_type: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG by hand; `rows` with a filter byte 0 in front of each."""
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png16(pixels: np.ndarray, extra: bytes = b"") -> bytes:
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], rows, extra)


def tiff16(pixels: np.ndarray, orientation: int = 1, odd_tag: bool = False) -> bytes:
    """An uncompressed little-endian RGB(A) TIFF by hand."""
    height, width, channels = pixels.shape
    tags: list[Sequence[int]] = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 0),
        (259, 3, 1),
        (262, 3, 2),
        (273, 4, 0),
        (274, 3, orientation),
    ]
    tags += [(277, 3, channels), (278, 4, height), (279, 4, pixels.nbytes)]
    tags += [(338, 3, 2)] * (channels == 4) + [(40000, 3, 7)] * odd_tag
    bits_at = 8 + 2 + 12 * len(tags) + 4
    body = b"".join(
        struct.pack("<HHII", tag, kind, channels if tag == 258 else 1, {258: bits_at, 273: bits_at + 2 * channels}.get(tag, value))
        for tag, kind, value in tags
    )
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4)
    return head + struct.pack("<H", 16) * channels + pixels.astype("<u2").tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff", "png16", "tiff16"])
def test_all_exif_orientations_come_out_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    want = np.array(UPRIGHT[orientation])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"turned.{kind}"
    deep = np.repeat(STEPS[..., None].astype(np.uint16) * 257 + 3, 3, axis=2)
    if kind == "png16":
        path.write_bytes(png16(deep, chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))))
    elif kind == "tiff16":
        path.write_bytes(tiff16(deep, orientation))
    else:
        blocks = STEPS.repeat(16, 0).repeat(16, 1)  # JPEG needs room
        options = {"quality": 95} if kind == "jpg" else {"lossless": True} if kind == "webp" else {}
        Image.fromarray(blocks).convert("RGB").save(path, exif=exif, **options)
    frame = image_file(path).read()
    if kind.endswith("16"):
        np.testing.assert_array_equal(frame.pixels, (want * 257 + 3)[..., None].repeat(3, axis=2))
    else:
        np.testing.assert_allclose(frame.pixels[8::16, 8::16], want[..., None].repeat(3, axis=2), atol=1)
    assert sorted(probe(str(path))) == sorted(frame.pixels.shape[:2])


def test_16_bit_color_keeps_every_bit(tmp_path: Path) -> None:
    for name, data in {"a.png": png16(DEEP), "a.tiff": tiff16(DEEP)}.items():
        frame = image_file(write(tmp_path / name, data)).read()
        assert frame.pixels.dtype == np.uint16 and frame.alpha is not None
        np.testing.assert_array_equal(frame.pixels, DEEP[..., :3])
        np.testing.assert_array_equal(frame.alpha, DEEP[..., 3])
    for name, data in {"b.png": png16(DEEP[..., :3]), "b.tiff": tiff16(DEEP[..., :3])}.items():
        frame = image_file(write(tmp_path / name, data)).read()
        np.testing.assert_array_equal(frame.pixels, DEEP[..., :3])
        assert frame.alpha is None


def test_16_bit_gray_keeps_every_bit(tmp_path: Path) -> None:
    gray = DEEP[..., 0]
    Image.fromarray(gray).save(tmp_path / "gray.tiff")
    Image.fromarray(gray).save(tmp_path / "gray.pgm")
    (tmp_path / "gray.png").write_bytes(png16(gray[..., None]))
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(image_file(path).read().pixels, gray[..., None].repeat(3, axis=2), err_msg=path.name)
    frame = image_file(write(tmp_path / "la.png", png16(DEEP[..., :2]))).read()
    np.testing.assert_array_equal(frame.pixels, gray[..., None].repeat(3, axis=2))
    np.testing.assert_array_equal(frame.alpha, DEEP[..., 1])


def test_16_bit_jpeg_2000_keeps_every_bit(tmp_path: Path) -> None:
    """White became black."""
    tiles = DEEP.repeat(32, axis=0).repeat(32, axis=1)
    tiles[:32, :32, :3] = 65535
    lossless = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000]
    for channels, order in ((1, [0]), (3, [2, 1, 0]), (4, [2, 1, 0, 3])):
        path = tmp_path / f"{channels}.jp2"
        cv2.imwrite(str(path), tiles[..., order], lossless)
        frame = image_file(path).read()
        want = tiles[..., :3] if channels > 1 else tiles[..., :1].repeat(3, axis=2)
        np.testing.assert_array_equal(frame.pixels, want)
        assert (frame.alpha is None) == (channels < 4)
        if frame.alpha is not None:
            np.testing.assert_array_equal(frame.alpha, tiles[..., 3])
    data = bytearray((tmp_path / "3.jp2").read_bytes())
    place = data.index(b"\xff\x4f\xff\x51") + 2 + 40  # depth of the first channel, less 1
    for depth, sentence in ((11, "12, 16 and 16 bits"), (0x8F, "with a sign"), (37, "38, 16 and 16 bits")):
        data[place] = depth
        with pytest.raises(ItemError, match=sentence):
            image_file(write(tmp_path / "odd.jp2", bytes(data))).read()


def test_16_bit_ppm_keeps_every_bit(tmp_path: Path) -> None:
    rgb = DEEP[..., :3]
    raw = image_file(write(tmp_path / "raw.ppm", b"P6 3 2 65535\n" + rgb.astype(">u2").tobytes())).read()
    np.testing.assert_array_equal(raw.pixels, rgb)
    plain = image_file(write(tmp_path / "plain.ppm", b"P3 3 2 65535\n" + " ".join(map(str, rgb.ravel())).encode() + b"\n")).read()
    np.testing.assert_array_equal(plain.pixels, rgb)
    ten = image_file(write(tmp_path / "ten.ppm", b"P6 3 2 1023\n" + (rgb >> 6).astype(">u2").tobytes())).read()
    np.testing.assert_array_equal(ten.pixels, np.rint((rgb >> 6) * (65535 / 1023)))


def test_transparent_16_bit_gray_has_alpha(tmp_path: Path) -> None:
    gray = np.array([[0, 255, 256], [65535, 40000, 256]], np.uint16)
    Image.fromarray(gray).save(tmp_path / "gray.png", transparency=256)
    frame = image_file(tmp_path / "gray.png").read()
    np.testing.assert_array_equal(frame.pixels, gray[..., None].repeat(3, axis=2))
    np.testing.assert_array_equal(frame.alpha, np.where(gray == 256, 0, 65535))


def test_rgb8_rounds_16_bits() -> None:
    pixels = np.array([0, 128, 129, 257, 65535 - 129, 65535], np.uint16).repeat(3).reshape(1, 6, 3)
    np.testing.assert_array_equal(Frame(pixels).rgb8[0, :, 0], [0, 0, 1, 1, 254, 255])
    eight = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    np.testing.assert_array_equal(Frame(eight).rgb8, eight)


def test_color_models_become_rgb(tmp_path: Path) -> None:
    rgb = np.array([[[200, 10, 30], [0, 120, 240]]], np.uint8)
    alpha = np.array([[255, 40]], np.uint8)
    rgba = Image.fromarray(np.dstack((rgb, alpha)))
    rgba.save(tmp_path / "rgba.png")
    rgba.quantize(4).save(tmp_path / "palette_alpha.png")
    Image.fromarray(rgb).quantize(2).save(tmp_path / "palette.png")
    rgba.save(tmp_path / "rgba.webp", lossless=True)
    Image.fromarray(rgb).save(tmp_path / "rgb.bmp")
    Image.fromarray(rgb).save(tmp_path / "rgb.ppm")
    for path in sorted(tmp_path.iterdir()):
        frame = image_file(path).read()
        np.testing.assert_array_equal(frame.pixels, rgb, err_msg=path.name)
        if path.name in ("rgba.png", "rgba.webp", "palette_alpha.png"):
            np.testing.assert_array_equal(frame.alpha, alpha)
        else:
            assert frame.alpha is None


def test_gray_and_bilevel_become_rgb(tmp_path: Path) -> None:
    Image.fromarray(STEPS).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(image_file(tmp_path / "gray.png").read().pixels, STEPS[..., None].repeat(3, axis=2))
    Image.fromarray(np.dstack((STEPS, STEPS + 1)), "LA").save(tmp_path / "la.png")
    frame = image_file(tmp_path / "la.png").read()
    np.testing.assert_array_equal(frame.pixels, STEPS[..., None].repeat(3, axis=2))
    np.testing.assert_array_equal(frame.alpha, STEPS + 1)
    Image.fromarray(STEPS > 30).save(tmp_path / "bilevel.png")
    np.testing.assert_array_equal(image_file(tmp_path / "bilevel.png").read().pixels[..., 0], np.where(STEPS > 30, 255, 0))


def test_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    rgb = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    np.testing.assert_allclose(image_file(tmp_path / "cmyk.jpg").read().pixels, rgb, atol=4)


def test_text_chunks(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("seed", "12")
    info.add_itxt("name", "Ängström")
    Image.fromarray(STEPS).save(tmp_path / "text.png", pnginfo=info)
    assert image_file(tmp_path / "text.png").text() == {"seed": "12", "name": "Ängström"}
    Image.fromarray(STEPS).save(tmp_path / "none.jpg")
    assert image_file(tmp_path / "none.jpg").text() == {}


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("missing.png", None, "does not exist"),
        ("empty.png", b"", "is empty"),
        ("words.png", b"these are not the pixels you are looking for", "is not an image"),
        ("phone.heic", b"\0\0\0\x18ftypheic" + bytes(64), "HEIC"),
        ("bomb.png", png(50_000, 50_000, 8, 2, b""), "50000 x 50000 px"),
        ("half_header.png", png(4, 4, 8, 2, b"")[:20], "damaged|not an image"),
    ],
)
def test_bad_files_are_told_by_their_header(tmp_path: Path, name: str, data: bytes | None, sentence: str) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ItemError, match=sentence) as caught:
        probe(str(path))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_folder_and_odd_path() -> None:
    with pytest.raises(ItemError, match="is a folder"):
        probe("/")
    with pytest.raises(ItemError, match="is a folder"):
        hash_file("/")
    with pytest.raises(ItemError, match="pipe or a device"):
        probe("/dev/zero")
    with pytest.raises(ItemError, match="cannot be read"):
        probe("a\0b.png")


def test_pixel_limit_holds_when_reading_too(tmp_path: Path) -> None:
    path = write(tmp_path / "bomb.png", png(50_000, 50_000, 8, 2, b""))
    with pytest.raises(ItemError, match=r"more than the limit of 120000000 px.*--max-pixels"):
        image_file(path).read()
    Image.fromarray(STEPS).save(tmp_path / "six.png")
    assert probe(str(tmp_path / "six.png"), max_pixels=6) == (2, 3)
    with pytest.raises(ItemError, match="limit of 5 px"):
        probe(str(tmp_path / "six.png"), max_pixels=5)


def saved(kind: str, frames: int = 1) -> bytes:
    """A 16 x 16 px picture of some frames: the first black, the later ones white."""
    buffer = io.BytesIO()
    later = [Image.new("RGB", (16, 16), "white") for _ in range(frames - 1)]
    Image.new("RGB", (16, 16)).save(buffer, kind, **({"save_all": True, "append_images": later} if later else {}))
    return buffer.getvalue()


def patched(data: bytes, marker: bytes, offset: int, value: bytes) -> bytes:
    at = data.index(marker) + offset
    return data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("header.jpg", patched(saved("JPEG"), b"\xff\xc0", 5, struct.pack(">HH", 65_000, 65_000))),
        ("screen.gif", patched(saved("GIF"), b"GIF8", 6, struct.pack("<HH", 60_000, 60_000))),
        ("frame.gif", patched(saved("GIF"), b"\x2c", 5, struct.pack("<HH", 65_000, 65_000))),  # a frame beyond the screen
        ("text.png", png(1, 1, 8, 2, b"\0" * 4, chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(100_000_000))))),
        ("profile.png", png(1, 1, 8, 2, b"\0" * 4, chunk(b"iCCP", b"key\0\0" + zlib.compress(bytes(100_000_000))))),
    ],
)
def test_files_that_would_unpack_into_much_more_are_refused_unread(tmp_path: Path, name: str, data: bytes) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(ItemError, match=r"more than the limit|data too large"):
        probe(str(path))
    with pytest.raises(ItemError, match=r"more than the limit|data too large"):
        image_file(path).read()


def test_pixel_data_beyond_the_picture_is_not_unpacked(tmp_path: Path) -> None:
    path = write(tmp_path / "long.png", png(4, 4, 8, 2, bytes(200_000_000)))
    assert image_file(path).read().pixels.shape == (4, 4, 3)


def test_of_several_pages_the_first_is_the_picture(tmp_path: Path) -> None:
    path = write(tmp_path / "pages", saved("TIFF", frames=3))
    assert probe(str(path)) == (16, 16)
    assert not image_file(path).read().pixels.any()


@pytest.mark.parametrize("kind", ["png", "jpg", "png16", "tiff16"])
def test_cut_short_file(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(1).integers(0, 65536, (64, 64, 3), dtype=np.uint16)
    if kind.endswith("16"):
        data = png16(noise) if kind == "png16" else tiff16(noise)
    else:
        buffer = io.BytesIO()
        Image.fromarray(noise.astype(np.uint8)).save(buffer, {"png": "PNG", "jpg": "JPEG"}[kind])
        data = buffer.getvalue()
    whole, half = write(tmp_path / f"whole.{kind}", data), write(tmp_path / f"half.{kind}", data[: len(data) // 2])
    assert image_file(whole).read().pixels.shape == (64, 64, 3)
    assert probe(str(half)) == (64, 64)
    with pytest.raises(ItemError, match=r"damaged or cut short.*fetch or export it again"):
        image_file(half).read()


def test_file_changed_after_planning(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(STEPS).save(path)
    planned = image_file(path)
    np.testing.assert_array_equal(planned.read().pixels, planned.read().pixels)
    Image.fromarray(STEPS + 1).save(path)
    with pytest.raises(ItemError, match="changed while running"):
        planned.read()
    path.unlink()
    with pytest.raises(ItemError, match="does not exist"):
        planned.read()


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    profile = chunk(b"iCCP", b"bogus\0\0" + zlib.compress(b"x" * 200))
    assert image_file(write(tmp_path / "profile.png", png16(DEEP, profile))).read().alpha is not None
    assert image_file(write(tmp_path / "tag.tiff", tiff16(DEEP, odd_tag=True))).read().alpha is not None
    palette = Image.fromarray(STEPS, "P")
    palette.putpalette(list(range(256)) * 3)
    palette.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    assert image_file(tmp_path / "palette.png").read().alpha is not None
    wide = write(tmp_path / "wide.png", png(10_000, 9_500, 8, 2, b""))  # Pillow warns from 89 million pixels on
    assert probe(str(wide)) == (9_500, 10_000)
    captured = capfd.readouterr()
    assert captured.out + captured.err == "" and not recwarn.list
