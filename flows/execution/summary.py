"""How a run stands after its jobs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from storage.run import BaseRow, RunFiles
from tasks.runner import JobResult


@dataclass
class Summary:
    """How a run stands after working through its plan."""

    done: int
    failed: int
    left: int
    computed: dict[str, int] = field(default_factory=dict)  # stage executions by node
    crash: str = ""  # traceback of a program error that ended the run: no item's fault

    def add(self, result: JobResult) -> None:
        """Count the stage executions of a job."""
        for node, executions in result.computed.items():
            self.computed[node] = self.computed.get(node, 0) + executions

    def conclude(self, folder: RunFiles[Any], rows: Iterable[BaseRow]) -> None:
        """Count the rows as they are now, and say so in the log."""
        count = [row.status for row in rows].count
        self.done, self.failed, self.left = count("done"), count("failed"), count("left")
        folder.append_log("end", done=self.done, failed=self.failed, left=self.left)

    @property
    def exit_code(self) -> int:
        """Return 0 if all is done, 1 after a program error, 2 if some items failed."""
        return 1 if self.crash or self.left else 2 if self.failed else 0
