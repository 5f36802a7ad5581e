"""The artifact store: values by key over fsspec, finished when listed in a published index part.

    payload/ab/ab12...png       one image or label map, named by the sha256 of its bytes
    payload/cd/cd34...parquet   the arrays of one publication (a row each), named likewise
    index/<time>-<sha256>-<random>.parquet   what one publication finished: a row per output of each artifact

Everything is written under a temporary name and then published, the index part last. Of two entries for one key the first wins.
An artifact found damaged is cancelled by a further index part, so that it is computed again.
"""

from __future__ import annotations

import io
import os
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from storage.codec import Array, CodecError, Kind, array_bytes, decode_png, encode_png
from storage.faults import fault_point
from storage.keys import digest_bytes

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("stage", pa.string()),
        ("output", pa.string()),  # "" on rows without a payload (failed, void)
        ("kind", pa.string()),  # image, labels, array, failed; void cancels what the part named in `file` says of this key
        ("file", pa.string()),  # payload path relative to the store
        ("row", pa.int32()),  # row in a Parquet payload
        ("sha256", pa.string()),  # of the file's bytes (image, labels), of the value's bytes (array)
        ("size", pa.int64()),  # bytes of the payload file
        ("reason", pa.string()),  # why the item failed
    ]
)
ARRAY_SCHEMA = pa.schema(
    [("key", pa.string()), ("output", pa.string()), ("dtype", pa.string()), ("shape", pa.list_(pa.int32())), ("data", pa.binary())]
)


class StoreError(Exception):
    """The store cannot be used: the sentence says why and what to do."""


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
    part: str = ""  # the index part that lists it

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


class Store:
    """Artifacts by key under a URL that fsspec knows (a plain path, file://, memory://, s3://)."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise StoreError(f"store {url}: {error}; give a folder, or a URL whose fsspec package is installed") from None
        self.local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))
        self._shards: dict[str, pa.Table] = {}

    # -- finding ---------------------------------------------------------------------------------------------------------------------

    def lookup(self, keys: Collection[str]) -> dict[str, Artifact]:
        """Artifacts among `keys` that are finished or failed, from one listing of the index."""
        return self._scan(pa.array(sorted(keys), pa.string()))

    def exists(self) -> bool:
        """Whether anything was ever published here."""
        return bool(self.fs.exists(f"{self.root}/index"))

    def all(self) -> list[Artifact]:
        """Every finished or failed artifact."""
        return list(self._scan(None).values())

    def _scan(self, wanted: pa.Array | None) -> dict[str, Artifact]:
        parts = self._index_parts()
        tables = [self._read_part(part) for part in parts]
        counts = [len(table) for table in tables]
        table = pa.concat_tables([INDEX_SCHEMA.empty_table(), *tables])
        names = pa.DictionaryArray.from_arrays(
            np.repeat(np.arange(len(parts), dtype=np.int32), counts), pa.array(map(_name, parts), pa.string())
        )
        table = table.append_column("part", names)
        if wanted is not None:
            table = table.filter(pa.compute.is_in(table["key"], value_set=wanted))
        rows = table.to_pylist()
        void = {(row["key"], row["file"]) for row in rows if row["kind"] == "void"}
        found: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            key, part = row["key"], row["part"]
            if row["kind"] != "void" and (key, part) not in void:
                entry = found.setdefault(key, [])
                if not entry or entry[0]["part"] == part:  # the first entry wins
                    entry.append(row)
        return {key: _artifact(entry) for key, entry in found.items()}

    def _index_parts(self) -> list[str]:
        try:
            return sorted(p for p in self.fs.ls(f"{self.root}/index", detail=False) if p.endswith(".parquet"))
        except FileNotFoundError:
            return []

    def _read_part(self, part: str) -> pa.Table:
        data = self.fs.cat_file(part)
        if digest_bytes(data)[:16] != Path(part).stem.split("-")[1]:
            # A damaged part (power loss, a flipped byte) finishes nothing: what it listed is computed again.
            return INDEX_SCHEMA.empty_table()
        return pq.read_table(io.BytesIO(data), schema=INDEX_SCHEMA)

    def _size(self, file: str) -> int:
        try:
            return int(self.fs.size(f"{self.root}/{file}"))
        except FileNotFoundError:
            return -1

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

    def _bytes(self, artifact: Artifact, payload: Payload) -> bytes:
        try:
            return bytes(self.fs.cat_file(f"{self.root}/{payload.file}"))
        except FileNotFoundError:
            raise Damaged(artifact, f"{artifact.stage}: {payload.file} is missing") from None

    def _read_array(self, artifact: Artifact, output: str, payload: Payload) -> Array:
        if payload.file not in self._shards:
            if len(self._shards) >= 64:  # a shard holds a chunk's arrays: a few chunks back is enough
                self._shards.clear()
            data = self._bytes(artifact, payload)
            if digest_bytes(data) != Path(payload.file).stem:
                raise CodecError("its bytes do not match its name")
            self._shards[payload.file] = pq.read_table(io.BytesIO(data), schema=ARRAY_SCHEMA)
        row: dict[str, Any] = self._shards[payload.file].slice(payload.row, 1).to_pylist()[0]
        if (
            row["key"] != artifact.key
            or row["output"] != output
            or _array_digest(row["data"], row["dtype"], row["shape"]) != payload.sha256
        ):
            raise CodecError("its digest does not match")
        return np.frombuffer(row["data"], np.dtype(row["dtype"])).reshape(row["shape"]).copy()

    # -- writing ---------------------------------------------------------------------------------------------------------------------

    def publish(self, finished: Iterable[Finished], threads: ThreadPoolExecutor | None = None) -> list[Artifact]:
        """Write payloads, then one index part that lists them all: from then on they are finished."""
        finished = list(finished)
        if not finished:
            return []
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
            data = _parquet(pa.Table.from_pylist(arrays, ARRAY_SCHEMA))
            file = self._write_payload(data, digest_bytes(data), "parquet")
            for row in index:
                if row["kind"] == "array":
                    row |= {"file": file, "size": len(data)}
        fault_point("before-index")
        part = _name(self._write_index(index))
        entries: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in index:
            entries[str(row["key"])].append({**row, "part": part})
        return [_artifact(entry) for entry in entries.values()]

    def void(self, artifact: Artifact) -> None:
        """Cancel a damaged artifact's index entry, so that it is computed and published again."""
        for payload in artifact.payloads.values():
            self._shards.pop(payload.file, None)
        row = {"key": artifact.key, "stage": artifact.stage, "output": "", "kind": "void", "row": -1, "sha256": "", "size": 0, "reason": ""}
        self._write_index([{**row, "file": artifact.part}])

    def _write_picture(self, row: dict[str, Any], value: Array) -> None:
        data = encode_png(value)
        sha256 = digest_bytes(data)
        row |= {"file": self._write_payload(data, sha256, "png"), "sha256": sha256, "size": len(data)}

    def _write_payload(self, data: bytes, sha256: str, suffix: str) -> str:
        file = f"payload/{sha256[:2]}/{sha256}.{suffix}"
        # A file of that name and size is normally these bytes already; damaged ones are replaced.
        if self._size(file) != len(data) or digest_bytes(self.fs.cat_file(f"{self.root}/{file}")) != sha256:
            self._write(file, data)
        return file

    def _write_index(self, rows: list[dict[str, Any]]) -> str:
        data = _parquet(pa.Table.from_pylist(rows, INDEX_SCHEMA))
        part = f"index/{time.time_ns():020d}-{digest_bytes(data)[:16]}-{uuid.uuid4().hex[:8]}.parquet"
        self._write(part, data)
        return part

    def _write(self, file: str, data: bytes) -> None:
        path = f"{self.root}/{file}"
        if self.local:
            write_atomic(Path(path), data)
        else:
            self.fs.pipe_file(path, data)  # object stores publish whole objects


def write_atomic(path: Path, data: bytes) -> None:
    """Write under a temporary name in the same folder, then rename: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data[: len(data) // 2])
            fault_point("mid-write")
            file.write(data[len(data) // 2 :])
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _artifact(entry: list[dict[str, Any]]) -> Artifact:
    """Index rows of one key in one part -> the artifact."""
    head = entry[0]
    payloads = {row["output"]: Payload(row["kind"], row["file"], row["row"], row["sha256"], row["size"]) for row in entry if row["output"]}
    return Artifact(head["key"], head["stage"], payloads, head["reason"] or "", head["part"])


def _name(part: str) -> str:
    return part.rsplit("/", 1)[-1]


def _array_digest(data: bytes, dtype: str, shape: list[int]) -> str:
    return digest_bytes(f"{dtype}{shape}".encode() + data)


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
