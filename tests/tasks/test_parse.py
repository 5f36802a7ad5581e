from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from e4s_models.regions import BISENET19_TO_REGIONS, Region
from tasks.parse import STAGE, ParseConfig
from tasks.stage import Outputs, UInt8


def read(path: Path, side: int) -> UInt8:
    image = np.asarray(cv2.imread(str(path)))[..., ::-1]
    return np.asarray(cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA), np.uint8)


def parse(faces: list[UInt8], config: ParseConfig) -> list[Outputs]:
    results = STAGE.run(STAGE.load(config, "cpu"), config, [{"face": face} for face in faces])
    return [result for result in results if isinstance(result, dict)]


@pytest.mark.parametrize("side", [256, 512])
def test_a_face_is_where_a_face_is(people: list[Path], side: int) -> None:
    (parsed,) = parse([read(people[0], 512)], ParseConfig(side=side))
    regions = parsed["regions"]
    assert regions.shape == (512, 512) and regions.dtype == np.uint8
    assert regions[290, 256] in (Region.NOSE, Region.SKIN)
    rows = {region: np.nonzero(regions == region)[0].mean() for region in (Region.BROWS, Region.EYES, Region.NOSE, Region.LIPS)}
    assert rows[Region.EYES] < rows[Region.NOSE] < rows[Region.LIPS]
    assert 0.1 < np.isin(regions, (Region.SKIN, Region.NOSE)).mean() < 0.5
    assert np.array_equal(regions, BISENET19_TO_REGIONS[parsed["labels19"]])


def test_labels_have_the_faces_own_size_and_do_not_depend_on_the_batch(people: list[Path]) -> None:
    large, small = read(people[0], 320), read(people[1], 256)
    config = ParseConfig(side=256)
    together, alone = parse([large, small], config), parse([large], config) + parse([small], config)
    assert [result["regions"].shape for result in together] == [(320, 320), (256, 256)]
    for one, other in zip(together, alone, strict=True):
        assert (one["labels19"] == other["labels19"]).mean() > 0.999
    assert np.array_equal(parse([large], config)[0]["labels19"], alone[0]["labels19"])


def test_config_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="multiple of 32 and at least 64, got 100"):
        ParseConfig(side=100)


def test_stage_names_its_weights() -> None:
    assert STAGE.weights(ParseConfig()) == ("face_parser",)
