"""Named points at which a test can kill the process, to prove that nothing finished is lost."""

from __future__ import annotations

import os
import signal


def fault_point(name: str) -> None:
    """Kill this process (SIGKILL) where the environment asks for it: `E4S_FAULT=name` or `E4S_FAULT=name:3` (third passage)."""
    wanted = os.environ.get("E4S_FAULT")
    if wanted is None:
        return
    point, _, count = wanted.partition(":")
    if point != name:
        return
    _passages[name] = _passages.get(name, 0) + 1
    if _passages[name] >= int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)


_passages: dict[str, int] = {}
