"""From a request to a plan: which items are done, which are to do, and the keys of everything they may use. Loads no model, no torch."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal

from flows.attempts import Attempts
from flows.inputs import PairRow, read_pairs
from flows.pictures import Pictures
from flows.profiles import check_effect, make_settings
from flows.resume import PairResume
from flows.stages import PAIR_NODES, PAIR_RESULT
from flows.stale import remove_stale
from storage.files import store_url
from storage.run import AnyRow, DamagedFile, Row, RunError, RunFiles, RunFolder, unlock
from storage.runs import Lease
from storage.spelling import near_miss
from storage.store import Artifact, Store
from tasks.frame import MAX_PIXELS
from tasks.graph import Graph, Image, Item, Settings, UsageError
from tasks.instructions import CHOSEN, instruction_set
from tasks.runner import ChunkJob, Keep, cpu_threads

Retry = Literal["failed", "quarantined"]


@dataclass(frozen=True, kw_only=True)
class BaseRequest:
    """What every run is asked for, whatever its items are. Raises UsageError for a setting, StoreError for a store that cannot be."""

    manifest: str
    run: str
    profile: str = "mobile"
    stages: Sequence[str] = ()  # such as swap=codes
    changes: Sequence[str] = ()  # such as blend.levels=6
    device: str = "auto"
    store: str = ""  # default: the folder `store` inside the run folder
    chunk: int = 16  # items, of videos frames, that go through the stages together
    workers: int = 0  # items that a thread-safe stage works on at once; 0: one per core
    source_face: int = 0
    max_pixels: int = MAX_PIXELS
    fail_fast: bool = False  # stop after the first chunk, or video, with a failure
    verify: bool = False  # check the digest of everything finished, not only of what is read
    retry: Sequence[Retry] = ()  # try items again whose failure is remembered, or that are in quarantine
    max_attempts: int = 3  # failed attempts after which an item is quarantined
    dask: str = ""  # tcp://host:port of a Dask scheduler, local:N for a cluster of our own; "": this process
    dask_wait: float = 60.0  # s to wait for the scheduler and for a worker before giving up
    threads: int = 0  # of the computing libraries, per process: bytes are promised for one count; 0: see compute_threads

    def __post_init__(self) -> None:
        object.__setattr__(self, "store", store_url(self.store))  # the run may be read from another folder
        for name, least in (("max_attempts", 1), ("chunk", 1), ("workers", 0), ("threads", 0), ("max_pixels", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        for word in self.retry:
            if word not in ("failed", "quarantined"):
                raise UsageError(f"--retry {word!r}{near_miss(word, ('failed', 'quarantined'))}: choose failed or quarantined")
        if self.dask and not self.remote and self.processes < 1:
            raise UsageError(
                f"--dask {self.dask!r}: give tcp://HOST:PORT of a running scheduler, or local:N for N processes here, N at least 1"
            )

    @property
    def remote(self) -> bool:
        """Whether a Dask scheduler that others started is used."""
        return self.dask.startswith(("tcp://", "tls://"))

    @property
    def processes(self) -> int:
        """Worker processes on this machine for `local:N`, else 0."""
        kind, _, count = self.dask.partition(":")
        return int(count) if kind == "local" and count.isdecimal() else 0

    def compute_threads(self) -> int:
        """Threads of the computing libraries per process: as asked for, else the cores divided by the processes; 1 on a cluster."""
        return self.threads or (1 if self.remote else max(1, cpu_threads() // max(1, self.processes)))

    def instructions(self) -> str:
        """The instruction set that computes: this machine's; on a cluster of others the one that is chosen, if any."""
        return (self.remote and os.environ.get(CHOSEN)) or instruction_set()


@dataclass(frozen=True, kw_only=True)
class Request(BaseRequest):
    """What the user asked for, of pairs."""

    keep: Keep = "all"
    target_face: int = 0


class Holding:
    """What a plan holds until it is closed: the run folder's lock and the store's lease."""

    lock: IO[bytes] | None
    lease: Lease | None

    def close(self) -> None:
        if self.lease:
            self.lease.close()
        if self.lock:
            unlock(self.lock)
            self.lock = None


@dataclass
class Plan(Holding):
    """A request against what exists."""

    request: Request
    graph: Graph
    store: Store
    folder: RunFolder
    rows: dict[str, Row]
    todo: list[Item]
    known: dict[str, Artifact]
    done_before: int
    seconds: float
    attempts: Attempts
    previous: Mapping[str, Any] = field(default_factory=dict)  # run.json as the run before left it; empty if there is none
    before: Mapping[str, Row] = field(default_factory=dict)  # its rows by id
    gone: Mapping[str, str] = field(default_factory=dict)  # key -> why an artifact that was finished is there no more: damaged, pruned
    lock: IO[bytes] | None = field(default=None, repr=False)
    lease: Lease | None = field(default=None, repr=False)  # what the run may use is not pruned meanwhile

    def chunks(self) -> Iterator[ChunkJob]:
        """The items left, in order, each chunk with the artifacts it may use and the per-image work that other chunks share.

        Made one at a time, and keys are told apart by 60 bits of theirs, so that memory stays small beside the items.
        """
        size = self.request.chunk
        seen, shared = set[int](), set[int]()
        for start in range(0, len(self.todo), size):
            mine = {_short(key) for key in self._keys(start)}
            shared |= mine & seen
            seen |= mine
        del seen
        for number, start in enumerate(range(0, len(self.todo), size)):
            keys = self._keys(start)
            known = {key: self.known[key] for key in keys if key in self.known}
            yield ChunkJob(number, self.todo[start : start + size], known, frozenset(key for key in keys if _short(key) in shared))

    def _keys(self, start: int) -> set[str]:
        return {work.key for item in self.todo[start : start + self.request.chunk] for work in self.graph.works(item).values()}


def _short(key: str) -> int:
    return int(key[:15], 16)


def pick_device(wanted: str, remote: bool = False) -> str:
    """auto, cpu or cuda -> cpu or cuda. `cuda` without a GPU is a UsageError, never a silent fallback.

    With `remote` workers, which are asked for their GPUs later, `auto` means cpu.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {wanted!r}{near_miss(wanted, ('auto', 'cpu', 'cuda'))}: choose auto, cpu or cuda")
    if wanted == "cpu" or remote:
        return "cuda" if wanted == "cuda" else "cpu"
    if wanted == "auto" and not Path("/proc/driver/nvidia/version").exists() and not shutil.which("nvidia-smi"):
        return "cpu"  # no driver: no need to load torch to find out
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise UsageError("--device cuda: torch finds no CUDA device; install a CUDA build of torch and a driver, or use --device cpu")
    return "cpu"


def make_plan(request: Request, *, dry: bool = False, temporary: bool = False) -> Plan:
    """Read the manifest, hash the inputs, look up all keys at once. Raises UsageError or RunError.

    With `dry` nothing is written, locked or cancelled: the plan says what a run would do now, beside one that is at work, too.
    `temporary`: the run folder ends with the plan, so that the store need not remember the run.
    """
    began = time.perf_counter()
    pairs = read_pairs(request.manifest, source_face=request.source_face, target_face=request.target_face)
    settings = make_settings(request.profile, request.stages, request.changes, pick_device(request.device, request.remote))
    graph = Graph(PAIR_NODES, PAIR_RESULT, settings)
    check_effect(graph, request.stages, request.changes)
    folder = RunFolder(request.run)
    lock = None
    if not dry:
        folder.create()
        lock = folder.lock()
    store = open_store(folder, request.store)
    settings = with_instructions(settings, store, request.instructions(), write=not dry)
    graph = Graph(PAIR_NODES, PAIR_RESULT, settings)
    previous, before = read_previous(folder)
    attempts = Attempts(folder, request.max_attempts, dry)
    pictures = Pictures(folder.path / "inputs.parquet", request.max_pixels, trust=not request.verify)
    images = pictures.find(path for pair in pairs if not pair.problem for path in _paths(pair).values())
    if not dry:
        pictures.remember()
    resume = PairResume(graph, store, folder, attempts, before, retry=request.retry, verify=request.verify, dry=dry)
    rows, every, items, unreadable = {}, [], [], []
    for pair in pairs:
        row = rows[pair.id] = Row(
            id=pair.id,
            source=pair.source,
            target=pair.target,
            source_face=pair.source_face,
            target_face=pair.target_face,
            truth=pair.truth,
        )
        found = {role: images.get(path) for role, path in _paths(pair).items()}
        problem = pair.problem or next((f"{role}: {image}" for role, image in found.items() if isinstance(image, str)), "")
        if problem:
            row.status, row.stage, row.reason = "failed", "input", problem
            unreadable.append(row)
            continue
        item = _item(pair, found)
        every.append(item)
        row.source_sha256, row.target_sha256 = item.images["source"].sha256, item.images["target"].sha256
        row.source_reading, row.target_reading = item.images["source"].reading, item.images["target"].reading
        if isinstance(truth := found.get("truth"), Image):
            row.truth_sha256 = truth.sha256
        row.key = graph.works(item)[graph.final[0], ""].key
        if done := resume.done_before(row):
            rows[pair.id] = done
        else:
            items.append(item)
    lease = store.register(folder.path, keys_of(graph, every), temporary=temporary) if items and not dry else None
    decision = resume.decide(rows, items)
    attempts.unreadable(unreadable)
    return Plan(
        request,
        graph,
        store,
        folder,
        rows,
        decision.pending,
        decision.known,
        done_before=sum(row.status == "done" for row in rows.values()),
        seconds=time.perf_counter() - began,
        attempts=attempts,
        previous=previous,
        before=before,
        gone=decision.gone,
        lock=lock,
        lease=lease,
    )


def keys_of(graph: Graph, items: Iterable[Item]) -> Iterator[str]:
    """Keys of all that these items may use."""
    return (work.key for item in items for work in graph.works(item).values())


def describe(plan: Plan) -> dict[str, object]:
    """Contents of run.json: enough to say how any output was made, and to make it again."""
    return environment(plan.request, plan.graph)


def environment(request: BaseRequest, graph: Graph) -> dict[str, object]:
    """What run.json says of every kind of run: request, machine, libraries, and all that the nodes are made with."""
    libraries = ("torch", "numpy", "opencv-python-headless", "dlib-bin", "ai-edge-litert", "pyarrow", "prefect")
    return {
        "e4s": version("e4s"),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "request": asdict(request),
        "device": graph.settings.device,
        "nodes": graph.fingerprints,
        "store": request.store,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.machine(),
        "instructions": request.instructions(),
        "cpu_threads": request.compute_threads(),
        "libraries": {name: version(name) for name in libraries},
    }


def with_instructions(settings: Settings, store: Store, instructions: str, *, write: bool) -> Settings:
    """The settings with the instruction set that computes, where the store was begun with another; `write` as for `begun_with`."""
    return replace(settings, instructions="" if store.begun_with(instructions, write=write) == instructions else instructions)


def open_store(folder: RunFiles[Any], url: str) -> Store:
    """The store that a run names, or the one inside its folder, wherever that was moved to."""
    return Store(url or str(folder.path / "store"))


def record(plan: Plan) -> None:
    """Write the run's settings and rows as they stand, and take away outputs that are none of theirs."""
    remove_stale(plan.folder, plan.before.values(), plan.rows, plan.store)
    plan.folder.write_settings(describe(plan))
    plan.folder.write_rows(plan.rows.values())


def read_previous(folder: RunFiles[AnyRow]) -> tuple[dict[str, Any], dict[str, AnyRow]]:
    """Settings and rows that the run before left. Damaged files cost nothing that is finished: they are made again from the store."""
    settings: dict[str, Any] = {}
    rows: list[AnyRow] = []
    try:
        settings = folder.read_settings()
    except DamagedFile:
        print(f"e4s: {folder.settings}: damaged; written again", file=sys.stderr)
    except RunError:
        pass  # a new run
    try:
        rows = folder.read_rows()
    except DamagedFile:
        print(f"e4s: {folder.manifest}: damaged; made again from the inputs and the store", file=sys.stderr)
    return settings, {row.id: row for row in rows}


def _paths(pair: PairRow) -> dict[str, str]:
    """The pictures of a pair by role; the true one takes no part in the swap."""
    return {"source": pair.source, "target": pair.target, **({"truth": pair.truth} if pair.truth else {})}


def _item(pair: PairRow, found: dict[str, Image | str | None]) -> Item:
    images = {}
    for role, face in (("source", pair.source_face), ("target", pair.target_face)):
        image = found[role]
        assert isinstance(image, Image)
        images[role] = replace(image, face_index=face)
    return Item(pair.id, images)
