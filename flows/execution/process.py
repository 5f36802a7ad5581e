"""What is fixed in a process before it computes: threads, memory, weights. The same in the planning process and in Dask workers."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterable
from contextlib import suppress

from e4s_models.weights import WeightsError, remedies, weight_path

THIS_PROCESS = f"{socket.gethostname()}:{os.getpid()}"  # the worker that the log names where there is no other
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def use_threads(count: int) -> None:
    """Fix the thread count of the computing libraries: bytes are promised for one count. Freed memory is kept for what comes next.

    Waiting threads sleep (unless the environment says otherwise): on a busy machine spinning ones made small steps ten times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
    os.environ.pop("NVIDIA_TF32_OVERRIDE", None)  # read when the GPU is first used; it would overrule what is set below
    import cv2
    import torch
    from threadpoolctl import threadpool_limits

    cv2.setNumThreads(count)
    torch.set_num_threads(count)
    # Torch's own defaults, which bytes on a GPU are promised for, whatever the environment or the program set before.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = True
    threadpool_limits(count)  # NumPy's linear algebra, whose sums depend on it
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Have glibc keep up to 1 GiB that is free, and map only what is above 32 MiB by itself; another C library stays as it is.

    Dask's nannies set MALLOC_TRIM_THRESHOLD_=65536, which gives every larger tensor back to the system as soon as it is freed: half of the
    time of optimization went into pages that were mapped anew.
    """
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def require_weights(names: Iterable[str]) -> None:
    """Check that these weights are here and whole. Raises WeightsError that names all that are not."""
    problems: dict[str, WeightsError] = {}
    for name in names:
        try:
            weight_path(name)
        except WeightsError as error:
            problems[name] = error
    if len(problems) == 1:
        raise next(iter(problems.values()))
    if problems:
        raise WeightsError(f"{len(problems)} weight files are missing or damaged; {remedies(list(problems))}")
