"""Graph and keys: what decides an artifact's name, and which work a missing result needs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest

from e4s_models.weights import DEFAULT_WEIGHTS
from flows.profiles import check_effect, make_settings
from flows.stages import PAIR_NODES, PAIR_RESULT
from tasks.graph import Graph, Image, Item, Settings, UsageError, needed, pick_backend

SOURCE, TARGET = Image("a.png", "a" * 64), Image("b.png", "b" * 64)
ITEM = Item("pair", {"source": SOURCE, "target": TARGET})


def graph(settings: Settings | None = None) -> Graph:
    return Graph(PAIR_NODES, PAIR_RESULT, settings or make_settings("mobile"))


def keys(of: Graph, item: Item = ITEM) -> dict[tuple[str, str], str]:
    return {slot: work.key for slot, work in of.works(item).items()}


def test_a_key_does_not_depend_on_paths_or_ids() -> None:
    moved = Item("other", {"source": replace(SOURCE, path="x/y.png"), "target": TARGET})
    assert keys(graph(), moved) == keys(graph())


def test_a_key_depends_on_the_picture_and_on_which_face_is_meant() -> None:
    before = keys(graph())
    other_face = keys(graph(), Item("pair", {"source": replace(SOURCE, face_index=1), "target": TARGET}))
    assert {slot for slot in before if before[slot] != other_face[slot]} == {
        slot for slot in before if slot[1] == "source" or (slot[1] == "" and slot[0] != "enhance") or slot[0] == "enhance"
    }
    assert before["align", "target"] == other_face["align", "target"]


def test_a_changed_setting_changes_its_own_stage_and_what_follows() -> None:
    before, after = keys(graph()), keys(graph(make_settings("mobile", changes=["blend.levels=3"])))
    assert {slot[0] for slot in before if before[slot] != after[slot]} == {"blend", "inpaint", "paste"}


def test_changed_weights_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(graph())
    monkeypatch.setattr("tasks.graph.weight_digest", lambda name: f"other {name}")
    after = keys(graph())
    assert before["parse", "target"] != after["parse", "target"]
    assert before["paste", ""] != after["paste", ""]


def test_another_device_changes_the_key_of_what_runs_on_it() -> None:
    before, after = keys(graph()), keys(graph(make_settings("mobile", device="cuda")))
    assert before["align", "target"] == after["align", "target"]
    assert before["parse", "target"] != after["parse", "target"]


def test_only_what_the_backends_read_is_part_of_the_graph() -> None:
    assert "encode" in {node.name for node in graph().nodes}
    assert "encode" not in {node.name for node in graph(make_settings("mobile", stages=["swap=composite"])).nodes}


def test_what_is_in_front_of_faces_changes_no_key_unless_it_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    without = tuple(
        replace(node, wires={read: wire.rpartition("|")[2] if "visibility" in wire else wire for read, wire in node.wires.items()})
        for node in PAIR_NODES
        if node.name != "visibility"
    )
    assert keys(graph()) == keys(Graph(without, PAIR_RESULT, make_settings("mobile")))
    monkeypatch.setattr("tasks.graph.weight_digest", lambda name: name)
    looked = graph(make_settings("mobile", stages=["visibility=network"]))
    of = {slot for slot, key in keys(looked).items() if key != keys(graph()).get(slot)}
    assert {("visibility", "source"), ("visibility", "target"), ("reenact", ""), ("swap", "")} <= of
    assert not of & {("align", "source"), ("mesh", "target"), ("parse", "source"), ("parse", "target")}


def test_a_setting_holds_for_all_nodes_of_its_stage_or_for_the_one_that_is_named() -> None:
    def steps(*changes: str) -> list[int]:
        of = graph(make_settings("codes", changes=changes))
        return [of.configs[node].steps for node in ("encode", "encode_driven")]

    assert steps()[0] == 0 < steps()[1]
    assert steps("encode_driven.steps=7") == [0, 7]
    assert steps("encode.steps=5") == [5, 5]
    assert steps("encode.steps=5", "encode_driven.steps=7") == [5, 7]
    before, after = keys(graph()), keys(graph(make_settings("mobile", changes=["encode_driven.steps=7"])))
    assert {slot[0] for slot in before if before[slot] != after[slot]} & {"encode", "encode_driven", "parse"} == {"encode_driven"}
    other = graph(make_settings("mobile", stages=["encode=synth"]))  # the profile's settings do not fit, so they are gone
    assert other.stages["encode_driven"].backend == "synth"


def test_target_and_driven_face_are_encoded() -> None:
    of = graph(make_settings("mobile", stages=["encode=synth"]))
    works = of.works(ITEM)
    assert works["swap", ""].reads["target_codes"] == (works["encode", "target"].key, "codes")
    assert works["swap", ""].reads["driven_codes"] == (works["encode_driven", ""].key, "codes")
    assert works["encode_driven", ""].reads["image"][0] == ITEM.images["source"].sha256
    assert works["swap", ""].reads["target_to_canvas"] == (works["encode", "target"].key, "to_canvas")
    assert works["encode_driven", ""].key != works["encode", "target"].key


def test_a_finished_result_needs_nothing_and_a_missing_one_only_what_is_missing() -> None:
    of = graph()
    works = {work.key: work for work in of.works(ITEM).values()}
    final = of.works(ITEM)["paste", ""].key
    assert needed(works, [final], {final}) == []
    have = {key for key, work in works.items() if work.node not in ("blend", "inpaint", "paste")}
    assert [work.node for work in needed(works, [final], have)] == ["blend", "inpaint", "paste"]
    order = [work.node for work in needed(works, [final], set())]
    assert order.index("align") < order.index("mesh") < order.index("parse") < order.index("reenact") < order.index("swap")
    assert "parse_driven" not in order  # the mesh carries the source's labels


def test_of_alternative_wires_the_first_counts_that_is_written() -> None:
    carried = graph()
    assert carried.works(ITEM)["swap", ""].reads["driven_regions"] == (carried.works(ITEM)["reenact", ""].key, "regions")
    nodes = Graph(PAIR_NODES, PAIR_RESULT, make_settings("mobile", [], []))
    nodes.stages["reenact"] = pick_backend("reenact", "facevid2vid")
    assert nodes.wire(nodes.all_nodes["swap"], "driven_regions") == "parse_driven.regions"


@pytest.mark.parametrize(
    ("stages", "changes", "part"),
    [
        (["swap=nothing"], [], "no backend 'nothing'"),
        ([], ["swop.x=1"], "unknown stage 'swop'"),
        ([], ["align.side='big'"], "align.side must be int"),
        ([], ["align.side=true"], "align.side must be int"),
        ([], ["align.side=8"], "at least 64"),
        ([], ["blend.depth=3"], "no setting 'depth'"),
        (["swap=rgi"], [], "swap=rgi reads 'styles' of encode_driven, which encode=encoder does not write; add --stage encode=rgi"),
    ],
)
def test_settings_that_do_not_exist_are_refused(stages: list[str], changes: list[str], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        graph(make_settings("mobile", stages, changes))


@pytest.mark.parametrize(
    ("stages", "changes", "idle"),
    [
        (["swap=composite"], ["encode_driven.steps=50"], "encode_driven"),
        (["swap=composite", "tune=pti"], [], "tune"),
        (["swap=composite", "encode=encoder"], [], "encode"),
        (["swap=composite", "tune=none"], [], ""),
        (["swap=composite"], ["parse.side=512"], ""),
        (["tune=pti"], ["tune.steps=3", "encode_driven.steps=50"], ""),
    ],
)
def test_what_would_have_no_effect_is_refused(stages: list[str], changes: list[str], idle: str) -> None:
    chosen = graph(make_settings("mobile", stages, changes))
    refused = pytest.raises(UsageError, match=f"has no effect here, since {idle} does not run; what runs is align, ")
    with refused if idle else nullcontext():
        check_effect(chosen, stages, changes)


def test_the_default_weights_are_all_that_the_default_profile_needs() -> None:
    assert set(graph(make_settings("mobile")).weights()) <= set(DEFAULT_WEIGHTS)


def test_a_backend_may_come_from_another_package() -> None:
    name = "benchmarks.cheap:align"
    assert pick_backend("align", name).backend == name
    with pytest.raises(UsageError, match=r"benchmarks\.cheap\.BACKENDS has no backend 'benchmarks\.cheap:align' of it.*; it has .*:swap"):
        pick_backend("swap", name)
    with pytest.raises(UsageError, match=r"the module of backend 'nowhere\.at_all:x' cannot be used: No module named 'nowhere'"):
        pick_backend("swap", "nowhere.at_all:x")
