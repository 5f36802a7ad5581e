"""The run's own Prefect server: who uses it, and how long it lives."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TWO_RUNS = """
import os
import sys
import time
from pathlib import Path
from flows.server import prefect_api
for number in range(2):
    with prefect_api(Path(sys.argv[1]) / f"{number}.log", patience=900) as url:
        os.environ["PREFECT_CLIENT_MAX_RETRIES"] = "20"  # a flow of Prefect's alone: a busy server may answer 503
        from prefect import flow, task
        from prefect.client.orchestration import get_client

        @flow
        def named() -> str:
            return "ran"

        assert named() == "ran"
        with get_client(sync_client=True) as client:
            assert str(client.api_url).rstrip("/") == url, (str(client.api_url), url)
            assert len(client.read_flow_runs()) == number + 1  # one database, a server each
"""


def test_a_second_run_in_one_process_uses_its_own_server(tmp_path: Path) -> None:
    environment = {**os.environ, "E4S_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", TWO_RUNS, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


LOSSES = """
import signal, sys, time
from pathlib import Path
import psutil
from flows import tracking
from flows.server import prefect_api
tracking.CHECK_EVERY = tracking.CHECK_TIMEOUT = 0.5

def lose(kind, when):
    with prefect_api(Path(sys.argv[1]) / "prefect.log"):
        from prefect import flow
        from flows.step import run_flow, run_step, tracked
        (server,) = [child for child in psutil.Process().children() if any("prefect_process" in word for word in child.cmdline())]
        done = []

        def work():
            for number in range(12):
                run_step("align", f"align of chunk {number}", lambda: done.append(number))
                if number == when:
                    server.send_signal(kind)
                    time.sleep(2.5)
            return len(done)

        once = tracking.Once(work)

        @flow
        def pairs():
            with tracked():
                return once()

        if when < 0:
            server.send_signal(kind)
        assert run_flow(pairs, once) == 12 == len(done)
    print(kind.name, when, flush=True)

lose(signal.SIGSTOP, 3)
lose(signal.SIGKILL, -1)
"""


def test_a_run_goes_on_without_a_server_that_is_lost(tmp_path: Path) -> None:
    """Stopped in the middle, and killed before the flow begins; `benchmarks.soak_prefect` has the other ways under real commands."""
    done = subprocess.run([sys.executable, "-c", LOSSES, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["SIGSTOP 3", "SIGKILL -1"], done.stderr[-3000:]
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr[-3000:]
    assert all("e4s: the run goes on without Prefect, which shows no more of it (" in line for line in lines)


ONE_RUN = """
import sys
import time
from pathlib import Path
from flows.server import prefect_api
with prefect_api(Path(sys.argv[1]), patience=900):
    from prefect import flow

    @flow
    def named() -> str:
        return "ran"

    print(named())
"""


def test_runs_that_start_together_in_a_fresh_home(tmp_path: Path) -> None:
    """Three at once: the database's tables are made by one of them."""
    environment = {**os.environ, "E4S_HOME": str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_RUN, str(tmp_path / f"{number}.log")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for process in started:
        out, errors = process.communicate()
        assert (process.returncode, out) == (0, "ran\n"), errors[-2000:]


BUSY = """
import hashlib
import flows.cli
import flows.doctor
flows.cli.GRACE = 0.5
def busy():
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # no bytecode of the main thread for minutes
flows.doctor.examine = busy
raise SystemExit(flows.cli.main(["doctor"]))
"""


def test_sigterm_ends_a_command_that_is_in_a_long_call_of_a_library() -> None:
    process = subprocess.Popen([sys.executable, "-c", BUSY], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "busy\n"
    time.sleep(0.5)  # until it is in the call
    process.terminate()
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors == "e4s: ended, since it did not stop in time; what is finished is kept, the same command continues\n"
