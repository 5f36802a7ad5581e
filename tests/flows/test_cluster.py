"""Chunks on real Dask workers, started as docs/cluster.md says: same outputs as in one process, faults, refusals.

The stages are those of `benchmarks.cheap`; one of them wants a GPU where the run has one. The machine of the tests has none: the worker
that offers the resource is told that there is one, since no stage uses it.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dask_processes import ROOT, Processes, processes
from distributed import Client

from benchmarks.cheap import PAIR_STAGES, make_inputs
from benchmarks.killing import keys_twice
from flows.engine import execute, make_run_context
from flows.execution.dask_worker import RunContext, check_compatibility
from flows.execution.graph_jobs import split_by_device
from flows.execution.summary import Summary
from flows.execution.worker_pool import ClusterError, local_workers
from flows.plan import Plan, Request, make_plan
from flows.profiles import make_settings
from flows.progress import Lines
from flows.stages import PAIR_NODES, PAIR_RESULT
from storage.run import Row, RunFolder
from storage.store import Store
from tasks.graph import Graph, UsageError

PAIRS = 12
GPU_BY_WORD = "import torch\ntorch.cuda.is_available = lambda: True\n"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """A scheduler, two workers without and one with the resource GPU."""
    folder = tmp_path_factory.mktemp("dask")
    preload = folder / "gpu_by_word.py"
    preload.write_text(GPU_BY_WORD)
    with processes(folder) as started:
        started.scheduler()
        for name in ("one", "two"):
            started.worker(name)
        started.worker("three", "--resources", "GPU=1", "--preload", str(preload))
        started.wait_for(3)
        yield started


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """For tests that kill a scheduler or a worker."""
    with processes(tmp_path_factory.mktemp("fragile")) as started:
        yield started


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_inputs(tmp_path_factory.mktemp("inputs"), PAIRS)


class Told(Lines):
    """Progress that does something when a stage begins, or when a chunk is done."""

    def __init__(
        self, then: Callable[[int, str], None] = lambda chunk, node: None, after: Callable[[list[Row]], None] = lambda rows: None
    ) -> None:
        self.then, self.after, self.stages = then, after, list[tuple[int, str]]()

    def stage(self, chunk: int, node: str) -> None:
        super().stage(chunk, node)
        self.stages.append((chunk, node))
        self.then(chunk, node)

    def advance(self, rows: list[Row]) -> None:
        super().advance(rows)
        self.after(rows)


def request(inputs: tuple[str, str], run: Path, **changes: Any) -> Request:
    manifest, profile = inputs
    settings: dict[str, Any] = {"manifest": manifest, "run": str(run), "profile": profile, "device": "cpu", "chunk": 3, "threads": 1}
    return Request(**{**settings, "dask_wait": 30.0, **changes})


def carry_out(wanted: Request, progress: Lines | None = None, calls: list[tuple[int, str]] | None = None) -> Summary:
    def hook(name: str, subject: str, work: Callable[[], None]) -> None:
        if calls is not None:
            calls.append((int(subject.removeprefix("chunk ")), name))
        work()

    plan = make_plan(wanted)
    try:
        return execute(plan, progress or Told(), hook)
    finally:
        plan.close()


def digests(run: Path) -> dict[str, str]:
    return {row.id: row.output_sha256 for row in RunFolder(run).read_rows() if row.status == "done"}


def places(run: Path) -> dict[str, set[str]]:
    """Workers by stage."""
    found: dict[str, set[str]] = {}
    for event in RunFolder(run).read_log():
        if event["event"] == "stage":
            found.setdefault(event["stage"], set()).add(event["worker"])
    return found


@pytest.fixture(scope="module")
def alone(inputs: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Summary]:
    """The same pairs in this process."""
    run = tmp_path_factory.mktemp("alone")
    summary = carry_out(request(inputs, run))
    assert len(digests(run)) == PAIRS == len(set(digests(run).values()))
    return digests(run), summary


def test_workers_make_the_same_and_nothing_twice(
    cluster: Processes, inputs: tuple[str, str], alone: tuple[dict[str, str], Summary], tmp_path: Path
) -> None:
    progress, calls = Told(), list[tuple[int, str]]()
    summary = carry_out(request(inputs, tmp_path, dask=cluster.address), progress, calls)
    assert summary == alone[1]  # every picture aligned once, although all chunks share pictures
    assert digests(tmp_path) == alone[0]
    assert sorted(call for call in calls if "shared" not in call[1]) == [(chunk, "align..paste") for chunk in range(4)]
    assert (0, "align..paste (shared)") in calls
    assert {node for _, node in progress.stages} == {"align", *PAIR_STAGES}
    assert set().union(*places(tmp_path).values()) <= {"one", "two"}  # the GPU is left alone
    assert not list((tmp_path / "store/probe").iterdir())
    assert carry_out(request(inputs, tmp_path, dask=cluster.address)).computed == {}
    with Client(cluster.address, set_as_default=False) as client:  # Dask's profiler can make a worker stand still
        profiling = client.run(lambda dask_worker: dask_worker.periodic_callbacks["profile"].is_running())
    assert set(profiling.values()) == {False}


def test_chunks_that_share_a_picture_are_at_work_together(
    cluster: Processes, inputs: tuple[str, str], alone: tuple[dict[str, str], Summary], tmp_path: Path
) -> None:
    progress = Told()
    assert carry_out(request(inputs, tmp_path, dask=cluster.address, changes=("swap.seconds=0.6",)), progress) == alone[1]
    swaps = [at for at, (_, node) in enumerate(progress.stages) if node == "swap"]
    pasted = next(at for at, (_, node) in enumerate(progress.stages) if node == "paste")
    assert swaps[1] < pasted, progress.stages


def test_gpu_stages_go_to_gpu_workers_and_the_others_to_the_others(cluster: Processes, inputs: tuple[str, str], tmp_path: Path) -> None:
    calls: list[tuple[int, str]] = []
    summary = carry_out(request(inputs, tmp_path, dask=cluster.address, device="cuda", keep="final"), calls=calls)
    assert (summary.done, summary.exit_code) == (PAIRS, 0)
    found = places(tmp_path)
    assert found.pop("swap") == {"three"}
    assert set().union(*found.values()) <= {"one", "two"}
    assert sorted(calls)[:4] == [(0, "align..reenact"), (0, "align..reenact (shared)"), (0, "blend..paste"), (0, "swap")]
    assert summary.computed == {"align": 4, **dict.fromkeys(PAIR_STAGES, PAIRS)}
    # What is handed from part to part is in the store whatever the retention; the rest is not.
    assert {artifact.stage for artifact in Store(str(tmp_path / "store")).all()} == {"align", "reenact", "swap", "paste"}


def test_damage_between_parts_is_made_again_by_the_part_that_made_it(
    cluster: Processes, inputs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hit = []

    def flip(name: str, subject: str, work: Callable[[], None]) -> None:
        work()
        if name == "swap" and not hit:
            store = Store(str(tmp_path / "store"))
            made = next(artifact for artifact in store.all() if artifact.stage == "swap")
            path = tmp_path / "store" / made.payloads["hole"].file
            path.write_bytes(path.read_bytes()[:-9])
            hit.append(made)

    plan = make_plan(request(inputs, tmp_path, dask=cluster.address, device="cuda", chunk=PAIRS))
    try:
        summary = execute(plan, Told(), flip)
    finally:
        plan.close()
    assert (summary.done, summary.crash) == (PAIRS, "")
    assert "computing it again" in capsys.readouterr().err
    assert summary.computed["swap"] > PAIRS
    assert summary.computed["reenact"] == summary.computed["blend"] == PAIRS


@pytest.mark.parametrize("chunk", [PAIRS, 3])  # 3: the other chunks need pictures that the killed worker had finished
def test_a_killed_worker_costs_only_what_it_had_not_finished(
    chunk: int,
    fragile: Processes,
    inputs: tuple[str, str],
    alone: tuple[dict[str, str], Summary],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, victim = fragile.ready("victim")
    killed = []

    def kill(chunk: int, node: str) -> None:
        if node == "swap" and not killed:
            store = Store(str(tmp_path / "run/store"))
            deadline = time.monotonic() + 20
            while not any(artifact.stage == "reenact" for artifact in store.all()) and time.monotonic() < deadline:
                time.sleep(0.05)
            killed.append({artifact.key for artifact in store.all()})
            os.killpg(victim.pid, signal.SIGKILL)
            fragile.worker("heir")

    wanted = request(inputs, tmp_path / "run", dask=fragile.address, chunk=chunk, changes=["swap.seconds=0.2"])
    summary = carry_out(wanted, Told(kill))
    assert killed[0]
    assert (summary.done, summary.exit_code) == (PAIRS, 0)
    assert digests(tmp_path / "run") == alone[0]
    everything = {artifact.key for artifact in Store(str(tmp_path / "run/store")).all()}
    assert summary.computed.pop("align", 4) == 4  # what is shared is told, and so counted, before the rest of its chunk
    assert sum(summary.computed.values()) == len(everything - killed[0])
    assert "is lost; what it had not finished goes to others" in capsys.readouterr().err


def test_a_scheduler_that_comes_back_costs_nothing_that_is_finished(
    fragile: Processes,
    inputs: tuple[str, str],
    alone: tuple[dict[str, str], Summary],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flows.execution.worker_pool.MAX_WORKER_LOSSES", 1)  # a lost scheduler is no lost worker
    first, _ = fragile.ready("before")
    restarted = []

    def restart(chunk: int, node: str) -> None:
        if chunk == 1 and not restarted:
            restarted.append(node)
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
            fragile.scheduler()
            fragile.worker("after")

    wanted = request(inputs, tmp_path / "run", dask=fragile.address, changes=["swap.seconds=0.1"])
    summary = carry_out(wanted, Told(restart))
    assert restarted
    assert (summary.done, summary.exit_code) == (PAIRS, 0)
    assert digests(tmp_path / "run") == alone[0]
    assert "the Dask scheduler is lost" in (errors := capsys.readouterr().err)
    assert "the Dask scheduler is back" in errors
    assert "after" in set().union(*places(tmp_path / "run").values())
    assert keys_twice(Store(str(tmp_path / "run/store"))) == 0


def test_a_scheduler_that_stays_away_ends_the_run_in_order(fragile: Processes, inputs: tuple[str, str], tmp_path: Path) -> None:
    scheduler, worker = fragile.ready("last")

    def stop(rows: list[Row]) -> None:
        if scheduler.poll() is None:
            os.killpg(scheduler.pid, signal.SIGKILL)
            scheduler.wait()

    wanted = request(inputs, tmp_path / "run", dask=fragile.address, dask_wait=3.0, changes=["swap.seconds=0.2"])
    with pytest.raises(ClusterError, match=r"no Dask scheduler came back there .* repeat the same command \(nothing finished is lost\)"):
        carry_out(wanted, Told(after=stop))
    worker.wait(timeout=60)  # a worker ends with its scheduler
    rows = RunFolder(tmp_path / "run").read_rows()
    assert {row.status for row in rows} == {"done", "left"}
    before = {artifact.key for artifact in Store(str(tmp_path / "run/store")).all()}
    summary = carry_out(replace(wanted, dask=""))  # the same run, without a cluster
    everything = {artifact.key for artifact in Store(str(tmp_path / "run/store")).all()}
    assert summary.done == PAIRS
    assert sum(summary.computed.values()) == len(everything - before)


def test_an_interruption_stops_the_workers_and_keeps_what_is_done(cluster: Processes, inputs: tuple[str, str], tmp_path: Path) -> None:
    def interrupt(chunk: int, node: str) -> None:
        if node == "swap" and chunk == 3:
            raise KeyboardInterrupt

    wanted = request(inputs, tmp_path, dask=cluster.address, changes=["swap.seconds=0.4"])
    with pytest.raises(KeyboardInterrupt):
        carry_out(wanted, Told(interrupt))
    assert {row.status for row in RunFolder(tmp_path).read_rows()} >= {"left"}
    assert carry_out(wanted).done == PAIRS


def test_workers_leave_what_a_killed_command_wanted(
    cluster: Processes, inputs: tuple[str, str], alone: tuple[dict[str, str], Summary], tmp_path: Path
) -> None:
    wanted = request(inputs, tmp_path, dask=cluster.address, chunk=PAIRS, changes=["swap.seconds=0.4"])
    code = "import pickle, sys; from test_cluster import carry_out; carry_out(pickle.loads(bytes.fromhex(sys.argv[1])))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent)))}
    command = subprocess.Popen([sys.executable, "-c", code, pickle.dumps(wanted).hex()], cwd=ROOT, env=environment)
    try:
        deadline = time.monotonic() + 60
        while not any(event.get("stage") == "swap" for event in RunFolder(tmp_path).read_log()) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        command.kill()
        command.wait()
    assert "swap" in {event.get("stage") for event in RunFolder(tmp_path).read_log()}
    time.sleep(1.0)  # less than the rest of the chunk takes; a command needs more to start
    assert carry_out(wanted).done == PAIRS
    assert digests(tmp_path) == alone[0]
    assert keys_twice(Store(str(tmp_path / "store"))) == 0


def test_a_worker_with_another_program_is_refused_by_name(
    cluster: Processes, inputs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    for package in ("e4s_models", "storage", "tasks", "flows", "benchmarks"):
        shutil.copytree(ROOT / package, other / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "tasks/swap.py").open("a") as file:
        file.write("# another program\n")
    with processes(tmp_path) as started:
        started.scheduler()
        started.worker("stranger", PYTHONPATH=str(other))
        started.wait_for(1)
        wanted = request(inputs, tmp_path / "run", dask=started.address, dask_wait=2.0)
        with pytest.raises(ClusterError, match=r"there was no worker for align\.\.paste; stranger cannot take part"):
            carry_out(wanted)
        assert "worker stranger cannot take part: its program differs from that of this run" in capsys.readouterr().err


def test_a_cluster_that_is_not_there_or_lacks_what_is_needed(
    cluster: Processes, inputs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ClusterError, match=r"tcp://127.0.0.1:1: no Dask scheduler answers there"):
        carry_out(request(inputs, tmp_path / "a", dask="tcp://127.0.0.1:1", dask_wait=4.0))
    told = [line for line in capsys.readouterr().err.splitlines() if "tcp://127.0.0.1:1" in line]
    assert told == ["e4s: tcp://127.0.0.1:1: no Dask scheduler answers there yet; waiting for one, 4 s at most (--dask-wait)"]
    with processes(tmp_path) as started:
        started.scheduler()
        started.wait_for(0)
        with pytest.raises(ClusterError, match=r"for 1 s there was no worker for align\.\.paste; start one"):
            carry_out(request(inputs, tmp_path / "b", dask=started.address, dask_wait=1.0))
    with pytest.raises(ClusterError, match="cannot take part, see above"):  # every process has a memory:// of its own
        carry_out(request(inputs, tmp_path / "c", dask=cluster.address, dask_wait=1.0, store="memory://elsewhere"))


def test_a_cluster_without_a_gpu_says_so_when_one_is_wanted(inputs: tuple[str, str], tmp_path: Path) -> None:
    wanted = request(inputs, tmp_path, dask="local:1", device="cuda", dask_wait=1.0)
    with pytest.raises(UsageError, match="torch finds no CUDA device"):
        carry_out(wanted)


@pytest.mark.parametrize("text", ["local:0", "local:", "local:two", "127.0.0.1:8786", "udp://somewhere"])
def test_what_is_no_cluster(text: str, inputs: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give tcp://HOST:PORT of a running scheduler, or local:N"):
        request(inputs, tmp_path, dask=text)


def test_threads_of_the_computing_libraries(inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.plan.cpu_threads", lambda: 8)

    def threads(**changes: Any) -> int:
        return request(inputs, tmp_path, **{"threads": 0, **changes}).compute_threads()

    assert (threads(), threads(dask="local:3"), threads(dask="local:16"), threads(dask="tcp://a:1")) == (8, 2, 1, 1)
    assert threads(threads=5, dask="local:3") == 5


@pytest.fixture
def planned(inputs: tuple[str, str], tmp_path: Path) -> Iterator[tuple[Plan, RunContext]]:
    plan = make_plan(request(inputs, tmp_path))
    kit = make_run_context(plan)
    plan.store.files.write(f"probe/{kit.run}", kit.run.encode())
    yield plan, kit
    plan.close()


def test_the_handshake_names_what_differs(planned: tuple[Plan, RunContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, kit = planned
    align = kit.fingerprints["align"]

    def other(group: str, **changes: str) -> RunContext:
        return replace(kit, fingerprints={**kit.fingerprints, "align": {**align, group: {**align[group], **changes}}})

    assert "numpy" in align["libraries"]
    assert "numpy 2" in check_compatibility(other("libraries", numpy="1.0"), False)
    assert "face_parser None there, 468e13ca in this run" in check_compatibility(other("weights", face_parser="468e13ca"), False)
    assert "its program differs" in check_compatibility(replace(kit, program="0" * 64), False)
    assert "does not see the store" in check_compatibility(replace(kit, store=str(tmp_path / "elsewhere")), False)
    assert "does not see the inputs" in check_compatibility(replace(kit, picture=("/nowhere/a.png", "0" * 64)), False)
    assert "holds something else there" in check_compatibility(replace(kit, picture=(kit.picture[0], "0" * 64)), False)
    cuda = replace(
        kit,
        settings=replace(kit.settings, device="cuda"),
        fingerprints={**kit.fingerprints, "swap": {**kit.fingerprints["swap"], "device": "cuda"}},
    )
    assert "torch finds no CUDA device" in check_compatibility(cuda, True)
    assert check_compatibility(kit, True) == ""


def test_missing_weights_are_found_by_the_handshake(inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(request(inputs, tmp_path / "run", profile="fast"))
    plan.close()
    monkeypatch.setenv("E4S_WEIGHTS", str(tmp_path / "empty"))
    monkeypatch.setenv("E4S_HOME", str(tmp_path / "empty"))
    assert "e4s models pull" in check_compatibility(make_run_context(plan), False)


def test_the_graph_is_cut_where_the_device_changes() -> None:
    def cut(profile: str, device: str) -> list[tuple[str, str]]:
        graph = Graph(PAIR_NODES, PAIR_RESULT, make_settings(profile, device=device))
        found = split_by_device(graph)
        assert set().union(*(part.nodes for part in found)) == {node.name for node in graph.nodes}
        for part in found:  # everything is made before it is read, and on its own kind of device
            assert {graph.device(node) for node in part.nodes} == {part.device}
        order = {node: number for number, part in enumerate(found) for node in part.nodes}
        assert all(order[producer] <= order[node.name] for node in graph.nodes for producer in graph.producers(node.name))
        return [(part.name, part.device) for part in found]

    assert cut("mobile", "cpu") == [("align..paste", "cpu")]
    assert cut("mobile", "cuda") == [
        ("align..mesh", "cpu"),
        ("parse..encode", "cuda"),
        ("reenact", "cpu"),
        ("encode_driven..swap", "cuda"),
        ("recolor..paste", "cpu"),
    ]


def test_processes_of_an_own_cluster() -> None:
    assert local_workers(2, []) == {"cpu-0": {"env": {}}, "cpu-1": {"env": {}}}
    with_gpus = local_workers(1, ["0", "3"])
    assert with_gpus["cpu-0"]["env"] == {"CUDA_VISIBLE_DEVICES": ""}
    assert with_gpus["gpu-3"] == {"resources": {"GPU": 1}, "env": {"CUDA_VISIBLE_DEVICES": "3"}}


def test_no_thread_is_left_behind(cluster: Processes, inputs: tuple[str, str], tmp_path: Path) -> None:
    before = set(threading.enumerate())  # other tests of this process may have threads that are just ending
    carry_out(request(inputs, tmp_path, dask=cluster.address))
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("e4s-") and thread not in before]
    assert not left


def test_workers_share_an_s3_store(
    s3_server: str, fragile: Processes, inputs: tuple[str, str], alone: tuple[dict[str, str], Summary], tmp_path: Path
) -> None:
    fragile.ready("cloud")
    summary = carry_out(request(inputs, tmp_path, dask=fragile.address, store="s3://bucket/cluster"))
    assert summary == alone[1]
    assert digests(tmp_path) == alone[0]
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_is_said_once(inputs: tuple[str, str], tmp_path: Path) -> None:
    """The whole command with processes of its own: the signal reaches all of them."""
    run = tmp_path / "run"
    options = ["--run", str(run), "--profile", inputs[1], "--chunk", "3", "--device", "cpu", "--dask", "local:2", "--no-report"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "pairs", inputs[0], *options, "--set", "swap.seconds=2.0"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not any(event["event"] == "start" for event in RunFolder(run).read_log()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.rstrip().endswith("e4s: interrupted; what is finished is kept, the same command continues")
    assert "Traceback" not in errors
    assert len(RunFolder(run).read_rows()) == PAIRS


def test_own_processes_make_the_same_bytes_as_this_one(people: list[Path], tmp_path: Path) -> None:
    """The real stages, one thread each; two chunks share a source."""
    chosen = ((0, 1), (0, 2), (3, 1))
    (tmp_path / "pairs.csv").write_text("source,target\n" + "".join(f"{people[a]},{people[b]}\n" for a, b in chosen))
    made = []
    for name, dask in (("here", ""), ("there", "local:2")):
        run = tmp_path / name
        wanted = Request(manifest=str(tmp_path / "pairs.csv"), run=str(run), profile="fast", device="cpu", chunk=1, threads=1, dask=dask)
        summary = carry_out(wanted)
        assert (summary.done, summary.exit_code) == (3, 0)
        made.append((digests(run), {artifact.key: artifact.payloads for artifact in Store(str(run / "store")).all()}))
    assert made[0][0] == made[1][0]
    assert made[0][1].keys() == made[1][1].keys()
