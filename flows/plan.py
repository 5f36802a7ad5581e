"""From a request to a plan: which items are done, which are to do, and the keys of everything they may use. Loads no model, no torch."""

from __future__ import annotations

import fcntl
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO

from flows.inputs import PairRow, read_pairs
from flows.profiles import make_settings
from storage.run import Row, RunError, RunFolder
from storage.store import Artifact, Damaged, Store, write_atomic
from tasks.frame import MAX_PIXELS, hash_file, probe
from tasks.graph import Graph, Image, Item, Node, Ref, UsageError
from tasks.runner import ChunkJob, Keep, cpu_threads, failure
from tasks.stage import ItemError

_TARGET = {"target_face": "target.align.face", "target_regions": "target.parse.regions"}

PAIR_NODES: tuple[Node, ...] = (
    Node("align", "align", "image", {"image": "image", "face_index": "face_index"}, checkpoint=True),
    Node("mesh", "mesh", "image", {"face": "align.face"}, checkpoint=True),
    Node("parse", "parse", "image", {"face": "align.face"}, checkpoint=True),
    Node(
        "encode",
        "encode",
        "image",
        {"image": "image", "face": "align.face", "labels": "parse.regions", "crop_to_frame": "align.crop_to_frame"},
        checkpoint=True,
    ),
    Node(
        "reenact",
        "reenact",
        "pair",
        {
            "source_face": "source.align.face",
            "source_points": "source.mesh.points",
            "source_blendshapes": "source.mesh.blendshapes",
            "target_face": "target.align.face",
            "target_points": "target.mesh.points",
            "target_blendshapes": "target.mesh.blendshapes",
        },
    ),
    Node("parse_driven", "parse", "pair", {"face": "reenact.driven"}),
    Node(
        "encode_driven",
        "encode",
        "pair",
        {
            "image": "source.image",
            "face": "reenact.driven",
            "labels": "parse_driven.regions",
            "crop_to_frame": "target.align.crop_to_frame",
        },
    ),
    Node(
        "tune",
        "tune",
        "pair",
        {
            "face": "reenact.driven",
            "regions": "parse_driven.regions",
            "codes": "encode_driven.codes",
            "styles": "encode_driven.styles",
        },
        checkpoint=True,
    ),
    Node(
        "swap",
        "swap",
        "pair",
        {
            "driven": "reenact.driven",
            "driven_regions": "parse_driven.regions",
            "driven_codes": "encode_driven.codes",
            "target_codes": "target.encode.codes",
            "driven_styles": "encode_driven.styles",
            "target_styles": "target.encode.styles",
            "target_to_canvas": "target.encode.to_canvas",
            "tuning": "tune.tuning",
            **_TARGET,
        },
    ),
    Node("parse_swapped", "parse", "pair", {"face": "swap.swapped"}),
    Node(
        "recolor",
        "recolor",
        "pair",
        {
            "swapped": "swap.swapped",
            "swapped_regions": "swap.swapped_regions",
            "seen_regions": "parse_swapped.regions",
            "mask": "swap.mask",
            **_TARGET,
        },
    ),
    Node("enhance", "enhance", "pair", {"face": "recolor.recolored"}),
    Node(
        "blend",
        "blend",
        "pair",
        {
            "face": "enhance.enhanced",
            "hole": "swap.hole",
            "mask": "swap.mask",
            "swapped_regions": "swap.swapped_regions",
            **_TARGET,
        },
    ),
    Node(
        "inpaint",
        "inpaint",
        "pair",
        {
            "blended": "blend.blended",
            "hole": "swap.hole",
            "mask": "swap.mask",
            "swapped_regions": "swap.swapped_regions",
            **_TARGET,
        },
    ),
    Node(
        "paste",
        "paste",
        "pair",
        {"image": "target.image", "face": "inpaint.inpainted", "mask": "inpaint.mask", "crop_to_frame": "target.align.crop_to_frame"},
        checkpoint=True,
    ),
)
"""The paper's eight stages on a pair, in reading order, with three helpers: mesh, enhance and paste."""

PAIR_RESULT: Ref = ("paste", "result")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for."""

    manifest: str
    run: str
    profile: str = "mobile"
    stages: Sequence[str] = ()  # such as swap=codes
    changes: Sequence[str] = ()  # such as blend.levels=6
    device: str = "auto"
    keep: Keep = "all"
    store: str = ""  # default: the folder `store` inside the run folder
    chunk: int = 16  # items
    workers: int = 0  # items that a thread-safe stage works on at once; 0: one per core
    source_face: int = 0
    target_face: int = 0
    max_pixels: int = MAX_PIXELS
    fail_fast: bool = False  # stop after the first chunk with a failed item
    verify: bool = False  # check the digest of everything finished, not only of what is read

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise UsageError(f"--chunk must be at least 1, got {self.chunk}")
        if self.workers < 0:
            raise UsageError(f"--workers must be at least 0, got {self.workers}")


@dataclass
class Plan:
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
    lock: IO[bytes] | None = field(default=None, repr=False)

    def chunks(self) -> list[ChunkJob]:
        """The items left, in order, each chunk with the artifacts it may use and the per-image work that later chunks share."""
        size = self.request.chunk
        parts = [self.todo[start : start + size] for start in range(0, len(self.todo), size)]
        keys = [{work.key for item in part for work in self.graph.works(item).values()} for part in parts]
        uses = Counter(key for part in keys for key in part)
        return [
            ChunkJob(
                number,
                part,
                {key: self.known[key] for key in mine if key in self.known},
                frozenset(key for key in mine if uses[key] > 1),
            )
            for number, (part, mine) in enumerate(zip(parts, keys, strict=True))
        ]

    def close(self) -> None:
        if self.lock:
            self.lock.close()


def pick_device(wanted: str) -> str:
    """auto, cpu or cuda -> cpu or cuda. `cuda` without a GPU is a UsageError, never a silent fallback."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {wanted!r}: choose auto, cpu or cuda")
    if wanted == "cpu":
        return "cpu"
    if wanted == "auto" and not Path("/proc/driver/nvidia/version").exists() and not shutil.which("nvidia-smi"):
        return "cpu"  # no driver: no need to load torch to find out
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise UsageError("--device cuda: torch finds no CUDA device; install a CUDA build of torch and a driver, or use --device cpu")
    return "cpu"


def make_plan(request: Request) -> Plan:
    """Read the manifest, hash the inputs, look up all keys at once. Raises UsageError or RunError."""
    began = time.perf_counter()
    pairs = read_pairs(request.manifest, source_face=request.source_face, target_face=request.target_face)
    settings = make_settings(request.profile, request.stages, request.changes, pick_device(request.device))
    graph = Graph(PAIR_NODES, PAIR_RESULT, settings)
    folder = RunFolder(request.run)
    folder.create()
    lock = _lock(folder)
    store = open_store(folder, request.store)
    images = _find_images(pairs, request.max_pixels)
    rows, items = {}, []
    before = {row.id: row for row in folder.read_rows()}
    for pair in pairs:
        row = rows[pair.id] = Row(
            id=pair.id, source=pair.source, target=pair.target, source_face=pair.source_face, target_face=pair.target_face
        )
        found = {role: images.get(path) for role, path in (("source", pair.source), ("target", pair.target))}
        problem = pair.problem or next((f"{role}: {image}" for role, image in found.items() if isinstance(image, str)), "")
        if problem:
            row.status, row.stage, row.reason = "failed", "input", problem
            continue
        item = _item(pair, found)
        row.source_sha256, row.target_sha256 = item.images["source"].sha256, item.images["target"].sha256
        row.key = graph.works(item)[graph.final[0], ""].key
        earlier = before.get(pair.id)
        if earlier and earlier.status == "done" and earlier.key == row.key and _stands(folder, earlier, request.verify):
            made = ("status", "output", "output_sha256", "output_size", "seconds")
            rows[pair.id] = replace(row, **{name: getattr(earlier, name) for name in made})
        else:
            items.append(item)
    known = _look_up(store, graph, items)
    if request.verify:
        known = _verified(store, known)
    todo = [item for item in items if not _finished(folder, store, rows[item.id], known)]
    todo = [item for item in todo if not _failed_before(graph, rows[item.id], item, known)]
    _remove_stale(folder, before.values(), rows)
    done = sum(row.status == "done" for row in rows.values())
    return Plan(request, graph, store, folder, rows, todo, known, done, time.perf_counter() - began, lock)


def export(folder: RunFolder, store: Store, row: Row, artifact: Artifact) -> None:
    """Put a finished result into the run's outputs and say so in its row. Raises Damaged."""
    output = f"outputs/{row.id}.png"
    data = store.read_bytes(artifact, PAIR_RESULT[1])
    write_atomic(folder.path / output, data)
    row.status, row.output, row.output_size = "done", output, len(data)
    row.output_sha256 = artifact.payloads[PAIR_RESULT[1]].sha256
    row.stage = row.reason = ""


def describe(plan: Plan) -> dict[str, object]:
    """Contents of run.json: enough to say how any output was made, and to make it again."""
    libraries = ("torch", "numpy", "opencv-python-headless", "dlib-bin", "ai-edge-litert", "pyarrow", "prefect")
    return {
        "e4s": version("e4s"),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "request": asdict(plan.request),
        "device": plan.graph.settings.device,
        "nodes": plan.graph.fingerprints,
        "store": plan.request.store,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpu_threads": cpu_threads(),
        "libraries": {name: version(name) for name in libraries},
    }


def open_store(folder: RunFolder, url: str) -> Store:
    """The store that a run names, or the one inside its folder, wherever that was moved to."""
    return Store(url or str(folder.path / "store"))


def record(plan: Plan) -> None:
    """Write the run's settings and rows as they stand."""
    plan.folder.write_settings(describe(plan))
    plan.folder.write_rows(plan.rows.values())


def _lock(folder: RunFolder) -> IO[bytes]:
    """Only one process works on a run folder; the lock of a dead one is released by the system."""
    lock = (folder.path / ".lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise RunError(f"{folder.path}: another process is working on this run; wait for it or choose another --run") from None
    return lock


def _find_images(pairs: Sequence[PairRow], max_pixels: int) -> dict[str, Image | str]:
    """Path -> its identity, or the sentence that says what is wrong with it."""

    def find(path: str) -> Image | str:
        try:
            path.encode()
        except UnicodeEncodeError:
            return f"{path.encode(errors='replace').decode()}: the file's name is not valid UTF-8; rename it"
        try:
            height, width = probe(path, max_pixels)
            return Image(path, hash_file(path), pixels=height * width)
        except ItemError as error:
            return str(error)

    paths = sorted({path for pair in pairs if not pair.problem for path in (pair.source, pair.target)})
    with ThreadPoolExecutor(cpu_threads()) as threads:
        return dict(zip(paths, threads.map(find, paths), strict=True))


def _item(pair: PairRow, found: dict[str, Image | str | None]) -> Item:
    images = {}
    for role, face in (("source", pair.source_face), ("target", pair.target_face)):
        image = found[role]
        assert isinstance(image, Image)
        images[role] = Image(image.path, image.sha256, face, image.pixels)
    return Item(pair.id, images)


def _look_up(store: Store, graph: Graph, items: Sequence[Item]) -> dict[str, Artifact]:
    keys = {work.key for item in items for work in graph.works(item).values()}
    return store.lookup(keys) if keys else {}


def _finished(folder: RunFolder, store: Store, row: Row, known: dict[str, Artifact]) -> bool:
    artifact = known.get(row.key)
    if artifact is None or artifact.failed:
        return False
    try:
        export(folder, store, row, artifact)  # computed by an earlier or another run: only its picture is missing here
    except Damaged as damaged:
        print(f"e4s: {damaged}; computing it again", file=sys.stderr)
        store.void(artifact)
        del known[row.key]
        return False
    return True


def _failed_before(graph: Graph, row: Row, item: Item, known: dict[str, Artifact]) -> bool:
    """Whether a stage is known to fail on this very input: the same reason is given again, nothing is computed."""
    works = graph.works(item)
    artifacts = [known[work.key] for work in works.values() if work.key in known]
    row.stage, row.reason = failure(item, works, {found.key: (found.stage, found.reason) for found in artifacts if found.failed})
    if row.stage:
        row.status = "failed"
    return bool(row.stage)


def _remove_stale(folder: RunFolder, before: Iterable[Row], rows: Mapping[str, Row]) -> None:
    """Remove outputs that an earlier manifest lists and this one does not hold as done: made with other inputs or settings.

    The results themselves stay in the store.
    """
    kept = {row.output for row in rows.values() if row.status == "done"}
    for row in before:
        if row.output and row.output not in kept:
            (folder.path / row.output).unlink(missing_ok=True)


def _stands(folder: RunFolder, row: Row, verify: bool) -> bool:
    """Whether a done row's output is there: by size, or by digest if asked for."""
    path = folder.path / row.output
    try:
        return path.stat().st_size == row.output_size and (not verify or hash_file(str(path)) == row.output_sha256)
    except (OSError, ItemError):
        return False


def _verified(store: Store, known: dict[str, Artifact]) -> dict[str, Artifact]:
    """The artifacts whose payloads all match their digests; the others are cancelled, loudly."""
    whole = {}
    for key, artifact in known.items():
        try:
            for output in artifact.payloads:
                store.read(artifact, output)
            whole[key] = artifact
        except Damaged as damaged:
            print(f"e4s: {damaged}; computing it again", file=sys.stderr)
            store.void(artifact)
    return whole
