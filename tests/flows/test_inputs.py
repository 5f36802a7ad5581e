"""Manifests and the pictures they name: duplicates, and what is remembered of files at rest."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import flows.pictures
from flows.inputs import read_pairs
from flows.pictures import Pictures
from storage.codec import encode_png
from tasks.frame import hash_file
from tasks.graph import Image


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_manifest_may_name_true_pictures_and_then_needs_all(tmp_path: Path, kind: str) -> None:
    columns = {"source": ["a.png"] * 2, "target": ["b.png"] * 2, "truth": ["true/c.png", ""]}
    path = tmp_path / f"pairs.{kind}"
    if kind == "csv":
        path.write_text(",".join(columns) + "\n" + "".join(",".join(row) + "\n" for row in zip(*columns.values(), strict=True)))
    else:
        pq.write_table(pa.table(columns), path)
    named, empty = read_pairs(str(path))
    assert (named.truth, named.problem) == (str(tmp_path / "true/c.png"), "")
    assert empty.problem == "the cell truth is empty in row 2; fill it in"


def test_many_rows_are_read_in_pieces_in_order(tmp_path: Path) -> None:
    count = 25_000  # more than two pieces
    pq.write_table(pa.table({"source": [f"{n}.png" for n in range(count)], "target": ["t.png"] * count}), tmp_path / "pairs.parquet")
    found = read_pairs(str(tmp_path))
    assert [pair.id for pair in found] == [f"{n:06d}" for n in range(count)]
    assert found[20_000].source == str(tmp_path / "20000.png")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    path.write_bytes(encode_png(np.zeros((2, 3, 3), np.uint8)))
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths that were hashed, in order; files count as being at rest at once."""
    paths: list[str] = []

    def note(path: str) -> str:
        paths.append(path)
        return hash_file(path)

    monkeypatch.setattr(flows.pictures, "hash_file", note)
    monkeypatch.setattr(flows.pictures, "REST_SECONDS", -60.0)
    return paths


def look(picture: Path, *, limit: int = 100, trust: bool = True) -> Image | str:
    pictures = Pictures(picture.parent / "inputs.parquet", limit, trust=trust)
    found = pictures.find([str(picture), str(picture)])
    pictures.remember()
    return found[str(picture)]


def test_a_file_at_rest_is_hashed_once(picture: Path, hashed: list[str]) -> None:
    first = look(picture)
    assert isinstance(first, Image)
    assert (first.sha256, first.pixels) == (hash_file(str(picture)), 6)
    assert look(picture) == first
    assert len(hashed) == 1
    assert look(picture, trust=False) == first  # --verify
    assert len(hashed) == 2
    assert "more than the limit of 5 px" in str(look(picture, limit=5))


def test_other_bytes_of_the_same_size_and_time_are_noticed(picture: Path, hashed: list[str]) -> None:
    first, before = look(picture), picture.stat()
    data = bytearray(picture.read_bytes())
    data[-20] ^= 1
    picture.write_bytes(data)
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = look(picture)
    assert isinstance(first, Image)
    assert isinstance(second, Image)
    assert second.sha256 != first.sha256


def test_a_file_that_changed_a_moment_ago_is_not_trusted(picture: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows.pictures, "REST_SECONDS", 3600.0)
    look(picture)
    look(picture)
    assert len(hashed) == 2


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"PAR1 no more"])
def test_a_damaged_memory_is_no_harm(picture: Path, hashed: list[str], content: bytes) -> None:
    first = look(picture)
    (picture.parent / "inputs.parquet").write_bytes(content)
    assert look(picture) == first
    assert len(hashed) == 2
    assert look(picture) == first
    assert len(hashed) == 2
