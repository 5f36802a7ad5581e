"""Progress in the terminal: a bar where there is one, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn
from tqdm import tqdm

from flows.console import PlainColumn, plain_console
from flows.plan import Plan
from storage.run import Row


def duration(seconds: float) -> str:
    """Seconds -> 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def plural(number: int, noun: str) -> str:
    """1 pair, 2 pairs."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def opening(plan: Plan) -> str:
    """What is done, what is to do."""
    failed = sum(row.status == "failed" for row in plan.rows.values())
    text = f"{plural(len(plan.rows), 'pair')}: {plan.done_before} done before, {len(plan.todo)} to do"
    return text + (f", {failed} cannot be done" if failed else "")


@dataclass
class Pace:
    """How fast a count grows since it was first seen, `now` in s."""

    since: float
    first: int  # what was done then

    def __call__(self, done: float, total: int, now: float) -> tuple[float, float] | None:
        """Per minute, and s until all is done; None if nothing tells."""
        if done <= self.first or now <= self.since:
            return None
        each = (now - self.since) / (done - self.first)
        return 60 / each, each * (total - done)


class _Rate:
    """Items per second since the start, and what is left at that rate."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.failed, self.pace = total, 0, 0, Pace(time.monotonic(), 0)
        self.within = 0.0  # items' worth of work done in the running chunk

    def add(self, rows: list[Row]) -> None:
        self.done += len(rows)
        self.failed += sum(row.status == "failed" for row in rows)
        self.within = 0.0

    def __str__(self) -> str:
        """Nothing before the first pair is done: shares of it count stages, and those take from milliseconds to many seconds."""
        if not self.done:
            return ""
        found = self.pace(self.done + self.within, self.total, time.monotonic())
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{found[0]:.1f} pairs/min, {duration(found[1])} left{failed}" if found else ""


class RunProgress(Protocol):
    """What is shown of a run of pairs: in the terminal, in Prefect's UI, in the log. They wrap each other."""

    def begin(self, plan: Plan) -> None: ...
    def stage(self, chunk: int, node: str) -> None: ...
    def within(self, items: float) -> None: ...
    def advance(self, rows: list[Row]) -> None: ...
    def end(self) -> None: ...


class Lines:
    """For logs: a line on stderr per chunk, and every 10 s within one."""

    def begin(self, plan: Plan) -> None:
        self.rate = _Rate(len(plan.todo))
        self.node, self.printed = "", time.monotonic()
        print(opening(plan), file=sys.stderr, flush=True)

    def stage(self, chunk: int, node: str) -> None:
        self.node = node

    def within(self, items: float) -> None:
        self.rate.within = items
        if time.monotonic() - self.printed > 10:
            self._print(f" ({self.node})")

    def advance(self, rows: list[Row]) -> None:
        self.rate.add(rows)
        self._print("")

    def _print(self, note: str) -> None:
        self.printed = time.monotonic()
        rate = str(self.rate)
        print(f"{self.rate.done} of {self.rate.total} pairs{', ' if rate else ''}{rate}{note}", file=sys.stderr, flush=True)

    def end(self) -> None:
        pass


class Bar:
    """For people: a bar with the running stage, rate and time left."""

    def begin(self, plan: Plan) -> None:
        console = plain_console(stderr=True)
        console.print(opening(plan))
        self.rate = _Rate(len(plan.todo))
        self.bar = Progress(
            PlainColumn("{task.description:<14}"),
            BarColumn(),
            PlainColumn("{task.fields[done]} of {task.total} pairs"),
            TimeElapsedColumn(),
            PlainColumn("{task.fields[rate]}"),
            console=console,
        )
        self.task: TaskID = self.bar.add_task("", total=len(plan.todo), rate="", done=0)
        self.bar.start()

    def stage(self, chunk: int, node: str) -> None:
        self.bar.update(self.task, description=node)

    def within(self, items: float) -> None:
        self.rate.within = items
        self.bar.update(self.task, completed=self.rate.done + items, rate=str(self.rate))

    def advance(self, rows: list[Row]) -> None:
        self.rate.add(rows)
        self.bar.update(self.task, completed=self.rate.done, done=self.rate.done, rate=str(self.rate))

    def end(self) -> None:
        if hasattr(self, "bar"):
            self.bar.update(self.task, description="")
            self.bar.stop()


class NotebookBar:
    """For notebooks, whose output is no terminal: one line that is overwritten."""

    def begin(self, plan: Plan) -> None:
        self.bar = tqdm(total=len(plan.todo), unit="pair", desc="pairs")
        self.done = 0

    def stage(self, chunk: int, node: str) -> None:
        self.bar.set_postfix_str(node)

    def within(self, items: float) -> None:
        self.bar.n = round(self.done + items, 1)
        self.bar.refresh()

    def advance(self, rows: list[Row]) -> None:
        self.done += len(rows)
        self.within(0)

    def end(self) -> None:
        if hasattr(self, "bar"):
            self.bar.set_postfix_str("")
            self.bar.close()


class Silent:
    """Shows nothing."""

    def begin(self, plan: Plan) -> None: ...

    def stage(self, chunk: int, node: str) -> None: ...

    def within(self, items: float) -> None: ...

    def advance(self, rows: list[Row]) -> None: ...

    def end(self) -> None: ...


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    return "ipykernel" in sys.modules


def terminal_progress() -> Bar | NotebookBar | Lines:
    """A bar if stderr is a terminal or a notebook, else lines."""
    if in_notebook():
        return NotebookBar()
    return Bar() if sys.stderr.isatty() else Lines()


class Count(Protocol):
    """Told how many are done, of how many; `part` names what they are of, where there are several such counts after each other."""

    def __call__(self, done: int, total: int, part: str = "") -> None: ...


@contextmanager
def counted(what: str) -> Iterator[Count]:
    """Progress of a plain count: yields a function of (done, total, part); a bar on a terminal, else a line every 10 s."""
    if in_notebook():
        with tqdm(unit=f" {what}") as line:
            yield partial(_show_count, line)
        return
    if not sys.stderr.isatty():
        yield _counted_lines(what)
        return
    columns = (PlainColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), PlainColumn(what), TimeRemainingColumn())
    with Progress(*columns, console=plain_console(stderr=True)) as bar:
        task, running = bar.add_task("", total=None), ""

        def show(done: int, total: int, part: str = "") -> None:
            nonlocal running
            if part != running:
                running = part
                bar.reset(task, description=part)
            bar.update(task, completed=done, total=total)

        yield show


def _show_count(line: tqdm[NoReturn], done: int, total: int, part: str = "") -> None:
    line.total, line.n = total, done
    line.set_description_str(part, refresh=False)
    line.refresh()


def _counted_lines(what: str) -> Count:
    printed, running = time.monotonic(), ""
    pace: Pace | None = None

    def line(done: int, total: int, part: str = "") -> None:
        nonlocal printed, running, pace
        now = time.monotonic()
        if pace is None or part != running:
            running, pace = part, Pace(now, done)
        if now - printed > 10:
            printed, found = now, pace(done, total, now)
            rate = f", {found[0]:.1f}/min, {duration(found[1])} left" if found else ""
            print(f"{f'{part}: ' if part else ''}{done} of {total} {what}{rate}", file=sys.stderr, flush=True)

    return line
