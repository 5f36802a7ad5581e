"""The run folder: what ran with which settings (`run.json`), a row per item (`manifest.parquet`), a line per event (`log.jsonl`)."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.store import write_atomic

MANIFEST_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("target", pa.string()),
        ("source_sha256", pa.string()),
        ("target_sha256", pa.string()),
        ("source_face", pa.int32()),  # which face of the picture, 0 = largest
        ("target_face", pa.int32()),
        ("status", pa.string()),  # left, done, failed
        ("stage", pa.string()),  # where it failed
        ("reason", pa.string()),
        ("output", pa.string()),  # relative to the run folder
        ("output_sha256", pa.string()),
        ("output_size", pa.int64()),
        ("key", pa.string()),  # of the final artifact
        ("seconds", pa.float64()),  # compute spent on this item, shared per-image work counted where it was done
    ]
)


class RunError(Exception):
    """The run folder cannot be used: the sentence says why and what to do."""


@dataclass(kw_only=True)
class Row:
    """One item of a run."""

    id: str
    source: str
    target: str
    source_sha256: str = ""
    target_sha256: str = ""
    source_face: int = 0
    target_face: int = 0
    status: str = "left"
    stage: str = ""
    reason: str = ""
    output: str = ""
    output_sha256: str = ""
    output_size: int = 0
    key: str = ""
    seconds: float = 0.0


class RunFolder:
    """A run's files. Everything is replaced as a whole or appended by line, so that a killed run leaves readable files."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.outputs = self.path / "outputs"
        self.manifest = self.path / "manifest.parquet"
        self.settings = self.path / "run.json"
        self.log = self.path / "log.jsonl"

    def create(self) -> None:
        """Make the folder and prove that it can be written. Raises RunError."""
        try:
            self.outputs.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except FileExistsError:
            raise RunError(f"{self.path}: a file stands where the run folder should be; choose another --run") from None
        except OSError as error:
            raise RunError(
                f"{self.path}: the run folder cannot be written ({error.strerror}); choose another --run or change its rights"
            ) from None

    def read_rows(self) -> list[Row]:
        """Rows of the manifest as last written; none if there is no manifest. Raises RunError if it is damaged."""
        if not self.manifest.exists():
            return []
        try:
            table = pq.read_table(io.BytesIO(self.manifest.read_bytes()), schema=MANIFEST_SCHEMA)
        except (pa.ArrowException, OSError) as error:
            raise RunError(
                f"{self.manifest}: the manifest cannot be read ({error}); delete it and repeat the command: it is rebuilt"
            ) from None
        return [Row(**row) for row in table.to_pylist()]

    def write_rows(self, rows: Iterable[Row]) -> None:
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], MANIFEST_SCHEMA), buffer, compression="zstd")
        write_atomic(self.manifest, buffer.getvalue())

    def read_settings(self) -> dict[str, Any]:
        """Contents of run.json. Raises RunError if this is no run folder."""
        try:
            return dict(json.loads(self.settings.read_bytes()))
        except FileNotFoundError:
            raise RunError(f"{self.path}: not a run folder (no run.json); give the folder that was named by --run") from None
        except ValueError:
            raise RunError(f"{self.settings}: cannot be read as JSON; repeat the run's command to write it again") from None

    def write_settings(self, settings: dict[str, Any]) -> None:
        write_atomic(self.settings, json.dumps(settings, indent=2, sort_keys=True).encode() + b"\n")

    def append_log(self, event: str, **fields: Any) -> None:
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}, ensure_ascii=False)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """Events in order; a last line cut by a crash is left out."""
        if not self.log.exists():
            return []
        events = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
        return events
