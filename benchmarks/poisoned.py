"""A batch with culprits: all other pairs and videos are finished by one command, with exit code 2, and a rerun computes nothing.

Pairs on the profile `fast`, among them a strip of 30000 x 1 px, a picture without a face, a file that is no picture, and one that makes a
stage raise. Six videos: two with the person, of which one has sound that cannot be copied, three without any face whose packets no
container of ours takes, and one that makes a stage raise. The stages that raise are backends from outside `tasks`: `align` is that of
`benchmarks.cheap`, for pairs of tiny pictures; `blend` is the pipeline's own.

    python -m benchmarks.poisoned [--pairs 40] [--frames 48] [--dask local:2] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks import cheap
from benchmarks.result import Results
from flows.synth import make_people
from storage.codec import encode_png
from storage.run import RunFiles, RunFolder
from storage.video_run import VideoRunFolder
from tasks import blend
from tasks.stage import Array, Inputs, ItemError, Outputs, Stage

GREEN = 2.5  # times as much green as red: no person has such a skin
FPS = 25
SIZE = (240, 208)  # px of the videos
BLEND = "blend=benchmarks.poisoned:blend"  # by name, also where this module is run as a program
PAIR_CULPRITS = ("strip", "faceless", "no_picture", "green")
VIDEO_CULPRITS = ("green",)


def is_poisoned(rgb: Array) -> bool:
    """Return whether a stage is to raise on this picture, RGB (H, W, 3): one that is far too green."""
    red, green, _ = np.asarray(rgb, np.float64).mean(axis=(0, 1))
    return bool(green > GREEN * max(red, 1.0))


def poison(rgb: Array) -> Array:
    """Return the picture as `is_poisoned` looks for it; faces are found in it all the same."""
    return np.asarray(rgb * np.array([0.25, 1.0, 0.6]), np.uint8)


def _align(model: Any, config: Any, batch: Sequence[Inputs]) -> Sequence[Outputs | ItemError]:
    if any(is_poisoned(inputs["image"].read().rgb8) for inputs in batch):
        raise ZeroDivisionError("a poisoned picture")
    return _ALIGN.run(model, config, batch)


def _blend(model: Any, config: Any, batch: Sequence[Inputs]) -> Sequence[Outputs | ItemError]:
    if any(is_poisoned(inputs["target_face"]) for inputs in batch):
        raise ZeroDivisionError("a poisoned picture")
    return _BLEND.run(model, config, batch)


_ALIGN = cheap.BACKENDS["benchmarks.cheap:align"]
_BLEND = blend.BACKENDS["multiband"]

BACKENDS: Mapping[str, Stage] = {
    f"benchmarks.poisoned:{stage.name}": replace(stage, backend=f"benchmarks.poisoned:{stage.name}", run=run)
    for stage, run in ((_ALIGN, _align), (_BLEND, _blend))
}


def make_pairs(folder: Path, people: Sequence[Path], pairs: int, length: int = 30_000) -> Path:
    """Write the pictures and the manifest of a batch of pairs, the last four rows of which are culprits; the strip is `length` px long."""
    folder.mkdir(parents=True, exist_ok=True)
    with Image.open(people[0]) as picture:
        green = poison(np.asarray(picture.convert("RGB").resize((512, 512))))
    made = {
        "strip": encode_png(np.zeros((1, length, 3), np.uint8)),
        "faceless": encode_png(np.full((64, 64, 3), 90, np.uint8)),
        "no_picture": b"no picture",
        "green": encode_png(green),
    }
    rows = []
    for number in range(pairs - len(PAIR_CULPRITS)):
        source, target = number % len(people), (number // len(people) + number + 1) % len(people)
        rows.append({"id": f"{number:03d}", "source": str(people[source]), "target": str(people[target])})
    for name in PAIR_CULPRITS:
        (folder / f"{name}.png").write_bytes(made[name])
        rows.append({"id": name, "source": str(people[0]), "target": f"{name}.png"})
    rows.insert(1, rows.pop())  # the culprit that raises is in the first chunk
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    return folder / "pairs.parquet"


@dataclass(frozen=True)
class Clip:
    """How a video of the batch is made."""

    codec: str
    pixels: str
    sound: str
    shows: str  # person, green or nobody


CLIPS: Mapping[str, Clip] = {
    "good.mkv": Clip("libx264", "yuv420p", "aac", "person"),
    "wmv.wmv": Clip("wmv2", "yuv420p", "wmav2", "nobody"),
    "flv.flv": Clip("flv", "yuv420p", "mp3", "nobody"),
    "green.mkv": Clip("ffv1", "yuv444p", "aac", "green"),
    "huffyuv.avi": Clip("huffyuv", "yuv422p", "adpcm_ima_wav", "nobody"),
    "qtrle.mov": Clip("qtrle", "rgb24", "pcm_alaw", "person"),
}


def make_videos(folder: Path, person: Path, frames: int) -> Path:
    """Write the videos and the manifest of a batch of videos, see `CLIPS`; ids are the files' stems."""
    folder.mkdir(parents=True, exist_ok=True)
    with Image.open(person) as picture:
        rgb = np.asarray(picture.convert("RGB").resize((SIZE[0] + 20,) * 2, Image.Resampling.BOX))
    shown = {"person": rgb, "green": poison(rgb), "nobody": cv2.GaussianBlur(rgb[::-1], (0, 0), 20)}
    for name, clip in CLIPS.items():
        _write_clip(folder / name, clip, shown[clip.shows], frames)
    lines = [f"{Path(name).stem},{person},{name}" for name in CLIPS]
    (folder / "videos.csv").write_text("\n".join(["id,source,video", *lines]) + "\n", "utf-8")
    return folder / "videos.csv"


def _write_clip(path: Path, clip: Clip, picture: Array, frames: int) -> None:
    import av

    rate = 44_100
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream(clip.codec, rate=FPS)
        video.width, video.height, video.pix_fmt = *SIZE, clip.pixels
        sound: Any = container.add_stream(clip.sound, rate=rate, layout="mono")
        sound.bit_rate = 64_000
        sound.codec_context.open()
        for index in range(frames):
            left, top = 6 + round(5 * np.sin(index / 3)), 8 + index % 3
            window = np.ascontiguousarray(picture[top : top + SIZE[1], left : left + SIZE[0]])
            frame = av.VideoFrame.from_ndarray(window, "rgb24").reformat(format=clip.pixels)
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        wave = np.sin(np.arange(rate * frames // FPS) / 30) * 3000
        to_encoder = av.AudioResampler(sound.codec_context.format, "mono", rate, sound.codec_context.frame_size or 1024)
        tone = av.AudioFrame.from_ndarray(wave.astype(np.int16)[None], "s16", "mono")
        tone.sample_rate, tone.pts, tone.time_base = rate, 0, Fraction(1, rate)
        for part in [*to_encoder.resample(tone), *to_encoder.resample(None)]:
            container.mux(sound.encode(part))
        container.mux(sound.encode(None))


def _command(kind: str, manifest: Path, run: Path, dask: str, attempts: int) -> tuple[int, float, str]:
    """Run `e4s pairs` or `e4s videos`; returns exit code, s, stderr."""
    settings = ["--profile", "fast", "--device", "cpu", "--stage", BLEND, "--max-attempts", str(attempts)]
    more = ["--no-report"] if kind == "pairs" else []
    began = time.monotonic()
    command = [sys.executable, "-m", "flows.cli", kind, str(manifest), "--run", str(run), *settings, *more]
    done = subprocess.run([*command, *(["--dask", dask] if dask else [])], capture_output=True, text=True, check=False)
    return done.returncode, time.monotonic() - began, done.stderr


def _judge(results: Results, kind: str, folder: RunFiles[Any], manifest: Path, culprits: Sequence[str], dask: str) -> None:
    code, seconds, errors = _command(kind, manifest, folder.path, dask, 1)
    rows = {row.id: row for row in folder.read_rows()}
    for name in culprits:
        print(f"{kind} {name}: {rows[name].stage}: {rows[name].reason}")
    for row in rows.values():
        if getattr(row, "note", ""):
            print(f"{kind} {row.id}: {row.note}")
    print(f"{kind}: {seconds:.0f} s, exit code {code}", flush=True)
    before = len(folder.read_log())
    again, _, more_errors = _command(kind, manifest, folder.path, dask, 1)
    computed = sum(event["items"] for event in folder.read_log()[before:] if event["event"] == "stage")
    results.claim(f"{kind}_exit_codes_other_than_2", (code != 2) + (again != 2), 0)
    results.claim(f"{kind}_others_not_done", sum(row.status != "done" for row in rows.values() if row.id not in culprits), 0)
    results.claim(f"{kind}_culprits_not_named", sum(f" {name} failed: " not in errors for name in culprits), 0)
    results.claim(f"{kind}_computed_by_a_rerun", computed, 0)
    results.claim(f"{kind}_tracebacks", (errors + more_errors).count("Traceback"), 0)


def _carry_out(work: Path, pairs: int, frames: int, dask: str) -> int:
    results = Results("poisoned")
    make_people(8, 0, work / "people")
    people = sorted((work / "people").rglob("*.png"))
    _judge(results, "pairs", RunFolder(work / "pairs"), make_pairs(work / "inputs", people, pairs), PAIR_CULPRITS, dask)
    _judge(results, "videos", VideoRunFolder(work / "videos"), make_videos(work / "films", people[1], frames), VIDEO_CULPRITS, dask)
    return results.exit_code()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--frames", type=int, default=48, help="of each video")
    parser.add_argument("--dask", default="", help="as for `e4s pairs`")
    parser.add_argument("--work", type=Path, help="an empty folder to keep; a temporary one if not given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return _carry_out(arguments.work or Path(folder), arguments.pairs, arguments.frames, arguments.dask)


if __name__ == "__main__":
    raise SystemExit(main())
