"""Which pictures there are: probed and hashed on threads, and not again while they are at rest.

`inputs.parquet` in the run folder remembers a file's sha256 with its size, times of change, inode and device. A file for which all of
these are the same is not read again: a write, copy or replacement changes the time of the inode's last change, which no program can set.
A file that changed less than `REST_SECONDS` before it was hashed is not remembered, since clocks of file systems are coarse.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from storage.parquet import read_parquet
from storage.spelling import near_path
from storage.store import write_atomic
from tasks.frame import Header, hash_file, read_header
from tasks.graph import Image, UsageError
from tasks.runner import cpu_threads
from tasks.stage import ItemError

REST_SECONDS = 2.0
_AT_ONCE = 64  # files that a thread looks at before it hands back
_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        *((name, pa.int64()) for name in ("size", "mtime_ns", "ctime_ns")),
        *((name, pa.uint64()) for name in ("inode", "device")),
        ("sha256", pa.string()),
        ("pixels", pa.int64()),
        ("reading", pa.string()),  # see `tasks.frame.Header`
    ]
)

Seen = tuple[int, int, int, int, int]
"""size, mtime_ns, ctime_ns, inode, device: what the file system says of a file."""

Known = tuple[Seen, str, int, str]
"""What the file system says of a file, its sha256, pixels and reading."""


def require_picture(path: str) -> None:
    """Raise UsageError if a picture that the command line names is not there: a mistyped path is the whole command's fault."""
    if not Path(path).exists():
        raise UsageError(f"{path}: no such picture{near_path(path)}; correct its path")


class Pictures:
    """The pictures of one run; what is known of them lies in `file`, which may be missing or damaged."""

    def __init__(self, file: Path, max_pixels: int, *, trust: bool = True, probe: Callable[[str, int], Header] = read_header) -> None:
        """`trust`: believe what is remembered of files at rest; else read all. `probe`: (path, max_pixels) -> the header."""
        self._file, self._max_pixels, self._probe = file, max_pixels, probe
        self._known: dict[str, Known] = _read(file) if trust else {}
        self._fresh: dict[str, Known] = {}

    def find(self, paths: Iterable[str]) -> dict[str, Image | str]:
        """Path -> its identity, or the sentence that says what is wrong with it."""
        wanted = sorted(set(paths))
        blocks = [wanted[start : start + _AT_ONCE] for start in range(0, len(wanted), _AT_ONCE)]
        with ThreadPoolExecutor(cpu_threads()) as threads:
            found = threads.map(lambda block: [self._find(path) for path in block], blocks)
            return {path: image for block, images in zip(blocks, found, strict=True) for path, image in zip(block, images, strict=True)}

    def remember(self) -> None:
        """Write down what was found, if it differs from what was known."""
        if self._fresh == self._known:
            return
        seen = list(zip(*(known[0] for known in self._fresh.values()), strict=True)) or [()] * 5
        rest = list(zip(*(known[1:] for known in self._fresh.values()), strict=True)) or [()] * 3
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_arrays([pa.array(c) for c in (list(self._fresh), *seen, *rest)], schema=_SCHEMA), buffer)
        write_atomic(self._file, buffer.getvalue())

    def _find(self, path: str) -> Image | str:
        try:
            path.encode()
        except UnicodeEncodeError:
            return f"{path.encode(errors='replace').decode()}: the file's name is not valid UTF-8; rename it"
        now, seen = time.time(), _seen(path)
        known = self._known.get(path)
        if known and known[0] == seen and known[2] <= self._max_pixels:
            self._fresh[path] = known
            return Image(path, known[1], pixels=known[2], reading=known[3])
        try:
            header = self._probe(path, self._max_pixels)
            image = Image(path, hash_file(path), pixels=header.height * header.width, reading=header.reading)
        except ItemError as error:
            return str(error)
        if seen and max(seen[1:3]) < (now - REST_SECONDS) * 1e9:
            self._fresh[path] = seen, image.sha256, image.pixels, image.reading
        return image


def _seen(path: str) -> Seen | None:
    try:
        facts = os.stat(path)  # noqa: PTH116 (a Path per file would double the time)
    except (OSError, ValueError):
        return None
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino, facts.st_dev


def _read(file: Path) -> dict[str, Known]:
    try:
        table = read_parquet(file.read_bytes(), _SCHEMA)
    except (OSError, pa.ArrowException):
        return {}
    paths, *seen, sha256s, pixels, readings = (column.to_pylist() for column in table.columns)
    if None in readings:
        return {}  # written by a version that did not tell them apart
    return dict(zip(paths, zip(zip(*seen, strict=True), sha256s, pixels, readings, strict=True), strict=True))
