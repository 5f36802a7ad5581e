"""Pruning: what was selected goes and is computed again; what a running run needs, and what others refer to, stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from storage import index as index_module
from storage import runs as runs_module
from storage.prune import Pruning, Selection, prune
from storage.store import Artifact, Finished, Store, StoreError

ROOT = Path(__file__).parents[2]
SHARED = np.full((4, 4), 7, np.uint8)


def publish(store: Store, *keys: str, stage: str = "swap", size: int = 30, shared: bool = False) -> list[Artifact]:
    """One publication: a noise picture of its own for each key (or the same one), and an array in a common file."""
    finished = []
    for key in keys:
        noise = np.random.default_rng(list(key.encode())).integers(0, 255, (size, size), np.uint8)
        finished.append(Finished(key, stage, {"face": ("image", SHARED if shared else noise), "point": ("array", np.array([len(key)]))}))
    return store.publish(finished)


def cut(store: Store, **selection: object) -> Pruning:
    """Prune for certain: what the dry run says is what happens."""
    before = everything(store)
    promised = prune(store, Selection(**selection), really=False)  # type: ignore[arg-type]
    assert everything(store) == before
    done = prune(store, Selection(**selection), really=True)  # type: ignore[arg-type]
    assert done == promised
    assert payload_bytes(store) == sum(before[file] for file in before if file.startswith("payload")) - done.freed
    for artifact in Store(store.url).all():
        store.check(artifact)
    return done


def everything(store: Store) -> dict[str, int]:
    return {entry.file: entry.size for folder in ("payload", "index") for entries in store.files.walk(folder) for entry in entries}


def payload_bytes(store: Store) -> int:
    return sum(entry.size for entries in store.files.walk("payload") for entry in entries)


def keys_of(store: Store) -> set[str]:
    return {artifact.key for artifact in Store(store.url).all()}


def test_a_stage_is_pruned_and_leaves_a_trace(store: Store) -> None:
    publish(store, "a", "b", stage="align")
    publish(store, "c", "d")
    done = cut(store, stages=["swap"])
    assert done.artifacts == {"swap": 2}
    assert done.files == 3
    assert keys_of(store) == {"a", "b"}
    assert store.find(["a", "c", "never"]).cancelled == {"c": "pruned"}
    publish(store, "c")  # computed again when needed
    assert keys_of(store) == {"a", "b", "c"}
    assert store.find(["c", "d"]).cancelled == {"d": "pruned"}


def test_payload_that_others_refer_to_stays(store: Store) -> None:
    publish(store, "a", shared=True)
    publish(store, "b", shared=True, stage="blend")
    publish(store, "c", "d", stage="mesh")  # their arrays share a file
    assert cut(store, stages=["swap"]).files == 1  # its array's file; the picture is also b's
    assert keys_of(store) == {"b", "c", "d"}
    assert cut(store, stages=["blend"]).files == 2


def test_every_entry_of_a_key_goes(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    publish(store, "a")
    publish(store, "a", size=20)
    assert cut(store, stages=["swap"]).artifacts == {"swap": 1}
    assert keys_of(store) == set()


def test_failures_only(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    publish(store, "a", "b")
    store.publish([Finished("f", "align", reason="no face found")])
    assert cut(store, failed=True).artifacts == {"align": 1}
    assert keys_of(store) == {"a", "b"}


def test_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    monkeypatch.setattr(index_module.time, "time_ns", lambda: int((time.time() - 40 * 86400) * 1e9))
    publish(store, "old")
    monkeypatch.undo()
    publish(store, "new")
    store.compact()
    assert cut(store, older_than=30 * 86400.0).artifacts == {"swap": 1}
    assert keys_of(store) == {"new"}


def test_size_budget_takes_the_least_recently_made_first(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for key in ("first", "second", "third", "fourth"):
        publish(store, key, size=100)
    each = payload_bytes(store) // 4
    assert cut(store, max_size=5 * each).artifacts == {}
    done = cut(store, max_size=2 * each + each // 2)
    assert keys_of(store) == {"third", "fourth"}
    assert done.kept_bytes == payload_bytes(store) <= 2 * each + each // 2
    assert cut(store, max_size=0).kept_bytes == 0


def test_a_shared_file_frees_its_room_only_with_the_last_that_refers_to_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    publish(store, "a", shared=True)
    publish(store, "b", size=60)
    publish(store, "c", shared=True)
    wanted = payload_bytes(store) - 4000  # more than a's own array: b's picture must go too
    assert cut(store, max_size=wanted).kept_bytes <= wanted
    assert keys_of(store) == {"c"}


def test_only_what_no_other_run_uses(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    publish(store, "mine")
    publish(store, "common")
    publish(store, "theirs")
    for name, keys in (("one", ["mine", "common"]), ("two", ["common", "theirs"])):
        (tmp_path / name).mkdir()
        store.register(tmp_path / name, keys).close()
    one, _ = store.runs.registered()
    assert Path(one.path).name == "one"
    assert cut(store, run=one).artifacts == {"swap": 1}
    assert keys_of(store) == {"common", "theirs"}
    (two,) = store.runs.registered()  # the other is forgotten
    assert cut(store, run=two, shared_too=True).artifacts == {"swap": 2}


def test_what_a_running_run_needs_is_spared(store: Store, tmp_path: Path) -> None:
    publish(store, "a")
    publish(store, "b")
    with store.register(tmp_path, ["a", "not made yet"]):
        done = prune(store, Selection(stages=["swap"]), really=True)
        assert (done.artifacts, done.spared) == ({"swap": 1}, 1)
        assert (done.files, done.waiting) == (0, 2)  # a running run might be about to use the files of the other
        assert keys_of(store) == {"a"}
    assert cut(store, stages=["swap"]).artifacts == {"swap": 1}


LIVE = """
import sys, time
from pathlib import Path
from storage.store import Store
lease = Store(sys.argv[1]).register(Path(sys.argv[2]), ["a"])
print("registered", flush=True)
time.sleep(120)
"""


def test_a_killed_run_is_not_running(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    publish(store, "a")
    process = subprocess.Popen([sys.executable, "-c", LIVE, store.url, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline() == "registered\n"
        assert [run.live for run in store.runs.registered()] == [True]
        assert prune(store, Selection(stages=["swap"]), really=True).spared == 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [run.live for run in store.runs.registered()] == [False]
    assert cut(store, stages=["swap"]).artifacts == {"swap": 1}


def test_a_lease_from_elsewhere_counts_while_it_is_young(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = store.register(tmp_path, ["a"])
    (run,) = store.runs.registered()
    file = f"runs/{run.id}/lease.json"
    store.files.write(file, json.dumps({**json.loads(store.files.read(file)), "host": "elsewhere"}).encode())
    assert [one.live for one in store.runs.registered()] == [True]
    monkeypatch.setattr(runs_module, "LEASE_SECONDS", -2.0)
    assert [one.live for one in store.runs.registered()] == [False]
    lease.close()


def test_a_lease_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module, "LEASE_SECONDS", 0.08)
    store = Store(str(tmp_path / "store"))
    with store.register(tmp_path, ["a"]):
        (file,) = (tmp_path / "store" / "runs").glob("*/lease.json")
        os.utime(file, (1, 1))
        deadline = time.monotonic() + 30
        while file.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert file.stat().st_mtime > 2
    assert not file.exists()


def test_a_run_that_starts_waits_for_the_prune(store: Store, tmp_path: Path) -> None:
    publish(store, "a")
    registered = threading.Event()

    def start() -> None:
        with Store(store.url).register(tmp_path, ["a"]):
            registered.set()

    thread = threading.Thread(target=start)
    with store.runs.pruning():
        thread.start()
        while not store.runs.registered():
            time.sleep(0.05)
        assert not registered.wait(0.3)
        with pytest.raises(StoreError, match="is pruning it"):
            prune(Store(store.url), Selection(stages=["swap"]), really=True)
    assert registered.wait(60)
    thread.join()


def test_a_copied_run_folder_is_another_run_and_a_moved_one_the_same(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    (tmp_path / "run").mkdir()
    store.register(tmp_path / "run", ["a"]).close()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    store.register(tmp_path / "copy", ["b"]).close()
    assert [Path(run.path).name for run in store.runs.registered()] == ["copy", "run"]
    (tmp_path / "run").rename(tmp_path / "moved")
    store.register(tmp_path / "moved", ["a", "c"]).close()
    assert [Path(run.path).name for run in store.runs.registered()] == ["copy", "moved"]
    assert set(store.runs.keys(store.runs.registered()).to_pylist()) == {"a", "b", "c"}


def test_what_crashed_writers_left_goes_when_it_is_old(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    (artifact,) = publish(store, "a")
    left = [tmp_path / "payload/ab/abc.png", tmp_path / "payload/ab/.abc.png.7.x.tmp", tmp_path / "index/.part.parquet.7.x.tmp"]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"12345")
    part = tmp_path / "index" / "00000000000000000001-0123456789abcdef-01234567.parquet"
    part.write_bytes(b"")  # emptied by a power loss
    young = prune(store, Selection(), really=True)
    assert (young.left, young.waiting) == (0, 4)
    for path in (*left, part, tmp_path / artifact.payloads["face"].file):
        os.utime(path, (1, 1))
    done = prune(store, Selection(), really=True)
    assert (done.artifacts, done.left, done.left_bytes) == ({}, 4, 15)
    assert not any(path.exists() for path in (*left, part))
    store.check(artifact)


def test_killed_while_pruning_the_next_prune_finishes(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    publish(store, "a")
    publish(store, "b", stage="blend")
    code = (
        "import sys, storage.prune as p\nfrom storage.store import Store\nimport os, signal\n"
        "p._remove = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "p.prune(Store(sys.argv[1]), p.Selection(stages=['swap']), really=True)"
    )
    done = subprocess.run([sys.executable, "-c", code, store.url], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert keys_of(store) == {"b"}
    assert payload_bytes(store) > 0
    left = prune(store, Selection(), really=True, grace=-5.0)  # as if an hour had passed; the dead one's claim does not count
    assert left.left == 2
    assert cut(store, stages=["blend"]).kept_bytes == 0


def test_a_file_made_young_after_the_listing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    publish(store, "a")
    cancel = store.index.cancel

    def meanwhile(entries: object, kind: str) -> None:
        cancel(entries, kind)
        publish(Store(store.url), "b", shared=False)
        (tmp_path / picture).touch()

    picture = store.all()[0].payloads["face"].file
    os.utime(tmp_path / picture, (1, 1))
    monkeypatch.setattr(store.index, "cancel", meanwhile)
    prune(store, Selection(stages=["swap"]), really=True)
    assert (tmp_path / picture).exists()


def test_unused_is_what_no_plan_names_any_more(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    publish(store, "before", "both", "after", "other")
    first, second = tmp_path / "first", tmp_path / "second"
    for run, keys in ((first, ["before", "both"]), (second, ["other"])):
        run.mkdir()
        store.register(run, keys).close()
    assert keys_of(store) - {"after"} == set(store.runs.keys(store.runs.registered()).to_pylist())
    store.register(first, ["both", "after"]).close()  # with a changed setting
    assert cut(store, unused=True).artifacts == {"swap": 1}
    assert keys_of(store) == {"both", "after", "other"}
    (keys_file,) = (tmp_path / "store/runs").glob(f"{(second / '.run-id').read_text()}*/keys-*")
    keys_file.write_bytes(b"cut")
    with pytest.raises(StoreError, match=r"the list of what .*second uses is damaged; repeat that run's command"):
        prune(store, Selection(unused=True), really=True)
    assert keys_of(store) == {"both", "after", "other"}


def test_keys_of_an_unfolding_plan_stay_while_it_goes_on(tmp_path: Path) -> None:
    store, run = Store(str(tmp_path / "store")), tmp_path / "run"
    run.mkdir()

    def used(*keys: str, more: tuple[str, ...] = ()) -> set[str]:
        with store.register(run, keys, unfolding=True):
            store.runs.extend(run, more)
        return set(store.runs.keys(store.runs.registered()).to_pylist())

    assert used("video 1", more=("detect 1",)) == {"detect 1", "video 1"}
    assert used("video 1", "video 2") == {"detect 1", "video 1", "video 2"}  # killed, or another video was added
    run = run.rename(tmp_path / "moved")
    assert used("video 1", "video 2") == {"detect 1", "video 1", "video 2"}
    assert used("video 1 with other settings") == {"video 1 with other settings"}
