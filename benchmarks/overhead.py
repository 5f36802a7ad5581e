"""What the pipeline costs: the pairs flow over a plain loop that calls the same stages.

Both sides decode the inputs, compute shared per-image work once and write the final PNGs, one pair at a time, with the same threads
and warm models, in one process; the flow keeps no intermediates. The Prefect server's start is shown apart, and so is the flow as
users run it, with as many pairs at once as there are cores. Then a rerun with nothing to do.

    python -m benchmarks.overhead [--quick] [--pairs 24] [--repeats 3] [--profile mobile]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.result import Results
from flows.engine import execute
from flows.execution.process import use_threads
from flows.execution.summary import Summary
from flows.plan import Plan, Request, make_plan
from flows.progress import Lines, RunProgress
from flows.server import prefect_api
from flows.synth import make_people
from storage.codec import encode_png
from storage.run import Row
from storage.store import write_atomic
from tasks.frame import ImageFile
from tasks.graph import Ref
from tasks.runner import Worker, cpu_threads
from tasks.stage import ItemError


class Quiet(Lines):
    def begin(self, plan: Plan) -> None: ...
    def within(self, items: float) -> None: ...
    def advance(self, rows: list[Row]) -> None: ...


def planned(request: Request, carry_out: Callable[[Plan, RunProgress], Summary] = execute) -> tuple[Plan, Summary]:
    """Plan and carry out without a word. Raises RuntimeError unless everything is done."""
    plan = make_plan(request)
    try:
        summary = carry_out(plan, Quiet())
    finally:
        plan.close()
    if summary.exit_code:
        raise RuntimeError(f"the run did not finish: {summary}")
    return plan, summary


def plain_loop(plan: Plan, out: Path) -> float:
    """What a careful script would do: every stage in order, per-image results in a dictionary, the result written. Returns seconds."""
    graph, shared = plan.graph, dict[Ref, Any]()
    models = {node.name: Worker(graph, plan.store).model(node.name) for node in graph.nodes}
    began = time.perf_counter()
    for item in plan.todo:
        values: dict[Ref, Any] = {(image.sha256, "image"): ImageFile(image.path, image.sha256) for image in item.images.values()}
        values |= shared
        for (node, role), work in graph.works(item).items():
            stage = graph.stages[node]
            if all((work.key, name) in values for name in stage.writes):
                continue
            inputs = {name: values[ref] for name, ref in work.reads.items()}
            (outputs,) = stage.run(models[node], graph.configs[node], [{**inputs, **work.constants}])
            if isinstance(outputs, ItemError):
                raise outputs
            made = {(work.key, name): value for name, value in outputs.items()}
            values |= made
            if role:
                shared |= made
        write_atomic(out / f"{item.id}.png", encode_png(values[graph.works(item)[graph.final[0], ""].key, graph.final[1]]))
    return time.perf_counter() - began


def the_flow(request: Request) -> float:
    """The pairs flow on a fresh run folder against the running server. Returns seconds, planning included."""
    from flows.pairs import run_planned

    began = time.perf_counter()
    planned(request, run_planned)
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 pairs at 256 px, once")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", default="mobile")
    arguments = parser.parse_args()
    pairs, repeats, profile = (3, 1, "fast") if arguments.quick else (arguments.pairs, arguments.repeats, arguments.profile)
    results = Results("overhead")
    use_threads(cpu_threads())
    with tempfile.TemporaryDirectory(prefix="e4s-bench-") as folder:
        root = Path(folder)
        make_people(pairs, 0, root / "people", pairs=pairs)

        def request(name: str, workers: int = 1) -> Request:
            manifest, run = str(root / "people"), str(root / name)
            return Request(manifest=manifest, run=run, profile=profile, keep="final", device="cpu", workers=workers)

        began = time.perf_counter()
        with prefect_api(root / "prefect.log"):
            print(f"Prefect server start: {time.perf_counter() - began:.1f} s")
            warm = make_plan(request("warm"))
            plain_loop(warm, root / "warm-loop")
            warm.close()
            the_flow(request("warm"))  # the first flow of a process imports and connects
            loops, flows, shipped = [], [], []
            for repeat in range(repeats):
                plan = make_plan(request(f"loop{repeat}"))
                loops.append(plain_loop(plan, root / f"plain{repeat}"))
                plan.close()
                flows.append(the_flow(request(f"flow{repeat}")))
                shipped.append(the_flow(request(f"shipped{repeat}", workers=0)))
                seconds = f"plain loop {loops[-1]:.2f} s, flow {flows[-1]:.2f} s, flow with all cores {shipped[-1]:.2f} s"
                print(f"{repeat}: {seconds} for {pairs} pairs ({profile})", flush=True)
        same = all(path.read_bytes() == (root / "flow0/outputs" / path.name).read_bytes() for path in (root / "plain0").iterdir())
        plan = make_plan(request("flow0"))
        plan.close()
        if plan.todo:
            raise RuntimeError("a rerun found something to do")
    print(f"flow with all cores over the plain loop: {statistics.median(shipped) / statistics.median(loops):.2f}")
    results.claim("same_bytes", float(same), 1.0, ">=")
    results.claim("planning_ms_per_pair", plan.seconds / pairs * 1000, 5.0)
    results.claim("flow_over_loop", statistics.median(flows) / statistics.median(loops), 1.10)
    return results.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
