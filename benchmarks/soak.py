"""Killed again and again, the same command ends with the same bytes: the real `e4s pairs` under SIGKILL and damage.

Rounds of one run folder each: the command is started, killed with its whole process group at a random moment after the first
stage of that start began, now and then a file of the store or of the run folder is flipped, cut or emptied (the next start then
has --verify), and it is started again, until a start ends by itself. Then all digests must be those of an undisturbed run, with
one row per pair. Nothing that was finished and whole may have been computed again: counted from log.jsonl (stage executions of a
start against what is new in the store) and from the index (no key stands there twice).

    python -m benchmarks.soak [--kills 50] [--pairs 12] [--seed 0] [--work FOLDER] [--quick] [--dask local:2]

With --work the same command goes on after Ctrl-C. The people are synthetic, 256 px, the profile is `fast`. One Prefect server
serves all starts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.result import Results
from flows.finished import FinishedRun
from flows.server import prefect_api
from flows.synth import make_people
from storage.run import RunFolder, read_lines
from storage.store import Damaged, Store, write_atomic

SIDE = 256  # px
DAMAGED_SHARE = 0.5  # of the restarts
PATIENCE = 300.0  # s without a stage event before a start counts as stuck


@dataclass
class Tally:
    """What happened so far; kept in soak.json between starts."""

    kills: int = 0
    in_flight: int = 0  # kills before the command had done everything
    starts: int = 0
    rounds: int = 0  # run folders brought to their end
    damaged: dict[str, int] = field(default_factory=dict)  # files by kind of damage
    executions: dict[str, int] = field(default_factory=dict)  # by node, of the chunks that ended, from log.jsonl
    published: dict[str, int] = field(default_factory=dict)  # executions by stage that reached the store, killed chunks included
    recomputed: int = 0  # stage executions on what was finished and whole
    twice: int = 0  # keys that stand in the index twice
    wrong_digests: int = 0
    wrong_rows: int = 0
    verify_next: bool = False


class Soak:
    """One soak in one folder."""

    def __init__(self, work: Path, pairs: int, seed: int, dask: str) -> None:
        self.work, self.seed, self.dask = work, seed, dask
        self.people, self.state, self.pairs = work / "people", work / "soak.json", pairs
        self.tally = Tally(**json.loads(self.state.read_text())) if self.state.exists() else Tally()
        self.whole = work / "undisturbed"

    def prepare(self) -> None:
        """Inputs, and the run that nothing disturbs."""
        if not (self.people / "pairs.parquet").exists():
            make_people(min(self.pairs, 12), self.seed, self.people, pairs=self.pairs, size=SIDE)
        process = self._start(self.whole, verify=False)
        if process.wait():
            raise RuntimeError(f"the undisturbed run ended with {process.returncode}; see {self.whole}.log")
        begins = [event["time"] for event in RunFolder(self.whole).read_log() if event["event"] in ("start", "end")]
        self.span = (max(begins) - min(begins)) / 5  # s: a handful of kills per round

    def cycle(self, kill: bool) -> None:
        """One start; with `kill` its kill, if it does not end before."""
        tally, chance = self.tally, random.Random(f"{self.seed}-{self.tally.starts}")
        run = RunFolder(self.work / f"round{tally.rounds}")
        _, at = read_lines(run.log)
        before = self._finished(run)
        process = self._start(run.path, verify=tally.verify_next)
        killed = False
        try:
            if not kill:
                process.wait()
            elif self._wait_for_stage(process, run, at):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(chance.uniform(0, self.span))
                killed = process.poll() is None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        events = read_lines(run.log, at)[0]
        tally.starts += 1
        tally.kills += killed
        tally.in_flight += killed and not any(event["event"] == "end" for event in events)
        tally.verify_next = False
        self._account(run, events, before)
        if killed:
            if chance.random() < DAMAGED_SHARE:
                self._damage(run, chance)
        elif process.returncode:
            raise RuntimeError(f"start {tally.starts} ended with {process.returncode}; see {run.path}.log")
        else:
            self._judge(run)
        write_atomic(self.state, json.dumps(asdict(tally), indent=2).encode())

    def _start(self, run: Path, *, verify: bool) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "flows.cli", "pairs", str(self.people), "--run", str(run), "--profile", "fast", "--device", "cpu"]
        command += ["--chunk", "2", "--no-report", *(["--verify"] if verify else []), *(["--dask", self.dask] if self.dask else [])]
        with Path(f"{run}.log").open("ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def _wait_for_stage(self, process: subprocess.Popen[bytes], run: RunFolder, at: int) -> bool:
        """Wait until this start's first stage begins; False if it ends without one."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if any(event["event"] == "start" for event in read_lines(run.log, at)[0]):
                return True
            if process.poll() is not None:
                return False
            time.sleep(0.01)
        raise RuntimeError(f"no stage event within {PATIENCE:.0f} s; see {run.path}.log")

    def _finished(self, run: RunFolder) -> dict[str, str]:
        """Key -> stage of what is finished and whole."""
        store, found = Store(str(run.path / "store")), {}
        for artifact in store.all() if store.exists() else ():
            try:
                for output in artifact.payloads:
                    store.read(artifact, output)
            except Damaged:
                continue
            found[artifact.key] = artifact.stage
        return found

    def _account(self, run: RunFolder, events: list[dict[str, object]], before: dict[str, str]) -> None:
        """Executions of this start by stage against what is new since."""
        new = Counter(stage for key, stage in self._finished(run).items() if key not in before)
        self.tally.published = dict(Counter(self.tally.published) + new)
        logged: Counter[str] = Counter()
        for event in events:
            if event["event"] == "stage":
                node = str(event["stage"])
                logged[node.split("_")[0]] += int(str(event["items"]))
                self.tally.executions[node] = self.tally.executions.get(node, 0) + int(str(event["items"]))
        self.tally.recomputed += sum(max(0, count - new[stage]) for stage, count in logged.items())

    def _damage(self, run: RunFolder, chance: random.Random) -> None:
        """Flip a byte of, cut or empty one file of the store, or of the run folder's own."""
        store = run.path / "store"
        files = sorted(path for path in (store / chance.choice(("payload", "payload", "index"))).rglob("*") if path.is_file())
        path = chance.choice(files) if files and chance.random() < 0.8 else chance.choice([run.manifest, run.settings])
        if not path.exists() or not (data := path.read_bytes()):
            return
        kind = chance.choice(("flipped", "cut", "emptied"))
        if kind == "flipped" and path.parent != run.path:
            place = chance.randrange(len(data))
            path.write_bytes(data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :])
        else:
            kind = "emptied" if kind == "flipped" else kind
            path.write_bytes(data[: chance.randrange(1, len(data)) if kind == "cut" else 0])
        where = path.relative_to(store).parts[0] if path.is_relative_to(store) else path.name
        self.tally.damaged[f"{where} {kind}"] = self.tally.damaged.get(f"{where} {kind}", 0) + 1
        self.tally.verify_next = True

    def _judge(self, run: RunFolder) -> None:
        """A round is over: compare it with the undisturbed run."""
        mine, whole = (FinishedRun(RunFolder(folder)).folder.read_rows() for folder in (run.path, self.whole))
        self.tally.wrong_rows += abs(len(mine) - len({row.id for row in mine})) + len({r.id for r in mine} ^ {r.id for r in whole})
        expected = {row.id: row.output_sha256 for row in whole}
        for row in mine:
            data = (run.path / row.output).read_bytes() if row.output else b""
            self.tally.wrong_digests += {hashlib.sha256(data).hexdigest(), row.output_sha256} != {expected.get(row.id)}
        parts = Store(str(run.path / "store")).index.scan().entries.select(["key", "part"]).to_pylist()
        standing = Counter(key for key, _ in {(row["key"], row["part"]) for row in parts})
        self.tally.twice += sum(count > 1 for count in standing.values())
        self.tally.rounds += 1
        shutil.rmtree(run.path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="of the people, the moments and the damage")
    parser.add_argument("--work", default="", help="keep everything here, and go on from what is there")
    parser.add_argument("--dask", default="", help="as of `e4s pairs`")
    parser.add_argument("--quick", action="store_true", help="4 kills, 4 pairs")
    arguments = parser.parse_args()
    kills, pairs = (4, 4) if arguments.quick else (arguments.kills, arguments.pairs)
    with tempfile.TemporaryDirectory(prefix="e4s-soak-") as temporary:
        work = Path(arguments.work or temporary)
        work.mkdir(parents=True, exist_ok=True)
        soak = Soak(work, pairs, arguments.seed, arguments.dask)
        tally, began = soak.tally, time.monotonic()
        try:
            with prefect_api(work / "prefect.log"):
                soak.prepare()
                while tally.kills < kills or (work / f"round{tally.rounds}").exists():
                    soak.cycle(kill=tally.kills < kills)  # the last round is brought to its end
                    print(
                        f"start {tally.starts}: {tally.kills} kills, {tally.in_flight} in flight, {tally.rounds} rounds, "
                        f"{sum(tally.damaged.values())} files damaged, {time.monotonic() - began:.0f} s",
                        flush=True,
                    )
        except KeyboardInterrupt:
            print("interrupted; " + ("the same command goes on" if arguments.work else "give --work to go on later"), file=sys.stderr)
            return 130
        print(f"damage: {tally.damaged}\nstage executions logged: {tally.executions}\npublished: {tally.published}")
    results = Results("soak")
    results.claim("kills", tally.kills, kills, ">=")
    results.claim("in_flight_share", tally.in_flight / max(tally.kills, 1), 0.8, ">=")
    results.claim("rounds", tally.rounds, 1, ">=")
    results.claim("wrong_digests", tally.wrong_digests, 0)
    results.claim("wrong_rows", tally.wrong_rows, 0)
    results.claim("recomputed_executions", tally.recomputed, 0)
    results.claim("keys_finished_twice", tally.twice, 0)
    return results.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
