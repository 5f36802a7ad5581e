"""`e4s models check-reference` on the vectors that lie in tests/data: agrees, and notices when it should not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from e4s_models.published import compare, fill
from flows.cli import main

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("bisenet.json", "bisenet_case0.npz", "mask_swap_case0.npz", "blend_case0.npz"):
        shutil.copy(DATA / name, tmp_path)
    return tmp_path


def change(path: Path, **values: object) -> None:
    with np.load(path) as stored:
        case = dict(stored)
    np.savez(path, **{**case, **values})


def test_our_networks_agree_with_the_published_ones(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "check-reference", str(folder)]) == 0
    assert "6 outputs compared, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bisenet_case0", "mask_swap_case0"])
def test_other_weights_or_outputs_are_noticed(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "bisenet_case0":
        change(folder / f"{name}.npz", weight_seed=np.int64(12345))
    else:
        with np.load(folder / f"{name}.npz") as stored:
            swapped = stored["swapped_label_u8"].copy()
        swapped[0, 0] ^= 1
        change(folder / f"{name}.npz", swapped_label_u8=swapped)
    assert main(["models", "check-reference", str(folder)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_folder_without_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "check-reference", str(tmp_path)]) == 1
    assert main(["models", "check-reference", str(tmp_path / "nowhere")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "no reference vectors here" in lines[0]
    assert "no such folder" in lines[1]


def test_filling_is_by_key_and_seed() -> None:
    entry = {"shape": [2, 3], "dtype": "float32", "kind": "normal", "mean": 1.0, "std": 0.1}
    entries = {
        "a": entry,
        "b": entry,
        "c": {**entry, "kind": "positive"},
        "n": {**entry, "kind": "zero", "dtype": "int64"},
        "k": {**entry, "kind": "keep"},
    }
    state = fill(entries, 7)
    assert state.keys() == {"a", "b", "c", "n"}
    assert not (state["a"] == state["b"]).any()
    assert (state["a"] == fill({"a": entry}, 7)["a"]).all()
    assert (state["c"] >= 0.5).all()
    assert state["n"].dtype.is_floating_point is False


def test_comparison() -> None:
    reference = np.array([1.0, -4.0])
    assert compare("n", "c", "o", reference + 0.0003, reference).passed
    assert not compare("n", "c", "o", reference + 0.0005, reference).passed
    assert not compare("n", "c", "o", reference[:1], reference).passed
    labels = np.zeros(2000, np.uint8)
    assert compare("n", "c", "o", np.where(np.arange(2000) < 2, 1, 0), labels).passed
    assert not compare("n", "c", "o", np.where(np.arange(2000) < 3, 1, 0), labels).passed
