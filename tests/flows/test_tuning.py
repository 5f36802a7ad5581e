"""A swap with a tuned generator through the command line."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from flows.cli import main
from storage.run import RunFolder
from storage.store import Store

FAST = ("--profile", "fast", "--stage", "swap=codes", "--device", "cpu")
QUICK = ("--stage", "tune=pti", "--set", "tune.steps=2", "--set", "tune.first_side=128", "--set", "tune.rate=0.01")


def test_a_pair_is_tuned_once_and_looks_different(people: list[Path], tmp_path: Path) -> None:
    run, pictures = tmp_path / "run", []
    for name, settings in (("plain", ()), ("tuned", QUICK), ("again", QUICK)):
        output = tmp_path / f"{name}.png"
        assert main(["swap", str(people[0]), str(people[1]), "-o", str(output), "--run", str(run), *FAST, *settings]) == 0
        pictures.append(cv2.imread(str(output)).astype(int))
    plain, tuned, again = pictures
    assert 0 < np.abs(plain - tuned).mean() < 5
    assert np.array_equal(tuned, again)
    nodes = RunFolder(run).read_settings()["nodes"]
    assert nodes["tune"]["config"]["steps"] == 2
    made = [artifact for artifact in Store(str(run / "store")).all() if artifact.stage == "tune"]
    assert len(made) == 1


def test_a_bad_setting_is_one_sentence(people: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["swap", str(people[0]), str(people[1]), "-o", str(tmp_path / "out.png"), "--stage", "tune=pti", "--set", "tune.steps=0"]
    assert main(arguments) == 1
    assert capsys.readouterr().err.strip() == "e4s: tune: steps must be 1 to 10000, got 0; to tune nothing use --stage tune=none"
