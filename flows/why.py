"""Why a run computes what it computes: the plan against the run before, stage by stage. Loads no torch and no prefect."""

from __future__ import annotations

from collections import ChainMap, Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.plan import Plan, Request, make_plan
from flows.progress import plural
from storage.run import Row, RunFolder
from tasks.graph import Item, UsageError, Work, needed

NEW, UNFINISHED, AGAIN = "new", "not finished before", "failed before, tried again"
_EXPECTED = (NEW, UNFINISHED, AGAIN)  # what needs no explanation when a run goes on
_FOLLOWING = ("upstream changed", "not kept")  # what is only computed because something else is
_BLOCK = 256  # items whose works are in memory at once


@dataclass(frozen=True)
class Reason:
    """How many works of one node run for one reason."""

    node: str
    why: str
    works: int


def explain(plan: Plan) -> list[Reason]:
    """What the plan's items left need, by node in reading order, and why.

    Of several reasons the first counts: the item or its picture is new; the stage itself changed (config field, weights, library, backend,
    version, device); a stage before it changed; nothing changed, and what it made is not there (damaged, pruned, not kept, not finished).
    """
    changes = stage_changes(plan.previous.get("nodes", {}), plan.graph.fingerprints)
    upstream = _upstream(plan)
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
    if not again:
        return ""
    reasons = explain(plan)
    roots = [reason for reason in reasons if reason.why not in _EXPECTED and not reason.why.startswith(_FOLLOWING)]
    works: Counter[str] = Counter()
    for reason in reasons:
        if reason.why not in _EXPECTED:
            works[reason.node] += reason.works
    because = "; ".join(f"{reason.node}: {reason.why}" for reason in roots[:4]) + ("; ..." if len(roots) > 4 else "")
    return f"{plural(again, 'finished pair')} computed again ({because}): " + ", ".join(f"{node} {count}" for node, count in works.items())


def print_why(plan: Plan) -> int:
    """Print what the plan computes and why; always 0: nothing was tried."""
    failed = [row for row in plan.rows.values() if row.status == "failed"]
    quarantined = sum(row.quarantined and bool(row.key) for row in failed)
    text = f"{plan.folder.path}: {plural(len(plan.rows), 'pair')}: {plan.done_before} done, {len(plan.todo)} to do, {len(failed)} not tried"
    print(text + (f" ({quarantined} of them quarantined)" if quarantined else ""))
    reasons = explain(plan)
    if not reasons:
        print("nothing would be computed")
        return 0
    table = Table("stage", "runs", "why", box=None, pad_edge=False)
    for reason in reasons:
        table.add_row(reason.node, str(reason.works), reason.why)
    Console(soft_wrap=True, highlight=False, markup=False).print(table)
    return 0


def why_again(run: str, manifest: str, *, profile: str, stages: list[str], changes: list[str], verify: bool) -> int:
    """`e4s status RUN --why`: the run's own request, as run.json has it, planned anew with what is given instead. Writes nothing."""
    folder = RunFolder(run)
    recorded = dict(folder.read_settings()["request"])
    known = {field.name for field in fields(Request)}
    request = {name: value for name, value in recorded.items() if name in known} | {"run": run, "verify": verify, "retry": ()}
    if manifest:
        request["manifest"] = manifest
    elif not Path(request["manifest"]).exists() and ":" not in request["manifest"]:
        raise UsageError(f"{request['manifest']}: the run's manifest is not there (seen from this folder); name it: --why MANIFEST")
    if profile:
        request["profile"] = profile
    request["stages"] = [*request.get("stages", ()), *stages]
    request["changes"] = [*request.get("changes", ()), *changes]
    return print_why(make_plan(Request(**request), dry=True))


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


def _upstream(plan: Plan) -> dict[str, list[str]]:
    """Node -> all nodes whose outputs it depends on, in reading order."""
    graph = plan.graph
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
    for name, what in (("config", "config changed"), ("weights", "weights changed"), ("libraries", "library changed")):
        old, new = before.get(name) or {}, now[name]
        for entry in sorted(old.keys() | new.keys()):
            if _plain(old.get(entry)) != _plain(new.get(entry)):
                yield f"{what}: {entry} {_shown(name, old.get(entry))} -> {_shown(name, new.get(entry))}"
    for name in ("device", "precision"):
        if before.get(name) != now[name]:
            yield f"{name} changed: {before.get(name)} -> {now[name]}"


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
