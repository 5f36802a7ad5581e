"""A Dask scheduler and workers as separate processes, started as docs/cluster.md says."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distributed import Client

ROOT = Path(__file__).parents[2]


class Processes:
    """A scheduler and workers as separate processes, ended with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, list[subprocess.Popen[bytes]]()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"

    def scheduler(self) -> subprocess.Popen[bytes]:
        return self._start("scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard")

    def worker(self, name: str, *more: str, **environment: str) -> subprocess.Popen[bytes]:
        options = ("--name", name, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(self.folder))
        return self._start("worker", self.address, *options, *more, **environment)

    def _start(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with (self.folder / "dask.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *command],
                env={**os.environ, "PYTHONPATH": python_path, **environment},
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def wait_for(self, workers: int) -> None:
        with Client(self.address, timeout=60, set_as_default=False) as client:
            if workers:
                client.wait_for_workers(workers, timeout=60)

    def ready(self, name: str) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
        """A running scheduler and one worker, those of an earlier test if they still run."""
        alive = [process for process in self.started if process.poll() is None]
        scheduler = next((process for process in alive if "scheduler" in process.args), None) or self.scheduler()
        worker = next((process for process in alive if "worker" in process.args), None) or self.worker(name)
        self.wait_for(1)
        return scheduler, worker

    def end(self) -> None:
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def processes(folder: Path) -> Iterator[Processes]:
    started = Processes(folder)
    try:
        yield started
    finally:
        started.end()
