"""Keys hold the instruction set where it is another than that the store was begun with; TF32 is set whatever the environment says."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import flows.plan
from flows.engine import execute, make_run_context
from flows.execution.dask_worker import check_compatibility
from flows.plan import Plan, Request, make_plan
from flows.progress import Lines
from flows.video_plan import VideoRequest, make_video_plan
from flows.why import explain
from storage.run import RunFolder
from storage.store import Store
from tasks.instructions import CHOSEN, instruction_set

ROOT = Path(__file__).parents[2]


def planned(people_folder: Path, run: Path, **changes: object) -> Plan:
    request = Request(manifest=str(people_folder), run=str(run), profile="fast", device="cpu")
    return make_plan(replace(request, **changes), dry=True)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(people_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    plan = make_plan(Request(manifest=str(people_folder), run=str(run), profile="fast", device="cpu"))
    assert execute(plan, Lines()).done == 3
    plan.close()
    return run


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with another instruction set."""
    monkeypatch.setattr(flows.plan, "instruction_set", lambda: "another")


def test_the_instruction_set_is_named_with_what_limits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    whole = instruction_set()
    assert whole
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert instruction_set() == f"{whole} ATEN_CPU_CAPABILITY=default"


def test_a_run_made_before_goes_on_without_computing_on_the_machine_that_made_it(finished: Path, people_folder: Path) -> None:
    run = RunFolder(finished)
    assert json.loads((finished / "store/begun.json").read_bytes()) == {"instructions": instruction_set()}
    settings = run.read_settings()
    assert settings.pop("instructions") == instruction_set()
    assert not any("instructions" in print_ for print_ in settings["nodes"].values())  # keys as they always were
    run.write_settings(settings)
    (finished / "store/begun.json").unlink()
    plan = planned(people_folder, finished)
    assert (plan.done_before, plan.todo) == (3, [])
    assert not (finished / "store/begun.json").exists(), "a dry plan writes nothing"
    plan = make_plan(replace(plan.request))
    plan.close()
    assert (plan.done_before, plan.todo) == (3, [])
    assert (finished / "store/begun.json").exists()


@pytest.mark.usefixtures("elsewhere")
def test_on_another_machine_all_keys_are_others(finished: Path, people_folder: Path) -> None:
    Store(str(finished / "store")).begun_with(instruction_set(), write=True)
    plan = planned(people_folder, finished)
    assert plan.known == {}
    assert {reason.why for reason in explain(plan)} == {"instruction set changed: those of the store -> another"}
    assert all(print_["instructions"] == "another" for print_ in plan.graph.fingerprints.values())


@pytest.mark.usefixtures("elsewhere")
def test_a_new_store_is_begun_with_the_machine_that_comes_first(people_folder: Path, tmp_path: Path) -> None:
    plan = make_plan(Request(manifest=str(people_folder), run=str(tmp_path), profile="fast", device="cpu"))
    plan.close()
    assert Store(str(tmp_path / "store")).begun_with("whatever", write=True) == "another"
    assert not any("instructions" in print_ for print_ in plan.graph.fingerprints.values())


def test_a_gpu_computes_the_same_whatever_the_processor(people_folder: Path, tmp_path: Path) -> None:
    graph = planned(people_folder, tmp_path).graph
    graph.settings = replace(graph.settings, device="cuda", instructions="another")
    assert {name for name in graph.all_nodes if graph.instructions(name)} == {
        name for name in graph.all_nodes if graph.device(name) == "cpu"
    }


def test_videos_too(people: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip.mkv").write_bytes(b"no video, but it has a digest")
    (tmp_path / "videos.csv").write_text(f"id,source,video\na,{people[0]},clip.mkv\n")
    request = VideoRequest(manifest=str(tmp_path / "videos.csv"), run=str(tmp_path / "run"), profile="fast", device="cpu")
    make_video_plan(request).close()
    here = make_video_plan(request, dry=True)
    monkeypatch.setattr(flows.plan, "instruction_set", lambda: "another")
    there = make_video_plan(request, dry=True)
    assert here.rows["a"].key != there.rows["a"].key
    assert all("instructions" in print_ for print_ in there.prints.values())
    assert not any("instructions" in print_ for print_ in here.prints.values())


def test_a_worker_of_another_instruction_set_is_refused(
    finished: Path, people_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(Request(manifest=str(people_folder), run=str(tmp_path), profile="fast", device="cpu", dask="tcp://127.0.0.1:9"))
    plan.close()
    kit = make_run_context(plan)
    assert "instruction set" not in check_compatibility(kit, False)
    monkeypatch.setenv(CHOSEN, "another")
    chosen = make_run_context(replace(plan, request=replace(plan.request)))
    assert f"with the instruction set {instruction_set()}, and this run is for another" in check_compatibility(
        replace(chosen, run="other"), False
    )
    local = replace(plan.request, dask="local:2")
    assert local.instructions() == instruction_set()  # this machine computes


def test_tf32_is_set_whatever_the_environment_says() -> None:
    code = (
        "import os\nfrom flows.execution.process import use_threads\nuse_threads(1)\nimport torch\n"
        "print(torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, os.environ.get('NVIDIA_TF32_OVERRIDE'))"
    )
    command = ["env", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1", "NVIDIA_TF32_OVERRIDE=0", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False True None\n"
