"""What a Dask worker process does: prove that it fits the run, then carry its jobs. Everything that arrives is plain data.

A process holds one set of models and works on one job at a time, however many threads Dask gave it.
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
from flows.engine import require_weights, use_threads
from storage.keys import digest
from storage.runs import PROBES
from storage.store import Store, StoreError
from tasks.frame import hash_file
from tasks.graph import Graph, Node, Ref, Settings, UsageError
from tasks.instructions import CHOSEN, instruction_set
from tasks.runner import ChunkJob, ChunkResult, Keep, Worker, forget_models, run_chunk
from tasks.stage import ItemError

PACKAGES = ("e4s_models", "storage", "tasks", "flows")
TELL_EVERY = 1.0  # s between two messages about a running job's share


@dataclass(frozen=True)
class Kit:
    """All that a worker must know of a run, and by what it must prove that it fits."""

    run: str  # random name of this execution
    nodes: tuple[Node, ...]
    final: Ref
    settings: Settings
    prints: Mapping[str, Mapping[str, Any]]  # fingerprints of the nodes, as the planning process computed them
    source: str  # digest of the program
    store: str  # URL or absolute path
    keep: Keep
    threads: int  # of the computing libraries: bytes are promised for one count
    at_once: int
    instructions: str  # of the processor: bytes are promised for one set
    picture: tuple[str, str] = ("", "")  # path and sha256 of one input

    def graph(self) -> Graph:
        return Graph(self.nodes, self.final, self.settings)

    def prints_here(self) -> Mapping[str, Mapping[str, Any]]:
        """What decides bytes, as this process would compute them. Raises UsageError, WeightsError or ImportError."""
        return self.graph().fingerprints

    def unseen(self) -> str:
        """What this process does not see of the inputs, as a sentence; "" if it sees them."""
        path, sha256 = self.picture
        try:
            return "" if not path or hash_file(path) == sha256 else f"{path} holds something else there."
        except ItemError as error:
            return str(error)

    def outfit(self) -> Outfit:
        """What a process keeps between the jobs of this run."""
        return _Chunks(Worker(self.graph(), Store(self.store), self.keep, self.at_once))


class Job(Protocol):
    """What a worker does in one go, as data."""

    @property
    def number(self) -> int: ...


class Outfit(Protocol):
    """What a process keeps between the jobs of one run."""

    def carry(self, job: Any, teller: Teller) -> Any:
        """What comes of a job. May raise DiskFull, StoreError, and KeyboardInterrupt from the teller when the run was stopped."""
        ...

    def close(self) -> None: ...


class Refused(Exception):
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


def packed(function: Callable[..., Any], *arguments: Any) -> bytes:
    """Bytes whose `pickle.loads` calls a function of ours with these arguments."""
    return pickle.dumps(_Call(function, arguments))


_busy = threading.Lock()  # one job at a time: models and their memory are for one
_fitting: set[str] = set()  # runs that this process fits
_halted: set[str] = set()
_current: tuple[str, Outfit] | None = None
_models_of = ""


def source_digest(settings: Settings) -> str:
    """sha256 over the program: our packages' .py files, and the modules outside of them that serve stages."""
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


def enter(kit: Kit, offers_gpu: bool) -> str:
    """A worker's first task for a run: `examine`, and Dask's profiler is stopped.

    It looks at all threads a hundred times a second (`sys._current_frames`). Before Python 3.11.9 that can deadlock with threads that start
    or end just then (CPython issue 106883), and the whole worker stands still: here after some fifty chunks of cheap stages.
    """
    here = get_worker()
    for name in ("profile", "profile-cycle"):
        if callback := here.periodic_callbacks.get(name):
            here.loop.add_callback(callback.stop)
    return examine(kit, offers_gpu)


def examine(kit: Kit, offers_gpu: bool) -> str:
    """Why this process cannot work for the run, as a sentence; "" if it can."""
    if kit.run in _fitting:
        return ""
    use_threads(kit.threads)
    problem = _program(kit) or _weights(kit) or _store(kit) or _inputs(kit) or _gpu(kit, offers_gpu)
    if not problem:
        _fitting.add(kit.run)
    return problem


def _program(kit: Kit) -> str:
    try:
        if (here := instruction_set()) != kit.instructions:
            return (
                f"it would compute other bytes: with the instruction set {here}, and this run is for {kit.instructions}; leave it out, or "
                f"plan a run for such workers by {CHOSEN}={here.split(' ')[0]} (docs/cluster.md)"
            )
        if source_digest(kit.settings) != kit.source:
            return "its program differs from that of this run; install the same version there"
        differences = [text for name, found in kit.prints_here().items() for text in _differences(name, found, kit.prints[name])]
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


def _weights(kit: Kit) -> str:
    try:
        require_weights(sorted({name for found in kit.prints.values() for name in found["weights"]}))
    except WeightsError as error:
        return str(error)
    return ""


def _store(kit: Kit) -> str:
    try:
        files = Store(kit.store).files
        if files.read(f"{PROBES}/{kit.run}") != kit.run.encode():
            return f"it sees another store under {kit.store}; give a folder that all machines share, or an s3:// URL, by --store"
        reply = f"{PROBES}/{kit.run}-{uuid.uuid4().hex[:8]}"
        files.write(reply, b"")
        files.remove([reply])
    except FileNotFoundError:
        return f"it does not see the store {kit.store}; give a folder that all machines share, or an s3:// URL, by --store"
    except (OSError, StoreError) as error:
        return f"the store {kit.store} cannot be used from there ({error})"
    return ""


def _inputs(kit: Kit) -> str:
    if problem := kit.unseen():
        return f"it does not see the inputs: {problem.rstrip('.')} (keep them in a folder that all machines share, under the same path)"
    return ""


def _gpu(kit: Kit, offers_gpu: bool) -> str:
    if offers_gpu and kit.settings.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return "it offers the resource GPU, but torch finds no CUDA device there"
    return ""


def carry(kit: Kit, job: Job, offers_gpu: bool) -> Any:
    """What this process' outfit makes of a job; None if the run was stopped meanwhile.

    Raises Refused, DiskFull or StoreError.
    """
    here = get_worker()
    with _busy:
        if problem := examine(kit, offers_gpu):
            raise Refused(problem)
        outfit = _outfit(kit)
        teller = Teller(here, kit.run, job.number)
        try:
            return outfit.carry(job, teller)
        except KeyboardInterrupt:  # raised by the teller when the run was stopped, or this worker is
            return None


class _Chunks:
    """Outfit for chunks of pairs, or for those parts of them that belong to this kind of device."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.close = worker.close

    def carry(self, job: ChunkJob, teller: Teller) -> ChunkResult:
        self._worker.notify = teller.within
        self._worker.prefetch(job)
        result = run_chunk(self._worker, job, teller.stage)
        result.places = dict.fromkeys(result.computed, teller.worker)
        return result


def halt(run: str) -> None:
    """Let this process stop working for a run at the next item; what it computed is kept."""
    _halted.add(run)


def topic(run: str) -> str:
    """The Dask event topic of a run."""
    return f"e4s-{run}"


class Teller:
    """Tells the planning process how a job goes on. Raises KeyboardInterrupt when the run was stopped."""

    def __init__(self, here: DaskWorker, run: str, number: int) -> None:
        self._here, self._run, self._told = here, run, 0.0
        self._task = here.get_current_task()
        self.worker = str(here.name)
        self._base = {"chunk": number, "worker": self.worker}

    def stage(self, node: str, work: Callable[[], None]) -> None:
        """Say that a chunk enters a stage, and run it."""
        self._check()
        self._log(node=node)
        work()

    def within(self, share: float) -> None:
        """Say which share of the job is done, now and then."""
        self._check()
        if time.monotonic() - self._told > TELL_EVERY:
            self._told = time.monotonic()
            self._log(share=share)

    def _log(self, **more: Any) -> None:
        self._here.log_event(topic(self._run), {**self._base, **more})

    def uses(self, keys: Collection[str]) -> None:
        """Say which artifacts, not known before, the run may use now."""
        self._check()
        self._log(uses=list(keys))

    def _check(self) -> None:
        """Leave the rest if the run was stopped, or this worker is closing, as it does when its scheduler is lost: others will be given it.

        Dask cancels the task when the planning process is gone: the next one may be computing the same by now.
        """
        task = self._here.state.tasks.get(self._task)
        if self._run in _halted or self._here.status not in WORKER_ANY_RUNNING or task is None or task.state == "cancelled":
            raise KeyboardInterrupt


def _outfit(kit: Kit) -> Outfit:
    """What this process keeps between jobs of one run; models stay as long as runs need the same."""
    global _current, _models_of
    if _current is None or _current[0] != kit.run:
        if _current:
            _current[1].close()
        needs = digest(kit.prints)
        if needs != _models_of:
            forget_models()
            _models_of = needs
        _current = kit.run, kit.outfit()
    return _current[1]
