"""The benchmark of the index runs in its quick size; ratios of time are not asserted here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_quick_size_runs() -> None:
    command = [sys.executable, "-m", "benchmarks.store_scale", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = dict(re.findall(r"^RESULT store_scale\.(\w+) = .*: (ok|short)$", done.stdout, re.M))
    timed = {"cpu_over_ten_times_fewer", "lookup_over_plain_filter"}
    assert found.keys() == {"found", "parts_after_per_million", "memory_mb_beyond_ten_times_fewer", *timed}, done.stderr
    assert {found[name] for name in found.keys() - timed} == {"ok"}
    assert done.returncode == int("short" in found.values())
