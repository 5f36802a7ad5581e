"""`e4s settings`: stages, backends and settings with defaults and units."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flows.commands.options import EXIT_CODES
from storage.spelling import near_miss
from tasks.graph import UsageError

if TYPE_CHECKING:
    from flows.commands.options import Commands


def add(commands: Commands) -> None:
    settings = commands.add_parser("settings", help="stages, their backends and settings, with defaults and units", epilog=EXIT_CODES)
    settings.add_argument("stage", nargs="?", default="", help="one stage (default: names of all stages and their backends)")
    settings.set_defaults(command=_settings)


def _settings(arguments: argparse.Namespace) -> int:
    from itertools import groupby

    from rich.table import Table

    from flows.console import plain_console
    from flows.settings_table import list_settings, stage_names

    names = stage_names()
    if arguments.stage and arguments.stage not in names:
        raise UsageError(f"unknown stage {arguments.stage!r}{near_miss(arguments.stage, names)}; stages are {', '.join(names)}")
    console = plain_console()
    if not console.is_terminal:
        console = plain_console(width=240)
    if not arguments.stage:
        for stage in names:
            found = dict.fromkeys(setting.backend for setting in list_settings(stage))
            console.print(f"{stage}: {', '.join(found) if any(found) else 'of videos, no backends'}")
        console.print("The first backend is a stage's own default; a profile may choose another. `e4s settings STAGE` lists its settings.")
        return 0
    for backend, settings in groupby(list_settings(arguments.stage), key=lambda setting: setting.backend):
        title = f"{arguments.stage}={backend}" if backend else arguments.stage
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in ("setting", "default", "meaning"):
            table.add_column(column)
        for setting in settings:
            if setting.name:
                table.add_row(f"{arguments.stage}.{setting.name}", str(setting.default), setting.meaning)
        console.print(table if table.row_count else f"{title} has no settings")
        console.print()
    return 0
