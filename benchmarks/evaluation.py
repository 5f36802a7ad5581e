"""What an evaluation costs: memory as a run grows, and faces in batches against one at a time for every feature network.

Memory: runs of 100 and of 1000 pairs with a different output each, evaluated in processes of their own (so the peaks are theirs alone); the
pictures show four synthetic people at 256 px, every output is one of them with its own pixel changed, and the networks are a cheap one and
the one with the largest features (`sface`, 128 numbers, and `inception_fid_helper`, 2048). Every pair is aligned and goes through both.
A repeated evaluation must compute nothing. Batches: the same aligned crops of 1024 px through each network's stage, warm, alternating,
minima. On a CPU networks see one face at a time by design, so the ratio is printed only; on a GPU it is claimed for those that run there.

    python -m benchmarks.evaluation [--quick] [--device auto] [--repeats 5]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.result import Results
from e4s_models.face_crops import FFHQ_LANDMARKS
from evaluation.features import NETWORKS, FeatureNetwork
from evaluation.protocols import Protocol
from flows.evaluate import evaluate
from flows.execution.process import use_threads
from flows.feature_stages import FeatureConfig, feature_config, feature_stage
from flows.plan import pick_device
from flows.synth import make_people
from storage.codec import encode_png
from storage.run import Row, RunFolder
from tasks.frame import MAX_PIXELS, Frame, ImageFile, hash_file
from tasks.runner import cpu_threads
from tasks.stage import Array, ItemError, Outputs, UInt8

MEMORY = {  # size -> (pairs of the small run, of the large one, networks)
    "quick": (4, 12, ("sface",)),
    "full": (100, 1000, ("sface", "inception_fid_helper")),
}
QUICK = ("sface", "blendshapes", "pixels")  # networks that the quick size times
SIDE = 256  # px of the pictures for the memory part


def read_picture(path: Path) -> UInt8:
    """RGB (H, W, 3) uint8."""
    return ImageFile(str(path), hash_file(str(path))).read().rgb8


def make_run(path: Path, people: Sequence[Path], pairs: int) -> None:
    """A finished run whose outputs all differ."""
    folder = RunFolder(path)
    folder.create()
    folder.write_settings({"e4s": version("e4s"), "store": "", "request": {"max_pixels": MAX_PIXELS}})
    pictures = [np.asarray(cv2.resize(read_picture(person), (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.uint8) for person in people]
    small = []
    for number, picture in enumerate(pictures):
        small.append(path / f"person{number}.png")
        small[-1].write_bytes(encode_png(picture))
    digests = [hash_file(str(picture)) for picture in small]
    rows = []
    for number in range(pairs):
        source, target = number % len(people), (number + 1) % len(people)
        output = pictures[target].copy()
        output[number // SIDE, number % SIDE] ^= 128  # a corner of the background: another picture, the same face
        file = path / f"outputs/{number:06d}.png"
        file.write_bytes(encode_png(output))
        rows.append(
            Row(
                id=f"{number:06d}",
                source=str(small[source]),
                target=str(small[target]),
                source_sha256=digests[source],
                target_sha256=digests[target],
                status="done",
                output=f"outputs/{file.name}",
                output_sha256=hash_file(str(file)),
                output_size=file.stat().st_size,
            )
        )
    folder.write_rows(rows)


def measure_run(path: Path, networks: Sequence[str], device: str) -> tuple[float, int, int]:
    """Evaluate a run twice: peak memory of this process in MB, features computed first and again. Once per process: it keeps its peak."""
    kinds = {kind: tuple(name for name in networks if NETWORKS[name].kind == kind) for kind in {NETWORKS[name].kind for name in networks}}
    protocols = [Protocol(name="memory", source="", sample="", networks=kinds)]
    evaluation = evaluate(RunFolder(path), protocols, device)
    if evaluation.no_face or evaluation.unusable:
        raise RuntimeError(f"pairs could not be measured: {evaluation.no_face or evaluation.unusable}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    again = evaluate(RunFolder(path), protocols, device)
    return peak / (1e6 if sys.platform == "darwin" else 1e3), sum(evaluation.computed.values()), sum(again.computed.values())


def in_its_own_process(path: Path, networks: Sequence[str], device: str) -> tuple[float, int, int]:
    command = [sys.executable, "-X", "faulthandler", "-m", "benchmarks.evaluation", "--device", device, "--measure", str(path), *networks]
    peak, computed, again = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return float(peak), int(computed), int(again)


@dataclass(frozen=True)
class Held:
    """A picture that is decoded already, as the runner hands them over."""

    frame: Frame

    def read(self) -> Frame:
        return self.frame


def inputs_of(network: FeatureNetwork, people: Sequence[Path], count: int) -> list[dict[str, Any]]:
    """What the network's stage reads of `count` aligned faces, 1024 px; two compared pictures differ a little everywhere."""
    faces = [read_picture(people[number % len(people)]) for number in range(count)]
    if NETWORKS[network.name].load:
        return [{"face": face, "landmarks": FFHQ_LANDMARKS.numpy()} for face in faces]
    regions = np.zeros((1024, 1024), np.uint8)  # all background: all of it counts
    return [
        {"image": Held(Frame(np.bitwise_xor(face, np.uint8(8)))), "face": face, "regions": regions, "crop_to_frame": np.eye(3)}
        for face in faces
    ]


def batches(network: FeatureNetwork, people: Sequence[Path], count: int, device: str, repeats: int) -> tuple[float, float, float]:
    """Seconds per face one at a time, in one batch, and the largest difference of features, relative to the largest."""
    import torch

    stage, config = feature_stage(network), FeatureConfig(**feature_config(network))
    model = stage.load(config, device if network.device == "any" else "cpu")
    inputs = inputs_of(network, people, count)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            made = {}
            for batched in (False, True):
                began = time.perf_counter()
                made[batched] = stage.run(model, config, inputs) if batched else [stage.run(model, config, [one])[0] for one in inputs]
                if repeat:  # the first is warming up
                    seconds[batched].append((time.perf_counter() - began) / count)
    alone, together = (np.stack([_features(row) for row in made[batched]]) for batched in (False, True))
    return min(seconds[False]), min(seconds[True]), float(np.abs(alone - together).max() / np.abs(alone).max())


def _features(outputs: Outputs | ItemError) -> Array:
    if isinstance(outputs, ItemError):
        raise outputs
    return outputs["features"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="12 pairs over 4 and three networks, batches of 2 (for the test suite)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", nargs="+", metavar=("RUN", "NETWORK"), help=argparse.SUPPRESS)  # one measurement, in a child
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    if arguments.measure:
        print(*measure_run(Path(arguments.measure[0]), arguments.measure[1:], device))
        return 0

    results = Results("evaluation")
    use_threads(cpu_threads())
    few, many, networks = MEMORY["quick" if arguments.quick else "full"]
    count, repeats = (2, 1) if arguments.quick else (16 if device == "cuda" else 4, arguments.repeats)
    with tempfile.TemporaryDirectory(prefix="e4s-bench-") as temporary:
        root = Path(temporary)
        make_people(2 if arguments.quick else 4, 0, root / "people")
        people = sorted((root / "people").rglob("*.png"))
        peaks = {}
        for pairs in (few, many):
            make_run(root / f"run{pairs}", people, pairs)
            began = time.perf_counter()
            peaks[pairs], computed, again = in_its_own_process(root / f"run{pairs}", networks, device)
            seconds = time.perf_counter() - began
            print(f"{pairs} pairs: peak {peaks[pairs]:.0f} MB, {computed} features of {', '.join(networks)} in {seconds:.0f} s", flush=True)
            if computed < pairs * len(networks):
                raise RuntimeError(f"only {computed} features were computed for {pairs} different outputs")
        ratios, differences = {}, {}
        print(f"{'network':<22} {'on':<5} {'one at a time':>14} {f'batch of {count}':>14} {'ratio':>6} {'difference':>11}   (ms per face)")
        for network in NETWORKS.values():
            if arguments.quick and network.name not in QUICK:
                continue
            if network.missing():
                print(f"{network.name:<22} not here: {network.missing()}")
                continue
            alone, together, difference = batches(network, people, count, device, repeats)
            on = device if network.device == "any" else "cpu"
            print(f"{network.name:<22} {on:<5} {1e3 * alone:14.1f} {1e3 * together:14.1f} {alone / together:6.2f} {difference:11.1e}")
            differences[network.name] = difference
            if on == "cuda":
                ratios[network.name] = alone / together
    results.claim("memory_large_over_small_run", peaks[many] / peaks[few], 1.2)
    results.claim("features_computed_again", float(again), 0.0)
    results.claim("batch_difference", max(differences.values()), 0.0 if device == "cpu" else 1e-3)
    for name, ratio in ratios.items():
        results.claim(f"batched_over_single_{name}", ratio, 3.0, ">=")
    return results.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
