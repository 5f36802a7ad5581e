"""Killed again and again in the middle of a video, the same command ends with the same bytes: the real `e4s videos` under SIGKILL.

Rounds of one run folder each: the command is started, killed with its whole process group at a random moment after its first pass
began, and started again, until a start ends by itself. Then the file's bytes, its row and its list of frames must be those of an
undisturbed run, and nothing that was finished may have been made again: no key stands in the index twice.

    python -m benchmarks.soak_video [--kills 20] [--frames 120] [--seed 0] [--work FOLDER] [--quick]

With --work the same command goes on after Ctrl-C. The person and the clip are synthetic, the profile is `fast`. One Prefect server serves
all starts.
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
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.result import Results
from flows.server import prefect_api
from flows.synth import make_clip, make_people
from storage.run import read_lines
from storage.store import Store, write_atomic
from storage.video_run import VideoRow, VideoRunFolder

FPS, SIDE = 24, 256  # of the clip; px
GOP = 24  # frames: what a kill may cost at most
PATIENCE = 300.0  # s without a pass before a start counts as stuck


@dataclass
class Tally:
    """What happened so far; kept in soak_video.json between starts."""

    kills: int = 0
    in_flight: int = 0  # kills before the command had done everything
    starts: int = 0
    rounds: int = 0  # run folders brought to their end
    wrong: int = 0  # outputs or rows that differ from the undisturbed run's
    twice: int = 0  # keys that stand in the index twice
    span: float = 0.0  # s, of the undisturbed run from its first pass to its end


class Soak:
    """One soak in one folder."""

    def __init__(self, work: Path, frames: int, seed: int) -> None:
        self.work, self.frames, self.seed = work, frames, seed
        self.manifest, self.state, self.whole = work / "videos.csv", work / "soak_video.json", VideoRunFolder(work / "undisturbed")
        self.tally = Tally(**json.loads(self.state.read_text())) if self.state.exists() else Tally()

    def prepare(self) -> None:
        """Inputs, and the run that nothing disturbs."""
        if not self.manifest.exists():
            make_people(1, self.seed, self.work / "people")
            make_clip(self.seed + 1, self.work / "clip.mp4", seconds=self.frames / FPS, fps=FPS, size=SIDE)
            write_atomic(self.manifest, b"source,video\npeople/people/000000.png,clip.mp4\n")
        process = self._start(self.whole)
        if process.wait():
            raise RuntimeError(f"the undisturbed run ended with {process.returncode}; see {self.whole.path}.log")
        times = [event["time"] for event in self.whole.read_log() if event["event"] in ("start", "end")]
        self.tally.span = self.tally.span or max(times) - min(times)

    def cycle(self, kill: bool) -> None:
        """One start; with `kill` its kill, if it does not end before."""
        tally, chance = self.tally, random.Random(f"{self.seed}-{self.tally.starts}")
        run = VideoRunFolder(self.work / f"round{tally.rounds}")
        _, at = read_lines(run.log)
        process = self._start(run)
        killed = False
        try:
            if not kill:
                process.wait()
            elif self._wait_for_pass(process, run, at):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(chance.uniform(0, tally.span / 3))  # a handful of kills per round
                killed = process.poll() is None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        tally.starts += 1
        tally.kills += killed
        tally.in_flight += killed and not any(event["event"] == "end" for event in read_lines(run.log, at)[0])
        if not killed:
            if process.returncode:
                raise RuntimeError(f"start {tally.starts} ended with {process.returncode}; see {run.path}.log")
            self._judge(run)
        write_atomic(self.state, json.dumps(asdict(tally), indent=2).encode())

    def _start(self, run: VideoRunFolder) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "flows.cli", "videos", str(self.manifest), "--run", str(run.path), "--profile", "fast"]
        command += ["--device", "cpu", "--set", f"output.gop={GOP}"]
        with Path(f"{run.path}.log").open("ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def _wait_for_pass(self, process: subprocess.Popen[bytes], run: VideoRunFolder, at: int) -> bool:
        """Wait until this start's first pass begins; False if it ends without one."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if any(event["event"] == "start" for event in read_lines(run.log, at)[0]):
                return True
            if process.poll() is not None:
                return False
            time.sleep(0.01)
        raise RuntimeError(f"no pass began within {PATIENCE:.0f} s; see {run.path}.log")

    def _judge(self, run: VideoRunFolder) -> None:
        """A round is over: compare it with the undisturbed run, then remove it."""
        mine, whole = ([_told(row, folder) for row in folder.read_rows()] for folder in (run, self.whole))
        self.tally.wrong += mine != whole
        self.tally.wrong += not run.read_frames("000000").equals(self.whole.read_frames("000000"))
        parts = Store(str(run.path / "store")).index.scan().entries.select(["key", "part"]).to_pylist()
        standing = Counter(key for key, _ in {(row["key"], row["part"]) for row in parts})
        self.tally.twice += sum(count > 1 for count in standing.values())
        self.tally.rounds += 1
        shutil.rmtree(run.path)


def _told(row: VideoRow, folder: VideoRunFolder) -> tuple[object, ...]:
    """What must not depend on kills: the output's own bytes, and what is said of it."""
    data = (folder.path / row.output).read_bytes() if row.output else b""
    return row.id, row.status, row.frames, row.swapped, row.passed, row.failed, row.output, row.output_sha256, row.key, data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--frames", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0, help="of the person, the clip and the moments")
    parser.add_argument("--work", default="", help="keep everything here, and go on from what is there")
    parser.add_argument("--quick", action="store_true", help="2 kills, 36 frames")
    arguments = parser.parse_args()
    kills, frames = (2, 36) if arguments.quick else (arguments.kills, arguments.frames)
    with tempfile.TemporaryDirectory(prefix="e4s-soak-") as temporary:
        work = Path(arguments.work or temporary)
        work.mkdir(parents=True, exist_ok=True)
        soak = Soak(work, frames, arguments.seed)
        tally, began = soak.tally, time.monotonic()
        try:
            with prefect_api(work / "prefect.log"):
                soak.prepare()
                while tally.kills < kills or (work / f"round{tally.rounds}").exists():
                    soak.cycle(kill=tally.kills < kills)  # the last round is brought to its end
                    spent = time.monotonic() - began
                    print(
                        f"start {tally.starts}: {tally.kills} kills, {tally.in_flight} in flight, {tally.rounds} rounds, {spent:.0f} s",
                        flush=True,
                    )
        except KeyboardInterrupt:
            print("interrupted; " + ("the same command goes on" if arguments.work else "give --work to go on later"), file=sys.stderr)
            return 130
    results = Results("soak_video")
    results.claim("kills", tally.kills, kills, ">=")
    results.claim("in_flight_share", tally.in_flight / max(tally.kills, 1), 0.8, ">=")
    results.claim("rounds", tally.rounds, 1, ">=")
    results.claim("wrong_outputs", tally.wrong, 0)
    results.claim("keys_finished_twice", tally.twice, 0)
    return results.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
