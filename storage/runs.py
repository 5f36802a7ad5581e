"""Which runs use a store: what each may use, and which are at work now.

    runs/<id>/run.json                 folder and machine of the run, when it was registered
    runs/<id>/keys-<sha256>.parquet    the keys of the artifacts that it may use
    runs/<id>/lease.json               there while it is at work; written again every half minute
    prune/<id>.json                    there while somebody prunes

A run writes its lease and then looks whether somebody prunes; who prunes writes that and then looks for leases: so one of the two sees
the other. A run waits for the prune to end; a prune spares what running ones may use. A lease counts while the process that holds it
lives, told by the clock ticks between the machine's start and its own, which no step of the clock changes; on another machine, while it
is younger than two minutes by the store's clock. What a temporary run registered goes with its lease.
"""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.files import Entry, Files, StoreError, write_atomic
from storage.keys import digest_bytes
from storage.parquet import read_parquet

PROBES = "probe"  # folder of files by which Dask workers prove that they see the store, see flows/remote.py
LEFT_SECONDS = 3600.0  # after this long a claim or a proof that was not written again is of a process that was killed
LEASE_SECONDS = 120.0  # after this long without a sign of life a lease held on another machine no longer counts
ID_FILE = ".run-id"  # in the run folder: its name in every store, wherever it is moved to


@dataclass(frozen=True)
class Run:
    """A run as registered in a store."""

    id: str
    path: str
    host: str
    registered: str  # ISO 8601
    live: bool
    keys_file: str
    temporary: bool = False  # its folder ends with it, so its registration does, too

    @property
    def folder_gone(self) -> bool:
        """Whether its folder was on this machine and is there no longer."""
        return self.host == socket.gethostname() and not Path(self.path).exists()


class Lease:
    """A run's right to what it may use; close it (or leave its `with`) when the run ends. The end of the process ends it too."""

    def __init__(self, files: Files, file: str, *, temporary: bool = False, **fields: Any) -> None:
        """`temporary`: all that lies beside the lease goes when it is closed."""
        self._files, self._file, self._temporary = files, file, temporary
        self._data = json.dumps({**fields, "temporary": temporary, **_this_process()}).encode()
        self._done = threading.Event()
        self._files.write(file, self._data)
        self._thread = threading.Thread(target=self._beat, name="e4s-lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        if not self._done.is_set():
            self._done.set()
            self._thread.join()
            try:
                if self._temporary:
                    self._files.remove_folder(self._file.rpartition("/")[0])
                else:
                    self._files.remove([self._file])
            except (StoreError, OSError):  # a lost store: the lease runs out by itself
                return

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _beat(self) -> None:
        while not self._done.wait(LEASE_SECONDS / 4):
            try:
                self._files.write(self._file, self._data)
            except (StoreError, OSError):  # the run itself meets a lost or full store, and says so
                continue


class Runs:
    """The runs of one store."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def register(self, run: Path, keys: Iterable[str], *, unfolding: bool = False, temporary: bool = False) -> Lease:
        """Write the run's lease and keys; waits while somebody prunes. Raises StoreError if the store cannot be written.

        The keys replace those of the run's earlier plan. `unfolding`: they are but the first, `extend` adds what follows from them as it
        comes to be known; so if one of them was registered before, all that was stays, wherever the folder was then. `temporary`: nothing
        is registered any more when the lease is closed; of a run that was killed the next one that registers, or a prune, removes it.
        """
        name = f"{run_id(run, make=True)}-{digest_bytes(str(run.absolute()).encode())[:8]}"  # a copied folder is another run
        before = self._known(name.split("-")[0]) if unfolding else []
        self.forget_ended(moved=name)
        about: dict[str, Any] = {"path": str(run.absolute()), "temporary": temporary}
        lease = Lease(self.files, f"runs/{name}/lease.json", **about)
        try:
            if unfolding:
                first = set(keys)
                keys = first if first.isdisjoint(before) else first.union(before)
            self._write_keys(name, keys)
            about |= {"host": socket.gethostname(), "registered": datetime.now(UTC).isoformat(timespec="seconds")}
            self.files.write(f"runs/{name}/run.json", json.dumps(about).encode())
            self._wait_for_prunes()
        except BaseException:
            lease.close()
            raise
        return lease

    def extend(self, run: Path, keys: Iterable[str]) -> None:
        """Add keys to those that a registered run may use."""
        name = f"{run_id(run)}-{digest_bytes(str(run.absolute()).encode())[:8]}"
        self._write_keys(name, [*self._known(name), *keys])

    def registered(self) -> list[Run]:
        """All runs that registered here, in order of their folders."""
        now = self.now()
        runs = []
        for folder in self.files.folders("runs"):
            entries = {entry.name: entry for entry in self.files.entries(folder)}
            keys = sorted(name for name in entries if name.startswith("keys-"))
            lease = entries.get("lease.json")
            about = self._json(f"{folder}/run.json") or (self._json(lease.file) if lease else None)
            if about is not None:
                runs.append(
                    Run(
                        folder.rsplit("/", 1)[-1],
                        about.get("path", ""),
                        about.get("host", ""),
                        about.get("registered", ""),
                        lease is not None and self._holds(lease, now),
                        f"{folder}/{keys[-1]}" if keys else "",
                        bool(about.get("temporary")),
                    )
                )
        return sorted(runs, key=lambda found: (found.path, found.id))

    def keys(self, runs: Iterable[Run], *, strict: bool = False) -> pa.Array:
        """The keys that any of these runs may use, each once.

        A damaged list of a run that is at work raises StoreError; `strict`: so does that of any run, which else counts as empty.
        """
        tables = [self._keys_of(run, strict) for run in runs]
        return pc.unique(pa.chunked_array([keys for table in tables for keys in table.chunks], pa.string()))

    def forget(self, run: Run) -> None:
        """Remove a run's registration."""
        self.files.remove_folder(f"runs/{run.id}")

    @contextmanager
    def pruning(self) -> Iterator[None]:
        """Say that somebody prunes: runs that register meanwhile wait. One at a time: raises StoreError if another does already."""
        lease = Lease(self.files, f"prune/{uuid.uuid4().hex}.json")
        try:
            if others := self._prunes(besides=lease._file):
                raise StoreError(f"store {self.files.url}: {others[0]} is pruning it; repeat the command when that is done")
            yield
        finally:
            lease.close()

    def forget_ended(self, moved: str = "") -> None:
        """Remove what killed ones left: registrations of temporary runs, claims of prunes, proofs of workers.

        Also registrations of the run `moved` at a place where its folder no longer is.
        """
        for run in self.registered():
            elsewhere = run.id != moved and run.id.split("-")[0] == moved.split("-")[0] and run.folder_gone
            if (run.temporary or elsewhere) and not run.live:
                self.forget(run)
        now = self.now()
        for folder in ("prune", PROBES):
            left = [entry for entry in self.files.entries(folder) if entry.modified < now - LEFT_SECONDS]
            if left:
                same = set(self.files.entries(folder))  # not those that were written again meanwhile
                self.files.remove([entry.file for entry in left if entry in same])

    def _write_keys(self, name: str, keys: Iterable[str]) -> None:
        iterator = iter(keys)
        chunks = []
        while some := list(islice(iterator, 100_000)):  # few Python strings at a time
            chunks.append(pa.array(some, pa.string()))
        unique = pc.unique(pa.chunked_array(chunks, pa.string()))
        table = pa.table({"key": unique.take(pc.sort_indices(unique))})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        data = buffer.getvalue()
        file = f"runs/{name}/keys-{digest_bytes(data)[:16]}.parquet"
        if self.files.size(file) != len(data):
            self.files.write(file, data)
        old = [entry.file for entry in self.files.entries(f"runs/{name}") if entry.name.startswith("keys-") and entry.file != file]
        self.files.remove(old)

    def _known(self, name: str) -> list[str]:
        """The keys of the run of this name, or of all whose name begins so, as far as their lists are whole."""
        lists = (self._read_keys(found) for found in self.registered() if found.id.startswith(name))
        return [str(key) for keys in lists if keys is not None for key in keys.to_pylist()]

    def _keys_of(self, run: Run, strict: bool) -> pa.ChunkedArray:
        """A run's keys. A damaged list of a run at work is an error: what it needs is unknown."""
        if (keys := self._read_keys(run)) is not None:
            return keys
        if run.live and not run.keys_file:
            raise StoreError(f"store {self.files.url}: {run.path} is starting; repeat the command in a moment")
        if run.live:
            raise StoreError(f"store {self.files.url}: the list of what the running {run.path} needs is damaged; wait for its end")
        if strict:
            raise StoreError(
                f"store {self.files.url}: the list of what {run.path} uses is damaged; repeat that run's command, or prune it with --run"
            )
        return pa.chunked_array([], pa.string())

    def _read_keys(self, run: Run) -> pa.ChunkedArray | None:
        """A run's list of keys; None if there is none or it is damaged."""
        if not run.keys_file:
            return None
        try:
            data = self.files.read(run.keys_file)
        except FileNotFoundError:
            return None
        whole = digest_bytes(data)[:16] == Path(run.keys_file).stem.removeprefix("keys-")
        return read_parquet(data)["key"] if whole else None

    def _wait_for_prunes(self) -> None:
        told = False
        while others := self._prunes():
            if not told:
                print(f"e4s: store {self.files.url}: waiting for {others[0]}, which prunes it", file=sys.stderr)
                told = True
            time.sleep(0.5)

    def _prunes(self, besides: str = "") -> list[str]:
        """Who prunes now."""
        entries = [entry for entry in self.files.entries("prune") if entry.name.endswith(".json") and entry.file != besides]
        if not entries:
            return []
        now = self.now()
        held = [entry for entry in entries if self._holds(entry, now)]
        holders = [self._json(entry.file) for entry in held]
        return [f"process {holder['pid']} on {holder['host'].split(' ')[0]}" for holder in holders if holder]

    def _holds(self, lease: Entry, now: float) -> bool:
        holder = self._json(lease.file)
        if holder is None and self.files.size(lease.file) < 0:
            return False  # just closed
        if holder and holder.get("host") == _host():
            started = _start_ticks(holder["pid"])
            if started in (None, holder.get("ticks")):
                return started is not None
            # Another process has that number now, or an earlier version wrote the lease: a young one may be held all the same.
        return now - lease.modified < LEASE_SECONDS

    def now(self) -> float:
        """The time by the store's clock, s since the epoch: that of a file just written; by this machine's where none can be."""
        file = f"prune/{uuid.uuid4().hex}.clock"
        try:
            self.files.write(file, b"0")
            now = next((entry.modified for entry in self.files.entries("prune") if entry.file == file), time.time())
            self.files.remove([file])
        except (StoreError, OSError):
            return time.time()
        return now

    def _json(self, file: str) -> dict[str, Any] | None:
        try:
            value = json.loads(self.files.read(file))
        except (FileNotFoundError, ValueError):
            return None
        return value if isinstance(value, dict) else None


def run_id(run: Path, *, make: bool = False) -> str:
    """The name of a run folder in every store; "" if it has none and none is to be made."""
    file = run / ID_FILE
    try:
        name = file.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        name = ""
    if not name and make:
        name = uuid.uuid4().hex
        write_atomic(file, name.encode())
    return name


def _host() -> str:
    """This machine since its start, and the namespace that process numbers belong to."""
    found = [socket.gethostname()]
    with suppress(OSError):  # not Linux
        found += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").readlink())]
    return " ".join(found)


def _this_process() -> dict[str, Any]:
    return {"host": _host(), "pid": os.getpid(), "started": psutil.Process().create_time(), "ticks": _start_ticks(os.getpid())}


def _start_ticks(pid: int) -> float | None:
    """When a process of this machine started, in clock ticks since the machine did; None if it is gone, or dead and not waited for.

    The time of day of its start (`create_time`) would change with every step of the clock: it counts where there is no /proc.
    """
    try:
        if not Path("/proc/self/stat").exists():
            return float(psutil.Process(pid).create_time())
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()  # the name before may hold anything
    except (psutil.NoSuchProcess, OSError):
        return None
    return None if fields[0] in "ZXx" else float(fields[19])
