"""What bfloat16 costs the published networks in accuracy, on CPU: `python -m benchmarks.precision [--reference DIR] [--quick]`.

Every network that has reference vectors in DIR is filled as they say, and run on their first case in float32 and under bfloat16 autocast.
The error of an output is its largest difference over the largest absolute value of the float32 result; of integers, the share that
differs. Filled weights are noise, so that errors grow as they would not with trained ones: this is a table without targets.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from e4s_models.published import PUBLISHED, Array, Check, compare, filled_state, load_published, published

DATA = Path(__file__).parents[1] / "tests" / "data"
QUICK = ("hopenet", "irse50")


class NumpyFromBfloat16(TorchFunctionMode):
    """Lets a network's runner turn bfloat16 outputs into NumPy arrays, which have no such type."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is torch.Tensor.numpy and args[0].dtype == torch.bfloat16:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


def measure(folder: Path, names: tuple[str, ...]) -> Iterator[Check | str]:
    """A check per output of every network with a case in `folder`, or a sentence where bfloat16 does not run."""
    for name in names:
        cases = sorted(folder.glob(f"{name}_*.npz"))
        if not cases:
            continue
        with np.load(cases[0], allow_pickle=False) as stored:
            case: dict[str, Array] = dict(stored)
        declared, spec = published(name), json.loads((folder / f"{name}.json").read_text("utf-8"))
        network = load_published(declared, filled_state(declared, spec, case))
        with torch.inference_mode():
            exact = declared.run(network, case)
            try:
                with torch.autocast("cpu", torch.bfloat16), NumpyFromBfloat16():
                    lower = declared.run(network, case)
            except RuntimeError as error:
                yield f"{name}: does not run in bfloat16 ({str(error).splitlines()[0]})"
                continue
        for output, value in lower.items():
            yield compare(name, cases[0].stem, output, value, exact[output])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.precision", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--reference", type=Path, default=DATA, help="folder of NAME.json and NAME_caseN.npz (default: those of the tests)")
    parser.add_argument("--quick", action="store_true", help="two small networks (for the test suite)")
    options = parser.parse_args(arguments)
    measured = 0
    print(f"{'network':>12} {'output':>20} {'bfloat16 error':>14}")
    for found in measure(options.reference, QUICK if options.quick else tuple(PUBLISHED)):
        if isinstance(found, str):
            print(found)
            continue
        measured += 1
        print(f"{found.network:>12} {found.output:>20} {found.error:14.2g}", flush=True)
    if not measured:
        print(f"no reference vectors in {options.reference}: give a folder that holds NAME.json and NAME_case0.npz")
    return int(not measured)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
