"""What the engine fixes before anything is computed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
POOLS = """
import sys
import numpy, torch
from threadpoolctl import threadpool_info
from flows.execution.process import use_threads
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


FAULTS = """
import resource, threading
import torch
from flows.execution.process import use_threads
use_threads(1)

def tensors(count):
    for _ in range(count):
        torch.ones(1 << 20)  # 4 MiB, 1024 pages

def faults():
    tensors(4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors(100)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

faults()
thread = threading.Thread(target=faults)  # as on Dask workers
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is set")
def test_freed_memory_is_used_again() -> None:
    dasks = {"MALLOC_TRIM_THRESHOLD_": "65536"}  # as a Dask nanny sets it
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, env={**os.environ, **dasks}, capture_output=True, text=True)
    assert len(counts := [int(word) for word in done.stdout.split()]) == 2, done.stderr[-2000:]
    assert max(counts) < 10_000, counts  # of 102,400 pages
