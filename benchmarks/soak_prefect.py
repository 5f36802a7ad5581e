"""Prefect's server fails again and again under running commands: the real `e4s pairs` and `e4s videos`.

While a command works, its Prefect server is killed, stopped (SIGSTOP) or restarted at a random moment. The server is the command's own, or
one that is shared (`PREFECT_API_URL`). The command must go on without it: exit code 0, the digests of an undisturbed run, at most one line
about it on stderr, no traceback. Now and then SIGTERM follows the fault: the command must end within 10 s with exit code 130, and the same
command finishes its work. At last a power loss: server, worker and flow of a deployment are killed together, and the next run of the
deployment must start and finish, although the server is restarted under it.

    python -m benchmarks.soak_prefect [--kills 10] [--seed 0] [--work FOLDER] [--quick]

`--kills` counts faults, of pairs and of videos each. The rest is as in `benchmarks.soak`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from benchmarks.cheap import make_inputs
from benchmarks.killing import Soak, Tally, carry_out, marked, soak_options
from benchmarks.result import Results
from benchmarks.soak import PairsSoak, PairsTally
from benchmarks.soak_video import BaseVideoSoak, VideoTally
from flows import prefect_process
from flows.server import answers
from storage.run import RunFiles, RunFolder
from storage.video_run import VideoRunFolder

ROOT = Path(__file__).parents[1]
SIGTERM_LIMIT = 10.0  # s within which a command ends
KINDS = ("own stopped, SIGTERM", "shared restarted", "own killed", "shared killed, SIGTERM", "own stopped", "shared stopped")
PATIENCE = 300.0  # s
GIVEN_UP = b"goes on without Prefect"


class SharedServer:
    """A Prefect server as a user starts it, on a port that it keeps."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/api"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The environment of its clients."""
        cleared = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
        return {**cleared, "PREFECT_HOME": str(self._folder), "PREFECT_API_URL": self.url, "DO_NOT_TRACK": "1"}

    def start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-P", prefect_process.__file__, str(self._port), str(os.getpid())]
        environment = {**self.environment, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_UI_ENABLED": "0"}
        with (self._folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + PATIENCE
        while not answers(self.url, 2.0):
            if time.monotonic() > until or self.process.poll() is not None:
                raise RuntimeError(f"the shared server does not start; see {log.name}")
            time.sleep(0.1)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


@dataclass
class ServerTally(Tally):
    kinds: dict[str, int] = field(default_factory=dict)  # faults by kind
    terminations: int = 0  # starts that SIGTERM ended
    late: int = 0  # of them, those that took longer than SIGTERM_LIMIT or had another exit code than 130
    slowest_end: float = 0.0  # s from SIGTERM to the end
    repeated_lines: int = 0  # starts that said more than once that Prefect was given up


@dataclass
class PairsServerTally(PairsTally, ServerTally):
    pass


@dataclass
class VideosServerTally(VideoTally, ServerTally):
    pass


AnyServerTally = TypeVar("AnyServerTally", bound=ServerTally)
AnyRun = TypeVar("AnyRun", bound=RunFiles[Any])


class ServerFaults(Soak[AnyServerTally, AnyRun]):
    """The part of a soak whose faults hit the Prefect server of the command."""

    work: Path
    kind = ""  # of the present start's fault
    _shared: SharedServer | None = None

    def carry_out(self) -> None:
        try:
            super().carry_out()
        finally:
            if self._shared:
                self._shared.kill()

    @property
    def shared(self) -> SharedServer:
        if self._shared is None:
            self._shared = SharedServer(self.work / "shared")
        return self._shared

    def environment(self) -> dict[str, str]:
        if not self.kind:  # the undisturbed run, or the end of the last round
            return super().environment()
        if self.kind.startswith("shared"):
            return self.shared.environment
        return {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}

    def look(self, run: AnyRun) -> None:
        super().look(run)
        number = self.tally.kills
        self.kind = "" if self.enough() else KINDS[number % len(KINDS)]
        if self.kind.startswith("shared"):
            self.shared.kill()
            self.shared.start()

    def disturb(self, process: subprocess.Popen[bytes], run: AnyRun, at: int, chance: random.Random) -> bool:
        """Hit the server; True if the command is to get SIGTERM, too."""
        if not super().disturb(process, run, at, chance):
            return False
        server = self._server_of(process)
        if server is None:
            return False
        self._hit(server)
        self.tally.kinds[self.kind] = self.tally.kinds.get(self.kind, 0) + 1
        if self.kind.endswith("SIGTERM"):
            return True
        self.tally.kills += 1
        self.tally.in_flight += process.poll() is None
        return False

    def _server_of(self, process: subprocess.Popen[bytes]) -> psutil.Process | None:
        if self.kind.startswith("shared"):
            assert self.shared.process
            return psutil.Process(self.shared.process.pid)
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children()
            return next((child for child in children if any("prefect_process" in word for word in child.cmdline())), None)
        return None

    def _hit(self, server: psutil.Process) -> None:
        with suppress(psutil.NoSuchProcess):
            if "stopped" in self.kind:
                server.suspend()
            elif self.kind.startswith("own"):
                server.kill()
            else:
                self.shared.kill()
                if "restarted" in self.kind:
                    self.shared.start()

    def kill(self, process: subprocess.Popen[bytes], chance: random.Random) -> None:
        """SIGTERM, and how long the command takes to end."""
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
        took = time.monotonic() - began
        self.tally.terminations += 1
        self.tally.late += took > SIGTERM_LIMIT or process.wait() != 130
        self.tally.slowest_end = max(self.tally.slowest_end, round(took, 1))

    def account(self, run: AnyRun, events: list[dict[str, Any]]) -> None:
        super().account(run, events)
        said = Path(f"{run.path}.log").read_bytes()
        self.tally.repeated_lines += said.count(GIVEN_UP) > 1
        Path(f"{run.path}.log").write_bytes(b"")  # each start's output is judged alone

    def claim_servers(self, results: Results) -> None:
        results.claim("repeated_lines", self.tally.repeated_lines, 0)
        results.claim("ended_late", self.tally.late, 0)
        results.claim("slowest_end_seconds", self.tally.slowest_end, SIGTERM_LIMIT)


class PairsServerSoak(ServerFaults[PairsServerTally, RunFolder], PairsSoak[PairsServerTally]):
    """Under `e4s pairs`."""

    name = "soak_prefect_pairs"
    tally_kind = PairsServerTally

    def claim(self, results: Results) -> None:
        super().claim(results)
        self.claim_servers(results)


class VideosServerSoak(ServerFaults[VideosServerTally, VideoRunFolder], BaseVideoSoak[VideosServerTally]):
    """Under `e4s videos`."""

    name = "soak_prefect_videos"
    tally_kind = VideosServerTally

    def claim(self, results: Results) -> None:
        super().claim(results)
        self.claim_servers(results)


# -- a power loss ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def worker(environment: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A Prefect worker of the pool `e4s`, ended by force with the block."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "e4s"]
    with (folder / "worker.log").open("ab") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def power_loss(folder: Path) -> str:
    """Kill server, worker and flow of a deployment at work, start the first two again; returns the state of the next run.

    The server is restarted once more under that run.
    """
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", "demo") and not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
    manifest, profile = make_inputs(folder / "inputs", 6)
    run = RunFolder(folder / "runs/night")
    shared = SharedServer(folder / "server")
    mark = f"power-loss-{os.getpid()}"
    environment = {**shared.environment, "E4S_SOAK": mark, "PREFECT_WORKER_QUERY_SECONDS": "2", "PYTHONPATH": str(ROOT)}
    chosen = {"manifest": manifest, "run": str(run.path), "profile": profile, "device": "cpu", "chunk": 1, "changes": ["swap.seconds=1.0"]}

    def prefect(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "prefect", *arguments], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)

    def start() -> None:
        prefect("deployment", "run", "pairs/pairs", "--params", json.dumps(chosen))

    def chunks() -> list[dict[str, Any]]:
        return [event for event in run.read_log() if event["event"] == "chunk"]

    def states() -> list[str]:
        request = urllib.request.Request(f"{shared.url}/flow_runs/filter", b'{"sort": "EXPECTED_START_TIME_ASC"}')
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as response:
            return [found["state_type"] for found in json.load(response)]

    try:
        shared.start()
        prefect("work-pool", "create", "e4s", "--type", "process")
        prefect("--no-prompt", "deploy", "--name", "pairs")
        with worker(environment, folder):
            start()
            _wait_until(lambda: bool(chunks()))
            shared.kill()
            for process in marked(mark):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        shared.start()
        before = len(chunks())
        with worker(environment, folder):
            start()
            _wait_until(lambda: len(chunks()) > before)
            shared.kill()
            shared.start()
            _wait_until(lambda: states()[-1] not in ("SCHEDULED", "PENDING", "RUNNING"))
        rows = [row.status for row in run.read_rows()]
        return states()[-1] if set(rows) == {"done"} else f"{states()[-1]}, pairs {rows}"
    finally:
        shared.kill()
        for process in marked(mark):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _wait_until(condition: Any) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > until:
            raise RuntimeError(f"not within {PATIENCE:.0f} s")
        time.sleep(0.2)


def main() -> int:
    parser = soak_options(__doc__, kills=10, quick="3 faults, 4 pairs, 36 frames")
    arguments = parser.parse_args()
    kills, pairs, frames = (3, 4, 36) if arguments.quick else (arguments.kills, 12, 120)
    seed, work = arguments.seed, arguments.work
    failed = carry_out(f"{work}/pairs" if work else "", lambda folder: PairsServerSoak(folder, kills, seed, pairs, ""))
    failed |= carry_out(f"{work}/videos" if work else "", lambda folder: VideosServerSoak(folder, kills, seed, frames))
    results = Results("soak_prefect_power_loss")
    with tempfile.TemporaryDirectory(prefix="e4s-soak-") as folder:
        results.claim("next_runs_completed", int(power_loss(Path(folder)) == "COMPLETED"), 1)
    return failed | results.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
