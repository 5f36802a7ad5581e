"""`e4s train`: the project's own networks."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from flows.commands.options import EXIT_CODES, Parser

if TYPE_CHECKING:
    from flows.commands.options import Commands


def add(commands: Commands) -> None:
    train = commands.add_parser("train", help="train the project's own networks", epilog=EXIT_CODES)
    rgi = train.add_subparsers(required=True, metavar="NETWORK", parser_class=Parser).add_parser(
        "rgi",
        help="the regional encoder, on synthetic people; the same command continues, also with more people or steps",
        epilog=EXIT_CODES,
    )
    rgi.add_argument("--out", required=True, help="folder for data, checkpoints, curves, samples and the result")
    rgi.add_argument(
        "--people", type=int, default=4096, help="synthetic people to learn from, two pictures each (at least 48, of whom 32 are held out)"
    )
    rgi.add_argument("--head-steps", type=int, default=1500, help="steps for the 128 px head")
    rgi.add_argument("--teach-steps", type=int, default=4000, help="steps on known codes")
    rgi.add_argument("--objective-steps", type=int, default=1000, help="steps by the paper's objective, through the generator")
    rgi.add_argument("--teach-minutes", type=float, default=0.0, help="end that part by then (0: no limit)")
    rgi.add_argument("--objective-minutes", type=float, default=0.0, help="end that part by then (0: no limit)")
    rgi.add_argument("--seed", type=int, default=0, help="decides people, augmentation and order")
    rgi.add_argument("--device", default="auto", help="auto, cpu or cuda: where the objective part runs; the others run on the CPU")
    rgi.set_defaults(command=_train_rgi, continues=True)


def _train_rgi(arguments: argparse.Namespace) -> int:
    from flows.plan import pick_device
    from flows.server import prefect_api
    from flows.training.folder import TrainingSettings, opened

    folder = Path(arguments.out)
    settings = TrainingSettings(**{field.name: getattr(arguments, field.name) for field in fields(TrainingSettings)})
    device = pick_device(arguments.device)
    with opened(folder, settings), prefect_api(folder / "prefect.log"):  # a folder that cannot be used is refused before a server starts
        from flows.train_rgi import TrainingCrash, run_opened

        try:
            run_opened(folder, settings, device)
        except TrainingCrash as crash:
            print(f"e4s: {crash}", file=sys.stderr)
            return 1
    print(f"{folder / 'code_encoder.safetensors'}, curves: {folder / 'curves.png'}, samples: {folder / 'samples'}")
    return 0
