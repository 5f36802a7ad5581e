"""The run's own Prefect server: who uses it, and how long it lives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TWO_RUNS = """
import sys
from pathlib import Path
from flows.server import prefect_api
for number in range(2):
    with prefect_api(Path(sys.argv[1]) / f"{number}.log") as url:
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
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")}
    done = subprocess.run([sys.executable, "-c", TWO_RUNS, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
