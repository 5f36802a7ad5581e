from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from benchmarks.generator import face_labels
from e4s_models.mobile_stylegan import MobileStyleGAN
from e4s_models.regions import Region
from tasks.stage import ItemError, Outputs
from tasks.swap_codes import STAGE, CodesConfig, exchange_codes, generate, regions_in_picture


@pytest.fixture(scope="module")
def generator() -> Iterator[MobileStyleGAN]:
    yield STAGE.load(CodesConfig(), "cpu")


@pytest.fixture(scope="module")
def inputs(people_folder: Path, people: list[Path]) -> dict[str, Any]:
    """Person 0 into person 1 with a drawn label map."""
    w = np.array(pq.read_table(people_folder / "people.parquet")["w"].to_pylist(), np.float16)
    source, target = (np.broadcast_to(code, (12, 23, 512)) for code in w[:2])
    return {
        "driven_codes": source,
        "target_codes": target,
        "driven_regions": face_labels(),
        "target_regions": face_labels(),
        "target_face": np.asarray(Image.open(people[1])),
        "target_to_canvas": np.eye(3),
    }


def run(generator: MobileStyleGAN, inputs: dict[str, Any], config: CodesConfig | None = None) -> Outputs:
    (result,) = STAGE.run(generator, config or CodesConfig(), [inputs])
    assert not isinstance(result, ItemError), result
    return result


def test_exchange_by_hand() -> None:
    source, target = np.ones((12, 23, 512), np.float16), np.zeros((12, 23, 512), np.float16)
    codes = exchange_codes(source, target, CodesConfig(driven_regions=("eyes", "lips"), target_layers=7))
    expected = np.zeros((12, 23))
    expected[[1, 3], 7:] = 1
    np.testing.assert_array_equal(codes.mean(axis=2), expected)
    assert not target.any()
    with pytest.raises(ValueError, match=r"expected shape \(12, 23, 512\), got \(12, 18, 512\)"):
        exchange_codes(source[:, :18], target, CodesConfig())


def test_own_codes_give_the_target_back(generator: MobileStyleGAN, inputs: dict[str, Any]) -> None:
    """With the target's codes on both sides the stage reproduces its picture, up to the codes' float16."""
    outputs = run(generator, inputs | {"driven_codes": inputs["target_codes"]})
    difference = np.abs(outputs["swapped"].astype(int) - inputs["target_face"])
    assert difference.mean() < 1
    assert difference.max() < 20


def test_the_face_changes_and_the_background_stays(generator: MobileStyleGAN, inputs: dict[str, Any]) -> None:
    outputs = run(generator, inputs)
    assert {name: (value.shape, value.dtype) for name, value in outputs.items()} == {
        "swapped": ((1024, 1024, 3), np.uint8),
        "swapped_regions": ((1024, 1024), np.uint8),
        "hole": ((1024, 1024), np.uint8),
        "mask": ((1024, 1024), np.uint8),
    }
    assert set(outputs) == set(STAGE.writes)
    difference = np.abs(outputs["swapped"].astype(int) - inputs["target_face"]).mean(axis=2)
    assert difference[outputs["mask"] > 0].mean() > 3 * difference[:200, :150].mean()
    np.testing.assert_array_equal(outputs["swapped"], run(generator, inputs)["swapped"])


def test_mask_and_hole(generator: MobileStyleGAN, inputs: dict[str, Any]) -> None:
    """A driven face that ends higher than the target's: the rest of the target's chin is the hole, unless it is drawn."""
    driven = face_labels()
    driven[800:] = Region.BACKGROUND
    drawn = run(generator, inputs | {"driven_regions": driven})
    left = run(generator, inputs | {"driven_regions": driven}, CodesConfig(draw_hole=False))
    chin = np.zeros((1024, 1024), bool)
    chin[800:] = np.isin(inputs["target_regions"][800:], [Region.SKIN])
    np.testing.assert_array_equal(left["hole"], chin * np.uint8(255))
    assert not drawn["hole"].any()
    for outputs in (drawn, left):
        assert (outputs["swapped_regions"][chin] == Region.SKIN).all()
        np.testing.assert_array_equal(
            outputs["mask"] > 0, np.isin(outputs["swapped_regions"], [1, 2, 3, 5, 6, 9]), "lips, brows, eyes, nose, skin, mouth"
        )


def test_the_crop_is_cut_from_the_generators_square(generator: MobileStyleGAN, inputs: dict[str, Any]) -> None:
    """A crop of half the size around the middle: its pixels are those of the whole picture, averaged 1 to 1 there."""
    crop_to_frame = np.array([[1.0, 0, 256], [0, 1.0, 256], [0, 0, 1]])
    labels = face_labels()
    cut = inputs | {
        "driven_regions": labels[256:768, 256:768],
        "target_regions": labels[256:768, 256:768],
        "target_face": inputs["target_face"][256:768, 256:768],
        "target_to_canvas": crop_to_frame,
        "driven_codes": inputs["target_codes"],
    }
    difference = np.abs(run(generator, cut)["swapped"].astype(int) - cut["target_face"])
    assert difference.mean() < 1
    moved = regions_in_picture(labels[256:768, 256:768], crop_to_frame)
    np.testing.assert_array_equal(moved[256:768, 256:768], labels[256:768, 256:768])


def test_what_does_not_fit_is_said(generator: MobileStyleGAN, inputs: dict[str, Any]) -> None:
    nobody = np.zeros((1024, 1024), np.uint8)
    (result,) = STAGE.run(generator, CodesConfig(), [inputs | {"driven_regions": nobody}])
    assert isinstance(result, ItemError)
    assert "no face region was found in the driven face" in str(result)
    with pytest.raises(ValueError, match="target_layers must be 0 to 23, got 24"):
        CodesConfig(target_layers=24)
    with pytest.raises(ValueError, match="unknown regions"):
        CodesConfig(driven_regions=("chin",))


def test_only_the_part_that_is_seen_may_be_drawn(generator: MobileStyleGAN) -> None:
    """The square around the mask equals that of the whole picture: the window's margin covers what its convolutions see."""
    rng = np.random.default_rng(3)
    z = torch.from_numpy(rng.standard_normal((12, 512)).astype(np.float32))
    codes = generator.map(z)[:, None].expand(-1, 23, -1).numpy()
    regions = np.zeros((1024, 1024), np.uint8)
    regions[300:800, 300:700] = 6
    seen = regions == 6
    whole, part = generate(generator, codes, regions), generate(generator, codes, regions, seen=seen)
    assert np.abs(whole[seen].astype(int) - part[seen]).max() <= 1
    assert not part[:200].any()
