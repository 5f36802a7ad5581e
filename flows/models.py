"""`e4s models`: list, pull, add, convert and verify weights."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from rich.table import Table

from e4s_models.added import add, added_weight, convert, record, verify_added
from e4s_models.published import PUBLISHED, published
from e4s_models.user_network import ROLES, add_user_network, user_convention, user_network_state
from e4s_models.weights import DEFAULT_WEIGHTS, WEIGHTS, WeightsError, pull, remedies, verify
from flows.console import plain_console
from flows.profiles import make_settings
from flows.stages import PAIR_NODES, PAIR_RESULT
from storage.spelling import near_miss, near_path
from tasks.graph import Graph, UsageError


def print_list() -> int:
    """Tables of the registered weights, of the authors' networks and of the user's own, those that are not there included."""
    states, added = verify(), verify_added()
    weights = Table("name", "state", "MB", "licence", "origin", title="weights (* = used by the default profile)")
    for weight in WEIGHTS.values():
        star = "*" if weight.name in DEFAULT_WEIGHTS else ""
        weights.add_row(weight.name + star, states[weight.name], f"{weight.size / 1e6:.1f}", weight.licence, weight.origin)
    chained = _weights_of("paper")
    authors = Table(
        "name", "state", "MB", "file", title="the authors' networks: `e4s models add --from FOLDER` (* = used by --profile paper)"
    )
    for name, state in added.items():
        entry = added_weight(name) if state == "ok" else None
        size = f"{entry.size / 1e6:.1f}" if entry else ""
        authors.add_row(name + ("*" if name in chained else ""), state, size, published(name).file)
    own = Table("role", "state", "meaning", title="your own networks for evaluation: `e4s models add --network ROLE --file FILE`")
    for role, convention in ROLES.items():
        own.add_row(role, user_network_state(role), convention.meaning)
    console = plain_console(width=None if sys.stdout.isatty() else 200)
    for table in (weights, authors, own):
        console.print(table)
    return 0


def _weights_of(profile: str) -> set[str]:
    graph = Graph(PAIR_NODES, PAIR_RESULT, make_settings(profile))
    return {weight for node in graph.nodes for weight in graph.stages[node.name].weights(graph.configs[node.name])}


def pull_weights(names: Sequence[str], folder: str) -> int:
    _check_names(names, [*WEIGHTS, *PUBLISHED, *ROLES])
    pulled = pull(names or None, source_folder=Path(folder) if folder else None)
    for result in pulled:
        print(f"{result.name}: {result.path}")
    return 0


def add_published(folder: str, names: Sequence[str], replace: bool) -> int:
    """Convert published checkpoints, each on its own; 2 if one does not fit or a named one is not in the folder."""
    source = Path(folder)
    _check_names(names, PUBLISHED)
    if not source.is_dir():
        raise UsageError(f"{source}: no such folder{near_path(source)}; give the authors' checkpoint folder")
    states: dict[str, str] = {}
    failed = []
    for name in names or PUBLISHED:
        try:
            states |= add(source, [name], replace=replace)
        except WeightsError as error:
            print(f"e4s: {error}", file=sys.stderr)
            failed.append(name)
            continue
        print(f"{name}: {states[name]}{_note(name, states[name], folder)}", flush=True)
    absent = [name for name in states if states[name] == "absent"]
    if not names and len(absent) < len(PUBLISHED):
        absent = []  # a folder need not hold all of them
    if absent:
        print(f"e4s: {folder}: holds no file of {', '.join(absent)}", file=sys.stderr)
    if failed:
        print(f"e4s: not added: {', '.join(failed)}", file=sys.stderr)
    return 2 if absent or failed else 0


def _check_names(names: Iterable[str], known: Collection[str]) -> None:
    """Raise UsageError for a name that is not known, with the one that may be meant."""
    for name in names:
        if name not in known:
            raise UsageError(f"unknown network {name!r}{near_miss(name, known)}; choose from {', '.join(known)}")


def _note(name: str, state: str, folder: str) -> str:
    if state == "absent":
        return f" ({published(name).file} is not in {folder})"
    known = record(name)
    return f" ({known.dtype} in the file, float32 here)" if known and known.dtype != "float32" else ""


def add_network(role: str, file: str, convention: str, replace: bool) -> int:
    """Register the user's own file for an evaluation network and say under which convention."""
    _check_names([role], ROLES)
    state = add_user_network(role, Path(file), Path(convention) if convention else None, replace=replace)
    wanted = user_convention(role)
    print(
        f"{role}: {state} ({wanted.width} x {wanted.height} px, {wanted.colour}, {wanted.layout}, "
        f"(grey level - {wanted.mean}) / {wanted.std}, {wanted.dimensions} numbers)"
    )
    return 0


def convert_published(file: str, name: str, output: str) -> int:
    """Convert one published file without registering it."""
    _check_names([name], PUBLISHED)
    print(f"{output}: sha256 {convert(Path(file), name, Path(output))}")
    return 0


def verify_weights(names: Sequence[str]) -> int:
    """Hash weights anew, by default all and everything that was added; 2 if one that is named, or needed by default, is not as declared."""
    _check_names(names, [*WEIGHTS, *PUBLISHED, *ROLES])
    roles = [role for role in ROLES if role in names]
    states = verify([name for name in names if name not in roles] if names else None)
    for name, state in states.items():
        print(f"{name}{'*' if name in DEFAULT_WEIGHTS else ''}: {state}")
    wanted = names or DEFAULT_WEIGHTS
    bad = [name for name, state in states.items() if state == "damaged" or (name in wanted and state != "ok")]
    if bad:
        print(f"e4s: {', '.join(bad)}: not usable; {remedies(bad)}", file=sys.stderr)
    changed = []
    if not names:
        print("(* = needed by the default profile; the others are for options and evaluation)")
        added = {name: state for name, state in verify_added().items() if state != "absent"}
        for name, found in added.items():
            print(f"published {name}: {found}")
        changed = [name for name, state in added.items() if state == "damaged"]
        if changed:
            again = f"run `e4s models add --from FOLDER {' '.join(changed)}`"
            print(f"e4s: published {', '.join(changed)}: not usable; {again}", file=sys.stderr)
    unusable = [role for role in (roles if names else ROLES) if not _verify_role(role, named=bool(names))]
    return 2 if bad or changed or unusable else 0


def _verify_role(role: str, *, named: bool) -> bool:
    """Print the state of the user's network; whether it is as it was added, or, if it was not `named`, absent."""
    state = user_network_state(role)
    if state != "absent" or named:
        print(f"network {role}: {state}")
    if state == "ok" or (state == "absent" and not named):
        return True
    print(f"e4s: network {role}: not usable; run `e4s models add --network {role} --file FILE`", file=sys.stderr)
    return False
