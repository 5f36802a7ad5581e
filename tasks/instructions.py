"""Which instruction set the computing libraries of this process use: sums come out in another order, so artifacts have other bytes."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

CHOSEN = "E4S_INSTRUCTIONS"  # the set that a run on Dask workers of others is planned for, where it is not that of the planning machine

_LEVELS = (  # the first whose flags are all there
    ("amx", {"amx_tile", "amx_int8", "avx512f"}),
    ("avx512", {"avx512f", "avx512bw", "avx512vl", "avx512dq"}),
    ("avx2", {"avx2", "fma"}),
    ("sve", {"sve"}),
    ("neon", {"asimd"}),
)
_LIMITS = (  # variables by which the libraries can be told to use less
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NPY_DISABLE_CPU_FEATURES",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "OPENCV_CPU_DISABLE",
)


def instruction_set() -> str:
    """Name of the widest instruction set of this machine that the libraries know, and the variables that limit them here."""
    return " ".join([_widest(), *(f"{name}={os.environ[name]}" for name in _LIMITS if os.environ.get(name))])


@cache
def _widest() -> str:
    """Loads no library: planning asks, too."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:  # not Linux
        return platform.machine()
    flags = next((set(line.partition(":")[2].split()) for line in text.splitlines() if line.startswith(("flags", "Features"))), set[str]())
    return next((name for name, needed in _LEVELS if needed <= flags), platform.machine())
