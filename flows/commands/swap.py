"""`e4s swap`: one pair, without a server."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from flows.commands.options import EXIT_CODES, add_pipeline
from tasks.stage import ItemError

if TYPE_CHECKING:
    from flows.commands.options import Commands


def add(commands: Commands) -> None:
    swap = commands.add_parser("swap", help="swap one face: SOURCE's face into TARGET's picture", epilog=EXIT_CODES)
    swap.add_argument("source", help="picture of the person whose face is wanted")
    swap.add_argument("target", help="picture whose pose, expression, light, hair and background are kept")
    swap.add_argument("-o", "--output", required=True, help="the result: a .png, .jpg or .webp file")
    swap.add_argument("--run", default="", help="keep the intermediates in this run folder (default: a temporary one)")
    add_pipeline(swap)
    swap.set_defaults(command=_swap)


def _swap(arguments: argparse.Namespace) -> int:
    from flows import api

    names = ("profile", "device", "store", "source_face", "max_pixels", "threads", "keep")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    options["target_face"] = arguments.face
    try:
        swapped = api.swap(
            arguments.source,
            arguments.target,
            arguments.output,
            run=arguments.run,
            stages=arguments.stage,
            settings=arguments.set,
            **options,
        )
    except ItemError as error:
        print(f"e4s: {error}", file=sys.stderr)
        return 2
    for sentence in swapped.lost:
        print(f"e4s: {sentence}", file=sys.stderr)
    print(f"{arguments.output}")
    return 0
