"""Environment variables of this process and of those that it starts, changed for a while."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

Changes = Mapping[str, str | None]
"""Environment variables to set, or to remove (None)."""

SAFE_PATH: Changes = {"PYTHONSAFEPATH": "1"}
"""Python processes do not import from the current folder, where a user's own `tasks.py` or `queue.py` may lie."""


@contextmanager
def changed_environment(changes: Changes) -> Iterator[None]:
    """Change environment variables for a while."""
    before = {name: os.environ.get(name) for name in changes}
    _apply(changes)
    try:
        yield
    finally:
        _apply(before)


def _apply(changes: Changes) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def direct() -> Changes:
    """Return the environment in which the loopback interface is reached directly.

    A SOCKS proxy is removed: where the environment names one, httpx (Prefect's client) does not even start without a further package, and
    nothing else of a run uses it.
    """
    changes: dict[str, str | None] = {}
    for name in ("no_proxy", "NO_PROXY"):
        changes[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1", "localhost", "::1")))
    for name, value in os.environ.items():
        if name.lower() in ("all_proxy", "http_proxy", "https_proxy") and value.lower().startswith("socks"):
            changes[name] = None
    return changes
