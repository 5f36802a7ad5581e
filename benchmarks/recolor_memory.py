"""Memory of the recolor network against resolution: `python -m benchmarks.recolor_memory [--quick]`.

Each side is measured in a process of its own, on CPU: by how much the call raises the peak of resident memory (`ru_maxrss`), with labels
of a drawn face and random colors. The region correlation (Eq. 12-13) is measured alone and within the whole network. Dense, it needs a
number per pair of pixels, 16 times as much for twice the side. Growth is stated as the exponent p of memory ~ pixels^p between the
smallest and the largest side: 1 is linear.
"""

from __future__ import annotations

import argparse
import math
import resource
import subprocess
import sys

import torch
from torch import Tensor

from benchmarks.generator import face_labels
from benchmarks.result import Results
from e4s_models.recolor_net import REGIONS, RecolorNet, attend_chunked

PARTS = ("correlation", "network")
CHANNELS = 256  # of the published features
_MIB = 1 << 20


def correlation_inputs(side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, colors and valid of `attend_chunked` for the face's largest region at `side` px, at a quarter of the side."""
    ids = torch.from_numpy(face_labels(side))[::4, ::4]
    pixels = max(int((ids == region).sum()) for region in REGIONS)
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.nn.functional.normalize(torch.randn(1, pixels, CHANNELS, generator=draw), dim=-1) for _ in range(2))
    return 5 * query, key, torch.rand(1, pixels, 3, generator=draw), torch.ones(1, pixels, dtype=torch.bool)


def dense(query: Tensor, key: Tensor, colors: Tensor) -> Tensor:
    """The correlation as the paper writes it, with the whole matrix: (1, N, C), (1, M, C), (1, M, 3) -> (1, N, 3)."""
    return torch.softmax(query @ key.transpose(1, 2), dim=-1) @ colors


def peak_of(part: str, side: int) -> int:
    """Bytes that a call needs beyond its inputs and weights; only once per process, as a process keeps its peak."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        if part == "correlation":
            query, key, colors, valid = correlation_inputs(side)
            attend_chunked(query[:, :64], key[:, :64], colors[:, :64], valid[:, :64])  # loads the kernels
            before = _peak()
            attend_chunked(query, key, colors, valid)
        else:
            network = RecolorNet().eval()
            draw = torch.Generator().manual_seed(0)
            animated, target = (torch.rand(1, 3, side, side, generator=draw) * 2 - 1 for _ in range(2))
            ids = torch.from_numpy(face_labels(side))[None]
            small = (animated[..., :64, :64], target[..., :64, :64], ids[..., :64, :64], ids[..., :64, :64])
            network(*small)
            before = _peak()
            network(animated, target, ids, ids)
    return _peak() - before


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.recolor_memory", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="the correlation alone, at 512 and 768 px (for the test suite)")
    parser.add_argument("--measure", nargs=2, metavar=("PART", "SIDE"), help=argparse.SUPPRESS)  # one measurement, in a child
    options = parser.parse_args(arguments)
    if options.measure:
        print(peak_of(options.measure[0], int(options.measure[1])))
        return 0

    results = Results("recolor_memory")
    sides, parts = ((512, 768), PARTS[:1]) if options.quick else ((256, 512, 1024), PARTS)
    peaks: dict[tuple[str, int], float] = {}
    print(
        f"{'side px':>8} {'region px':>9} {'dense matrix MiB':>16}"
        + "".join(f" {part + ' MiB':>15} {'bytes per px':>12}" for part in parts)
    )
    for side in sides:
        for part in parts:
            command = [sys.executable, "-m", "benchmarks.recolor_memory", "--measure", part, str(side)]
            peaks[part, side] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        pixels = correlation_inputs(side)[0].shape[1]
        columns = "".join(f" {peaks[part, side] / _MIB:15.0f} {peaks[part, side] / side**2:12.0f}" for part in parts)
        print(f"{side:8d} {pixels:9d} {4 * pixels**2 / _MIB:16.0f}{columns}", flush=True)
    query, key, colors, valid = correlation_inputs(256)
    with torch.inference_mode():
        blocks = attend_chunked(query, key, colors, valid, chunk=query.shape[1] ** 2 // 10)  # as many as at 1024 px
        difference = float((blocks - dense(query, key, colors)).abs().max())
    results.claim("minus_dense_at_256", difference, 1e-5)
    for part in parts:
        smallest, largest = max(peaks[part, sides[0]], 1.0), peaks[part, sides[-1]]
        exponent = math.log(max(largest, 1.0) / smallest) / math.log((sides[-1] / sides[0]) ** 2)
        results.claim(f"{part}_growth", exponent, 1.0)
    return results.exit_code()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
