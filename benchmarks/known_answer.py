"""Swaps whose right result is known: `python -m benchmarks.known_answer --photos MANIFEST --work FOLDER [--limit N] [--ways ...]`.

A manifest with the columns source, target and truth, the picture that the result should equal: such as a person's neutral face swapped
into their own smiling picture, which is then its own answer. Reenactment, inversion, recoloring and blending are measured together, on
real skin. Only what lies inside the convex hull of the true picture's 68 landmarks counts: PSNR and SSIM in its aligned crop of 1024 px,
LPIPS in that of 256 px, the cosine of SFace between the faces found in both. Everything is kept in the folder, so the same command goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.result import Results
from benchmarks.ways import CODES, COMPOSITE, FUSED, PASTE, measure_ways, print_table
from evaluation.protocols import Protocol
from flows.inputs import read_pairs

WAYS = {way.name: way for way in (CODES, COMPOSITE, FUSED, PASTE)}
PROTOCOL = Protocol(
    name="known answer",
    source="this project",
    sample="pairs whose right result is known",
    networks={"identity": ("sface",), "answer": ("pixels_in_face",), "answer_lpips": ("lpips_alexnet_in_face",)},
)
LINES = (
    ("truth_psnr", "pixels_in_face", ">="),
    ("truth_ssim", "pixels_in_face", ">="),
    ("truth_lpips", "lpips_alexnet_in_face", "<="),
    ("truth_cosine", "sface", ">="),
)
"""Metric, network, and how `fused` has to stand beside `composite`."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, metavar="MANIFEST", help="with the columns source, target, truth")
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and features; kept between calls")
    parser.add_argument("--limit", type=int, default=0, help="pairs, the first ones (default: all)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--profile", default="mobile")
    chosen = parser.parse_args(arguments)
    if not all(pair.truth for pair in read_pairs(str(chosen.photos)) if not pair.problem):
        parser.error(f"{chosen.photos}: the manifest has no column truth; add one with the pictures that the results should equal")
    ways = [WAYS[name] for name in chosen.ways]
    measured = measure_ways(ways, chosen.photos, chosen.work.absolute(), PROTOCOL, limit=chosen.limit, profile=chosen.profile)
    print("PSNR and SSIM inside the face at 1024 px, LPIPS inside the face at 256 px, all against the true picture")
    means = print_table(measured, [(metric, network) for metric, network, _ in LINES])
    results = Results("known_answer")
    for metric, network, direction in LINES:
        found = means.get((metric, network), {})
        if found.keys() >= {"fused", "composite"}:
            results.claim(f"{metric}_fused_minus_composite", found["fused"] - found["composite"], 0.0, direction)  # type: ignore[arg-type]
    return results.exit_code()


if __name__ == "__main__":
    sys.exit(main())
