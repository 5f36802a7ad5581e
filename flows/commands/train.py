"""`e4s train`: the project's own networks."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from flows.commands.options import EXIT_CODES, Parser
from flows.training.recipes import RECIPES

if TYPE_CHECKING:
    from flows.commands.options import Commands


def add(commands: Commands) -> None:
    train = commands.add_parser("train", help="train the project's own networks", epilog=EXIT_CODES)
    networks = train.add_subparsers(required=True, metavar="NETWORK", parser_class=Parser)
    rgi = networks.add_parser(
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
    rgi.add_argument("--teach-batch", type=int, default=16, help="pictures in each of the steps on known codes")
    rgi.add_argument("--objective-batch", type=int, default=4, help="pictures in each of the steps through the generator")
    rgi.add_argument("--teach-minutes", type=float, default=0.0, help="end that part by then (0: no limit)")
    rgi.add_argument("--objective-minutes", type=float, default=0.0, help="end that part by then (0: no limit)")
    rgi.add_argument("--seed", type=int, default=0, help="decides people, augmentation and order")
    rgi.add_argument("--device", default="auto", help="auto, cpu or cuda: where the objective part runs; the others run on the CPU")
    rgi.set_defaults(command=_train_rgi, network="rgi", continues=True)
    for name, entry in RECIPES.items():
        _add_network(networks, name, entry.help)


def _add_network(networks: Commands, name: str, text: str) -> None:
    """A command for one of the small networks: all take the same options."""
    network = networks.add_parser(name, help=text, epilog=EXIT_CODES)
    network.add_argument("--out", required=True, help="folder for checkpoint, curves, samples and the result")
    network.add_argument("--data", help="folder of training faces, which several trainings may share (default: data in --out)")
    network.add_argument("--photos", type=Path, help="folder of portraits to learn from beside synthetic people")
    network.add_argument("--people", type=int, default=640, help="synthetic people to learn from (at least 48, of whom 32 are held out)")
    network.add_argument("--steps", type=int, default=10000, help="steps of the training")
    network.add_argument("--minutes", type=float, default=0.0, help="end by then (0: no limit)")
    network.add_argument("--seed", type=int, default=0, help="decides people, augmentation and order")
    network.add_argument("--device", default="auto", help="auto, cpu or cuda: where the network runs; faces are drawn on the CPU")
    network.set_defaults(command=_train_network, network=name, continues=True)


def _train_rgi(arguments: argparse.Namespace) -> int:
    from flows.plan import pick_device
    from flows.server import prefect_api
    from flows.training.folder import TrainingSettings, opened

    folder = Path(arguments.out)
    settings = TrainingSettings(**{field.name: getattr(arguments, field.name) for field in fields(TrainingSettings)})
    device = pick_device(arguments.device)
    with opened(folder, settings), prefect_api(folder / "prefect.log"):  # a folder that cannot be used is refused before a server starts
        from flows.train_rgi import run_opened
        from flows.training.parts import TrainingCrash

        try:
            run_opened(folder, settings, device)
        except TrainingCrash as crash:
            print(f"e4s: {crash}", file=sys.stderr)
            return 1
    print(f"{folder / 'code_encoder.safetensors'}, curves: {folder / 'curves.png'}, samples: {folder / 'samples'}")
    return 0


def _train_network(arguments: argparse.Namespace) -> int:
    from flows.plan import pick_device
    from flows.server import prefect_api
    from flows.training.folder import DataSettings, NetworkSettings, opened
    from flows.training.photos import photo_files

    folder, name = Path(arguments.out), arguments.network
    data = Path(arguments.data) if arguments.data else folder / "data"
    chosen = {option: getattr(arguments, option) for option in ("steps", "minutes", "seed")}
    settings = NetworkSettings(network=name, version=RECIPES[name].version, **chosen)
    made_with = DataSettings(people=arguments.people, seed=arguments.seed)
    device = pick_device(arguments.device)
    if arguments.photos:
        photo_files(arguments.photos)  # refused before a folder is made
    with opened(folder, settings), prefect_api(folder / "prefect.log"):
        from flows.train_network import run_opened
        from flows.training.parts import TrainingCrash

        try:
            run_opened(folder, settings, data, made_with, arguments.photos, device)
        except TrainingCrash as crash:
            print(f"e4s: {crash}", file=sys.stderr)
            return 1
    print(f"{folder / f'{name}.safetensors'}, curves: {folder / 'curves.png'}, samples: {folder / 'samples'}")
    return 0
