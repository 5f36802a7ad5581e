"""A Dask scheduler and two workers as processes of their own, kept up as docs/cluster.md says: what ends is started again."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from distributed import Client

WORKERS = ("one", "two")
REST = 1.0  # s before what has ended is started again


class Site:
    """A scheduler and workers with their nannies."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "dask.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.address = f"tcp://127.0.0.1:{port}"
        own: tuple[str, ...] = ("--nthreads", "1", "--memory-limit", "0", "--no-dashboard", "--local-directory", str(folder / "dask"))
        self.commands: dict[str, tuple[str, ...]] = {"scheduler": ("scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")}
        self.commands |= {name: ("worker", self.address, "--name", name, *own) for name in WORKERS}
        self.running: dict[str, psutil.Popen] = {}
        self.ended: dict[str, float] = {}  # when, on the monotonic clock

    def tend(self) -> None:
        """Start what is not running, if it ended a moment ago."""
        for name, command in self.commands.items():
            process = self.running.get(name)
            if process is not None and process.poll() is None:
                continue
            if process is not None and time.monotonic() - self.ended.setdefault(name, time.monotonic()) < REST:
                continue
            self.ended.pop(name, None)
            with self.log.open("ab") as log:
                self.running[name] = psutil.Popen(
                    [sys.executable, "-m", "dask", *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )

    def busy(self) -> list[str]:
        """Names of the workers that have a chunk, as the scheduler sees it."""
        with suppress(OSError, TimeoutError), Client(self.address, timeout=5, set_as_default=False) as client:
            workers, tasks = client.scheduler_info(n_workers=-1)["workers"], client.processing()
            return [entry["name"] for address, entry in workers.items() if any(" of chunk " in key for key in tasks.get(address, ()))]
        return []

    def worker_of(self, name: str) -> psutil.Process | None:
        """The worker process below a nanny; None while there is none."""
        with suppress(psutil.Error):
            for child in self.running[name].children():
                if "--multiprocessing-fork" in child.cmdline():
                    return child
        return None

    def end(self) -> None:
        for process in self.running.values():
            below = process.children(recursive=True) if alive(process) else []
            for each in (*below, process):
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()


def alive(process: psutil.Process) -> bool:
    """Whether it runs; one that nobody has waited for yet does not."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


@contextmanager
def kept_up(folder: Path) -> Iterator[Site]:
    """A site that runs meanwhile; who uses it calls `tend`."""
    site = Site(folder)
    site.tend()
    try:
        yield site
    finally:
        site.end()
