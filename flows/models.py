"""`e4s models`: list, pull and verify weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from e4s_models.added import add, verify_added
from e4s_models.published import published
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


def add_published(folder: str, names: Sequence[str], replace: bool) -> int:
    """Convert published checkpoints; 2 if a named one is not in the folder."""
    states = add(Path(folder), names, replace=replace)
    for name, state in states.items():
        print(f"{name}: {state}" + (f" ({published(name).file} is not in {folder})" if state == "absent" else ""))
    absent = [name for name in states if states[name] == "absent"]
    if not names and len(absent) < len(states):
        absent = []  # a folder need not hold all of them
    if absent:
        print(f"e4s: {folder}: holds no file of {', '.join(absent)}", file=sys.stderr)
    return 2 if absent else 0


def verify_weights(names: Sequence[str]) -> int:
    states = verify(names or None)
    for name, state in states.items():
        print(f"{name}{'*' if name in DEFAULT_WEIGHTS else ''}: {state}")
    wanted = names or DEFAULT_WEIGHTS
    bad = [name for name, state in states.items() if state == "damaged" or (name in wanted and state != "ok")]
    if bad:
        print(f"e4s: {', '.join(bad)}: not usable; run `e4s models pull {' '.join(bad)}`", file=sys.stderr)
    if names:
        return 2 if bad else 0
    print("(* = needed by the default profile; the others are for options and evaluation)")
    added = {name: state for name, state in verify_added().items() if state != "absent"}
    for name, found in added.items():
        print(f"published {name}: {found}")
    changed = [name for name, state in added.items() if state == "damaged"]
    if changed:
        print(f"e4s: published {', '.join(changed)}: not usable; run `e4s models add --from FOLDER {' '.join(changed)}`", file=sys.stderr)
    return 2 if bad or changed else 0
