"""`e4s synth`: synthetic people and clips."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flows.commands.options import EXIT_CODES
from tasks.graph import UsageError

if TYPE_CHECKING:
    from flows.commands.options import Commands


def add(commands: Commands) -> None:
    synth = commands.add_parser("synth", help="make synthetic people to try it on", epilog=EXIT_CODES)
    synth.add_argument("--out", required=True, help="folder (people, pairs) or .mp4 file (--clip)")
    synth.add_argument("--count", type=int, help="how many people (default: as many as --pairs, at least 8)")
    synth.add_argument("--pairs", type=int, default=0, help="also write pairs.parquet with this many pairs of them")
    synth.add_argument("--clip", action="store_true", help="make a moving, sounding clip of one person instead")
    synth.add_argument("--seconds", type=float, default=3.0, help="length of the clip, s")
    synth.add_argument("--seed", type=int, default=0, help="first person's seed")
    synth.add_argument("--truncation", type=float, default=0.7, help="0 = the mean face, 1 = full variety")
    synth.set_defaults(command=_synth)


def _synth(arguments: argparse.Namespace) -> int:
    from flows.progress import counted
    from flows.synth import make_clip, make_people

    out, seed, truncation = arguments.out, arguments.seed, arguments.truncation
    try:
        with counted("frames" if arguments.clip else "people") as progress:
            if arguments.clip:
                make_clip(seed, out, seconds=arguments.seconds, truncation=truncation, progress=progress)
            else:
                count = max(8, arguments.pairs) if arguments.count is None else arguments.count
                make_people(count, seed, out, truncation=truncation, pairs=arguments.pairs, progress=progress)
    except ValueError as error:
        raise UsageError(str(error)) from None
    what = "a clip" if arguments.clip else f"{count} people" + (f" and {arguments.pairs} pairs" if arguments.pairs else "")
    print(f"{what} in {arguments.out}")
    return 0
