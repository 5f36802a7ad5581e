"""Colours and metadata of pictures: read, converted for the networks, and said again by results."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from storage.codec import add_chunks, encode_png, without_chunks
from tasks.color_profile import D65, SRGB_PRIMARIES, cicp_profile, from_srgb, matrix_profile, to_srgb
from tasks.frame import READING, ImageFile, hash_file, read_header
from tasks.paste import STAGE, PasteConfig
from tasks.properties import ADDED_CHUNKS, convert_result, read_properties, with_properties
from tasks.stage import ItemError

ADOBE = matrix_profile(((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), D65, np.linspace(0, 1, 1024) ** 2.19921875)
PIXELS = np.random.default_rng(0).integers(40, 216, (24, 32, 3), dtype=np.uint8)


def image_file(path: Path) -> ImageFile:
    return ImageFile(str(path), hash_file(str(path)))


def expected_srgb(pixels: np.ndarray) -> np.ndarray:
    """Adobe RGB -> sRGB by its definition, in floating point."""
    to_xyz = np.array([[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]])
    from_xyz = np.array(
        [[3.24096994, -1.53738318, -0.49861076], [-0.96924364, 1.8759675, 0.04155506], [0.05563008, -0.20397696, 1.05697151]]
    )
    light = np.clip((pixels / 255) ** 2.19921875 @ to_xyz.T @ from_xyz.T, 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255


def test_adobe_rgb_is_converted_for_the_networks_and_kept_for_the_paste(tmp_path: Path) -> None:
    path = tmp_path / "adobe.png"
    Image.fromarray(PIXELS).save(path, icc_profile=ADOBE)
    frame = image_file(path).read()
    np.testing.assert_array_equal(frame.pixels, PIXELS)
    np.testing.assert_allclose(frame.rgb8, expected_srgb(PIXELS), atol=2)
    assert abs(frame.rgb8.astype(int) - PIXELS).max() > 8
    muted = (PIXELS.astype(int) // 4 + 96).astype(np.uint8)  # inside of both gamuts
    assert abs(from_srgb(to_srgb(muted, ADOBE), ADOBE).astype(int) - muted).max() <= 2
    assert read_header(str(path)).reading == READING


def test_srgb_and_untagged_pictures_keep_their_bytes(tmp_path: Path) -> None:
    srgb = matrix_profile(SRGB_PRIMARIES, D65, np.where((s := np.linspace(0, 1, 1024)) <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4))
    gamma = add_chunks(encode_png(PIXELS), [(b"gAMA", struct.pack(">I", 45455))])
    for name, options in {"plain": {}, "srgb": {"icc_profile": srgb}, "bogus": {"icc_profile": b"x" * 200}}.items():
        Image.fromarray(PIXELS).save(tmp_path / f"{name}.png", **options)
    (tmp_path / "gamma.png").write_bytes(gamma)
    for path in sorted(tmp_path.iterdir()):
        frame = image_file(path).read()
        np.testing.assert_array_equal(frame.rgb8, PIXELS, err_msg=path.name)
        assert frame.profile is None and read_header(str(path)).reading == ""


def test_png_says_its_colours_by_cicp_or_gamma(tmp_path: Path) -> None:
    p3 = tmp_path / "p3.png"
    p3.write_bytes(add_chunks(encode_png(PIXELS), [(b"cICP", bytes((12, 13, 0, 1)))]))
    profile = cicp_profile(bytes((12, 13, 0, 1)))
    assert profile is not None
    np.testing.assert_array_equal(image_file(p3).read().rgb8, to_srgb(PIXELS, profile))
    linear = tmp_path / "linear.png"
    linear.write_bytes(add_chunks(encode_png(np.full((4, 4, 3), 55, np.uint8)), [(b"gAMA", struct.pack(">I", 100_000))]))
    np.testing.assert_allclose(image_file(linear).read().rgb8, 128, atol=2)
    pq = tmp_path / "pq.png"
    pq.write_bytes(add_chunks(encode_png(PIXELS), [(b"cICP", bytes((9, 16, 0, 1)))]))
    with pytest.raises(ItemError, match=r"HDR \(PQ or HLG\).*convert"):
        read_header(str(pq))


def test_a_paste_into_other_colours_looks_as_in_srgb(tmp_path: Path) -> None:
    path = tmp_path / "adobe.png"
    Image.fromarray(PIXELS).save(path, icc_profile=ADOBE)
    face, mask = np.full((8, 8, 3), (200, 120, 90), np.uint8), np.full((8, 8), 255, np.uint8)
    place = np.array(((1, 0, 4), (0, 1, 4), (0, 0, 1)), np.float64)
    inputs = {"image": image_file(path), "face": face, "mask": mask, "crop_to_frame": place}
    [outputs] = STAGE.run(None, PasteConfig(dilate=0.0, feather=0.0), [inputs])
    assert not isinstance(outputs, ItemError)
    result = outputs["result"]
    np.testing.assert_allclose(to_srgb(result, ADOBE)[7, 7], (200, 120, 90), atol=2)
    result[4:12, 4:12] = PIXELS[4:12, 4:12]
    np.testing.assert_array_equal(result, PIXELS)


def jpeg(path: Path) -> ImageFile:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Artist] = "A. Person"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2026:11:28 01:00:00"
    Image.fromarray(PIXELS).save(path, icc_profile=ADOBE, exif=exif, dpi=(300, 300))
    return image_file(path)


def test_a_result_says_what_its_target_says(tmp_path: Path) -> None:
    properties = read_properties(jpeg(tmp_path / "target.jpg"))
    bare = encode_png(PIXELS)
    png = with_properties(bare, properties)
    assert png == with_properties(bare, properties) and without_chunks(png, ADDED_CHUNKS) == bare
    with Image.open(io.BytesIO(png)) as image:
        np.testing.assert_array_equal(np.asarray(image), PIXELS)
        assert image.info["icc_profile"] == ADOBE and round(image.info["dpi"][0]) == 300
        exif = image.getexif()
        assert ExifTags.Base.Orientation not in exif and exif[ExifTags.Base.Artist] == "A. Person"
        assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] == "2026:11:28 01:00:00"
    assert properties.lost == ()
    Image.fromarray(PIXELS).save(tmp_path / "plain.png")
    assert with_properties(bare, read_properties(image_file(tmp_path / "plain.png"))) == bare


def test_a_result_becomes_jpeg_or_webp(tmp_path: Path) -> None:
    png = with_properties(encode_png(PIXELS), read_properties(jpeg(tmp_path / "target.jpg")))
    for suffix, error in ((".jpg", 12), (".webp", 0)):
        data, lost = convert_result(png, suffix)
        assert lost == [] and data == convert_result(png, suffix)[0]
        with Image.open(io.BytesIO(data)) as image:
            assert image.info["icc_profile"] == ADOBE and image.getexif()[ExifTags.Base.Artist] == "A. Person"
            assert abs(np.asarray(image).astype(int) - PIXELS).mean() <= error
    deep = np.dstack((PIXELS, PIXELS[..., :1])).astype(np.uint16) * 257
    _, lost = convert_result(encode_png(deep), ".jpg")
    assert len(lost) == 2 and "16 bits" in lost[0] and "transparency" in lost[1]
    _, lost = convert_result(encode_png(deep), ".webp")
    assert len(lost) == 1


def planar_tiff16(pixels: np.ndarray) -> bytes:
    """A deflated TIFF by hand whose channels lie in planes, as tifffile writes it."""
    height, width, channels = pixels.shape
    strips = [zlib.compress(pixels[..., channel].astype("<u2").tobytes()) for channel in range(channels)]
    tags = [(256, 3, [width]), (257, 3, [height]), (258, 3, [16] * channels), (259, 3, [8]), (262, 3, [2])]
    tags += [(273, 4, [0] * channels), (277, 3, [channels]), (278, 3, [height]), (279, 4, [len(s) for s in strips]), (284, 3, [2])]
    extra_at = 8 + 2 + 12 * len(tags) + 4
    sizes = {3: 2, 4: 4}
    first = extra_at + sum(len(v) * sizes[k] for _, k, v in tags if len(v) * sizes[k] > 4)
    at, body, extra = first, b"", b""
    offsets = []
    for strip in strips:
        offsets.append(at)
        at += len(strip)
    for tag, kind, values in tags:
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *(offsets if tag == 273 else values))
        inline = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", extra_at + len(extra))
        extra += packed if len(packed) > 4 else b""
        body += struct.pack("<HHI", tag, kind, len(values)) + inline
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + extra + b"".join(strips)


def test_16_bit_tiff_in_planes_is_read_right(tmp_path: Path) -> None:
    """OpenCV mixes the planes, without an error."""
    deep = np.random.default_rng(3).integers(0, 65536, (24, 32, 3), dtype=np.uint16)
    path = tmp_path / "planes.tif"
    path.write_bytes(planar_tiff16(deep))
    np.testing.assert_array_equal(image_file(path).read().pixels, deep)
    assert read_header(str(path)).reading == READING


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_said_to_be_a_video(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"moving.{kind.lower()}"
    Image.new("RGB", (16, 16)).save(path, kind, save_all=True, append_images=[Image.new("RGB", (16, 16), "white")])
    with pytest.raises(ItemError, match=r"is an animated .*which is a video.*e4s videos"):
        read_header(str(path))
