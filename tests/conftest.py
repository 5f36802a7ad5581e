"""Synthetic people for all tests: real faces without privacy questions, made by the real generator."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "E4S_FAULT"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_in_the_project() -> Iterator[None]:
    """What tests make belongs into their own folders: a path that went wrong would be committed one day."""
    before = set(ROOT.iterdir())
    yield
    left = {path.name for path in set(ROOT.iterdir()) - before if not path.name.startswith(".")}
    assert not left, f"tests left {left} in the project"


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


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server with the bucket `bucket`; the environment points to it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        import fsspec

        fsspec.filesystem("s3").mkdir("bucket")
        yield f"http://{host}:{port}"
    server.stop()
