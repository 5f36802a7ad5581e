"""What several tests of metrics use."""

from __future__ import annotations

import pytest

from e4s_models.lpips_net import Lpips
from e4s_models.weights import WeightsError, weight_path


@pytest.fixture(scope="session")
def network() -> Lpips:
    """LPIPS; skips, saying so, where its weights are missing."""
    try:
        weight_path("lpips_alexnet")
    except WeightsError as error:
        pytest.skip(str(error))
    return Lpips.load()
