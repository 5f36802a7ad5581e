"""How fast pairs and frames are beside another commit: `python -m benchmarks.speed [--against COMMIT] [--pairs 8] [--frames 12]`.

The other commit is checked out beside this one (`git worktree`) and runs in the same environment on the same machine, each run in a process
of its own with an empty store. Both commits take turns; ratios are taken within a round, and their median counts. Seconds are those of
the stages themselves, from the log of each run: no imports, no start of a server, no planning. The peak of memory is that of the process.

Four runs a round for pairs: the default and `swap=composite`, both with each commit; two for frames: the default with each. Pairs are
synthetic people of 1024 px, frames those of a synthetic clip, unless `--photos` and `--clip` name others.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.result import Results
from benchmarks.ways import limited
from flows.report import spent_seconds
from flows.synth import make_clip, make_people
from storage.run import RunFiles, RunFolder
from storage.video_run import VideoRunFolder

ROOT = Path(__file__).parents[1]
BEFORE = "1736cf8"  # the last commit whose default exchanged codes after 20 steps
MOST_MEMORY = 1900  # MB
_MB = 1_000_000

DRIVER = """
import json, resource, sys
from pathlib import Path
import flows
request = json.loads(sys.argv[1])
kind, root = request.pop("kind"), request.pop("root")
if Path(flows.__file__).parents[1] != Path(root):
    sys.exit(f"flows was imported from {flows.__file__}, not from {root}")
from flows.execution.process import use_threads
if kind == "pairs":
    from flows.engine import execute
    from flows.plan import Request, make_plan
    from flows.progress import Lines
    plan = make_plan(Request(**request))
    use_threads(plan.request.compute_threads())
    summary = execute(plan, Lines())
else:
    from flows.video_engine import execute_videos
    from flows.video_plan import VideoRequest, make_video_plan
    plan = make_video_plan(VideoRequest(**request))
    use_threads(plan.request.compute_threads())
    summary = execute_videos(plan)
plan.close()
if summary.exit_code:
    sys.exit(f"the run did not finish: {summary}")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""
"""One run in a process of its own: names that both commits know. Prints the peak of resident memory, bytes."""


@dataclass(frozen=True)
class Side:
    """One of the things that take turns."""

    name: str
    root: Path  # of the checkout
    stages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """What they all do."""

    kind: Literal["pairs", "videos"]
    manifest: Path
    items: int  # pairs or frames that seconds are divided by
    profile: str


@dataclass(frozen=True)
class Cost:
    """What one run cost."""

    stages: Mapping[str, float]  # s per item
    memory: float  # MB

    @property
    def total(self) -> float:
        """Seconds of all stages per item."""
        return sum(self.stages.values())


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """Another commit's files in a folder of their own, removed at the end. Raises SystemExit if there is no such commit here."""
    place = folder / "other"
    done = _git("worktree", "add", "--detach", "--force", str(place), commit)
    if done.returncode:
        sys.exit(f"benchmarks.speed: {commit} cannot be checked out ({done.stderr.strip().splitlines()[-1]}); give another --against")
    try:
        yield place
    finally:
        _git("worktree", "remove", "--force", str(place))


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)


def run_side(side: Side, work: Work, run: Path) -> Cost:
    """Carry one run out. Raises RuntimeError if it fails."""
    request = {
        "kind": work.kind,
        "root": str(side.root),
        "manifest": str(work.manifest),
        "run": str(run),
        "profile": work.profile,
        "stages": side.stages,
        "device": "cpu",
        "keep": "final",
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(request)],
        cwd=side.root,
        env={**os.environ, "PYTHONPATH": str(side.root)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{side.name}: {done.stderr}")
    folder: RunFiles[Any] = RunFolder(run) if work.kind == "pairs" else VideoRunFolder(run)
    stages = {stage: seconds / work.items for stage, (_, seconds) in spent_seconds(folder).items()}
    return Cost(stages, float(done.stdout.splitlines()[-1]) / _MB)


def take_turns(sides: Sequence[Side], work: Work, folder: Path, rounds: int) -> dict[str, list[Cost]]:
    """All sides once per round, in turn; prints each run."""
    costs: dict[str, list[Cost]] = defaultdict(list)
    for turn in range(rounds):
        for side in sides:
            cost = run_side(side, work, folder / f"{work.kind}-{side.name.replace(' ', '-')}-{turn}")
            costs[side.name].append(cost)
            print(f"{work.kind}, round {turn + 1}: {side.name}: {cost.total:.2f} s each, {cost.memory:.0f} MB", flush=True)
    return costs


def print_table(kind: str, costs: Mapping[str, Sequence[Cost]]) -> None:
    """Seconds per item by stage, the median over rounds."""
    print(f"\n| seconds of a {kind} | {' | '.join(costs)} |")
    print(f"|{'---|' * (1 + len(costs))}")
    for stage in dict.fromkeys(stage for of_side in costs.values() for cost in of_side for stage in cost.stages):
        cells = [statistics.median(cost.stages.get(stage, 0.0) for cost in of_side) for of_side in costs.values()]
        print(f"| {stage} | {' | '.join(f'{cell:.3f}' if cell else '' for cell in cells)} |")
    print(f"| all | {' | '.join(f'{statistics.median(cost.total for cost in of_side):.3f}' for of_side in costs.values())} |")
    print(f"| peak of memory, MB | {' | '.join(f'{max(cost.memory for cost in of_side):.0f}' for of_side in costs.values())} |\n")


def ratio(costs: Mapping[str, Sequence[Cost]], over: str, under: str) -> float:
    """The median over rounds of one side's seconds over another's."""
    return statistics.median(a.total / b.total for a, b in zip(costs[over], costs[under], strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default=BEFORE, metavar="COMMIT", help=f"the other commit (default: {BEFORE})")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--side", type=int, default=512, help="px, of the synthetic clip")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", default="mobile")
    parser.add_argument("--photos", type=Path, metavar="MANIFEST", help="the first --pairs of these instead of synthetic people")
    parser.add_argument("--clip", type=Path, metavar="MANIFEST", help="a video run's manifest of one clip instead; give its --frames, too")
    parser.add_argument("--quick", action="store_true", help="2 pairs and 2 frames once, in the profile fast, against HEAD")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.pairs, chosen.frames, chosen.rounds, chosen.side, chosen.profile, chosen.against = 2, 2, 1, 320, "fast", "HEAD"
    results = Results("speed")
    with tempfile.TemporaryDirectory(prefix="e4s-bench-") as temporary:
        folder = Path(temporary)
        with checked_out(chosen.against, folder) as other:
            composite = ("swap=composite",)
            new, old = Side("fused", ROOT), Side("default before", other)
            sides = [old, Side("composite before", other, composite), new, Side("composite", ROOT, composite)]
            manifest = limited(chosen.photos, folder, chosen.pairs) if chosen.photos else _pairs(folder, chosen.pairs)
            pairs = take_turns(sides, Work("pairs", manifest, chosen.pairs, chosen.profile), folder, chosen.rounds)
            print_table("pair", pairs)
            manifest = chosen.clip.absolute() if chosen.clip else _clip(folder, chosen.frames, chosen.side)
            frames = take_turns([old, new], Work("videos", manifest, chosen.frames, chosen.profile), folder, chosen.rounds)
            print_table("frame", frames)
    results.claim("pair_before_over_now", ratio(pairs, "default before", "fused"), 3.5, ">=")
    results.claim("frame_before_over_now", ratio(frames, "default before", "fused"), 4.5, ">=")
    results.claim("fused_over_composite", ratio(pairs, "fused", "composite"), 1.6)
    results.claim("composite_now_over_before", ratio(pairs, "composite", "composite before"), 0.9)
    results.claim("memory_mb", max(cost.memory for cost in (*pairs["fused"], *frames["fused"])), MOST_MEMORY)
    return results.exit_code()


def _pairs(folder: Path, count: int) -> Path:
    """A manifest of synthetic people, each the source of the next."""
    people = folder / "people"
    make_people(count + 1, 20, people)
    manifest = folder / "pairs.csv"
    with manifest.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("source", "target"))
        rows.writerows([str(people / f"people/{index:06d}.png") for index in (first, first + 1)] for first in range(count))
    return manifest


def _clip(folder: Path, frames: int, side: int) -> Path:
    """A manifest of one synthetic clip."""
    people = folder / "source"
    make_people(1, 40, people)
    clip = make_clip(0, folder / "clip.mp4", seconds=frames / 25, fps=25, size=side)
    manifest = folder / "videos.csv"
    manifest.write_text(f"source,video\n{people / 'people/000000.png'},{clip}\n", "utf-8")
    return manifest


if __name__ == "__main__":
    sys.exit(main())
