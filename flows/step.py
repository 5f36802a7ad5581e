"""A piece of work as a Prefect task, which the UI shows. Skip and resume are the store's business: Prefect caches and persists nothing."""

from __future__ import annotations

from collections.abc import Callable

from prefect import task
from prefect.cache_policies import NO_CACHE


def run_step(name: str, title: str, work: Callable[[], None]) -> None:
    """Run the work as task `name`, task run `title`. Its exceptions leave as they are; so does Ctrl-C, whenever it came."""

    @task(name=name, task_run_name=title, cache_policy=NO_CACHE, persist_result=False)
    def step() -> None:
        work()

    try:
        step()
    except Exception as error:
        if _interrupted(error):
            raise KeyboardInterrupt from None
        raise


def _interrupted(error: BaseException | None) -> bool:
    """Whether this error came of an interrupt: Prefect answers one that comes while it makes the task run with a ValueError."""
    while error and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
