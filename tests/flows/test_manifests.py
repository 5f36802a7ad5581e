"""Manifests drawn by rule: the rows that a seed decides, on a made-up CelebAMask-HQ, and a sentence for what is wrong with a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flows.cli import main
from flows.inputs import read_pairs
from flows.manifests import distinct_pairs, shuffle_numbers
from tasks.frame import ImageFile

Text = pytest.CaptureFixture[str]
ORIGINALS = (119614, 182637, 182638, 200122, 5, 190000, 202599, 162771)  # of pictures 0 to 7: 2, 3, 5 and 6 are test pictures
SETS = (0, 1, 2, 2, 0, 2, 2, 1)


def make_folder(folder: Path, heading: str = "idx        orig_idx   orig_file\n") -> Path:
    """A data set of eight tiny pictures."""
    (folder / "CelebA-HQ-img").mkdir(parents=True)
    for number in range(len(ORIGINALS)):
        rgb = np.random.Generator(np.random.PCG64(number)).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(rgb).save(folder / f"CelebA-HQ-img/{number}.jpg")
    lines = (f"{number:<10} {original - 1:<10} {original:06d}.jpg\n" for number, original in enumerate(ORIGINALS))
    (folder / "CelebA-HQ-to-CelebA-mapping.txt").write_text(heading + "".join(lines))
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "CelebAMask-HQ")


def command(folder: Path, out: Path, pairs: int, seed: int = 0) -> int:
    return main(["manifest", "celebamask-hq", str(folder), "--pairs", str(pairs), "--seed", str(seed), "--out", str(out)])


def numbers(manifest: Path) -> list[tuple[int, int]]:
    return [(int(Path(row["source"]).stem), int(Path(row["target"]).stem)) for row in pq.read_table(manifest).to_pylist()]


def test_the_order_is_that_of_raw_numbers() -> None:
    raw = np.random.PCG64(0).random_raw(3).tolist()
    assert raw == [11749869230777074271, 4976686463289251617, 755828109848996024]  # as NumPy 1.17 and later give them
    assert shuffle_numbers(3, 0) == [2, 1, 0]  # smallest first


@pytest.mark.parametrize(("count", "pairs"), [(2, 1), (2, 2), (5, 3), (5, 5), (40, 20), (40, 39)])
def test_nobody_is_a_source_twice_or_a_target_twice_or_meets_themselves(count: int, pairs: int) -> None:
    drawn = distinct_pairs(count, pairs, 3)
    sources, targets = {source for source, _ in drawn}, {target for _, target in drawn}
    assert len(sources) == len(targets) == len(drawn) == pairs
    assert all(source != target for source, target in drawn)
    assert sources | targets <= set(range(count))
    assert 2 * pairs > count or not sources & targets


@pytest.mark.parametrize(("count", "pairs"), [(1, 1), (3, 0), (3, 4)])
def test_what_cannot_be_drawn(count: int, pairs: int) -> None:
    with pytest.raises(ValueError, match=f"got {pairs} of {count}"):
        distinct_pairs(count, pairs, 0)


def test_a_pinned_draw() -> None:
    """500 pairs of as many as CelebAMask-HQ has test pictures: these rows, everywhere, for good."""
    rows = "".join(f"{source} {target}\n" for source, target in distinct_pairs(2824, 500, 0))
    assert hashlib.sha256(rows.encode()).hexdigest() == "58d4a26af7c2bdfcafe395fe8e7b0d4059a089e43bb9250e4e889d536abf4333"


def test_pairs_of_test_pictures_only(dataset: Path, tmp_path: Path, capsys: Text) -> None:
    out = tmp_path / "pairs.parquet"
    assert command(dataset, out, 4) == 0
    drawn = numbers(out)
    assert {source for source, _ in drawn} == {target for _, target in drawn} == {2, 3, 5, 6}
    assert all(source != target for source, target in drawn)
    table = pq.read_table(out)
    assert table["id"].to_pylist() == ["000000", "000001", "000002", "000003"]
    facts = json.loads(table.schema.metadata[b"e4s"])
    assert (facts["seed"], facts["pictures"]) == (0, 4)
    printed = capsys.readouterr().out
    assert "4 pairs of 4 pictures" in printed
    assert facts["rows_sha256"] in printed


def test_the_pairs_flow_finds_the_pictures(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere/deep", target_is_directory=True)
    for out in (dataset / "pairs.parquet", tmp_path / "elsewhere/a.parquet", tmp_path / "link/b.parquet"):
        assert command(dataset, out, 2) == 0
        for row in read_pairs(str(out)):
            for path in (row.source, row.target):
                assert ImageFile(path, hashlib.sha256(Path(path).read_bytes()).hexdigest(), 1000).read().rgb8.shape == (16, 16, 3)
    moved = dataset.parent.rename(dataset.parent.with_name(dataset.parent.name + "-moved"))
    assert all(Path(row.source).is_file() for row in read_pairs(str(moved / "elsewhere/a.parquet")))  # both moved together


def test_the_same_seed_gives_the_same_file_and_another_other_pairs(dataset: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.parquet", "b.parquet", "c.parquet")]
    for out, seed in zip(files, (0, 0, 1), strict=True):
        assert command(dataset, out, 4, seed) == 0
    a, b, c = (out.read_bytes() for out in files)
    assert a == b
    assert numbers(files[0]) != numbers(files[2])
    assert a != c


@pytest.mark.parametrize("name", ["list_eval_partition.txt", "list_eval_partition.csv"])
def test_the_partition_file_says_the_same_as_the_range(dataset: Path, tmp_path: Path, name: str, capsys: Text) -> None:
    assert command(dataset, tmp_path / "range.parquet", 4) == 0
    cut, heading = (",", "image_id,partition\n") if name.endswith(".csv") else (" ", "")
    lines = [f"{original:06d}.jpg{cut}{number}\n" for original, number in zip(ORIGINALS, SETS, strict=True)]
    (dataset / name).write_text(heading + "".join(lines))
    assert command(dataset, tmp_path / "listed.parquet", 4) == 0
    assert f"2 in {name}" in capsys.readouterr().out
    assert numbers(tmp_path / "listed.parquet") == numbers(tmp_path / "range.parquet")
    (dataset / name).write_text(heading + "".join(lines).replace(f"000005.jpg{cut}0", f"000005.jpg{cut}2"))
    assert command(dataset, tmp_path / "other.parquet", 5) == 0  # the file decides
    assert 4 in {source for source, _ in numbers(tmp_path / "other.parquet")}


def test_a_mapping_without_a_heading_is_read_too(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", heading="")
    assert command(folder, tmp_path / "pairs.parquet", 4) == 0
    assert {source for source, _ in numbers(tmp_path / "pairs.parquet")} == {2, 3, 5, 6}


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).rename(folder.parent / "gone")


def write(name: str, text: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text) and None


MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"
PARTITION = "list_eval_partition.txt"


@pytest.mark.parametrize(
    ("spoil", "pairs", "parts"),
    [
        (remove(MAPPING), 2, ["CelebAMask-HQ: no CelebA-HQ-to-CelebA-mapping.txt", "as unpacked"]),
        (remove("CelebA-HQ-img"), 2, ["no folder CelebA-HQ-img", "as unpacked"]),
        (remove("CelebA-HQ-img/5.jpg"), 4, ["CelebA-HQ-img/5.jpg: no such picture (1 of the 4 drawn are missing)"]),
        (write(MAPPING, ""), 2, ["no pictures listed"]),
        (write(MAPPING, b"\xff\xfe\x00"), 2, ["not a text file"]),
        (write(MAPPING, "0 5 000006.jpg\nnot a line\n"), 2, ["line 2", "'not a line'"]),
        (write(MAPPING, "0 5 000006.jpg\n0 6 000007.jpg\n"), 2, ["number 0 stands in two lines"]),
        (write(PARTITION, "000005.jpg 0\n"), 2, ["119614.jpg is not listed (7 of 8 are not)"]),
        (write(PARTITION, "000005.jpg test\n"), 2, ["line 1", "'000005.jpg test'"]),
        (lambda folder: None, 5, ["--pairs must be 1 to 4, got 5", "lists 4 test pictures"]),
        (lambda folder: None, 0, ["--pairs must be 1 to 4, got 0"]),
    ],
)
def test_wrong_folders(spoil: Callable[[Path], None], pairs: int, parts: list[str], dataset: Path, tmp_path: Path, capsys: Text) -> None:
    spoil(dataset)
    assert command(dataset, tmp_path / "pairs.parquet", pairs) == 1
    one_sentence(capsys, *parts)
    assert not (tmp_path / "pairs.parquet").exists()


def test_wrong_places(dataset: Path, tmp_path: Path, capsys: Text) -> None:
    assert command(tmp_path / "nowhere", tmp_path / "pairs.parquet", 2) == 1
    one_sentence(capsys, "nowhere: no such folder")
    assert command(tmp_path, tmp_path / "pairs.parquet", 2) == 1
    one_sentence(capsys, f"give {dataset}")
    assert command(dataset, tmp_path / "pairs.csv", 2) == 1
    one_sentence(capsys, "pairs.csv: the manifest is a .parquet file")
    assert command(dataset, tmp_path / "no/pairs.parquet", 2) == 1
    one_sentence(capsys, "not a file name in an existing folder")
    assert command(dataset, tmp_path / "pairs.parquet", 2, -1) == 1
    one_sentence(capsys, "--seed must not be negative, got -1")


def one_sentence(capsys: Text, *parts: str) -> None:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("e4s: ")
    for part in parts:
        assert part in lines[0]
