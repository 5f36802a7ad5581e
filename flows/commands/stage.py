"""`e4s stage`: one stage alone."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flows.commands.options import EXIT_CODES, Choose

if TYPE_CHECKING:
    from flows.commands.options import Commands


def add(commands: Commands) -> None:
    stage = commands.add_parser("stage", help="run one stage alone on one item's stored inputs", epilog=EXIT_CODES)
    stage.add_argument("run", help="run folder, made with --keep all")
    stage.add_argument("node", help="the stage (align, parse, swap, ...; parse_driven for the driven face)")
    stage.add_argument("item", help="id of the pair")
    stage.add_argument("-o", "--output", required=True, help="folder for what the stage writes")
    stage.add_argument("--role", choices=("source", "target"), default="target", help="whose picture, for per-image stages")
    stage.add_argument("--stage", action=Choose, default=[], metavar="STAGE=BACKEND", help="another backend")
    stage.add_argument("--set", action=Choose, default=[], metavar="STAGE.SETTING=VALUE", help="another setting")
    stage.set_defaults(command=_stage)


def _stage(arguments: argparse.Namespace) -> int:
    from flows.single import run_stage

    for path in run_stage(
        arguments.run, arguments.node, arguments.item, arguments.output, role=arguments.role, stages=arguments.stage, changes=arguments.set
    ):
        print(path)
    return 0
