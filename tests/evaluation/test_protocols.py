"""Protocols name networks that exist, and the quoted rows are the paper's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from e4s_models.weights import WEIGHTS
from evaluation.features import NETWORKS
from evaluation.metrics import COMPARED, METRICS
from evaluation.protocols import PROTOCOLS, Protocol, load_quoted


def test_open_protocol_serves_every_metric_with_declared_weights() -> None:
    lines = list(PROTOCOLS["open"].lines())
    assert {line.metric.name for line in lines} == set(METRICS)
    for line in lines:
        state = line.state()
        assert all(state[name] for name in ("protocol", "metric", "network", "crop", "resolution", "formula", "interval"))
        assert line.network.weight in {"", *WEIGHTS} and not line.network.role
        assert bool(re.fullmatch("[0-9a-f]{64}", state["sha256"])) == bool(line.network.weight)


def test_weights_of_a_protocol() -> None:
    assert PROTOCOLS["paper"].weights() == ("hopenet",)
    assert set(PROTOCOLS["open"].weights()) == {
        "sface", "dlib_face_id", "arcface_mbf", "head_pose_6drepnet", "face_mesh", "fid_inception", "lpips_alexnet",
    }  # fmt: skip


def test_identity_is_judged_by_each_network_apart() -> None:
    networks = [line.network.name for line in PROTOCOLS["open"].lines() if line.metric.name == "id_top1"]
    assert networks == ["sface", "dlib_face_id", "arcface_mbf"]


def test_metrics_of_named_coefficients_are_left_to_networks_that_give_them() -> None:
    for protocol, networks in (("open", {"blendshapes"}), ("paper", set())):
        lines = [line for line in PROTOCOLS[protocol].lines() if line.metric.name in ("expression_mouth", "expression_eyes")]
        assert {line.network.name for line in lines} == networks


def test_paper_protocol_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("E4S_HOME", str(tmp_path))
    missing = {line.network.name: line.network.missing() for line in PROTOCOLS["paper"].lines()}
    for network, role in (("cosface", "cosface"), ("deep3d", "deep3d"), ("inception_standard", "inception")):
        assert f"`e4s models add --network {role} --file FILE`" in missing[network]
    assert "e4s models add --from FOLDER hopenet" in missing["hopenet"]
    assert missing["pixels"] == ""
    assert all(line.network.sha256 == "" for line in PROTOCOLS["paper"].lines() if missing[line.network.name])


def test_a_protocol_with_a_wrong_network_is_refused() -> None:
    with pytest.raises(ValueError, match="protocol mine: 'sface' is no network of kind pose"):
        Protocol(name="mine", source="", sample="", networks={"pose": ("sface",)})


def test_every_runnable_network_can_be_loaded_or_compares_pictures() -> None:
    for network in NETWORKS.values():
        assert bool(network.load) != (network.kind in COMPARED), network.name
        assert not (network.weight and network.role), network.name


def test_quoted_rows() -> None:
    quoted = load_quoted()
    assert [sum(row.table == f"Table {number}" for row in quoted) for number in (1, 2, 3)] == [3, 10, 6]
    assert all(name in METRICS for row in quoted for name in row.values)
    assert {row.protocol for row in quoted} <= set(PROTOCOLS)
    [ours] = [row for row in quoted if row.method == "E4S"]
    assert ours.values == {"id_top1": 0.42, "id_top5": 0.58, "pose": 3.28, "expression": 3.05}
    [optimized] = [row for row in quoted if row.method == "RGI with optimization"]
    assert list(optimized.values.values()) == [0.86, 23.02, 0.07, 14.73]
