"""Why a run computes what it computes: the plan against the run before, stage by stage. Loads no torch and no prefect."""

from __future__ import annotations

from collections import ChainMap, Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.table import Table

from flows.console import plain_console
from flows.plan import Plan, Request, make_plan
from flows.progress import plural
from storage.run import BaseRow, Row, RunFiles, RunFolder
from tasks.graph import Graph, Item, UsageError, Work, needed

if TYPE_CHECKING:
    from flows.video_plan import VideoRequest

AnyRequest = TypeVar("AnyRequest", "Request", "VideoRequest")

NEW, UNFINISHED, AGAIN = "new", "not finished before", "failed before, tried again"
_EXPECTED = (NEW, UNFINISHED, AGAIN)  # what needs no explanation when a run goes on
_FOLLOWING = ("upstream", "not kept")  # what is only computed because something else is
_BLOCK = 256  # items whose works are in memory at once


@dataclass(frozen=True)
class Reason:
    """How many works of one node run for one reason."""

    node: str
    why: str
    works: int
    more: bool = False  # how many more there are follows from what is to be made first

    @property
    def number(self) -> str:
        return f"{self.works or ''}{'?' if not self.works else '+'}" if self.more else str(self.works)


def explain(plan: Plan) -> list[Reason]:
    """What the plan's items left need, by node in reading order, and why.

    Of several reasons the first counts: the item or its picture is new; the stage itself changed (config field, weights, library, backend,
    version, device); a stage before it changed; nothing changed, and what it made is not there (damaged, pruned, not kept, not finished).
    """
    changes = stage_changes(plan.previous.get("nodes", {}), plan.graph.fingerprints)
    upstream = nodes_above(plan.graph)
    causes: dict[str, dict[str, int]] = {node.name: defaultdict(int) for node in plan.graph.nodes}
    pictures = {(sha256, face) for row in plan.before.values() for sha256, face in _pictures(row)}
    for item, (_, role), work in works_left(plan):
        row, before = plan.rows[item.id], plan.before.get(item.id)
        if new := _new(row, before, role, pictures) if plan.previous else NEW:
            causes[work.node][new] += 1
        elif work.node in changes:
            causes[work.node][changes[work.node]] += 1
        elif changed := [name for name in upstream[work.node] if name in changes]:
            causes[work.node][f"upstream changed: {', '.join(changed)}"] += 1
        else:
            causes[work.node][_gone(plan, work, row)] += 1
    return [Reason(node, why, count) for node, found in causes.items() for why, count in found.items()]


def stage_changes(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Node -> what differs between its fingerprints of two runs; nodes without a difference are left out."""
    found = {}
    for node, mine in now.items():
        if node not in before:
            found[node] = "stage not used before"
        elif parts := list(_differences(before[node], mine)):
            found[node] = "; ".join(parts)
    return found


def headline(plan: Plan) -> str:
    """One line if pairs that were done are computed again: how many, where it begins and why; else ""."""
    again = sum((before := plan.before.get(item.id)) is not None and before.status == "done" for item in plan.todo)
    return computed_again(again, "pair", explain(plan)) if again else ""


def computed_again(items: int, noun: str, reasons: Sequence[Reason]) -> str:
    """One line on finished items that are computed again: how many, where it begins and why, and what is computed."""
    roots = [reason for reason in reasons if reason.why not in _EXPECTED and not reason.why.startswith(_FOLLOWING)]
    works: dict[str, Reason] = {}
    for reason in reasons:
        if reason.why not in _EXPECTED:
            before = works.get(reason.node, Reason(reason.node, "", 0))
            works[reason.node] = Reason(reason.node, "", before.works + reason.works, before.more or reason.more)
    because = "; ".join(f"{reason.node}: {reason.why}" for reason in roots[:4]) + ("; ..." if len(roots) > 4 else "")
    counts = ", ".join(f"{node} {total.number}" for node, total in works.items())
    return f"{plural(items, f'finished {noun}')} computed again ({because}): {counts}"


def print_why(plan: Plan) -> int:
    """Print what the plan computes and why; always 0: nothing was tried."""
    return print_reasons(plan.folder, plan.rows.values(), len(plan.todo), explain(plan))


def print_reasons(folder: RunFiles[Any], rows: Collection[BaseRow], todo: int, reasons: Sequence[Reason]) -> int:
    """Print how the items of a plan stand, and a table of reasons; returns 0."""
    count = Counter(row.status for row in rows)
    quarantined = sum(row.quarantined for row in rows if row.status == "failed")
    text = f"{folder.path}: {plural(len(rows), folder.noun)}: {count['done']} done, {todo} to do, {count['failed']} not tried"
    print(text + (f" ({quarantined} of them quarantined)" if quarantined else ""))
    if not reasons:
        print("nothing would be computed")
        return 0
    table = Table("stage", "runs", "why", box=None, pad_edge=False)
    for reason in reasons:
        table.add_row(reason.node, reason.number, reason.why)
    plain_console(soft_wrap=True).print(table)
    return 0


def why_again(run: str, manifest: str, *, profile: str, stages: list[str], changes: list[str], verify: bool) -> int:
    """`e4s status RUN --why`: the run's own request, as run.json has it, planned anew with what is given instead. Writes nothing."""
    changed = request_again(Request, RunFolder(run), manifest, profile=profile, stages=stages, changes=changes, verify=verify)
    return print_why(make_plan(changed, dry=True))


def request_again(
    kind: type[AnyRequest], folder: RunFiles[Any], manifest: str, *, profile: str, stages: list[str], changes: list[str], verify: bool
) -> AnyRequest:
    """A run's own request, as its run.json has it, with what is given instead. Raises RunError, UsageError."""
    recorded = dict(folder.read_settings()["request"])
    known = {field.name for field in fields(kind)}
    request: dict[str, Any] = {name: value for name, value in recorded.items() if name in known} | {
        "run": str(folder.path),
        "verify": verify,
        "retry": (),
    }
    if manifest:
        request["manifest"] = manifest
    elif not Path(request["manifest"]).exists() and ":" not in request["manifest"]:
        raise UsageError(f"{request['manifest']}: the run's manifest is not there (seen from this folder); name it: --why MANIFEST")
    if profile:
        request["profile"] = profile
    request["stages"] = [*request.get("stages", ()), *stages]
    request["changes"] = [*request.get("changes", ()), *changes]
    return kind(**request)


def works_left(plan: Plan) -> Iterator[tuple[Item, tuple[str, str], Work]]:
    """Every work that the plan's items left need, once."""
    seen: dict[str, None] = {}  # work of earlier blocks
    for start in range(0, len(plan.todo), _BLOCK):
        works: dict[str, Work] = {}
        place: dict[str, tuple[Item, tuple[str, str]]] = {}
        finals = []
        for item in plan.todo[start : start + _BLOCK]:
            mine = plan.graph.works(item)
            finals.append(mine[plan.graph.final[0], ""].key)
            for slot, work in mine.items():
                works[work.key] = work
                place.setdefault(work.key, (item, slot))
        for work in needed(works, finals, ChainMap[str, Any](seen, plan.known)):
            seen[work.key] = None
            yield *place[work.key], work


def nodes_above(graph: Graph) -> dict[str, list[str]]:
    """Node -> all nodes whose outputs it depends on, in reading order."""
    found: dict[str, set[str]] = {}
    for node in graph.nodes:
        direct = graph.producers(node.name)
        found[node.name] = direct.union(*(found[name] for name in direct))
    return {name: [node.name for node in graph.nodes if node.name in above] for name, above in found.items()}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if before.get("backend") != now["backend"]:
        yield f"backend changed: {before.get('backend')} -> {now['backend']}"
        return  # the rest belongs to the backend
    if before.get("version") != now["version"]:
        yield f"stage version changed: {before.get('version')} -> {now['version']}"
    for part in ("config", "weights", "libraries"):
        yield from part_changes(part, before.get(part) or {}, now[part])
    for name in ("device", "precision"):
        if before.get(name) != now[name]:
            yield f"{name} changed: {before.get(name)} -> {now[name]}"
    if before.get("instructions") != now.get("instructions"):
        old, new = (found.get("instructions") or "those of the store" for found in (before, now))
        yield f"instruction set changed: {old} -> {new}"


def part_changes(part: str, old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Which entries of config, weights or libraries differ; `prefix` goes before an entry's name."""
    what = {"weights": "weights", "libraries": "library"}.get(part, "config")
    for entry in sorted(old.keys() | new.keys()):
        if _plain(old.get(entry)) != _plain(new.get(entry)):
            yield f"{what} changed: {prefix}{entry} {_shown(part, old.get(entry))} -> {_shown(part, new.get(entry))}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # run.json has lists


def _shown(part: str, value: Any) -> str:
    return "(none)" if value is None else str(value)[:12] if part == "weights" else str(_plain(value))


def _pictures(row: Row) -> Iterator[tuple[str, int]]:
    if row.key:
        yield row.source_sha256, row.source_face
        yield row.target_sha256, row.target_face


def _new(row: Row, before: Row | None, role: str, pictures: set[tuple[str, int]]) -> str:
    """Why the item, or for per-image work its picture, is new to this run; "" if it is not."""
    if role:
        return "" if (getattr(row, f"{role}_sha256"), getattr(row, f"{role}_face")) in pictures else "new picture"
    if before is None or not before.key:
        return NEW
    changed = [role for role, mine, old in zip(("source", "target"), _pictures(row), _pictures(before), strict=True) if mine != old]
    return f"input changed: {' and '.join(changed)}" if changed else ""


def _gone(plan: Plan, work: Work, row: Row) -> str:
    """Why an artifact whose key is the same as before is not there."""
    before = plan.before[row.id]
    if before.status == "failed" or row.attempts:
        return AGAIN
    if work.key in plan.gone:
        return plan.gone[work.key]
    if before.status != "done" or before.key != row.key:
        return UNFINISHED
    keep = plan.previous["request"]["keep"]
    kept = keep == "all" or work.node == plan.graph.final[0] or (keep == "resume" and plan.graph.all_nodes[work.node].checkpoint)
    return "missing from the store" if kept else f"not kept (--keep {keep})"
