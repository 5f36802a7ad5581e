from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from e4s_models.warp import resample, transform_points
from tasks import align
from tasks.frame import ImageFile, hash_file
from tasks.paste import STAGE, PasteConfig, feather, paste
from tasks.stage import ItemError, Outputs

HARD = PasteConfig(dilate=0.0, feather=0.0)
RANDOM = np.random.default_rng(0)


def image_file(path: Path) -> ImageFile:
    return ImageFile(str(path), hash_file(str(path)))


def run(path: Path, face: np.ndarray, mask: np.ndarray, crop_to_frame: np.ndarray, config: PasteConfig = PasteConfig()) -> np.ndarray:  # noqa: B008
    inputs = {"image": image_file(path), "face": face, "mask": mask, "crop_to_frame": crop_to_frame}
    [outputs] = STAGE.run(None, config, [inputs])
    assert not isinstance(outputs, ItemError)
    return outputs["result"]


def place(scale: float, degrees: float, x: float, y: float) -> np.ndarray:
    """crop_to_frame that puts the crop's first pixel at (x, y)."""
    cosine, sine = scale * np.cos(np.radians(degrees)), scale * np.sin(np.radians(degrees))
    return np.array(((cosine, -sine, x), (sine, cosine, y), (0, 0, 1)), np.float64)


def disc(side: int, radius: float) -> np.ndarray:
    y, x = np.indices((side, side)) - (side - 1) / 2
    return np.where(np.hypot(x, y) <= radius, 255, 0).astype(np.uint8)


def covered(config: PasteConfig, mask: np.ndarray, crop_to_frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels of the frame that the grown mask may reach, by its distance in the crop (independent of the stage's own warp)."""
    y, x = np.indices((height, width))
    at = transform_points(np.linalg.inv(crop_to_frame), np.stack((x.ravel(), y.ravel()), axis=1))
    masked = np.argwhere(mask >= 128)[:, ::-1]
    edge = masked[(cv2.erode(mask, np.ones((3, 3))) < 128)[masked[:, 1], masked[:, 0]]] if mask.any() else masked
    distance = np.sqrt(((at[:, None] - edge[None]) ** 2).sum(axis=2).min(axis=1)).reshape(height, width)
    inside = resample(mask, np.linalg.inv(crop_to_frame), height, width, "zero") > 127
    return inside | (distance <= config.dilate * mask.shape[0] + 1)


def test_hard_mask_by_hand() -> None:
    frame, face = RANDOM.integers(0, 256, (9, 12, 3), dtype=np.uint8), RANDOM.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    mask = np.zeros((4, 4), np.uint8)
    mask[1:3, 1:4] = 255
    mask[0, 0] = 127  # below the threshold
    want = frame.copy()
    want[6:8, 4:7] = face[1:3, 1:4]
    np.testing.assert_array_equal(paste(frame, face, feather(mask, HARD), place(1, 0, 3, 5)), want)


def test_quarter_turn_by_hand() -> None:
    frame, face = np.zeros((6, 6, 3), np.uint8), np.arange(12, dtype=np.uint8).reshape(2, 2, 3) + 1
    got = paste(frame, face, np.ones((2, 2), np.float32), place(1, 90, 4, 1))  # x of the crop runs downwards, y to the left
    want = frame.copy()
    want[1, 4], want[2, 4], want[1, 3], want[2, 3] = face[0, 0], face[0, 1], face[1, 0], face[1, 1]
    np.testing.assert_array_equal(got, want)


def test_half_weight_in_both_depths() -> None:
    face, weights = np.full((4, 4, 3), 255, np.uint8), np.full((4, 4), 0.5, np.float32)
    got = paste(np.full((4, 4, 3), 101, np.uint8), face, weights, np.eye(3))
    np.testing.assert_array_equal(got, 178)  # 101 + 154 / 2
    got = paste(np.full((4, 4, 3), 35, np.uint16), face, weights, np.eye(3))
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, 32785)  # 35 + 65500 / 2


def test_feather_grows_and_ramps_inwards() -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[:, 40:60] = 255
    weights = feather(mask, PasteConfig(dilate=0.05, feather=0.08))
    row = weights[50]
    assert row.dtype == np.float32 and (row[:35] == 0).all() and (row[35:65] > 0).all() and (row[65:] == 0).all()
    assert (row[44:56] == 1).all() and (np.diff(row[34:44]) > 0).all()
    assert row[38] == pytest.approx(0.4067, abs=0.001)  # 3.5 of 8 px: smoothstep(0.4375)
    np.testing.assert_array_equal(row, row[::-1])
    assert (np.diff(weights[:9, 50]) > 0).all() and weights[0, 50] < 0.02  # down to the crop's own edge
    assert not feather(np.zeros((8, 8), np.uint8), PasteConfig()).any()


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize(("scale", "degrees"), [(0.3, 0), (0.31, 33), (1.0, 90), (1.7, -20), (0.8, 180)])
def test_outside_the_mask_every_bit_stays(depth: type, scale: float, degrees: float) -> None:
    frame = RANDOM.integers(0, np.iinfo(depth).max + 1, (120, 150, 3)).astype(depth)
    face, mask, config = np.full((64, 64, 3), 200, np.uint8), disc(64, 14), PasteConfig(dilate=0.05, feather=0.1)
    crop_to_frame = place(scale, degrees, 0, 0)
    crop_to_frame[:2, 2] = (70, 60) - transform_points(crop_to_frame, [(31.5, 31.5)])[0]
    got = paste(frame, face, feather(mask, config), crop_to_frame)
    reached = covered(config, mask, crop_to_frame, 120, 150)
    assert got.dtype == depth and 0.001 < reached.mean() < 0.5
    np.testing.assert_array_equal(got[~reached], frame[~reached])
    white = np.iinfo(depth).max // 255
    np.testing.assert_array_equal(got[60, 70], 200 * white)
    assert (got != frame).any(axis=2).sum() > np.pi * (14 * scale) ** 2 * 0.9


def test_crop_larger_than_its_place_does_not_alias() -> None:
    checkers = (np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, axis=2)
    got = paste(np.zeros((160, 160, 3), np.uint8), checkers, np.ones((512, 512), np.float32), place(0.23, 10, 30, 10))
    assert abs(got[40:100, 50:100].astype(float) - 127.5).max() < 12


def test_crop_partly_or_wholly_outside_the_frame() -> None:
    frame, face = RANDOM.integers(0, 256, (20, 20, 3), dtype=np.uint8), np.full((16, 16, 3), 7, np.uint8)
    got = paste(frame, face, np.ones((16, 16), np.float32), place(1, 0, -8, 12))
    np.testing.assert_array_equal(got[12:, :8], 7)
    np.testing.assert_array_equal(got[:12], frame[:12])
    for x, y in ((30, 0), (0, -40)):
        np.testing.assert_array_equal(paste(frame, face, np.ones((16, 16), np.float32), place(1, 0, x, y)), frame)


def test_nothing_masked_gives_the_frame_back(tmp_path: Path) -> None:
    pixels = RANDOM.integers(0, 256, (30, 20, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "frame.png")
    got = run(tmp_path / "frame.png", np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8), place(1, 0, 2, 2))
    np.testing.assert_array_equal(got, pixels)


def test_alpha_depth_and_gray_of_the_frame(tmp_path: Path) -> None:
    face, mask, crop_to_frame = np.full((16, 16, 3), 255, np.uint8), disc(16, 5), place(1, 0, 2, 12)
    rgba16 = RANDOM.integers(0, 65536, (32, 20, 4), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "rgba16.png"), cv2.cvtColor(rgba16, cv2.COLOR_RGBA2BGRA))
    got = run(tmp_path / "rgba16.png", face, mask, crop_to_frame)
    assert got.dtype == np.uint16 and got.shape == (32, 20, 4)
    np.testing.assert_array_equal(got[..., 3], rgba16[..., 3])
    np.testing.assert_array_equal(got[:12], rgba16[:12])
    np.testing.assert_array_equal(got[20, 10, :3], 65535)
    gray = RANDOM.integers(0, 256, (32, 20), dtype=np.uint8)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    got = run(tmp_path / "gray.png", face, mask, crop_to_frame)
    assert got.shape == (32, 20, 3)
    np.testing.assert_array_equal(got[:12], gray[:12, :, None].repeat(3, axis=2))


@pytest.fixture(scope="module")
def detector() -> Any:
    return align.STAGE.load(align.AlignConfig(), "cpu")


def _align(detector: Any, path: Path) -> Outputs:
    [aligned] = align.STAGE.run(detector, align.AlignConfig(), [{"image": image_file(path), "face_index": 0}])
    assert not isinstance(aligned, ItemError), aligned
    return aligned


def _turned(path: Path, folder: Path, degrees: float, scale: float) -> Path:
    picture = np.array(Image.open(path).convert("RGB"))
    matrix = cv2.getRotationMatrix2D((511.5, 511.5), degrees, scale)
    turned = cv2.warpAffine(picture, matrix, (1024, 1024), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT_101)
    turned = cv2.GaussianBlur(turned, (0, 0), 0.7)  # what a lens would leave
    Image.fromarray(turned).save(folder / "turned.png")
    return folder / "turned.png"


@pytest.mark.parametrize(("degrees", "scale"), [(0, 1.0), (25, 0.7), (-90, 0.6)])
def test_aligned_crop_pasted_back_is_nearly_the_frame(
    detector: Any, people: list[Path], tmp_path: Path, degrees: float, scale: float
) -> None:
    path = _turned(people[0], tmp_path, degrees, scale)
    frame = np.array(Image.open(path)).astype(int)
    aligned = _align(detector, path)
    mask = disc(1024, 300)
    got = run(path, aligned["face"], mask, aligned["crop_to_frame"]).astype(int)
    inside = resample(mask, np.linalg.inv(aligned["crop_to_frame"]), 1024, 1024, "zero") > 127
    assert inside.mean() > 0.05
    assert abs(got - frame)[inside].mean() < 1.0 and abs(got - frame).max() < 40
    assert abs((got - frame)[inside].mean()) < 0.2  # no shift in brightness
    np.testing.assert_array_equal(got, run(path, aligned["face"], mask, aligned["crop_to_frame"]))


def test_no_seam_where_the_colour_differs(detector: Any, people: list[Path], tmp_path: Path) -> None:
    path = _turned(people[1], tmp_path, 20, 0.7)
    frame = np.array(Image.open(path)).astype(int)
    aligned = _align(detector, path)
    brighter = np.clip(aligned["face"].astype(int) + 24, 0, 255).astype(np.uint8)
    step = run(path, brighter, disc(1024, 300), aligned["crop_to_frame"]).astype(int) - frame
    added = cv2.GaussianBlur(step.astype(np.float32).mean(axis=2), (0, 0), 2)  # evens out what resampling left
    assert added.max() > 18
    assert max(abs(np.diff(added, axis=0)).max(), abs(np.diff(added, axis=1)).max()) < 6  # a hard edge would make 10 of 24


def test_what_does_not_fit_is_refused() -> None:
    frame, face, weights = np.zeros((8, 8, 3), np.uint8), np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), np.float32)
    with pytest.raises(ValueError, match=r"expected shape \(4, 4\), got \(5, 5\)"):
        paste(frame, face, np.ones((5, 5), np.float32), np.eye(3))
    for matrix in (np.diag((1.0, -1.0, 1.0)), np.full((3, 3), np.nan)):
        with pytest.raises(ValueError, match="crop_to_frame must be"):
            paste(frame, face, weights, matrix)
    with pytest.raises(ValueError, match=r"fractions .* got 0.008 and 2"):
        PasteConfig(feather=2.0)


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_a_gray_frame_stays_gray(tmp_path: Path, depth: type) -> None:
    frame = RANDOM.integers(0, np.iinfo(depth).max, (60, 60)).astype(depth)
    path = tmp_path / "gray.png"
    assert cv2.imwrite(str(path), frame)
    face = np.zeros((40, 40, 3), np.uint8)
    face[..., 0] = 200  # red
    result = run(path, face, disc(40, 12), place(1, 0, 10, 10))
    assert result.dtype == depth
    assert (result == result[..., :1]).all()
    red = round(0.299 * 200) * (257 if depth == np.uint16 else 1)
    assert abs(int(result[30, 30, 0]) - red) <= 257
