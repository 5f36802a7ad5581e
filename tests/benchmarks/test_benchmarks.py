"""Every benchmark runs in its quick size and ends with its RESULT lines; ratios of time are not asserted here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.result import Results

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "exact", "timed"),
    [
        ("generator", ["equal_codes_difference"], ["regional_over_plain"]),
        ("recolor_memory", ["minus_dense_at_256", "correlation_growth"], []),
        # Half a minute to two minutes each.
        pytest.param(
            "region_conv",
            ["fast_minus_loop", "bfloat16_error"],
            ["fast_over_plain", "loop_over_fast", "loop_over_plain"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "evaluation",
            ["memory_large_over_small_run", "features_computed_again", "batch_difference"],
            [],
            marks=pytest.mark.slow,
        ),
        pytest.param("overhead", ["same_bytes"], ["planning_ms_per_pair", "flow_over_loop"], marks=pytest.mark.slow),
        pytest.param("exits", ["not_zero"], [], marks=pytest.mark.slow),
        pytest.param(
            "scale",
            [],
            ["cpu_per_pair_large_over_small", "ms_per_pair_and_stage", "dask_ms_per_pair_and_stage"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "video",
            ["memory_long_over_short", "same_bytes"],
            ["flow_over_stages", "jitter_output_over_input", "jitter_smoothed_over_not"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "speed",
            [],
            ["pair_before_over_now", "frame_before_over_now", "fused_over_composite", "composite_now_over_before", "memory_mb"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_quick_size_runs(name: str, exact: list[str], timed: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = dict(re.findall(rf"^RESULT {name}\.(\w+) = .*: (ok|short)$", done.stdout, re.M))
    assert found.keys() == {*exact, *timed}, done.stderr
    assert [found[claim] for claim in exact] == ["ok"] * len(exact)
    assert done.returncode == int("short" in found.values())
    assert done.stdout.splitlines()[-1].startswith("RESULT")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "claims"),
    [
        (["soak"], {"wrong_digests", "wrong_rows", "recomputed_executions"}),
        (["soak", "--dask", "local:2"], {"wrong_digests", "wrong_rows", "recomputed_executions"}),
        (["soak", "--dask", "outside"], {"wrong_digests", "wrong_rows", "recomputed_executions"}),
        (["soak_cluster"], {"wrong_digests", "wrong_rows", "recomputed_executions", "scheduler_restarts"}),
        (["soak_video"], {"wrong_outputs"}),
    ],
    ids=" ".join,
)
def test_a_short_soak_holds(command: list[str], claims: set[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:], "--quick", "--work", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = dict(re.findall(rf"^RESULT {command[0]}\.(\w+) = .*: (ok|short)$", done.stdout, re.M))
    common = {"kills", "in_flight_share", "rounds", "keys_finished_twice", "processes_left_over", "tracebacks"}
    assert found.keys() == common | claims, done.stderr
    del found["in_flight_share"]  # a matter of time
    assert set(found.values()) == {"ok"}, done.stdout


def test_precision_prints_an_error_per_output() -> None:
    command = [sys.executable, "-m", "benchmarks.precision", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert {(network, output) for network, output, _ in rows} >= {("irse50", "embedding"), ("hopenet", "degrees")}
    assert all(0 < float(error) < 0.1 for *_, error in rows)


def test_precision_says_where_nothing_is_to_measure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.precision", "--reference", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"no reference vectors in {tmp_path}" in done.stdout


def test_claims(capsys: pytest.CaptureFixture[str]) -> None:
    results = Results("toy")
    assert results.claim("low", 1.0, 1.1)
    assert results.exit_code() == 0
    assert not results.claim("high", 0.5, 0.9, ">=")
    assert not results.claim("nothing", float("nan"), 1.0)
    assert results.exit_code() == 1
    assert capsys.readouterr().out.splitlines() == [
        "RESULT toy.low = 1 (target <= 1.1): ok",
        "RESULT toy.high = 0.5 (target >= 0.9): short",
        "RESULT toy.nothing = nan (target <= 1): short",
    ]
