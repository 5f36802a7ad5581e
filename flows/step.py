"""Work as Prefect flows and tasks, which the UI shows. Skip and resume are the store's business: Prefect caches and persists nothing.

The work comes first: where the Prefect API fails, it goes on without (`flows/tracking.py`).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.events.clients import PrefectEventsClient
from prefect.events.schemas.events import Event
from prefect.events.worker import EventsWorker
from prefect.exceptions import PrefectSignal, TerminationSignal
from prefect.settings import PREFECT_API_URL

from flows.tracking import Once, begin, give_up, is_lost, watched

SEND_TIMEOUT = 20.0  # s for one event
CLOSE_TIMEOUT = 2.0  # s for closing the connection
DRAIN_TIMEOUT = 10.0  # s for the events of a flow that has ended

Result = TypeVar("Result")


def run_as_prefect_task(name: str, subject: str, work: Callable[[], None]) -> None:
    """Run one step of a job as a Prefect task: the task hook of the flows."""
    run_step(name, f"{name} of {subject}", work)


def run_step(name: str, title: str, work: Callable[[], None]) -> None:
    """Run the work as task `name`, task run `title`. Its exceptions leave as they are; so does Ctrl-C, whenever it came."""
    if is_lost():
        work()
        return
    once = Once(work)

    @task(name=name, task_run_name=title, cache_policy=NO_CACHE, persist_result=False)
    def step() -> None:
        once()

    try:
        step()
    except Exception as error:
        if is_interruption(error):
            raise KeyboardInterrupt from None
        if not once.is_done:
            give_up(f"{type(error).__name__}: {error}")
        once()


def run_flow(flow: Callable[[], Any], once: Once[Result]) -> Result:
    """Run a flow whose body calls `once`; returns or raises what that did, whatever becomes of the flow at the Prefect API."""
    if is_lost():
        return once()
    _bound_events()
    try:
        try:
            flow()
        except (Exception, PrefectSignal) as error:  # a signal: somebody cancelled or paused the flow run in the UI
            if is_interruption(error):
                raise KeyboardInterrupt from None
            if not once.is_done:
                give_up(f"{type(error).__name__}: {error}")
        return once()
    except TerminationSignal:  # Prefect's name for SIGTERM within a flow
        raise KeyboardInterrupt from None
    finally:
        _drain()


def is_interruption(error: BaseException | None) -> bool:
    """Whether this error came of an interrupt: Prefect answers one that comes while it makes the task run with a ValueError."""
    while error and not isinstance(error, KeyboardInterrupt | TerminationSignal):
        error = error.__cause__ or error.__context__
    return error is not None


@contextmanager
def tracked() -> Iterator[None]:
    """Body of a flow: what it does is sent to the API as long as that answers."""
    begin()
    _bound_events()
    with watched(str(PREFECT_API_URL.value())):
        yield


def _drain() -> None:
    """Send what is queued, or give up: at the interpreter's end Prefect waits for it without a limit."""
    emptied = threading.Thread(target=EventsWorker.drain_all, kwargs={"at_exit": False}, daemon=True)
    emptied.start()
    emptied.join(DRAIN_TIMEOUT)
    if emptied.is_alive():
        give_up("its last events cannot be sent")


@functools.cache
def _bound_events() -> None:
    """Have Prefect's sending of events work in bounded time, in this process from now on.

    As it is, it tries for 7 s to send each queued event to a dead server, and the interpreter does not end before. The first event that
    cannot be sent gives the API up, and all later ones are dropped.
    """
    logging.getLogger(EventsWorker.__name__).setLevel(logging.CRITICAL)  # what matters to the user is said here, once
    attach = EventsWorker.attach_related_resources_from_context
    enter, emit, leave = PrefectEventsClient.__aenter__, PrefectEventsClient.emit, PrefectEventsClient.__aexit__

    async def bounded_attach(self: EventsWorker, event: Event) -> None:
        if not is_lost():
            await _try(attach(self, event))

    async def bounded_enter(self: PrefectEventsClient) -> PrefectEventsClient:
        await _try(enter(self))
        return self

    async def bounded_emit(self: PrefectEventsClient, event: Event) -> None:
        if not is_lost():
            await _try(emit(self, event))

    async def bounded_leave(self: PrefectEventsClient, *exception: Any) -> None:
        with suppress(Exception):
            await asyncio.wait_for(leave(self, *exception), CLOSE_TIMEOUT)

    for owner, name, method in (
        (EventsWorker, "attach_related_resources_from_context", bounded_attach),
        (PrefectEventsClient, "__aenter__", bounded_enter),
        (PrefectEventsClient, "emit", bounded_emit),
        (PrefectEventsClient, "__aexit__", bounded_leave),
    ):
        setattr(owner, name, method)


async def _try(sending: Coroutine[Any, Any, Any]) -> None:
    try:
        await asyncio.wait_for(sending, SEND_TIMEOUT)
    except Exception as error:
        give_up(f"its events cannot be sent: {type(error).__name__}")
