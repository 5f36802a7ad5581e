"""The index of a store at scale: lookup of keys among 10,000 to 1,000,000 artifacts, time and memory, before and after compaction.

The index files are real, the artifacts are made up (no payloads). Each lookup runs in a process of its own; its peak memory is what it
holds beyond a process that looked up nothing. The plain side of the time ratio reads one Parquet file of the same rows and filters it.

    python -m benchmarks.store_scale [--quick] [--entries 1000000] [--per-part 250] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.result import Results
from storage.index import INDEX_SCHEMA
from storage.keys import digest_bytes
from storage.parquet import read_parquet
from storage.store import Store

REPEATS = 3


def make_key(number: int) -> str:
    return digest_bytes(b"%d" % number)


def make_rows(start: int, stop: int) -> list[dict[str, Any]]:
    """Index rows of artifacts `start` to `stop`, a picture each."""
    rows = []
    for number in range(start, stop):
        sha256 = digest_bytes(b"payload %d" % number)
        file = f"payload/{sha256[:2]}/{sha256}.png"
        row = {"key": make_key(number), "stage": f"stage{number % 14}", "output": "face", "kind": "image", "file": file, "row": -1}
        rows.append({**row, "sha256": sha256, "size": 1_000_000 + number, "reason": ""})
    return rows


def build(folder: Path, entries: int, per_part: int) -> Store:
    """A store of `entries` artifacts in parts of `per_part`, as publications leave them before any is merged."""
    store = Store(str(folder))
    for start in range(0, entries, per_part):
        store.index.append(make_rows(start, min(start + per_part, entries)))
    return store


def look_up(folder: str, entries: int, wanted: int, repeats: int = REPEATS) -> dict[str, float]:
    """One lookup of random keys in a fresh process, the best of some: seconds, CPU seconds, peak memory (bytes), keys found."""
    command = [sys.executable, "-m", "benchmarks.store_scale", "--lookup", folder, str(entries), str(wanted)]
    found = [json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(repeats)]
    return {name: min(one[name] for one in found) for name in found[0]}


def _look_up_here(folder: str, entries: int, wanted: int) -> None:
    keys = [make_key(int(number)) for number in np.random.default_rng(0).choice(entries, wanted, replace=False)]
    store = Store(folder)
    store.lookup([])
    before, began = _peak(), (time.perf_counter(), time.process_time())
    found = store.lookup(keys)
    seconds, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    print(json.dumps({"seconds": seconds, "cpu": cpu, "bytes": _peak() - before, "found": len(found)}))


def plain_filter(file: Path, entries: int, wanted: int) -> float:
    """CPU seconds that pyarrow needs to read one file of all rows and filter it (best of three)."""
    keys = pa.array(make_key(int(number)) for number in np.random.default_rng(0).choice(entries, wanted, replace=False))
    seconds = []
    for _ in range(REPEATS):
        began = time.process_time()
        table = read_parquet(file)
        table.filter(pc.is_in(table["key"], value_set=keys)).to_pylist()
        seconds.append(time.process_time() - began)
    return min(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, for the tests")
    parser.add_argument("--entries", type=int, default=1_000_000, help="artifacts of the largest store")
    parser.add_argument("--per-part", type=int, default=250, help="artifacts per publication")
    parser.add_argument("--folder", default="", help="build the stores here and keep them (default: a temporary folder)")
    parser.add_argument("--lookup", nargs=3, metavar=("FOLDER", "ENTRIES", "WANTED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.lookup:
        _look_up_here(arguments.lookup[0], int(arguments.lookup[1]), int(arguments.lookup[2]))
        return 0
    entries = 20_000 if arguments.quick else arguments.entries
    sizes = [entries // 10, entries] if arguments.quick else [entries // 100, entries // 10, entries]
    counts = [entries // 1000, entries // 10]
    results = Results("store_scale")
    with tempfile.TemporaryDirectory(prefix="e4s-scale-") as temporary:
        folder = Path(arguments.folder or temporary)
        measured = {
            (size, when, count): row
            for size, when, count, row in _measure(folder, sizes, counts, arguments.per_part, 1 if arguments.quick else REPEATS)
        }
        pq.write_table(pa.Table.from_pylist(make_rows(0, entries), INDEX_SCHEMA), folder / "plain.parquet", compression="zstd")
        plain = plain_filter(folder / "plain.parquet", entries, counts[0])
    medium, large = (measured[size, "after", counts[0]] for size in sizes[-2:])
    results.claim("found", min(row["found"] / min(count, size) for (size, _, count), row in measured.items()), 1.0, ">=")
    results.claim("parts_after_per_million", large["parts"] / entries * 1e6, 50 if not arguments.quick else 100)
    results.claim("memory_mb_beyond_ten_times_fewer", (large["bytes"] - medium["bytes"]) / 1e6, 64.0)
    results.claim("cpu_over_ten_times_fewer", large["cpu"] / medium["cpu"], 12.0)
    results.claim("lookup_over_plain_filter", large["cpu"] / plain, 3.0)
    return results.exit_code()


def _measure(
    folder: Path, sizes: list[int], counts: list[int], per_part: int, repeats: int
) -> Iterator[tuple[int, str, int, dict[str, float]]]:
    """Build and measure store by store: (artifacts, before or after compaction, keys looked up, figures)."""
    print(f"{'artifacts':>10} {'index':>7} {'parts':>6} {'MB':>6} {'keys':>7} {'seconds':>8} {'CPU s':>7} {'peak MB':>8}")
    for size in sizes:
        place = folder / str(size)
        store = build(place, size, per_part)
        for when in ("before", "after"):
            if when == "after":
                began, cpu = time.perf_counter(), time.process_time()
                store.compact()
                seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
                print(f"compacted in {seconds:.1f} s ({cpu:.1f} s of CPU), peak memory of this process {_peak() / 1e6:.0f} MB")
            parts = store.index.parts()
            stored = sum(part.size for part in parts) / 1e6
            for count in counts:
                row = {**look_up(str(place), size, min(count, size), repeats), "parts": float(len(parts))}
                figures = f"{row['seconds']:>8.3f} {row['cpu']:>7.3f} {row['bytes'] / 1e6:>8.1f}"
                print(f"{size:>10} {when:>7} {len(parts):>6} {stored:>6.1f} {count:>7} {figures}", flush=True)
                yield size, when, count, row


def _peak() -> float:
    """Peak resident memory of this process, bytes (that of `resource` would include the process it was forked from)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return float(found[1]) * 1024 if found else float("nan")


if __name__ == "__main__":
    raise SystemExit(main())
