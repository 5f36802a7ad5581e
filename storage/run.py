"""The run folder: what ran with which settings (`run.json`), a row per item (`manifest.parquet`), a line per event (`log.jsonl`).

`attempts.jsonl` holds a line per failed attempt. Nothing here is needed to find what is finished: that is in the store, so a file that a
power loss emptied costs only what it alone says (the settings of the last run, seconds, history).
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from storage.parquet import open_parquet, read_parquet
from storage.spelling import near_path
from storage.store import write_atomic

MANIFEST_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("target", pa.string()),
        ("source_sha256", pa.string()),
        ("target_sha256", pa.string()),
        ("source_reading", pa.string()),  # how the picture is decoded, where an earlier version did so otherwise
        ("target_reading", pa.string()),
        ("source_face", pa.int32()),  # which face of the picture, 0 = largest
        ("target_face", pa.int32()),
        ("truth", pa.string()),  # the picture that the result should equal, if the manifest names one
        ("truth_sha256", pa.string()),
        ("status", pa.string()),  # left, done, failed
        ("stage", pa.string()),  # where it failed
        ("reason", pa.string()),
        ("note", pa.string()),  # what limits the result of a pair that is done: heads turned, a small source, much that is hidden
        ("output", pa.string()),  # relative to the run folder
        ("output_sha256", pa.string()),
        ("output_size", pa.int64()),
        ("key", pa.string()),  # of the final artifact
        ("seconds", pa.float64()),  # compute spent on this item, shared per-image work counted where it was done
        ("attempts", pa.int32()),  # failed attempts at this key; the history is in attempts.jsonl
        ("quarantined", pa.bool_()),  # failed so often that it is not tried again until released
    ]
)


class RunError(Exception):
    """The run folder cannot be used: the sentence says why and what to do."""


class RunBusy(RunError):
    """Another process works on the run."""


class DamagedFile(RunError):
    """A file of the run folder cannot be read; repeating the run's command writes it again."""


@dataclass(kw_only=True, slots=True)
class BaseRow:
    """What the manifests of all kinds of runs say of an item."""

    id: str
    source: str
    source_sha256: str = ""
    source_reading: str = ""
    source_face: int = 0
    status: str = "left"
    stage: str = ""
    reason: str = ""
    output: str = ""
    output_sha256: str = ""
    output_size: int = 0
    key: str = ""
    seconds: float = 0.0
    attempts: int = 0
    quarantined: bool = False


@dataclass(kw_only=True, slots=True)
class Row(BaseRow):
    """One pair of a run."""

    target: str
    target_sha256: str = ""
    target_reading: str = ""
    target_face: int = 0
    note: str = ""
    truth: str = ""
    truth_sha256: str = ""


AnyRow = TypeVar("AnyRow", bound=BaseRow)


class RunFiles(Generic[AnyRow]):
    """A run's files. Everything is replaced as a whole or appended by line, so that a killed run leaves readable files."""

    noun: str
    """What an item is."""
    schema: pa.Schema
    row: type[AnyRow]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.outputs = self.path / "outputs"
        self.manifest = self.path / "manifest.parquet"
        self.settings = self.path / "run.json"
        self.log = self.path / "log.jsonl"
        self.attempts = self.path / "attempts.jsonl"

    def create(self) -> None:
        """Make the folder and prove that it can be written. Raises RunError."""
        make_folder(self.path, "--run")
        make_folder(self.outputs, "--run")

    def lock(self) -> IO[bytes]:
        """As `lock_folder`."""
        return lock_folder(self.path, "--run")

    def holder(self) -> str:
        """The process that works on this run (`process 12 on HOST`), or "" if none does; for another machine, what the lock file says."""
        try:
            holder = (self.path / ".lock").read_text(errors="replace")
        except OSError:
            return ""
        match = re.fullmatch(r"process (\d+) on (.+)", holder)
        if match and match[2] == socket.gethostname() and not _alive(int(match[1])):
            return ""
        return holder

    def read_rows(self) -> list[AnyRow]:
        """Rows of the manifest as last written; none if there is no manifest. Raises DamagedFile, or RunError for another kind of run."""
        if not self.manifest.exists():
            return []
        try:
            data = self.manifest.read_bytes()
            names = set(open_parquet(data).schema_arrow.names)
            table = read_parquet(data, self.schema)
        except (pa.ArrowException, OSError) as error:
            raise DamagedFile(f"{self.manifest}: the manifest cannot be read ({error}); repeat the run's command: it is rebuilt") from None
        if missing := {column.name for column in fields(self.row) if column.default is MISSING} - names:
            lacking = f"its manifest has no column {min(missing)}"
            raise RunError(f"{self.path}: not a run of {self.noun}s ({lacking}); choose another run folder")
        rows = [self._row(columns) for batch in table.to_batches(10_000) for columns in batch.to_pylist()]
        for row in rows:
            self._check_names(row)
        return rows

    def _check_names(self, row: BaseRow) -> None:
        """Check that a row names no file outside of the run folder, which might then be read, replaced or removed. Raises DamagedFile."""
        again = "repeat the run's command: the manifest is rebuilt"
        if not _is_file_name(row.id):
            raise DamagedFile(f"{self.manifest}: the id {row.id!r} is no file name; {again}")
        folder, _, name = row.output.partition("/")
        if row.output and not (folder == self.outputs.name and _is_file_name(name)):
            raise DamagedFile(f"{self.manifest}: the row {row.id!r} names {row.output!r} as its output, not a file of outputs/; {again}")

    def write_rows(self, rows: Iterable[AnyRow]) -> None:
        """Replace the manifest, in pieces that keep memory small beside the rows themselves."""
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, self.schema, compression="zstd") as writer:
            for batch in _batched(rows, 50_000):
                writer.write_table(pa.Table.from_pylist([asdict(row) for row in batch], self.schema))
        write_atomic(self.manifest, buffer.getvalue(), durable=True)

    def read_settings(self) -> dict[str, Any]:
        """Contents of run.json. Raises RunError if this is no run folder, DamagedFile if it cannot be read."""
        try:
            return dict(json.loads(self.settings.read_bytes()))
        except FileNotFoundError:
            alike = "" if self.path.exists() else near_path(self.path)
            raise RunError(f"{self.path}: not a run folder (no run.json){alike}; give the folder that was named by --run") from None
        except (ValueError, TypeError):
            raise DamagedFile(f"{self.settings}: cannot be read as JSON; repeat the run's command to write it again") from None

    def write_settings(self, settings: dict[str, Any]) -> None:
        write_atomic(self.settings, json.dumps(settings, indent=2, sort_keys=True).encode() + b"\n", durable=True)

    def append_log(self, event: str, **fields: Any) -> None:
        """Add one event to log.jsonl, with time, run and this process."""
        append_lines(self.log, [{"time": round(time.time(), 3), "run": self.path.name, "event": event, **fields}])

    def read_log(self) -> list[dict[str, Any]]:
        """Events in order; what a crash cut or damaged is left out."""
        return read_lines(self.log)[0]

    def _row(self, columns: dict[str, Any]) -> AnyRow:
        """A manifest row; columns that an older manifest lacks have their defaults."""
        return self.row(**{name: value for name, value in columns.items() if value is not None})


class RunFolder(RunFiles[Row]):
    """The run folder of pairs."""

    noun = "pair"
    schema = MANIFEST_SCHEMA
    row = Row


def check_writable(folder: Path, option: str) -> None:
    """Prove that files can be written to a folder, or where it would have to be made; leaves nothing behind.

    `option` is what named the folder on the command line. Raises RunError.
    """
    there = next(at for at in (folder, *folder.absolute().parents) if at.exists())
    if not there.is_dir():
        raise RunError(f"{there}: a file stands where a folder should be; choose another {option}")
    try:
        probe = there / f".{os.getpid()}.writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"{folder}: the folder cannot be written ({error.strerror}); choose another {option} or change its rights") from None


def make_folder(folder: Path, option: str) -> None:
    """Make a folder, if need be, and prove that it can be written. Raises RunError; `option` as for `check_writable`."""
    check_writable(folder, option)
    folder.mkdir(parents=True, exist_ok=True)


def lock_folder(folder: Path, option: str) -> IO[bytes]:
    """Take a folder for this process; the system releases the lock of a process that died. Raises RunBusy if another works there.

    The lock is advisory (flock). On NFS it holds between machines from version 4 on, or with its lock daemon; where the file system
    has no locks, a line on stderr says so and the run goes on. `option` as for `check_writable`.
    """
    file = (folder / ".lock").open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(200).decode(errors="replace") or "another process"
        file.close()
        raise RunBusy(f"{folder}: another process is working on this run ({holder}); wait for it or choose another {option}") from None
    except OSError as error:
        print(
            f"e4s: {folder}: this file system has no locks ({error.strerror}); see to it that only one process works on this run",
            file=sys.stderr,
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    file.flush()
    return file


def unlock(lock: IO[bytes]) -> None:
    """Give a folder back."""
    lock.truncate(0)
    lock.close()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Add JSON lines to a file in one write; a last line that a crash cut is closed first, so that it costs only itself."""
    data = b"".join(json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n" for line in lines)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                data = b"\n" + data
        file.write(data)


def read_lines(path: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a file of lines from byte `start` on, in order, and where the next reading begins.

    Lines that a crash damaged are left out, as is a last one that is not whole yet.
    """
    found: list[dict[str, Any]] = []
    if not path.exists():
        return found, 0
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                break
            start += len(line)
            try:
                value = json.loads(line)
            except ValueError:  # a cut line, or the zeros that a power loss leaves
                continue
            if isinstance(value, dict):
                found.append(value)
    return found, start


def _is_file_name(text: str) -> bool:
    return text not in ("", ".", "..") and "/" not in text and "\0" not in text


def _batched(rows: Iterable[AnyRow], size: int) -> Iterator[list[AnyRow]]:
    batch: list[AnyRow] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    yield batch
