"""`e4s doctor`: what is installed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flows.commands.options import EXIT_CODES

if TYPE_CHECKING:
    from flows.commands.options import Commands


def add(commands: Commands) -> None:
    doctor = commands.add_parser("doctor", help="what is installed, what is missing", epilog=EXIT_CODES)
    doctor.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from flows.doctor import examine

    return examine()
