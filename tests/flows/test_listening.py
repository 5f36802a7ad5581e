"""Nothing listens beyond this machine unless asked, and what listens on it is not for every user of it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from distributed import Client

from benchmarks.cheap import make_inputs
from flows.execution.worker_pool import LocalDaskCluster, is_open_to_others
from storage.run import RunFolder

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/cluster.md").read_text("utf-8")


def listening(process: psutil.Process) -> set[str]:
    """Addresses on which a process and those that it started accept connections."""
    found = set()
    for each in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            found |= {c.laddr.ip for c in each.net_connections("inet") if c.status == psutil.CONN_LISTEN or (c.type == 2 and not c.raddr)}
    return found


def test_processes_of_an_own_cluster_listen_on_loopback_and_to_their_own_only() -> None:
    cluster = LocalDaskCluster(2, "cpu")
    try:
        with Client(cluster.cluster.scheduler_address, security=cluster.security, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
            assert client.submit(sum, (1, 2)).result() == 3
            assert listening(psutil.Process()) == {"127.0.0.1"}
            addresses = [cluster.cluster.scheduler_address, *client.scheduler_info()["workers"]]
        assert {address.partition(":")[0] for address in addresses} == {"tls"}
        for address in addresses:  # another user of this machine has no certificate
            with pytest.raises((OSError, TypeError)):
                Client(address.replace("tls://", "tcp://"), timeout=2, set_as_default=False)
    finally:
        cluster.close()


@pytest.mark.parametrize(
    ("address", "is_open"),
    [
        ("tcp://127.0.0.1:8786", False),
        ("tcp://127.9.9.9:8786", False),
        ("tcp://[::1]:8786", False),
        ("tcp://localhost:8786", False),
        ("tls://192.0.2.7:8786", False),
        ("tcp://192.0.2.7:8786", True),
        ("tcp://[2001:db8::7]:8786", True),
        ("tcp://machine-a:8786", True),
    ],
)
def test_what_is_open_to_others(address: str, is_open: bool) -> None:
    assert is_open_to_others(address) == is_open


def documented_commands(section: str) -> list[str]:
    """Return the shell lines below the heading `## section` of docs/cluster.md."""
    body = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert body
    return [line for block in re.findall(r"^```sh\n(.*?)^```", body[1], re.M | re.S) for line in block.splitlines()]


def test_a_command_in_a_hostile_folder(tmp_path: Path) -> None:
    """Own Prefect server and Dask workers of a real command listen on loopback only, whatever the user's folder and variables hold.

    The folder has modules with the names of ours and of Python's own, and settings for Prefect; the variables name another database of
    Prefect and proxies that do not answer.
    """
    manifest, profile = make_inputs(tmp_path / "inputs", 6)
    folder, run = tmp_path / "home", tmp_path / "run"
    (folder / "flows").mkdir(parents=True)
    for name in ("flows/__init__.py", "tasks.py", "storage.py", "queue.py", "signal.py", "uvicorn.py"):
        (folder / name).write_text("raise RuntimeError('a module of the user')\n")
    database = "sqlite+aiosqlite:////nowhere/prefect.db"
    (folder / ".env").write_text(f"PREFECT_SERVER_DATABASE_CONNECTION_URL={database}\n")
    foreign = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database, "PREFECT_HOME": "/nowhere", "PREFECT_SERVER_API_HOST": "0.0.0.0"}
    proxies = {"ALL_PROXY": "socks5://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    # -P: the command of an installed e4s does not look for modules in the current folder.
    command = [sys.executable, "-P", "-m", "flows.cli", "pairs", manifest, "--run", str(run), "--profile", profile, "--chunk", "2"]
    process = psutil.Popen(
        [*command, "--device", "cpu", "--dask", "local:2", "--set", "swap.seconds=0.5", "--no-report"],
        cwd=folder,
        env={**os.environ, **foreign, **proxies, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    addresses, refused = set[str](), set[int]()
    while process.poll() is None:
        addresses |= listening(process)
        if not refused and any(event["event"] == "stage" for event in RunFolder(run).read_log()):
            refused = {status_without_key(port) for port in ports(process, "prefect_process")}
        time.sleep(0.2)
    printed = process.communicate()[0]
    assert process.returncode == 0, printed
    assert "without Prefect" not in printed
    assert "Traceback" not in printed
    assert addresses == {"127.0.0.1"}
    assert refused == {401}  # another user of this machine has no key


def ports(process: psutil.Process, name: str) -> set[int]:
    """Ports on which those child processes listen that have a name in their command line."""
    children = [child for child in process.children() if any(name in word for word in child.cmdline())]
    return {c.laddr.port for child in children for c in child.net_connections("inet") if c.status == psutil.CONN_LISTEN}


def status_without_key(port: int) -> int:
    """Return the HTTP status of a question to a Prefect server by somebody who does not know its key."""
    question = urllib.request.Request(f"http://127.0.0.1:{port}/api/flow_runs/filter", b"{}", {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(question, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow  # seven processes
def test_an_encrypted_cluster_as_its_section_says(tmp_path: Path) -> None:
    """Own CA, a scheduler, two workers and a run, typed as docs/cluster.md has them."""
    manifest, profile = make_inputs(tmp_path, 6)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = tmp_path / "runs/night"
    lines = documented_commands("Encrypted and closed to others")
    typed = "\n".join(lines).replace("//A:8786", f"//127.0.0.1:{port}").replace("--host A", "--host 127.0.0.1")
    typed = typed.replace("--port 8786", f"--port {port}").replace("runs/people", manifest)
    both = f"from distributed import Client; Client('tls://127.0.0.1:{port}', timeout=60).wait_for_workers(2, timeout=60)"
    head, _, command = typed.rpartition("\n")  # workers start one after the other: the command comes when both are there
    script = "set -e\n" + 'dask() { python -m dask "$@"; }\ne4s() { python -m flows.cli "$@"; }\n'
    script += f'{head}\npython -c "{both}"\n{command} --profile {profile} --chunk 1 --device cpu --no-report --set swap.seconds=0.3\n'
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    shell = subprocess.Popen(
        ["bash", "-c", script], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        assert shell.stdout
        # The cluster goes on after the command: the output is read line by line until the command's last one.
        printed = []
        for line in shell.stdout:
            printed.append(line.decode())
            if "outputs:" in printed[-1]:
                break
        assert printed and "outputs:" in printed[-1], "".join(printed)
        assert "neither encrypted" not in "".join(printed)
        workers = {event["worker"] for event in RunFolder(run).read_log() if event["event"] == "stage"}
        assert workers == {"one", "two"}
        assert {row.status for row in RunFolder(run).read_rows()} == {"done"}
        with pytest.raises((OSError, TypeError)):  # without the certificate
            Client(f"tcp://127.0.0.1:{port}", timeout=2, set_as_default=False)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
