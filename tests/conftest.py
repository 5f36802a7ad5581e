"""Synthetic people for all tests: real faces without privacy questions, made by the real generator."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "E4S_FAULT"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def people_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four people at 1024 px with their manifest, and pairs.parquet with three pairs of them."""
    from flows.synth import make_people

    folder = tmp_path_factory.mktemp("synth")
    make_people(4, 0, folder, pairs=3)
    return folder


@pytest.fixture(scope="session")
def people(people_folder: Path) -> list[Path]:
    """The four pictures."""
    return sorted(people_folder.rglob("*.png"))
