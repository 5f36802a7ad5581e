from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from e4s_models.dlib_face import Detection, FaceDetector, merge_faces, sort_faces
from e4s_models.warp import ffhq_crop_to_frame, resample, scale_of, transform_points
from tasks.align import STAGE, AlignConfig
from tasks.frame import ImageFile, hash_file
from tasks.stage import ItemError

BACKDROP = np.linspace(60, 190, 1400).astype(np.uint8)[None, :, None].repeat(900, 0).repeat(3, 2)  # (900, 1400, 3), a ramp


@pytest.fixture(scope="module")
def detector() -> Any:
    return STAGE.load(AlignConfig(), "cpu")


@pytest.fixture
def align(detector: Any, tmp_path: Path) -> Any:
    """Align what is given as pixels or as a path; an ItemError is raised."""

    def run(picture: np.ndarray | Path, face_index: int = 0, **config: int) -> dict[str, np.ndarray]:
        if isinstance(picture, np.ndarray):
            path = tmp_path / "frame.png"
            Image.fromarray(picture).save(path)
        else:
            path = picture
        file = ImageFile(str(path), hash_file(str(path)))
        [result] = STAGE.run(detector, AlignConfig(**config), [{"image": file, "face_index": face_index}])
        if isinstance(result, ItemError):
            raise result
        return result

    return run


def read(path: Path, side: int = 1024) -> np.ndarray:
    pixels = np.array(Image.open(path).convert("RGB"))
    return pixels if side == 1024 else cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA)


def turn(picture: np.ndarray, degrees: float, scale: float, side: int) -> np.ndarray:
    """The picture turned counter-clockwise and shrunk, in the middle of a gray square."""
    height, width = picture.shape[:2]
    matrix = np.eye(3)
    matrix[:2] = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, scale)
    matrix[:2, 2] += (side - width) / 2, (side - height) / 2
    inverse = np.linalg.inv(matrix)
    cover = resample(np.ones(picture.shape[:2], np.float32), inverse, side, side, "zero")[..., None]
    return np.clip(128 * (1 - cover) + resample(picture, inverse, side, side, "zero") * cover, 0, 255).astype(np.uint8)


def place(parts: list[tuple[np.ndarray, int, int]]) -> np.ndarray:
    frame = BACKDROP.copy()
    for part, top, left in parts:
        frame[top : top + part.shape[0], left : left + part.shape[1]] = part
    return frame


def square_landmarks() -> np.ndarray:
    """68 points of which only eyes (36..47) and mouth corners (48, 54) count: eyes 200 px apart, mouth 200 px below."""
    points = np.zeros((68, 2), np.float32)
    points[36:42], points[42:48] = (400, 400), (600, 400)
    points[48], points[54] = (450, 600), (550, 600)
    return points


def test_ffhq_square_by_hand() -> None:
    # x = (200, 0) + (200, 0), scaled to max(200 * 2, 200 * 1.8) = 400; centre (500, 400 + 20): from (100, 20) to (900, 820)
    crop_to_frame = ffhq_crop_to_frame(square_landmarks(), 400)
    corners = transform_points(crop_to_frame, [(-0.5, -0.5), (399.5, -0.5), (399.5, 399.5), (-0.5, 399.5)])
    np.testing.assert_allclose(corners, [(100, 20), (900, 20), (900, 820), (100, 820)])
    assert crop_to_frame.dtype == np.float64 and scale_of(crop_to_frame) == pytest.approx(2)
    np.testing.assert_allclose(transform_points(crop_to_frame, [(0, 0)]), [(101, 21)])  # the first pixel covers 100 to 102, 20 to 22


def test_ffhq_square_turns_with_the_face() -> None:
    upright, quarter = square_landmarks(), np.array(((0.0, -1.0), (1.0, 0.0)))
    matrix = ffhq_crop_to_frame(upright @ quarter.T.astype(np.float32), 256)
    np.testing.assert_allclose(matrix[:2], quarter @ ffhq_crop_to_frame(upright, 256)[:2], atol=1e-9)
    with pytest.raises(ValueError, match="68"):
        ffhq_crop_to_frame(upright[:5], 256)


def test_resample_identity_shift_and_mirror() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4) * 10
    np.testing.assert_array_equal(resample(pixels, np.eye(3), 3, 4), pixels)
    shift = np.eye(3)
    shift[:2, 2] = -5, 1  # 5 px past the left edge: mirrored, and mirrored again
    np.testing.assert_array_equal(resample(pixels, shift, 1, 9)[0], pixels[1][[1, 2, 3, 2, 1, 0, 1, 2, 3]])
    np.testing.assert_array_equal(resample(pixels, shift, 1, 9, "zero")[0], [0, 0, 0, 0, 0, 40, 50, 60, 70])


@pytest.mark.parametrize("factor", [1.5, 2.0, 3.7, 8.0])
def test_resample_keeps_pixel_centres_when_it_shrinks(factor: float) -> None:
    ramp = np.tile(np.arange(256, dtype=np.float32), (256, 1))
    to_source = np.diag((factor, factor, 1.0))
    to_source[:2, 2] = (factor - 1) / 2
    size = int(200 / factor)
    got = resample(ramp, to_source, size, size)
    np.testing.assert_allclose(
        got[4, 4:], np.arange(4, size) * factor + (factor - 1) / 2, atol=factor / 32
    )  # OpenCV interpolates in steps of 1/32 px


def test_resample_does_not_alias() -> None:
    checkers = (np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)
    for factor in (2.3, 4.0, 5.9):
        got = resample(checkers, np.diag((factor, factor, 1.0)), 60, 60)
        assert abs(got.astype(float) - 127.5).max() < 12, factor


def test_writes_what_it_declares(align: Any, people: list[Path]) -> None:
    result = align(people[0], side=256)
    assert set(result) == set(STAGE.writes)
    assert result["face"].shape == (256, 256, 3) and result["face"].dtype == np.uint8
    assert result["crop_to_frame"].shape == (3, 3) and result["crop_to_frame"].dtype == np.float64
    assert result["landmarks"].shape == (68, 2) and result["landmarks"].dtype == np.float32
    again = align(people[0], side=256)
    assert all(np.array_equal(result[name], again[name]) for name in result)


def test_people_are_already_aligned(align: Any, people: list[Path]) -> None:
    """The generator was trained on FFHQ crops: the crop of its picture is nearly the picture."""
    for path in people:
        result = align(path)
        corners = np.array([(0, 0), (1023, 0), (1023, 1023), (0, 1023)])
        assert abs(transform_points(result["crop_to_frame"], corners) - corners).mean() < 40, path
        left_eye, right_eye = result["landmarks"][36:42].mean(axis=0), result["landmarks"][42:48].mean(axis=0)
        assert abs(left_eye - (390, 490)).max() < 45 and abs(right_eye - (634, 490)).max() < 45, path


@pytest.mark.parametrize(
    ("degrees", "scale", "side"),
    [(0, 0.4, 600), (20, 0.8, 1100), (30, 0.5, 800), (90, 0.6, 700), (-90, 0.5, 640), (180, 0.5, 640), (60, 0.6, 900)],
)
def test_crop_hardly_depends_on_turn_and_size(align: Any, people: list[Path], degrees: float, scale: float, side: int) -> None:
    want = align(people[1])
    got = align(turn(read(people[1]), degrees, scale, side))
    assert abs(got["landmarks"] - want["landmarks"]).mean() < 4  # px of 1024
    inner = np.s_[300:900, 250:780]
    assert abs(got["face"][inner].astype(float) - want["face"][inner]).mean() < 12
    assert scale_of(got["crop_to_frame"]) == pytest.approx(scale * scale_of(want["crop_to_frame"]), rel=0.02)


def test_landmarks_lie_in_the_frame_where_the_matrix_says(align: Any, people: list[Path]) -> None:
    frame = place([(read(people[2], 400), 300, 700)])
    result = align(frame)
    at = transform_points(result["crop_to_frame"], result["landmarks"])
    assert (at >= (700, 300)).all() and (at <= (1100, 700)).all()
    again = resample(frame, result["crop_to_frame"], 1024, 1024)
    np.testing.assert_array_equal(again, result["face"])


def test_faces_are_counted_from_the_largest(align: Any, people: list[Path]) -> None:
    frame = place([(read(people[0], 200), 20, 20), (read(people[1], 600), 200, 300), (read(people[2], 400), 450, 950)])
    scales = [scale_of(align(frame, face_index)["crop_to_frame"]) for face_index in range(3)]
    np.testing.assert_allclose(np.array(scales) * 1024, (600, 400, 200), rtol=0.1)
    with pytest.raises(ItemError, match=r"face 3 was asked for but 3 faces were found: choose --face 0 to 2"):
        align(frame, 3)


def test_face_index_beyond_the_only_face(align: Any, people: list[Path]) -> None:
    with pytest.raises(ItemError, match=r"face 1 was asked for but 1 face was found: choose --face 0"):
        align(read(people[0], 512), 1)
    with pytest.raises(ItemError, match="counted from 0"):
        align(read(people[0], 512), -1)


def find(left: float, top: float, side: float, score: float) -> Detection:
    return Detection((left, top, left + side, top + side), score, np.full((68, 2), (left + side / 2, top + side / 2), np.float32))


def test_order_of_faces() -> None:
    doubtful, right, left, lower, large = (
        find(0, 0, 900, 0.2),
        find(500, 0, 50, 1),
        find(100, 9, 50.4, 1),
        find(100, 300, 49.6, 1),
        find(0, 0, 60, 0.6),
    )
    assert sort_faces([doubtful, right, lower, left, large]) == [large, left, lower, right, doubtful]


def test_finds_on_the_same_face_are_one() -> None:
    clear, weaker, beside = find(100, 100, 90, 2.0), find(110, 90, 108, 1.0), find(150, 100, 90, 0.7)
    assert merge_faces([weaker, beside, clear]) == [clear, beside]  # centres 19 px, then 50 px apart; a third is 36, then 30


@pytest.mark.parametrize("size", [(1, 1), (2, 700), (64, 3)])
def test_a_picture_too_small_for_a_face(align: Any, size: tuple[int, int]) -> None:
    with pytest.raises(ItemError, match="no face found"):
        align(np.full((*size, 3), 90, np.uint8))


def test_a_strip_takes_no_more_memory_than_other_pictures() -> None:
    """Turned by 45 degrees, 30000 x 1 px lie on a canvas of 21000 x 21000."""
    sizes: list[int] = []

    def no_faces(picture: Any, *arguments: object) -> tuple[list[Any], list[float], list[int]]:
        sizes.append(picture.shape[0] * picture.shape[1])
        return [], [], []

    detector = FaceDetector(SimpleNamespace(run=no_faces), None)
    for height, width in ((1, 4000), (4000, 1), (2000, 2000)):
        sizes.clear()
        assert detector.detect(np.zeros((height, width, 3), np.uint8)) == []
        assert max(sizes) <= 16_000_000
        assert max(sizes[-7:]) <= 4_810_000  # the finest turned copies
    assert np.isclose(max(sizes[-7:]), 2 * 1_200_000, rtol=0.01)  # of a square nothing is lost


def test_tiny_face(align: Any, people: list[Path]) -> None:
    frame = place([(read(people[0], 100), 300, 600)])  # the face itself has about 60 px
    crop_to_frame = align(frame)["crop_to_frame"]
    assert scale_of(crop_to_frame) * 1024 == pytest.approx(100, rel=0.12)
    np.testing.assert_allclose(transform_points(crop_to_frame, [(511.5, 511.5)]), [(649.5, 349.5)], atol=6)
    with pytest.raises(ItemError, match=r"face 0 is \d\d px wide but 80 px are needed: .*min_face"):
        align(frame, min_face=80)


def test_face_at_the_edge_is_mirrored(align: Any, people: list[Path]) -> None:
    whole = read(people[0])
    result = align(whole[220:])
    assert scale_of(result["crop_to_frame"]) == pytest.approx(1, rel=0.08)
    top = round(-transform_points(result["crop_to_frame"], [(511.5, 0)])[0, 1])  # px of the crop above the frame
    assert 150 < top < 300
    face = result["face"].astype(float)
    above, below = face[top - 60 : top, 300:700], face[top : top + 60, 300:700][::-1]
    assert abs(above - below).mean() < 0.5 * abs(above - below[::-1]).mean()


@pytest.mark.parametrize("mode", ["gray", "16 bit", "alpha", "palette", "cmyk", "turned by EXIF"])
def test_the_same_face_from_any_kind_of_file(align: Any, people: list[Path], tmp_path: Path, mode: str) -> None:
    rgb = read(people[3], 512)
    picture, path, exif = Image.fromarray(rgb), tmp_path / "odd.png", Image.Exif()
    if mode == "gray":
        picture.convert("L").save(path)
    elif mode == "16 bit":
        cv2.imwrite(str(path), rgb[..., ::-1].astype(np.uint16) * 257)
    elif mode == "alpha":
        picture.putalpha(200)
        picture.save(path)
    elif mode == "palette":
        picture.quantize(256).save(path)
    elif mode == "cmyk":
        path = tmp_path / "odd.jpg"
        picture.convert("CMYK").save(path, quality=95)
    else:
        exif[0x112] = 6
        picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    want, got = align(rgb), align(path)
    assert abs(got["landmarks"] - want["landmarks"]).mean() < 5
    np.testing.assert_allclose(got["crop_to_frame"][:2, :2], want["crop_to_frame"][:2, :2], atol=0.02)


@pytest.mark.parametrize("kind", ["noise", "landscape"])
def test_no_face(align: Any, kind: str) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8) if kind == "noise" else BACKDROP[:300, :400]
    with pytest.raises(ItemError, match=r"no face found: give a picture"):
        align(frame)


def test_a_bad_item_leaves_its_neighbours_alone(detector: Any, people: list[Path], tmp_path: Path) -> None:
    Image.fromarray(BACKDROP[:300, :400]).save(tmp_path / "none.png")
    files = [ImageFile(str(path), hash_file(str(path))) for path in (tmp_path / "none.png", people[0])]
    bad, good = STAGE.run(detector, AlignConfig(side=128), [{"image": file, "face_index": 0} for file in files])
    assert isinstance(bad, ItemError) and not isinstance(good, ItemError)


def test_config_is_checked() -> None:
    with pytest.raises(ValueError, match="at least 64 px, got 10"):
        AlignConfig(side=10)
    with pytest.raises(ValueError, match="min_face"):
        AlignConfig(min_face=0)
