"""`e4s status`: how a run stands."""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flows.attempts import history
from flows.console import plain_console
from flows.plan import open_store
from flows.progress import Pace, duration, plural
from flows.stages import PAIR_NODES
from storage.run import BaseRow, read_lines
from storage.video_run import open_run

FOLLOW_EVERY = 1.0  # s between looks at a run

_TAKEN = ("begin", "start", "pass", "stage", "failed", "chunk", "end")  # events that say how a run stands
_NODES = tuple(node.name for node in PAIR_NODES)
_ORDER = ("probe", "sound", "source", *(f"{node} (source)" for node in _NODES), "detect", "track", *_NODES, "segment", "join", "remux")
"""Rows of the table as items and videos go through them."""


@dataclass
class StageState:
    """One node or pass in one run. Items are what it works on: pictures, pairs, frames; stretches of a video for `detect` and `segment`."""

    done: int = 0  # computed, by all commands on this run folder together
    seconds: float = 0.0  # compute of these
    failed: int = 0  # items that failed in it since the last command began
    left: int | None = None  # of what the last command had to do; None: not known beforehand
    running: int = 0  # items of the chunks that are in it


@dataclass
class PassState:
    """How far a video is in one pass."""

    item: str
    stage: str
    frames: int
    of: int
    last: float  # s since the epoch, when that was said
    pace: Pace


@dataclass
class RunState:
    """How a run stands, from the events of log.jsonl; feed it with more as they come."""

    items: int = 0
    done: int = 0
    failed: int = 0
    began: float = 0.0  # s since the epoch, the last command
    last: float = 0.0  # the last event
    finished: int = 0  # items that went through since then
    ended: bool = False
    stages: dict[str, StageState] = field(default_factory=dict)
    chunk: int = 0  # items in one
    _where: dict[int, str] = field(default_factory=dict)  # chunk -> the stage it is in
    _passes: dict[int, PassState] = field(default_factory=dict)  # video (its chunk number) -> the pass it is in

    @property
    def left(self) -> int:
        return self.items - self.done - self.failed

    def feed(self, events: Iterable[Mapping[str, Any]]) -> None:
        for event in events:
            self.last = event["time"]
            if event["event"] in _TAKEN:
                getattr(self, f"_{event['event']}")(event)
        for state in self.stages.values():
            state.running = 0
        for stage in self._where.values():
            self._stage_of(stage).running += self.chunk

    def seconds_left(self, now: float) -> float | None:
        """Until all is done, at the rate since the last command began; None if nothing tells."""
        return (now - self.began) / self.finished * self.left if self.finished and not self.ended else None

    def passing(self, now: float) -> str:
        """How far the earliest video under way is in its pass, how fast, and what is left of it; "" if there is none."""
        for _, found in sorted(self._passes.items()):
            if found.frames < found.of:
                said = f"{found.item}, {found.stage}: {found.frames} of {plural(found.of, 'frame')}"
                if pace := found.pace(found.frames, found.of, found.last):
                    left = max(0.0, pace[1] - (now - found.last))
                    said += f", {pace[0]:.1f} frames/min, about {duration(left)} left of this pass"
                return said
        return ""

    def _stage_of(self, name: str) -> StageState:
        return self.stages.setdefault(name, StageState())

    def _begin(self, event: Mapping[str, Any]) -> None:
        self.items, self.done, self.failed = event["items"], event.get("done", 0), event.get("failed", 0)
        self.began, self.finished, self.ended, self.chunk = event["time"], 0, False, min(event.get("chunk", 0), event["todo"])
        self._where.clear()
        self._passes.clear()
        for state in self.stages.values():
            state.failed, state.left = 0, 0 if "stages" in event else None
        for name, works in event.get("stages", {}).items():
            self._stage_of(name).left = works

    def _start(self, event: Mapping[str, Any]) -> None:
        self._where[event["chunk"]] = event["stage"]

    def _pass(self, event: Mapping[str, Any]) -> None:
        item, stage, frames, time_ = (event[name] for name in ("item", "stage", "frames", "time"))
        known = self._passes.get(event["chunk"])
        pace = known.pace if known and known.stage == stage else Pace(time_, frames)
        self._passes[event["chunk"]] = PassState(item, stage, frames, event["of"], time_, pace)

    def _stage(self, event: Mapping[str, Any]) -> None:
        state = self._stage_of(self._row(event))
        state.done += event["items"]
        state.seconds += event["seconds"]
        if state.left is not None:
            state.left = max(0, state.left - event["items"])

    def _failed(self, event: Mapping[str, Any]) -> None:
        self._stage_of(self._row(event)).failed += 1

    def _row(self, event: Mapping[str, Any]) -> str:
        """A video's source goes through stages that its frames go through, too; it has rows of its own."""
        of_source = self._where.get(event.get("chunk", -1)) == "source" and event["stage"] in _NODES
        return f"{event['stage']} (source)" if of_source else str(event["stage"])

    def _chunk(self, event: Mapping[str, Any]) -> None:
        self._where.pop(event["chunk"], None)
        self._passes.pop(event["chunk"], None)
        self.done += event["done"]
        self.failed += event["failed"]
        self.finished += event["done"] + event["failed"]

    def _end(self, event: Mapping[str, Any]) -> None:
        self._where.clear()
        self._passes.clear()
        self.done, self.failed, self.ended = event["done"], event["failed"], True


def print_status(run: str) -> int:
    """Counts, stages, rate and failures by reason; 2 if items failed or are left."""
    folder = open_run(run)
    settings = folder.read_settings()
    rows = folder.read_rows()
    counts = Counter(row.status for row in rows)
    state = RunState()
    state.feed(folder.read_log())
    console = plain_console(soft_wrap=True)
    holder = folder.holder()
    if holder and not state.ended and state.items:  # the manifest lags behind
        counts = Counter(done=state.done, failed=state.failed, left=state.left)
    quarantined = sum(row.quarantined for row in rows)
    console.print(
        f"{folder.path}: {plural(len(rows), folder.noun)}: {counts['done']} done, {counts['failed']} failed, {counts['left']} left"
        + (f"; {quarantined} of the failed are quarantined" if quarantined else "")
    )
    console.print(
        f"profile {settings.get('request', {}).get('profile', 'unknown')}, device {settings.get('device', 'unknown')}, "
        f"store {open_store(folder, settings.get('store', '')).url}"
    )
    if state.stages:
        console.print(_table(state))
    if counts["left"]:
        console.print(_outlook(state, holder, time.time(), folder.noun))
    for (stage, reason), count in Counter((row.stage, row.reason) for row in rows if row.status == "failed").most_common():
        console.print(f"{count} failed in {stage}: {reason}")
    for kind, count in limits(rows).most_common():
        console.print(f"{count} noted: {kind}")
    return 2 if counts["failed"] or counts["left"] else 0


def limits(rows: Iterable[BaseRow]) -> Counter[str]:
    """Count the notes of rows by kind: notes that differ in their numbers alone are of one kind."""
    notes = (note for row in rows for note in getattr(row, "note", "").split("; ") if note)
    return Counter(re.sub(r"\b\d+\b", "N", note) for note in notes)


def print_failed(run: str) -> int:
    """Every failed pair with the history of its attempts, by reason, the commonest first; 2 if there is one."""
    folder = open_run(run)
    folder.read_settings()
    failed = [row for row in folder.read_rows() if row.status == "failed"]
    past, groups = history(folder), defaultdict[tuple[str, str], list[BaseRow]](list)
    for row in failed:
        groups[row.stage, row.reason].append(row)
    for (stage, reason), rows in sorted(groups.items(), key=lambda group: -len(group[1])):
        print(f"{plural(len(rows), folder.noun)} failed in {stage}: {reason}")
        for row in rows:
            name = f"    {row.id}" + (" (quarantined)" if row.quarantined else "")
            attempts = [line.removesuffix(f": {stage}: {reason}") for line in past.get(row.id, ())]
            print("  ".join([name, *attempts]) if len(attempts) < 2 else "\n        ".join([name, *attempts]))
    tried = [row for row in failed if row.key]
    again = [word for word in ("failed", "quarantined") if any(row.quarantined == (word == "quarantined") for row in tried)]
    remedies = [f"--retry {word} tries the {word} again" for word in again]
    if len(tried) < len(failed):
        remedies.append("what cannot be read is looked at on every rerun")
    print("; ".join([plural(len(failed), f"failed {folder.noun}"), *([", ".join(remedies)] if remedies else [])]))
    return 2 if failed else 0


def tries(row: BaseRow) -> str:
    """What a failed row's attempts mean, to be put behind its reason."""
    if row.quarantined:
        return f" (quarantined after {plural(row.attempts, 'attempt')}; --retry quarantined tries it again)"
    return f" ({row.attempts} attempts)" if row.attempts > 1 else ""


def follow(run: str) -> int:
    """Show a run as it goes on, until its process ends; exit code as `print_status`, or 130 for Ctrl-C. Reads only."""
    folder = open_run(run)
    folder.read_settings()
    state, at = RunState(), 0
    console = plain_console()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            holder = folder.holder()
            events, at = read_lines(folder.log, at)
            state.feed(events)
            counts = f"{folder.path}: {plural(state.items, folder.noun)}: {state.done} done, {state.failed} failed, {state.left} left"
            live.update(Group(Text(counts), _table(state), Text(_outlook(state, holder, time.time(), folder.noun))), refresh=True)
            if not holder or state.ended:
                break
            time.sleep(FOLLOW_EVERY)
    if not console.is_terminal:
        print()  # what is not redrawn has no last line end
    return 2 if state.failed or state.left else 0


def _table(state: RunState) -> Table:
    table = Table("stage", "done", "running", "failed", "left", "seconds", "per item")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in dict.fromkeys((*_ORDER, *state.stages)):
        stage = state.stages.get(name)
        if stage and (stage.done or stage.running or stage.failed or stage.left):
            each = f"{stage.seconds / stage.done:.3f}" if stage.done else ""
            left = "" if stage.left is None else str(stage.left)
            table.add_row(name, *map(str, (stage.done, stage.running, stage.failed)), left, f"{stage.seconds:.1f}", each)
    return table


def _outlook(state: RunState, holder: str, now: float, noun: str) -> str:
    if state.ended:
        return "ended" if not state.left else "ended before all was done; the same command continues"
    if not holder:
        return "no process is working on it; the same command continues"
    rate = f"{state.finished / max(now - state.began, 1e-3) * 60:.1f} {noun}s/min, " if state.finished else ""
    left = state.seconds_left(now)
    eta = f"about {duration(left)} left" if left is not None else "time left not known yet"
    whole = f"{holder}: {rate}{eta}; last event {duration(max(0.0, now - state.last))} ago"
    return "\n".join(filter(None, (whole, state.passing(now))))
