"""The one generic stage runner: a chunk of items through the graph, in one process.

`ChunkJob` is plain data and `run_chunk` a plain function, so that any executor can carry them to a worker. What one stage does to one
chunk goes through `call`, which is where a flow hangs its task policy.
"""

from __future__ import annotations

import errno
import os
import re
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

from e4s_models.weights import weight_digest
from storage.faults import fault_point
from storage.keys import digest
from storage.store import Artifact, Damaged, Finished, Store, StoreError
from tasks.frame import MAX_PIXELS, Frame, ImageFile
from tasks.graph import Graph, Image, Item, Ref, Work, needed
from tasks.stage import Array, Inputs, ItemError, Outputs, PassingError

Keep = Literal["all", "resume", "final"]
PUBLISH_BYTES = 100_000_000  # of decoded values that a stage gathers before it publishes them

Call = Callable[[str, Callable[[], None]], None]
"""Runs one stage on one chunk: (name of the node, the work)."""


WorkLists = tuple[list[dict[Ref, Work]], list[str], dict[str, Work]]
"""A chunk's work item by item, the keys of its final artifacts, and all its work by key."""


def work_lists(graph: Graph, items: Iterable[Item]) -> WorkLists:
    """The work that keys decide for these items; what is needed of it, `needed` says."""
    by_item = [graph.works(item) for item in items]
    finals = [work.key for works in by_item for place, work in works.items() if place in graph.wanted]
    return by_item, finals, {work.key: work for works in by_item for work in works.values()}


class DiskFull(Exception):
    """The store has no room: nothing finished is lost, the same command continues."""


@dataclass(frozen=True)
class ChunkJob:
    """What one worker does in one go."""

    number: int
    items: Sequence[Item]
    known: Mapping[str, Artifact]  # finished or failed artifacts that these items may use
    shared: frozenset[str] = frozenset()  # keys of per-image work that other chunks read too: published whatever the retention
    nodes: frozenset[str] | None = None  # only these, because the others run on another kind of device; None: all
    only: frozenset[str] = frozenset()  # keys to make, and what they need; none: all that the items want


@dataclass
class Outcome:
    """What became of one item."""

    id: str
    artifact: Artifact | None = None  # the final one
    stage: str = ""
    reason: str = ""
    note: str = ""  # what limits the result, see `tasks.stage.Stage.note`
    seconds: float = 0.0


@dataclass
class JobResult:
    """What became of a job, in small facts: values are in the store. It may come from another process."""

    outcomes: list[Outcome] = field(default_factory=list)  # of a chunk: one per item
    artifacts: list[Artifact] = field(default_factory=list)  # published by this job
    facts: dict[str, Array] = field(default_factory=dict)  # small outputs that the planning process needs at once
    computed: dict[str, int] = field(default_factory=dict)  # executions by node, or by the job's own name
    seconds: dict[str, float] = field(default_factory=dict)  # compute of these
    spent: float = 0.0  # s from begin to end
    repaired: list[str] = field(default_factory=list)  # sentences about damaged artifacts that were computed again
    damaged: tuple[Artifact, str] | None = None  # something it reads, which other jobs must make again, and the sentence
    stage: str = ""  # where it failed or crashed
    reason: str = ""  # why it failed as a whole
    crash: str = ""  # traceback of a program error that stopped it
    broken: bool = False  # by something that is no item's fault: a model that cannot be loaded
    failed: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # key -> (stage, reason), remembered failures included
    lost: list[str] = field(default_factory=list)  # keys found damaged that must be made by nodes outside the job's
    places: dict[str, str] = field(default_factory=dict)  # name of the worker process by node, where there are several

    @property
    def succeeded(self) -> bool:
        return not (self.damaged or self.reason or self.crash)

    def count(self, name: str, executions: int, seconds: float) -> None:
        """Add executions of a node, or of the job itself, and the time they took."""
        self.computed[name] = self.computed.get(name, 0) + executions
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def include(self, part: JobResult) -> None:
        """Add what a part of the job did to its counts. Raises ProgramError if a program error stopped the part."""
        self.repaired += part.repaired
        for node, executions in part.computed.items():
            self.count(node, executions, part.seconds[node])
        if part.crash:
            self.stage, self.broken = part.stage, part.broken
            raise ProgramError(part.crash)


class ProgramError(Exception):
    """A job was stopped by a program error: its traceback."""


def raise_if_full(error: OSError, where: str) -> None:
    """Raise DiskFull if that is what an error means; `where` is full if the error names no file."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise DiskFull(
            f"{error.filename or where}: no space left on the device; free some and repeat the same command (nothing finished is lost)"
        ) from None


class Root(Protocol):
    """What the stages get as the root input `image`."""

    @property
    def path(self) -> str: ...
    @property
    def pixels(self) -> int: ...
    def read(self) -> Frame: ...
    def text(self) -> dict[str, str]: ...


@dataclass
class Loaded:
    """A root image whose decoding was started ahead of time."""

    file: ImageFile
    frame: Future[Frame]
    pixels: int

    @property
    def path(self) -> str:
        return self.file.path

    def read(self) -> Frame:
        return self.frame.result()

    def text(self) -> dict[str, str]:
        return self.file.text()


@dataclass
class Worker:
    """What a run keeps between chunks in one process: the store, decoded pictures, threads for decoding ahead and writing behind."""

    graph: Graph
    store: Store
    keep: Keep = "all"
    at_once: int = 1  # items that a stage works on at the same time, where it allows that
    notify: Callable[[float], None] = lambda share: None  # told which share of the running chunk's work is done
    opened: Mapping[str, Root] = field(default_factory=dict)  # root images that are no files and are there already, by sha256
    given: Mapping[str, Outputs] = field(default_factory=dict)  # outputs by key that are there without any work, see `Item.given`
    sink: Callable[[str, Outputs], None] | None = None  # takes the finals (key, values); they are published only if all is kept
    loaded: dict[str, Root] = field(default_factory=dict)
    lists: dict[tuple[str, ...], WorkLists] = field(default_factory=dict)  # of the last chunks, by their items
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "e4s-io"))
    publisher: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "e4s-publish"))

    def __post_init__(self) -> None:
        self.items = ThreadPoolExecutor(self.at_once, "e4s-item")

    def prefetch(self, job: ChunkJob) -> None:
        """Start decoding the pictures that a coming chunk will read, as far as 100 million pixels go."""
        room = 100_000_000
        for image in self.images_read(job).values():
            room -= image.pixels
            if room < 0:
                return
            self._load(image)

    def works(self, job: ChunkJob) -> WorkLists:
        """A chunk's work, which keys decide: worked out once for all that ask."""
        ids = tuple(item.id for item in job.items)
        if ids not in self.lists:
            if len(self.lists) > 2:
                self.lists.pop(next(iter(self.lists)))
            self.lists[ids] = work_lists(self.graph, job.items)
        return self.lists[ids]

    def images_read(self, job: ChunkJob) -> dict[str, Image]:
        """The pictures that a chunk's missing work reads."""
        _, finals, works = self.works(job)
        have = job.known.keys() | self.given.keys()
        read = {ref[0] for work in needed(works, job.only or finals, have) for ref in work.reads.values() if ref[1] == "image"}
        return {image.sha256: image for item in job.items for image in item.images.values() if image.sha256 in read}

    def model(self, node: str) -> Any:
        """The node's model, loaded once per process."""
        stage, config, device = self.graph.stages[node], self.graph.configs[node], self.graph.device(node)
        weights = [weight_digest(name) for name in stage.weights(config)]
        identity = digest([stage.name, stage.backend, repr(config), device, weights])
        if identity not in _models:
            _models[identity] = stage.load(config, device)
        return _models[identity]

    def batch(self, node: str) -> int:
        """Items that go through the node at once: a GPU's batch, or one per thread where the stage allows threads."""
        cost = self.graph.stages[node].cost
        return cost.gpu_batch if self.graph.device(node) != "cpu" else self.at_once if cost.threads else 1

    def compute(self, node: str, inputs: Sequence[Inputs]) -> list[Outputs | ItemError]:
        """What the node's stage makes of at most `batch(node)` items."""
        stage, config, model = self.graph.stages[node], self.graph.configs[node], self.model(node)
        if len(inputs) > 1 and self.graph.device(node) == "cpu":
            return list(self.items.map(lambda one: stage.run(model, config, [one])[0], inputs))
        return compute_halved(partial(stage.run, model, config), inputs)

    def _load(self, image: Image) -> Root:
        if image.sha256 in self.opened:
            return self.opened[image.sha256]
        if image.sha256 not in self.loaded:
            file = ImageFile(image.path, image.sha256, max(image.pixels, MAX_PIXELS))  # the user's limit was applied by the plan
            self.loaded[image.sha256] = Loaded(file, self.threads.submit(file.read), image.pixels)
        return self.loaded[image.sha256]

    def trim(self, pixels: int = 200_000_000) -> None:
        """Let go of the oldest decoded pictures beyond a number of pixels; who needs one again decodes it again."""
        held = sum(loaded.pixels for loaded in self.loaded.values())
        for sha256 in list(self.loaded):
            if held <= pixels:
                return
            held -= self.loaded.pop(sha256).pixels

    def close(self) -> None:
        self.publisher.shutdown()  # first: what was computed is published, with the help of the other threads
        self.threads.shutdown(cancel_futures=True)
        self.items.shutdown(cancel_futures=True)


_models: dict[str, Any] = {}  # of this process, by stage, config, device and weights


def forget_models() -> None:
    """Let go of all models of this process, before it works with others."""
    _models.clear()


def compute_halved(run: Callable[[Sequence[Inputs]], Sequence[Outputs | ItemError]], batch: Sequence[Inputs]) -> list[Outputs | ItemError]:
    """Run a stage; when a GPU's memory does not suffice, halve the batch, and at one item let that item fail."""
    import torch

    try:
        with torch.inference_mode():
            return list(run(batch))
    except torch.OutOfMemoryError:
        pass  # recovered below, when the exception no longer holds the failed batch's tensors
    torch.cuda.empty_cache()
    if len(batch) == 1:
        return [PassingError("the device's memory does not suffice for this item; use --device cpu or a smaller side")]
    half = len(batch) // 2
    return [*compute_halved(run, batch[:half]), *compute_halved(run, batch[half:])]


def run_chunk(worker: Worker, job: ChunkJob, call: Call) -> JobResult:
    """Run one chunk as far as it goes, in this process.

    What is finished is published whatever happens. Program errors are part of the result; DiskFull, StoreError and interruption leave as
    exceptions.
    """
    run = _ChunkRun(worker, job)
    try:
        run.carry_through(call)
    except OSError as error:
        raise_if_full(error, worker.store.url)
        run.result.crash = traceback.format_exc()
    except StoreError:
        raise  # no fault of the program: the run stops with the sentence
    except Exception:
        run.result.crash = traceback.format_exc()
    finally:
        for sha256 in worker.images_read(job):
            worker.loaded.pop(sha256, None)
    run.conclude()
    return run.result


class _ChunkRun:
    def __init__(self, worker: Worker, job: ChunkJob) -> None:
        self.worker, self.job, self.graph, self.store = worker, job, worker.graph, worker.store
        self.known = dict(job.known)
        self.values: dict[Ref, Any] = {}
        self.failed: dict[str, tuple[str, str]] = {}  # key of the work that failed -> (stage, reason)
        self.blocked: set[str] = set()  # keys that cannot be made because of these
        self.last_reader: dict[Ref, str] = {}
        self.damaged: Damaged | None = None
        self.total = 0  # works to do, those done included
        self.spent: dict[str, float] = defaultdict(float)  # key -> seconds
        self.notes: dict[str, str] = {}  # by key, of work that was computed
        self.pending: list[Future[list[Artifact]]] = []
        self.result = JobResult()
        works, self.finals, self.works = worker.works(job)
        self.handed = _handed_on(self.works, job.nodes)
        self.final_nodes = {node for node, _ in self.graph.wanted}
        self.works_of = {item.id: by_node for item, by_node in zip(job.items, works, strict=True)}

    def carry_through(self, call: Call) -> None:
        if self.worker.keep == "all":
            given = [work for work in self.works.values() if work.key in self.worker.given and work.key not in self.known]
            self._publish([self._finished(work, self.worker.given[work.key]) for work in given])
        while True:
            self._adopt_failures()
            have = self.known.keys() | self.failed.keys() | self.worker.given.keys()
            todo = [work for work in needed(self.works, self.job.only or self.finals, have) if self._is_mine(work)]
            self.total = sum(self.result.computed.values()) + len(todo)
            try:
                self._pass_over(todo, call)
                self._settle()
                return
            except Damaged as damaged:
                self.damaged = None
                self._settle()
                self.store.cancel_damaged(damaged)
                self.known.pop(damaged.artifact.key, None)
                self.result.repaired.append(f"{damaged}; computing it again")
                self.values.clear()  # what was dropped may be needed again: start over from what is published
                if not self._is_mine(self.works[damaged.artifact.key]):
                    self.result.lost.append(damaged.artifact.key)
                    return

    def _is_mine(self, work: Work) -> bool:
        return self.job.nodes is None or work.node in self.job.nodes

    def _pass_over(self, todo: list[Work], call: Call) -> None:
        by_node = {node.name: [work for work in todo if work.node == node.name] for node in self.graph.nodes}
        self.last_reader = {ref: node for node, works in by_node.items() for work in works for ref in work.reads.values()}
        for node in self.graph.nodes:
            if works := by_node[node.name]:
                self.result.stage = node.name
                call(node.name, partial(self._run_node, node.name, works))
                if self.damaged:
                    raise self.damaged
                for ref, reader in self.last_reader.items():
                    if reader == node.name:
                        self.values.pop(ref, None)
                        self.worker.loaded.pop(ref[0], None)

    def _run_node(self, node: str, works: list[Work]) -> None:
        ready: list[Work] = []
        for work in works:
            if any(producer in self.failed or producer in self.blocked for producer, _ in work.reads.values()):
                self.blocked.add(work.key)
            else:
                ready.append(work)
        if ready:
            self.result.broken = True
            self.worker.model(node)  # loading is no work on an item
            self.result.broken = False
        batch_size = self.worker.batch(node)
        finished: list[Finished] = []
        size = 0  # bytes of their values
        try:
            for start in range(0, len(ready), batch_size):
                batch = ready[start : start + batch_size]
                try:
                    inputs = [{**{name: self._value(ref) for name, ref in work.reads.items()}, **work.constants} for work in batch]
                except Damaged as damaged:  # no fault of the program: kept out of the executor's error handling
                    self.damaged = damaged
                    return
                began = time.perf_counter()
                outputs = self.worker.compute(node, inputs)
                seconds = time.perf_counter() - began
                self.result.count(node, len(batch), seconds)
                for work, output in zip(batch, outputs, strict=True):
                    self.spent[work.key] = seconds / len(batch)
                    taken = self._take(node, work, output)
                    finished += taken
                    size += sum(value.nbytes for item in taken for _, value in item.values.values())
                if size > PUBLISH_BYTES:
                    self._publish(finished)
                    finished, size = [], 0
                self.worker.trim()
                self.worker.notify(sum(self.result.computed.values()) / max(self.total, 1))
                fault_point("mid-stage")
        finally:  # what was computed before an error or an interruption is kept
            if finished:
                self._publish(finished)

    def _take(self, node: str, work: Work, output: Outputs | ItemError) -> list[Finished]:
        stage = self.graph.stages[node]
        if isinstance(output, ItemError):
            self.failed[work.key] = (stage.name, str(output))
            return [] if isinstance(output, PassingError) else [Finished(work.key, stage.name, reason=str(output))]
        if output.keys() != stage.writes.keys():
            raise TypeError(f"stage {stage.name} declares {sorted(stage.writes)} but wrote {sorted(output)}")
        if stage.note:
            name, describe = stage.note
            self.notes[work.key] = describe(output[name])
        for name, value in output.items():
            if (work.key, name) in self.last_reader:
                self.values[work.key, name] = value
        if self.worker.sink and node in self.final_nodes:
            self.worker.sink(work.key, output)
        kept = (
            self.worker.keep == "all"
            or (node in self.final_nodes and not self.worker.sink)
            or work.key in self.job.shared
            or work.key in self.handed
            or (self.worker.keep == "resume" and self.graph.all_nodes[node].checkpoint)
        )
        return [self._finished(work, output)] if kept else []

    def _finished(self, work: Work, output: Outputs) -> Finished:
        stage = self.graph.stages[work.node]
        return Finished(work.key, stage.name, {name: (stage.writes[name], value) for name, value in output.items()})

    def _value(self, ref: Ref) -> Any:
        key, output = ref
        if output == "image":
            return self.worker._load(self._image(key))
        if key in self.worker.given:
            return self.worker.given[key][output]
        if ref not in self.values:
            self.values[ref] = self.store.read(self.known[key], output)
        return self.values[ref]

    def _image(self, sha256: str) -> Image:
        return next(image for item in self.job.items for image in item.images.values() if image.sha256 == sha256)

    def _publish(self, finished: list[Finished]) -> None:
        # Encoding and writing happen behind, in order, but at most two publications wait: memory stays bounded.
        if len(self.pending) >= 2:
            self.pending[-2].result()
        self.pending.append(self.worker.publisher.submit(self.store.publish, finished, self.worker.threads))

    def _settle(self) -> None:
        """Wait until all that was computed is published."""
        pending, self.pending = self.pending, []
        for future in pending:
            published = future.result()
            self.result.artifacts += published
            self.known |= {artifact.key: artifact for artifact in published if not artifact.failed}

    def _adopt_failures(self) -> None:
        for key, artifact in list(self.known.items()):
            if artifact.failed:
                self.failed[key] = (artifact.stage, artifact.reason)
                del self.known[key]

    def conclude(self) -> None:
        for future in self.pending:  # after a crash: what was computed before it still counts
            if not future.exception():
                self.result.artifacts += future.result()
                self.known |= {artifact.key: artifact for artifact in future.result() if not artifact.failed}
        if not self.result.crash:
            self.result.stage = ""
        charged: set[str] = set()
        self.result.failed = self.failed
        for item in self.job.items:
            works = self.works_of[item.id]
            final = works.get((self.graph.final[0], ""))
            outcome = Outcome(item.id, self.known.get(final.key) if final else None)
            for key in {work.key for work in works.values()} - charged:
                charged.add(key)  # shared work is counted once, with the first item that needed it
                outcome.seconds += self.spent.get(key, 0.0)
            outcome.note = notes_of(self.graph, self.store, works, self.known, self.notes)
            if not outcome.artifact:
                outcome.stage, outcome.reason = failure(item, works, self.failed)
            self.result.outcomes.append(outcome)


def notes_of(graph: Graph, store: Store, works: Mapping[Ref, Work], known: Mapping[str, Artifact], computed: Mapping[str, str]) -> str:
    """Return what limits an item's result, from work that was `computed` (key -> note) or is stored; "" where neither says it."""
    notes = []
    for work in works.values():
        said = graph.stages[work.node].note
        if said and work.key in computed:
            notes.append(computed[work.key])
        elif said and work.key in known and not known[work.key].failed:
            name, describe = said
            with suppress(Damaged):  # a damaged artifact is found when it is needed; a note is not worth a repair
                notes.append(describe(store.read(known[work.key], name)))
    return "; ".join(filter(None, notes))


def singles(graph: Graph, job: ChunkJob, result: JobResult, first_number: int) -> list[ChunkJob]:
    """Return the items that a crashed chunk left, each as a job of its own: only the culprit is stopped by the program error again.

    What several of them read is made once, since whatever one finishes the others know by `ChunkJob.shared`.
    """
    settled = {outcome.id for outcome in result.outcomes if outcome.artifact or outcome.reason}
    left = [item for item in job.items if item.id not in settled]
    known = {**job.known, **{artifact.key: artifact for artifact in result.artifacts}}
    keys = [{work.key for work in graph.works(item).values()} for item in left]
    readers = Counter(key for of_item in keys for key in of_item)
    shared = job.shared | {key for key, count in readers.items() if count > 1}
    return [
        replace(job, number=number, items=[item], known={key: known[key] for key in mine if key in known}, shared=shared & mine)
        for number, (item, mine) in enumerate(zip(left, keys, strict=True), first_number)
    ]


def crash_sentence(crash: str) -> str:
    """Return one sentence about a program error: the last line of its traceback, or the text itself where it is none."""
    if not crash.startswith("Traceback"):
        return crash
    said = [line for line in crash.splitlines() if re.match(r"[\w.]+(: |$)", line)]
    return f"program error: {said[-1] if said else 'unknown'} (its traceback is in log.jsonl)"


def failure(item: Item, works: Mapping[Ref, Work], failed: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    """Stage and reason of an item's first failed work in reading order, naming the picture; ("", "") if none failed."""
    for (_, role), work in works.items():
        if work.key in failed:
            stage, reason = failed[work.key]
            return stage, f"{role} {item.images[role].path}: {reason}" if role else reason
    return "", ""


def _handed_on(works: Mapping[str, Work], nodes: frozenset[str] | None) -> set[str]:
    """Keys of what `nodes` make and others read: published whatever the retention, because those run elsewhere."""
    if nodes is None:
        return set()
    outside = (work for work in works.values() if work.node not in nodes)
    return {key for work in outside for key, output in work.reads.values() if output != "image" and works[key].node in nodes}


def cpu_threads() -> int:
    """Threads that computing libraries are given: the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
