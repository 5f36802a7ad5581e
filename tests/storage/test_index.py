"""The index merged, damaged, killed and shared: what is finished stays finished, and means what it meant before."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import index as index_module
from storage.store import Artifact, Damaged, Finished, Store, StoreError

ROOT = Path(__file__).parents[2]


def key(number: int) -> str:
    return hashlib.sha256(b"%d" % number).hexdigest()


def image(value: int) -> np.ndarray:
    return np.full((2, 2), value, np.uint8)


def publish(store: Store, number: int, value: int | None = None) -> Artifact:
    values = {"face": ("image", image(number % 251 if value is None else value)), "point": ("array", np.array([number], np.int64))}
    (artifact,) = store.publish([Finished(key(number), "align", values)])
    return artifact


def state(store: Store) -> dict[str, Artifact]:
    return {artifact.key: artifact for artifact in store.all()}


def test_compaction_changes_nothing_but_the_number_of_parts(store: Store) -> None:
    for number in range(12):
        publish(store, number)
    publish(store, 3, value=9)  # a second entry: the first wins
    store.publish([Finished(key(20), "mesh", reason="no face found")])
    store.void(store.lookup([key(5)])[key(5)])
    before = state(store)
    assert before.keys() == {key(number) for number in (*range(5), *range(6, 12), 20)}
    store.compact()
    (part,) = store.index.parts()
    assert part.merged
    fresh = Store(store.url)
    assert state(fresh) == before  # the names of the parts that publications had, too
    assert fresh.read(before[key(3)], "face")[0, 0] == 3
    assert fresh.lookup([key(7), "absent"]) == {key(7): before[key(7)]}
    assert fresh.find([key(5), key(6)]).cancelled == {key(5): "void"}


def test_what_is_cancelled_after_compaction_stays_so(store: Store) -> None:
    artifact, second = publish(store, 1), publish(store, 1, value=7)
    publish(store, 2)
    store.compact()
    store.void(store.lookup([key(1)])[key(1)])
    assert store.lookup([key(1)]) == {key(1): second}  # the next entry counts now
    store.void(artifact)  # twice does no harm
    store.void(second)
    store.compact()
    assert store.lookup([key(1)]) == {}
    again = publish(store, 1)
    store.compact()
    assert state(Store(store.url))[key(1)] == again


def test_a_merge_that_did_not_know_of_a_cancellation_brings_nothing_back(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    artifact = publish(store, 1)
    publish(store, 2)
    old = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    store.compact()
    stale = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    for name, data in old.items():
        (tmp_path / "index" / name).write_bytes(data)
    store.void(artifact)
    store.compact()
    for name, data in stale.items():  # the other process publishes its merge only now
        (tmp_path / "index" / name).write_bytes(data)
    assert store.lookup([key(1), key(2)]).keys() == {key(2)}
    store.compact()
    assert store.lookup([key(1), key(2)]).keys() == {key(2)}


def test_many_keys_are_merged_by_range_and_found_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "GROUP_BYTES", 6000)
    monkeypatch.setattr(index_module, "MERGED_ROWS", 40)
    store = Store(str(tmp_path))
    for start in range(0, 200, 20):
        store.publish([Finished(key(number), "align", reason=f"reason {number}") for number in range(start, start + 20)])
    before = state(store)
    store.compact()
    parts = store.index.parts()
    assert len(parts) >= 5
    assert all(part.merged for part in parts)
    ranges = sorted((part.lowest, part.highest) for part in parts)
    assert all(high <= low for (_, high), (low, _) in itertools.pairwise(ranges))
    assert state(Store(str(tmp_path))) == before
    wanted = sorted(before)[100]
    read = []
    fresh = Store(str(tmp_path))
    monkeypatch.setattr(fresh.files, "read", lambda file: read.append(file) or (tmp_path / file).read_bytes())
    assert fresh.lookup([wanted]) == {wanted: before[wanted]}
    assert len(read) == 1  # of several parts only the one that may hold it


def test_small_parts_are_merged_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "SMALL_PARTS", 10)
    monkeypatch.setattr(index_module, "LARGE_PARTS", 3)
    for number in range(6):
        publish(Store(str(tmp_path)), number)  # short runs: each looks at the index once
    store = Store(str(tmp_path))
    for number in range(6, 60):
        publish(store, number)
    assert len(store.index.parts()) <= 10 + 3
    assert state(store).keys() == {key(number) for number in range(60)}


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "zeros"])
def test_a_damaged_merged_part_finishes_nothing_and_is_kept_for_inspection(tmp_path: Path, damage: str) -> None:
    store = Store(str(tmp_path))
    publish(store, 1)
    publish(store, 2)
    store.compact()
    (path,) = (tmp_path / "index").iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"flip": data, "truncate": data[:-9], "empty": b"", "zeros": bytes(len(data))}[damage])
    fresh = Store(str(tmp_path))
    assert fresh.lookup([key(1), key(2)]) == {}
    assert list(fresh.index.damaged) == [path.name]
    artifact = publish(fresh, 1)
    fresh.compact()
    assert state(Store(str(tmp_path))) == {key(1): artifact}
    assert path.exists()


def test_any_flipped_byte_of_a_merged_part_is_noticed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    publish(store, 1)
    publish(store, 2)
    store.compact()
    (path,) = (tmp_path / "index").iterdir()
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        assert store.lookup([key(1), key(2)]) == {}


def test_a_later_format_is_refused_with_a_sentence(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    publish(store, 1)
    table = pa.Table.from_pylist([{"key": "k"}]).replace_schema_metadata({"e4s.index": "99"})
    pq.write_table(table, tmp_path / "part")
    data = (tmp_path / "part").read_bytes()
    name = f"{1:020d}-{hashlib.sha256(data).hexdigest()[:16]}-0123abcd.parquet"
    (tmp_path / "index" / name).write_bytes(data)
    with pytest.raises(StoreError, match=r"later version of e4s.*update e4s"):
        store.lookup([key(1)])
    (tmp_path / "index" / name).rename(tmp_path / "index" / "1-2-3-4-5-6-7.parquet")
    with pytest.raises(StoreError, match=r"later version of e4s.*update e4s"):
        store.all()


def test_parts_of_the_first_format_are_read(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    artifact = publish(store, 1)
    (path,) = (tmp_path / "index").iterdir()
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), tmp_path / "old")
    data = (tmp_path / "old").read_bytes()
    path.unlink()
    old = f"{5:020d}-{hashlib.sha256(data).hexdigest()[:16]}-0123abcd.parquet"
    (tmp_path / "index" / old).write_bytes(data)
    found = Store(str(tmp_path)).lookup([key(1)])[key(1)]
    assert (found.payloads, found.part) == (artifact.payloads, old)


def test_a_part_that_vanishes_while_reading_is_found_where_it_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = Store(str(tmp_path)), Store(str(tmp_path))
    for number in range(5):
        publish(writer, number)
    whole = reader.files.read
    reads = []

    def read(file: str) -> bytes:
        reads.append(file)
        if len(reads) == 2:
            writer.compact()  # between the reader's listing and its reading
        return whole(file)

    monkeypatch.setattr(reader.files, "read", read)
    assert reader.lookup([key(number) for number in range(5)]).keys() == {key(number) for number in range(5)}


def test_a_listing_that_saw_neither_the_old_nor_the_new_part_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    publish(store, 1)
    publish(store, 2)
    missed = store.index.parts()[:1]
    listings = []

    def parts() -> list[index_module.Part]:
        listings.append(1)
        if len(listings) == 1:
            return missed  # the other was removed, and what replaced it came after the listing had passed its place
        return index_module.Index.parts(store.index)

    store.compact()
    monkeypatch.setattr(store.index, "parts", parts)
    assert store.lookup([key(1), key(2)]).keys() == {key(1), key(2)}


COMPACT = "import sys\nfrom storage.store import Store\nStore(sys.argv[1]).compact()"


@pytest.mark.parametrize("point", ["mid-write", "mid-write:2", "mid-merge", "mid-merge:2", "before-removal"])
def test_killed_while_compacting_nothing_is_lost(tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    for number in range(8):
        publish(store, number)
    store.void(store.lookup([key(2)])[key(2)])
    before = state(store)
    code = COMPACT.replace("Store(sys", "import storage.index\nstorage.index.MERGED_ROWS = 6\nStore(sys")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env={**os.environ, "E4S_FAULT": point}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert state(Store(str(tmp_path))) == before
    assert len(store.index.scan().entries) == 2 * len(before)  # rows that are there twice count once
    store.compact()
    assert state(Store(str(tmp_path))) == before
    assert len(store.index.parts()) == 1


def test_two_that_compact_at_once_are_harmless(store: Store) -> None:
    for number in range(10):
        publish(store, number)
    before = state(store)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: Store(store.url).compact(), range(3)))
    assert state(Store(store.url)) == before
    store.compact()
    assert len(store.index.parts()) == 1
    assert state(Store(store.url)) == before


WRITER = """
import json, sys
import numpy as np
import storage.index
from storage.store import Finished, Store
from tests.storage.test_index import image, key
storage.index.SMALL_PARTS, storage.index.LARGE_PARTS = 6, 3
url, name, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
store = Store(url)
print("ready", flush=True)
sys.stdin.readline()
for number in range(count):  # the same keys as the other, with the same picture and an array of its own
    if number == count // 2:
        print("half", flush=True)
        sys.stdin.readline()
    values = {"face": ("image", image(number)), "who": ("array", np.array([name]))}
    store.publish([Finished(key(number), "align", values)])
"""
READER = """
import sys, time
from storage.store import Store
from tests.storage.test_index import key
url, count = sys.argv[1], int(sys.argv[2])
keys, seen, lookups = [key(number) for number in range(count)], set(), 0
store = Store(url)
print("ready", flush=True)
sys.stdin.readline()
while len(seen) < count:
    found = store.lookup(keys)
    assert found.keys() >= seen, "a finished artifact is gone"
    for artifact in found.values():
        if artifact.key not in seen:
            store.read(artifact, "face"), store.read(artifact, "who")
    if not seen and found:
        print("some", flush=True)
    seen |= found.keys()
    lookups += 1
    time.sleep(0.02)
print(lookups)
"""


@pytest.mark.parametrize("place", ["file", "s3"])
def test_two_processes_write_one_store_while_a_third_reads(request: pytest.FixtureRequest, tmp_path: Path, place: str) -> None:
    count = 40 if place == "file" else 10
    url = str(tmp_path / "store")
    if place == "s3":
        request.getfixturevalue("s3_server")
        url = f"s3://bucket/{tmp_path.name}-{time.time_ns()}"
    Store(url).publish([Finished("start", "align", reason="so that there is an index")])
    commands = [[WRITER, url, "0", str(count)], [WRITER, url, "1", str(count)], [READER, url, str(count)]]
    processes = [
        subprocess.Popen([sys.executable, "-c", *command], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        for step in ("half\nhalf\nsome\n", ""):  # the writers wait until the reader has seen what they wrote so far
            for process in processes:
                assert process.stdin
                process.stdin.write("go\n")
                process.stdin.flush()
            if step:
                assert "".join(process.stdout.readline() for process in processes if process.stdout) == step
        printed = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert int(printed[2]) > 1
    store = Store(url)
    rows = store.index.scan()
    entries = json.loads(json.dumps(rows.entries.to_pylist()))
    for number in range(count):
        mine = [row for row in entries if row["key"] == key(number) and row["output"] == "face"]
        assert len(mine) == len({row["part"] for row in mine}) <= 2  # one entry a writer, none twice
        assert store.lookup([key(number)])[key(number)].part == min(row["part"] for row in mine)  # the first wins
        assert len({row["file"] for row in mine}) == 1  # one file for the same bytes
    assert all(_whole(store, artifact) for artifact in store.all())
    assert any(part.merged for part in store.index.parts())  # meanwhile


def _whole(store: Store, artifact: Artifact) -> bool:
    try:
        store.check(artifact)
    except Damaged:
        return False
    return True
