"""The face of a result is the one where the target's is; none there is a failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from storage.codec import encode_png
from tasks import align, align_near
from tasks.align_near import AlignNearConfig
from tasks.frame import ImageFile, hash_file
from tasks.stage import ItemError


@pytest.fixture(scope="module")
def detector() -> Any:
    return align_near.STAGE.load(AlignNearConfig(), "cpu")


@pytest.fixture(scope="module")
def group(people: list[Path]) -> np.ndarray:
    """Two people side by side, (512, 1024, 3), the left one larger."""
    left, right = (cv2.imread(str(path))[..., ::-1] for path in people[:2])
    return np.hstack([cv2.resize(left, (512, 512)), np.pad(cv2.resize(right, (400, 400)), ((56, 56), (56, 56), (0, 0)), "edge")])


def picture(folder: Path, pixels: np.ndarray) -> ImageFile:
    path = folder / "picture.png"
    path.write_bytes(encode_png(np.ascontiguousarray(pixels)))
    return ImageFile(str(path), hash_file(str(path)))


def aligned(detector: Any, file: ImageFile, index: int) -> dict[str, np.ndarray]:
    [target] = align.STAGE.run(detector, align.AlignConfig(side=256), [{"image": file, "face_index": index}])
    assert not isinstance(target, ItemError)
    return target


def near(detector: Any, file: ImageFile, target: dict[str, np.ndarray]) -> dict[str, np.ndarray] | ItemError:
    inputs = {"image": file, "crop_to_frame": target["crop_to_frame"], "landmarks": target["landmarks"]}
    [found] = align_near.STAGE.run(detector, AlignNearConfig(side=256), [inputs])
    return found


def test_of_several_faces_the_targets_counts(detector: Any, group: np.ndarray, tmp_path: Path) -> None:
    file = picture(tmp_path, group)
    for index in (0, 1):
        target = aligned(detector, file, index)
        found = near(detector, file, target)
        assert not isinstance(found, ItemError)
        if index == 0:  # the same search: the same crop, bit for bit
            np.testing.assert_array_equal(found["face"], target["face"])
            np.testing.assert_array_equal(found["landmarks"], target["landmarks"])
        assert np.abs(found["landmarks"] - target["landmarks"]).max() < 2  # px of 256
        assert np.abs(found["face"].astype(int) - target["face"]).mean() < 4


def test_another_face_elsewhere_does_not_stand_in(detector: Any, group: np.ndarray, tmp_path: Path) -> None:
    targets = [aligned(detector, picture(tmp_path, group), index) for index in (0, 1)]
    blank = group.copy()
    blank[:, 512:] = 128
    file = picture(tmp_path, blank)
    assert isinstance(near(detector, file, targets[0]), dict)
    found = near(detector, file, targets[1])
    assert isinstance(found, ItemError)
    assert str(found) == "no face found in the output where the target's face is"
    nobody = near(detector, picture(tmp_path, np.full((512, 1024, 3), 128, np.uint8)), targets[0])
    assert isinstance(nobody, ItemError)


@pytest.mark.parametrize(("settings", "part"), [({"side": 8}, "at least 64"), ({"reach": 0.0}, "from 0 to 1")])
def test_settings_are_checked(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        AlignNearConfig(**settings)
