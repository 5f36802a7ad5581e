"""The evaluation of a run: features of its pictures, cached in its store by key, then numbers under named protocols.

A feature's key holds network, weights, crop convention, libraries and the aligned face it was made of: another run on the same store, a
rerun or a second report computes none that is there. Nothing that fails in one network holds up another.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from e4s_models.weights import WeightsError
from evaluation.features import NETWORKS
from evaluation.metrics import PairData, Read, measure
from evaluation.protocols import PROTOCOLS, Line, Protocol
from evaluation.results import Evaluation, MetricLine, Unavailable
from flows.execution.graph_jobs import GraphJob, GraphRunner
from flows.execution.jobs import Job, TaskHook, call_directly
from flows.execution.local_executor import LocalExecutor
from flows.execution.process import require_weights, use_threads
from flows.execution.scheduler import run_jobs
from flows.feature_stages import COMPARING, feature_config, feature_stage
from flows.plan import open_store, pick_device, with_instructions
from flows.progress import plural
from storage.run import Row, RunError, RunFolder
from storage.spelling import near_miss
from storage.store import Artifact, Damaged, Store
from tasks.align_near import STAGE as ALIGN_NEAR
from tasks.frame import hash_file, probe
from tasks.graph import Graph, Image, Item, Node, Ref, Settings, UsageError
from tasks.instructions import instruction_set
from tasks.runner import ChunkJob, JobResult, Worker, cpu_threads
from tasks.stage import ItemError

CHUNK: Final = 8  # pairs: their pictures and crops are in memory at once
PAIR_READS: Final = ("source", "target", "swapped", "outside", "skin")
"""What a run of pairs offers to metrics; those of reconstructions read other things and are left out."""
TRUTH_READS: Final = ("truth", "answer")
"""What it offers, too, if its manifest names for each pair the picture that the result should equal."""
_COMPARISONS: Final = ("outside", "skin", "answer")  # reads that are comparisons of the output

NO_OUTPUT = "its output is missing"
DAMAGED_OUTPUT = "its output is not what the run wrote"
UNREADABLE = "a picture of it cannot be read"

Advance = Callable[[int, int], None]
"""Told how many pairs are worked through, and of how many."""


def evaluate(
    folder: RunFolder,
    protocols: Sequence[str | Protocol] = ("open",),
    device: str = "auto",
    progress: Advance = lambda done, total: None,
    chunk: int = CHUNK,
    hook: TaskHook = call_directly,
) -> Evaluation:
    """Measure what a run has finished, computing only the features that its store lacks; may be stopped and repeated at any moment.

    `protocols`: names in `PROTOCOLS`, or protocols of your own; `chunk`: pairs that are in memory at once.
    `hook` runs every network on every chunk; the flow `report` makes each a Prefect task. Networks that are not here are named in
    `unavailable`. Raises UsageError or RunError with the remedy, WeightsError if faces cannot even be aligned and parsed.
    """
    chosen = {found.name: found for found in map(_protocol, protocols)}
    if not chosen:
        raise UsageError(f"no protocol was given; protocols are {', '.join(PROTOCOLS)}")
    run = _read_run(folder)
    lines = [line for protocol in chosen.values() for line in protocol.lines() if set(line.metric.reads) <= set(run.reads)]
    missing = {name: NETWORKS[name].missing() for name in {line.network.name: None for line in lines}}
    kind, computed = pick_device(device), Counter[str]()
    while True:
        pairs = _Pairs(run, [line for line in lines if not missing[line.network.name]], kind, computed)
        try:
            pairs.complete(progress, chunk, hook)
            data = pairs.gather()
            break
        except _Unloadable as found:  # known only once it is opened: its runtime is not here, or computes something else
            missing[found.network] = str(found)
        except Damaged as damaged:
            print(f"e4s: {damaged}; computing it again", file=sys.stderr)
            run.store.cancel_damaged(damaged)
    return _result(run, lines, missing, data, pairs)


def _protocol(named: str | Protocol) -> Protocol:
    if isinstance(named, Protocol):
        return named
    if named not in PROTOCOLS:
        raise UsageError(f"unknown protocol {named!r}{near_miss(named, PROTOCOLS)}; protocols are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[named]


@dataclass(frozen=True)
class _Run:
    """A run folder as it stands."""

    name: str
    store: Store
    rows: Sequence[Row]
    done: Sequence[Row]
    unusable: Mapping[str, tuple[str, str]]  # pair id -> what it counts as, the whole sentence
    outputs: Mapping[str, str]  # pair id -> path
    max_pixels: int
    notes: Sequence[str]

    @property
    def reads(self) -> tuple[Read, ...]:
        """What metrics can read of it."""
        return (*PAIR_READS, *(TRUTH_READS if all(row.truth for row in self.done) else ()))


def _read_run(folder: RunFolder) -> _Run:
    """Settings and rows of a run; every output is compared with its digest. Raises RunError."""
    settings = folder.read_settings()
    made_by = settings.get("e4s", "an unknown version")
    try:
        store, max_pixels = open_store(folder, settings["store"]), int(settings["request"]["max_pixels"])
    except (KeyError, TypeError, ValueError):
        raise RunError(
            f"{folder.settings}: written by another version of e4s ({made_by}, this is {version('e4s')}); "
            "repeat the run's command with this version, then the report"
        ) from None
    rows = folder.read_rows()
    done = [row for row in rows if row.status == "done"]
    if not done:
        counts = Counter(row.status for row in rows)
        raise RunError(
            f"{folder.path}: no pair is finished yet ({counts['failed']} failed, {counts['left']} left); "
            "go on with the run's command, then repeat the report"
        )
    outputs = {row.id: str(folder.path / row.output) for row in done}

    def problem(row: Row) -> tuple[str, str] | None:
        try:
            if hash_file(outputs[row.id]) == row.output_sha256:
                return None
            return DAMAGED_OUTPUT, f"{row.output} differs from the digest in the manifest; delete it and repeat the run's command"
        except ItemError:
            return NO_OUTPUT, f"{row.output} cannot be read; repeat the run's command, which writes it again"

    with ThreadPoolExecutor(cpu_threads()) as threads:
        problems = zip(done, threads.map(problem, done), strict=True)
    unusable = {row.id: found for row, found in problems if found}
    left = sum(row.status == "left" for row in rows)
    notes = [f"the run is not finished: {plural(left, 'pair')} left, {len(done)} measured"] if left else []
    if made_by != version("e4s"):
        notes.append(f"the run was made by e4s {made_by}, measured by {version('e4s')}")
    return _Run(folder.path.absolute().name, store, rows, done, unusable, outputs, max_pixels, notes)


class _Unloadable(WeightsError):
    """A network that is here but does not open."""

    def __init__(self, network: str, sentence: str) -> None:
        super().__init__(sentence)
        self.network = network


def _graph(networks: Sequence[str], wanted: Sequence[Ref], device: str, store: Store) -> Graph:
    """The run's own alignment and label maps, the output's alignment, and a node per network and kind of picture."""
    nodes = [
        Node("align", "align", "image", {"image": "image", "face_index": "face_index"}),
        Node("parse", "parse", "image", {"face": "align.face"}),
        Node(
            "align_swapped",
            ALIGN_NEAR.name,
            "pair",
            {"image": "swapped.image", "crop_to_frame": "target.align.crop_to_frame", "landmarks": "target.align.landmarks"},
        ),
        Node("parse_swapped", "parse", "pair", {"face": "align_swapped.face"}),
    ]
    for name in networks:
        if comparison := COMPARING.get(NETWORKS[name].kind):
            nodes.append(Node(name, name, "pair", comparison.wires))
        else:
            nodes.append(Node(name, name, "image", {"face": "align.face", "landmarks": "align.landmarks"}))
            nodes.append(
                Node(_swapped(name), name, "pair", {"face": "align_swapped.face", "landmarks": "align_swapped.landmarks"}),
            )
    stages = {ALIGN_NEAR.name: ALIGN_NEAR, **{name: feature_stage(NETWORKS[name]) for name in networks}}
    options = {name: feature_config(NETWORKS[name]) for name in networks}
    settings = with_instructions(Settings({}, options, device), store, instruction_set(), write=False)
    return Graph(nodes, (wanted[0][0], "features"), settings, wanted=wanted, extra=stages)


def _swapped(network: str) -> str:
    return f"{network}_swapped"


class _Pairs:
    """The finished pairs of a run under some lines: what is to compute, and what came of it."""

    def __init__(self, run: _Run, lines: Sequence[Line], device: str, computed: Counter[str]) -> None:
        self.run, self.computed = run, computed
        reads: dict[str, set[Read]] = defaultdict(set)
        for line in lines:
            reads[line.network.name] |= set(line.metric.reads)
        self.reads: dict[str, list[Read]] = {name: [read for read in run.reads if read in reads[name]] for name in reads}
        places = [_place(name, read) for name, reads_of in self.reads.items() for read in reads_of]
        self.graph = _graph(list(self.reads), places, device, run.store) if places else None
        self.rows = [row for row in run.done if row.id not in run.unusable]
        self.keys: dict[str, dict[Ref, str]] = {}  # pair id -> keys of what is wanted of it
        self.producers: dict[str, tuple[str, ...]] = {}  # key -> keys of what it is made of
        self.known: dict[str, Artifact] = {}
        self.passing: dict[str, str] = {}  # key -> sentence of a failure that the store does not remember
        for row in self.rows if self.graph else ():
            works = self.graph.works(_item(run, row)) if self.graph else {}
            self.keys[row.id] = {place: works[place].key for place in places}
            for work in works.values():
                self.producers[work.key] = tuple(producer for producer, output in work.reads.values() if output != "image")

    def complete(self, progress: Advance, chunk: int, hook: TaskHook) -> None:
        """Compute the features that the store lacks. Raises _Unloadable, WeightsError, DiskFull; RuntimeError on a program error."""
        if self.graph is None:
            return
        self.known = self.run.store.lookup(self.producers) if self.producers else {}
        todo = [row for row in self.rows if any(map(self._is_left, self.keys[row.id].values()))]
        if not todo:
            return
        todo.sort(key=lambda row: (row.target_sha256, row.target_face))  # pairs of one target share its crop, which is not kept
        require_weights(self.graph.weights())
        use_threads(cpu_threads())
        worker = Worker(self.graph, self.run.store, "final", cpu_threads())
        with closing(LocalExecutor(GraphRunner(worker), hook)) as executor:
            self._open_networks(worker, todo)
            run_jobs(_FeaturePlanner(self, self.graph, todo, chunk, progress), executor)
        progress(len(self.rows), len(self.rows))

    def gather(self) -> dict[str, PairData]:
        """What each network made of all finished pairs, a row for each of them. Raises Damaged."""
        sources = [f"{row.source_sha256}:{row.source_face}" for row in self.run.done]
        gathered = {}
        for network, reads in self.reads.items():
            rows: dict[Read, list[Any]] = {read: [None] * len(self.run.done) for read in reads}
            failures: dict[Read, dict[int, str]] = {read: {} for read in reads}
            made: dict[str, Any] = {}  # sources and targets serve many pairs
            for index, row in enumerate(self.run.done):
                for read in reads:
                    if row.id in self.run.unusable:
                        failures[read][index] = self.run.unusable[row.id][0]
                        continue
                    key = self.keys[row.id][_place(network, read)]
                    reason = self._failure(key)
                    if reason:
                        failures[read][index] = reason if read in ("swapped", *_COMPARISONS) else f"{read}: {reason}"
                        continue
                    if key not in made:
                        made[key] = self.run.store.read(self.known[key], "features")
                    if unfit := _unfit(network, made[key]):
                        failures[read][index] = unfit
                        continue
                    rows[read][index] = made[key]
            empty = np.zeros_like(next(iter(made.values()), np.zeros(1)))
            features: dict[Read, Any] = {read: np.stack([empty if row is None else row for row in rows[read]]) for read in reads}
            gathered[network] = PairData(features=features, source_ids=sources, failures=failures)
        return gathered

    def unusable(self) -> dict[str, str]:
        """Pairs of which a picture is gone or damaged, and the whole sentence."""
        sentences = {pair: sentence for pair, (_, sentence) in self.run.unusable.items()}
        for row in self.rows if self.passing else ():
            found = next((key for wanted in self.keys[row.id].values() for key in self._upwards(wanted) if key in self.passing), "")
            if found:
                sentences[row.id] = self.passing[found]
        return sentences

    def _open_networks(self, worker: Worker, todo: Sequence[Row]) -> None:
        """Load what will be used, so that a network that does not open is known before anything is computed."""
        for network, reads in self.reads.items():
            places = [_place(network, read) for read in reads]
            if any(self._is_left(self.keys[row.id][place]) for row in todo for place in places):
                try:
                    worker.model(places[0][0])
                except WeightsError as error:
                    raise _Unloadable(network, str(error)) from None

    def add(self, result: JobResult) -> None:
        """Take in what a chunk came to. Raises RuntimeError on a program error."""
        for sentence in result.repaired:
            print(f"e4s: {sentence}", file=sys.stderr)
        self.known |= {artifact.key: artifact for artifact in result.artifacts}
        self.passing |= {key: f"{stage}: {reason}" for key, (stage, reason) in result.failed.items() if key not in self.known}
        for node, executions in result.computed.items():
            network = self.graph.stages[node].name if self.graph else ""
            if network in self.reads:
                self.computed[network] += executions
        if result.crash:
            raise RuntimeError(f"the evaluation was stopped by a program error:\n{result.crash}")

    def _is_left(self, key: str) -> bool:
        return key not in self.known and not self._failure(key)

    def _failure(self, key: str) -> str:
        """What the lack of a value counts as; "" if nothing on the way to it is known to fail."""
        for one in self._upwards(key):
            if one in self.passing:
                return UNREADABLE
            if one in self.known and self.known[one].failed:
                return self.known[one].reason
        return ""

    def _upwards(self, key: str) -> Iterator[str]:
        """A key and those of what it is made of, as far as these are not known."""
        left = [key]
        while left:
            one = left.pop()
            yield one
            if one not in self.known:
                left += self.producers[one]


class _FeaturePlanner:
    """Pairs whose features are missing -> chunks. Only the planning process runs them."""

    is_stopped = False

    def __init__(self, pairs: _Pairs, graph: Graph, todo: Sequence[Row], size: int, progress: Advance) -> None:
        self._pairs, self._graph, self._progress = pairs, graph, progress
        self._parts = enumerate(todo[start : start + size] for start in range(0, len(todo), size))
        self._ready = deque[GraphJob]()
        self._done = len(pairs.rows) - len(todo)

    def ready_jobs(self) -> Iterable[GraphJob]:
        return self._ready

    def make_more_ready(self) -> bool:
        """Take the next chunk, and one more that is read ahead."""
        before = len(self._ready)
        while len(self._ready) < 2 and (following := next(self._parts, None)):
            number, rows = following
            chunk = ChunkJob(number, [_item(self._pairs.run, row, probed=True) for row in rows], {})
            self._ready.append(GraphJob.of(self._with_known(chunk), self._graph, self._pairs.run.store))
        return len(self._ready) > before

    def start(self, job: Job) -> Job:
        assert isinstance(job, GraphJob)
        self._ready.remove(job)
        self._progress(self._done, len(self._pairs.rows))
        return replace(job, chunk=self._with_known(job.chunk))

    def on_finished(self, job: Job, result: JobResult) -> None:
        assert isinstance(job, GraphJob)
        self._pairs.add(result)
        self._done += len(job.chunk.items)

    def on_stage(self, job: Job, node: str) -> None: ...
    def on_progress(self, job: Job, share: float) -> None: ...
    def on_keys_used(self, keys: Collection[str]) -> None: ...
    def on_shared(self, job: Job, artifacts: Sequence[Artifact]) -> None: ...

    def _with_known(self, chunk: ChunkJob) -> ChunkJob:
        """Return a chunk with what is known by now."""
        known = self._pairs.known
        keys = {work.key for item in chunk.items for work in self._graph.works(item).values()}
        return replace(chunk, known={key: known[key] for key in keys if key in known})


def _item(run: _Run, row: Row, probed: bool = False) -> Item:
    pictures = {
        "source": (row.source, row.source_sha256, row.source_face, row.source_reading),
        "target": (row.target, row.target_sha256, row.target_face, row.target_reading),
        "swapped": (run.outputs[row.id], row.output_sha256, 0, ""),
    }
    if row.truth:
        pictures["truth"] = (row.truth, row.truth_sha256, row.target_face, "")
    images = {}
    for role, (path, sha256, face, reading) in pictures.items():
        images[role] = Image(path, sha256, face, _pixels(path, run) if probed else 0, reading)
    return Item(row.id, images)


def _place(network: str, read: Read) -> Ref:
    """Where the graph makes what is read of a network: (node, role or "")."""
    if read in _COMPARISONS:
        return network, ""
    return (_swapped(network), "") if read == "swapped" else (network, read)


def _unfit(network: str, features: npt.NDArray[Any]) -> str:
    """Why no number can be made of features (D,); "" if one can."""
    if not np.isfinite(features).all():
        return f"{network} gives numbers that are not finite"
    return f"{network} gives nothing but zeros" if NETWORKS[network].kind == "identity" and not features.any() else ""


def _pixels(path: str, run: _Run) -> int:
    try:
        height, width = probe(path, run.max_pixels)
    except ItemError:
        return 0  # the stage that reads it says why
    return height * width


def _result(run: _Run, lines: Sequence[Line], missing: Mapping[str, str], data: Mapping[str, PairData], pairs: _Pairs) -> Evaluation:
    measured = []
    for line in lines:
        if line.network.name not in data:
            continue
        state = line.state()
        outcome = measure(line.metric, data[line.network.name], protocol=line.protocol, network=line.network.name, sha256=state["sha256"])
        measured.append(
            MetricLine(
                measured=outcome.measured,
                title=line.metric.title,
                unit=line.metric.unit,
                better=line.metric.better,
                state=state,
                values=outcome.values,
            )
        )
    no_face: dict[str, str] = {}
    unusable = pairs.unusable()
    for found in data.values():
        for index, reason in found.failures.get("swapped", {}).items():
            pair = run.done[index].id
            if pair not in unusable:
                no_face.setdefault(pair, reason)
    counts = Counter(row.status for row in run.rows)
    return Evaluation(
        run=run.name,
        pairs=[row.id for row in run.done],
        outputs=[row.output_sha256 for row in run.done],
        total=len(run.rows),
        done=counts["done"],
        failed=counts["failed"],
        left=counts["left"],
        lines=measured,
        unavailable=[
            Unavailable(protocol=line.protocol, metric=line.metric.name, network=line.network.name, reason=missing[line.network.name])
            for line in lines
            if missing[line.network.name]
        ],
        computed=dict(pairs.computed),
        no_face=no_face,
        unusable=unusable,
        notes=run.notes,
    )
