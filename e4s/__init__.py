"""Face swapping by regional GAN inversion, for notebooks and scripts: docs/api.md.

The command line, `e4s`, does the same with the same run folders.
"""

from __future__ import annotations

from importlib.metadata import version as _version

from e4s_models.weights import WeightsError
from flows.api import ReportFiles, Run, Swap, open_run, pairs, report, swap, videos
from storage.run import RunError
from storage.store import StoreError
from tasks.graph import UsageError
from tasks.runner import DiskFull
from tasks.stage import ItemError

__version__ = _version("e4s")

__all__ = [
    "DiskFull",
    "ItemError",
    "ReportFiles",
    "Run",
    "RunError",
    "StoreError",
    "Swap",
    "UsageError",
    "WeightsError",
    "__version__",
    "open_run",
    "pairs",
    "report",
    "swap",
    "videos",
]
