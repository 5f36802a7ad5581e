"""Outputs that no row stands for any more: removed where the store holds the very same bytes, else kept in RUN/replaced."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path

from storage.codec import without_chunks
from storage.keys import digest_bytes
from storage.run import AnyRow, BaseRow, RunFiles
from storage.store import Damaged, Store
from tasks.frame import hash_file
from tasks.properties import ADDED_CHUNKS
from tasks.stage import ItemError

REPLACED = "replaced"  # in the run folder


def remove_stale(folder: RunFiles[AnyRow], before: Iterable[AnyRow], rows: Mapping[str, BaseRow], store: Store | None) -> None:
    """Clear outputs that an earlier manifest lists and this one does not hold as done: made with other inputs or settings, or damaged.

    To be called when the run is about to begin, so that nothing goes for a command that cannot. Where an input cannot be read now, its
    output stays. `store` as for `clear_outputs`.
    """
    kept = {row.output for row in rows.values() if row.status == "done"}
    kept |= {row.output for row in before if row.id in rows and rows[row.id].stage == "input"}  # maybe its file is away for a moment
    clear_outputs(folder, [row for row in before if row.output not in kept], store)


def clear_outputs(folder: RunFiles[AnyRow], rows: Iterable[AnyRow], store: Store | None) -> None:
    """Take the outputs of these rows away so that others can be written there. Nothing that exists only there is lost.

    An output is removed if the store holds the row's result, its payload's digest was checked, and the output has the same one, or had it
    before its target's metadata were added and is as it was written. Any
    other is moved to RUN/replaced: it may be edited, and the index may list what is damaged or gone. Where the store holds results in
    parts only (videos) it is None.
    """
    there = [row for row in rows if row.output and (folder.path / row.output).is_file()]
    whole = _whole_results(store, there) if store else set[str]()
    removed = moved = 0
    for row in there:
        path = folder.path / row.output
        sha256 = _digest(path)
        if sha256 in whole or not path.stat().st_size or (sha256 == row.output_sha256 and _bare_digest(path) in whole):
            path.unlink()
            removed += 1
        else:
            _move(path, folder.path / REPLACED, sha256)
            moved += 1
    of_others = "e4s: outputs of other inputs or settings:"
    if removed:
        back = "the store keeps their results, and the command that made them puts them back without computing"
        print(f"{of_others} {removed} removed; {back}", file=sys.stderr)
    if moved:
        print(f"{of_others} {moved} moved to {folder.path / REPLACED}; remove there what is not needed", file=sys.stderr)


def put_aside(folder: RunFiles[AnyRow], path: Path, sha256: str) -> None:
    """Move a file of the run folder to RUN/replaced unless it is empty or has this digest: nothing is known of it that would allow more."""
    if path.is_file() and path.stat().st_size and (found := _digest(path)) != sha256:
        _move(path, folder.path / REPLACED, found)


def _whole_results(store: Store, rows: Iterable[BaseRow]) -> set[str]:
    """Digests of the payloads of these rows' results, read and checked. What is found damaged is cancelled: it is computed when needed."""
    whole = set[str]()
    for artifact in store.lookup({row.key for row in rows}).values():
        try:
            for output, payload in artifact.payloads.items():
                if payload.kind != "array":
                    store.read_bytes(artifact, output)
                    whole.add(payload.sha256)
        except Damaged as damaged:
            print(f"e4s: {damaged}; it will be computed again when needed", file=sys.stderr)
            store.void(artifact)
    return whole


def _bare_digest(path: Path) -> str:
    """sha256 of an output without what it repeats of its target, "" if it cannot be read."""
    try:
        return digest_bytes(without_chunks(path.read_bytes(), ADDED_CHUNKS))
    except OSError:
        return ""


def _digest(path: Path) -> str:
    """sha256 of a file, "" if it cannot be read."""
    try:
        return hash_file(str(path))
    except ItemError:
        return ""


def _move(path: Path, folder: Path, sha256: str) -> None:
    """Move a file into a folder under a name with its digest; what was moved there before stays."""
    folder.mkdir(exist_ok=True)
    for number in count():
        goal = folder / f"{path.stem}-{sha256[:8]}{f'-{number}' if number else ''}{path.suffix}"
        if not goal.exists():
            path.rename(goal)
            return
        if sha256 and _digest(goal) == sha256:
            path.unlink()
            return
