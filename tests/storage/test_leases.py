"""Who is at work on a store: leases that outlive a stepped clock, and registrations, probes and claims that end with what they were for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from storage.prune import Selection, prune
from storage.store import Store

ROOT = Path(__file__).parents[2]

HOLD = """
import sys, time
from pathlib import Path
from storage.store import Store
lease = Store(sys.argv[1]).register(Path(sys.argv[2]), ["a"], **({"temporary": True} if sys.argv[3] else {}))
print("registered", flush=True)
time.sleep(120)
"""


def holder(store: Store, run: Path, kind: str = "") -> subprocess.Popen[str]:
    """Another process that holds a lease."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, store.url, str(run), kind], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "registered\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def lease_file(store: Store) -> Path:
    (file,) = Path(store.url).glob("runs/*/lease.json")
    return file


def live(store: Store) -> list[bool]:
    return [run.live for run in store.runs.registered()]


def test_a_lease_is_alive_although_the_clock_was_stepped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "store"))
    process = holder(store, tmp_path)
    try:
        # What a step of the clock does: the time of the machine's start, which the kernel works out from the clock, is another.
        created = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) + 3600.0)
        os.utime(lease_file(store), (1, 1))  # as old as can be
        assert live(store) == [True]
    finally:
        kill(process)
    assert live(store) == [False]


def test_a_process_that_only_has_the_same_number_holds_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    process = holder(store, tmp_path)
    file = lease_file(store)
    lease = json.loads(file.read_bytes())
    kill(process)
    file.write_text(json.dumps({**lease, "pid": os.getpid()}))
    assert live(store) == [True]  # young: a lease of an earlier version says its start by the clock only
    os.utime(file, (1, 1))
    assert live(store) == [False]


def test_a_killed_process_that_nobody_waited_for_holds_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    process = holder(store, tmp_path)
    process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert live(store) == [False]
    process.wait()


def test_a_temporary_run_leaves_no_registration(store: Store, tmp_path: Path) -> None:
    with store.register(tmp_path, ["a"], temporary=True):
        assert live(store) == [True]
        assert store.runs.keys(store.runs.registered()).to_pylist() == ["a"]
    assert [entry.file for entries in store.files.walk("runs") for entry in entries] == []
    assert store.files.folders("runs") == []


def test_a_killed_temporary_run_is_forgotten_by_the_next_run_and_by_a_prune(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        kill(holder(store, tmp_path / name, "temporary"))
        assert str(tmp_path / name) in [run.path for run in store.runs.registered()]
        if name == "first":
            store.register(tmp_path, ["b"]).close()
        else:
            prune(store, Selection(), really=True)
        assert [run.path for run in store.runs.registered()] == [str(tmp_path)]


@pytest.mark.parametrize("by", ["the next run", "a prune"])
def test_what_killed_prunes_and_lost_workers_left_is_removed(tmp_path: Path, by: str) -> None:
    store = Store(str(tmp_path / "store"))
    old = ["prune/old.json", "prune/old.clock", "probe/old", "probe/old-01234567"]
    for file in (*old, "probe/young"):
        store.files.write(file, b"1")
    for file in old:
        os.utime(store.files.path(file), (1, 1))
    if by == "a prune":
        prune(store, Selection(), really=True)
    else:
        store.register(tmp_path, ["a"]).close()
    assert not any(store.files.exists(file) for file in old)
    assert store.files.exists("probe/young")
