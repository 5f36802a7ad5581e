"""`e4s models`: list, pull and verify weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from e4s_models.weights import DEFAULT_WEIGHTS, WEIGHTS, pull, verify


def print_list() -> int:
    states = verify()
    table = Table("name", "state", "MB", "licence", "origin", title="weights (* = used by the default profile)")
    for weight in WEIGHTS.values():
        star = "*" if weight.name in DEFAULT_WEIGHTS else ""
        table.add_row(weight.name + star, states[weight.name], f"{weight.size / 1e6:.1f}", weight.licence, weight.origin)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


def pull_weights(names: Sequence[str], folder: str) -> int:
    pulled = pull(names or None, source_folder=Path(folder) if folder else None)
    for result in pulled:
        print(f"{result.name}: {result.path}")
    return 0


def verify_weights(names: Sequence[str]) -> int:
    states = verify(names or None)
    for name, state in states.items():
        print(f"{name}{'*' if name in DEFAULT_WEIGHTS else ''}: {state}")
    if not names:
        print("(* = needed by the default profile; the others are for options and evaluation)")
    wanted = names or DEFAULT_WEIGHTS
    bad = [name for name in wanted if states[name] != "ok"] + [n for n, state in states.items() if state == "damaged" and n not in wanted]
    if bad:
        print(f"e4s: {', '.join(bad)}: not usable; run `e4s models pull {' '.join(bad)}`", file=sys.stderr)
    return 2 if bad else 0
