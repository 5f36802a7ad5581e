"""Chunks of pairs on Dask workers: an existing scheduler (`--dask tcp://...`) or processes of our own (`--dask local:N`).

Where the device kind changes between stages, a chunk is cut into parts, each of which goes to one worker of a crew (`flows.workers`). When
a worker is lost, the store is asked what it finished, and only the rest of its part is sent elsewhere.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from flows.engine import Progress, Results, Shared, StageCall
from flows.plan import Plan, keys_of
from flows.remote import Kit
from flows.workers import Crashed, Crew, Errand, kit_of
from storage.store import Artifact
from tasks.graph import Graph, Item, Work, needed
from tasks.runner import ChunkJob, ChunkResult, Outcome, work_lists

AHEAD = 2  # parts that a worker is given at a time: one runs, one waits there


@dataclass(frozen=True)
class Part:
    """Nodes of the graph that a chunk runs through on one worker."""

    name: str
    nodes: frozenset[str]
    device: str  # cpu or cuda


def parts(graph: Graph) -> list[Part]:
    """Cut the graph where the device kind changes, in as few parts as the wires allow; one part if all is of one kind."""
    level: dict[str, int] = {}  # even: cpu, odd: cuda
    for node in graph.nodes:
        odd = graph.device(node.name) != "cpu"
        lowest = max((level[producer] for producer in graph.producers(node.name)), default=0)
        level[node.name] = lowest if lowest % 2 == odd else lowest + 1
    found = []
    for number in sorted(set(level.values())):
        names = [node.name for node in graph.nodes if level[node.name] == number]
        found.append(Part(names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}", frozenset(names), "cuda" if number % 2 else "cpu"))
    return found


class Cluster:
    """Executor on Dask workers."""

    def __init__(self, plan: Plan, progress: Progress, call: StageCall) -> None:
        """Raises ClusterError if the scheduler does not answer."""
        self._plan, self._progress, self._call = plan, progress, call
        self._parts = parts(plan.graph)
        self._shared = Shared()
        self._crew = Crew(make_kit(plan), plan.request, plan.store, plan.folder, AHEAD)
        self.close = self._crew.close

    def results(self, jobs: Iterable[ChunkJob]) -> Results:
        """Chunks as they are finished.

        Per-image work that other chunks need, too, comes first in a chunk and is told at once: a chunk that needs some which another one
        is just doing waits for that, not for the other's pairs.
        """
        coming, ready = iter(jobs), deque[ChunkJob]()
        waiting: dict[str, list[ChunkJob]] = {}  # by a key that is being made
        making: dict[str, int] = {}  # key of shared work -> chunk that makes it
        flying: dict[int, tuple[ChunkJob, frozenset[str]]] = {}  # with the shared keys that it has not told yet
        within: dict[int, float] = {}

        def release(keys: Iterable[str]) -> None:
            for key in keys:
                del making[key]
                ready.extendleft(reversed(waiting.pop(key, [])))

        while True:
            while len(flying) < self._crew.room():
                following = ready.popleft() if ready else next(coming, None)
                if following is None:
                    break
                job = self._shared.equip(following)
                open_keys = self._open(job)
                blocking = next((key for key in sorted(open_keys) if key in making), None)
                if blocking:
                    waiting.setdefault(blocking, []).append(job)
                    continue
                making |= dict.fromkeys(open_keys, job.number)
                flying[job.number] = job, open_keys
                self._crew.start(partial(self._through, job, open_keys))
            if not flying:
                return
            heard = self._crew.hear()
            if heard is None:
                continue  # there may be more room now
            kind, message = heard
            if kind == "event":
                if "shared" not in message:
                    self._show(message, flying, within)
                elif message["chunk"] in flying:
                    job, open_keys = flying[message["chunk"]]
                    flying[job.number] = job, frozenset()
                    self._shared.take(job, message["shared"])
                    release(open_keys)
                continue
            number, result = message
            job, open_keys = flying.pop(number)
            within.pop(number, None)
            self._shared.take(job, result)
            release(open_keys)
            yield job, result

    def _open(self, job: ChunkJob) -> frozenset[str]:
        """Keys of the work that a chunk shares with others and that is left to do, as far as its items need it."""
        return frozenset(work.key for work in self._left(job) if work.key in job.shared) if job.shared else frozenset()

    def _left(self, job: ChunkJob) -> list[Work]:
        _, finals, works = work_lists(self._plan.graph, job.items)
        return needed(works, job.only or finals, job.known.keys())

    def _show(self, event: Mapping[str, Any], flying: Mapping[int, tuple[ChunkJob, frozenset[str]]], within: dict[int, float]) -> None:
        number = event["chunk"]
        if "node" in event:
            self._progress.stage(number, event["node"])
        elif number in flying and not flying[number][1]:
            within[number] = event["share"] * len(flying[number][0].items)
            self._progress.within(sum(within.values()))

    def _through(self, job: ChunkJob, shared: frozenset[str]) -> tuple[int, ChunkResult]:
        """One chunk: what it shares with others, which is told, then all."""
        total = ChunkResult([], [], defaultdict(int), defaultdict(float), [])
        outcomes = {item.id: Outcome(item.id) for item in job.items}
        for only in (shared, frozenset[str]()) if shared else (frozenset[str](),):
            self._through_parts(replace(job, only=only), total, outcomes)
            if total.crash:
                break
            if only:
                self._crew.tell({"chunk": job.number, "shared": replace(total, outcomes=[], artifacts=list(total.artifacts))})
        return job.number, total

    def _through_parts(self, job: ChunkJob, total: ChunkResult, outcomes: dict[str, Outcome]) -> None:
        """What a job asks for, from part to part, added to `total`; what a part finds damaged is made again by the parts before it."""
        known = {**job.known, **{artifact.key: artifact for artifact in total.artifacts}}
        items = [item for item in job.items if not outcomes[item.id].reason]
        index, visited = 0, self._parts
        if job.only:
            wanted = {work.node for work in self._left(job)}
            visited = [part for part in self._parts if part.nodes & wanted]
        while items and index < len(visited):
            part = visited[index]
            nodes = None if len(self._parts) == 1 else part.nodes
            result = self._visibly(replace(job, items=items, known=known, nodes=nodes), part)
            _add(total, result, outcomes)
            known |= {artifact.key: artifact for artifact in result.artifacts}
            for key in result.lost:
                known.pop(key, None)
            items = [item for item in items if not outcomes[item.id].reason]
            if result.crash:
                break
            index = 0 if result.lost else index + 1

    def _visibly(self, job: ChunkJob, part: Part) -> ChunkResult:
        found: list[ChunkResult] = []
        self._call(job.number, _named(job, part), lambda: found.append(self._place(job, part)))
        return found[0]

    def _place(self, job: ChunkJob, part: Part) -> ChunkResult:
        """The part's result; what a lost worker finished of it is among its artifacts, since other chunks may need that, too."""
        errand = Errand(part.name, f"chunk {job.number}", job.number, gpu=part.device == "cuda")
        found: list[Artifact] = []

        def again(sent: ChunkJob) -> ChunkJob:
            known = self._plan.store.lookup(set(keys_of(self._plan.graph, job.items)))
            found[:] = [artifact for key, artifact in known.items() if key not in job.known]
            return replace(sent, known={**job.known, **known})

        try:
            result: ChunkResult = self._crew.send(errand, job, again, owner=job.number)
        except Crashed as crash:
            return replace(_empty(job.items), artifacts=found, crash=str(crash), crash_node=part.name)
        return replace(result, artifacts=[*found, *result.artifacts])


def make_kit(plan: Plan) -> Kit:
    """What workers must know of the plan."""
    image = next(iter(plan.todo[0].images.values())) if plan.todo else None
    picture = (image.path, image.sha256) if image else ("", "")
    return Kit(**kit_of(plan.graph, plan.request, plan.store), prints=plan.graph.fingerprints, keep=plan.request.keep, picture=picture)


def _named(job: ChunkJob, part: Part) -> str:
    return f"{part.name} (shared)" if job.only else part.name


def _add(total: ChunkResult, result: ChunkResult, outcomes: dict[str, Outcome]) -> None:
    """Add one part's result to the chunk's."""
    for outcome in result.outcomes:
        outcome.seconds += outcomes[outcome.id].seconds
        outcomes[outcome.id] = outcome
    total.outcomes = list(outcomes.values())
    total.artifacts += result.artifacts
    total.repaired += result.repaired
    total.places |= result.places
    total.crash, total.crash_node, total.broken = result.crash, result.crash_node, result.broken
    for node, count in result.computed.items():
        total.computed[node] += count
        total.seconds[node] += result.seconds.get(node, 0.0)


def _empty(items: Iterable[Item]) -> ChunkResult:
    return ChunkResult([Outcome(item.id) for item in items], [], {}, {}, [])
