"""One stage alone, on the stored inputs of one item: for looking at a change without running what lies before it."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import numpy as np

from flows.execution.process import use_threads
from flows.finished import FinishedRun, item_of
from storage.codec import encode_png
from storage.run import RunFolder, check_writable
from storage.spelling import near_miss
from storage.store import Damaged, write_atomic
from tasks.frame import ImageFile
from tasks.graph import Graph, UsageError
from tasks.runner import compute_halved, cpu_threads
from tasks.stage import Inputs, ItemError, Outputs


def run_node(graph: Graph, node: str, inputs: Inputs) -> Outputs:
    """One node on one item, outside of a run: its model is loaded for this alone. Raises ItemError, which names the node."""
    stage, config = graph.stages[node], graph.configs[node]
    (result,) = compute_halved(partial(stage.run, stage.load(config, graph.device(node)), config), [inputs])
    if isinstance(result, ItemError):
        raise ItemError(f"{node}: {result}")
    return result


def run_stage(
    run: str, node: str, item: str, output: str, role: str = "target", stages: list[str] | None = None, changes: list[str] | None = None
) -> list[Path]:
    """Run `node` on an item's stored inputs, maybe with other settings; nothing is stored, the outputs go to a folder.

    Raises UsageError for what does not exist, RunError if nothing can be written to `output`, ItemError if the stage refuses the item.
    """
    check_writable(Path(output), "-o")
    finished = FinishedRun(RunFolder(run), stages or (), changes or ())
    graph = finished.graph
    if node not in graph.stages:
        raise UsageError(f"unknown stage {node!r}{near_miss(node, graph.all_nodes)}; this run has {', '.join(graph.all_nodes)}")
    if item not in finished.rows:
        raise UsageError(f"{run}: no pair {item!r}{near_miss(item, finished.rows)}; see `e4s status {run}`")
    row = finished.rows[item]
    of = graph.all_nodes[node].of
    works = finished.works(row)
    slot = (node, role if of == "image" else "")
    if slot not in works:
        raise UsageError(f"{node} is not used by these settings; choose one of {', '.join(n.name for n in graph.nodes)}")
    work = works[slot]
    artifacts = finished.store.lookup({key for key, _ in work.reads.values()})
    inputs: dict[str, object] = dict(work.constants)
    paths = {image.sha256: image.path for image in item_of(row).images.values()}
    for name, (key, output_name) in work.reads.items():
        if output_name == "image":
            inputs[name] = ImageFile(paths[key], key)
        elif key in artifacts and not artifacts[key].failed:
            try:
                inputs[name] = finished.store.read(artifacts[key], output_name)
            except Damaged as damaged:
                raise UsageError(f"{damaged}; repeat the run's command to compute it again") from None
        else:
            raise UsageError(f"{item}: the input {name} of {node} is not stored; run with --keep all, or repeat the run's command")
    use_threads(cpu_threads())
    written = []
    for name, value in run_node(graph, node, inputs).items():
        is_array = graph.stages[node].writes[name] == "array"
        path = Path(output) / f"{node}.{name}.{'npy' if is_array else 'png'}"
        buffer = io.BytesIO()
        if is_array:
            np.save(buffer, value)
        write_atomic(path, buffer.getvalue() if is_array else encode_png(value))
        written.append(path)
    return written
