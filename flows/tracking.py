"""The link of a run to the Prefect API, which shows it. The run never waits for it, and gives it up once and for all when it fails.

Imports no Prefect: its settings are read at import, and the run's own server is started before.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

CHECK_EVERY = 5.0  # s between looks at the server
CHECK_TIMEOUT = 10.0  # s that it has to answer
MISSES = 2  # looks in a row without an answer after which it is given up

Result = TypeVar("Result")

_lost = threading.Event()
_once = threading.Lock()
_at_loss: list[Callable[[], None]] = []


def is_lost() -> bool:
    """Return True once the Prefect API was given up."""
    return _lost.is_set()


def begin() -> None:
    """Use the API again: another run of this process may have given another one up."""
    _lost.clear()


def give_up(reason: str) -> None:
    """Go on without Prefect; the first call says so on stderr."""
    with _once:
        if _lost.is_set():
            return
        _lost.set()
    print(f"e4s: the run goes on without Prefect, which shows no more of it ({reason})", file=sys.stderr)
    for action in _at_loss:
        action()


@contextmanager
def at_loss(action: Callable[[], None]) -> Iterator[None]:
    """Do something when the API is given up: our own server is killed, so that what still waits for it ends at once."""
    _at_loss.append(action)
    try:
        yield
    finally:
        _at_loss.remove(action)


@contextmanager
def server_of_others() -> Iterator[None]:
    """Work with a server that is not this run's own: giving it up ends no process, not even one that an outer context began."""
    own, _at_loss[:] = list(_at_loss), []
    try:
        yield
    finally:
        _at_loss[:] = own


@contextmanager
def watched(url: str) -> Iterator[None]:
    """Look after the server at a URL while a flow works."""
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(url, over), name="e4s-prefect", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(1.0)  # s; where the server hangs the thread ends later by itself


def _watch(url: str, over: threading.Event) -> None:
    from flows.server import answers

    misses = 0
    while not over.wait(CHECK_EVERY) and not _lost.is_set():
        misses = 0 if answers(url, CHECK_TIMEOUT) else misses + 1
        if misses == MISSES and not over.is_set():
            give_up(f"its server at {url} does not answer any more")


class Once(Generic[Result]):
    """Work that is done once, by whoever calls it first: the flow, or the command if Prefect fails before."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self._results: list[Result] = []
        self._error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return bool(self._results) or self._error is not None

    def __call__(self) -> Result:
        """Return what the work returned, or raise what it raised."""
        if not self.is_done:
            try:
                self._results.append(self._work())
            except BaseException as error:
                self._error = error
        if self._error is not None:
            raise self._error
        return self._results[0]
