"""Steps of videos and the hands that do them: this process, one step after the other (`Here`), or Dask workers (`flows.video_cluster`)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from flows.engine import use_threads
from flows.video_plan import VideoPlan
from flows.video_units import Desk, ProgramError, Tables, Unit, UnitResult, outcome_of

if TYPE_CHECKING:
    from flows.video_engine import Video

VideoCall = Callable[[str, str, Callable[[], None]], None]
"""Runs one pass on one part of a video: (id and part, name of the pass, the work). A flow hangs its task policy here."""


def direct_call(part: str, name: str, work: Callable[[], None]) -> None:
    """Run the work on the spot."""
    work()


@dataclass(eq=False)
class Step:
    """A unit that some process carries, or a piece of work of this one, which writes the run folder."""

    video: Video
    name: str
    part: str
    unit: Unit | None = None
    work: Callable[[], None] | None = None
    result: UnitResult = field(default_factory=UnitResult)

    @property
    def keys(self) -> Collection[str]:
        return self.unit.keys if self.unit else ()

    @property
    def frames(self) -> int:
        return self.unit.frames if self.unit else 0

    def carry_here(self, where: str) -> UnitResult:
        """Do a piece of work of this process."""
        work = self.work
        assert work is not None
        return outcome_of(self.name, where, lambda result: work())

    def visibly(self, call: VideoCall, carry: Callable[[], UnitResult]) -> None:
        """Have it carried through `call`, which sees an exception only where a program error stopped it."""

        def task() -> None:
            self.result = carry()
            if self.result.crash:
                raise ProgramError(self.result.crash)

        try:
            call(self.part, self.name, task)
        except ProgramError:
            if not self.result.crash:
                raise


class Told(Protocol):
    """What hears of steps that are under way."""

    def within(self, number: int, share: float) -> None:
        """A share of the unit with that number is done."""
        ...

    def uses(self, keys: Collection[str]) -> None:
        """The run uses artifacts with these keys."""
        ...


class Hands(Protocol):
    """Who does steps."""

    def room(self, step: Step | None) -> bool:
        """Whether a step (None: some unit) would be begun now."""
        ...

    def give(self, step: Step) -> None: ...

    def take(self) -> Step | None:
        """A step that was given and is done now; None if there is none for a moment. May raise UsageError, DiskFull or StoreError."""
        ...

    def close(self) -> None:
        """Stop what is still running, quickly; what was made is kept."""
        ...


class Here:
    """This process, one step after the other."""

    def __init__(self, plan: VideoPlan, tables: Tables, call: VideoCall, told: Told) -> None:
        use_threads(plan.request.compute_threads())
        self._call, self._told, self._where = call, told, plan.store.url
        request = plan.request
        at_once = request.workers or request.compute_threads()
        self._desk = Desk(plan, tables, keep=request.keep, chunk=request.chunk, max_pixels=request.max_pixels, at_once=at_once)
        self._given: Step | None = None

    def room(self, step: Step | None) -> bool:
        return self._given is None

    def give(self, step: Step) -> None:
        self._given = step

    def take(self) -> Step | None:
        step, self._given = self._given, None
        assert step is not None
        unit = step.unit
        step.visibly(
            self._call,
            lambda: self._desk.carry(unit, _Notes(self._told, unit.number)) if unit else step.carry_here(self._where),
        )
        return step

    def close(self) -> None:
        self._desk.close()


class _Notes:
    """What a unit in this process tells."""

    worker = ""

    def __init__(self, told: Told, number: int) -> None:
        self._told, self._number = told, number
        self.uses = told.uses

    def within(self, share: float) -> None:
        self._told.within(self._number, share)
