"""Stores that cannot be opened, written or reached, full disks, and writes that must outlast a power loss."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage import files as files_module
from storage.files import Files, write_atomic
from storage.store import Finished, Store, StoreError

ROOT = Path(__file__).parents[2]
IMAGE = np.zeros((2, 2), np.uint8)


def publish(store: Store, key: str = "k") -> None:
    store.publish([Finished(key, "align", {"face": ("image", IMAGE), "point": ("array", np.ones(3))})])


def test_an_unknown_kind_of_store() -> None:
    with pytest.raises(StoreError, match=r"store foo://bucket/store: .*foo"):
        Store("foo://bucket/store")


def test_a_file_where_the_store_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(str(tmp_path / "file"))
    with pytest.raises(StoreError, match="a file stands where a folder should be"):
        publish(store)


def test_no_permission_to_write(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom tests.storage.test_files import publish\nfrom storage.store import Store\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "publish(Store(sys.argv[1]))"
    )
    (tmp_path / "store").mkdir(mode=0o500)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "store")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "StoreError" in done.stderr.splitlines()[-1]
    assert "no permission, it cannot be written" in done.stderr.splitlines()[-1]


def test_missing_credentials(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(StoreError, match=r"no credentials .*AWS_ACCESS_KEY_ID"):
        Store("s3://bucket/other").lookup(["k"])
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_bucket_that_does_not_exist(s3_server: str) -> None:
    with pytest.raises(StoreError, match=r"s3://nosuch/store: .*bucket does not exist; create the bucket"):
        publish(Store("s3://nosuch/store"))


def test_a_lost_server_is_tried_again_and_comes_back(s3_server: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    store = Store("s3://bucket/lost")
    publish(store)
    whole, calls = store.files.fs.cat_file, []

    def lost(path: str) -> bytes:
        calls.append(path)
        if len(calls) < 3:
            raise ConnectionResetError("connection reset by peer")
        return bytes(whole(path))

    monkeypatch.setattr(store.files.fs, "cat_file", lost)
    assert store.lookup(["k"]).keys() == {"k"}
    assert len(calls) == 3
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("e4s:")]
    assert told == ["e4s: store s3://bucket/lost: connection reset by peer; trying again for 60 s"]


def test_a_server_that_stays_away_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E4S_STORE_RETRY_SECONDS", "0.5")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    import fsspec
    import s3fs

    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with pytest.raises(StoreError, match=r"s3://bucket/away: lost, it cannot be listed .*nothing finished is lost"):
        Store("s3://bucket/away").lookup(["k"])
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (OSError(errno.ESTALE, "stale file handle"), 3),
        (TimeoutError("timed out"), 3),
        (OSError(errno.ENOSPC, "no space left on device"), 1),
        (OSError(errno.EROFS, "read-only file system"), 1),
        (PermissionError(errno.EACCES, "permission denied"), 1),
    ],
)
def test_only_errors_that_may_pass_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, calls: int) -> None:
    files = Files(str(tmp_path))
    seen = []

    def fail(path: Path, data: bytes, *, durable: bool) -> None:
        seen.append(path)
        if len(seen) < 3:
            raise error
        write_atomic(path, data, durable=durable)

    monkeypatch.setattr(files_module, "write_atomic", fail)
    if calls == 3:
        files.write("file", b"data")
        assert files.read("file") == b"data"
    elif error.errno == errno.ENOSPC:
        with pytest.raises(OSError, match="no space left") as raised:
            files.write("file", b"data")
        assert raised.value.errno == errno.ENOSPC  # the runner makes a sentence of it
    else:
        with pytest.raises(StoreError, match=str(error.strerror)):
            files.write("file", b"data")
    assert len(seen) == calls


FULL = """
import errno, sys
from pathlib import Path
import numpy as np
from storage.store import Finished, Store
root = Path(sys.argv[1])
store, published = Store(str(root / "store")), 0
ballast = root / "ballast"
ballast.write_bytes(bytes(100_000))
noise = np.random.default_rng(0)
try:
    while True:
        values = {"face": ("image", noise.integers(0, 255, (150, 150), np.uint8)), "points": ("array", noise.random(2000))}
        store.publish([Finished(str(published), "align", values)])
        published += 1
except OSError as error:
    assert error.errno == errno.ENOSPC, error
assert published > 3
assert not list(root.rglob("*.tmp"))
assert Store(store.url).lookup([str(n) for n in range(published + 1)]).keys() == {str(n) for n in range(published)}
for artifact in store.all():
    store.check(artifact)
ballast.unlink()
store.publish([Finished(str(published), "align", {"face": ("image", np.zeros((2, 2), np.uint8))})])
assert len(Store(store.url).all()) == published + 1
print("whole")
"""


def test_a_disk_that_fills_up_in_the_middle_of_a_publication(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec {sys.executable} -c '{FULL}' {tmp_path}"
    command = ["unshare", "--mount", "--user", "--map-root-user", "bash", "-c", mount]
    if subprocess.run([*command[:-1], f"mount -t tmpfs tmpfs {tmp_path}"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no mount namespace, so no small disk can be made")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "whole\n", done.stderr


def test_payloads_and_their_folders_are_on_disk_before_the_index_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    replace, fsync = Path.replace, os.fsync

    def spy_replace(path: Path, target: Path) -> Path:
        events.append(("publish", str(target)))
        return replace(path, target)

    def spy_fsync(descriptor: int) -> None:
        events.append(("sync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    monkeypatch.setattr(Path, "replace", spy_replace)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    store = Store(str(tmp_path / "store"))
    publish(store)
    (artifact,) = store.all()
    index = tmp_path / "store" / "index" / artifact.part
    at = events.index(("publish", str(index)))
    payloads = {tmp_path / "store" / payload.file for payload in artifact.payloads.values()}
    before = {path for kind, path in events[:at] if kind == "sync"}
    assert before >= {str(path) for path in payloads} | {str(path.parent) for path in payloads} | {str(tmp_path / "store" / "payload")}
    assert any(kind == "sync" and Path(path).name.startswith(f".{index.name}") for kind, path in events[:at])  # the part's own bytes
    assert ("sync", str(index.parent)) in events[at:]


def test_a_reused_payload_is_forced_to_disk_too_and_young_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    publish(store, "a")
    (path,) = (tmp_path / "payload").rglob("*.png")
    os.utime(path, (1, 1))
    synced: list[Path] = []
    monkeypatch.setattr(files_module, "sync_path", synced.append)
    publish(store, "b")
    assert path in synced
    assert path.stat().st_mtime > time.time() - 60


def test_a_payload_removed_while_it_is_used_again_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    publish(store, "a")
    (path,) = (tmp_path / "payload").rglob("*.png")
    sync, lock = store.files.sync, threading.Lock()

    def race(files: set[str]) -> None:
        if lock.acquire(blocking=False):
            path.unlink()
        sync(files)

    monkeypatch.setattr(store.files, "sync", race)
    publish(store, "b")
    store.check(store.lookup(["b"])["b"])
