"""Stage `mesh` on synthetic people."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from e4s_models.face_mesh import UInt8
from tasks.mesh import BACKENDS, STAGE, MeshConfig
from tasks.stage import ItemError


def read(path: Path) -> UInt8:
    return np.ascontiguousarray(cv2.imread(str(path))[..., ::-1], np.uint8)


def test_a_bad_crop_is_an_item_error_and_its_neighbours_go_on(people: list[Path]) -> None:
    assert next(iter(BACKENDS.values())) is STAGE
    config = MeshConfig()
    model = STAGE.load(config, "cpu")
    faces = [read(people[0]), np.full((1024, 1024, 3), 90, np.uint8), read(people[1])]
    first, bad, last = STAGE.run(model, config, [{"face": face} for face in faces])
    assert isinstance(bad, ItemError) and "no face in the aligned crop" in str(bad)
    for result in (first, last):
        assert isinstance(result, dict)
        assert {name: (value.shape, value.dtype) for name, value in result.items()} == {
            "points": ((478, 3), np.float32),
            "blendshapes": ((52,), np.float32),
        }
    again = STAGE.run(STAGE.load(config, "cpu"), config, [{"face": faces[2]}])[0]
    assert isinstance(again, dict) and isinstance(last, dict) and isinstance(first, dict)
    for name in STAGE.writes:  # alone, in a batch, in a new process: the same bytes
        np.testing.assert_array_equal(again[name], last[name])
    assert np.abs(first["points"] - last["points"]).mean() > 1


def test_the_presence_asked_for_is_config(people: list[Path]) -> None:
    config = MeshConfig(min_presence=1.1)
    result = STAGE.run(STAGE.load(config, "cpu"), config, [{"face": read(people[0])}])[0]
    assert isinstance(result, ItemError) and "at least 1.1 is asked for" in str(result)
