"""The artifact store: values by key over fsspec, finished when listed in a published index part.

    payload/ab/ab12...png       one image or label map, named by the sha256 of its bytes
    payload/cd/cd34...parquet   the arrays of one publication (a row each), named likewise
    index/                      what is finished, see storage/index.py: a row per output of each artifact
    runs/                       which runs use the store and which artifacts each uses, see storage/runs.py
    begun.json                  the instruction set that keys mean which name none

Payloads are written under a temporary name, published and forced to the disk before the index part that lists them. Of two entries for
one key the first wins. An artifact found damaged is cancelled by a further index part, so that it is computed again; so is one that was
pruned to free room (storage/prune.py).
"""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.codec import Array, CodecError, Kind, array_bytes, decode_png, encode_png
from storage.faults import fault_point
from storage.files import Files, StoreError, write_atomic
from storage.index import Index
from storage.keys import digest_bytes
from storage.parquet import read_parquet
from storage.runs import Lease, Runs

__all__ = ["Artifact", "Damaged", "Finished", "Found", "Payload", "Store", "StoreError", "write_atomic"]

ARRAY_SCHEMA = pa.schema(
    [("key", pa.string()), ("output", pa.string()), ("dtype", pa.string()), ("shape", pa.list_(pa.int32())), ("data", pa.binary())]
)

BEGUN_FILE = "begun.json"  # what the store was begun with

MAX_REPAIRS = 3  # times that one process computes the same artifact again because it was found damaged

SHARD_BYTES = 64_000_000  # of arrays that were read and are kept for the next reading


class Damaged(Exception):
    """A stored artifact is missing or its bytes do not match their digest."""

    def __init__(self, artifact: Artifact, sentence: str) -> None:
        super().__init__(sentence)
        self.artifact = artifact


@dataclass(frozen=True)
class Payload:
    """Where one output of an artifact lies."""

    kind: str
    file: str
    row: int
    sha256: str
    size: int


@dataclass(frozen=True)
class Artifact:
    """What one stage made of one item: finished (payloads by output name) or failed (a reason)."""

    key: str
    stage: str
    payloads: Mapping[str, Payload] = field(default_factory=dict)
    reason: str = ""
    part: str = ""  # the publication that lists it

    @property
    def failed(self) -> bool:
        return bool(self.reason)


@dataclass(frozen=True)
class Finished:
    """A computed artifact that is to be published: values by output name with their kinds, or a reason."""

    key: str
    stage: str
    values: Mapping[str, tuple[Kind, Array]] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Found:
    """What the index says of some keys."""

    artifacts: dict[str, Artifact]  # finished or failed
    cancelled: dict[str, Literal["void", "pruned"]]  # keys that were finished once: found damaged, or removed by `e4s cache prune`


class Store:
    """Artifacts by key under a URL that fsspec knows (a plain path, file://, memory://, s3://)."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files = Files(url)
        self.index = Index(self.files)
        self.runs = Runs(self.files)
        self._repairs = Counter[str]()  # by key, of this process
        self._shards: dict[str, pa.Table] = {}
        self._shards_lock = Lock()  # threads read one store

    # -- finding ---------------------------------------------------------------------------------------------------------------------

    def lookup(self, keys: Collection[str]) -> dict[str, Artifact]:
        """Artifacts among `keys` that are finished or failed."""
        return self.find(keys).artifacts

    def find(self, keys: Collection[str]) -> Found:
        """Artifacts among `keys`, and which of the others were cancelled; memory grows with `keys`, not with the store."""
        rows = self.index.scan(pa.array(sorted(keys), pa.string()))
        artifacts = {artifact.key: artifact for artifact in _artifacts(rows.winners)}
        kinds = zip(rows.cancels["key"].to_pylist(), rows.cancels["kind"].to_pylist(), strict=True)  # in order: the last one counts
        return Found(artifacts, {key: kind for key, kind in kinds if key not in artifacts})

    def exists(self) -> bool:
        """Whether anything was ever published here."""
        return self.files.exists("index")

    def artifacts(self) -> Iterator[Artifact]:
        """Every finished or failed artifact, by key, few at a time."""
        for rows in self.index.all():
            yield from _artifacts(rows.winners)

    def all(self) -> list[Artifact]:
        """Every finished or failed artifact, at once."""
        return list(self.artifacts())

    def begun_with(self, instructions: str, *, write: bool) -> str:
        """The instruction set that keys mean which name none: that of the first machine that planned a run with this store.

        A store that does not know it (a new one, or one that an earlier version made) is taken to be of `instructions`; with `write`
        that is noted.
        """
        try:
            found = json.loads(self.files.read(BEGUN_FILE)).get("instructions")
        except (FileNotFoundError, ValueError, AttributeError):
            found = None
        if isinstance(found, str) and found:
            return found
        if write:
            self.files.write(BEGUN_FILE, json.dumps({"instructions": instructions}).encode(), durable=True)
        return instructions

    # -- reading ---------------------------------------------------------------------------------------------------------------------

    def read(self, artifact: Artifact, output: str) -> Array:
        """One output's value; its digest is checked. Raises Damaged."""
        payload = artifact.payloads[output]
        try:
            if payload.kind == "array":
                return self._read_array(artifact, output, payload)
            return decode_png(self.read_bytes(artifact, output))
        except (CodecError, pa.ArrowException, KeyError, IndexError, ValueError) as error:
            raise Damaged(artifact, f"{artifact.stage}: {payload.file} is damaged ({error})") from None

    def read_bytes(self, artifact: Artifact, output: str) -> bytes:
        """The stored file's bytes of an image or label map, digest checked. Raises Damaged."""
        payload = artifact.payloads[output]
        data = self._bytes(artifact, payload)
        if digest_bytes(data) != payload.sha256:
            raise Damaged(artifact, f"{artifact.stage}: {payload.file} does not match its digest")
        return data

    def check(self, artifact: Artifact) -> None:
        """Check the digests of all outputs, decoding no picture. Raises Damaged."""
        for output, payload in artifact.payloads.items():
            if payload.kind == "array":
                self.read(artifact, output)
            else:
                self.read_bytes(artifact, output)

    def _bytes(self, artifact: Artifact, payload: Payload) -> bytes:
        try:
            return self.files.read(payload.file)
        except FileNotFoundError:
            raise Damaged(artifact, f"{artifact.stage}: {payload.file} is missing") from None

    def _read_array(self, artifact: Artifact, output: str, payload: Payload) -> Array:
        with self._shards_lock:
            shard = self._shards.get(payload.file)
        if shard is None:
            data = self._bytes(artifact, payload)
            if digest_bytes(data) != Path(payload.file).stem:
                raise CodecError("its bytes do not match its name")
            shard = read_parquet(data, ARRAY_SCHEMA)
            with self._shards_lock:
                # A shard holds a chunk's arrays: a few chunks back is enough.
                if len(self._shards) >= 64 or sum(kept.nbytes for kept in self._shards.values()) > SHARD_BYTES:
                    self._shards.clear()
                self._shards[payload.file] = shard
        row: dict[str, Any] = shard.slice(payload.row, 1).to_pylist()[0]
        if (
            row["key"] != artifact.key
            or row["output"] != output
            or _array_digest(row["data"], row["dtype"], row["shape"]) != payload.sha256
        ):
            raise CodecError("its digest does not match")
        return np.frombuffer(row["data"], np.dtype(row["dtype"])).reshape(row["shape"]).copy()

    # -- writing ---------------------------------------------------------------------------------------------------------------------

    def publish(self, finished: Iterable[Finished], threads: ThreadPoolExecutor | None = None) -> list[Artifact]:
        """Write payloads, then one index part that lists them all: from then on they are finished, whatever happens to the machine."""
        finished = list(finished)
        if not finished:
            return []
        try:
            index = self._write_payloads(finished, threads)
        except FileNotFoundError:  # removed by a prune in the moment before it was used again
            index = self._write_payloads(finished, threads)
        fault_point("before-index")
        part = self.index.append(index)
        self.index.published()
        entries: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in index:
            entries[str(row["key"])].append({**row, "part": part})
        return [_artifact(entry) for entry in entries.values()]

    def void(self, *artifacts: Artifact) -> None:
        """Cancel the index entries of damaged artifacts, or of failures to be tried again, so that they are computed and published anew."""
        with self._shards_lock:
            for payload in (payload for artifact in artifacts for payload in artifact.payloads.values()):
                self._shards.pop(payload.file, None)
        rows = [{"key": artifact.key, "stage": artifact.stage, "part": artifact.part} for artifact in artifacts]
        if rows:
            self.index.cancel(pa.Table.from_pylist(rows), "void")

    def cancel_damaged(self, damaged: Damaged) -> None:
        """Cancel a damaged artifact so that it is computed again.

        Every repair loop calls this, so it holds their one limit: StoreError after MAX_REPAIRS repairs of one key. Where what was just
        written is damaged again each time, disk or memory is broken and the loop would never end.
        """
        key = damaged.artifact.key
        self._repairs[key] += 1
        if self._repairs[key] > MAX_REPAIRS:
            raise StoreError(
                f"{damaged}; it was computed again {MAX_REPAIRS} times and damaged each time: "
                "check the disk and the memory of this machine, then repeat the same command (nothing finished is lost)"
            )
        self.void(damaged.artifact)

    def register(self, run: str | Path, keys: Iterable[str], *, unfolding: bool = False, temporary: bool = False) -> Lease:
        """Say that a run is at work here and may use these keys: nothing of them is pruned until the lease is closed.

        To be called before the keys are looked up; waits while somebody prunes. `unfolding`: these are but the first. `temporary`: the run
        folder ends with the lease. See storage/runs.py.
        """
        return self.runs.register(Path(run), keys, unfolding=unfolding, temporary=temporary)

    def compact(self) -> None:
        """Merge the index into as few parts as there need be."""
        self.index.compact()

    def _write_payloads(self, finished: Sequence[Finished], threads: ThreadPoolExecutor | None) -> list[dict[str, Any]]:
        """Write what is not there yet and force it to the disk; returns the index rows."""
        index: list[dict[str, Any]] = []
        arrays: list[dict[str, Any]] = []
        pictures: list[tuple[dict[str, Any], Array]] = []
        for item in finished:
            base = {"key": item.key, "stage": item.stage, "row": -1, "reason": item.reason}
            if item.reason:
                index.append({**base, "output": "", "kind": "failed", "file": "", "sha256": "", "size": 0})
            for output, (kind, value) in item.values.items():
                row = {**base, "output": output, "kind": kind}
                index.append(row)
                if kind == "array":
                    data, dtype = array_bytes(value), value.dtype.newbyteorder("<").str
                    row |= {"row": len(arrays), "sha256": _array_digest(data, dtype, list(value.shape))}
                    arrays.append({"key": item.key, "output": output, "dtype": dtype, "shape": list(value.shape), "data": data})
                else:
                    pictures.append((row, value))
        mapper = threads.map if threads else map
        list(mapper(lambda work: self._write_picture(*work), pictures))
        if arrays:
            buffer = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(arrays, ARRAY_SCHEMA), buffer, compression="zstd")
            data = buffer.getvalue()
            file = self._write_payload(data, digest_bytes(data), "parquet")
            for row in index:
                if row["kind"] == "array":
                    row |= {"file": file, "size": len(data)}
        self.files.sync({row["file"] for row in index if row["file"]})
        return index

    def _write_picture(self, row: dict[str, Any], value: Array) -> None:
        data = encode_png(value)
        sha256 = digest_bytes(data)
        row |= {"file": self._write_payload(data, sha256, "png"), "sha256": sha256, "size": len(data)}

    def _write_payload(self, data: bytes, sha256: str, suffix: str) -> str:
        file = f"payload/{sha256[:2]}/{sha256}.{suffix}"
        # A file of that name and size is normally these bytes already; damaged ones are replaced. It is made young again, so that nobody
        # who removes what nothing refers to takes it before the index part says that something does. Object stores: just written again.
        if (
            not self.files.local
            or not self.files.touch(file)
            or self.files.size(file) != len(data)
            or digest_bytes(self.files.read(file)) != sha256
        ):
            self.files.write(file, data)
        return file


def _artifacts(rows: pa.Table) -> Iterator[Artifact]:
    """Index rows, sorted by key -> artifacts."""
    entry: list[dict[str, Any]] = []
    for batch in rows.to_batches(10_000):
        for row in batch.to_pylist():
            if entry and entry[0]["key"] != row["key"]:
                yield _artifact(entry)
                entry = []
            entry.append(row)
    if entry:
        yield _artifact(entry)


def _artifact(entry: list[dict[str, Any]]) -> Artifact:
    """Index rows of one key in one part -> the artifact."""
    head = entry[0]
    payloads = {row["output"]: Payload(row["kind"], row["file"], row["row"], row["sha256"], row["size"]) for row in entry if row["output"]}
    return Artifact(head["key"], head["stage"], payloads, head["reason"] or "", head["part"])


def _array_digest(data: bytes, dtype: str, shape: list[int]) -> str:
    return digest_bytes(f"{dtype}{shape}".encode() + data)
