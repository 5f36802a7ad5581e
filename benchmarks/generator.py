"""What regional styles cost the embedded generator: `python -m benchmarks.generator [--quick]`.

Both passes use the same weights, float32, two threads, inference mode and one image, timed in turns; the ratio is the median over turns.
The plain pass is the faster form for one code (styles folded into the kernels of the large layers).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.result import Results
from e4s_models.mobile_stylegan import CODE_DIM, NUM_LAYERS, MobileStyleGAN
from e4s_models.regions import NUM_REGIONS, Region
from tasks.stage import UInt8


def face_labels(side: int = 1024) -> UInt8:
    """A drawn face with all 12 regions: (side, side) uint8 region ids."""
    labels = np.zeros((1024, 1024), np.uint8)

    def ellipse(region: Region, centre: tuple[int, int], axes: tuple[int, int]) -> None:
        cv2.ellipse(labels, centre, axes, 0, 0, 360, int(region), -1)

    ellipse(Region.HAIR, (512, 440), (360, 400))
    ellipse(Region.NECK, (512, 960), (170, 200))
    ellipse(Region.EARS, (250, 560), (45, 90))
    ellipse(Region.EARS, (774, 560), (45, 90))
    ellipse(Region.EAR_RINGS, (245, 660), (18, 30))
    ellipse(Region.EAR_RINGS, (779, 660), (18, 30))
    ellipse(Region.SKIN, (512, 570), (260, 340))
    for x in (390, 634):
        ellipse(Region.BROWS, (x, 415), (75, 16))
        cv2.ellipse(labels, (x, 480), (90, 60), 0, 0, 360, int(Region.GLASSES), 8)
        ellipse(Region.EYES, (x, 480), (50, 22))
    ellipse(Region.NOSE, (512, 590), (60, 100))
    ellipse(Region.LIPS, (512, 745), (105, 48))
    ellipse(Region.MOUTH, (512, 745), (80, 16))
    return cv2.resize(labels, (side, side), interpolation=cv2.INTER_NEAREST).astype(np.uint8, copy=False)


def timed_in_turns(calls: Sequence[Callable[[], object]], turns: int) -> NDArray[np.float64]:
    """Seconds (turns, calls) after one warm-up turn; the order alternates, so that what else the machine does hits all alike."""
    seconds = np.zeros((turns + 1, len(calls)))
    for turn in range(turns + 1):
        for index in range(len(calls))[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            calls[index]()
            seconds[turn, index] = time.perf_counter() - start
    return seconds[1:]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.generator", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="time up to the 256 px features only, fewer turns (for the test suite)")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(2)
    results = Results("generator")
    generator = MobileStyleGAN.load()
    region_ids = torch.from_numpy(face_labels())[None]  # (1, 1024, 1024)
    with torch.inference_mode():
        z = torch.from_numpy(np.random.Generator(np.random.PCG64(0)).standard_normal((NUM_REGIONS, CODE_DIM), np.float32))
        codes = generator.map(z)  # (12, 512)
        plain = codes[:1, None].expand(1, NUM_LAYERS, CODE_DIM)
        regional = codes[None, :, None].expand(1, NUM_REGIONS, NUM_LAYERS, CODE_DIM)
        stops = (64, 256) if quick else (64, 128, 256, 512, None)
        print(f"{'up to':>8}  {'plain ms':>9}  {'regional ms':>11}  {'ratio':>6}")
        ratio = float("nan")
        for stop in stops:
            calls = (
                lambda stop=stop: generator.synthesize(plain, stop_after=stop),
                lambda stop=stop: generator.synthesize(regional, region_ids, stop_after=stop),
            )
            seconds = timed_in_turns(calls, turns=5 if quick else 11)
            ratio = float(np.median(seconds[:, 1] / seconds[:, 0]))
            first, second = np.median(seconds, axis=0) * 1e3
            print(f"{f'{stop} px' if stop else 'image':>8}  {first:9.0f}  {second:11.0f}  {ratio:6.2f}", flush=True)
        difference = 0.0
        for code in codes[: 1 if quick else 4]:
            one = generator.synthesize(code.expand(1, NUM_LAYERS, CODE_DIM))
            twelve = generator.synthesize(code.expand(1, NUM_REGIONS, NUM_LAYERS, CODE_DIM), region_ids)
            difference = max(difference, float((one - twelve).abs().max()))
    results.claim("regional_over_plain", ratio, 1.8)
    results.claim("equal_codes_difference", difference, 1e-5)
    return results.exit_code()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
