"""Chunks of items through a graph of stages: the jobs of pairs and of evaluation.

In this process a chunk runs as it is. On Dask it is cut where the device kind changes between stages; each part goes to one worker, values
between two parts go through the store. Per-image work that other chunks need, too, comes first and is shared at once: a chunk that needs
some which another one is just doing waits for that, not for the other's items. When a worker is lost, the store is asked what it finished,
and only the rest of its part is sent elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from flows.execution.jobs import (
    Job,
    JobCrashError,
    JobReporter,
    JobRequirements,
    JobRunner,
    PayloadSender,
    TaskHook,
    run_as_task,
)
from storage.store import Artifact, Store
from tasks.graph import Graph, Work, needed
from tasks.runner import ChunkJob, JobResult, Outcome, Worker, run_chunk, work_lists


class GraphRunner:
    """Runs chunks, or those parts of them that belong to this kind of device, in one process."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.close = worker.close

    def prefetch(self, payload: ChunkJob) -> None:
        self._worker.prefetch(payload)

    def run(self, payload: ChunkJob, reporter: JobReporter) -> JobResult:
        self._worker.notify = reporter.progress
        result = run_chunk(self._worker, payload, reporter.stage)
        if reporter.worker:
            result.places = dict.fromkeys(result.computed, reporter.worker)
        return result


@dataclass(frozen=True)
class GraphPart:
    """Nodes of the graph that a chunk runs through on one worker."""

    name: str
    nodes: frozenset[str]
    device: str  # cpu or cuda


def split_by_device(graph: Graph) -> list[GraphPart]:
    """Cut the graph where the device kind changes, in as few parts as the wires allow; one part if all is of one kind."""
    level: dict[str, int] = {}  # even: cpu, odd: cuda
    for node in graph.nodes:
        odd = graph.device(node.name) != "cpu"
        lowest = max((level[producer] for producer in graph.producers(node.name)), default=0)
        level[node.name] = lowest if lowest % 2 == odd else lowest + 1
    parts = []
    for number in sorted(set(level.values())):
        names = [node.name for node in graph.nodes if level[node.name] == number]
        title = names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"
        parts.append(GraphPart(title, frozenset(names), "cuda" if number % 2 else "cpu"))
    return parts


@dataclass(kw_only=True, eq=False)
class GraphJob(Job):
    """A chunk of items through a graph."""

    chunk: ChunkJob
    graph: Graph
    store: Store

    @classmethod
    def of(cls, chunk: ChunkJob, graph: Graph, store: Store) -> GraphJob:
        return cls(
            number=chunk.number,
            group=chunk.number,
            name="chunk",
            subject=f"chunk {chunk.number}",
            chunk=chunk,
            graph=graph,
            store=store,
        )

    @property
    def keys(self) -> frozenset[str]:
        return self._shared_left

    @cached_property
    def _shared_left(self) -> frozenset[str]:
        """Keys of the work that the chunk shares with others and that is left to do, as far as its items need it."""
        if not self.chunk.shared:
            return frozenset()
        return frozenset(work.key for work in self._work_left(self.chunk) if work.key in self.chunk.shared)

    def _work_left(self, chunk: ChunkJob) -> list[Work]:
        _, finals, works = work_lists(self.graph, chunk.items)
        return needed(works, chunk.only or finals, chunk.known.keys())

    def prefetch(self, runner: JobRunner) -> None:
        runner.prefetch(self.chunk)

    def run_locally(self, runner: JobRunner, reporter: JobReporter, hook: TaskHook) -> JobResult:
        return runner.run(self.chunk, reporter)  # the reporter makes each stage a step

    def run_on_workers(self, pool: PayloadSender, hook: TaskHook, share: Callable[[Sequence[Artifact]], None]) -> JobResult:
        """Run what the chunk shares with others, hand it out, then run all."""
        total = JobResult(outcomes=[Outcome(item.id) for item in self.chunk.items])
        if self.keys:
            self._run_parts(pool, hook, replace(self.chunk, only=self.keys), total)
            if total.crash:
                return total
            share(list(total.artifacts))
        self._run_parts(pool, hook, self.chunk, total)
        return total

    def _run_parts(self, pool: PayloadSender, hook: TaskHook, chunk: ChunkJob, total: JobResult) -> None:
        """Run what a chunk wants part by part and add it to `total`; the parts before one that finds damage make that again."""
        all_parts = split_by_device(self.graph)
        outcomes = {outcome.id: outcome for outcome in total.outcomes}
        known = {**chunk.known, **{artifact.key: artifact for artifact in total.artifacts}}
        items = [item for item in chunk.items if not outcomes[item.id].reason]
        visited = all_parts
        if chunk.only:
            wanted = {work.node for work in self._work_left(chunk)}
            visited = [part for part in all_parts if part.nodes & wanted]
        index = 0
        while items and index < len(visited):
            part = visited[index]
            nodes = None if len(all_parts) == 1 else part.nodes
            result = self._run_part(pool, hook, replace(chunk, items=items, known=known, nodes=nodes), part)
            _add(total, result, outcomes)
            known |= {artifact.key: artifact for artifact in result.artifacts}
            for key in result.lost:
                known.pop(key, None)
            items = [item for item in items if not outcomes[item.id].reason]
            if result.crash:
                break
            index = 0 if result.lost else index + 1
        total.outcomes = list(outcomes.values())

    def _run_part(self, pool: PayloadSender, hook: TaskHook, chunk: ChunkJob, part: GraphPart) -> JobResult:
        title = f"{part.name} (shared)" if chunk.only else part.name
        return run_as_task(hook, title, self.subject, lambda: self._send_part(pool, chunk, part))

    def _send_part(self, pool: PayloadSender, chunk: ChunkJob, part: GraphPart) -> JobResult:
        """Return the part's result; its artifacts include what a lost worker finished, since other chunks may need that, too."""
        wanted = JobRequirements(part.name, self.subject, self.group, gpu=part.device == "cuda")
        found: list[Artifact] = []

        def what_is_left(sent: ChunkJob) -> ChunkJob:
            known = self.store.lookup({work.key for item in chunk.items for work in self.graph.works(item).values()})
            found[:] = [artifact for key, artifact in known.items() if key not in chunk.known]
            return replace(sent, known={**chunk.known, **known})

        try:
            result = pool.send(wanted, chunk, what_is_left, owner=self.number)
        except JobCrashError as crash:
            outcomes = [Outcome(item.id) for item in chunk.items]
            return JobResult(outcomes=outcomes, artifacts=found, crash=str(crash), stage=part.name)
        return replace(result, artifacts=[*found, *result.artifacts])


def _add(total: JobResult, result: JobResult, outcomes: dict[str, Outcome]) -> None:
    """Add one part's result to the chunk's."""
    for outcome in result.outcomes:
        outcome.seconds += outcomes[outcome.id].seconds
        outcomes[outcome.id] = outcome
    total.artifacts += result.artifacts
    total.repaired += result.repaired
    total.places |= result.places
    total.crash, total.stage, total.broken = result.crash, result.stage, result.broken
    for node, executions in result.computed.items():
        total.count(node, executions, result.seconds.get(node, 0.0))
