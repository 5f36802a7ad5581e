"""What `e4s videos` costs beside its stages, whether its memory grows with a video's length, and how steady its output is.

memory: the flow on a short and on a ten times longer video, each in a process of its own, at 256 px, with the swap itself replaced by
identity (`benchmarks.pass_through`): decoding, detection, tracking, pasting, encoding, storing and joining are real.
overhead: the flow on a video, planning included, over the sum of its stages' own times, taken in a plain loop that calls them. Warm
models, the same threads, one frame at a time; the bytes of both outputs are compared. Meshes, labels and colours are not smoothed over time
here, as they look at other frames.
jitter: landmarks of the output over those of the input on a synthetic clip, found anew in both, with smoothing off and on.
parallel: the same clip with one and with two worker processes (`--dask local:N`), one thread each, groups of 48 frames: how much faster two
are from the first step to the end of the run, and what the processes did in that time. The bytes of both outputs are compared.

    python -m benchmarks.video [memory] [overhead] [jitter] [parallel] [--quick] [--frames 3000] [--video-frames 60] [--clip-frames 75]
        [--parallel-frames 192] [--repeats 3]
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from benchmarks.pass_through import BACKENDS as PASS_THROUGH
from benchmarks.result import Results
from e4s_models.video_faces import VideoFaceDetector
from evaluation.video import landmark_jitter
from flows.execution.process import use_threads
from flows.server import prefect_api
from flows.stages import FRAME_RESULT
from flows.synth import make_clip, make_people, write_mp4
from flows.video_plan import VideoPlan, VideoRequest, make_video_plan
from storage.video_run import VideoRunFolder
from tasks.runner import Worker, cpu_threads
from tasks.stage import ItemError, UInt8
from tasks.steady import aligned
from tasks.video import Playhead, probe, read_frames
from tasks.video_pass import Still, Way, detect_range, detect_ranges, put_back, track_person
from tasks.video_write import chunk_ranges, encode_group, join

PARTS = ("memory", "overhead", "jitter", "parallel")
MB = 1_000_000
Made = TypeVar("Made")


def make_long(base: Path, out: Path, frames: int, fps: int) -> None:
    """Repeat a clip, which ends where it begins, until it has that many frames; with sound."""
    table = probe(str(base))
    pictures: list[UInt8] = [frame.rgb8() for frame in read_frames(str(base), table, 0, len(table))]
    write_mp4(out, itertools.islice(itertools.cycle(pictures), frames), frames, fps, table.width)


def video_detector() -> VideoFaceDetector:
    return cast(VideoFaceDetector, VideoFaceDetector.load())


ALONE = ["smooth.mesh=0", "smooth.mask=0", "smooth.light=0"]
"""Settings under which no frame looks at others but for its crop."""


def write_manifest(folder: Path, people: Path, video: Path) -> Path:
    """A manifest of one video."""
    manifest = folder / f"{video.stem}.csv"
    manifest.write_text(f"source,video\n{people / 'people/000001.png'},{video}\n", "utf-8")
    return manifest


def without_a_flow(request: VideoRequest) -> None:
    """Carry a run out, without Prefect."""
    from flows.video_engine import execute_videos

    plan = make_video_plan(request)
    try:
        summary = execute_videos(plan)
    finally:
        plan.close()
    if summary.exit_code:
        raise RuntimeError(f"the run did not finish: {summary}")


# -- memory ------------------------------------------------------------------------------------------------------------------------------


def peak_memory(manifest: Path, run: Path) -> float:
    """Peak of resident memory of the flow, MB, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.video", "--one", str(manifest), str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.splitlines()[-1])


def run_once(manifest: str, run: str) -> float:
    """The flow in this process; returns its peak of resident memory, MB. The Prefect server is another process and not counted."""
    backends = [*(f"{stage.name}={name}" for name, stage in PASS_THROUGH.items()), "inpaint=none"]
    plan = make_video_plan(VideoRequest(manifest=manifest, run=run, profile="fast", device="cpu", stages=backends))
    try:
        with prefect_api(plan.folder.path / "prefect.log"):
            from flows.videos import run_planned  # loads prefect, which reads the server's address then

            summary = run_planned(plan, lambda done, total, part: None)
    finally:
        plan.close()
    if summary.exit_code:
        raise RuntimeError(f"the flow did not finish: {summary}")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MB


def measure_memory(folder: Path, people: Path, frames: int, results: Results) -> None:
    """Claim how much the peak grows from a tenth of the frames to all."""
    base = make_clip(0, folder / "base.mp4", seconds=min(24, frames // 10) / 24, fps=24, size=256)
    peaks = []
    for count in (max(frames // 10, 1), frames):
        video = folder / f"long{count}.mp4"
        make_long(base, video, count, 24)
        began = time.perf_counter()
        peaks.append(peak_memory(write_manifest(folder, people, video), folder / f"memory{count}"))
        print(f"{count} frames: peak {peaks[-1]:.0f} MB, {time.perf_counter() - began:.0f} s", flush=True)
    results.claim("memory_long_over_short", peaks[1] / peaks[0], 1.1)


# -- overhead ----------------------------------------------------------------------------------------------------------------------------


class Stages:
    """Seconds of each stage's own work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def __call__(self, name: str, work: Callable[[], Made]) -> Made:
        began = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[name] += time.perf_counter() - began

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def plain_loop(plan: VideoPlan, out: Path) -> Stages:
    """Every stage of a plan's one video in order, called directly; nothing is stored but the result."""
    (row,) = plan.rows.values()
    graph, configs, stages = plan.graph, plan.configs, Stages()
    models = {node.name: Worker(graph, plan.store).model(node.name) for node in graph.nodes}
    detector = video_detector()
    table = stages("probe", lambda: probe(row.video, configs.probe))
    playhead = Playhead(row.video, table)
    parts = []
    for start, stop in detect_ranges(len(table)):
        frames = playhead.frames(start, min(stop + 1, len(table)))
        parts.append(stages("detect", lambda frames=frames, a=start, b=stop: detect_range(detector, frames, a, b)))  # type: ignore[misc]
    min_face = graph.configs["align"].min_face
    way = Way.of(stages("track", lambda: track_person(parts, len(table), 0, configs.track, configs.smooth, min_face, None)))
    shared: dict[tuple[str, str], Any] = {}

    def swapped(frame: int, still: Still) -> Any:
        item = plan.item(row, frame, table.frame_id(frame), {("align", "target"): f"of frame {frame}"})
        crop = stages("align", lambda: aligned(still.rgb, way.crops, frame, graph.configs["align"].side))
        place = graph.works(item)["align", "target"].key
        values: dict[tuple[str, str], Any] = {(item.images["target"].sha256, "image"): still, **shared}
        values |= {(place, name): value for name, value in crop.items()}
        values[item.images["source"].sha256, "image"] = _opened(row.source, row.source_sha256)
        for (node, role), work in graph.works(item).items():
            stage = graph.stages[node]
            if all((work.key, name) in values for name in stage.writes):
                continue
            inputs = {**{name: values[ref] for name, ref in work.reads.items()}, **work.constants}
            (outputs,) = stages(node, lambda s=stage, n=node, i=inputs: s.run(models[n], graph.configs[n], [i]))  # type: ignore[misc]
            if isinstance(outputs, ItemError):
                raise outputs
            made = {(work.key, name): value for name, value in outputs.items()}
            values |= made
            if role == "source":
                shared.update(made)
        key = graph.works(item)[FRAME_RESULT[0], ""].key
        return stages("paste", lambda: put_back(still, values[key, "inpainted"], values[key, "mask"], crop["crop_to_frame"], configs.paste))

    segments = []
    for start, stop in chunk_ranges(len(table), 1, configs.output):
        planes = stages("decode", lambda a=start, b=stop: list(playhead.frames(a, b)))  # type: ignore[misc]
        pictures = [swapped(frame, Still(row.video, one)) for frame, one in enumerate(planes, start)]
        segments.append(stages("encode", lambda a=start, p=pictures: encode_group(table, a, p, configs.output)))  # type: ignore[misc]
    stages("join", lambda: join(table, row.video, segments, out, configs.output))
    playhead.close()
    return stages


def _opened(path: str, sha256: str) -> Any:
    from tasks.frame import ImageFile

    return ImageFile(path, sha256)


def the_flow(request: VideoRequest) -> float:
    """The flow on a fresh run folder against the running server: seconds, planning included."""
    from flows.videos import run_planned

    began = time.perf_counter()
    plan = make_video_plan(request)
    try:
        summary = run_planned(plan, lambda done, total, part: None)
    finally:
        plan.close()
    if summary.exit_code:
        raise RuntimeError(f"the flow did not finish: {summary}")
    return time.perf_counter() - began


def measure_overhead(folder: Path, people: Path, frames: int, repeats: int, results: Results) -> None:
    """Claim what the flow takes over its stages, both sides in turn."""
    video = make_clip(0, folder / "video.mp4", seconds=frames / 25, fps=25, size=320)
    warm_video = make_clip(0, folder / "warm.mp4", seconds=2 / 25, fps=25, size=320)
    manifests = {each: write_manifest(folder, people, each) for each in (video, warm_video)}

    def request(name: str, each: Path = video) -> VideoRequest:
        return VideoRequest(manifest=str(manifests[each]), run=str(folder / name), profile="fast", device="cpu", workers=1, changes=ALONE)

    def loop(name: str, each: Path = video) -> Stages:
        plan = make_video_plan(request(name, each))
        try:
            return plain_loop(plan, folder / f"{name}.out")
        finally:
            plan.close()

    with prefect_api(folder / "prefect.log"):
        loop("warm-loop", warm_video)
        the_flow(request("warm-flow", warm_video))  # the first flow of a process imports and connects
        ratios, processors = [], []
        for repeat in range(repeats):
            processor = [time.process_time()]
            stages = loop(f"loop{repeat}")
            processor.append(time.process_time())
            flow = the_flow(request(f"flow{repeat}"))
            processor.append(time.process_time())
            ratios.append(flow / stages.total)
            processors.append((processor[2] - processor[1]) / (processor[1] - processor[0]))
            most = ", ".join(f"{name} {spent:.2f} s" for name, spent in sorted(stages.seconds.items(), key=lambda entry: -entry[1])[:5])
            print(f"{repeat}: stages {stages.total:.2f} s ({most}), flow {flow:.2f} s: {ratios[-1]:.3f}, {frames} frames", flush=True)
    print(f"CPU time of the flow's process over that of the loop, which a busy machine disturbs less: {statistics.median(processors):.3f}")
    same = (folder / "loop0.mp4").read_bytes() == next((folder / "flow0/outputs").iterdir()).read_bytes()
    results.claim("same_bytes", float(same), 1.0, ">=")
    results.claim("flow_over_stages", statistics.median(ratios), 1.15)


# -- jitter ------------------------------------------------------------------------------------------------------------------------------


def landmarks_of(video: Path) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Landmarks (T, 68, 2) px of the largest face of every frame, searched in the whole frame, and whether there is one (T,)."""
    table = probe(str(video))

    def pictures() -> Iterator[UInt8]:
        return (frame.rgb8() for frame in read_frames(str(video), table, 0, len(table)))

    found = list(video_detector().detect_chunk(pictures(), len(table)))
    points = np.stack([faces[0].landmarks if faces else np.full((68, 2), np.nan) for faces in found]).astype(np.float64)
    return points, np.array([bool(faces) for faces in found])


def measure_jitter(folder: Path, people: Path, frames: int, results: Results) -> None:
    """Claim how steady the output's landmarks are beside the input's."""
    clip = make_clip(3, folder / "clip.mp4", seconds=frames / 25, fps=25, size=512)
    base = VideoRequest(
        manifest=str(write_manifest(folder, people, clip)), run="", profile="fast", device="cpu", store=str(folder / "store")
    )
    before, seen = landmarks_of(clip)
    ratios: dict[str, float] = {}
    for name, changes in (("off", [f"smooth.{setting}=0" for setting in ("centre", "axes", "landmarks")] + ALONE), ("on", [])):
        without_a_flow(replace(base, run=str(folder / f"smooth-{name}"), changes=changes))
        after, kept = landmarks_of(next((folder / f"smooth-{name}/outputs").iterdir()))
        both = seen & kept
        values = [landmark_jitter(points, both).value for points in (before, after)]
        if values[0] is None or values[1] is None:
            raise RuntimeError("no three frames in a row show a face")
        ratios[name] = values[1] / values[0]
        said = f"landmark jitter {values[0]:.3f} % of the eye distance in the input, {values[1]:.3f} % in the output"
        print(f"smoothing {name}: {said}: {ratios[name]:.3f} times, {int(both.sum())} frames", flush=True)
    results.claim("jitter_output_over_input", ratios["on"], 1.3)
    results.claim("jitter_smoothed_over_not", ratios["on"] / ratios["off"], 1.0)


# -- parallel ----------------------------------------------------------------------------------------------------------------------------


def with_processes(manifest: Path, run: Path, processes: int, gop: int) -> float:
    """The clip on so many workers: s from the first step to the end; prints where the time went."""
    changes, dask = [f"output.gop={gop}"], f"local:{processes}"
    without_a_flow(VideoRequest(manifest=str(manifest), run=str(run), profile="fast", device="cpu", changes=changes, threads=1, dask=dask))
    events = VideoRunFolder(run).read_log()
    first = next(event["time"] for event in events if event["event"] == "stage")  # the probe: workers are there and load models from here
    end = events[-1]["time"]
    ends = {event["stage"]: event["time"] for event in events if event["event"] == "stage"}
    own: dict[str, float] = defaultdict(float)  # seconds by pass; the stages of its frames count for `segment`
    for event in events:
        if event["event"] == "stage":
            own[event["stage"] if event["stage"] in ("probe", "detect", "track") else "segment"] += event["seconds"]
    busy = sum(own.values())
    walls = {"detect": ends["detect"] - first, "segment": ends["segment"] - ends["track"], "join and end": end - ends["segment"]}
    said = ", ".join(f"{name} {wall:.1f} s ({own.get(name, 0.0) / wall / processes:.0%} busy)" for name, wall in walls.items())
    print(f"{processes} processes: {end - first:.1f} s, of these {said}; in stages {busy:.1f} s", flush=True)
    return float(end - first)


def measure_parallel(folder: Path, people: Path, frames: int, repeats: int, results: Results) -> None:
    """Claim how much faster two worker processes are than one, both in turn."""
    clip = make_clip(0, folder / "parallel.mp4", seconds=frames / 25, fps=25, size=320)
    manifest = write_manifest(folder, people, clip)
    gop = max(12, min(48, frames // 4))  # as set by default, where the clip is long enough for several groups
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for repeat in range(repeats):
        for count, found in seconds.items():
            found.append(with_processes(manifest, folder / f"parallel{count}-{repeat}", count, gop))
    one, two = (next((folder / f"parallel{count}-0/outputs").iterdir()).read_bytes() for count in seconds)
    results.claim("parallel_same_bytes", float(one == two), 1.0, ">=")
    results.claim("second_worker_speedup", min(seconds[1]) / min(seconds[2]), 1.5, ">=")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure (default: everything)")
    parser.add_argument("--quick", action="store_true", help="6 and 60 frames, 3 frames once, 6 frames, 24 frames once")
    parser.add_argument("--frames", type=int, default=3000, help="of the long video whose memory is measured; the short one has a tenth")
    parser.add_argument("--video-frames", type=int, default=60, help="of the video whose overhead is measured")
    parser.add_argument("--clip-frames", type=int, default=75, help="of the clip whose jitter is measured")
    parser.add_argument("--parallel-frames", type=int, default=192, help="of the clip that one and two processes work on")
    parser.add_argument("--repeats", type=int, default=3, help="of the overhead and of the parallel runs")
    parser.add_argument("--one", nargs=2, metavar=("MANIFEST", "RUN"), help=argparse.SUPPRESS)  # one measurement, in a child
    options = parser.parse_args(arguments)
    if options.one:
        print(run_once(*options.one))
        return 0
    if options.quick:
        options.frames, options.video_frames, options.clip_frames, options.repeats = 60, 3, 6, 1
        options.parallel_frames = 24
    results = Results("video")
    use_threads(cpu_threads())
    with tempfile.TemporaryDirectory(prefix="e4s-bench-") as temporary:
        folder = Path(temporary)
        people = folder / "people"
        make_people(2, 10, people)
        for part in options.parts or PARTS:
            if part == "memory":
                measure_memory(folder, people, options.frames, results)
            elif part == "overhead":
                measure_overhead(folder, people, options.video_frames, options.repeats, results)
            elif part == "jitter":
                measure_jitter(folder, people, options.clip_frames, results)
            else:
                measure_parallel(folder, people, options.parallel_frames, options.repeats, results)
    return results.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
