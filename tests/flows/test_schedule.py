"""`docs/schedule.md` typed as it stands: a real Prefect server, pool, worker, deployments, and reports that the schedule starts."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from storage.store import Store

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/schedule.md").read_text("utf-8")
PATIENCE = 240.0  # s for something that takes a minute on an idle machine


def commands(section: str) -> list[str]:
    """The shell lines below the heading `## section`."""
    body = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert body, f"no section {section!r} in docs/schedule.md"
    return [line for block in re.findall(r"^```sh\n(.*?)^```", body[1], re.M | re.S) for line in block.splitlines()]


@dataclass
class Terminal:
    """One shell, in a folder that looks like a checkout of its own."""

    folder: Path
    shell: subprocess.Popen[str]
    api: str

    def type(self, line: str) -> str:
        """Type one line; returns what it printed. It must succeed, and within PATIENCE."""
        assert self.shell.stdin and self.shell.stdout
        self.shell.stdin.write(f'{line}\necho "@@ $?"\n')
        self.shell.stdin.flush()
        printed, deadline = "", time.monotonic() + PATIENCE
        while select.select([self.shell.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            text = os.read(self.shell.stdout.fileno(), 1 << 16).decode()
            printed += text
            ended = re.search(r"^@@ (\d+)\n", printed, re.M)
            if ended:
                assert ended[1] == "0", f"{line}\n{printed}"
                return printed[: ended.start()]
            assert text, f"the shell ended in {line}\n{printed}"
        raise AssertionError(f"not done within {PATIENCE} s: {line}\n{printed}")

    def ask(self, what: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        request = urllib.request.Request(f"{self.api}/{what}/filter", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            found: list[dict[str, Any]] = json.load(response)
            return found

    def reports(self) -> list[dict[str, Any]]:
        """Ended runs of the flow `report`, in order, those that were left out excepted. None was started by hand."""
        runs = self.ask("flow_runs", {"flows": {"name": {"any_": ["report"]}}, "sort": "START_TIME_ASC", "limit": 200})
        assert all(run["auto_scheduled"] for run in runs)
        return [run for run in runs if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED")]

    def next_report(self, after: int) -> dict[str, Any]:
        """The first report that ended after that many had, and began after this call."""
        called = time.time()
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for run in self.reports()[after:]:
                if _seconds(run["start_time"]) > called or not after:
                    assert run["state_type"] == "COMPLETED", (run["state"]["message"], self.worker_log())
                    return run
            time.sleep(1)
        raise AssertionError(f"no scheduled report within {PATIENCE} s\n{self.worker_log()}")

    def worker_log(self) -> str:
        return (self.folder / "runs/worker.log").read_text()


def _seconds(time_: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(time_).timestamp()


@pytest.fixture(scope="module")
def terminal(people_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    """Sections 1 to 5 typed; then 6 and 7, which end everything that was started."""
    folder = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", "demo") and not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
    shutil.copytree(people_folder, folder / "runs/people")  # the four people that section 4 makes: they are there already
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("prefect")
    own = {"PREFECT_HOME": home, "PREFECT_SERVER_API_PORT": port}  # what section 1 leaves to the user
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "160",  # tables are not cut
        "PREFECT_WORKER_QUERY_SECONDS": "2",  # only to be sooner
    }
    shell = subprocess.Popen(
        ["bash"],
        cwd=folder,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    terminal = Terminal(folder, shell, f"http://127.0.0.1:{port}/api")
    try:
        terminal.type("set -m")  # job control, as a terminal has it: without, jobs in the background ignore SIGINT
        for section in ("1. A server", "2. A work pool and the deployments", "3. A worker", "4. A run to report on", "5. The schedule"):
            for line in commands(section):
                name = re.match(r"export (\w+)=", line)
                if line.startswith("prefect flow-run ls"):
                    terminal.next_report(0)
                    assert "COMPLETED" in terminal.type(line)
                else:
                    terminal.type(f"export {name[1]}={own[name[1]]}" if name and name[1] in own else line)
        yield terminal
        for line in commands("6. Every morning"):
            terminal.type(line)
        schedules = {deployment["name"]: deployment["schedules"] for deployment in terminal.ask("deployments", {})}
        assert {name: [(s["schedule"]["cron"], s["active"]) for s in found] for name, found in schedules.items()} == {
            "pairs": [("0 1 * * *", True)],
            "videos": [("0 1 * * *", False)],
            "report": [("0 6 * * *", True)],
            "pairs-gpu": [],
        }
    finally:
        started = psutil.Process(shell.pid).children(recursive=True)
        try:
            for line in commands("7. The end"):
                terminal.type(line)
        finally:
            server = home / "server.pid"  # gone if the server was stopped
            started += [psutil.Process(int(server.read_text()))] if server.exists() else []
            for process in [*started, shell]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            shell.wait()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the server still runs"


def history(terminal: Terminal) -> list[dict[str, Any]]:
    lines = (terminal.folder / "runs/nightly/report/history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_a_scheduled_report_appears_and_writes_its_files(terminal: Terminal) -> None:
    report = terminal.folder / "runs/nightly/report"
    assert json.loads((report / "metrics.json").read_text())["done"] == 2
    assert "<html" in (report / "index.html").read_text()
    assert pq.read_table(report / "metrics.parquet")["id"].to_pylist() == ["000000", "000001"]
    assert [line["done"] for line in history(terminal)] == [2]


@pytest.mark.slow
def test_reports_follow_the_run(terminal: Terminal) -> None:
    """A report on an unchanged run computes nothing; one on a run that grew measures the new pair and adds to the history."""
    store = terminal.folder / "runs/nightly/store"
    features = {artifact.key for artifact in Store(str(store)).all()}
    terminal.next_report(1)
    assert {artifact.key for artifact in Store(str(store)).all()} == features
    assert len(history(terminal)) == 1

    manifest = terminal.folder / "runs/people/pairs.parquet"
    rows = pq.read_table(manifest).to_pylist()
    people = {f"people/{number:06d}.png" for number in range(4)}
    unused = min(people - {rows[0]["source"], rows[0]["target"]})
    pq.write_table(pa.Table.from_pylist([*rows, {"id": "000002", "source": rows[0]["source"], "target": unused}]), manifest)
    terminal.type("prefect deployment run pairs/pairs --param profile=fast --watch")
    terminal.next_report(len(terminal.reports()))
    done = [line["done"] for line in history(terminal)]  # one in between where a report saw the run at work
    assert (done[0], done[-1], sorted(done)) == (2, 3, done)
    assert {artifact.key for artifact in Store(str(store)).all()} > features


def deployments() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    return found


@pytest.mark.parametrize("deployment", deployments(), ids=lambda deployment: deployment["name"])
def test_deployments_name_every_parameter_of_their_flow(deployment: dict[str, Any]) -> None:
    """Every parameter stands there with its default (but for what the user must choose) and a comment; schedules are paused."""
    import importlib

    path, _, name = deployment["entrypoint"].partition(":")
    signature = inspect.signature(getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name).fn)
    assert list(deployment["parameters"]) == list(signature.parameters)
    chosen = {"device"} if deployment["work_pool"]["name"] == "e4s-gpu" else set()
    for parameter in signature.parameters.values():
        if parameter.name in chosen:
            continue
        given = deployment["parameters"][parameter.name]
        assert parameter.default is inspect.Parameter.empty or (list(given) if isinstance(given, list) else given) == (
            list(parameter.default) if isinstance(parameter.default, list | tuple) else parameter.default
        )
    text = (ROOT / "prefect.yaml").read_text()
    assert all(re.search(rf"^      {name}: .* # \S.{{10}}", text, re.M) for name in signature.parameters)
    assert not any(schedule["active"] for schedule in deployment.get("schedules", []))
    assert deployment["description"]
