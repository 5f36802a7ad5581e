"""Chunks on Dask workers: an existing scheduler (`--dask tcp://...`) or processes of our own (`--dask local:N`).

The planning process places every part of a chunk on one worker itself, so that it knows who had it when a worker is lost: then the store is
asked what that worker finished, and only the rest is sent elsewhere. Dask carries small things only (jobs, keys, outcomes, events); values
go through the worker's memory within a part and through the store between parts. Where the device kind changes between stages, a chunk is
cut into parts: GPU stages go to workers that offer the Dask resource GPU, the others to those without it (to any, if all have one).
"""

from __future__ import annotations

import contextvars
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
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from distributed import Client, Nanny, Scheduler, SpecCluster

from flows.engine import Progress, Results, Shared, StageCall
from flows.plan import Plan
from flows.remote import PROBES, Kit, Refused, carry, enter, halt, packed, source_digest, topic
from storage.store import Artifact, StoreError
from tasks.graph import Graph, Item, UsageError
from tasks.runner import ChunkJob, ChunkResult, DiskFull, Outcome

LOSSES = 3  # workers that one chunk may lose before it counts as stopped by a program error
AHEAD = 2  # parts that a worker is given at a time: one runs, one waits there
LOOK_EVERY = 0.5  # s between looks at the cluster's workers
GPU = {"GPU": 1}


class ClusterError(UsageError):
    """The cluster cannot do the work: one sentence with the remedy. Nothing finished is lost."""


class _Stopped(Exception):
    """The run is being closed."""


@dataclass(frozen=True)
class Part:
    """Nodes of the graph that a chunk runs through on one worker."""

    name: str
    nodes: frozenset[str]
    device: str  # cpu or cuda


def parts(graph: Graph) -> list[Part]:
    """Cut the graph where the device kind changes, in as few parts as the wires allow; one part if all is of one kind."""
    level: dict[str, int] = {}  # even: cpu, odd: cuda
    for node in graph.nodes:
        odd = graph.device(node.name) != "cpu"
        lowest = max((level[producer] for producer in graph.producers(node.name)), default=0)
        level[node.name] = lowest if lowest % 2 == odd else lowest + 1
    found = []
    for number in sorted(set(level.values())):
        names = [node.name for node in graph.nodes if level[node.name] == number]
        found.append(Part(names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}", frozenset(names), "cuda" if number % 2 else "cpu"))
    return found


@dataclass
class _Site:
    """A worker process as the run sees it."""

    address: str
    name: str
    gpu: bool
    state: str = "new"  # new, fits, refused
    load: int = 0  # parts it was given and has not returned
    check: Any = field(default=None, repr=False)  # the future of its handshake


class Cluster:
    """Executor on Dask workers."""

    def __init__(self, plan: Plan, progress: Progress, call: StageCall) -> None:
        """Raises ClusterError if the scheduler does not answer."""
        self._plan, self._progress, self._call = plan, progress, call
        self._patience = plan.request.dask_wait
        self._kit = make_kit(plan)
        self._parts = parts(plan.graph)
        self._shared = Shared()
        self._messages: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards what follows
        self._sites: dict[str, _Site] = {}
        self._epoch = 0  # raised whenever the connection to the scheduler was lost: futures of before are void
        self._looks = 0  # at the cluster
        self._problem: ClusterError | None = None
        self._closing = False
        self._losses: dict[int, int] = defaultdict(int)
        self._pool = ThreadPoolExecutor(512, "e4s-chunk")  # a thread waits for each chunk that is under way
        for name in ("distributed", "distributed.client"):  # what matters to the user is said here, once
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._own = OwnCluster(plan.request.processes, plan.graph.settings.device) if plan.request.processes else None
        self._address = self._own.cluster.scheduler_address if self._own else plan.request.dask
        self._probe(write=True)
        try:
            self._client = self._connect(time.monotonic() + self._patience)
        except BaseException:
            self._finish()
            raise
        self._scheduler = ""
        self._watcher = threading.Thread(target=self._watch, name="e4s-cluster", daemon=True)
        self._watcher.start()

    # -- the chunks ------------------------------------------------------------------------------------------------------------------

    def results(self, jobs: Iterable[ChunkJob]) -> Results:
        """Chunks as they are finished. A chunk that needs per-image work which another one is just doing waits for that one."""
        coming, ready = iter(jobs), deque[ChunkJob]()
        waiting: dict[str, list[ChunkJob]] = {}  # by a key that is being made
        making: dict[str, int] = {}  # key of shared work -> chunk that makes it
        flying: dict[int, tuple[ChunkJob, list[str]]] = {}
        within: dict[int, float] = {}
        while True:
            while len(flying) < self._room():
                following = ready.popleft() if ready else next(coming, None)
                if following is None:
                    break
                job = self._shared.equip(following)
                open_keys = [key for key in job.shared if key not in job.known]
                blocking = next((key for key in open_keys if key in making), None)
                if blocking:
                    waiting.setdefault(blocking, []).append(job)
                    continue
                making |= dict.fromkeys(open_keys, job.number)
                flying[job.number] = job, open_keys
                self._pool.submit(contextvars.copy_context().run, self._chunk, job)
            if not flying:
                return
            try:
                kind, message = self._messages.get(timeout=LOOK_EVERY)
            except queue.Empty:
                continue  # there may be more room now
            if kind == "problem":
                raise message
            if kind == "event":
                self._show(message, flying, within)
                continue
            number, result = message
            job, open_keys = flying.pop(number)
            within.pop(number, None)
            self._shared.take(job, result)
            for key in open_keys:
                del making[key]
                ready.extendleft(reversed(waiting.pop(key, [])))
            yield job, result

    def _room(self) -> int:
        with self._changed:
            return AHEAD * max(1, sum(site.state == "fits" for site in self._sites.values()))

    def _show(self, event: Mapping[str, Any], flying: Mapping[int, tuple[ChunkJob, list[str]]], within: dict[int, float]) -> None:
        number = event["chunk"]
        if "node" in event:
            self._progress.stage(number, event["node"])
        elif number in flying:
            within[number] = event["share"] * len(flying[number][0].items)
            self._progress.within(sum(within.values()))

    def _chunk(self, job: ChunkJob) -> None:
        try:
            self._messages.put(("done", (job.number, self._through_parts(job))))
        except _Stopped:
            pass
        except BaseException as error:
            self._messages.put(("problem", error))

    def _through_parts(self, job: ChunkJob) -> ChunkResult:
        """One chunk from part to part; what a part finds damaged is made again by the parts before it."""
        known, items = dict(job.known), list(job.items)
        total = ChunkResult([], [], defaultdict(int), defaultdict(float), [])
        outcomes = {item.id: Outcome(item.id) for item in items}
        index = 0
        while index < len(self._parts):
            part = self._parts[index]
            nodes = None if len(self._parts) == 1 else part.nodes
            result = self._visibly(replace(job, items=items, known=known, nodes=nodes), part)
            _add(total, result, outcomes)
            known |= {artifact.key: artifact for artifact in result.artifacts}
            for key in result.lost:
                known.pop(key, None)
            items = [item for item in items if not outcomes[item.id].reason]
            if result.crash or not items:
                break
            index = 0 if result.lost else index + 1
        return total

    def _visibly(self, job: ChunkJob, part: Part) -> ChunkResult:
        found: list[ChunkResult] = []
        self._call(job.number, part.name, lambda: found.append(self._place(job, part)))
        return found[0]

    def _place(self, job: ChunkJob, part: Part) -> ChunkResult:
        """Send a part to a worker; when that worker is lost, what it finished is looked up and the rest sent to another."""
        given, lost, found = job.known, False, list[Artifact]()
        while True:
            site, epoch = self._reserve(part)
            try:
                if lost:  # asked as late as can be: what a worker was at when its scheduler was lost, it may still have finished
                    known = self._plan.store.lookup(_keys(self._plan.graph, job.items))
                    found = [artifact for key, artifact in known.items() if key not in given]
                    job = replace(job, known={**given, **known})
                outcome = self._send(job, part, site, epoch)
            finally:
                with self._changed:
                    site.load -= 1
                    self._changed.notify_all()
            if isinstance(outcome, ChunkResult):
                return replace(outcome, artifacts=[*found, *outcome.artifacts])  # other chunks may need what was found, too
            self._plan.folder.append_log("lost", chunk=job.number, worker=site.name, reason=outcome)
            lost = True
            if self._is_the_same(epoch):  # not the scheduler's fault
                self._losses[job.number] += 1
                if self._losses[job.number] == LOSSES:
                    sentence = (
                        f"{LOSSES} workers were lost at this chunk, {site.name} last ({outcome}); is their memory too small? Try --chunk 1"
                    )
                    return replace(_empty(job.items), artifacts=found, crash=sentence)

    def _is_the_same(self, epoch: int) -> bool:
        """Whether the scheduler is still that of `epoch`: Dask cancels futures at once, we learn of a lost scheduler at the next look."""
        with self._changed:
            following = self._looks + 2  # one may be under way
            while self._epoch == epoch and self._looks < following:
                self._check()
                self._changed.wait(LOOK_EVERY)
            return self._epoch == epoch

    def _reserve(self, part: Part) -> tuple[_Site, int]:
        """Wait for a worker of the part's kind with room. Raises ClusterError if there was none at all for `--dask-wait` seconds."""
        seen = time.monotonic()
        with self._changed:
            while True:
                self._check()
                fitting = [site for site in self._sites.values() if site.state == "fits"]
                if part.device == "cuda":
                    fitting = [site for site in fitting if site.gpu]
                else:
                    others = [site for site in self._sites.values() if not site.gpu and site.state != "refused"]
                    fitting = [site for site in others if site.state == "fits"] if others else fitting
                if fitting or not self._scheduler or any(site.state == "new" for site in self._sites.values()):
                    seen = time.monotonic()  # how long a scheduler may be away is decided where it is waited for
                if fitting:
                    site = min(fitting, key=lambda site: site.load)
                    if site.load < AHEAD:
                        site.load += 1
                        return site, self._epoch
                if time.monotonic() - seen > self._patience:
                    raise ClusterError(self._nobody(part))
                self._changed.wait(LOOK_EVERY)

    def _nobody(self, part: Part) -> str:
        kind = "worker that offers the resource GPU (`dask worker ... --resources GPU=1`)" if part.device == "cuda" else "worker"
        refused = [site.name for site in self._sites.values() if site.state == "refused"]
        but = f"; {', '.join(refused)} cannot take part, see above" if refused else ""
        return (
            f"{self._address}: for {self._patience:g} s there was no {kind} for {part.name}{but}; start one and repeat the same command "
            "(nothing finished is lost)"
        )

    def _send(self, job: ChunkJob, part: Part, site: _Site, epoch: int) -> ChunkResult | str:
        """The part's outcome, or why its worker is lost to us."""
        gpu = part.device == "cuda"
        try:
            future = self._client.submit(
                pickle.loads,
                packed(carry, self._kit, job, site.gpu),
                key=f"e4s {part.name} of chunk {job.number}, {uuid.uuid4().hex[:8]}",
                workers=[site.address],
                resources=GPU if gpu else None,
                pure=False,
            )
            future.add_done_callback(self._notify)
        except Exception as error:  # the scheduler is going away
            return f"not sent: {error}"
        with self._changed:
            while not future.done() and self._epoch == epoch and self._sites.get(site.address) is site:
                self._check()
                self._changed.wait(LOOK_EVERY)
            if self._epoch != epoch:
                return "the scheduler was lost"
            if self._sites.get(site.address) is not site:
                future.cancel()
                return "the worker was lost"
        return self._outcome(future, job, site)

    def _outcome(self, future: Any, job: ChunkJob, site: _Site) -> ChunkResult | str:
        try:
            result: ChunkResult | None = future.result(timeout=30)
        except (DiskFull, StoreError):
            raise
        except Refused as error:
            self._refuse(site, str(error))
            return str(error)
        except Exception as error:
            if future.status == "error" and not _is_dasks(error):
                return replace(_empty(job.items), crash=f"on worker {site.name}: {type(error).__name__}: {error}")
            return f"{type(error).__name__}: {error}"
        return result or "stopped"

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
                client = Client(self._address, timeout=max(1, min(5 if told else 3, left)), set_as_default=False)
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
        self._plan.folder.append_log("lost", scheduler=self._address, reason=str(error))
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
                self._plan.folder.append_log("refused", worker=site.name, reason=problem)
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
            self._plan.store.files.write(file, self._kit.run.encode())
        else:
            self._plan.store.files.remove([file])


def make_kit(plan: Plan) -> Kit:
    """What workers must know of the plan."""
    graph, request = plan.graph, plan.request
    url = plan.store.url
    image = next(iter(plan.todo[0].images.values())) if plan.todo else None
    threads = request.compute_threads()
    return Kit(
        run=uuid.uuid4().hex,
        nodes=tuple(graph.all_nodes.values()),
        final=graph.final,
        settings=graph.settings,
        prints=graph.fingerprints,
        source=source_digest(graph.settings),
        store=url if "://" in url else str(Path(url).absolute()),
        keep=request.keep,
        threads=threads,
        at_once=request.workers or threads,
        picture=(image.path, image.sha256) if image else ("", ""),
    )


class OwnCluster:
    """A scheduler in this process and worker processes on this machine: `count` without a GPU, and one per GPU when `device` is cuda."""

    def __init__(self, count: int, device: str) -> None:
        # Folders of processes are where Dask has them by default: there it removes what killed ones left.
        common = {"nthreads": 1, "memory_limit": 0, "dashboard": False, "silence_logs": logging.CRITICAL}
        workers = {
            name: {"cls": Nanny, "options": {**common, **options}} for name, options in own_workers(count, gpu_names(device)).items()
        }
        scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}}
        # Ctrl-C in a terminal reaches every process of its group, but this one ends the others in order. They, and those
        # that replace them, inherit the mask of the threads that start now.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.cluster = SpecCluster(workers, scheduler, silence_logs=logging.CRITICAL)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def close(self) -> None:
        self.cluster.close(timeout=10)


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


def _add(total: ChunkResult, result: ChunkResult, outcomes: dict[str, Outcome]) -> None:
    """Add one part's result to the chunk's."""
    for outcome in result.outcomes:
        outcome.seconds += outcomes[outcome.id].seconds
        outcomes[outcome.id] = outcome
    total.outcomes = list(outcomes.values())
    total.artifacts += result.artifacts
    total.repaired += result.repaired
    total.places |= result.places
    total.crash = result.crash
    for node, count in result.computed.items():
        total.computed[node] += count
        total.seconds[node] += result.seconds.get(node, 0.0)


def _empty(items: Iterable[Item]) -> ChunkResult:
    return ChunkResult([Outcome(item.id) for item in items], [], {}, {}, [])


def _keys(graph: Graph, items: Iterable[Item]) -> set[str]:
    return {work.key for item in items for work in graph.works(item).values()}


def _is_dasks(error: BaseException | None) -> bool:
    """Whether Dask itself says that a task was lost, rather than our program that it failed."""
    return error is None or type(error).__module__.split(".")[0] in ("distributed", "tornado") or isinstance(error, OSError | TimeoutError)
