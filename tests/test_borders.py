"""Imports point one way, and importing does nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "e4s_models": {"e4s_models"},
    "storage": {"storage"},
    "tasks": {"tasks", "e4s_models", "storage"},
    "evaluation": {"evaluation", "e4s_models", "storage"},
    "flows": {"flows", "tasks", "evaluation", "e4s_models", "storage"},
    "e4s": {"flows", "tasks", "e4s_models", "storage"},
}
OURS = {*ALLOWED, "benchmarks", "tests"}
MODULES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    found = imports(path)
    assert found & OURS <= ALLOWED[package]
    if package != "flows":
        assert not found & {"prefect", "dask", "distributed"}
    assert "torchvision" not in found


def test_execution_knows_no_planner() -> None:
    """What runs jobs serves pairs, videos and evaluation alike: of `flows` it knows only itself, and how a process is started."""
    allowed = re.compile(r"flows\.(execution(\.\w+)?|environment)")
    for path in (ROOT / "flows/execution").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert not [name for name in modules if name.startswith("flows") and not allowed.fullmatch(name)], path.name


def test_planning_modules_load_neither_torch_nor_prefect() -> None:
    stages = ", ".join(f"tasks.{path.stem}" for path in sorted((ROOT / "tasks").glob("[a-z]*.py")))
    heavy = ("torch", "prefect", "dlib", "ai_edge_litert")
    code = f"import sys, flows.cli, flows.plan, flows.report, {stages}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_module_imports_on_its_own() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES if path.stem != "__init__"]
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
