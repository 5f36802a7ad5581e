"""Failed attempts of a run's items: counted per item and key, kept with their reasons, and who failed too often is quarantined.

`attempts.jsonl` in the run folder holds a line per failed attempt (time, item, key, attempt, stage, reason) and a line where an item was
released from quarantine. The key is that of the result that was wanted: with another setting or another picture counting starts anew.
An input that cannot be read has no key: nothing is tried and nothing counted. It is looked at on every rerun, since that costs nothing; a
line says the reason whenever that is another one.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from storage.run import BaseRow, RunFiles, append_lines, read_lines


class Attempts:
    """The attempts of one run; `limit` failed ones put an item into quarantine. With `dry` nothing is written."""

    def __init__(self, folder: RunFiles[Any], limit: int, dry: bool = False) -> None:
        self.folder, self.limit, self.dry = folder, limit, dry
        self._count: dict[tuple[str, str], int] = {}
        self._last: dict[tuple[str, str], tuple[str, str]] = {}
        for line in read_lines(folder.attempts)[0]:
            slot = str(line.get("item")), str(line.get("key") or "")
            self._count[slot] = 0 if line.get("event") == "released" else int(line.get("attempt") or 0)
            self._last[slot] = str(line.get("stage")), str(line.get("reason"))

    def look_up(self, row: BaseRow) -> None:
        """Write into the row how often it failed, and whether that is too often; if so, with the last time's stage and reason."""
        slot = row.id, row.key
        row.attempts = self._count.get(slot, 0) if row.key else 0
        row.quarantined = row.attempts >= self.limit
        if row.quarantined:
            row.status, (row.stage, row.reason) = "failed", self._last[slot]

    def add(self, rows: Iterable[BaseRow]) -> None:
        """Note that these rows, which say stage and reason, failed once more."""
        lines = []
        for row in rows:
            slot = row.id, row.key
            row.attempts = self._count[slot] = self._count.get(slot, 0) + 1
            row.quarantined = row.attempts >= self.limit
            self._last[slot] = row.stage, row.reason
            lines.append(_line(row, "failed", attempt=row.attempts, stage=row.stage, reason=row.reason))
        self._write(lines)

    def unreadable(self, rows: Iterable[BaseRow]) -> None:
        """Note rows whose inputs cannot be read, each once for a reason."""
        lines = []
        for row in rows:
            slot, last = (row.id, ""), (row.stage, row.reason)
            if self._last.get(slot) != last:
                self._last[slot] = last
                lines.append(_line(row, "unreadable", stage=row.stage, reason=row.reason))
        self._write(lines)

    def release(self, rows: Iterable[BaseRow]) -> None:
        """Let quarantined rows be tried again; their history stays."""
        lines = []
        for row in rows:
            self._count[row.id, row.key] = row.attempts = 0
            row.quarantined, row.status, row.stage, row.reason = False, "left", "", ""
            lines.append(_line(row, "released"))
        self._write(lines)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if lines and not self.dry:
            append_lines(self.folder.attempts, lines)


def history(folder: RunFiles[Any]) -> dict[str, list[str]]:
    """Item -> a line per failed attempt, release and reason not to try, in order: time, stage and reason."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in read_lines(folder.attempts)[0]:
        when = datetime.fromtimestamp(float(line.get("time") or 0), UTC).isoformat(" ", "seconds").removesuffix("+00:00")
        what = {"released": "released", "unreadable": "not tried"}.get(str(line.get("event")), f"attempt {line.get('attempt')}")
        why = "" if what == "released" else f": {line.get('stage')}: {line.get('reason')}"
        found[str(line.get("item"))].append(f"{when} UTC  {what}{why}")
    return found


def _line(row: BaseRow, event: str, **fields: Any) -> dict[str, Any]:
    return {"time": round(time.time(), 3), "event": event, "item": row.id, "key": row.key, **fields}
