"""`e4s cache`: the artifacts of a store."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flows.commands.options import EXIT_CODES, Parser

if TYPE_CHECKING:
    from flows.commands.options import Commands


def add(commands: Commands) -> None:
    cache = commands.add_parser("cache", help="artifacts of a store: list, verify, prune, compact", epilog=EXIT_CODES)
    cache_actions = cache.add_subparsers(required=True, metavar="ACTION", parser_class=Parser)
    for name, text in (
        ("list", "count and size by stage, and the runs that use it"),
        ("verify", "check every digest; what is damaged will be computed again"),
        ("compact", "merge the index into few large parts (happens by itself when many small ones have piled up)"),
        ("prune", "make room: show what would go, remove it with --yes; what a running run needs stays"),
    ):
        action = cache_actions.add_parser(name, help=text, epilog=EXIT_CODES)
        action.add_argument("store", help="store URL or folder, or a run folder")
        action.set_defaults(command=_cache, action=name)
    action.description = (
        "Artifacts go that meet every condition given; with none given, only what crashed writers left. "
        "What was pruned is computed again when needed."
    )
    action.add_argument("--older-than", default="", metavar="AGE", help="made longer ago than this: 30d, 12h, 2w")
    action.add_argument("--stage", action="append", default=[], help="of this stage (may be given again)")
    action.add_argument("--run", default="", metavar="RUN", help="used by this run folder and by no other run")
    action.add_argument(
        "--unused", action="store_true", help="used by no run as it is now, such as what was made with settings that were changed since"
    )
    action.add_argument("--with-shared", action="store_true", help="with --run: also what other runs use")
    action.add_argument("--failed", action="store_true", help="remembered failures only: their items will be tried again")
    action.add_argument("--max-size", default="", metavar="SIZE", help="what leaves at most this (50GB), the oldest first")
    really = action.add_mutually_exclusive_group()
    really.add_argument("--dry-run", action="store_true", help="only show what would go (as without --yes)")
    really.add_argument("--yes", action="store_true", help="do it")


def _cache(arguments: argparse.Namespace) -> int:
    from flows.cache import compact_store, print_store, prune_store, verify_store

    if arguments.action == "prune":
        return prune_store(
            arguments.store,
            older_than=arguments.older_than,
            stages=arguments.stage,
            run=arguments.run,
            shared_too=arguments.with_shared,
            unused=arguments.unused,
            failed=arguments.failed,
            max_size=arguments.max_size,
            really=arguments.yes,
        )
    return {"list": print_store, "verify": verify_store, "compact": compact_store}[arguments.action](arguments.store)
