"""The evaluation of runs: features are computed once, failures are counted, degenerate runs give what theory says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from homes import home_with_pulled_weights
from torch import nn

from e4s_models.user_network import add_user_network
from e4s_models.weights import WeightsError, weight_path
from evaluation.protocols import Protocol
from evaluation.psnr import MAX_DB
from evaluation.results import Evaluation, read, read_history, write
from flows.evaluate import DAMAGED_OUTPUT, NO_OUTPUT, UNREADABLE, _graph, evaluate
from flows.profiles import make_settings
from flows.stages import PAIR_NODES, PAIR_RESULT
from storage.codec import encode_png
from storage.run import Row, RunError, RunFolder
from storage.store import Store
from tasks.frame import hash_file
from tasks.graph import Graph, Image, Item, UsageError

ROOT = Path(__file__).parents[2]
Pair = tuple[Path, Path, Path]  # source, target, output

CHEAP = Protocol(name="cheap", source="", sample="", networks={"identity": ("sface",)})
THEORY = Protocol(
    name="theory",
    source="",
    sample="",
    networks={
        "identity": ("sface",),
        "pose": ("6drepnet360",),
        "expression": ("blendshapes",),
        "pixels": ("pixels",),
        "lpips": ("lpips_alexnet",),
    },
)
KNOWN = Protocol(
    name="known",
    source="",
    sample="",
    networks={
        "identity": ("sface",),
        "answer": ("pixels_in_face",),
        "answer_lpips": ("lpips_alexnet_in_face",),
        "skin": ("skin_chroma",),
    },
)
MIXED = Protocol(
    name="mixed", source="", sample="", networks={"identity": ("sface",), "expression": ("blendshapes",), "pixels": ("pixels",)}
)


@pytest.fixture(scope="module", autouse=True)
def weights_of_the_small_protocols() -> None:
    for protocol in (CHEAP, THEORY):
        for name in protocol.weights():
            try:
                weight_path(name)
            except WeightsError as error:
                pytest.skip(str(error))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where features of the four people gather for all tests that do not count them."""
    return tmp_path_factory.mktemp("features")


def run_of(path: Path, pairs: Sequence[Pair], store: Path, left: int = 0, truths: Sequence[Path] = ()) -> RunFolder:
    """A run folder whose results are given pictures; `truths`: for each pair what its result should equal."""
    folder = RunFolder(path)
    folder.create()
    folder.write_settings({"e4s": version("e4s"), "store": str(store), "request": {"max_pixels": 120_000_000}})
    rows = []
    for number, (source, target, output) in enumerate(pairs):
        name = f"outputs/{number:06d}.png"
        shutil.copy(output, path / name)
        digests = [hash_file(str(picture)) for picture in (source, target, output)]
        true = {"truth": str(truths[number]), "truth_sha256": hash_file(str(truths[number]))} if truths else {}
        rows.append(
            Row(
                **true,
                id=f"{number:06d}",
                source=str(source),
                target=str(target),
                source_sha256=digests[0],
                target_sha256=digests[1],
                status="done",
                output=name,
                output_sha256=digests[2],
                output_size=(path / name).stat().st_size,
            )
        )
    rows += [Row(id=f"left{number}", source="", target="") for number in range(left)]
    folder.write_rows(rows)
    return folder


def ring(people: Sequence[Path], output: int) -> list[Pair]:
    """Everybody with the next as target; the output is the source (0) or the target (1) itself."""
    pairs = list(zip(people, [*people[1:], people[0]], strict=True))
    return [(source, target, (source, target)[output]) for source, target in pairs]


def value(evaluation: Evaluation, metric: str, network: str) -> float | None:
    [line] = [line for line in evaluation.lines if (line.measured.metric, line.measured.network) == (metric, network)]
    return line.measured.value


def picture(path: Path, pixels: Any) -> Path:
    path.write_bytes(encode_png(np.ascontiguousarray(pixels, np.uint8)))
    return path


def test_a_result_that_is_the_target_keeps_all_of_it(people: list[Path], store: Path, tmp_path: Path) -> None:
    found = evaluate(run_of(tmp_path / "run", ring(people[:2], 1), store), [THEORY], "cpu")
    assert value(found, "pose", "6drepnet360") == 0
    assert value(found, "expression", "blendshapes") == 0
    assert value(found, "preserved_ssim", "pixels") == pytest.approx(1, abs=1e-12)
    assert value(found, "preserved_psnr", "pixels") == MAX_DB
    assert value(found, "preserved_rmse", "pixels") == value(found, "preserved_lpips", "lpips_alexnet") == 0
    assert value(found, "id_top1", "sface") == 0  # it is somebody else's
    assert not any(name.startswith("reconstruction") for name in (line.measured.metric for line in found.lines))
    assert {line.measured.metric for line in found.lines} == {
        line.metric.name for line in THEORY.lines() if set(line.metric.reads) <= {"source", "target", "swapped", "outside"}
    }


def test_a_result_that_is_the_true_picture_is_perfect(people: list[Path], store: Path, tmp_path: Path) -> None:
    """Whoever source and target are: the truth alone is asked."""
    pairs = [(people[0], people[1], people[1]), (people[1], people[2], people[2])]
    found = evaluate(run_of(tmp_path / "run", pairs, store, truths=[people[1], people[2]]), [KNOWN], "cpu")
    assert value(found, "truth_ssim", "pixels_in_face") == pytest.approx(1, abs=1e-12)
    assert value(found, "truth_psnr", "pixels_in_face") == MAX_DB
    assert value(found, "truth_lpips", "lpips_alexnet_in_face") == 0
    assert value(found, "truth_cosine", "sface") == pytest.approx(1, abs=1e-6)
    assert value(found, "colour_faults", "skin_chroma") == 0
    assert (value(found, "skin_outliers", "skin_chroma") or 0) < 0.1  # a face may have a few spots itself


def test_only_the_inside_of_the_face_is_compared_with_the_truth(people: list[Path], store: Path, tmp_path: Path) -> None:
    pixels = cv2.imread(str(people[1]), cv2.IMREAD_COLOR_RGB)
    beside, inside, small = pixels.copy(), pixels.copy(), pixels[::2, ::2]
    height, width = pixels.shape[:2]
    beside[: height // 16] = 255 - beside[: height // 16]
    inside[height // 2 : height // 2 + height // 16] = 255 - inside[height // 2 : height // 2 + height // 16]
    results = [picture(tmp_path / f"{name}.png", made) for name, made in (("beside", beside), ("inside", inside), ("small", small))]
    pairs = [(people[0], people[1], result) for result in results]
    found = evaluate(run_of(tmp_path / "run", pairs, store, truths=[people[1]] * 3), [KNOWN], "cpu")
    [psnr] = [line for line in found.lines if line.measured.metric == "truth_psnr"]
    assert psnr.values[0] == MAX_DB and psnr.values[1] < 25 and np.isnan(psnr.values[2])
    [reason] = psnr.measured.failed
    assert reason.startswith(f"truth is {width} x {height} px, the result {small.shape[1]} x {small.shape[0]}")


def test_skin_of_another_colour_is_seen(people: list[Path], store: Path, tmp_path: Path) -> None:
    pixels = cv2.imread(str(people[1]), cv2.IMREAD_COLOR_RGB)
    height, width = pixels.shape[:2]
    burnt = pixels.astype(np.float32)
    burnt[int(0.45 * height) : int(0.7 * height), : width // 2] *= (1.1, 1.0, 0.4)  # one cheek is yellow
    result = picture(tmp_path / "burnt.png", np.clip(burnt, 0, 255))
    found = evaluate(run_of(tmp_path / "run", [(people[0], people[1], result)], store), [KNOWN], "cpu")
    assert value(found, "colour_faults", "skin_chroma") == 1
    assert 2 < (value(found, "skin_outliers", "skin_chroma") or 0) < 60  # %
    assert not any(line.measured.metric.startswith("truth") for line in found.lines)  # no true picture is named


def test_a_result_that_is_the_source_is_found(people: list[Path], store: Path, tmp_path: Path) -> None:
    found = evaluate(run_of(tmp_path / "run", ring(people, 0), store), [CHEAP], "cpu")
    assert value(found, "id_top1", "sface") == value(found, "id_top5", "sface") == 1
    assert value(found, "id_cosine", "sface") == pytest.approx(1, abs=1e-5)


def test_everybody_as_the_result_for_everybody_gives_chance(people: list[Path], store: Path, tmp_path: Path) -> None:
    pairs = [(source, people[0], output) for source in people for output in people]
    found = evaluate(run_of(tmp_path / "run", pairs, store), [CHEAP], "cpu")
    assert value(found, "id_top1", "sface") == pytest.approx(1 / len(people))
    assert found.computed["sface"] <= 2 * len(people)  # the same picture is worked on once, however many pairs show it
    assert found.done == len(people) ** 2


def test_features_are_computed_once(people: list[Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    folder = run_of(tmp_path / "run", ring(people[:2], 0), store)
    seen: list[tuple[int, int]] = []
    first = evaluate(folder, [CHEAP], "cpu", lambda done, total: seen.append((done, total)), chunk=1)
    assert first.computed == {"sface": 4}
    assert seen == [(0, 2), (1, 2), (2, 2)]
    write(first, tmp_path / "report")
    once = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    again = evaluate(folder, [CHEAP], "cpu")
    assert again.computed == {}
    write(again, tmp_path / "report")
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == once
    assert evaluate(run_of(tmp_path / "other", ring(people[:2], 0), store), [CHEAP], "cpu").computed == {}  # another run
    more = run_of(tmp_path / "run", [*ring(people[:2], 0), (people[0], people[1], people[2])], store)
    assert evaluate(more, [CHEAP], "cpu").computed == {"sface": 1}  # a new pair of known people
    write(evaluate(more, [CHEAP], "cpu"), tmp_path / "report")
    assert [line["done"] for line in read_history(tmp_path / "report")] == [2, 3]
    assert {artifact.stage for artifact in Store(str(store)).all()} == {"sface"}  # no crop is kept


def test_the_default_profiles_crops_and_label_maps_are_the_runs_own(tmp_path: Path) -> None:
    """A run that kept them is read; it is not aligned and parsed again."""
    pair = Item("a", {"source": Image("a", "a" * 64), "target": Image("b", "b" * 64, 1), "swapped": Image("c", "c" * 64)})
    own = Graph(PAIR_NODES, PAIR_RESULT, make_settings("mobile")).works(
        Item("a", {role: pair.images[role] for role in ("source", "target")})
    )
    works = _graph(["sface", "pixels"], [("sface", "source"), ("pixels", "")], "cpu", Store(str(tmp_path))).works(pair)
    for place in (("align", "source"), ("align", "target"), ("parse", "target")):
        assert works[place].key == own[place].key


def test_an_evaluation_that_asks_for_nothing_new_loads_nothing(people: list[Path], store: Path, tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", ring(people[:2], 0), store)
    before = evaluate(folder, [CHEAP], "cpu")
    write(before, tmp_path / "before")
    code = f"""
import sys
from pathlib import Path
import evaluation.protocols, flows.evaluate
from evaluation.results import write
from storage.run import RunFolder
cheap = evaluation.protocols.Protocol(name="cheap", source="", sample="", networks={{"identity": ("sface",)}})
write(flows.evaluate.evaluate(RunFolder({str(folder.path)!r}), [cheap], "cpu"), Path({str(tmp_path / "after")!r}))
print([name for name in ("torch", "prefect", "dlib", "ai_edge_litert") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]"]
    assert (tmp_path / "after/metrics.json").read_bytes() == (tmp_path / "before/metrics.json").read_bytes()
    assert read(tmp_path / "after").pairs == before.pairs


def test_stopped_in_the_middle_it_goes_on_where_it_was(people: list[Path], tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", ring(people[:3], 0), tmp_path / "store")

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, [CHEAP], "cpu", stop, chunk=1)
    kept = len(Store(str(tmp_path / "store")).all())
    assert kept == 3
    assert evaluate(folder, [CHEAP], "cpu").computed == {"sface": 6 - kept}


def test_a_damaged_feature_is_computed_again(people: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_of(tmp_path / "run", ring(people[:1], 0), tmp_path / "store")
    before = evaluate(folder, [CHEAP], "cpu")
    for path in (tmp_path / "store/payload").rglob("*.parquet"):
        path.write_bytes(path.read_bytes()[:-1])
    after = evaluate(folder, [CHEAP], "cpu")
    assert "computing it again" in capsys.readouterr().err
    assert after.computed["sface"] >= 1
    assert [line.measured for line in after.lines] == [line.measured for line in before.lines]


def test_failures_are_counted_by_reason_and_hold_up_nothing_else(people: list[Path], store: Path, tmp_path: Path) -> None:
    blank = cv2.imread(str(people[1]))[..., ::-1].copy()
    blank[100:1000, 100:900] = 128
    pairs = [*ring(people[:3], 0), (people[0], people[1], picture(tmp_path / "blank.png", blank))]
    folder = run_of(tmp_path / "run", pairs, store, left=2)
    (folder.path / "outputs/000001.png").unlink()
    with (folder.path / "outputs/000002.png").open("ab") as file:
        file.write(b"x")
    found = evaluate(folder, [MIXED], "cpu")
    no_face = "no face found in the output where the target's face is"
    assert found.no_face == {"000003": no_face}
    assert found.unusable.keys() == {"000001", "000002"}
    assert "outputs/000001.png cannot be read; repeat the run's command" in found.unusable["000001"]
    assert "outputs/000002.png differs from the digest in the manifest" in found.unusable["000002"]
    assert (found.total, found.done, found.failed, found.left) == (6, 4, 0, 2)
    assert found.notes == ["the run is not finished: 2 pairs left, 4 measured"]
    by_metric = {line.measured.metric: line for line in found.lines}
    for metric in ("id_cosine", "expression"):
        assert by_metric[metric].measured.failed == {NO_OUTPUT: 1, DAMAGED_OUTPUT: 1, no_face: 1}
        assert np.isnan(by_metric[metric].values).tolist() == [False, True, True, True]
    assert by_metric["preserved_ssim"].measured.failed == {NO_OUTPUT: 1, DAMAGED_OUTPUT: 1}  # needs no face in the output
    assert by_metric["preserved_ssim"].values[3] < 1
    assert evaluate(folder, [MIXED], "cpu").computed == {}  # a failure is remembered, too
    write(found, tmp_path / "report")
    assert read(tmp_path / "report").no_face == found.no_face


def test_a_picture_that_is_gone_matters_only_while_it_is_needed(people: list[Path], tmp_path: Path) -> None:
    moved = tmp_path / "moved.png"
    shutil.copy(people[0], moved)
    folder = run_of(tmp_path / "run", [(moved, people[1], people[1])], tmp_path / "store")
    moved.rename(tmp_path / "away.png")
    found = evaluate(folder, [CHEAP], "cpu")
    assert found.unusable.keys() == {"000000"} and "does not exist" in found.unusable["000000"]
    assert found.lines[0].measured.failed == {f"source: {UNREADABLE}": 1}
    assert found.lines[0].measured.reason == "all 1 pairs failed"
    (tmp_path / "away.png").rename(moved)
    assert evaluate(folder, [CHEAP], "cpu").computed == {"sface": 1}  # of the output it is there already
    moved.unlink()
    found = evaluate(folder, [CHEAP], "cpu")
    assert (found.computed, found.unusable) == ({}, {})
    assert value(found, "id_cosine", "sface") is not None


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (None, "not a run folder"),
        ({"e4s": "9.9"}, "written by another version of e4s (9.9, this is"),
        ({"e4s": "9.9", "store": "", "request": {}}, "repeat the run's command with this version"),
        ({"e4s": version("e4s"), "store": "", "request": {"max_pixels": 1}}, "no pair is finished yet (0 failed, 1 left)"),
    ],
)
def test_what_cannot_be_evaluated_says_why(tmp_path: Path, settings: dict[str, Any] | None, part: str) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.write_rows([Row(id="a", source="a", target="b")])
    if settings:
        folder.write_settings(settings)
    with pytest.raises(RunError) as raised:
        evaluate(folder, [CHEAP], "cpu")
    assert part in str(raised.value) and "\n" not in str(raised.value)


def test_protocols_and_versions(people: list[Path], store: Path, tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", ring(people[:2], 0), store)
    for wrong in (["mine"], ["open", "mine"], []):
        with pytest.raises(UsageError, match="protocols are open, paper"):
            evaluate(folder, wrong, "cpu")
    folder.write_settings({**folder.read_settings(), "e4s": "0.0.1"})
    assert evaluate(folder, [CHEAP], "cpu").notes == [f"the run was made by e4s 0.0.1, measured by {version('e4s')}"]


def test_missing_and_damaged_weights_are_named(people: list[Path], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, needed = tmp_path / "weights", [weight_path(name) for name in ("dlib_landmarks68", "sface")]
    weights.mkdir()
    monkeypatch.setenv("E4S_WEIGHTS", str(weights))
    monkeypatch.setenv("E4S_HOME", str(tmp_path))
    folder = run_of(tmp_path / "run", ring(people[:2], 0), store)
    assert evaluate(folder, [CHEAP], "cpu").unavailable[0].reason.startswith("the weight file face_recognition_sface_2021dec.onnx (sface")
    with pytest.raises(WeightsError, match="run `e4s models pull dlib_landmarks68 face_parser`"):
        evaluate(folder, ["open"], "cpu")  # `pixels` needs none of its own, but faces that are aligned
    for path in needed:
        (weights / path.name).symlink_to(path)
    assert evaluate(folder, [CHEAP], "cpu").unavailable == []
    (weights / needed[1].name).unlink()
    shutil.copy(needed[1], weights)
    with (weights / needed[1].name).open("r+b") as file:
        file.write(b"other")
    found = evaluate(folder, [CHEAP], "cpu")
    assert {(line.protocol, line.metric, line.network) for line in found.unavailable} == {
        ("cheap", metric, "sface") for metric in ("id_top1", "id_top5", "id_cosine", "id_target_cosine")
    }
    assert needed[1].name in found.unavailable[0].reason and "sha256" in found.unavailable[0].reason
    assert (found.lines, found.computed) == ([], {})


class Pooled(nn.Module):
    """Means of tiles, as many as asked for: a small network whose numbers tell faces apart."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers = numbers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(x, (10, 10)).flatten(1)[:, : self.numbers]


def test_networks_that_the_user_added_serve_the_paper_protocol(
    people: list[Path], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E4S_HOME", str(home_with_pulled_weights(tmp_path / "home")))
    folder = run_of(tmp_path / "run", ring(people[:2], 1), store)
    for role, numbers in (("cosface", 30), ("deep3d", 257), ("inception", 20)):
        file = tmp_path / f"{role}.pt"
        torch.jit.trace(Pooled(numbers), torch.zeros(1, 3, 24, 20)).save(str(file))
        file.with_suffix(".toml").write_text(f"height = 24\nwidth = 20\ndimensions = {numbers}\n")
        add_user_network(role, file)
    found = evaluate(folder, ["paper"], "cpu")
    networks = {line.measured.network: line for line in found.lines}
    assert networks.keys() == {"cosface", "deep3d", "inception_standard", "pixels"}
    assert {line.network for line in found.unavailable} == {"hopenet"}
    assert networks["cosface"].state["sha256"] == hash_file(str(tmp_path / "cosface.pt")) == networks["cosface"].measured.sha256
    assert networks["cosface"].state["resolution"] == "20 x 24 px"
    assert networks["deep3d"].measured.value == 0
    artifacts = [artifact for artifact in Store(str(store)).all() if artifact.stage == "deep3d"]
    assert {Store(str(store)).read(artifact, "features").shape for artifact in artifacts} == {(64,)}
    assert evaluate(folder, ["paper"], "cpu").computed == {}
    torch.jit.trace(Pooled(29), torch.zeros(1, 3, 24, 20)).save(str(tmp_path / "cosface.pt"))
    (tmp_path / "cosface.toml").write_text("height = 24\nwidth = 20\ndimensions = 29\n")
    add_user_network("cosface", tmp_path / "cosface.pt", replace=True)
    assert evaluate(folder, ["paper"], "cpu").computed == {"cosface": 4}  # another file: other features


class Unfit(nn.Module):
    """Features of noise; of a picture as smooth as a face zeros, or what is not a number."""

    def __init__(self, numbers: int, zeros: bool) -> None:
        super().__init__()
        self.pooled, self.zeros = Pooled(numbers), zeros

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rough = (x[..., 1:] - x[..., :-1]).abs().mean() - 0.2
        return self.pooled(x) * (rough > 0) if self.zeros else self.pooled(x) + 0 * rough.sqrt()


def test_what_a_network_gives_that_is_no_feature_is_counted_and_stops_nothing(
    people: list[Path], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E4S_HOME", str(home_with_pulled_weights(tmp_path / "home")))
    folder = run_of(tmp_path / "run", ring(people[:2], 1), store)
    for role, numbers, zeros in (("cosface", 30, True), ("deep3d", 257, False)):
        file = tmp_path / f"{role}.pt"
        torch.jit.trace(Unfit(numbers, zeros), torch.zeros(1, 3, 24, 20)).save(str(file))
        file.with_suffix(".toml").write_text(f"height = 24\nwidth = 20\ndimensions = {numbers}\n")
        add_user_network(role, file)
    found = {line.measured.metric: line.measured for line in evaluate(folder, ["paper"], "cpu").lines}
    for metric, reason in (("id_cosine", "cosface gives nothing but zeros"), ("expression", "deep3d.pt gives numbers that are not finite")):
        assert (found[metric].value, found[metric].reason) == (None, "all 2 pairs failed")
        [(said, count)] = found[metric].failed.items()
        assert said.startswith(reason) and count == 2
    assert found["preserved_rmse"].value == 0


IN_A_FLOW = """
import sys
from collections import Counter
from pathlib import Path
from flows.server import prefect_api
with prefect_api(Path(sys.argv[2]) / "prefect.log"):
    from prefect import flow
    from prefect.client.orchestration import get_client
    from storage.run import RunFolder
    import evaluation.protocols, flows.evaluate
    from flows.step import run_as_prefect_task
    cheap = evaluation.protocols.Protocol(name="cheap", source="", sample="", networks={"identity": ("sface",)})

    @flow
    def report():
        return flows.evaluate.evaluate(RunFolder(sys.argv[1]), [cheap], "cpu", chunk=1, hook=run_as_prefect_task).computed

    print(report())
    with get_client(sync_client=True) as client:
        print(sorted(run.name for run in client.read_task_runs()))
"""


@pytest.mark.slow  # a server of its own
def test_inside_a_flow_every_network_and_chunk_is_a_task(people: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_of(tmp_path / "run", ring(people[:2], 0), tmp_path / "store")
    command = [sys.executable, "-c", IN_A_FLOW, str(folder.path), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    computed, tasks = done.stdout.splitlines()[-2:]
    assert computed == "{'sface': 4}"
    for chunk in (0, 1):
        for node in ("sface", "sface_swapped"):
            assert f"'{node} of chunk {chunk}'" in tasks
