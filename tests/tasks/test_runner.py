"""The runner on a toy graph of real stage objects: failures stay with their item, program errors with their chunk, memory is halved."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage.codec import encode_png
from storage.store import Artifact, Finished, Store, StoreError
from tasks.frame import hash_file
from tasks.graph import Graph, Image, Item, Node, Settings
from tasks.runner import ChunkJob, JobResult, Worker, run_chunk
from tasks.stage import Cost, Inputs, ItemError, Outputs, Stage, each

NODES = (
    Node("mean", "mean", "image", {"image": "image"}, checkpoint=True),
    Node("sum", "sum", "pair", {"a": "source.mean.value", "b": "target.mean.value"}),
    Node("paint", "paint", "pair", {"level": "sum.total"}),
)


@dataclass(frozen=True)
class Empty:
    """No settings."""


def mean(model: None, config: Empty, inputs: Inputs) -> Outputs:
    value = inputs["image"].read().pixels.mean()
    if value == 255:
        raise ItemError("all white")
    return {"value": np.array(value)}


def add(model: None, config: Empty, batch: Sequence[Inputs]) -> list[Outputs | ItemError]:
    return [{"total": inputs["a"] + inputs["b"]} for inputs in batch]


def paint(model: None, config: Empty, inputs: Inputs) -> Outputs:
    if inputs["level"] == 13:
        raise ZeroDivisionError("a bug")
    return {"picture": np.full((2, 2, 3), inputs["level"], np.uint8)}


STAGES = {
    "mean": Stage(name="mean", backend="toy", version=1, config=Empty, run=each(mean), reads=("image",), writes={"value": "array"}),
    "sum": Stage(
        name="sum", backend="toy", version=1, config=Empty, run=add, reads=("a", "b"), writes={"total": "array"}, cost=Cost(threads=True)
    ),
    "paint": Stage(name="paint", backend="toy", version=1, config=Empty, run=each(paint), reads=("level",), writes={"picture": "image"}),
}


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Graph:
    monkeypatch.setattr("tasks.graph.backends", lambda stage: {"toy": STAGES[stage]})
    return Graph(NODES, ("paint", "picture"), Settings({}, {}))


def item(folder: Path, name: str, source: int, target: int) -> Item:
    images = {}
    for role, level in (("source", source), ("target", target)):
        path = folder / f"{level}.png"
        path.write_bytes(encode_png(np.full((2, 2, 3), level, np.uint8)))
        images[role] = Image(str(path), hash_file(str(path)))
    return Item(name, images)


def run(graph: Graph, store: Store, items: list[Item], **worker: Any) -> JobResult:
    process = Worker(graph, store, **worker)
    known = store.lookup({work.key for each_item in items for work in graph.works(each_item).values()})
    try:
        return run_chunk(process, ChunkJob(0, items, known), lambda node, work: work())
    finally:
        process.close()


@pytest.mark.parametrize("at_once", [1, 3])
def test_results_do_not_depend_on_how_many_items_run_at_once(graph: Graph, tmp_path: Path, at_once: int) -> None:
    items = [item(tmp_path, f"i{n}", n, 2 * n) for n in range(1, 6)]
    store = Store(str(tmp_path / "store"))
    result = run(graph, store, items, at_once=at_once)
    assert [store.read(outcome.artifact, "picture")[0, 0, 0] for outcome in result.outcomes] == [3, 6, 9, 12, 15]  # type: ignore[arg-type]
    assert result.computed == {"mean": 8, "sum": 5, "paint": 5}  # ten pictures, of which 2 and 4 serve two items each


def test_a_bad_item_fails_alone_and_is_remembered(graph: Graph, tmp_path: Path) -> None:
    items = [item(tmp_path, "good", 1, 2), item(tmp_path, "bad", 1, 255), item(tmp_path, "also", 3, 4)]
    store = Store(str(tmp_path / "store"))
    result = run(graph, store, items)
    assert [(o.id, o.stage, o.reason) for o in result.outcomes] == [
        ("good", "", ""),
        ("bad", "mean", f"target {tmp_path}/255.png: all white"),
        ("also", "", ""),
    ]
    again = run(graph, store, items)
    assert again.outcomes[1].reason == result.outcomes[1].reason
    assert sum(again.computed.values()) == 0


def test_a_program_error_stops_the_chunk_with_its_traceback_and_keeps_what_was_done(graph: Graph, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    result = run(graph, store, [item(tmp_path, "one", 1, 2), item(tmp_path, "bug", 6, 7)])
    assert "ZeroDivisionError: a bug" in result.crash
    assert not any(outcome.reason for outcome in result.outcomes)
    assert {artifact.stage for artifact in store.all()} >= {"mean", "sum"}


@pytest.mark.parametrize(("keep", "stages"), [("all", {"mean", "sum", "paint"}), ("resume", {"mean", "paint"}), ("final", {"paint"})])
def test_retention(graph: Graph, tmp_path: Path, keep: str, stages: set[str]) -> None:
    store = Store(str(tmp_path / "store"))
    run(graph, store, [item(tmp_path, "one", 1, 2)], keep=keep)
    assert {artifact.stage for artifact in store.all()} == stages


def test_part_of_the_nodes_alone_hands_over_by_the_store(graph: Graph, tmp_path: Path) -> None:
    """As where the other nodes run on another kind of device: what those read is published whatever the retention."""
    store, planned = Store(str(tmp_path / "store")), item(tmp_path, "one", 1, 2)
    process = Worker(graph, store, keep="final")

    def part(*nodes: str, known: dict[str, Artifact]) -> JobResult:
        return run_chunk(process, ChunkJob(0, [planned], known, nodes=frozenset(nodes)), lambda node, work: work())

    first = part("mean", "sum", known={})
    assert first.computed == {"mean": 2, "sum": 1}
    assert (first.outcomes[0].artifact, first.outcomes[0].reason) == (None, "")
    made = {artifact.key: artifact for artifact in first.artifacts}
    assert [artifact.stage for artifact in made.values()] == ["sum"]  # no other part reads the means
    total = next(iter(made.values()))
    (tmp_path / "store" / total.payloads["total"].file).write_bytes(b"")
    broken = part("paint", known=made)
    assert (broken.lost, broken.computed) == ([total.key], {})
    second = part("mean", "sum", known={})
    last = part("paint", known={artifact.key: artifact for artifact in second.artifacts})
    process.close()
    assert last.computed == {"paint": 1}
    assert store.read(last.outcomes[0].artifact, "picture")[0, 0, 0] == 3  # type: ignore[arg-type]


def test_when_memory_does_not_suffice_the_batch_is_halved_and_at_last_the_item_fails(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def hungry(model: None, config: Empty, batch: Sequence[Inputs]) -> list[Outputs | ItemError]:
        sizes.append(len(batch))
        if len(batch) > 2 or any(inputs["a"] == 9 for inputs in batch):
            raise torch.OutOfMemoryError("toy")
        return add(model, config, batch)

    stage = Stage(
        name="sum",
        backend="toy",
        version=1,
        config=Empty,
        run=hungry,
        reads=("a", "b"),
        writes={"total": "array"},
        device="any",
        cost=Cost(gpu_batch=4),
    )
    monkeypatch.setitem(graph.stages, "sum", stage)
    monkeypatch.setattr(graph, "settings", Settings({}, {}, "cuda"))
    items = [item(tmp_path, f"i{n}", n, 20) for n in (1, 2, 3, 9)]
    result = run(graph, Store(str(tmp_path / "store")), items)
    assert sizes == [4, 2, 2, 1, 1]
    assert [bool(outcome.reason) for outcome in result.outcomes] == [False, False, False, True]
    assert "memory does not suffice" in result.outcomes[3].reason


def test_a_stage_that_writes_other_things_than_it_declares_is_a_program_error(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(graph.stages, "sum", replace(STAGES["sum"], writes={"product": "array"}))
    result = run(graph, Store(str(tmp_path / "store")), [item(tmp_path, "one", 1, 2)])
    assert "declares ['product'] but wrote ['total']" in result.crash


def test_an_input_that_changes_while_running_fails_with_that_reason(graph: Graph, tmp_path: Path) -> None:
    planned = item(tmp_path, "one", 1, 2)
    (tmp_path / "2.png").write_bytes(encode_png(np.zeros((2, 2, 3), np.uint8)))
    result = run(graph, Store(str(tmp_path / "store")), [planned])
    assert "was changed while running" in result.outcomes[0].reason


def test_a_file_that_was_away_is_read_when_it_is_back(graph: Graph, tmp_path: Path) -> None:
    planned, store = item(tmp_path, "one", 1, 2), Store(str(tmp_path / "store"))
    (tmp_path / "2.png").rename(tmp_path / "away.png")
    assert "does not exist" in run(graph, store, [planned]).outcomes[0].reason
    (tmp_path / "away.png").rename(tmp_path / "2.png")
    assert run(graph, store, [planned]).outcomes[0].reason == ""


def test_what_was_computed_before_an_interruption_is_kept(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    painted = []

    def interrupted(model: None, config: Empty, inputs: Inputs) -> Outputs:
        if painted:
            raise KeyboardInterrupt
        painted.append(1)
        return paint(model, config, inputs)

    monkeypatch.setitem(graph.stages, "paint", replace(STAGES["paint"], run=each(interrupted)))
    store = Store(str(tmp_path / "store"))
    items = [item(tmp_path, "one", 1, 2), item(tmp_path, "two", 3, 4)]
    with pytest.raises(KeyboardInterrupt):
        run(graph, store, items)
    monkeypatch.undo()
    monkeypatch.setattr("tasks.graph.backends", lambda stage: {"toy": STAGES[stage]})
    stages = sorted(artifact.stage for artifact in store.all())
    assert stages == ["mean"] * 4 + ["paint"] + ["sum"] * 2


def test_of_several_wanted_results_one_that_fails_holds_up_no_other(tmp_path: Path) -> None:
    wanted = [("mean", "source"), ("mean", "target"), ("sum", "")]
    extra = {name: stage for name, stage in STAGES.items() if name != "paint"}
    several = Graph(NODES[:2], ("sum", "total"), Settings({}, {}), wanted=wanted, extra=extra)
    store = Store(str(tmp_path / "store"))
    items = [item(tmp_path, "good", 1, 2), item(tmp_path, "bad", 3, 255)]
    result = run(several, store, items, keep="final")
    assert result.computed == {"mean": 4, "sum": 1}
    bad = several.works(items[1])
    assert {key: reason for key, (_, reason) in result.failed.items()} == {bad["mean", "target"].key: "all white"}
    found = store.lookup([work.key for work in bad.values()])
    assert store.read(found[bad["mean", "source"].key], "value") == 3
    assert bad["sum", ""].key not in found
    assert run(several, store, items).computed == {}
    only = Graph(NODES[:2], ("sum", "total"), Settings({}, {}), wanted=[("mean", "source")], extra=extra)
    assert run(only, Store(str(tmp_path / "other")), items).computed == {"mean": 2}


class RottenStore(Store):
    """A store on a disk that damages whatever is written to it."""

    def publish(self, finished: Sequence[Finished], threads: ThreadPoolExecutor | None = None) -> list[Artifact]:
        published = super().publish(finished, threads)
        for payload in (payload for artifact in published for payload in artifact.payloads.values()):
            path = Path(self.url) / payload.file
            path.write_bytes(path.read_bytes()[:-1])
        return published


def test_a_disk_that_damages_all_it_writes_ends_the_run_with_a_sentence(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, one = RottenStore(str(tmp_path / "store")), item(tmp_path, "one", 1, 2)
    run(graph, store, [one])
    store.void(*(artifact for artifact in store.all() if artifact.stage != "mean"))
    calls = list[int]()

    def counted_mean(model: None, config: Empty, inputs: Inputs) -> Outputs:
        calls.append(1)
        assert len(calls) < 50, "it is repaired without end"
        return mean(model, config, inputs)

    monkeypatch.setitem(graph.stages, "mean", replace(STAGES["mean"], run=each(counted_mean)))
    with pytest.raises(StoreError, match=r"computed again 3 times and damaged each time: check the disk"):
        run(graph, store, [one])
