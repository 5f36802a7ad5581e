"""Dask workers as a crew: an existing scheduler (`--dask tcp://...`) or processes of our own (`--dask local:N`).

The planning process sends every piece of work to one worker itself, so that it knows who had it when a worker is lost: then only what that
worker did not finish is sent elsewhere. Dask carries small things only (jobs, keys, outcomes, events); values go through the worker's
memory within a piece of work and through the store between two. Work for the GPU goes to workers that offer the Dask resource GPU, the rest
to those without it (to any, if all have one).
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
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from distributed import Client, Nanny, Scheduler, Security, SpecCluster, Worker
from distributed.http.routing import RoutingApplication
from tornado.httpserver import HTTPServer

from flows.environment import SAFE_PATH, changed_environment
from flows.plan import BaseRequest
from flows.remote import Kit, Refused, carry, enter, halt, packed, source_digest, topic
from storage.run import RunFiles
from storage.runs import PROBES
from storage.store import Store, StoreError
from tasks.graph import Graph, UsageError
from tasks.runner import DiskFull

LOSSES = 3  # workers that one piece of work may lose before it counts as stopped by a program error
LOOK_EVERY = 0.5  # s between looks at the cluster's workers
GPU = {"GPU": 1}

AnyJob = TypeVar("AnyJob")

Heard = tuple[Literal["done", "event"], Any]
"""What a piece of work came to, or what a worker tells meanwhile."""


class ClusterError(UsageError):
    """The cluster cannot do the work: one sentence with the remedy. Nothing finished is lost."""


class Crashed(Exception):
    """A piece of work was stopped by a program error, or has cost too many workers: the sentence says which."""


class _Stopped(Exception):
    """The run is being closed."""


@dataclass(frozen=True)
class Errand:
    """How a piece of work is sent."""

    name: str  # what is done
    of: str  # with what: the two together name it
    number: int  # of the chunk or video, in the log
    gpu: bool = False
    near: str = ""  # the worker that is preferred among those that have equally much to do


@dataclass
class _Site:
    """A worker process as the run sees it."""

    address: str
    name: str
    gpu: bool
    state: str = "new"  # new, fits, refused
    load: int = 0  # pieces of work that it was given and has not returned
    check: Any = field(default=None, repr=False)  # the future of its handshake


class Crew:
    """Workers that fit a run, and the threads of this process that wait for them."""

    def __init__(self, kit: Kit, request: BaseRequest, store: Store, folder: RunFiles[Any], ahead: int) -> None:
        """`ahead`: pieces of work that a worker is given at a time; all but one wait there. Raises ClusterError if no scheduler answers."""
        self._kit, self._store, self._folder, self._ahead = kit, store, folder, ahead
        self._patience = request.dask_wait
        self._messages: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards what follows
        self._sites: dict[str, _Site] = {}
        self._epoch = 0  # raised whenever the connection to the scheduler was lost: futures of before are void
        self._looks = 0  # at the cluster
        self._problem: ClusterError | None = None
        self._closing = False
        self._losses: dict[object, int] = defaultdict(int)
        self._pool = ThreadPoolExecutor(512, "e4s-crew")  # a thread waits for each piece of work that is under way
        for name in ("distributed", "distributed.client"):  # what matters to the user is said here, once
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._own = OwnCluster(request.processes, kit.settings.device) if request.processes else None
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
            self._client = self._connect(time.monotonic() + self._patience)
        except BaseException:
            self._finish()
            raise
        self._scheduler = ""
        self._watcher = threading.Thread(target=self._watch, name="e4s-cluster", daemon=True)
        self._watcher.start()

    # -- the work --------------------------------------------------------------------------------------------------------------------

    def room(self) -> int:
        """How many pieces of work the workers take at a time, as many as there are now."""
        with self._changed:
            return self._ahead * max(1, sum(site.state == "fits" for site in self._sites.values()))

    def start(self, work: Callable[[], Any]) -> None:
        """Begin a piece of work in a thread of its own, which sends workers on errands; `hear` says what it returned."""
        self._pool.submit(contextvars.copy_context().run, self._through, work)

    def tell(self, event: Mapping[str, Any]) -> None:
        """Have `hear` say something about a piece of work that is under way, as if a worker had told it."""
        self._messages.put(("event", event))

    def hear(self) -> Heard | None:
        """What happened: an event of a worker, or what a piece of work returned; None if there is nothing for a moment.

        Raises what a piece of work raised, and ClusterError if the scheduler stays away.
        """
        try:
            kind, message = self._messages.get(timeout=LOOK_EVERY)
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

    def send(self, errand: Errand, job: AnyJob, again: Callable[[AnyJob], AnyJob], owner: object) -> Any:
        """What a worker's outfit makes of a job. When that worker is lost, `again` says what of the job is left, and another gets that.

        `owner` is who may lose a few workers. Raises Crashed, ClusterError, DiskFull or StoreError.
        """
        lost = False
        while True:
            site, epoch = self._reserve(errand)
            try:
                if lost:  # asked as late as can be: what a worker was at when its scheduler was lost, it may still have finished
                    job = again(job)
                done, outcome = self._try(errand, job, site, epoch)
            finally:
                with self._changed:
                    site.load -= 1
                    self._changed.notify_all()
            if done:
                return outcome
            self._folder.append_log("lost", chunk=errand.number, worker=site.name, reason=outcome)
            lost = True
            if self._is_the_same(epoch):  # not the scheduler's fault
                self._losses[owner] += 1
                if self._losses[owner] == LOSSES:
                    raise Crashed(
                        f"{LOSSES} workers were lost at this chunk, {site.name} last ({outcome}); is their memory too small? Try --chunk 1"
                    )

    def _is_the_same(self, epoch: int) -> bool:
        """Whether the scheduler is still that of `epoch`: Dask cancels futures at once, we learn of a lost scheduler at the next look."""
        with self._changed:
            following = self._looks + 2  # one may be under way
            while self._epoch == epoch and self._looks < following:
                self._check()
                self._changed.wait(LOOK_EVERY)
            return self._epoch == epoch

    def _reserve(self, errand: Errand) -> tuple[_Site, int]:
        """Wait for a worker of the errand's kind with room. Raises ClusterError if there was none at all for `--dask-wait` seconds."""
        seen = time.monotonic()
        with self._changed:
            while True:
                self._check()
                fitting = [site for site in self._sites.values() if site.state == "fits"]
                if errand.gpu:
                    fitting = [site for site in fitting if site.gpu]
                else:
                    others = [site for site in self._sites.values() if not site.gpu and site.state != "refused"]
                    fitting = [site for site in others if site.state == "fits"] if others else fitting
                if fitting or not self._scheduler or any(site.state == "new" for site in self._sites.values()):
                    seen = time.monotonic()  # how long a scheduler may be away is decided where it is waited for
                if fitting:
                    site = min(fitting, key=lambda site: (site.load, site.name != errand.near))
                    if site.load < self._ahead:
                        site.load += 1
                        return site, self._epoch
                if time.monotonic() - seen > self._patience:
                    raise ClusterError(self._nobody(errand))
                self._changed.wait(LOOK_EVERY)

    def _nobody(self, errand: Errand) -> str:
        kind = "worker that offers the resource GPU (`dask worker ... --resources GPU=1`)" if errand.gpu else "worker"
        refused = [site.name for site in self._sites.values() if site.state == "refused"]
        but = f"; {', '.join(refused)} cannot take part, see above" if refused else ""
        return (
            f"{self._address}: for {self._patience:g} s there was no {kind} for {errand.name}{but}; start one and repeat the same command "
            "(nothing finished is lost)"
        )

    def _try(self, errand: Errand, job: Any, site: _Site, epoch: int) -> tuple[bool, Any]:
        """True and what the job came to, or False and why its worker is lost to us."""
        try:
            future = self._client.submit(
                pickle.loads,
                packed(carry, self._kit, job, site.gpu),
                key=f"e4s {errand.name} of {errand.of}, {uuid.uuid4().hex[:8]}",
                workers=[site.address],
                resources=GPU if errand.gpu else None,
                pure=False,
            )
            future.add_done_callback(self._notify)
        except Exception as error:  # the scheduler is going away
            return False, f"not sent: {error}"
        with self._changed:
            while not future.done() and self._epoch == epoch and self._sites.get(site.address) is site:
                self._check()
                self._changed.wait(LOOK_EVERY)
            if self._epoch != epoch:
                return False, "the scheduler was lost"
            if self._sites.get(site.address) is not site:
                future.cancel()
                return False, "the worker was lost"
        return self._outcome(future, site)

    def _outcome(self, future: Any, site: _Site) -> tuple[bool, Any]:
        try:
            result = future.result(timeout=30)
        except (DiskFull, StoreError):
            raise
        except Refused as error:
            self._refuse(site, str(error))
            return False, str(error)
        except Exception as error:
            if future.status == "error" and not _is_dasks(error):
                raise Crashed(f"on worker {site.name}: {type(error).__name__}: {error}") from None
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
                        f"e4s: {self._address}: no Dask scheduler answers there yet; waiting for one, {self._patience:g} s at most "
                        "(--dask-wait)",
                        file=sys.stderr,
                    )
                time.sleep(0.2)
            except ValueError as error:
                raise ClusterError(f"--dask {self._address}: {error}; give tcp://HOST:PORT of a Dask scheduler") from None
        client.subscribe_topic(topic(self._kit.run), lambda event: self._messages.put(("event", event[1])))
        return client

    def _watch(self) -> None:
        """Follow the cluster: workers that come and go, a scheduler that is lost."""
        while not self._closing:
            try:
                info = self._client.sync(self._client.scheduler.identity, n_workers=-1)
                if self._scheduler not in ("", info["id"]):
                    raise ConnectionError("another scheduler answers there")
                self._scheduler = info["id"]
                self._meet(info["workers"])
            except Exception as error:
                if not self._closing:
                    self._reconnect(error)
            with self._changed:
                self._looks += 1
                self._changed.notify_all()
            time.sleep(LOOK_EVERY)

    def _reconnect(self, error: Exception) -> None:
        print(f"e4s: {self._address}: the Dask scheduler is lost ({type(error).__name__}); waiting for it", file=sys.stderr)
        self._folder.append_log("lost", scheduler=self._address, reason=str(error))
        with self._changed:
            self._epoch += 1
            self._sites.clear()
            self._scheduler = ""
            self._changed.notify_all()
        with suppress(Exception):
            self._client.close(timeout=1)
        try:
            self._client = self._connect(time.monotonic() + self._patience)
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

    def _meet(self, workers: Mapping[str, Mapping[str, Any]]) -> None:
        """Ask new workers whether they fit, forget those that are gone."""
        with self._changed:
            for address in [address for address in self._sites if address not in workers]:
                site = self._sites.pop(address)
                print(f"e4s: worker {site.name} is lost; what it had not finished goes to others", file=sys.stderr)
            new = {address: entry for address, entry in workers.items() if address not in self._sites and entry["status"] == "running"}
            for address, entry in new.items():
                self._sites[address] = _Site(address, str(entry["name"]), entry["resources"].get("GPU", 0) >= 1)
            self._changed.notify_all()
        if new:
            # Old ones are pruned, so it is made young for each handshake; there a lost store shows itself.
            with suppress(OSError, StoreError):
                self._probe(write=True)
        for address in new:
            site = self._sites[address]
            site.check = self._client.submit(
                pickle.loads,
                packed(enter, self._kit, site.gpu),
                key=f"e4s handshake, {uuid.uuid4().hex[:8]}",
                workers=[address],
                pure=False,
                priority=10,
            )
            site.check.add_done_callback(partial(self._met, site))

    def _met(self, site: _Site, handshake: Any) -> None:
        try:
            problem = handshake.result(timeout=30)
        except Exception as error:
            if _is_dasks(error):
                return  # the worker was lost meanwhile
            problem = f"it cannot run this program ({type(error).__name__}: {error}); install the same version there"
        if problem:
            self._refuse(site, problem)
            return
        with self._changed:
            site.state = "fits"
            self._changed.notify_all()

    def _refuse(self, site: _Site, problem: str) -> None:
        with self._changed:
            if site.state != "refused":
                site.state = "refused"
                print(f"e4s: worker {site.name} cannot take part: {problem}", file=sys.stderr)
                self._folder.append_log("refused", worker=site.name, reason=problem)
            self._changed.notify_all()

    def close(self) -> None:
        """Cancel what waits, stop what runs at its next item, leave the cluster (an own one ends)."""
        with self._changed:
            self._closing = True
            busy = [address for address, site in self._sites.items() if site.load]
            self._changed.notify_all()
        if busy and not self._own:
            with suppress(Exception):  # the cluster may be the trouble
                self._client.run(pickle.loads, packed(halt, self._kit.run), workers=busy, wait=False, on_error="ignore")
        self._pool.shutdown(wait=True)
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
        file = f"{PROBES}/{self._kit.run}"
        if write:
            self._store.files.write(file, self._kit.run.encode())
        else:
            self._store.files.remove([file])


def kit_of(graph: Graph, request: BaseRequest, store: Store) -> dict[str, Any]:
    """Those fields of a kit that every run has alike."""
    threads = request.compute_threads()
    return {
        "run": uuid.uuid4().hex,
        "nodes": tuple(graph.all_nodes.values()),
        "final": graph.final,
        "settings": graph.settings,
        "source": source_digest(graph.settings),
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


class OwnCluster:
    """A scheduler in this process and worker processes on this machine: `count` without a GPU, and one per GPU when `device` is cuda.

    All listen on the loopback interface only, and accept connections only from those that hold the key made for this cluster.
    """

    def __init__(self, count: int, device: str) -> None:
        self.security = Security.temporary()
        loopback = {"host": "127.0.0.1", "protocol": "tls://", "security": self.security, "dashboard": False}
        # Folders of processes are where Dask has them by default: there it removes what killed ones left.
        common = {**loopback, "nthreads": 1, "memory_limit": 0, "worker_class": SilentWorker, "silence_logs": logging.CRITICAL}
        workers = {
            name: {"cls": Nanny, "options": {**common, **options}} for name, options in own_workers(count, gpu_names(device)).items()
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


def own_workers(count: int, gpus: Sequence[str]) -> dict[str, dict[str, Any]]:
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
