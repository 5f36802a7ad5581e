"""From features to numbers: degenerate runs give what theory says, and sets without a number say so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from e4s_models.face_mesh import BLENDSHAPE_NAMES
from evaluation.metrics import COMPARED, METRICS, Metric, PairData, Read, measure

PAIRS, SOURCES = 400, 100
FEATURES = ("identity", "pose", "expression", "inception")


def random_features(count: int, dimensions: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).standard_normal((count, dimensions)).astype(np.float32)


def run(swapped: str, failures: dict[Read, dict[int, str]] | None = None, pairs: int = PAIRS) -> PairData:
    """Pairs of 100 sources (each several times) whose result is the source, the target, or another pair's source."""
    people, targets = random_features(SOURCES, 16, 1), random_features(pairs, 16, 2)
    own = np.arange(pairs) % SOURCES
    other = np.random.Generator(np.random.PCG64(3)).permutation(own)
    results = {"source": people[own], "target": targets, "shuffled": people[other]}
    features: dict[Read, np.ndarray] = {"source": people[own], "target": targets, "swapped": results[swapped]}
    return PairData(features=features, source_ids=[f"person {index}" for index in own], failures=failures or {})


def value(name: str, data: PairData) -> float:
    result = measure(METRICS[name], data).measured.value
    assert result is not None
    return result


def pose_of(data: PairData) -> PairData:
    return PairData(features={name: rows[:, :3] for name, rows in data.features.items()}, failures=data.failures)


def test_result_equal_to_the_target() -> None:
    data = run("target")
    assert value("pose", pose_of(data)) == 0
    assert value("expression", data) == 0
    assert value("fid", data) == pytest.approx(0, abs=1e-9)
    assert value("id_top1", data) < 0.05
    assert abs(value("id_cosine", data)) < 0.05


def test_result_equal_to_the_source() -> None:
    data = run("source")
    assert value("id_top1", data) == value("id_top5", data) == 1
    assert value("id_cosine", data) == pytest.approx(1)
    assert value("expression", data) > 1
    assert value("pose", pose_of(data)) > 1


def test_shuffled_results_score_as_chance() -> None:
    data = run("shuffled")
    for k in (1, 5):
        outcome = measure(METRICS[f"id_top{k}"], data).measured
        assert outcome.low is not None and outcome.high is not None
        assert outcome.low <= k / SOURCES <= outcome.high
    constant = PairData(features={"source": np.ones((4, 3)), "swapped": np.ones((4, 3))}, source_ids="abcd")
    assert measure(METRICS["id_top1"], constant).measured.value == 0  # all tie: rank 2.5 of 4
    assert measure(METRICS["id_top5"], constant).measured.value == 1


def test_pairs_that_share_a_source_share_its_place_in_the_gallery() -> None:
    sources = np.array([[1.0, 0], [1, 0], [0, 1]])
    data = PairData(features={"source": sources, "swapped": sources}, source_ids=["a", "a", "b"])
    assert measure(METRICS["id_top1"], data).values.tolist() == [1, 1, 1]


def data_for(metric: Metric, count: int, seed: int = 5) -> PairData:
    columns = {kind: len(names) for kind, names in COMPARED.items()}
    width = {"pose": 3, "expression": len(BLENDSHAPE_NAMES), **columns}.get(metric.kind, 8)
    features: Any = {name: random_features(count, width, seed + index) for index, name in enumerate(metric.reads)}
    return PairData(features=features, source_ids=[str(row) for row in range(count)])


def failing(metric: Metric, count: int, rows: range) -> PairData:
    data = data_for(metric, count)
    features: Any = {name: values.copy() for name, values in data.features.items()}
    for row in rows:
        features[metric.reads[0]][row] = np.nan
    failures: Any = {metric.reads[0]: dict.fromkeys(rows, "no face found")}
    return PairData(features=features, source_ids=data.source_ids, failures=failures)


every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))


@every_metric
def test_a_set_without_pairs_says_so(metric: Metric) -> None:
    empty = measure(metric, data_for(metric, 0))
    assert (empty.measured.value, empty.measured.count, empty.measured.reason) == (None, 0, "no pairs")
    assert empty.values.shape == (0,)


@every_metric
def test_a_set_of_failures_says_so(metric: Metric) -> None:
    outcome = measure(metric, failing(metric, 6, range(6)))
    assert (outcome.measured.value, outcome.measured.low) == (None, None)
    assert outcome.measured.reason == "all 6 pairs failed"
    assert outcome.measured.failed == {"no face found": 6}
    assert np.isnan(outcome.values).all()


@every_metric
def test_a_single_pair_has_no_interval(metric: Metric) -> None:
    measured = measure(metric, data_for(metric, 1)).measured
    assert measured.low is measured.high is None and measured.count == 1
    if metric.name.startswith("id_top"):
        assert measured.value is None and measured.reason == "retrieval needs a gallery of at least 2 sources, got 1"
    elif metric.of_set:
        assert measured.value is None and measured.reason == "FID needs at least 2 pictures, got 1"
    else:
        assert measured.value is not None and measured.reason == "1 pair is too few (at least 10)"


@every_metric
def test_failed_pairs_are_left_out_and_counted(metric: Metric) -> None:
    some = measure(metric, failing(metric, 40, range(10)))
    assert (some.measured.count, some.measured.failed) == (30, {"no face found": 10})
    assert some.measured.value is not None
    if metric.per_pair:
        assert np.isnan(some.values[:10]).all() and np.isfinite(some.values[10:]).all()
        assert some.measured.value == pytest.approx(some.values[10:].mean())
        if np.ptp(some.values[10:]):  # retrieval by chance hits nobody
            assert some.measured.low is not None and some.measured.high is not None
            assert some.measured.low < some.measured.value < some.measured.high
        else:
            assert some.measured.reason == "all 30 pairs have the same value"
    if not metric.name.startswith("id_top"):  # there the sources of failed pairs stay in the gallery
        kept = data_for(metric, 40)
        rest: Any = {name: rows[10:] for name, rows in kept.features.items()}
        assert measure(metric, PairData(features=rest)).measured.value == pytest.approx(some.measured.value)


def test_the_source_of_a_failed_result_stays_in_the_gallery() -> None:
    data = PairData(
        features={"source": np.array([[1.0, 0], [0, 1]]), "swapped": np.array([[1.0, 0.5], [0, 0]])},
        source_ids=["a", "b"],
        failures={"swapped": {1: "no face found"}},
    )
    assert measure(METRICS["id_top1"], data).measured.value == 1


@every_metric
def test_what_is_not_a_number_is_an_error_unless_it_failed(metric: Metric) -> None:
    data = data_for(metric, 4)
    data.features[metric.reads[-1]][2, 0] = np.inf
    with pytest.raises(ValueError, match=f"{metric.name}: 1 rows of {metric.reads[-1]} are not finite"):
        measure(metric, data)


def test_wrong_data_is_refused() -> None:
    with pytest.raises(ValueError, match="pose reads target, which is not given"):
        measure(METRICS["pose"], PairData(features={"swapped": np.zeros((2, 3))}))
    with pytest.raises(ValueError, match="the same number of rows everywhere"):
        PairData(features={"swapped": np.zeros((2, 3)), "target": np.zeros((3, 3))})
    with pytest.raises(ValueError, match="a source id for each of the 2 pairs, got 0"):
        measure(METRICS["id_top1"], PairData(features={"swapped": np.ones((2, 3)), "source": np.ones((2, 3))}))


def test_angles_are_compared_the_short_way_round() -> None:
    data = PairData(features={"swapped": np.array([[179.0, 0, 0], [3, 4, 0]]), "target": np.array([[-179.0, 0, 0], [0, 0, 0]])})
    assert measure(METRICS["pose"], data).values == pytest.approx([2, 5])


def test_mouth_and_eyes_are_looked_at_apart() -> None:
    """A jaw that is open, an eye that is closed, a brow that is raised: each moves its own number only."""
    swapped = np.zeros((3, len(BLENDSHAPE_NAMES)))
    for row, (name, value_) in enumerate((("jawOpen", 0.5), ("eyeBlinkLeft", 0.8), ("browInnerUp", 0.3))):
        swapped[row, BLENDSHAPE_NAMES.index(name)] = value_
    data = PairData(features={"swapped": swapped, "target": np.zeros_like(swapped)})
    assert measure(METRICS["expression_mouth"], data).values == pytest.approx([0.5, 0, 0])
    assert measure(METRICS["expression_eyes"], data).values == pytest.approx([0, 0.8, 0])
    assert measure(METRICS["expression"], data).values == pytest.approx([0.5, 0.8, 0.3])


def test_same_data_same_numbers() -> None:
    assert measure(METRICS["id_top1"], run("shuffled")).measured == measure(METRICS["id_top1"], run("shuffled")).measured


def test_few_or_equal_values_have_a_number_and_no_interval() -> None:
    """`swapped` is the source in all pairs: three hits of three, and four hundred of four hundred."""
    for pairs, reason in ((3, "3 pairs are too few (at least 10)"), (PAIRS, "all 400 pairs have the same value")):
        measured = measure(METRICS["id_top1"], run("source", pairs=pairs)).measured
        assert (measured.value, measured.low, measured.high, measured.reason) == (1, None, None, reason)
