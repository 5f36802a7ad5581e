"""The index of a store: which artifacts are finished, in parts that are only ever added, and merged into larger ones behind.

A publication adds one small part, `<time>-<sha256>-<random>.parquet`. Many of them are merged into parts that are sorted by key, of at
most `MERGED_ROWS` rows, whose names also say which keys they hold: `<time>-<sha256>-<random>-<lowest>-<highest>.parquet`. A merged row
keeps the name of the part it came from, so that the order of entries and what cancels them stay as they were.

Nothing is renamed or changed in place, and merged parts are complete before their sources are removed: a reader that finds a part gone
lists again; rows met twice count once; two that merge at once do the same work twice. Rows that cancel are kept for good, so a merge that
knew nothing of them brings nothing back.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.faults import fault_point
from storage.files import Entry, Files, StoreError
from storage.keys import digest_bytes
from storage.parquet import open_parquet, read_table

INDEX_FORMAT = 2  # 1 had neither merged parts nor the kind `pruned`
CANCELS = ("void", "pruned")
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("stage", pa.string()),
        ("output", pa.string()),  # "" on rows without a payload (failed, void, pruned)
        ("kind", pa.string()),  # image, labels, array, failed; void and pruned cancel what the part named in `file` says of this key
        ("file", pa.string()),  # payload path relative to the store
        ("row", pa.int32()),  # row in a Parquet payload
        ("sha256", pa.string()),  # of the file's bytes (image, labels), of the value's bytes (array)
        ("size", pa.int64()),  # bytes of the payload file
        ("reason", pa.string()),  # why the item failed
    ]
)
ROW_SCHEMA = INDEX_SCHEMA.append(pa.field("part", pa.string()))  # of the publication; only merged parts store it

MERGED_ROWS = 32_768  # rows of a merged part: some 4 MB, read and checked as a whole
SMALL_PARTS = 256  # this many publications are merged
LARGE_PARTS = 8  # so are this many merged parts that are less than half full
HALF_FULL = 1_500_000  # bytes
GROUP_BYTES = 12_000_000  # of parts that are merged in memory at once
SLICE_BYTES = 4_000_000  # of parts that are gone through at once
_FORMAT_FIELD = b"e4s.index"


@dataclass(frozen=True)
class Part:
    """One index file, as its name and the listing tell."""

    name: str
    size: int  # bytes
    modified: float
    sha256: str  # first 16 digits
    lowest: str = ""  # first bytes of the lowest and highest key, in hexadecimal; "" on publications
    highest: str = ""

    @property
    def merged(self) -> bool:
        return bool(self.highest)

    @property
    def file(self) -> str:
        return f"index/{self.name}"

    def overlaps(self, low: str, high: str) -> bool:
        """Whether it may hold keys from `low` to `high` (prefixes as in its name)."""
        return not self.merged or (self.lowest <= high and low <= self.highest)


@dataclass(frozen=True)
class Rows:
    """Index rows after cancelling: every column of ROW_SCHEMA, sorted by key, part and output."""

    entries: pa.Table  # what stands: of each key the entry that counts, then later ones
    first: pa.ChunkedArray  # bool: belongs to the entry that counts
    cancels: pa.Table  # void and pruned rows

    @property
    def winners(self) -> pa.Table:
        return self.entries.filter(self.first)


class Index:
    """The index parts of one store."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.damaged: dict[str, Part] = {}  # parts met whose bytes do not match their name: they finish nothing
        self._unmerged = SMALL_PARTS  # publications since the last look at the parts; the first publication looks

    def parts(self) -> list[Part]:
        """All parts, oldest first. Raises StoreError if one has a name of a later format."""
        return [self._part(entry) for entry in self.files.entries("index") if entry.name.endswith(".parquet")]

    def scan(self, keys: pa.Array | None = None, *, low: str = "", high: str = "~") -> Rows:
        """What the index says of some keys (sorted), or of all from `low` up to but without `high`."""
        if keys is not None and not len(keys):
            return resolve(ROW_SCHEMA.empty_table())
        bounds = (_prefix(keys[0].as_py()), _prefix(keys[-1].as_py())) if keys is not None else (_prefix(low), _prefix(high))
        tables: list[pa.Table] = []
        read: set[str] = set()
        listed: set[str] = set()
        for _ in range(100):
            parts = self.parts()
            new = [part for part in parts if part.name not in read and part.overlaps(*bounds)]
            gone = listed - {part.name for part in parts}
            with ThreadPoolExecutor(_threads(self.files.local), "e4s-index") as threads:
                found = list(threads.map(lambda some: self._wanted(some, keys, low, high), _batches(new)))
            tables += [table for table, _ in found]
            gone |= {name for _, missing in found for name in missing}
            read |= {part.name for part in new} - gone
            # A listing is no snapshot: it can miss a part that was removed meanwhile and the one that replaced it. The next shows it.
            if not parts or (listed and not gone and not any(part.merged for part in new)):
                break
            listed = {part.name for part in parts}
        else:
            raise StoreError(f"store {self.files.url}: its index changes faster than it can be read; repeat the command")
        return resolve(pa.concat_tables([ROW_SCHEMA.empty_table(), *tables]))

    def all(self) -> Iterator[Rows]:
        """What the whole index says, in pieces by range of keys that keep memory small once small parts are merged."""
        parts = self.parts()
        if sum(part.size for part in parts if not part.merged) > SLICE_BYTES:
            with suppress(StoreError, OSError):  # a store that can only be read
                self._merge([part for part in parts if not part.merged])
        pieces = max(1, math.ceil(sum(part.size for part in parts) / SLICE_BYTES))
        bounds = ["", *(f"{65536 * i // pieces:04x}" for i in range(1, pieces)), "~"]
        for low, high in itertools.pairwise(bounds):
            yield self.scan(low=low, high=high)

    def overview(self) -> pa.Table:
        """All entries that stand, briefly: key, stage, kind, part (encoded), file, size and first (whether it is the entry that counts)."""
        tables = []
        for rows in self.all():
            table = rows.entries.select(["key", "stage", "kind", "part", "file", "size"]).append_column("first", rows.first)
            for name in ("stage", "kind", "part"):
                table = table.set_column(table.column_names.index(name), name, table[name].dictionary_encode())
            tables.append(table.combine_chunks())
        return pa.concat_tables(tables).unify_dictionaries()

    def append(self, rows: Sequence[dict[str, Any]]) -> str:
        """Publish rows as one part, durably; returns its name."""
        return self._write(pa.Table.from_pylist(rows, INDEX_SCHEMA)).name

    def cancel(self, entries: pa.Table, kind: str) -> None:
        """Cancel entries (columns key, stage, part): they are `void` or `pruned` from then on."""
        count = len(entries)
        columns: dict[str, Any] = {"key": entries["key"], "stage": entries["stage"], "file": entries["part"]}
        columns = {name: column.cast(pa.string()) for name, column in columns.items()}
        filled: dict[str, Any] = {"output": "", "kind": kind, "row": -1, "sha256": "", "size": 0, "reason": ""}
        columns |= {name: pa.array([value] * count, INDEX_SCHEMA.field(name).type) for name, value in filled.items()}
        table = pa.table({name: columns[name] for name in INDEX_SCHEMA.names}, INDEX_SCHEMA)
        for start in range(0, count, MERGED_ROWS):
            self._write(table.slice(start, MERGED_ROWS))

    # -- merging ---------------------------------------------------------------------------------------------------------------------

    def published(self) -> None:
        """Told after each publication: now and then, merge what has piled up. A merge that fails has changed nothing."""
        self._unmerged += 1
        if self._unmerged >= SMALL_PARTS:
            self._unmerged = 0
            try:
                self.tidy()
            except (StoreError, OSError):  # no matter: a full or lost store shows itself at the next publication
                return

    def tidy(self) -> None:
        """Merge publications, or merged parts that are not half full, where many have piled up."""
        parts = self.parts()
        small = [part for part in parts if not part.merged]
        if len(small) >= SMALL_PARTS:
            self._merge(small)
            parts = self.parts()
        partial = [part for part in parts if part.merged and part.size < HALF_FULL]
        if len(partial) >= LARGE_PARTS:
            self._merge(partial)

    def compact(self) -> None:
        """Merge all parts into as few as there need be, each with its own range of keys."""
        parts = self.parts()
        if len(parts) > 1:
            self._merge(parts)

    def _merge(self, parts: Sequence[Part]) -> None:
        groups = max(1, math.ceil(sum(part.size for part in parts) / GROUP_BYTES))
        with ExitStack() as stack:
            spill = _Spill(stack, groups)
            with ThreadPoolExecutor(_threads(self.files.local), "e4s-index") as threads:
                batches = _batches(parts)
                for start in range(0, len(batches), 4):
                    for table, gone in threads.map(self._wanted, batches[start : start + 4]):
                        if gone:
                            return  # somebody else is merging
                        spill.add(table)
            for table in spill.groups():
                rows = resolve(table)
                kept = _sorted(pa.concat_tables([rows.entries, rows.cancels]), "key", "part")
                for piece in range(math.ceil(len(kept) / MERGED_ROWS)):
                    self._write(kept.slice(piece * MERGED_ROWS, MERGED_ROWS))
                    fault_point("mid-merge")
        fault_point("before-removal")
        self.files.remove([part.file for part in parts if part.name not in self.damaged])

    # -- parts -----------------------------------------------------------------------------------------------------------------------

    def _part(self, entry: Entry) -> Part:
        fields = entry.name.removesuffix(".parquet").split("-")
        if len(fields) not in (3, 5):
            raise self._too_new(entry.name)
        return Part(entry.name, entry.size, entry.modified, fields[1], *fields[3:])

    def _write(self, table: pa.Table) -> Part:
        """Rows -> a part: a merged one if they have a column `part`."""
        buffer = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({_FORMAT_FIELD: str(INDEX_FORMAT)}), buffer, compression="zstd")
        data = buffer.getvalue()
        bounds = ""
        if "part" in table.column_names:
            bounds = f"-{_prefix(table['key'][0].as_py())}-{_prefix(table['key'][-1].as_py())}"
        name = f"{time.time_ns():020d}-{digest_bytes(data)[:16]}-{uuid.uuid4().hex[:8]}{bounds}.parquet"
        self.files.write(f"index/{name}", data, durable=True)
        return self._part(Entry(f"index/{name}", len(data), time.time()))

    def _table(self, part: Part) -> pa.Table:
        """All rows of a part. Raises FileNotFoundError.

        One that is damaged (power loss, a flipped byte) has none: what it listed is computed again.
        """
        data = self.files.read(part.file)
        if digest_bytes(data)[:16] != part.sha256:
            self.damaged[part.name] = part
            return ROW_SCHEMA.empty_table()
        file = open_parquet(data)
        form = (file.schema_arrow.metadata or {}).get(_FORMAT_FIELD, b"1")
        if not form.isdigit() or int(form) > INDEX_FORMAT:
            raise self._too_new(part.name)
        table = read_table(file)
        if "part" not in table.column_names:
            table = table.append_column("part", pa.array([part.name] * len(table), pa.string()))
        return table.select(ROW_SCHEMA.names).cast(ROW_SCHEMA)

    def _wanted(self, parts: Sequence[Part], keys: pa.Array | None = None, low: str = "", high: str = "~") -> tuple[pa.Table, list[str]]:
        """The rows of some parts that are asked for, and the names of the parts that are gone."""
        tables, gone = [ROW_SCHEMA.empty_table()], []
        for part in parts:
            try:
                tables.append(self._table(part))
            except FileNotFoundError:
                gone.append(part.name)
        table = pa.concat_tables(tables)
        if keys is not None:
            table = table.filter(pc.is_in(table["key"], value_set=keys))
        elif low or high != "~":
            table = table.filter(pc.and_(pc.greater_equal(table["key"], low), pc.less(table["key"], high)))
        return table, gone

    def _too_new(self, name: str) -> StoreError:
        return StoreError(
            f"store {self.files.url}: index part {name} was written by a later version of e4s (this one knows format {INDEX_FORMAT}); "
            "update e4s, or choose another --store"
        )


def resolve(table: pa.Table) -> Rows:
    """Rows of any parts in any order, met once or more -> what stands."""
    table = _sorted(table, "key", "part", "output", "kind", "file")
    table = table.combine_chunks()
    if not len(table):
        return Rows(table, pa.chunked_array([], pa.bool_()), table)
    again = _same_as_before(table, ["key", "part", "output", "kind", "file"])
    if again.any():
        table = table.filter(pa.array(~again))
    cancelling = pc.is_in(table["kind"], value_set=pa.array(CANCELS))
    cancels = table.filter(cancelling)
    entries = table.filter(pc.invert(cancelling))
    if len(cancels):
        named = pc.binary_join_element_wise(cancels["key"], cancels["file"], "\n").combine_chunks()
        mine = pc.binary_join_element_wise(entries["key"], entries["part"], "\n")
        entries = entries.filter(pc.invert(pc.is_in(mine, value_set=named)))
    if not len(entries):
        return Rows(entries, pa.chunked_array([], pa.bool_()), cancels)
    entries = entries.combine_chunks()
    starts = np.flatnonzero(~_same_as_before(entries, ["key"]))
    lengths = np.diff(np.append(starts, len(entries)))
    first_part = pc.take(entries["part"], pa.array(np.repeat(starts, lengths)))
    return Rows(entries, pc.equal(entries["part"], first_part), cancels)


def _sorted(table: pa.Table, *columns: str) -> pa.Table:
    return table.sort_by([(name, "ascending") for name in columns])


def _same_as_before(table: pa.Table, columns: Sequence[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether each row equals the one before in these columns: (rows,) bool."""
    same = np.ones(len(table), bool)
    same[0] = False
    for name in columns:
        same[1:] &= np.asarray(pc.equal(table[name].slice(1), table[name].slice(0, len(table) - 1)))
    return same


class _Spill:
    """Rows gathered by range of keys: in memory if they are one group, otherwise in temporary files."""

    def __init__(self, stack: ExitStack, groups: int) -> None:
        self.bounds = [f"{65536 * i // groups:04x}" for i in range(1, groups)]
        self.waiting: list[pa.Table] = []
        self.count = 0
        if self.bounds:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="e4s-merge-")))
            self.paths = [folder / f"{group}.arrow" for group in range(groups)]
            self.writers = [stack.enter_context(pa.ipc.new_stream(str(path), ROW_SCHEMA)) for path in self.paths]

    def add(self, table: pa.Table) -> None:
        self.waiting.append(table)
        self.count += len(table)
        if self.bounds and self.count >= 2 * MERGED_ROWS:
            self._flush()

    def groups(self) -> Iterator[pa.Table]:
        """Each group's rows, groups in the order of keys."""
        if not self.bounds:
            yield pa.concat_tables([ROW_SCHEMA.empty_table(), *self.waiting])
            return
        self._flush()
        for writer, path in zip(self.writers, self.paths, strict=True):
            writer.close()
            with pa.ipc.open_stream(str(path), options=pa.ipc.IpcReadOptions(use_threads=False)) as reader:
                yield reader.read_all()
            path.unlink()

    def _flush(self) -> None:
        table = pa.concat_tables([ROW_SCHEMA.empty_table(), *self.waiting])
        self.waiting, self.count = [], 0
        heads = np.asarray(pc.utf8_slice_codeunits(table["key"], 0, 4)).astype(str)
        groups = np.searchsorted(np.array(self.bounds), heads, side="right")
        for group in np.unique(groups):
            self.writers[group].write_table(table.filter(pa.array(groups == group)))


def _batches(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts in groups that are read and filtered as one: large ones singly, small ones until they are as large."""
    batches: list[list[Part]] = []
    room = 0
    for part in parts:
        if not batches or part.size > room or len(batches[-1]) == 64:
            batches.append([])
            room = 2 * HALF_FULL
        batches[-1].append(part)
        room -= part.size
    return batches


def _prefix(key: str) -> str:
    """The first 6 bytes of a key in hexadecimal: sorts as keys do."""
    return key.encode()[:6].hex()


def _threads(local: bool) -> int:
    return min(2, os.cpu_count() or 1) if local else 16
