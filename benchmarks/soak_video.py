"""Killed again and again in the middle of a video, the same command ends with the same bytes: the real `e4s videos` under SIGKILL.

The command is killed with its whole process group at a random moment after its first pass began (`benchmarks.killing`). In the end the
file's bytes, its row and its list of frames must be those of an undisturbed run, and nothing that was finished may have been made again: no
key stands in the index twice.

    python -m benchmarks.soak_video [--kills 20] [--frames 120] [--seed 0] [--work FOLDER] [--quick]

With --work the same command goes on after Ctrl-C. The person and the clip are synthetic, the profile is `fast`. One Prefect server serves
all starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.killing import Soak, Tally, carry_out, soak_options
from benchmarks.result import Results
from flows.synth import make_clip, make_people
from storage.store import write_atomic
from storage.video_run import VideoRow, VideoRunFolder

FPS, SIDE = 24, 256  # of the clip; px
GOP = 24  # frames: what a kill may cost at most


@dataclass
class VideoTally(Tally):
    wrong: int = 0  # outputs or rows that differ from the undisturbed run's


AnyVideoTally = TypeVar("AnyVideoTally", bound=VideoTally)


class BaseVideoSoak(Soak[AnyVideoTally, VideoRunFolder]):
    """A soak of `e4s videos`, whatever the faults are."""

    run_kind = VideoRunFolder
    share = 3

    def __init__(self, work: Path, kills: int, seed: int, frames: int) -> None:
        super().__init__(work, kills, seed, frames=frames)
        self.frames, self.manifest = frames, work / "videos.csv"

    def make_inputs(self) -> None:
        if not self.manifest.exists():
            make_people(1, self.seed, self.work / "people")
            make_clip(self.seed + 1, self.work / "clip.mp4", seconds=self.frames / FPS, fps=FPS, size=SIDE)
            write_atomic(self.manifest, b"source,video\npeople/people/000000.png,clip.mp4\n")

    def command(self, run: Path) -> list[str]:
        return ["videos", str(self.manifest), "--run", str(run), "--profile", "fast", "--device", "cpu", "--set", f"output.gop={GOP}"]

    def judge(self, run: VideoRunFolder) -> int:
        mine, whole = ([_told(row, folder) for row in folder.read_rows()] for folder in (run, self.whole))
        wrong = (mine != whole) + (not run.read_frames("000000").equals(self.whole.read_frames("000000")))
        self.tally.wrong += wrong
        return wrong

    def claim(self, results: Results) -> None:
        results.claim("wrong_outputs", self.tally.wrong, 0)


class VideoSoak(BaseVideoSoak[VideoTally]):
    """The command is killed."""

    name = "soak_video"
    tally_kind = VideoTally


def _told(row: VideoRow, folder: VideoRunFolder) -> tuple[object, ...]:
    """What must not depend on kills: the output's own bytes, and what is said of it."""
    data = (folder.path / row.output).read_bytes() if row.output else b""
    return row.id, row.status, row.frames, row.swapped, row.passed, row.failed, row.output, row.output_sha256, row.key, data


def main() -> int:
    parser = soak_options(__doc__, kills=20, quick="2 kills, 36 frames")
    parser.add_argument("--frames", type=int, default=120)
    arguments = parser.parse_args()
    kills, frames = (2, 36) if arguments.quick else (arguments.kills, arguments.frames)
    return carry_out(arguments.work, lambda work: VideoSoak(work, kills, arguments.seed, frames))


if __name__ == "__main__":
    raise SystemExit(main())
