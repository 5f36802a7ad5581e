"""What the engine fixes before anything is computed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
POOLS = """
import sys
import numpy, torch
from threadpoolctl import threadpool_info
from flows.engine import use_threads
use_threads(int(sys.argv[1]))
pools = threadpool_info()
assert {pool["user_api"] for pool in pools} == {"blas", "openmp"}
print({pool["num_threads"] for pool in pools}, torch.get_num_threads())
"""


@pytest.mark.parametrize(("wanted", "inherited"), [("1", "2"), ("2", "1")])
def test_every_computing_library_gets_the_threads_that_bytes_are_promised_for(wanted: str, inherited: str) -> None:
    variables = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), inherited)  # as a Dask nanny or the user may set them
    command = [sys.executable, "-c", POOLS, wanted]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.stdout.strip() == f"{{{wanted}}} {wanted}", done.stderr[-2000:]
