"""Small versions of `benchmarks.soak_prefect`: Prefect's server fails under real commands and deployments."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.killing import carry_out
from benchmarks.soak_prefect import PairsServerSoak, power_loss


@pytest.mark.slow
def test_commands_whose_server_is_stopped_or_restarted(tmp_path: Path) -> None:
    """The first with SIGTERM afterwards; results are those of an undisturbed run."""
    assert carry_out(str(tmp_path), lambda folder: PairsServerSoak(folder, 2, 0, 4, "")) == 0


@pytest.mark.slow
def test_the_run_after_a_power_loss_starts_and_finishes(tmp_path: Path) -> None:
    """Server, worker and flow are killed together, and the server is restarted once more under the next run."""
    assert power_loss(tmp_path) == "COMPLETED"
