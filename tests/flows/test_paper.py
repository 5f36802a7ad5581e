"""The `paper` profile end to end at 1024 px: every published network in place, with random weights.

The pictures are noise, so nothing is said of how they look; sizes, untouched pixels, repeatability and what is computed again are. The
default run takes the same networks with fewer channels; `slow` takes them whole, in a process of its own, and watches its memory.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from homes import home_with_pulled_weights
from PIL import Image
from safetensors.torch import save_file

from e4s_models import added
from e4s_models.codeformer import CodeFormer
from e4s_models.face_parser import FaceParser
from e4s_models.facevid2vid import FaceVid2Vid, FaceVid2VidConfig
from e4s_models.gpen import Gpen
from e4s_models.inpaint_net import InpaintNet
from e4s_models.published import PUBLISHED, published
from e4s_models.recolor_net import RecolorNet
from e4s_models.rgi import RGI
from e4s_models.rgi_encoder import RegionEncoder
from e4s_models.stylegan2 import StyleGAN2
from e4s_models.weights import WeightsError
from flows.cli import main
from flows.engine import execute
from flows.execution.summary import Summary
from flows.plan import Request, make_plan
from flows.profiles import make_settings
from flows.progress import Lines
from flows.stages import PAIR_NODES, PAIR_RESULT
from storage.run import RunFolder
from storage.store import Store
from tasks.graph import Graph, Item
from tasks.graph import Image as Picture
from tasks.paste import PasteConfig, feather
from tasks.stage import Array

ROOT = Path(__file__).parents[2]
NETWORKS = ("bisenet", "codeformer", "facevid2vid", "gpen", "inpaint", "recolor", "rgi")
WHOLE = {name: published(name).build for name in NETWORKS}
NARROW: dict[str, Callable[[], torch.nn.Module]] = {
    "codeformer": lambda: CodeFormer(side=64, widths=(32, 32, 64), connections=(32,), codes=24, code_width=8, width=16, heads=2, layers=2),
    "facevid2vid": lambda: FaceVid2Vid(
        FaceVid2VidConfig(
            keypoints=3,
            feature_channels=4,
            depth=4,
            width=8,
            residual_blocks=1,
            motion_width=8,
            motion_levels=2,
            pose_width=8,
            spade_hidden=8,
        )
    ),
    "gpen": lambda: Gpen(side=64, widest=8, latent=16, mapping_layers=2),
    "inpaint": lambda: InpaintNet(channels=(8, 8, 8, 8, 16), code_dim=16),
    "recolor": lambda: RecolorNet(width=4),
    "rgi": lambda: RGI(
        encoder=RegionEncoder(widths=(16, 16, 16, 32, 32), depths=(1, 1, 1, 1)),
        generator=StyleGAN2(1024, max_width=16, code_dim=16),
    ),
}
PARSER = "parse.weights=bisenet"  # the trained parser sees no face in noise, one with random weights does


def fill_networks(folder: Path, builds: Mapping[str, Callable[[], torch.nn.Module]]) -> None:
    """Write every network with random weights as `e4s models add` would have converted it."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    for name, build in builds.items():
        module = build()
        if isinstance(module, FaceParser):  # nobody has eyes or glasses, so the hole rule leaves the whole mismatch region
            with torch.no_grad():
                module.conv_out.conv_out.weight[[4, 5, 6]] = -1
        state = {key: value.contiguous() for key, value in module.state_dict().items()}
        assert all(value.isfinite().all() for value in state.values())
        save_file(state, folder / f"{name}.safetensors")
        sha256 = hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest()
        record = {"name": name, "file": published(name).file, "source_sha256": sha256, "sha256": sha256}
        (folder / f"{name}.json").write_text(json.dumps(record), "utf-8")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """E4S_HOME with narrow networks, for this process."""
    path = home_with_pulled_weights(tmp_path_factory.mktemp("home") / "e4s")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("E4S_HOME", str(path))
        for name, build in NARROW.items():
            module = importlib.import_module(PUBLISHED[name])
            patch.setattr(module, f"PUBLISHED_{name.upper()}", replace(published(name), build=lambda build=build: build().eval()))
        fill_networks(added.folder(), WHOLE | NARROW)
        yield path


def carry_out(people: list[Path], run: Path, **changes: object) -> Summary:
    run.parent.mkdir(exist_ok=True)
    manifest = run.parent / "pairs.csv"
    manifest.write_text(f"source,target\n{people[0]},{people[1]}\n", "utf-8")
    plan = make_plan(
        replace(Request(manifest=str(manifest), run=str(run), profile="paper", device="cpu", changes=[PARSER]), **changes)  # type: ignore[arg-type]
    )
    try:
        return execute(plan, Lines())
    finally:
        plan.close()


@pytest.fixture(scope="module")
def finished(narrow: Path, people: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    run = tmp_path_factory.mktemp("paper") / "run"
    return run, carry_out(people, run)


def outputs(run: Path) -> dict[tuple[str, str], Array]:
    """What the pair's nodes wrote, by node and output; of shared work the target's."""
    store = Store(str(run / "store"))
    (row,) = RunFolder(run).read_rows()
    graph = Graph(PAIR_NODES, PAIR_RESULT, make_settings("paper", changes=[PARSER]))
    images = {"source": Picture(row.source, row.source_sha256), "target": Picture(row.target, row.target_sha256)}
    works = graph.works(Item(row.id, images))
    found = store.lookup({work.key for work in works.values()})
    return {
        (node, output): store.read(found[work.key], output)
        for (node, role), work in works.items()
        if role != "source" and work.key in found
        for output in found[work.key].payloads
    }


def test_every_node_of_the_paper_runs_and_writes_full_size(finished: tuple[Path, Summary]) -> None:
    run, summary = finished
    assert (summary.done, summary.failed, summary.crash) == (1, 0, "")
    per_image = {"align": 2, "parse": 1, "encode": 1}
    per_pair = ("reenact", "parse_driven", "encode_driven", "swap", "parse_swapped", "recolor", "enhance", "blend", "inpaint", "paste")
    assert summary.computed == per_image | dict.fromkeys(per_pair, 1)
    written = outputs(run)
    pictures = {name: (value.shape, value.dtype) for name, value in written.items() if value.ndim == 3}
    names = [
        "align.face",
        "reenact.driven",
        "swap.swapped",
        "recolor.recolored",
        "enhance.enhanced",
        "blend.blended",
        "inpaint.inpainted",
        "paste.result",
    ]
    assert pictures == {tuple(name.split(".")): ((1024, 1024, 3), np.uint8) for name in names}
    for node in ("encode", "encode_driven"):
        assert written[node, "styles"].shape == (12, 80)
        assert np.isfinite(written[node, "styles"]).all()
    for name in (("swap", "hole"), ("swap", "mask"), ("inpaint", "mask")):
        assert 0.005 < (written[name] > 0).mean() < 0.995, name  # the run had a face, a mismatch region and something outside
    assert not (written["swap", "hole"] & written["swap", "mask"]).any()


def test_each_network_leaves_its_mark_where_it_may(finished: tuple[Path, Summary]) -> None:
    written = outputs(finished[0])
    assert written["reenact", "driven"].std() > 1
    assert (written["recolor", "recolored"] != written["swap", "swapped"]).any()
    changed = (written["inpaint", "inpainted"] != written["blend", "blended"]).any(axis=2)
    assert changed[written["swap", "hole"] > 0].mean() > 0.5
    reach = cv2.dilate((written["swap", "hole"] > 0).astype(np.uint8), np.ones((41, 41), np.uint8)) > 0
    assert not changed[~reach].any()
    assert not written["inpaint", "mask"][~reach & (written["swap", "mask"] == 0)].any()
    assert not changed[written["inpaint", "mask"] == 0].any()


def test_pixels_outside_the_mask_are_the_targets(finished: tuple[Path, Summary], people: list[Path]) -> None:
    written = outputs(finished[0])
    with Image.open(people[1]) as picture:
        target = np.asarray(picture.convert("RGB"))
    changed = (written["paste", "result"] != target).any(axis=2)
    weight = feather(written["inpaint", "mask"], PasteConfig())
    crop_to_frame = written["align", "crop_to_frame"][:2]
    touched = cv2.warpAffine((weight > 0).astype(np.float32), crop_to_frame, target.shape[1::-1], flags=cv2.INTER_LINEAR) > 0
    assert (~touched).mean() > 0.001
    assert not changed[~touched].any()
    assert changed[touched].mean() > 0.5


def test_the_same_bytes_twice(finished: tuple[Path, Summary], people: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "again"
    carry_out(people, run, keep="final")
    assert [row.output_sha256 for row in RunFolder(run).read_rows()] == [row.output_sha256 for row in RunFolder(finished[0]).read_rows()]


def test_nothing_is_computed_twice_and_a_changed_setting_only_what_follows(finished: tuple[Path, Summary], people: list[Path]) -> None:
    run, _ = finished
    store = str(run / "store")
    assert carry_out(people, run).computed == {}
    assert carry_out(people, run.parent / "shared", store=store).computed == {}
    changed = carry_out(people, run.parent / "changed", store=store, changes=[PARSER, "blend.levels=3"])
    assert changed.computed == {"blend": 1, "inpaint": 1, "paste": 1}


def test_weights_the_user_added_take_part_in_the_keys(narrow: Path) -> None:
    def prints() -> dict[str, object]:
        graph = Graph(PAIR_NODES, PAIR_RESULT, make_settings("paper"))
        return {name: found["weights"] for name, found in graph.fingerprints.items()}

    before = prints()
    record = added.folder() / "rgi.json"
    whole = record.read_text("utf-8")
    sha256 = json.loads(whole)["sha256"]
    assert before["swap"] == before["encode"] == {"rgi": sha256}
    assert set(before["reenact"]) == {"facevid2vid", "gpen"}  # type: ignore[call-overload]
    record.write_text(whole.replace(sha256, "f" * 64), "utf-8")
    try:
        after = prints()
    finally:
        record.write_text(whole, "utf-8")
    assert {name for name in before if before[name] != after[name]} == {"encode", "encode_driven", "swap"}


@pytest.mark.parametrize("missing", [("rgi",), NETWORKS[1:]])
def test_weights_that_were_not_added_are_named_in_one_sentence(
    narrow: Path, missing: tuple[str, ...], people: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aside = tmp_path / "aside"
    aside.mkdir()
    files = [added.folder() / f"{name}.{kind}" for name in missing for kind in ("json", "safetensors")]
    for file in files:
        file.rename(aside / file.name)
    try:
        assert main(["swap", str(people[0]), str(people[1]), "-o", str(tmp_path / "o.png"), "--profile", "paper", "--device", "cpu"]) == 1
    finally:
        for file in files:
            (aside / file.name).rename(file)
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1, printed
    assert f"`e4s models add --from FOLDER {' '.join(missing)}`" in printed
    assert all(published(name).file in printed for name in missing)
    assert not (tmp_path / "o.png").exists()


def test_a_network_converted_by_another_version_is_refused_with_its_remedy(narrow: Path) -> None:
    path = added.folder() / "recolor.safetensors"
    record = added.folder() / "recolor.json"
    before = path.read_bytes(), record.read_text("utf-8")
    save_file({"renamed.weight": torch.zeros(1)}, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    record.write_text(json.dumps(json.loads(before[1]) | {"sha256": sha256}), "utf-8")
    try:
        with pytest.raises(WeightsError, match=r"converted by another version of e4s; run `e4s models add --from FOLDER recolor` again"):
            added.load_added("recolor")
    finally:
        path.write_bytes(before[0])
        record.write_text(before[1], "utf-8")


def test_what_the_user_adds_cannot_be_pulled(narrow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "pull", "rgi"]) == 1
    assert "rgi cannot be pulled: run `e4s models add --from FOLDER rgi`" in capsys.readouterr().err


@pytest.mark.slow
def test_whole_networks_take_less_than_6_gib(people: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E4S_HOME", str(home_with_pulled_weights(tmp_path / "home")))
    fill_networks(added.folder(), WHOLE)
    output = tmp_path / "o.png"
    command = ["-m", "flows.cli", "swap", str(people[0]), str(people[1]), "-o", str(output), "--profile", "paper", "--device", "cpu"]
    child = os.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, *command, "--set", PARSER])
    _, status, usage = os.wait4(child, 0)
    shutil.rmtree(tmp_path / "home")  # 2.4 GB
    assert os.waitstatus_to_exitcode(status) == 0
    with Image.open(output) as picture:
        assert picture.size == (1024, 1024)
    assert usage.ru_maxrss < 6 * 2**20  # KiB
