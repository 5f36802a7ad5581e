"""`e4s train`: the project's own networks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flows.commands.options import EXIT_CODES, Parser

if TYPE_CHECKING:
    from flows.commands.options import Commands


def add(commands: Commands) -> None:
    train = commands.add_parser("train", help="train the project's own networks", epilog=EXIT_CODES)
    rgi = train.add_subparsers(required=True, metavar="NETWORK", parser_class=Parser).add_parser(
        "rgi", help="the regional encoder, on synthetic people; the same command continues", epilog=EXIT_CODES
    )
    rgi.add_argument("--out", required=True, help="folder for data, checkpoints, curves, samples and the result")
    rgi.add_argument("--people", type=int, default=4096, help="synthetic people to learn from, two pictures each")
    rgi.add_argument("--head-steps", type=int, default=1500, help="steps for the 128 px head")
    rgi.add_argument("--teach-steps", type=int, default=4000, help="steps on known codes")
    rgi.add_argument("--objective-steps", type=int, default=1000, help="steps by the paper's objective, through the generator")
    rgi.add_argument("--teach-minutes", type=float, default=0.0, help="end that part by then (0: no limit)")
    rgi.add_argument("--objective-minutes", type=float, default=0.0, help="end that part by then (0: no limit)")
    rgi.add_argument("--seed", type=int, default=0, help="decides people, augmentation and order")
    rgi.add_argument("--device", default="auto", help="auto, cpu or cuda")
    rgi.set_defaults(command=_train_rgi)


def _train_rgi(arguments: argparse.Namespace) -> int:
    from flows.plan import pick_device
    from flows.server import prefect_api

    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    with prefect_api(folder / "prefect.log"):
        from flows.train_rgi import train_rgi

        train_rgi(
            out=str(folder),
            people=arguments.people,
            head_steps=arguments.head_steps,
            teach_steps=arguments.teach_steps,
            objective_steps=arguments.objective_steps,
            teach_minutes=arguments.teach_minutes,
            objective_minutes=arguments.objective_minutes,
            seed=arguments.seed,
            device=pick_device(arguments.device),
        )
    print(f"{folder / 'code_encoder.safetensors'}, curves: {folder / 'curves.png'}, samples: {folder / 'samples'}")
    return 0
