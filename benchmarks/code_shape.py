"""The shape of the code of two checkouts beside each other: sizes, docstrings, import circles, and the parts of the orchestration.

    python -m benchmarks.code_shape OTHER_CHECKOUT [--frames]

Prints a Markdown table, other -> this. What is counted is read from the syntax trees of our packages without tests; nothing is imported.
`--frames` also runs one pair of tiny pictures by `e4s pairs` in both checkouts, and counts our own frames from the command to a stage.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from benchmarks.cheap import make_inputs

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "tasks", "storage", "e4s_models", "evaluation")
LONG_LINE = 120
NOT_IMPERATIVE = re.compile(r"(What|Whether|Who|How|Why|Where)\b")
# A dispatch loop starts work and takes what became of it.
STARTS = {"run_chunk", "start", "_give_out", "_run", "submit", "_dispatch"}
TAKES = {"run_chunk", "hear", "take", "wait", "_run"}
RESULTS = re.compile(r"\w*(Result|Outcome)")
RUNNERS = ("tasks/runner.py", "flows/")
NOT_RUNS = ("flows/training", "flows/synth.py")
LISTENERS = re.compile(r"(Run)?Progress|Count|Frames|Advance|Told|_?Notes|Teller|JobListener|JobReporter|_DaskReporter")
STACK = """
import json, sys, traceback
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import tasks.runner
compute, depths = tasks.runner.Worker.compute, []
def counted(self, node, inputs):
    depths.append(sum(frame.filename.startswith(sys.argv[1]) for frame in traceback.extract_stack()))
    return compute(self, node, inputs)
tasks.runner.Worker.compute = counted
from flows.cli import main
code = main(sys.argv[3:])
print(json.dumps(max(depths)), file=sys.stderr)
sys.exit(code)
"""

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


class Checkout:
    """Our packages in one folder, parsed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.texts: dict[str, str] = {}
        for package in PACKAGES:
            for path in sorted((root / package).rglob("*.py")):
                self.texts[path.relative_to(root).as_posix()] = path.read_text("utf-8")
        self.trees = {path: ast.parse(text) for path, text in self.texts.items()}

    def sizes(self, package: str) -> str:
        """Return files and lines of a package."""
        texts = [text for path, text in self.texts.items() if path.startswith(f"{package}/")]
        return f"{len(texts)} files, {sum(text.count(chr(10)) for text in texts)} lines"

    def functions(self) -> Iterator[Function]:
        for tree in self.trees.values():
            for node in ast.walk(tree):
                if isinstance(node, Function):
                    yield node

    def lengths(self) -> str:
        """Return the median and the 90th percentile of function lengths, in lines."""
        lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in self.functions()]
        return f"{statistics.median(lengths):.0f} / {statistics.quantiles(lengths, n=10)[-1]:.0f}"

    def documented(self) -> str:
        """Return the share of public functions and methods that have a docstring."""
        public = [node for node in self.functions() if not node.name.startswith("_")]
        return f"{sum(ast.get_docstring(node) is not None for node in public) / len(public):.0%}"

    def not_imperative(self) -> str:
        """Return the share of docstrings of functions that begin with What, Whether, Who, How, Why or Where."""
        texts = list(filter(None, map(ast.get_docstring, self.functions())))
        return f"{sum(NOT_IMPERATIVE.match(text) is not None for text in texts) / len(texts):.1%}"

    def long_lines(self) -> str:
        lines = [line for text in self.texts.values() for line in text.splitlines()]
        return str(sum(len(line) > LONG_LINE for line in lines))

    def dispatch_loops(self) -> str:
        """Return loops of flows/ that start work and take results: file and line of each."""
        found = []
        for path, tree in self.trees.items():
            for node in ast.walk(tree) if path.startswith("flows/") else ():
                if isinstance(node, ast.While | ast.For):
                    called = _called(node)
                    if called & STARTS and called & TAKES:
                        found.append(f"{path}:{node.lineno}")
        return _listed(found)

    def classes(self, names: re.Pattern[str]) -> str:
        """Return classes and type aliases of the orchestration with such a name."""
        found = set()
        for path, tree in self.trees.items():
            if path.startswith(RUNNERS) and not path.startswith(NOT_RUNS):
                for node in tree.body:
                    name = node.name if isinstance(node, ast.ClassDef) else ""
                    if isinstance(node, ast.Assign) and "TypeVar" not in ast.unparse(node.value):
                        name = ast.unparse(node.targets[0])
                    if name and names.fullmatch(name):
                        found.add(name)
        return _listed(sorted(found))

    def task_hooks(self) -> str:
        """Return type aliases of functions that are given work to run."""
        found = []
        for path, tree in self.trees.items():
            for node in tree.body if path.startswith(RUNNERS) else ():
                if isinstance(node, ast.Assign) and "Callable[[], None]" in ast.unparse(node.value):
                    found.append(ast.unparse(node.targets[0]))
        return _listed(sorted(found))

    def circles(self) -> str:
        """Return groups of modules that import each other, inside functions and for type checking too."""
        return _listed([" + ".join(sorted(group)) for group in _circles(self._imports())])

    def _imports(self) -> dict[str, set[str]]:
        modules = {path.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path in self.trees}
        found: dict[str, set[str]] = {}
        for path, tree in self.trees.items():
            name = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
            named = found.setdefault(name, set())
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    named |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            named &= modules
            named.discard(name)
        return found

    def frames(self) -> str:
        """Run one pair of tiny pictures by the command; return our own frames above a stage."""
        with tempfile.TemporaryDirectory() as folder:
            manifest, profile = make_inputs(Path(folder) / "inputs", 1)
            options = ["--run", f"{folder}/run", "--profile", profile, "--device", "cpu", "--threads", "1", "--no-report"]
            command = [sys.executable, "-P", "-c", STACK, str(self.root), str(ROOT), "pairs", manifest, *options]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(self.root), str(ROOT)))}
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{self.root}: e4s pairs failed:\n{done.stderr[-2000:]}")
            return str(json.loads(done.stderr.splitlines()[-1]))


def _called(loop: ast.AST) -> set[str]:
    """Return names of the functions and methods that a loop calls."""
    calls = [node.func for node in ast.walk(loop) if isinstance(node, ast.Call)]
    names = {call.attr for call in calls if isinstance(call, ast.Attribute)}
    return names | {call.id for call in calls if isinstance(call, ast.Name)}


def _listed(found: list[str]) -> str:
    return f"{len(found)}: {', '.join(found)}" if found else "0"


def _circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the strongly connected components of more than one node."""
    reached = {name: _reachable(graph, name) for name in graph}
    groups: list[set[str]] = []
    for name in graph:
        group = {other for other in reached[name] if name in reached[other]} | {name}
        if len(group) > 1 and group not in groups:
            groups.append(group)
    return groups


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    left = list(graph[start])
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += graph[name]
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="root of the other checkout")
    parser.add_argument("--frames", action="store_true", help="also run one pair in both checkouts")
    arguments = parser.parse_args()
    both = Checkout(arguments.other.resolve()), Checkout(ROOT)
    rows = [(f"{package}/", *(checkout.sizes(package) for checkout in both)) for package in PACKAGES]
    rows += [
        ("dispatch loops", *(checkout.dispatch_loops() for checkout in both)),
        ("result types", *(checkout.classes(RESULTS) for checkout in both)),
        ("task hooks", *(checkout.task_hooks() for checkout in both)),
        ("progress interfaces", *(checkout.classes(LISTENERS) for checkout in both)),
        ("import circles", *(checkout.circles() for checkout in both)),
        ("function length, median / p90", *(checkout.lengths() for checkout in both)),
        ("public functions with a docstring", *(checkout.documented() for checkout in both)),
        ("docstrings that begin with What, Whether, Who ...", *(checkout.not_imperative() for checkout in both)),
        (f"lines over {LONG_LINE}", *(checkout.long_lines() for checkout in both)),
    ]
    if arguments.frames:
        rows.append(("own frames from the command to a stage, a pair", *(checkout.frames() for checkout in both)))
    print("| | before | after |\n|---|---|---|")
    for name, before, after in rows:
        print(f"| {name} | {before} | {after} |")


if __name__ == "__main__":
    main()
