"""A finished command ends well: `e4s report` again and again on a busy machine, every exit code counted.

A thread of a library that still holds a Python object when the interpreter ends, ends the process with `terminate called without an active
exception` (exit code 134) after all work was done; only a busy machine shows it. Processes that do nothing but compute keep the cores busy.
The first report measures, the others find all features in the store.

    python -m benchmarks.exits [--exits 200] [--load 4] [--quick]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.result import Results
from flows.engine import execute
from flows.plan import Request, make_plan
from flows.progress import Lines
from flows.synth import make_people

PAIRS = 3
SIDE = 256  # px


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep the cores busy by that many processes."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def make_run(folder: Path) -> Path:
    """A finished run of a few synthetic pairs."""
    make_people(PAIRS + 1, 0, folder / "people", pairs=PAIRS, size=SIDE)
    run = folder / "run"
    plan = make_plan(Request(manifest=str(folder / "people"), run=str(run), profile="fast", device="cpu"))
    execute(plan, Lines())
    plan.close()
    return run


def report(run: Path) -> int:
    """The exit code of one `e4s report`; what it says is shown where that is not 0."""
    command = [sys.executable, "-m", "flows.cli", "report", str(run), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"exit code {done.returncode}: {done.stderr.strip()[-300:]}", flush=True)
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exits", type=int, default=200, help="reports in a row")
    parser.add_argument("--load", type=int, default=2 * (os.cpu_count() or 1), help="processes that keep the cores busy meanwhile")
    parser.add_argument("--quick", action="store_true", help="few, for the tests")
    arguments = parser.parse_args()
    exits = 4 if arguments.quick else arguments.exits
    with tempfile.TemporaryDirectory(prefix="e4s-exits-") as folder:
        run = make_run(Path(folder))
        with busy(arguments.load):
            codes = Counter(report(run) for _ in range(exits))
    print(f"{exits} reports under {arguments.load} busy processes, exit codes: {dict(codes)}")
    results = Results("exits")
    results.claim("not_zero", exits - codes[0], 0)
    return results.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
