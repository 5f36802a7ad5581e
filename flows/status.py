"""`e4s status` and `e4s cache`: how a run or a store stands."""

from __future__ import annotations

from collections import Counter, defaultdict

from rich.console import Console
from rich.table import Table

from flows.plan import open_store
from flows.progress import duration, plural
from storage.run import RunFolder
from storage.store import Damaged, Store
from tasks.graph import UsageError


def print_status(run: str) -> int:
    """Counts, seconds per stage, rate and failures by reason; 2 if items failed or are left."""
    folder = RunFolder(run)
    settings = folder.read_settings()
    rows = folder.read_rows()
    counts = Counter(row.status for row in rows)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{folder.path}: {plural(len(rows), 'pair')}: {counts['done']} done, {counts['failed']} failed, {counts['left']} left")
    console.print(
        f"profile {settings['request']['profile']}, device {settings['device']}, store {open_store(folder, settings['store']).url}"
    )
    seconds: dict[str, float] = defaultdict(float)
    items: Counter[str] = Counter()
    for event in folder.read_log():
        if event["event"] == "stage":
            seconds[event["stage"]] += event["seconds"]
            items[event["stage"]] += event["items"]
    if seconds:
        table = Table("stage", "items computed", "seconds", "seconds per item")
        for stage in seconds:
            table.add_row(stage, str(items[stage]), f"{seconds[stage]:.1f}", f"{seconds[stage] / max(items[stage], 1):.3f}")
        console.print(table)
    done_seconds = [row.seconds for row in rows if row.status == "done" and row.seconds]
    if counts["left"] and done_seconds:
        left = sum(done_seconds) / len(done_seconds) * counts["left"]
        console.print(f"about {duration(left)} of computing left; the same command continues")
    for (stage, reason), count in Counter((row.stage, row.reason) for row in rows if row.status == "failed").most_common():
        console.print(f"{count} failed in {stage}: {reason}", markup=False)
    return 2 if counts["failed"] or counts["left"] else 0


def print_store(place: str, *, verify: bool) -> int:
    """Count and size of a store's artifacts by stage, or check every digest; 2 if something is damaged."""
    store = _open(place)
    artifacts = store.all()
    if verify:
        damaged = 0
        for artifact in artifacts:
            for output in artifact.payloads:
                try:
                    store.read(artifact, output)
                except Damaged as error:
                    print(f"e4s: {error}; it will be computed again when needed")
                    store.void(artifact)
                    damaged += 1
                    break
        print(f"{len(artifacts)} artifacts checked, {damaged} damaged")
        return 2 if damaged else 0
    table = Table("stage", "artifacts", "failed", "MB")
    for stage in sorted({artifact.stage for artifact in artifacts}):
        mine = [artifact for artifact in artifacts if artifact.stage == stage]
        files = {payload.file: payload.size for artifact in mine for payload in artifact.payloads.values()}
        table.add_row(stage, str(len(mine)), str(sum(artifact.failed for artifact in mine)), f"{sum(files.values()) / 1e6:.1f}")
    Console().print(table)
    return 0


def _open(place: str) -> Store:
    store = open_store(folder, folder.read_settings()["store"]) if (folder := RunFolder(place)).settings.exists() else Store(place)
    if not store.exists():
        raise UsageError(f"{place}: neither a run folder nor a store (no index in it)")
    return store
