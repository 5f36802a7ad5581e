"""The Prefect API of a run: the user's server if one is configured, else a child process of ours that lives as long as the run.

A run never depends on it: our own server that does not start, or any server that stops answering, is given up with one line on stderr
(`flows/tracking.py`), and the run goes on.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import secrets
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from e4s_models.weights import home
from flows.environment import Changes, changed_environment, direct
from flows.tracking import at_loss, begin, give_up, server_of_others
from tasks.graph import UsageError

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",  # errors are ours to tell, once
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_SERVER_LEVEL": "ERROR",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_API_REQUEST_TIMEOUT": "20",  # s; Prefect's own values wait for minutes, a command gives up instead
    "PREFECT_CLIENT_MAX_RETRIES": "0",
}
CONFIGURED_PATIENCE = 5.0  # s that a server which is just starting has before a run calls it missing
END_PATIENCE = 3.0  # s that our own server has to end in order


@contextmanager
def prefect_api(log: Path, patience: float = 180.0, server_home: Path | None = None) -> Iterator[str]:
    """Make `PREFECT_API_URL` point at a server that answers; yields the URL.

    Yields "" if our own server does not start within `patience` seconds: the run goes on without, and a line on stderr says so. Best before
    anything imports prefect, which reads its settings then; where it was imported, they are changed. `log` takes what our own server
    prints, `server_home` its database (default: `$E4S_HOME/prefect/VERSION`). Raises UsageError if a configured server does not answer.
    """
    begin()
    configured = configured_url()
    if configured:
        quiet = {name: os.environ.get(name, value) for name, value in QUIET.items()}
        with changed_environment({**quiet, **(direct() if _is_loopback(configured) else {})}), server_of_others():
            if not _answers_within(configured, CONFIGURED_PATIENCE):
                raise UsageError(
                    f"the Prefect server at {configured} does not answer; start it, or unset PREFECT_API_URL to let e4s run its own"
                )
            yield configured
        return
    # Databases of two versions of Prefect have different tables, and a newer one's stops an older Prefect.
    server_home = (server_home or home() / "prefect" / version("prefect")).absolute()
    settings = {
        **QUIET,
        **{name: value for name, value in os.environ.items() if name.startswith("PREFECT_LOGGING_")},
        "PREFECT_HOME": str(server_home),
        "PREFECT_API_AUTH_STRING": f"e4s:{secrets.token_urlsafe(24)}",  # other users of this machine are left out
    }
    foreign: Changes = dict.fromkeys(
        (name for name in os.environ if name.startswith("PREFECT_")), None
    )  # a user's settings are of another server
    with changed_environment({**foreign, **settings, **direct()}):
        child, url = _start(server_home, log, patience)
        if child is None:
            give_up(f"the run's own Prefect server did not start, see {log}")
            yield ""
            return
        try:
            with changed_environment({"PREFECT_API_URL": url}), _known_to_prefect(), at_loss(child.kill):
                yield url
        finally:
            _end(child)


def _start(server_home: Path, log: Path, patience: float) -> tuple[subprocess.Popen[bytes] | None, str]:
    """Start our own server; returns its process, None if it did not start, and its URL.

    One process at a time starts a server in a home: the first one makes or changes the database's tables.
    """
    deadline = time.monotonic() + patience
    server_home.mkdir(parents=True, exist_ok=True)
    with (server_home / ".start").open("ab") as lock, log.open("ab") as output:
        while not _locked(lock.fileno()):
            if time.monotonic() > deadline:
                return None, ""
            time.sleep(0.1)
        deadline = time.monotonic() + patience
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        url = f"http://127.0.0.1:{port}/api"
        server = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1"}
        server["PREFECT_SERVER_API_AUTH_STRING"] = os.environ["PREFECT_API_AUTH_STRING"]
        # -P and its own folder: neither modules nor settings (.env, prefect.toml) of the current folder are the server's. A session of its
        # own: Ctrl-C in the terminal reaches the run, which then ends the server in order.
        child = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("prefect_process.py")), str(port), str(os.getpid())],
            env={**os.environ, **server},
            cwd=server_home,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            while not answers(url, 2.0):
                if child.poll() is not None or time.monotonic() > deadline:
                    _end(child)
                    return None, ""
                time.sleep(0.1)
        except BaseException:
            _end(child)
            raise
    return child, url


def _locked(file: int) -> bool:
    """Try to lock a file until it is closed; a file system without locks does not hold a run up."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(END_PATIENCE)
    except subprocess.TimeoutExpired:  # it hangs, or is stopped
        child.kill()
        child.wait()


@contextmanager
def _known_to_prefect() -> Iterator[None]:
    """Let Prefect, if it is imported already, use the environment's API: the second run of a process has a server of its own."""
    if "prefect" not in sys.modules:
        yield
        return
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    with temporary_settings({setting: os.environ[setting.name] for setting in (PREFECT_API_URL, PREFECT_API_AUTH_STRING)}):
        yield


def configured_url() -> str | None:
    """The API URL that the user's environment or active Prefect profile names, found without importing prefect."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    profiles = Path(
        os.environ.get("PREFECT_PROFILES_PATH") or Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser() / "profiles.toml"
    )
    try:
        content = tomllib.loads(profiles.read_text("utf-8"))
    except (OSError, tomllib.TOMLDecodeError):
        return None
    active = os.environ.get("PREFECT_PROFILE") or content.get("active")
    url = content.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")
    return str(url) if url else None


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _answers_within(url: str, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while not answers(url, 10.0):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def answers(url: str, timeout: float) -> bool:
    """Return True if a Prefect server answers at a URL within `timeout` seconds."""
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if _is_loopback(url) else []))
    try:
        with opener.open(f"{url}/health", timeout=timeout) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError:
        return True  # it answers, if only that it wants a key, which Prefect's own client will bring
    except (urllib.error.URLError, OSError, ValueError):
        return False
