from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from tasks.enhance import BACKENDS, REALESRGAN, RealESRGANConfig


def test_none_is_the_default_and_passes_the_face_on() -> None:
    assert list(BACKENDS) == ["none", "realesrgan", "gpen", "codeformer"]
    face = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    (result,) = BACKENDS["none"].run(None, BACKENDS["none"].config(), [{"face": face}])
    assert isinstance(result, dict) and np.array_equal(result["enhanced"], face)


def test_realesrgan_keeps_the_face_and_its_size(people: list[Path]) -> None:
    face = cv2.resize(np.asarray(cv2.imread(str(people[0])))[..., ::-1], (160, 128), interpolation=cv2.INTER_AREA)
    config = RealESRGANConfig(side=40)
    network = REALESRGAN.load(config, "cpu")
    first, again = (REALESRGAN.run(network, config, [{"face": face}])[0] for _ in range(2))
    assert isinstance(first, dict) and isinstance(again, dict)
    assert first["enhanced"].shape == (128, 160, 3) and first["enhanced"].dtype == np.uint8
    assert np.array_equal(first["enhanced"], again["enhanced"])
    coarse = [cv2.resize(image, (10, 8), interpolation=cv2.INTER_AREA).astype(int) for image in (face, first["enhanced"])]
    assert np.abs(coarse[0] - coarse[1]).mean() < 6  # the same picture, channels in order
    (none,) = REALESRGAN.run(network, RealESRGANConfig(side=16, amount=0), [{"face": face}])
    assert isinstance(none, dict) and np.array_equal(none["enhanced"], face)


def test_missing_package_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ncnn", None)
    with pytest.raises(RuntimeError, match=r"pip install 'e4s\[realesrgan\]'"):
        REALESRGAN.load(RealESRGANConfig(), "cpu")


def test_config_refuses_senseless_values() -> None:
    with pytest.raises(ValueError, match=r"got 8 and 1\.0"):
        RealESRGANConfig(side=8)
    with pytest.raises(ValueError, match="got 256 and 2"):
        RealESRGANConfig(amount=2)
