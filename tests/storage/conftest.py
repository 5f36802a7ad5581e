"""A store per file system: a folder, memory, and an S3 server in this process."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from storage.store import Store


@pytest.fixture(params=["file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        request.getfixturevalue("s3_server")
        return Store(f"s3://bucket/{uuid.uuid4().hex}")
    return Store(str(tmp_path / "store") if request.param == "file" else f"memory://{uuid.uuid4().hex}")
