"""Workers and schedulers killed again and again under a running command: the real `e4s pairs --dask tcp://...` on a real Dask cluster.

The cluster is a `dask scheduler` and two `dask worker`, each with its nanny, kept up as docs/cluster.md says: what ends is started again
after a moment. While the command works, SIGKILL hits at random moments a worker process that has a chunk (its nanny starts another), such
a worker's nanny (the worker must end by itself), or the scheduler (all workers must end by themselves). The command must end well: digests
are those of an undisturbed run in one process, with one row per pair; nothing that was finished and whole is computed again, no key
stands in the index twice.

    python -m benchmarks.soak_cluster [--kills 8] [--restarts 4] [--pairs 12] [--seed 0] [--work FOLDER] [--quick]

One start of the command meets at most two kills of workers and one of the scheduler, in any order: a chunk that loses three workers is left
by design. A fault is in flight if log.jsonl says that a chunk was lost by it. The rest is as in `benchmarks.soak`.
"""

from __future__ import annotations

import random
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.dask_site import alive
from benchmarks.killing import LINGER, PATIENCE, carry_out, soak_options
from benchmarks.result import Results
from benchmarks.soak import OUTSIDE, PairsSoak, PairsTally
from storage.run import RunFolder, read_lines

KILLS_PER_START = 2  # of workers: one less than a chunk may lose (flows.execution.worker_pool.MAX_WORKER_LOSSES)


@dataclass
class ClusterTally(PairsTally):
    restarts: int = 0  # of the scheduler
    lost: int = 0  # chunks that were sent again because of these
    kinds: dict[str, int] = field(default_factory=dict)  # kills of workers by what was killed

    @property
    def faults(self) -> int:
        return self.kills + self.restarts


@dataclass
class Fault:
    """What was killed, and when (s since the epoch, as in the log)."""

    hit: str  # scheduler, or the name of a worker
    time: float


class ClusterSoak(PairsSoak[ClusterTally]):
    """The cluster is hit, not the command."""

    name = "soak_cluster"
    tally_kind = ClusterTally
    share = 2

    def __init__(self, work: Path, kills: int, restarts: int, seed: int, pairs: int) -> None:
        super().__init__(work, kills, seed, pairs, OUTSIDE)
        self.restarts = restarts
        self.faults: list[Fault] = []  # of the present start

    def enough(self) -> bool:
        return super().enough() and self.tally.restarts >= self.restarts

    def told(self) -> str:
        return f"{super().told()}, {self.tally.restarts} restarts of the scheduler"

    def disturb(self, process: subprocess.Popen[bytes], run: RunFolder, at: int, chance: random.Random) -> bool:
        """The faults of one start, each after work has begun again since the last; the command is left to end by itself."""
        self.faults = []
        coming = ["worker"] * min(KILLS_PER_START, self.kills - self.tally.kills)
        coming += ["scheduler"] * min(1, self.restarts - self.tally.restarts)
        chance.shuffle(coming)
        for kind in coming:
            if not self.wait_for_stage(process, run, at, self.site.tend):
                break
            self._pass(chance.uniform(0, self.tally.span / self.share), process)
            while process.poll() is None and not self._hit(kind, chance):
                self._pass(0.1)
            _, at = read_lines(run.log, at)
        self._pass(PATIENCE + 5 * self.tally.span, process)
        if process.poll() is None:
            raise RuntimeError(f"the command does not end after {coming}; see {run.path}.log and {self.site.log}")
        return False

    def account(self, run: RunFolder, events: list[dict[str, Any]]) -> None:
        super().account(run, events)
        lost = [event for event in events if event["event"] == "lost" and "chunk" in event]
        until = [fault.time for fault in self.faults[1:]] + [float("inf")]
        for fault, following in zip(self.faults, until, strict=True):
            hit = [event for event in lost if fault.time <= event["time"] < following and fault.hit in ("scheduler", event["worker"])]
            self.tally.in_flight += bool(hit)
            self.tally.lost += len(hit)

    def _pass(self, seconds: float, process: subprocess.Popen[bytes] | None = None) -> None:
        """Let time pass, until the process ends at most, while the cluster is kept up."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and (process is None or process.poll() is None):
            self.site.tend()
            time.sleep(0.05)

    def _hit(self, kind: str, chance: random.Random) -> bool:
        """One fault; False if no worker has anything to do."""
        workers = {name: worker for name in self.site.busy() if (worker := self.site.worker_of(name))}
        if not workers:
            return False
        name, victim = chance.choice(sorted(workers)), chance.choice(("worker", "nanny"))
        now = time.time()
        if kind == "scheduler":
            self.site.running[kind].kill()
            self.tally.restarts += 1
            self.faults.append(Fault(kind, now))
        else:
            workers = {name: workers[name]}
            (workers[name] if victim == "worker" else self.site.running[name]).kill()
            self.tally.kills += 1
            self.tally.kinds[victim] = self.tally.kinds.get(victim, 0) + 1
            self.faults.append(Fault(name, now))
        self._must_end(list(workers.values()))
        return True

    def _must_end(self, workers: list[psutil.Process]) -> None:
        """Workers that lost their nanny or their scheduler end by themselves, or are counted."""
        began = time.monotonic()
        while any(map(alive, workers)) and time.monotonic() - began < LINGER:
            self._pass(0.1)
        self.tally.lingered = max(self.tally.lingered, round(time.monotonic() - began, 1))
        left = [worker for worker in workers if alive(worker)]
        self.tally.left_over += len(left)
        for worker in left:
            worker.kill()

    def claim(self, results: Results) -> None:
        super().claim(results)
        results.claim("scheduler_restarts", self.tally.restarts, self.restarts, ">=")


def main() -> int:
    parser = soak_options(__doc__, kills=8, quick="2 kills, 1 restart, 6 pairs")
    parser.add_argument("--restarts", type=int, default=4, help="of the scheduler")
    parser.add_argument("--pairs", type=int, default=12)
    arguments = parser.parse_args()
    kills, restarts, pairs = (2, 1, 6) if arguments.quick else (arguments.kills, arguments.restarts, arguments.pairs)
    return carry_out(arguments.work, lambda work: ClusterSoak(work, kills, restarts, arguments.seed, pairs))


if __name__ == "__main__":
    raise SystemExit(main())
