"""Stage tune: what it reads and changes in the graph, and the change of weights that it writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image as Pictures

from benchmarks.generator import face_labels
from e4s_models.generator_tuning import pack, run_tuned, unpack
from e4s_models.reconstruction_loss import LossWeights, ReconstructionLoss
from e4s_models.regions import NUM_REGIONS
from e4s_models.rgi import RGI
from e4s_models.rgi_encoder import RegionEncoder
from e4s_models.stylegan2 import StyleGAN2
from flows.profiles import make_settings
from flows.stages import PAIR_NODES, PAIR_RESULT
from tasks import swap_codes, swap_rgi
from tasks.graph import Graph, Image, Item, UsageError, make_config
from tasks.stage import ItemError, Outputs
from tasks.tune import PTI, PTI_RGI, Networks, TuneConfig, TuneRGIConfig, published_networks, tune_faces

ITEM = Item("pair", {"source": Image("a.png", "a" * 64), "target": Image("b.png", "b" * 64)})
QUICK = TuneConfig(steps=1, side=128, first_side=128)


def keys(*stages: str, without: str = "") -> dict[tuple[str, str], str]:
    """Keys by slot; `without` takes a node away, and the wires from it."""
    nodes = [
        replace(node, wires={read: wire for read, wire in node.wires.items() if not without or f"{without}." not in wire})
        for node in PAIR_NODES
        if node.name != without
    ]
    works = Graph(nodes, PAIR_RESULT, make_settings("mobile", stages)).works(ITEM)
    return {slot: work.key for slot, work in works.items()}


def test_without_tuning_no_key_changes() -> None:
    assert keys() == keys(without="tune") == keys("tune=none")
    assert keys("swap=composite") == keys("swap=composite", "tune=pti")


def test_tuning_changes_the_swap_and_what_follows() -> None:
    before, after = keys(), keys("tune=pti")
    assert after.keys() - before.keys() == {("tune", "")}
    follows = {"swap", "recolor", "enhance", "blend", "inpaint", "paste"}
    assert {slot[0] for slot in before if before[slot] != after[slot]} == follows
    works = Graph(PAIR_NODES, PAIR_RESULT, make_settings("mobile", ["tune=pti"])).works(ITEM)
    assert works["swap", ""].reads["tuning"] == (works["tune", ""].key, "tuning")
    assert works["tune", ""].reads["codes"] == works["swap", ""].reads["driven_codes"]
    assert works["tune", ""].reads["face"] == (works["reenact", ""].key, "driven")


@pytest.mark.parametrize(
    ("backend", "setting", "value", "message"),
    [
        ("pti", "steps", 0, "steps must be 1 to 10000, got 0; to tune nothing use --stage tune=none"),
        ("pti", "rate", 0.0, "rate must be above 0 and at most 1"),
        ("pti", "side", 300, "side must be one of 128, 256, 512, 1024 px, got 300"),
        ("pti", "first_side", 4, "first_side must be a power of two from 8 to 512 px, got 4"),
        ("pti", "last_side", 16, r"last_side must be a power of two from first_side \(32\) to 1024 px, got 16"),
        ("pti_rgi", "identity", -1.0, "identity must be 0 to 10, got -1"),
    ],
)
def test_settings_out_of_range_are_named(backend: str, setting: str, value: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_config({"pti": PTI, "pti_rgi": PTI_RGI}[backend], {setting: value})


def test_backends_that_do_not_fit_the_codes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"tune=pti_rgi reads 'styles' of encode_driven, which encode=encoder does not write"):
        keys("tune=pti_rgi")
    with pytest.raises(UsageError, match="stage tune has no backend 'all'; choose one of none, pti, pti_rgi"):
        keys("tune=all")


def test_weights_follow_from_the_identity_loss() -> None:
    assert set(PTI.weights(TuneConfig(identity=0.1))) - set(PTI.weights(TuneConfig())) == {"arcface_mbf"}
    assert "rgi" in PTI_RGI.weights(TuneRGIConfig())


@pytest.fixture(scope="module")
def networks() -> Networks:
    with torch.inference_mode():  # as the runner does
        loaded: Networks = PTI.load(QUICK, "cpu")
    return loaded


@pytest.fixture(scope="module")
def drawn(networks: Networks, people: list[Path]) -> list[dict[str, Any]]:
    """Two people at 256 px under a drawn label map, with codes around the mean."""
    labels = np.ascontiguousarray(face_labels()[2::4, 2::4])
    rng = np.random.default_rng(0)
    mean = networks.generator.mean_w.numpy()  # type: ignore[union-attr, operator]
    return [
        {
            "face": cv2.resize(np.asarray(Pictures.open(path)), (256, 256), interpolation=cv2.INTER_AREA),
            "regions": labels,
            "codes": (mean + 0.1 * rng.standard_normal((NUM_REGIONS, 23, 512))).astype(np.float16),
        }
        for path in people[:2]
    ]


def tuned(networks: Networks, *batch: dict[str, Any], config: TuneConfig = QUICK) -> list[bytes]:
    with torch.inference_mode():
        results = PTI.run(networks, config, batch)
    assert all(isinstance(result, dict) and result.keys() == PTI.writes.keys() for result in results), results
    return [result["tuning"].tobytes() for result in results if isinstance(result, dict)]


def test_an_item_gives_the_same_bytes_in_any_company(networks: Networks, drawn: list[dict[str, Any]]) -> None:
    one, two = drawn
    alone = tuned(networks, one)[0]
    assert alone != tuned(networks, two)[0]
    assert tuned(networks, two, one)[1] == alone


def test_several_faces_give_one_tuning(networks: Networks, drawn: list[dict[str, Any]]) -> None:
    """As a video's driven frames will."""
    with torch.inference_mode():
        both = tune_faces(networks, QUICK, drawn)["tuning"]
    assert {name: change.shape for name, change in unpack(both).items()} == {
        name: value.shape for name, value in networks.tunable.weights(QUICK.first_side, QUICK.last_side).items()
    }
    assert both.tobytes() not in (tuned(networks, drawn[0])[0], tuned(networks, drawn[1])[0])


def test_the_face_comes_nearer_and_a_face_is_needed(networks: Networks, drawn: list[dict[str, Any]]) -> None:
    face = drawn[0]
    with torch.inference_mode():
        (nobody,) = PTI.run(networks, QUICK, [face | {"regions": np.zeros((256, 256), np.uint8)}])
        packed = tune_faces(networks, replace(QUICK, steps=4, rate=0.003), [face])["tuning"]
    assert isinstance(nobody, ItemError) and "no face region was found in the driven face" in str(nobody)
    errors = []
    for tuning in (None, packed):
        made = swap_codes.generate(networks.generator, face["codes"], face["regions"], tuning)  # type: ignore[arg-type]
        small = cv2.resize(made, (256, 256), interpolation=cv2.INTER_AREA)
        errors.append(np.square(small.astype(float) - face["face"])[np.isin(face["regions"], (1, 2, 3, 5, 6))].mean())
    assert errors[1] < 0.95 * errors[0]


def swapped(stage_run: Any, model: Any, config: Any, inputs: dict[str, Any]) -> Outputs:
    with torch.inference_mode():
        (result,) = stage_run(model, config, [inputs])
    assert not isinstance(result, ItemError), result
    return result  # type: ignore[no-any-return]


def untouched(networks: Networks, first_side: int) -> np.ndarray:
    return pack({name: torch.zeros_like(value, dtype=torch.float16) for name, value in networks.tunable.weights(first_side, 1024).items()})


def test_an_untouched_tuning_swaps_as_none_does(networks: Networks, drawn: list[dict[str, Any]]) -> None:
    one, two = drawn
    inputs = {
        "driven_codes": one["codes"],
        "target_codes": two["codes"],
        "driven_regions": one["regions"],
        "target_regions": two["regions"],
        "target_face": two["face"],
        "target_to_canvas": np.array([[4, 0, 1.5], [0, 4, 1.5], [0, 0, 1]]),
    }
    model, config = networks.generator, swap_codes.CodesConfig()
    plain = swapped(swap_codes.STAGE.run, model, config, inputs)
    same = swapped(swap_codes.STAGE.run, model, config, inputs | {"tuning": untouched(networks, 32)})
    moved = pack({name: change + 0.02 for name, change in unpack(untouched(networks, 256)).items()})
    other = swapped(swap_codes.STAGE.run, model, config, inputs | {"tuning": moved})
    np.testing.assert_array_equal(plain["swapped"], same["swapped"])
    assert (plain["swapped"] != other["swapped"]).any()


def test_the_published_generator_is_tuned_through_the_same_function() -> None:
    torch.manual_seed(0)
    encoder = RegionEncoder(widths=(16, 16, 16, 32, 32), depths=(1, 1, 1, 1), side=64)
    network = RGI(encoder=encoder, generator=StyleGAN2(64, region_layers=7, max_width=16, code_dim=16)).eval().requires_grad_(False)
    networks = published_networks(network, ReconstructionLoss.load(weights=LossWeights(identity=0)))
    rng = np.random.default_rng(0)
    face = cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (128, 128), interpolation=cv2.INTER_CUBIC)
    regions = np.ascontiguousarray(face_labels()[4::8, 4::8])
    styles = rng.standard_normal((NUM_REGIONS, 80)).astype(np.float32)
    config = TuneRGIConfig(steps=6, rate=0.01, first_side=32)
    with torch.inference_mode():
        tuning = tune_faces(networks, config, [{"face": face, "regions": regions, "styles": styles}])["tuning"]
        codes, ids = network.style_codes(torch.from_numpy(styles)[None]), torch.from_numpy(regions)[None]
        wanted = torch.from_numpy(cv2.resize(face, (64, 64), interpolation=cv2.INTER_AREA)).permute(2, 0, 1) / 127.5 - 1
        inner = torch.from_numpy(np.isin(regions[::2, ::2], (1, 2, 3, 5, 6)))
        errors = [(run_tuned(network.generator, packed, codes, ids)[0] - wanted)[:, inner].square().mean() for packed in (None, tuning)]
    assert errors[1] < 0.95 * errors[0]
    inputs = {
        "driven_styles": styles,
        "target_styles": styles[::-1].copy(),
        "driven_regions": regions,
        "target_regions": regions,
        "target_face": face,
    }
    run, swap_config = swap_rgi.STAGE.run, swap_rgi.RGIConfig()
    plain = swapped(run, network, swap_config, inputs)
    same = swapped(run, network, swap_config, inputs | {"tuning": untouched(networks, 32)})
    other = swapped(run, network, swap_config, inputs | {"tuning": tuning})
    np.testing.assert_array_equal(plain["swapped"], same["swapped"])
    assert (plain["swapped"] != other["swapped"]).any()
