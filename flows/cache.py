"""`e4s cache`: what a store holds, whether it is whole, and how to make room in it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from flows.console import plain_console
from flows.plan import open_store
from flows.progress import plural
from flows.stages import PAIR_NODES
from flows.video_recipe import VERSIONS
from storage.prune import Pruning, Selection, made, prune
from storage.run import RunFolder
from storage.runs import Run, run_id
from storage.spelling import near_miss, near_path
from storage.store import Artifact, Damaged, Store
from tasks.graph import UsageError

_SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_AGES = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def print_store(place: str) -> int:
    """Artifacts by stage, index, and the runs that use the store."""
    store = open_place(place)
    entries = store.index.overview()
    entries = entries.filter(entries["first"])
    console = plain_console(soft_wrap=True)
    table = Table("stage", "artifacts", "failed", "size", "first made", "last made", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.no_wrap = True
    table.columns[0].overflow = "fold"  # a long name gives way, so that 80 columns show the rest
    stages = np.asarray(entries["stage"].cast(pa.string()))
    times = made(entries)
    for stage in sorted(set(stages)):
        mine = entries.filter(stages == stage)
        when = times[stages == stage]
        failed = pc.sum(pc.equal(mine["kind"].cast(pa.string()), "failed")).as_py()
        table.add_row(stage, str(len(pc.unique(mine["key"]))), str(failed), size(_bytes(mine)), _date(when.min()), _date(when.max()))
    console.print(table)
    parts = store.index.parts()
    console.print(
        f"{store.url}: {plural(len(pc.unique(entries['key'])), 'artifact')}, {size(_bytes(entries))} of payload; "
        f"index: {plural(len(parts), 'part')}, {size(sum(part.size for part in parts))}"
    )
    for run in store.runs.registered():
        state = "running" if run.live else "its folder is gone" if run.folder_gone else "not running"
        console.print(f"run {run.path} on {run.host}, registered {run.registered}: {state}")
    return 0


def verify_store(place: str) -> int:
    """Check every digest; cancel what is damaged, so that it is computed again; 2 if something is."""
    store = open_place(place)
    checked = damaged = 0
    with ThreadPoolExecutor(4 if store.files.local else 16, "e4s-verify") as threads:
        artifacts = store.artifacts()
        while some := list(islice(artifacts, 1000)):
            checked += len(some)
            for problem in threads.map(lambda artifact: _problem(store, artifact), some):
                if problem:
                    print(f"e4s: {problem}; it will be computed again when needed")
                    store.void(problem.artifact)
                    damaged += 1
    for part in store.index.damaged.values():
        print(f"e4s: index part {part.name} ({size(part.size)}) is damaged; what it listed will be computed again when needed")
    print(f"{checked} artifacts checked, {damaged} damaged; {plural(len(store.index.damaged), 'index part')} damaged")
    return 2 if damaged or store.index.damaged else 0


def compact_store(place: str) -> int:
    """Merge the index into as few parts as there need be."""
    store = open_place(place)
    before = store.index.parts()
    store.compact()
    after = store.index.parts()
    print(
        f"{store.url}: {plural(len(before), 'index part')} ({size(sum(part.size for part in before))}) "
        f"merged into {len(after)} ({size(sum(part.size for part in after))})"
    )
    return 0


def prune_store(
    place: str,
    *,
    older_than: str = "",
    stages: Sequence[str] = (),
    run: str = "",
    shared_too: bool = False,
    unused: bool = False,
    failed: bool = False,
    max_size: str = "",
    really: bool = False,
) -> int:
    """Show what would be removed and how much it frees; remove it with `really`."""
    store = open_place(place)
    if shared_too and not run:
        raise UsageError("--with-shared goes with --run")
    if stages:
        held = _stages_of(store)
        for stage in stages:
            if stage not in held:
                nothing = f"the store holds nothing of such a stage{near_miss(stage, held)}"
                raise UsageError(f"--stage {stage}: {nothing}; `e4s cache list {place}` shows what it holds")
    if unused:
        _check_unused(store, place, run, stages)
    selection = Selection(
        older_than=parse_age(older_than) if older_than else None,
        stages=tuple(stages) or (planned_stages() if unused else ()),
        run=_registered(store, run) if run else None,
        shared_too=shared_too,
        unused=unused,
        failed=failed,
        max_size=parse_size(max_size) if max_size else None,
    )
    pruning = prune(store, selection, really=really)
    for line in _account(pruning, selection, really):
        print(line)
    if unused:
        for gone in (run for run in store.runs.registered() if run.folder_gone):
            print(f"e4s: {gone.path} is gone, what it used counts all the same; --run {gone.path} selects that", file=sys.stderr)
    if pruning.spared:
        for live in pruning.running:
            print(f"e4s: spared {plural(pruning.spared, 'artifact')} for the running {live.path} on {live.host}", file=sys.stderr)
    return 0


def open_place(place: str) -> Store:
    """The store at a URL or folder, or of a run folder. Raises UsageError if there is none."""
    store = open_store(folder, folder.read_settings()["store"]) if (folder := RunFolder(place)).settings.exists() else Store(place)
    if not store.exists():
        alike = "" if Path(place).exists() else near_path(place)
        raise UsageError(f"{place}: neither a run folder nor a store (no index in it){alike}")
    return store


def parse_size(text: str) -> int:
    """`50GB`, `800 MiB`, `1000000B` -> bytes. Raises UsageError, for a number without a unit, too."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in _SIZES:
        raise UsageError(f"--max-size {text!r}: give a number with a unit (B, KB, MB, GB, TB, KiB, MiB, GiB or TiB), such as 50GB")
    return int(float(found[1]) * _SIZES[found[2].upper()])


def parse_age(text: str) -> float:
    """`30d`, `12h`, `2w`, `45m` -> s."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([mhdw])", text.strip())
    if not found:
        raise UsageError(f"--older-than {text!r}: give a number with a unit: m (minutes), h, d or w, such as 30d")
    return float(found[1]) * _AGES[found[2]]


def size(count: float) -> str:
    """Bytes for people: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _account(pruning: Pruning, selection: Selection, really: bool) -> Iterator[str]:
    for stage, count in pruning.artifacts.items():
        yield f"{stage}: {plural(count, 'artifact')}"
    gone = f"{plural(sum(pruning.artifacts.values()), 'artifact')} with {plural(pruning.files, 'file')} ({size(pruning.file_bytes)})"
    left = f"{plural(pruning.left, 'file')} that nothing refers to ({size(pruning.left_bytes)})"
    done, freed = ("removed", "freed") if really else ("would remove", "to free")
    yield f"{done} {gone} and {left}: {size(pruning.freed)} {freed}, {size(pruning.kept_bytes)} of payload kept"
    if pruning.waiting:
        yield f"{plural(pruning.waiting, 'file')} that nothing refers to stay until they are an hour old: a run may be about to use them"
    if selection.max_size is not None and pruning.kept_bytes > selection.max_size:
        yield f"more than {size(selection.max_size)} stays: the rest is needed by running runs or not selected"
    if not selection.any:
        yield "only what crashed writers left was looked for: --unused, --run, --stage, --older-than, --failed, --max-size select artifacts"
    if not really:
        yield "this was a dry run, nothing was removed" + (
            "; the same command with --yes removes it" if pruning.freed or pruning.artifacts else ""
        )


def _problem(store: Store, artifact: Artifact) -> Damaged | None:
    try:
        store.check(artifact)
    except Damaged as damaged:
        return damaged
    return None


def planned_stages() -> tuple[str, ...]:
    """Stages whose artifacts a run registers with its plan. What reports measured and show is registered by nobody."""
    return (*{node.stage: None for node in PAIR_NODES}, *VERSIONS)


def _check_unused(store: Store, place: str, run: str, stages: Sequence[str]) -> None:
    if run:
        raise UsageError("--unused is about all runs: leave --run out")
    if measured := set(stages) - set(planned_stages()):
        raise UsageError(f"--unused: no run says whether it uses what {measured.pop()} made; leave --unused or that --stage out")
    if not store.runs.registered():
        raise UsageError(
            f"{place}: no run is registered in this store, so all of it would count as unused; select by --stage or --older-than"
        )


def _registered(store: Store, run: str) -> Run:
    """The registered run of a folder, or of a folder that is gone by the path it had."""
    runs = store.runs.registered()
    name, path = run_id(Path(run)), str(Path(run).absolute())
    found = [one for one in runs if one.path in (run, path)] or [one for one in runs if name and one.id.startswith(name)]
    if not found:
        known = ", ".join(one.path for one in runs) or "none"
        alike = near_miss(run, (one.path for one in runs))
        raise UsageError(f"--run {run}: no such run has used this store since it keeps account{alike} (known: {known})")
    return found[-1]


def _stages_of(store: Store) -> set[str]:
    return set(store.index.overview()["stage"].unique().to_pylist())


def _bytes(entries: pa.Table) -> int:
    """Bytes of the payload files that these entries refer to, each once."""
    files: Iterable[dict[str, int]] = entries.group_by("file", use_threads=False).aggregate([("size", "max")]).to_pylist()
    return sum(file["size_max"] for file in files)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
