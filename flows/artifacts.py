"""What the Prefect UI shows of a run beside its tasks: progress after each chunk, and the failed pairs as a table."""

from __future__ import annotations

import re
import time
from uuid import UUID

from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact

from flows.plan import Plan
from flows.progress import RunProgress
from flows.tracking import give_up, is_lost
from storage.run import Row

UPDATE_EVERY = 2.0  # s at least between updates: each takes some 40 ms
TABLE_ROWS = 1000  # failed pairs that the table names; the manifest has all


class Shown:
    """Keeps the run's progress artifact up to date; hands everything on to the display. To be used inside the flow."""

    def __init__(self, display: RunProgress) -> None:
        self._display = display
        self.stage, self.within, self.end = display.stage, display.within, display.end
        self._artifact: UUID | None = None
        self._updated = 0.0

    def begin(self, plan: Plan) -> None:
        self._display.begin(plan)
        self._all, self._through, self._failed = len(plan.todo), 0, 0
        self._name = re.sub(r"[^a-z0-9]+", "-", plan.folder.path.name.lower()).strip("-") or "run"
        if is_lost():
            return
        try:
            made = create_progress_artifact(0.0, f"pairs-{self._name}", self._describe())
            self._artifact = made if isinstance(made, UUID) else None  # never a coroutine in a flow that is not async
        except Exception as error:  # what the UI shows is no reason to stop
            give_up(f"{type(error).__name__}: {error}")

    def advance(self, rows: list[Row]) -> None:
        self._display.advance(rows)
        self._through += len(rows)
        self._failed += sum(row.status == "failed" for row in rows)
        if time.monotonic() - self._updated > UPDATE_EVERY or self._through >= self._all:
            self._updated = time.monotonic()
            self._update()

    def conclude(self, plan: Plan) -> None:
        """The last state, and a table of the failed pairs if there are any."""
        self._update()
        failed = [row for row in plan.rows.values() if row.status == "failed"]
        if not failed or self._artifact is None or is_lost():
            return
        table = [
            {"pair": row.id, "stage": row.stage, "reason": row.reason, "attempts": row.attempts, "quarantined": row.quarantined}
            for row in failed[:TABLE_ROWS]
        ]
        more = f"; the first {TABLE_ROWS} are shown" if len(failed) > TABLE_ROWS else ""
        try:
            create_table_artifact(table, f"failed-{self._name}", f"{len(failed)} failed pairs of {plan.folder.path}{more}")
        except Exception as error:
            give_up(f"{type(error).__name__}: {error}")

    def _update(self) -> None:
        if self._artifact is None or is_lost():
            return
        try:
            update_progress_artifact(self._artifact, 100.0 * self._through / max(self._all, 1), self._describe())
        except Exception as error:
            give_up(f"{type(error).__name__}: {error}")

    def _describe(self) -> str:
        return f"{self._name}: {self._through} of {self._all} pairs" + (f", {self._failed} failed" if self._failed else "")
