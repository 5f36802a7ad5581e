"""The process of a run's own Prefect server: `python -P prefect_process.py PORT PARENT`.

Imports nothing of e4s and is started by its path, so that it needs no import path but that of the installed libraries.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with(parent: int) -> None:
    """End this process when its parent is gone, even if that was killed and even if this process is stopped."""
    with suppress(AttributeError, OSError):  # Linux only; elsewhere the thread does it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


def serve(port: int) -> None:
    """Serve the Prefect API on the loopback interface."""
    import uvicorn

    uvicorn.run("prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=port, log_level="error", lifespan="on")


if __name__ == "__main__":
    end_with(int(sys.argv[2]))
    serve(int(sys.argv[1]))
