"""Parquet files, read by the calling thread alone: the one place that reads them.

Arrow reads ahead and decodes in threads of its own. One that still holds a Python object when the interpreter ends, ends the process with
`terminate called without an active exception` (exit code 134): seen on a busy machine, after all work was done.
`pyarrow.parquet.read_table` goes through the scanner of data sets, which uses those threads whatever `use_threads` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def open_parquet(source: bytes | Path) -> pq.ParquetFile:
    """A Parquet file, or the bytes of one, for its schema and for reading by what stands below. Raises pa.ArrowInvalid, OSError."""
    return pq.ParquetFile(pa.BufferReader(source) if isinstance(source, bytes) else source, pre_buffer=False)


def read_table(file: pq.ParquetFile, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of an open file, or these columns of them."""
    return file.read(columns=columns, use_threads=False)


def read_batches(file: pq.ParquetFile, size: int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of an open file, at most `size` at a time."""
    yield from file.iter_batches(size, columns=columns, use_threads=False)


def read_parquet(source: bytes | Path, schema: pa.Schema | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in a Parquet file or in the bytes of one; with a schema, its columns in its types, null where the file has none.

    Raises pa.ArrowException or OSError for what is no Parquet file, and pa.ArrowException for values that do not fit the schema.
    """
    with open_parquet(source) as file:
        if schema is None:
            return read_table(file, columns)
        there = set(file.schema_arrow.names)
        table = read_table(file, [name for name in schema.names if name in there])
    # -1: there is no such column, or two of that name
    places = {field.name: table.schema.get_field_index(field.name) for field in schema}
    arrays = [
        table.column(places[field.name]).cast(field.type) if places[field.name] >= 0 else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(arrays, schema=schema)
