"""Dask workers of a run: an existing scheduler (`--dask tcp://...`) or processes of our own (`--dask local:N`).

Why placement and retries are not left to Dask: the planning process sends every payload to one worker itself, so that it knows
which worker had it when one is lost. Then the store is asked what that worker finished, and only the rest is sent elsewhere;
Dask's own retries would compute all of it again, and its `allowed-failures` counts losses per task, not per chunk
(tests/flows/test_cluster.py, benchmarks.soak_cluster). Dask carries small things only (jobs, keys, results, events); values go
through a worker's memory within a job and through the store between two. Jobs for the GPU go to workers that offer the Dask
resource GPU, the rest to those without it (to any, if all have one).

Runs in the planning process: a thread per job that waits for its worker, a thread that follows the cluster (`_watch`), Dask's own
event loop, and the main thread, which reads messages (`poll`). `_changed` guards what they share. `close` leaves no thread and no
job behind; what jobs finished is in the store.
"""

from __future__ import annotations

import contextvars
import ipaddress
import logging
import math
import os
import pickle
import queue
import signal
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import resource_tracker
from typing import Any, Literal, Protocol, TypeVar, cast
from urllib.parse import urlsplit

from distributed import Client, Nanny, Scheduler, Security, SpecCluster, Worker
from distributed.http.routing import RoutingApplication
from tornado.httpserver import HTTPServer

from flows.environment import SAFE_PATH, changed_environment
from flows.execution.dask_worker import (
    IncompatibleWorkerError,
    RunContext,
    event_topic,
    handshake_worker,
    pickle_call,
    request_stop,
    run_job,
    source_digest,
)
from flows.execution.jobs import JobCrashError, JobRequirements
from storage.run import RunFiles
from storage.runs import PROBES
from storage.store import Store, StoreError
from tasks.graph import Graph, UsageError
from tasks.runner import DiskFull, JobResult

MAX_WORKER_LOSSES = 3  # workers that one job may lose before it counts as stopped by a program error
POLL_EVERY = 0.5  # s between two looks at the cluster's workers
GPU = {"GPU": 1}

AnyPayload = TypeVar("AnyPayload")

Message = tuple[Literal["done", "event"], Any]
"""What a job came to, or an event of a running one."""


class ClusterError(UsageError):
    """The cluster cannot do the work: one sentence with the remedy. Nothing finished is lost."""


class _Stopped(Exception):
    """The run is being closed."""


@dataclass
class WorkerInfo:
    """A worker process as the run sees it."""

    address: str
    name: str
    gpu: bool
    state: str = "new"  # new, fits, refused
    jobs: int = 0  # that it was given and has not returned
    check: Any = field(default=None, repr=False)  # the future of its handshake


class ClusterRequest(Protocol):
    """What is asked for of the cluster; see `flows.plan.BaseRequest`."""

    @property
    def dask(self) -> str: ...
    @property
    def dask_wait(self) -> float: ...
    @property
    def processes(self) -> int: ...
    @property
    def workers(self) -> int: ...
    def compute_threads(self) -> int: ...
    def instructions(self) -> str: ...


class WorkerPool:
    """Workers that fit a run, and the threads of this process that wait for them."""

    def __init__(self, context: RunContext, request: ClusterRequest, store: Store, folder: RunFiles[Any], jobs_ahead: int) -> None:
        """Connect to the scheduler. A worker is given up to `jobs_ahead` jobs at a time; all but one wait there. Raises ClusterError."""
        self._context, self._store, self._folder, self._jobs_ahead = context, store, folder, jobs_ahead
        self._wait = request.dask_wait
        self._messages: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards what follows
        self._workers: dict[str, WorkerInfo] = {}
        self._epoch = 0  # raised whenever the connection to the scheduler was lost: futures of before are void
        self._polls = 0  # at the cluster
        self._problem: ClusterError | None = None
        self._closing = False
        self._losses: dict[object, int] = defaultdict(int)
        self._threads = ThreadPoolExecutor(512, "e4s-crew")  # a thread waits for each running job
        for name in ("distributed", "distributed.client"):  # what matters to the user is said here, once
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._own = LocalDaskCluster(request.processes, context.settings.device) if request.processes else None
        self._address = self._own.cluster.scheduler_address if self._own else request.dask
        self._security = self._own.security if self._own else None  # None: as Dask is configured
        if is_open_to_others(self._address):
            print(
                f"e4s: {self._address} is neither encrypted nor protected: whoever reaches it can run programs on its workers; "
                "use tls:// (docs/cluster.md) unless the network is private",
                file=sys.stderr,
            )
        self._probe(write=True)
        try:
            self._client = self._connect(time.monotonic() + self._wait)
        except BaseException:
            self._finish()
            raise
        self._scheduler = ""
        self._watcher = threading.Thread(target=self._watch, name="e4s-cluster", daemon=True)
        self._watcher.start()

    # -- jobs ------------------------------------------------------------------------------------------------------------------------

    def capacity(self) -> int:
        """Return how many jobs the workers take at a time, as many as there are now."""
        with self._changed:
            return self._jobs_ahead * max(1, sum(worker.state == "fits" for worker in self._workers.values()))

    def start(self, work: Callable[[], Any]) -> None:
        """Run something in a thread of its own, which may `send` payloads to workers; `poll` returns what it returned."""
        self._threads.submit(contextvars.copy_context().run, self._through, work)

    def emit(self, event: Mapping[str, Any]) -> None:
        """Have `poll` return an event of a running job, as if a worker had sent it."""
        self._messages.put(("event", event))

    def poll(self) -> Message | None:
        """Return an event of a worker, or what a started job returned; None if there is nothing for a moment.

        Raises what a job raised, and ClusterError if the scheduler stays away.
        """
        try:
            kind, message = self._messages.get(timeout=POLL_EVERY)
        except queue.Empty:
            return None
        if kind == "problem":
            raise message
        return ("done", message) if kind == "done" else ("event", message)

    def _through(self, work: Callable[[], Any]) -> None:
        try:
            self._messages.put(("done", work()))
        except _Stopped:
            pass
        except BaseException as error:
            self._messages.put(("problem", error))

    def send(self, wanted: JobRequirements, payload: AnyPayload, for_retry: Callable[[AnyPayload], AnyPayload], owner: object) -> JobResult:
        """Return the result of a payload's job on a worker. When that worker is lost, another one gets `for_retry(payload)`: what is left.

        Losses are counted per `owner`, up to MAX_WORKER_LOSSES. Raises JobCrashError, ClusterError, DiskFull or StoreError.
        """
        lost = False
        while True:
            worker, epoch = self._reserve(wanted)
            try:
                if lost:  # asked as late as can be: what a worker was at when its scheduler was lost, it may still have finished
                    payload = for_retry(payload)
                done, outcome = self._try(wanted, payload, worker, epoch)
            finally:
                with self._changed:
                    worker.jobs -= 1
                    self._changed.notify_all()
            if done:
                return cast("JobResult", outcome)
            self._folder.append_log("lost", chunk=wanted.group, worker=worker.name, reason=outcome)
            lost = True
            if self._is_the_same(epoch):  # not the scheduler's fault
                self._losses[owner] += 1
                if self._losses[owner] == MAX_WORKER_LOSSES:
                    raise JobCrashError(
                        f"{MAX_WORKER_LOSSES} workers were lost at this chunk, {worker.name} last ({outcome}); "
                        "is their memory too small? Try --chunk 1"
                    )

    def _is_the_same(self, epoch: int) -> bool:
        """Return whether the scheduler is still that of `epoch`.

        Dask cancels futures at once, we learn of a lost scheduler at the next look.
        """
        with self._changed:
            following = self._polls + 2  # one may be under way
            while self._epoch == epoch and self._polls < following:
                self._check()
                self._changed.wait(POLL_EVERY)
            return self._epoch == epoch

    def _reserve(self, wanted: JobRequirements) -> tuple[WorkerInfo, int]:
        """Wait for a worker of the wanted kind with a free place.

        Raises ClusterError if there was no such worker at all for `--dask-wait` seconds.
        """
        seen = time.monotonic()
        with self._changed:
            while True:
                self._check()
                fitting = [worker for worker in self._workers.values() if worker.state == "fits"]
                if wanted.gpu:
                    fitting = [worker for worker in fitting if worker.gpu]
                else:
                    others = [worker for worker in self._workers.values() if not worker.gpu and worker.state != "refused"]
                    fitting = [worker for worker in others if worker.state == "fits"] if others else fitting
                if fitting or not self._scheduler or any(worker.state == "new" for worker in self._workers.values()):
                    seen = time.monotonic()  # how long a scheduler may be away is decided where it is waited for
                if fitting:
                    worker = min(fitting, key=lambda worker: (worker.jobs, worker.name != wanted.preferred_worker))
                    if worker.jobs < self._jobs_ahead:
                        worker.jobs += 1
                        return worker, self._epoch
                if time.monotonic() - seen > self._wait:
                    raise ClusterError(self._no_worker_error(wanted))
                self._changed.wait(POLL_EVERY)

    def _no_worker_error(self, wanted: JobRequirements) -> str:
        kind = "worker that offers the resource GPU (`dask worker ... --resources GPU=1`)" if wanted.gpu else "worker"
        refused = [worker.name for worker in self._workers.values() if worker.state == "refused"]
        but = f"; {', '.join(refused)} cannot take part, see above" if refused else ""
        return (
            f"{self._address}: for {self._wait:g} s there was no {kind} for {wanted.name}{but}; start one and repeat the same command "
            "(nothing finished is lost)"
        )

    def _try(self, wanted: JobRequirements, payload: Any, worker: WorkerInfo, epoch: int) -> tuple[bool, Any]:
        """Return True and the result, or False and why the worker is lost to us."""
        try:
            future = self._client.submit(
                pickle.loads,
                pickle_call(run_job, self._context, payload, worker.gpu),
                key=f"e4s {wanted.name} of {wanted.subject}, {uuid.uuid4().hex[:8]}",
                workers=[worker.address],
                resources=GPU if wanted.gpu else None,
                pure=False,
            )
            future.add_done_callback(self._notify)
        except Exception as error:  # the scheduler is going away
            return False, f"not sent: {error}"
        with self._changed:
            while not future.done() and self._epoch == epoch and self._workers.get(worker.address) is worker:
                self._check()
                self._changed.wait(POLL_EVERY)
            if self._epoch != epoch:
                return False, "the scheduler was lost"
            if self._workers.get(worker.address) is not worker:
                future.cancel()
                return False, "the worker was lost"
        return self._outcome(future, worker)

    def _outcome(self, future: Any, worker: WorkerInfo) -> tuple[bool, Any]:
        try:
            result = future.result(timeout=30)
        except (DiskFull, StoreError):
            raise
        except IncompatibleWorkerError as error:
            self._refuse(worker, str(error))
            return False, str(error)
        except Exception as error:
            if future.status == "error" and not _is_dasks(error):
                raise JobCrashError(f"on worker {worker.name}: {type(error).__name__}: {error}") from None
            return False, f"{type(error).__name__}: {error}"
        return (True, result) if result is not None else (False, "stopped")

    def _check(self) -> None:
        if self._closing:
            raise _Stopped
        if self._problem:
            raise self._problem

    def _notify(self, future: Any) -> None:
        with self._changed:
            self._changed.notify_all()

    # -- the cluster -----------------------------------------------------------------------------------------------------------------

    def _connect(self, deadline: float) -> Client:
        told = hasattr(self, "_client")  # that a scheduler is lost is said already
        while True:
            try:
                left = math.ceil(deadline - time.monotonic())
                patience = max(1, min(5 if told else 3, left))
                client = Client(self._address, timeout=patience, security=self._security, set_as_default=False)
                break
            except (OSError, TimeoutError) as error:
                if self._closing:
                    raise _Stopped from None
                if time.monotonic() > deadline:
                    again = "came back" if hasattr(self, "_client") else "answers"
                    raise ClusterError(
                        f"{self._address}: no Dask scheduler {again} there ({type(error).__name__}); start one and repeat the same command "
                        "(nothing finished is lost)"
                    ) from None
                if not told:
                    told = True
                    print(
                        f"e4s: {self._address}: no Dask scheduler answers there yet; waiting for one, {self._wait:g} s at most "
                        "(--dask-wait)",
                        file=sys.stderr,
                    )
                time.sleep(0.2)
            except ValueError as error:
                raise ClusterError(f"--dask {self._address}: {error}; give tcp://HOST:PORT of a Dask scheduler") from None
        client.subscribe_topic(event_topic(self._context.run), lambda event: self._messages.put(("event", event[1])))
        return client

    def _watch(self) -> None:
        """Follow the cluster: workers that come and go, a scheduler that is lost."""
        while not self._closing:
            try:
                info = self._client.sync(self._client.scheduler.identity, n_workers=-1)
                if self._scheduler not in ("", info["id"]):
                    raise ConnectionError("another scheduler answers there")
                self._scheduler = info["id"]
                self._handshake_new_workers(info["workers"])
            except Exception as error:
                if not self._closing:
                    self._reconnect(error)
            with self._changed:
                self._polls += 1
                self._changed.notify_all()
            time.sleep(POLL_EVERY)

    def _reconnect(self, error: Exception) -> None:
        print(f"e4s: {self._address}: the Dask scheduler is lost ({type(error).__name__}); waiting for it", file=sys.stderr)
        self._folder.append_log("lost", scheduler=self._address, reason=str(error))
        with self._changed:
            self._epoch += 1
            self._workers.clear()
            self._scheduler = ""
            self._changed.notify_all()
        with suppress(Exception):
            self._client.close(timeout=1)
        try:
            self._client = self._connect(time.monotonic() + self._wait)
        except _Stopped:
            pass
        except ClusterError as problem:
            with self._changed:
                self._problem = problem
                self._changed.notify_all()
            self._messages.put(("problem", problem))
            self._closing = True
        else:
            print(f"e4s: {self._address}: the Dask scheduler is back", file=sys.stderr)

    def _handshake_new_workers(self, workers: Mapping[str, Mapping[str, Any]]) -> None:
        """Start the handshake of new workers, forget those that are gone."""
        with self._changed:
            for address in [address for address in self._workers if address not in workers]:
                worker = self._workers.pop(address)
                print(f"e4s: worker {worker.name} is lost; what it had not finished goes to others", file=sys.stderr)
            new = {address: entry for address, entry in workers.items() if address not in self._workers and entry["status"] == "running"}
            for address, entry in new.items():
                self._workers[address] = WorkerInfo(address, str(entry["name"]), entry["resources"].get("GPU", 0) >= 1)
            self._changed.notify_all()
        if new:
            # Old ones are pruned, so it is made young for each handshake; there a lost store shows itself.
            with suppress(OSError, StoreError):
                self._probe(write=True)
        for address in new:
            worker = self._workers[address]
            worker.check = self._client.submit(
                pickle.loads,
                pickle_call(handshake_worker, self._context, worker.gpu),
                key=f"e4s handshake, {uuid.uuid4().hex[:8]}",
                workers=[address],
                pure=False,
                priority=10,
            )
            worker.check.add_done_callback(partial(self._on_handshake, worker))

    def _on_handshake(self, worker: WorkerInfo, handshake: Any) -> None:
        try:
            problem = handshake.result(timeout=30)
        except Exception as error:
            if _is_dasks(error):
                return  # the worker was lost meanwhile
            problem = f"it cannot run this program ({type(error).__name__}: {error}); install the same version there"
        if problem:
            self._refuse(worker, problem)
            return
        with self._changed:
            worker.state = "fits"
            self._changed.notify_all()

    def _refuse(self, worker: WorkerInfo, problem: str) -> None:
        with self._changed:
            if worker.state != "refused":
                worker.state = "refused"
                print(f"e4s: worker {worker.name} cannot take part: {problem}", file=sys.stderr)
                self._folder.append_log("refused", worker=worker.name, reason=problem)
            self._changed.notify_all()

    def close(self) -> None:
        """Cancel what waits, stop what runs at its next item, leave the cluster (an own one ends)."""
        with self._changed:
            self._closing = True
            busy = [address for address, worker in self._workers.items() if worker.jobs]
            self._changed.notify_all()
        if busy and not self._own:
            with suppress(Exception):  # the cluster may be the trouble
                self._client.run(pickle.loads, pickle_call(request_stop, self._context.run), workers=busy, wait=False, on_error="ignore")
        self._threads.shutdown(wait=True)
        self._watcher.join(timeout=10)
        with suppress(Exception):
            self._client.close(timeout=2)
        self._finish()

    def _finish(self) -> None:
        if self._own:
            self._own.close()
        with suppress(OSError, StoreError):
            self._probe(write=False)

    def _probe(self, *, write: bool) -> None:
        """Write or remove the file by which workers prove that they see the store."""
        file = f"{PROBES}/{self._context.run}"
        if write:
            self._store.files.write(file, self._context.run.encode())
        else:
            self._store.files.remove([file])


def base_run_context(graph: Graph, request: ClusterRequest, store: Store) -> dict[str, Any]:
    """Return those fields of a `RunContext` that every run has alike."""
    threads = request.compute_threads()
    return {
        "run": uuid.uuid4().hex,
        "nodes": tuple(graph.all_nodes.values()),
        "final": graph.final,
        "settings": graph.settings,
        "program": source_digest(graph.settings),
        "store": store.url,
        "threads": threads,
        "at_once": request.workers or threads,
        "instructions": request.instructions(),
    }


def is_open_to_others(address: str) -> bool:
    """Return True for a scheduler's address without encryption that is not of the loopback interface."""
    parts = urlsplit(address)
    if parts.scheme != "tcp" or not parts.hostname or parts.hostname == "localhost":
        return False
    try:
        return not ipaddress.ip_address(parts.hostname).is_loopback
    except ValueError:  # a name
        return True


class _NoHttpServer:
    """Keeps a Dask process from listening for HTTP, which is not encrypted; Dask has no setting for that."""

    def start_http_server(self, *arguments: Any, **options: Any) -> None:
        self.http_application = RoutingApplication([])
        self.http_server = HTTPServer(self.http_application)  # listens nowhere


class SilentScheduler(_NoHttpServer, Scheduler):  # type: ignore[misc]
    """A scheduler without an HTTP server."""


class SilentWorker(_NoHttpServer, Worker):  # type: ignore[misc]
    """A worker without an HTTP server."""


class LocalDaskCluster:
    """A scheduler in this process and worker processes on this machine: `count` without a GPU, and one per GPU when `device` is cuda.

    All listen on the loopback interface only, and accept connections only from those that hold the key made for this cluster.
    """

    def __init__(self, count: int, device: str) -> None:
        self.security = Security.temporary()
        loopback = {"host": "127.0.0.1", "protocol": "tls://", "security": self.security, "dashboard": False}
        # Folders of processes are where Dask has them by default: there it removes what killed ones left.
        common = {**loopback, "nthreads": 1, "memory_limit": 0, "worker_class": SilentWorker, "silence_logs": logging.CRITICAL}
        workers = {
            name: {"cls": Nanny, "options": {**common, **options}} for name, options in local_workers(count, gpu_names(device)).items()
        }
        scheduler = {"cls": SilentScheduler, "options": {**loopback, "port": 0}}
        self._environment = ExitStack()  # as long as the cluster: a nanny may start another process at any time
        self._environment.enter_context(changed_environment(SAFE_PATH))
        # Ctrl-C in a terminal reaches every process of its group, but this one ends the others in order. They, and those
        # that replace them, inherit the mask of the threads that start now.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.cluster = SpecCluster(workers, scheduler, security=self.security, silence_logs=logging.CRITICAL)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def close(self) -> None:
        try:
            self.cluster.close(timeout=10)
        finally:
            self._environment.close()


def local_workers(count: int, gpus: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name -> options of the processes of a cluster of our own; one process, and so one set of models, per GPU."""
    cpu: dict[str, dict[str, Any]] = {f"cpu-{number}": {} for number in range(count)}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if gpus else {}
    return {name: {"env": hidden} for name in cpu} | {
        f"gpu-{name}": {"resources": GPU, "env": {"CUDA_VISIBLE_DEVICES": name}} for name in gpus
    }


def gpu_names(device: str) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none on cpu."""
    if device == "cpu":
        return []
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _is_dasks(error: BaseException | None) -> bool:
    """Whether Dask itself says that a task was lost, rather than our program that it failed."""
    return error is None or type(error).__module__.split(".")[0] in ("distributed", "tornado") or isinstance(error, OSError | TimeoutError)
