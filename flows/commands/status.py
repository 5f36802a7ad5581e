"""`e4s status`: how a run stands, and why it would compute what."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from flows.commands.options import EXIT_CODES, EXIT_INTERRUPTED, Choose

if TYPE_CHECKING:
    from flows.commands.options import Commands


def add(commands: Commands) -> None:
    status = commands.add_parser("status", help="how far a run is, what failed and why", epilog=EXIT_CODES)
    status.add_argument("run", help="run folder")
    status.add_argument("--failed", action="store_true", help="list failed pairs with every attempt: time, stage, reason")
    status.add_argument("--follow", action="store_true", help="show the run as it goes on, until it ends or Ctrl-C")
    status.add_argument(
        "--why",
        nargs="?",
        const="",
        metavar="MANIFEST",
        help="say what repeating the run's command would compute, per stage, and why; nothing is changed",
    )
    status.add_argument("--profile", default="", help="with --why: another profile than the run's")
    status.add_argument("--stage", action=Choose, default=[], metavar="STAGE=BACKEND", help="with --why: another backend")
    status.add_argument("--set", action=Choose, default=[], metavar="STAGE.SETTING=VALUE", help="with --why: another setting")
    status.add_argument("--verify", action="store_true", help="with --why: check the digest of everything finished")
    status.set_defaults(command=_status)


def _status(arguments: argparse.Namespace) -> int:
    from flows.status import follow, print_failed, print_status

    if arguments.why is not None:
        from flows.video_why import video_why_again
        from flows.why import why_again
        from storage.video_run import VideoRunFolder, open_run

        again = video_why_again if isinstance(open_run(arguments.run), VideoRunFolder) else why_again
        return again(
            arguments.run, arguments.why, profile=arguments.profile, stages=arguments.stage, changes=arguments.set, verify=arguments.verify
        )
    if arguments.failed:
        return print_failed(arguments.run)
    if not arguments.follow:
        return print_status(arguments.run)
    try:
        return follow(arguments.run)
    except KeyboardInterrupt:
        print(f"\ne4s: no longer followed; the run itself goes on, `e4s status {arguments.run}` shows it", file=sys.stderr)
        return EXIT_INTERRUPTED
