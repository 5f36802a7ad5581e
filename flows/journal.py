"""What a run writes into its log beside results, so that `e4s status` can show it live."""

from __future__ import annotations

from collections import Counter

from flows.plan import Plan
from flows.progress import RunProgress
from flows.why import works_left
from storage.run import RunFolder


class Logged:
    """Writes what there is to do and which stage each chunk enters; hands everything on to the display."""

    def __init__(self, display: RunProgress, folder: RunFolder) -> None:
        self._display, self._folder = display, folder
        self.within, self.advance, self.end = display.within, display.advance, display.end

    def begin(self, plan: Plan) -> None:
        self._display.begin(plan)
        self._folder.append_log(
            "begin",
            items=len(plan.rows),
            todo=len(plan.todo),
            done=plan.done_before,
            failed=sum(row.status == "failed" for row in plan.rows.values()),
            chunk=plan.request.chunk,
            stages=Counter(work.node for _, _, work in works_left(plan)),
            planning_seconds=round(plan.seconds, 3),
        )

    def stage(self, chunk: int, node: str) -> None:
        self._folder.append_log("start", chunk=chunk, stage=node)
        self._display.stage(chunk, node)
