"""What runs in a Dask worker process: prove that it fits the run, then run its jobs. Everything that arrives is plain data.

A process holds one set of models and runs one job at a time, however many threads Dask gave it. When it dies, what it published is in the
store and nothing else is left. `RunContext` and `pickle_call` are used by the planning process, too.
"""

from __future__ import annotations

import hashlib
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from distributed import Worker as DaskWorker
from distributed import get_worker
from distributed.worker import WORKER_ANY_RUNNING

from e4s_models.weights import WeightsError
from flows.execution.graph_jobs import GraphRunner
from flows.execution.jobs import JobRunner
from flows.execution.process import require_weights, use_threads
from storage.keys import digest
from storage.runs import PROBES
from storage.store import Store, StoreError
from tasks.frame import hash_file
from tasks.graph import Graph, Node, Ref, Settings, UsageError
from tasks.instructions import CHOSEN, instruction_set
from tasks.runner import JobResult, Keep, Worker, forget_models
from tasks.stage import ItemError

PACKAGES = ("e4s_models", "storage", "tasks", "flows")
REPORT_EVERY = 1.0  # s between two messages about a running job's share


@dataclass(frozen=True)
class RunContext:
    """What a worker must know of a run, and must prove to agree with. Plain data."""

    run: str  # random name of this execution
    nodes: tuple[Node, ...]
    final: Ref
    settings: Settings
    fingerprints: Mapping[str, Mapping[str, Any]]  # fingerprints of the nodes, as the planning process computed them
    program: str  # digest of the program
    store: str  # URL or absolute path
    keep: Keep
    threads: int  # of the computing libraries: bytes are promised for one count
    at_once: int
    instructions: str  # of the processor: bytes are promised for one set
    picture: tuple[str, str] = ("", "")  # path and sha256 of one input

    def graph(self) -> Graph:
        return Graph(self.nodes, self.final, self.settings)

    def fingerprints_here(self) -> Mapping[str, Mapping[str, Any]]:
        """Return what decides bytes, as this process would compute them. Raises UsageError, WeightsError or ImportError."""
        return self.graph().fingerprints

    def check_inputs_visible(self) -> str:
        """Return what this process does not see of the inputs, as a sentence; "" if it sees them."""
        path, sha256 = self.picture
        try:
            return "" if not path or hash_file(path) == sha256 else f"{path} holds something else there."
        except ItemError as error:
            return str(error)

    def make_runner(self) -> JobRunner:
        """Make what a process keeps between the jobs of this run."""
        return GraphRunner(Worker(self.graph(), Store(self.store), self.keep, self.at_once))


class Payload(Protocol):
    """What a worker does in one go, as plain data."""

    @property
    def number(self) -> int:
        """Number of its job."""
        ...


class IncompatibleWorkerError(Exception):
    """This process does not fit the run: the sentence says why."""


class _Call:
    """A call as data: unpickling it is calling it.

    So the task that the scheduler sees is `pickle.loads` of some bytes: the scheduler needs nothing of ours, and a worker that lacks our
    program says so as the outcome of the task.
    """

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._parts = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._parts


def pickle_call(function: Callable[..., Any], *arguments: Any) -> bytes:
    """Return bytes whose `pickle.loads` calls a function of ours with these arguments."""
    return pickle.dumps(_Call(function, arguments))


_busy = threading.Lock()  # one job at a time: models and their memory are for one
_fitting: set[str] = set()  # runs that this process fits
_stopped: set[str] = set()
_current: tuple[str, JobRunner] | None = None
_models_of = ""


def source_digest(settings: Settings) -> str:
    """Return the sha256 over the program: our packages' .py files, and the modules outside of them that serve stages."""
    total = hashlib.sha256()
    for name, path in sorted(_sources(settings)):
        total.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def _sources(settings: Settings) -> list[tuple[str, Path]]:
    found = []
    for package in PACKAGES:
        spec = find_spec(package)
        roots = list(spec.submodule_search_locations or ()) if spec else []
        found += [(f"{package}/{path.relative_to(root).as_posix()}", path) for root in map(Path, roots) for path in root.rglob("*.py")]
    for backend in settings.backends.values():
        module, colon, _ = backend.partition(":")
        if colon and (file := import_module(module).__file__):
            found.append((module, Path(file)))
    return found


def handshake_worker(context: RunContext, offers_gpu: bool) -> str:
    """Check compatibility as a worker's first task for a run, and stop Dask's profiler.

    The profiler looks at all threads a hundred times a second (`sys._current_frames`). Before Python 3.11.9 that can deadlock with
    threads that start or end just then (CPython issue 106883), and the whole worker stands still: here after some fifty chunks of
    cheap stages.
    """
    here = get_worker()
    for name in ("profile", "profile-cycle"):
        if callback := here.periodic_callbacks.get(name):
            here.loop.add_callback(callback.stop)
    return check_compatibility(context, offers_gpu)


def check_compatibility(context: RunContext, offers_gpu: bool) -> str:
    """Return why this process cannot work for the run, as a sentence; "" if it can."""
    if context.run in _fitting:
        return ""
    use_threads(context.threads)
    problem = _program(context) or _weights(context) or _store(context) or _inputs(context) or _gpu(context, offers_gpu)
    if not problem:
        _fitting.add(context.run)
    return problem


def _program(context: RunContext) -> str:
    try:
        if (here := instruction_set()) != context.instructions:
            return (
                f"it would compute other bytes: with the instruction set {here}, and this run is for {context.instructions}; "
                f"leave it out, or plan a run for such workers by {CHOSEN}={here.split(' ')[0]} (docs/cluster.md)"
            )
        if source_digest(context.settings) != context.program:
            return "its program differs from that of this run; install the same version there"
        differences = [
            text for name, found in context.fingerprints_here().items() for text in _differences(name, found, context.fingerprints[name])
        ]
    except (UsageError, WeightsError, ImportError) as error:
        return str(error)
    if differences:
        return f"it would compute other bytes: {', '.join(sorted(set(differences)))}; install the same versions and weights there"
    return ""


def _differences(name: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    found = []
    for group in ("libraries", "weights"):
        for part in sorted(here[group].keys() | there[group].keys()):
            mine, wanted = here[group].get(part), there[group].get(part)
            if mine != wanted:
                found.append(f"{part} {str(mine)[:12]} there, {str(wanted)[:12]} in this run")
    if not found and here != there:
        found.append(f"stage {here.get('stage', name)}")
    return found


def _weights(context: RunContext) -> str:
    try:
        require_weights(sorted({name for found in context.fingerprints.values() for name in found["weights"]}))
    except WeightsError as error:
        return str(error)
    return ""


def _store(context: RunContext) -> str:
    try:
        files = Store(context.store).files
        if files.read(f"{PROBES}/{context.run}") != context.run.encode():
            return f"it sees another store under {context.store}; give a folder that all machines share, or an s3:// URL, by --store"
        reply = f"{PROBES}/{context.run}-{uuid.uuid4().hex[:8]}"
        files.write(reply, b"")
        files.remove([reply])
    except FileNotFoundError:
        return f"it does not see the store {context.store}; give a folder that all machines share, or an s3:// URL, by --store"
    except (OSError, StoreError) as error:
        return f"the store {context.store} cannot be used from there ({error})"
    return ""


def _inputs(context: RunContext) -> str:
    if problem := context.check_inputs_visible():
        return f"it does not see the inputs: {problem.rstrip('.')} (keep them in a folder that all machines share, under the same path)"
    return ""


def _gpu(context: RunContext, offers_gpu: bool) -> str:
    if offers_gpu and context.settings.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return "it offers the resource GPU, but torch finds no CUDA device there"
    return ""


def run_job(context: RunContext, payload: Payload, offers_gpu: bool) -> JobResult | None:
    """Run one job in this worker process; None if the run was stopped meanwhile.

    Raises IncompatibleWorkerError, DiskFull or StoreError.
    """
    here = get_worker()
    with _busy:
        if problem := check_compatibility(context, offers_gpu):
            raise IncompatibleWorkerError(problem)
        runner = _runner_of(context)
        try:
            runner.prefetch(payload)
            return runner.run(payload, _DaskReporter(here, context.run, payload.number))
        except KeyboardInterrupt:  # raised by the reporter when the run was stopped, or this worker is
            return None


def request_stop(run: str) -> None:
    """Have this process stop working for a run at the next item; what it computed is kept."""
    _stopped.add(run)


def event_topic(run: str) -> str:
    """Return the Dask event topic of a run."""
    return f"e4s-{run}"


class _DaskReporter:
    """Sends the planning process what a job says. Raises KeyboardInterrupt when the run was stopped."""

    def __init__(self, here: DaskWorker, run: str, number: int) -> None:
        self._here, self._run, self._reported = here, run, 0.0
        self._task = here.get_current_task()
        self.worker = str(here.name)
        self._base = {"job": number, "worker": self.worker}

    def stage(self, node: str, work: Callable[[], None]) -> None:
        """Report that a chunk enters a stage, and run it."""
        self._check()
        self._send(node=node)
        work()

    def progress(self, share: float) -> None:
        """Report which share of the job is done, now and then."""
        self._check()
        if time.monotonic() - self._reported > REPORT_EVERY:
            self._reported = time.monotonic()
            self._send(share=share)

    def _send(self, **more: Any) -> None:
        self._here.log_event(event_topic(self._run), {**self._base, **more})

    def uses(self, keys: Collection[str]) -> None:
        """Report which artifacts, not known before, the run may use now."""
        self._check()
        self._send(uses=list(keys))

    def _check(self) -> None:
        """Leave the rest if the run was stopped, or this worker is closing, as it does when its scheduler is lost: others will be given it.

        Dask cancels the task when the planning process is gone: the next one may be computing the same by now.
        """
        task = self._here.state.tasks.get(self._task)
        if self._run in _stopped or self._here.status not in WORKER_ANY_RUNNING or task is None or task.state == "cancelled":
            raise KeyboardInterrupt


def _runner_of(context: RunContext) -> JobRunner:
    """Return what this process keeps between jobs of one run; models stay as long as runs need the same."""
    global _current, _models_of
    if _current is None or _current[0] != context.run:
        if _current:
            _current[1].close()
        needs = digest(context.fingerprints)
        if needs != _models_of:
            forget_models()
            _models_of = needs
        _current = context.run, context.make_runner()
    return _current[1]
