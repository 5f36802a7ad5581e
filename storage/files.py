"""Files under a URL that fsspec knows: errors as sentences, passing ones tried again, whole files only, durable when asked for."""

from __future__ import annotations

import errno
import os
import re
import sys
import uuid
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import tenacity
from fsspec.implementations.local import LocalFileSystem

from storage.faults import fault_point

_PASSWORD = re.compile(r"(://[^/@:]*):(?!\d*(?:/|$))[^@]*@")  # what follows the colon is no port
RETRY_SECONDS = 60.0  # how long a lost store is tried again; E4S_STORE_RETRY_SECONDS replaces it
_LASTING = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_PASSING_ERRNO = {
    errno.EIO,
    errno.EAGAIN,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# By name, so that no cloud library is imported here: what botocore raises for want of credentials, and for a malformed request.
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound", "NoAuthTokenError"}
_MALFORMED = {"ParamValidationError", "InvalidRegionError", "ParamValidationException", "InvalidEndpointConfigurationError"}

T = TypeVar("T")


class StoreError(Exception):
    """The store cannot be used: the sentence says why and what to do."""


@dataclass(frozen=True)
class Entry:
    """A file as listed."""

    file: str  # relative to the root
    size: int  # bytes
    modified: float  # s since the epoch by the store's clock

    @property
    def name(self) -> str:
        return self.file.rsplit("/", 1)[-1]


class Files:
    """The files of one store, named relative to its root. FileNotFoundError and a full disk pass as they are; the rest is a StoreError.

    Errors that may pass (a lost network, a server that does not answer) are tried again with growing pauses. Listings are always fresh.
    """

    def __init__(self, url: str) -> None:
        self.url = url = store_url(url)
        try:
            self.fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise StoreError(f"store {url}: {error}; give a folder, or a URL whose fsspec package is installed") from None
        except Exception as error:  # a cloud library's own
            raise self._sentence(error, "opened") from None
        self.root = str(root).rstrip("/")
        self.local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def path(self, file: str) -> str:
        """Where a file lies. Raises StoreError for one that an index names outside of the store."""
        if ".." in file.split("/"):
            raise StoreError(f"store {self.url}: {file!r} would be outside of it; `e4s cache prune --stage` removes what names it")
        return f"{self.root}/{file}"

    def read(self, file: str) -> bytes:
        return bytes(self._call("read", self.fs.cat_file, self.path(file)))

    def size(self, file: str) -> int:
        """Bytes of a file; -1 if it is not there."""
        try:
            return int(self._call("read", self.fs.size, self.path(file)))
        except FileNotFoundError:
            return -1

    def exists(self, file: str) -> bool:
        return bool(self._call("read", self.fs.exists, self.path(file)))

    def entries(self, folder: str) -> list[Entry]:
        """The files right in a folder, by name; none if there is no such folder."""
        return self._list(folder)[0]

    def folders(self, folder: str) -> list[str]:
        """The folders right in a folder, by name."""
        return self._list(folder)[1]

    def walk(self, folder: str) -> Iterator[list[Entry]]:
        """All files below a folder, a list per folder."""
        entries, folders = self._list(folder)
        yield entries
        for inner in folders:
            yield from self.walk(inner)

    def _list(self, folder: str) -> tuple[list[Entry], list[str]]:
        try:
            found = self._call("listed", self.fs.ls, self.path(folder), detail=True)
        except FileNotFoundError:
            return [], []
        entries = [self._entry(info) for info in found if info["type"] == "file"]
        folders = [f"{folder}/{info['name'].rstrip('/').rsplit('/', 1)[-1]}" for info in found if info["type"] == "directory"]
        return sorted(entries, key=lambda entry: entry.file), sorted(folders)

    def write(self, file: str, data: bytes, *, durable: bool = False) -> None:
        """Publish a whole file: under a temporary name first where files can be renamed; object stores publish whole objects."""
        try:
            if self.local:
                self._call("written", partial(write_atomic, durable=durable), Path(self.path(file)), data)
                if durable:
                    self._call("written", sync_path, Path(self.root))
            else:
                self._call("written", self.fs.pipe_file, self.path(file), data)
        except FileNotFoundError as error:
            raise StoreError(f"store {self.url}: {error}; create the bucket or folder, or correct the URL") from None

    def touch(self, file: str) -> bool:
        """Make a file of a local store as young as one just written; False if it is gone."""
        try:
            self._call("written", os.utime, self.path(file))
        except FileNotFoundError:
            return False
        return True

    def sync(self, files: Collection[str]) -> None:
        """Force files, and the folders that name them, to the disk, many at once; object stores have done so already."""
        if not self.local:
            return
        paths = {Path(self.path(file)) for file in files}
        folders = {folder for path in paths for folder in path.parents if folder.is_relative_to(self.root)}
        with ThreadPoolExecutor(8, "e4s-sync") as threads:  # a journal takes several at once: a third of the time of one after the other
            for group in (paths, folders):
                list(threads.map(partial(self._call, "written", sync_path), sorted(group)))

    def remove(self, files: Collection[str]) -> None:
        """Remove files; those that are gone already do not matter."""
        if not files:
            return
        if self.local:
            for file in files:
                self._call("removed", partial(Path.unlink, missing_ok=True), Path(self.path(file)))
            return
        try:
            self._call("removed", self.fs.rm, [self.path(file) for file in files])
        except FileNotFoundError:  # one of them is gone: one by one, then
            for file in files:
                try:
                    self._call("removed", self.fs.rm, self.path(file))
                except FileNotFoundError:
                    continue

    def remove_folder(self, folder: str) -> None:
        """Remove the files right in a folder, and the folder itself where there are folders and nothing else is in it."""
        self.remove([entry.file for entry in self.entries(folder)])
        if self.local:
            with suppress(OSError):  # others may have written there meanwhile
                Path(self.path(folder)).rmdir()

    def _entry(self, info: dict[str, Any]) -> Entry:
        name = str(info["name"])
        prefix = f"{self.root}/"
        file = name.removeprefix(prefix) if name.startswith(prefix) else name.lstrip("/").removeprefix(prefix.lstrip("/"))
        when = next((info[field] for field in ("mtime", "LastModified", "last_modified", "updated", "created") if info.get(field)), 0.0)
        return Entry(file, int(info["size"] or 0), when.timestamp() if isinstance(when, datetime) else float(when))

    def _call(self, done: str, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Call, and again while the error may pass; then one sentence."""
        limit = float(os.environ.get("E4S_STORE_RETRY_SECONDS", RETRY_SECONDS))
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._passes),
            wait=tenacity.wait_exponential(multiplier=0.25, max=10),
            stop=tenacity.stop_after_delay(limit),
            before_sleep=partial(self._announce, limit),
            reraise=True,
        )
        try:
            return retrying(call, *arguments, **options)
        except (FileNotFoundError, StoreError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise
            raise self._sentence(error, done) from error

    def _passes(self, error: BaseException) -> bool:
        if isinstance(error, _LASTING) or type(error).__name__ in _NO_CREDENTIALS | _MALFORMED:
            return False
        if isinstance(error, (ConnectionError, TimeoutError)):
            return True
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno in _PASSING_ERRNO
        return not self.local and isinstance(error, Exception)

    def _announce(self, limit: float, state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome:
            print(f"e4s: store {self.url}: {_reason(state.outcome.exception())}; trying again for {limit:.0f} s", file=sys.stderr)

    def _sentence(self, error: Exception, done: str) -> StoreError:
        reason = _reason(error)
        if type(error).__name__ in _NO_CREDENTIALS:
            return StoreError(
                f"store {self.url}: no credentials ({reason}); set those of its service (for s3: AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE), then repeat the command"
            )
        if isinstance(error, PermissionError):
            return StoreError(
                f"store {self.url}: no permission, it cannot be {done} ({reason}); change its rights or choose another --store"
            )
        if isinstance(error, (NotADirectoryError, FileExistsError, IsADirectoryError)):
            return StoreError(f"store {self.url}: a file stands where a folder should be ({reason}); choose another --store")
        if self._passes(error):
            return StoreError(
                f"store {self.url}: lost, it cannot be {done} ({reason}); when it is back, repeat the command: nothing finished is lost"
            )
        return StoreError(f"store {self.url}: it cannot be {done} ({reason}); correct the URL or choose another --store")


def store_url(text: str) -> str:
    """A store's folder or URL as it can be saved and shown: a folder with its absolute path, and no password in a URL. Raises StoreError.

    A password would be in messages, run.json and the parameters that Prefect keeps; fsspec takes it from the environment.
    """
    if _PASSWORD.search(text):
        kind, shown = text[: text.index("://")].rpartition(":")[2].upper(), _PASSWORD.sub(r"\1:***@", text)
        raise StoreError(
            f"store {shown}: a password in a URL would be saved and shown; leave it out and set FSSPEC_{kind}_PASSWORD (docs/store.md)"
        )
    is_url = "://" in text or "::" in text
    if not text or (is_url and not text.startswith(("file://", "local://"))):
        return text
    return str(LocalFileSystem._strip_protocol(text))


def write_atomic(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write under a temporary name in the same folder, then rename: a reader sees the old file or the whole new one.

    With `durable` so does a reader after a power loss, and what was written is there to stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data[: len(data) // 2])
            fault_point("mid-write")
            file.write(data[len(data) // 2 :])
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_path(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException | None) -> str:
    return " ".join(str(error).split()) or type(error).__name__
