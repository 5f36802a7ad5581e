"""Small Parquet files in memory, read by the calling thread alone.

Arrow reads ahead in threads of its own. One that is still busy with a Python object when the interpreter ends, ends the process with
`terminate called without an active exception`: seen on a busy machine, after all work was done.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq


def open_parquet(data: bytes) -> pq.ParquetFile:
    """A Parquet file's bytes, to be read in parts. Raises pa.ArrowInvalid for other bytes."""
    return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)


def read_parquet(data: bytes, schema: pa.Schema | None = None) -> pa.Table:
    """The table in a Parquet file's bytes, with this schema. Raises pa.ArrowException for other bytes or another schema."""
    return pq.read_table(pa.BufferReader(data), schema=schema, use_threads=False, pre_buffer=False)
