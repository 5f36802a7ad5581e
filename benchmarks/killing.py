"""What the soaks share: a command is started, killed at a random moment and started again until it ends by itself; that is a round.

Rounds follow each other, each in a run folder of its own, until there were enough kills; then the last one is brought to its end. After
each round its run folder is compared with that of an undisturbed run. What happened is kept in a file between starts, so that a soak in
a folder that is kept goes on after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil

from benchmarks.result import Results
from flows.server import prefect_api
from storage.run import RunFiles, read_lines
from storage.store import Store, write_atomic

PATIENCE = 300.0  # s without a stage event before a start counts as stuck
LINGER = 30.0  # s that processes may outlive the command whose they are
MARK = "E4S_SOAK"  # environment variable by which all processes of one start are known


@dataclass
class Tally:
    """What happened so far."""

    options: dict[str, Any] = field(default_factory=dict)  # of the soak: it goes on with the same only
    span: float = 0.0  # s, of the undisturbed run from its first stage to its end
    kills: int = 0
    in_flight: int = 0  # of the faults, those that hit work
    starts: int = 0
    rounds: int = 0  # run folders brought to their end
    twice: int = 0  # keys that stand in the index twice
    left_over: int = 0  # processes that outlived their start by more than LINGER
    tracebacks: int = 0  # that the command printed
    lingered: float = 0.0  # s, the longest that any process outlived a killed start

    @property
    def faults(self) -> int:
        return self.kills


AnyTally = TypeVar("AnyTally", bound=Tally)
AnyRun = TypeVar("AnyRun", bound=RunFiles[Any])


class Soak(ABC, Generic[AnyTally, AnyRun]):
    """One soak in one folder. Raises RuntimeError if the folder holds one with other options."""

    name: str
    """Of its results, and of the file that keeps the tally."""
    tally_kind: type[AnyTally]
    run_kind: type[AnyRun]
    share = 5
    """A kill follows the first stage within this part of the undisturbed run's time: a handful of kills per round."""

    def __init__(self, work: Path, kills: int, seed: int, **options: Any) -> None:
        self.work, self.kills, self.seed = work, kills, seed
        self.whole = self.run_kind(work / "undisturbed")
        self.state = work / f"{self.name}.json"
        self.tally = self.tally_kind(**json.loads(self.state.read_text())) if self.state.exists() else self.tally_kind()
        options = {"seed": seed, **options}
        if self.tally.options not in ({}, options):
            raise RuntimeError(f"{self.state} is of a soak with {self.tally.options}, not {options}; give another --work")
        self.tally.options = options

    # -- what a soak is ----------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def make_inputs(self) -> None:
        """Make what is not there yet."""

    @abstractmethod
    def command(self, run: Path) -> list[str]:
        """The arguments of `e4s`."""

    @abstractmethod
    def judge(self, run: AnyRun) -> int:
        """A round is over: compare it with the undisturbed run, and count what differs."""

    @abstractmethod
    def claim(self, results: Results) -> None:
        """Claims beyond those that all soaks make."""

    def environment(self) -> dict[str, str]:
        """The environment of a start."""
        return dict(os.environ)

    def look(self, run: AnyRun) -> None:
        """Before a start."""

    def account(self, run: AnyRun, events: list[dict[str, Any]]) -> None:
        """After a start, with the events that it logged."""

    def damage(self, run: AnyRun, chance: random.Random) -> None:
        """After a kill."""

    def enough(self) -> bool:
        return self.tally.kills >= self.kills

    def told(self) -> str:
        """The tally in a line."""
        tally = self.tally
        return f"start {tally.starts}: {tally.kills} kills, {tally.in_flight} in flight, {tally.rounds} rounds"

    # -- what all do -------------------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Inputs, and the run that nothing disturbs."""
        self.make_inputs()
        if self.tally.span:
            return
        shutil.rmtree(self.whole.path, ignore_errors=True)
        process, _ = self._start(self.whole)
        if process.wait():
            raise RuntimeError(f"the undisturbed run ended with {process.returncode}; see {self.whole.path}.log")
        times = [float(event["time"]) for event in self.whole.read_log() if event["event"] in ("start", "end")]
        self.tally.span = max(times) - min(times)
        self.save()

    def carry_out(self) -> None:
        """Go on until there were enough kills and the last round is at its end."""
        began = time.monotonic()
        while not self.enough() or (self.work / f"round{self.tally.rounds}").exists():
            self.cycle()
            print(f"{self.told()}, {time.monotonic() - began:.0f} s", flush=True)

    def cycle(self) -> None:
        """One start; unless there were enough kills, its kill, if it does not end before."""
        tally, chance = self.tally, random.Random(f"{self.seed}-{self.tally.starts}")
        run = self.run_kind(self.work / f"round{tally.rounds}")
        _, at = read_lines(run.log)
        said, before = Path(f"{run.path}.log"), _size(Path(f"{run.path}.log"))
        self.look(run)
        process, mark = self._start(run)
        killed = False
        try:
            if not self.enough():
                killed = self.disturb(process, run, at, chance)
            if killed:
                self.kill(process, chance)
            process.wait()
        finally:
            if process.poll() is None:  # this soak was interrupted
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            self.wait_for_the_rest(mark)
        events = read_lines(run.log, at)[0]
        tally.starts += 1
        tally.tracebacks += said.read_bytes()[before:].count(b"Traceback (most recent call last)")
        tally.kills += killed
        tally.in_flight += killed and not any(event["event"] == "end" for event in events)
        self.account(run, events)
        if killed:
            self.damage(run, chance)
        elif process.returncode:
            raise RuntimeError(f"start {tally.starts} ended with {process.returncode}; see {run.path}.log")
        else:
            wrong = self.judge(run) + (twice := keys_twice(Store(str(run.path / "store"))))
            tally.twice += twice
            if wrong:  # to be looked at
                run.path.rename(self.work / f"wrong{tally.rounds}")
            else:
                shutil.rmtree(run.path)
            tally.rounds += 1
        self.save()

    def disturb(self, process: subprocess.Popen[bytes], run: AnyRun, at: int, chance: random.Random) -> bool:
        """Wait for the moment at which the command is to be killed; False if it ends before."""
        if not self.wait_for_stage(process, run, at):
            return False
        with suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0, self.tally.span / self.share))
        return process.poll() is None

    def kill(self, process: subprocess.Popen[bytes], chance: random.Random) -> None:
        """SIGKILL to the command and all processes of its group."""
        os.killpg(process.pid, signal.SIGKILL)

    def wait_for_stage(self, process: subprocess.Popen[bytes], run: AnyRun, at: int, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """Wait until the log tells beyond byte `at` that a stage begins; False if the command ends without one."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if any(event["event"] == "start" for event in read_lines(run.log, at)[0]):
                return True
            if process.poll() is not None:
                return False
            meanwhile()
            time.sleep(0.01)
        raise RuntimeError(f"no stage event within {PATIENCE:.0f} s; see {run.path}.log")

    def _start(self, run: AnyRun) -> tuple[subprocess.Popen[bytes], str]:
        """The command in a process group of its own, and the mark of its processes."""
        mark = uuid.uuid4().hex
        with Path(f"{run.path}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "flows.cli", *self.command(run.path)],
                env={**self.environment(), MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            ), mark

    def wait_for_the_rest(self, mark: str) -> None:
        """The command is gone: what it started must end by itself, and before anything is counted."""
        began = time.monotonic()
        while left := marked(mark):
            if time.monotonic() - began > LINGER:
                self.tally.left_over += len(left)
                for process in left:
                    print(f"left over: {process}", file=sys.stderr)
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                psutil.wait_procs(left)
                break
            time.sleep(0.05)
        self.tally.lingered = max(self.tally.lingered, round(time.monotonic() - began, 1))

    def save(self) -> None:
        write_atomic(self.state, json.dumps(asdict(self.tally), indent=2).encode())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def marked(mark: str) -> list[psutil.Process]:
    """Running processes whose environment has this mark."""
    return [process for process in psutil.process_iter(["environ"]) if (process.info["environ"] or {}).get(MARK) == mark]


def keys_twice(store: Store) -> int:
    """Keys that were finished more than once, voided entries not counted."""
    entries = store.index.scan().entries.select(["key", "part"]).to_pylist()
    standing = Counter(key for key, _ in {(entry["key"], entry["part"]) for entry in entries})
    return sum(count > 1 for count in standing.values())


def soak_options(description: str | None, kills: int, quick: str) -> argparse.ArgumentParser:
    """The options that all soaks have; `quick` says what --quick does."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--seed", type=int, default=0, help="of inputs, moments and damage")
    parser.add_argument("--work", default="", help="keep everything here, and go on from what is there")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def carry_out(work: str, make: Callable[[Path], Soak[Any, Any]]) -> int:
    """Carry a soak out, in a folder that is kept if `work` names one. Returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="e4s-soak-") as temporary:
        folder = Path(work or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        soak = make(folder)
        try:
            with prefect_api(folder / "prefect.log"):
                soak.prepare()
                soak.carry_out()
        except KeyboardInterrupt:
            print("interrupted; " + ("the same command goes on" if work else "give --work to go on later"), file=sys.stderr)
            return 130
    tally, results = soak.tally, Results(soak.name)
    print(f"{asdict(tally)}")
    results.claim("kills", tally.kills, soak.kills, ">=")
    results.claim("in_flight_share", tally.in_flight / max(tally.faults, 1), 0.8, ">=")
    results.claim("rounds", tally.rounds, 1, ">=")
    soak.claim(results)
    results.claim("keys_finished_twice", tally.twice, 0)
    results.claim("processes_left_over", tally.left_over, 0)
    results.claim("tracebacks", tally.tracebacks, 0)
    return results.exit_code()
