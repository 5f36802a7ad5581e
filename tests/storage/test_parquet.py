"""Parquet is read by the calling thread alone, in one place."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.parquet import open_parquet, read_batches, read_parquet

ROOT = Path(__file__).parents[2]
SCHEMA = pa.schema([("name", pa.string()), ("count", pa.int64()), ("later", pa.float64())])

READING = """
import os, sys
from pathlib import Path
import pyarrow as pa
import storage.parquet as sp

data = Path(sys.argv[1]).read_bytes()
before = len(os.listdir("/proc/self/task"))
schema = pa.schema([("name", pa.string()), ("more", pa.int64())])
for _ in range(20):
    sp.read_parquet(data)
    sp.read_parquet(data, schema)
    sp.read_parquet(Path(sys.argv[1]), columns=["name"])
    list(sp.read_batches(sp.open_parquet(data), 100))
print(len(os.listdir("/proc/self/task")) - before)
"""


def parquet(**columns: list[object]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=100)
    return buffer.getvalue()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_reading_starts_no_thread(tmp_path: Path) -> None:
    """A thread of Arrow's that still holds a buffer of Python's when the interpreter ends would abort the process."""
    (tmp_path / "table").write_bytes(parquet(name=[str(number) for number in range(2000)], count=list(range(2000))))
    done = subprocess.run([sys.executable, "-c", READING, str(tmp_path / "table")], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_nothing_else_reads_parquet() -> None:
    reading = re.compile(r"\bpq\.(read_|ParquetFile\()|ParquetDataset|pyarrow\.dataset|read_parquet\(.*engine")
    packages = ("e4s", "storage", "tasks", "evaluation", "flows", "e4s_models", "benchmarks")
    sources = [path for package in packages for path in (ROOT / package).rglob("*.py") if path != ROOT / "storage/parquet.py"]
    assert [str(path) for path in sources if reading.search(path.read_text("utf-8"))] == []


def test_a_schema_gives_types_order_and_missing_columns() -> None:
    data = parquet(extra=[1, 2], count=pa.array([3, None], pa.int32()), name=["a", "b"])
    table = read_parquet(data, SCHEMA)
    assert table.schema == SCHEMA
    assert table.to_pylist() == [{"name": "a", "count": 3, "later": None}, {"name": "b", "count": None, "later": None}]
    assert read_parquet(parquet(other=[1, 2]), SCHEMA).num_rows == 2
    assert read_parquet(parquet(name=[]), SCHEMA).to_pylist() == []


def test_files_and_pieces(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(parquet(name=["a", "b", "c"], count=[1, 2, 3]))
    assert read_parquet(path, columns=["count"]).to_pydict() == {"count": [1, 2, 3]}
    with open_parquet(path) as file:
        assert [batch.to_pydict() for batch in read_batches(file, 2, ["name"])] == [{"name": ["a", "b"]}, {"name": ["c"]}]


def test_what_does_not_fit_is_refused() -> None:
    whole = parquet(name=["a"], count=["many"])
    with pytest.raises(pa.ArrowException):
        read_parquet(whole, SCHEMA)
    for damaged in (b"", b"PAR1 not really", whole[:-20]):
        with pytest.raises((pa.ArrowException, OSError)):
            read_parquet(damaged, SCHEMA)
