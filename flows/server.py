"""The Prefect API of a run: the user's server if one is configured, else a child process of ours that lives as long as the run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from e4s_models.weights import home
from tasks.graph import UsageError

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",  # errors are ours to tell, once
    "PREFECT_LOGGING_SERVER_LEVEL": "ERROR",
    "PREFECT_CLI_PROMPT": "false",
}


@contextmanager
def prefect_api(log: Path, patience: float = 180.0) -> Iterator[str]:
    """Make `PREFECT_API_URL` point at a server that answers; yields the URL.

    Best before anything imports prefect, which reads its settings then; where it was imported, they are changed. `log` takes what our own
    server prints. Raises UsageError if a configured server does not answer, or our own does not start within `patience` seconds.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    configured = configured_url()
    if configured:
        if not _answers(configured, 10.0):
            raise UsageError(
                f"the Prefect server at {configured} does not answer; start it, or unset PREFECT_API_URL to let e4s run its own"
            )
        yield configured
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    server_home = Path(os.environ.get("PREFECT_HOME") or home() / "prefect")
    server_home.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PREFECT_HOME": str(server_home), "PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1"}
    with log.open("ab") as output:
        # A session of its own: Ctrl-C in the terminal reaches the run, which then shuts the server down in order.
        command = [sys.executable, "-m", "flows.server", str(port), str(os.getpid())]
        child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    os.environ["PREFECT_API_URL"] = url
    for name in ("no_proxy", "NO_PROXY"):  # our own server is not behind anybody's proxy
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1")))
    os.environ["PREFECT_HOME"] = str(server_home)
    try:
        deadline = time.monotonic() + patience
        while not _answers(url, 2.0):
            if child.poll() is not None or time.monotonic() > deadline:
                raise UsageError(f"the run's own Prefect server did not start; see {log}, or set PREFECT_API_URL to one that runs")
            time.sleep(0.1)
        with _known_to_prefect(url):
            yield url
    finally:
        del os.environ["PREFECT_API_URL"]
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextmanager
def _known_to_prefect(url: str) -> Iterator[None]:
    """Let Prefect, if it is imported already, use this API: the second run of a process has a server of its own."""
    if "prefect" not in sys.modules:
        yield
        return
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: url}):
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


def _answers(url: str, timeout: float) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=timeout) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError:
        return True  # it answers, if only that it wants a key, which Prefect's own client will bring
    except (urllib.error.URLError, OSError, ValueError):
        return False


def _follow(parent: int) -> None:
    """End this process when its parent is gone, even if that was killed and could not say so."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


def _serve(port: int, parent: int) -> None:
    import uvicorn

    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    uvicorn.run("prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=port, log_level="error", lifespan="on")


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
