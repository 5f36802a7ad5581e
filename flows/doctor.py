"""`e4s doctor`: what is installed, what is missing, what to do about it."""

from __future__ import annotations

import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from e4s_models.weights import DEFAULT_WEIGHTS, home, verify
from flows.server import configured_url
from tasks.runner import cpu_threads

OPTIONAL = {
    "ncnn": "enhance=realesrgan: pip install 'e4s[realesrgan]'",
    "openvino": "only to record parity numbers: pip install 'e4s[dev]'",
}


def required() -> list[str]:
    """Distributions that e4s declares as dependencies, extras left out."""
    return [re.split(r"[^\w.-]", line)[0] for line in requires("e4s") or () if "extra ==" not in line]


def _gpu() -> str:
    try:
        import torch
    except ImportError:
        return "unknown (torch is not installed)"
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    return "none (stages run on the CPU; a GPU needs a CUDA build of torch)"


def examine() -> int:
    """Print one line per finding; 0 if the default profile can run, 2 if something is missing."""
    problems = []
    print(f"python {sys.version.split()[0]}, {cpu_threads()} cores")
    for name in required():
        try:
            print(f"ok       {name} {version(name)}")
        except PackageNotFoundError:
            problems.append(f"{name} is not installed: pip install -c constraints.txt -e .")
    for name, use in OPTIONAL.items():
        try:
            print(f"ok       {name} {version(name)}")
        except PackageNotFoundError:
            print(f"absent   {name} ({use})")
    print(f"GPU      {_gpu()}")
    for name, state in verify(DEFAULT_WEIGHTS).items():
        if state == "ok":
            print(f"ok       weights {name}")
        else:
            problems.append(f"weights {name} {state}: e4s models pull {name}")
    folder = next(folder for folder in (home(), *home().parents) if folder.exists())
    free = shutil.disk_usage(folder).free / 1e9
    print(f"{'ok      ' if free > 2 else 'low     '} {free:.1f} GB free where weights are kept ({home()})")
    print(f"Prefect  {configured_url() or 'no server configured: each run starts its own'}")
    for problem in problems:
        print(f"MISSING  {problem}")
    return 2 if problems else 0
