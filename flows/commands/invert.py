"""`e4s invert`: one picture to style codes and back."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flows.commands.options import EXIT_CODES, add_settings
from tasks.stage import ItemError

if TYPE_CHECKING:
    from flows.commands.options import Commands


def add(commands: Commands) -> None:
    invert = commands.add_parser("invert", help="a picture -> style codes -> the picture again, with metrics", epilog=EXIT_CODES)
    invert.add_argument("image", help="picture with a face")
    invert.add_argument(
        "-o", "--output", required=True, help="folder for face.png, reconstruction.png, side_by_side.png, codes.npz, metrics.json"
    )
    add_settings(invert)
    invert.add_argument("--face", type=int, default=0, help="which face of the picture, 0 = largest")
    invert.set_defaults(command=_invert, profile="codes")


def _invert(arguments: argparse.Namespace) -> int:
    from flows.invert import invert

    try:
        metrics = invert(
            arguments.image,
            arguments.output,
            profile=arguments.profile,
            stages=arguments.stage,
            changes=arguments.set,
            device=arguments.device,
            face=arguments.face,
            max_pixels=arguments.max_pixels,
        )
    except ItemError as error:
        print(f"e4s: {error}", file=sys.stderr)
        return 2
    print(f"{Path(arguments.output) / 'side_by_side.png'}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    return 0
