"""Stage encode=encoder: codes of any aligned face; refining brings the picture nearer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from e4s_models.face_parser import FaceParser
from e4s_models.mobile_stylegan import MobileStyleGAN
from e4s_models.regions import BISENET19_TO_REGIONS
from flows.synth import person_w, picture
from tasks.encode_regions import STAGE, EncoderConfig
from tasks.graph import UsageError, make_config
from tasks.parse import parse_labels
from tasks.stage import Array, Inputs, ItemError, Outputs
from tasks.swap_codes import generate, regions_in_picture


@pytest.fixture(scope="module")
def generator() -> MobileStyleGAN:
    return MobileStyleGAN.load()


@pytest.fixture(scope="module")
def person(generator: MobileStyleGAN) -> Inputs:
    face = picture(generator, person_w(generator, 4711, 0.7))
    tensor = torch.from_numpy(face).permute(2, 0, 1).float() / 127.5 - 1
    return {"face": face, "labels": BISENET19_TO_REGIONS[parse_labels(FaceParser.load("cpu"), [tensor], 512)[0].numpy()]}


def encode(person: Inputs, steps: int, passes: int = 0) -> Outputs:
    config = EncoderConfig(steps=steps, passes=passes)
    with torch.inference_mode():  # as the runner does
        (result,) = STAGE.run(STAGE.load(config, "cpu"), config, [person])
    assert isinstance(result, dict)
    return result


def error(generator: MobileStyleGAN, person: Inputs, result: Outputs) -> float:
    made: Array = generate(generator, result["codes"], regions_in_picture(person["labels"], result["to_canvas"]))
    return float(np.square(made.astype(np.float32) - person["face"]).mean())


def test_codes_show_the_person_and_passes_and_steps_show_it_better(generator: MobileStyleGAN, person: Inputs) -> None:
    plain, corrected, refined = encode(person, 0), encode(person, 0, passes=2), encode(person, 4, passes=2)
    assert plain["codes"].shape == (12, 23, 512)
    assert plain["codes"].dtype == np.float16
    mean = {**plain, "codes": np.broadcast_to(generator.mean_w.numpy(), (12, 23, 512)).astype(np.float16)}
    errors = [error(generator, person, result) for result in (mean, plain, corrected, refined)]
    assert errors[0] > errors[1] > errors[2] > errors[3], errors


def test_the_same_face_gives_the_same_bytes(person: Inputs) -> None:
    one, two = encode(person, 1, passes=1), encode(person, 1, passes=1)
    assert one["codes"].tobytes() == two["codes"].tobytes()


def test_a_small_crop_lies_on_the_whole_canvas(person: Inputs) -> None:
    small = {"face": np.ascontiguousarray(person["face"][::4, ::4]), "labels": np.ascontiguousarray(person["labels"][::4, ::4])}
    result = encode(small, 0)
    corners = np.array([[-0.5, -0.5, 1], [255.5, 255.5, 1]]) @ result["to_canvas"].T
    assert np.allclose(corners[:, :2], [[-0.5, -0.5], [1023.5, 1023.5]])


def test_a_face_smaller_than_the_encoders_is_an_items_failure(person: Inputs) -> None:
    small = {name: value[::8, ::8] for name, value in person.items()}
    config = EncoderConfig(steps=0)
    (result,) = STAGE.run(STAGE.load(config, "cpu"), config, [small])
    assert isinstance(result, ItemError)
    assert str(result) == "the aligned face has 128 px, the encoder needs 256: raise align.side"


def test_weights_follow_from_passes_and_steps() -> None:
    assert STAGE.weights(EncoderConfig(passes=0)) == ("code_encoder",)
    assert "preview_head" in STAGE.weights(EncoderConfig(passes=1))
    assert "lpips_alexnet" not in STAGE.weights(EncoderConfig(passes=1))
    assert {"preview_head", "lpips_alexnet", "arcface_mbf"} < set(STAGE.weights(EncoderConfig(steps=1)))
    assert "arcface_mbf" not in STAGE.weights(EncoderConfig(steps=1, identity=0))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [("steps", -1, "steps must be 0 to"), ("passes", 21, "passes must be 0 to"), ("rate", 0.0, "rate must be above 0")],
)
def test_settings_out_of_range_are_named(setting: str, value: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_config(STAGE, {setting: value})
