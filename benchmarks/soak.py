"""Killed again and again, the same command ends with the same bytes: the real `e4s pairs` under SIGKILL and damage.

The command is killed with its whole process group at a random moment after the first stage of that start began (`benchmarks.killing`); now
and then a file of the store or of the run folder is flipped, cut or emptied, and the next start has --verify. In the end all digests must
be those of an undisturbed run, with one row per pair. Nothing that was finished and whole may have been computed again: counted from
log.jsonl (stage executions of a start against what is new in the store) and from the index (no key stands there twice).

    python -m benchmarks.soak [--kills 50] [--pairs 12] [--seed 0] [--work FOLDER] [--quick] [--dask local:2]

With --work the same command goes on after Ctrl-C. With --dask local:2 half of the kills hit the command's own process alone: its workers
must end by themselves. With --dask outside the workers of a cluster outlive the command (`benchmarks.dask_site`), and what they were at
must not be computed twice. The people are synthetic, 256 px, the profile is `fast`. One Prefect server serves all starts.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.dask_site import kept_up
from benchmarks.killing import Soak, Tally, carry_out, soak_options
from benchmarks.result import Results
from flows.finished import FinishedRun
from flows.synth import make_people
from storage.run import RunFolder
from storage.store import Damaged, Store

SIDE = 256  # px
OUTSIDE = "outside"  # of --dask
DAMAGED_SHARE = 0.5  # of the restarts


@dataclass
class PairsTally(Tally):
    executions: dict[str, int] = field(default_factory=dict)  # by node, of the chunks that ended, from log.jsonl
    published: dict[str, int] = field(default_factory=dict)  # executions by stage that reached the store, killed chunks included
    recomputed: int = 0  # stage executions on what was finished and whole
    wrong_digests: int = 0
    wrong_rows: int = 0


AnyPairsTally = TypeVar("AnyPairsTally", bound=PairsTally)


class PairsSoak(Soak[AnyPairsTally, RunFolder]):
    """A soak of `e4s pairs`, whatever the faults are."""

    run_kind = RunFolder

    def __init__(self, work: Path, kills: int, seed: int, pairs: int, dask: str) -> None:
        super().__init__(work, kills, seed, pairs=pairs, dask=dask)
        self.pairs, self.dask, self.people = pairs, dask, work / "people"

    def carry_out(self) -> None:
        with ExitStack() as stack:
            if self.dask == OUTSIDE:
                self.site = stack.enter_context(kept_up(self.work))
            super().carry_out()

    def make_inputs(self) -> None:
        if not (self.people / "pairs.parquet").exists():
            make_people(min(self.pairs, 12), self.seed, self.people, pairs=self.pairs, size=SIDE)

    def command(self, run: Path) -> list[str]:
        command = ["pairs", str(self.people), "--run", str(run), "--profile", "fast", "--device", "cpu"]
        command += ["--chunk", "2", "--no-report"]
        if self.dask == OUTSIDE:  # one thread makes a cluster's bytes
            return [*command, *(["--threads", "1"] if run == self.whole.path else ["--dask", self.site.address])]
        return [*command, *(["--dask", self.dask] if self.dask else [])]

    def look(self, run: RunFolder) -> None:
        self.before = finished(run)

    def account(self, run: RunFolder, events: list[dict[str, Any]]) -> None:
        """Executions of this start by stage against what is new since."""
        new = Counter(stage for key, stage in finished(run).items() if key not in self.before)
        self.tally.published = dict(Counter(self.tally.published) + new)
        logged: Counter[str] = Counter()
        for event in events:
            if event["event"] == "stage":
                node = str(event["stage"])
                logged[node.split("_")[0]] += int(event["items"])
                self.tally.executions[node] = self.tally.executions.get(node, 0) + int(event["items"])
        self.tally.recomputed += sum(max(0, count - new[stage]) for stage, count in logged.items())

    def judge(self, run: RunFolder) -> int:
        mine, whole = (FinishedRun(folder).folder.read_rows() for folder in (run, self.whole))
        rows = abs(len(mine) - len({row.id for row in mine})) + len({row.id for row in mine} ^ {row.id for row in whole})
        expected, digests = {row.id: row.output_sha256 for row in whole}, 0
        for row in mine:
            data = (run.path / row.output).read_bytes() if row.output else b""
            digests += {hashlib.sha256(data).hexdigest(), row.output_sha256} != {expected.get(row.id)}
        self.tally.wrong_rows += rows
        self.tally.wrong_digests += digests
        return rows + digests

    def claim(self, results: Results) -> None:
        results.claim("wrong_digests", self.tally.wrong_digests, 0)
        results.claim("wrong_rows", self.tally.wrong_rows, 0)
        results.claim("recomputed_executions", self.tally.recomputed, 0)


@dataclass
class KilledTally(PairsTally):
    damaged: dict[str, int] = field(default_factory=dict)  # files by kind of damage
    verify_next: bool = False
    alone: int = 0  # kills that hit only the command's own process


class KilledSoak(PairsSoak[KilledTally]):
    """The command is killed, and files are damaged."""

    name = "soak"
    tally_kind = KilledTally

    def command(self, run: Path) -> list[str]:
        return [*super().command(run), *(["--verify"] if self.tally.verify_next else [])]

    def kill(self, process: subprocess.Popen[bytes], chance: random.Random) -> None:
        if self.dask.startswith("local:") and chance.random() < 0.5:
            process.kill()
            self.tally.alone += 1
        else:
            super().kill(process, chance)

    def account(self, run: RunFolder, events: list[dict[str, Any]]) -> None:
        self.tally.verify_next = False
        super().account(run, events)

    def damage(self, run: RunFolder, chance: random.Random) -> None:
        """At half of the restarts flip a byte of, cut or empty one file of the store, or of the run folder's own."""
        if chance.random() >= DAMAGED_SHARE:
            return
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

    def told(self) -> str:
        return f"{super().told()}, {sum(self.tally.damaged.values())} files damaged"


def finished(run: RunFolder) -> dict[str, str]:
    """Key -> stage of what is finished and whole in the run's store."""
    store, found = Store(str(run.path / "store")), {}
    for artifact in store.all() if store.exists() else ():
        try:
            for output in artifact.payloads:
                store.read(artifact, output)
        except Damaged:
            continue
        found[artifact.key] = artifact.stage
    return found


def main() -> int:
    parser = soak_options(__doc__, kills=50, quick="4 kills, 4 pairs")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--dask", default="", help="local:N as of `e4s pairs`; `outside`: a cluster that this starts")
    arguments = parser.parse_args()
    kills, pairs = (4, 4) if arguments.quick else (arguments.kills, arguments.pairs)
    return carry_out(arguments.work, lambda work: KilledSoak(work, kills, arguments.seed, pairs, arguments.dask))


if __name__ == "__main__":
    raise SystemExit(main())
