"""What planning and orchestration cost per item, and whether that stays flat; then what a second worker process brings.

The stages compute next to nothing (`benchmarks.cheap`: one per picture, five per pair); store, manifest, log and outputs are real. Each
size runs in a process of its own, so that its peak of memory is its own. Cost per item and stage is wall time from planning to the last
output, without imports and without the start of Dask's processes; whether it is flat is judged by CPU time, which other work on the machine
disturbs less. The last part runs the real stages of the `fast` profile on one and on two Dask worker processes with one thread each, and
says where the time goes.

    python -m benchmarks.scale [--quick] [--sizes 1000 10000 100000] [--pairs 12]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cheap import PAIR_STAGES, make_inputs
from benchmarks.overhead import planned
from benchmarks.result import Results
from flows.engine import execute
from flows.execution.process import use_threads
from flows.execution.summary import Summary
from flows.plan import Plan, Request, make_plan
from flows.progress import RunProgress
from storage.run import RunFolder

CHUNK = 128  # pairs; cheap stages want large chunks


@dataclass
class Cost:
    """What one run cost."""

    pairs: int
    planning: float  # s
    starting: float  # s, to the first stage
    running: float  # s, from there
    processor: float  # s, of the planning process
    memory: float  # MB, its peak
    again: float  # s, planning when all is done

    @property
    def per_stage(self) -> float:
        """ms per pair and stage."""
        return (self.planning + self.running) / self.pairs / len(PAIR_STAGES) * 1000

    @property
    def processor_per_pair(self) -> float:
        return self.processor / self.pairs

    def __str__(self) -> str:
        return (
            f"{self.pairs:7d} pairs: planning {self.planning:.1f} s, starting {self.starting:.1f} s, running {self.running:.1f} s: "
            f"{self.per_stage:.2f} ms per pair and stage; {self.processor_per_pair * 1000:.2f} ms CPU per pair, {self.memory:.0f} MB, "
            f"planning again {self.again:.1f} s"
        )


def run_once(folder: Path, pairs: int, dask: str, flow: bool) -> Cost:
    """One run in this process."""
    manifest, profile = make_inputs(folder / "inputs", pairs)
    run = folder / "run"
    request = Request(manifest=manifest, run=str(run), profile=profile, device="cpu", chunk=CHUNK, dask=dask)
    use_threads(request.compute_threads())
    with ExitStack() as stack:
        carry_out: Callable[[Plan, RunProgress], Summary] = execute
        if flow:
            from flows.server import prefect_api

            stack.enter_context(prefect_api(folder / "prefect.log"))
            from flows.pairs import run_planned

            carry_out = run_planned
        processor = time.process_time()
        plan, summary = planned(request, carry_out)
        processor = time.process_time() - processor
    if summary.computed["paste"] != pairs:
        raise RuntimeError(f"the run did not finish: {summary}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    again = make_plan(request)
    again.close()
    if again.todo:
        raise RuntimeError("a rerun found something to do")
    begin, first, end = moments(run)
    return Cost(pairs, plan.seconds, first - begin, end - first, processor, memory, again.seconds)


def moments(run: Path) -> tuple[float, float, float]:
    """When a run began after planning, entered its first stage and ended, by its log; s since the epoch."""
    times: dict[str, float] = {}
    for event in RunFolder(run).read_log():
        times.setdefault(event["event"], float(event["time"]))
    return times["begin"], times["start"], times["end"]


def measure(pairs: int, dask: str = "", flow: bool = False) -> Cost:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="e4s-scale-") as folder:
        command = [sys.executable, "-m", "benchmarks.scale", "--one", str(pairs), "--folder", folder]
        command += [f"--dask={dask}", *(["--flow"] if flow else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return Cost(**json.loads(done.stdout.splitlines()[-1]))


def real_pipeline(people: Path, folder: Path, processes: int) -> float:
    """The `fast` profile on Dask workers: s from the first stage to the end; prints where the time went."""
    wanted = Request(
        manifest=str(people), run=str(folder), profile="fast", device="cpu", chunk=1, threads=1, keep="final", dask=f"local:{processes}"
    )
    planned(wanted)
    began, first, end = moments(folder)
    seconds: dict[str, float] = defaultdict(float)
    for event in RunFolder(folder).read_log():
        if event["event"] == "stage":
            seconds[event["stage"]] += event["seconds"]
    busy = sum(seconds.values())
    most = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in sorted(seconds.items(), key=lambda entry: -entry[1])[:4])
    print(
        f"{processes} processes: {end - first:.1f} s after {first - began:.1f} s of starting; in stages {busy:.1f} s "
        f"({busy / (end - first) / processes:.0%} of the processes' time; {most}); the rest is loading models, decoding, storing, waiting",
        flush=True,
    )
    return end - first


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="200 and 600 pairs, no flow, no real stages")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--pairs", type=int, default=12, help="of the real stages")
    parser.add_argument("--one", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--dask", default="", help=argparse.SUPPRESS)
    parser.add_argument("--flow", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(vars(run_once(Path(arguments.folder), arguments.one, arguments.dask, arguments.flow))))
        return 0
    results = Results("scale")
    costs = []
    for size in [200, 600] if arguments.quick else sorted(arguments.sizes):
        costs.append(measure(size))
        print(costs[-1], flush=True)
    small, large = costs[-2:] if len(costs) > 1 else costs * 2
    more = (large.memory - small.memory) * 1000 / max(large.pairs - small.pairs, 1)
    print(f"memory grows by {more:.1f} kB per pair", flush=True)
    over_dask = measure(small.pairs, "local:2")
    print(f"2 Dask workers: {over_dask}", flush=True)
    claims = [
        ("cpu_per_pair_large_over_small", large.processor_per_pair / small.processor_per_pair, 1.2),
        ("ms_per_pair_and_stage", max(cost.per_stage for cost in costs[1:] or costs), 2.0),
        ("dask_ms_per_pair_and_stage", over_dask.per_stage, 2.0),
    ]
    if not arguments.quick:
        with_flow = measure(small.pairs, flow=True)
        print(f"as a Prefect flow: {with_flow}", flush=True)
        claims += [("memory_kb_per_pair", more, 20.0), ("flow_ms_per_pair_and_stage", with_flow.per_stage, 2.0)]
        from flows.synth import make_people

        with tempfile.TemporaryDirectory(prefix="e4s-scale-") as folder:
            make_people(2 * arguments.pairs, 0, Path(folder) / "people", pairs=arguments.pairs)
            one, two = (real_pipeline(Path(folder) / "people", Path(folder) / f"run{count}", count) for count in (1, 2))
        results.claim("second_worker_speedup", one / two, 1.5, ">=")
    for name, value, target in claims:
        results.claim(name, value, target)
    return results.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
