"""Work as a Prefect task: an interrupt stays one, whenever it comes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from flows.server import prefect_api
with prefect_api(Path(sys.argv[1]) / "prefect.log"):
    import prefect.states
    from flows.step import run_step
    done, pending = [], prefect.states.Pending
    run_step("align", "align of chunk 0", lambda: done.append(1))
    assert done == [1]
    def interrupted(*arguments, **more):
        raise KeyboardInterrupt
    prefect.states.Pending = interrupted
    try:
        run_step("align", "align of chunk 1", lambda: done.append(2))
    except KeyboardInterrupt:
        print("interrupted")
    prefect.states.Pending = pending
    try:
        run_step("align", "align of chunk 2", lambda: 1 / 0)
    except ZeroDivisionError:
        print("as it was")
    assert done == [1]
"""


def test_an_interrupt_while_the_task_run_is_made_stays_one(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split("\n") == ["interrupted", "as it was", ""], done.stderr[-2000:]
