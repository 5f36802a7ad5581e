"""Manifests of pairs drawn by rule: which pictures meet is decided by a seed, the same on every machine and NumPy."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flows.progress import plural
from flows.tables import row_id
from storage.spelling import near_path
from storage.store import write_atomic
from tasks.graph import UsageError

MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"
PICTURES = "CelebA-HQ-img"
PARTITIONS = ("list_eval_partition.txt", "list_eval_partition.csv")
TEST = 2  # CelebA's number of its test set, in the partition file
FIRST_TEST = 182638  # 182638.jpg to 202599.jpg are CelebA's test set: the partition file in one number
UNPACKED = f"give the folder of CelebAMask-HQ as unpacked ({PICTURES}/0.jpg ... 29999.jpg and {MAPPING})"


@dataclass(frozen=True)
class Drawn:
    """What was drawn for a manifest."""

    path: Path
    pictures: int  # in the set that pairs are drawn from
    split: str  # how that set was decided
    rows_sha256: str  # of the pairs' numbers, whatever folder the pictures lie in


def shuffle_numbers(count: int, seed: int) -> list[int]:
    """0 ... count - 1 in a random order: sorted by `count` raw 64-bit numbers of PCG64(seed), equal ones by their place.

    Raw numbers, because NumPy keeps a bit generator's stream for good but not what its distributions make of it.
    """
    raw = np.random.PCG64(seed).random_raw(count)
    return [int(number) for number in np.argsort(raw, kind="stable")]


def distinct_pairs(count: int, pairs: int, seed: int) -> list[tuple[int, int]]:
    """Pairs (source, target) of 0 ... count - 1: no source twice, no target twice, none with itself.

    With `order = shuffle_numbers(count, seed)`, pair k has source `order[k]` and target `order[(k + pairs) % count]`; if all are sources,
    target `order[(k + 1) % count]`. So sources and targets share no picture where twice as many as `pairs` are there.
    Raises ValueError unless 1 <= pairs <= count and count >= 2.
    """
    if not 1 <= pairs <= count or count < 2:
        raise ValueError(f"expected 1 to {count} pairs of at least 2, got {pairs} of {count}")
    order = shuffle_numbers(count, seed)
    step = pairs if pairs < count else 1
    return [(order[k], order[(k + step) % count]) for k in range(pairs)]


def celebamask_hq(folder: str | Path, out: str | Path, *, pairs: int = 500, seed: int = 0) -> Drawn:
    """Write a manifest of pairs of CelebAMask-HQ's test pictures.

    The test set is CelebA's: pictures whose original has a 2 in CelebA's `list_eval_partition` where the folder holds that file, else
    those whose original is 182638.jpg or a later one; both say the same. `distinct_pairs` draws from them in ascending order of
    their number in CelebAMask-HQ. Paths are written relative to the manifest. Raises UsageError.
    """
    folder, out = Path(folder), Path(out)
    if out.suffix != ".parquet":
        raise UsageError(f"{out}: the manifest is a .parquet file; name it so")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(f"{out}: not a file name in an existing folder")
    if seed < 0:
        raise UsageError(f"--seed must not be negative, got {seed}")
    numbers, split = _test_numbers(folder)
    if not 1 <= pairs <= len(numbers) or len(numbers) < 2:
        raise UsageError(f"--pairs must be 1 to {len(numbers)}, got {pairs}: {folder} lists {plural(len(numbers), 'test picture')}")
    drawn = [(numbers[source], numbers[target]) for source, target in distinct_pairs(len(numbers), pairs, seed)]
    _require_pictures(folder, sorted({number for pair in drawn for number in pair}))
    rows_sha256 = hashlib.sha256("".join(f"{source} {target}\n" for source, target in drawn).encode()).hexdigest()
    away = os.path.relpath(os.path.realpath(folder), os.path.realpath(out.absolute().parent))
    columns = {
        "id": [row_id(row) for row in range(pairs)],
        "source": [str(Path(away, PICTURES, f"{source}.jpg")) for source, _ in drawn],
        "target": [str(Path(away, PICTURES, f"{target}.jpg")) for _, target in drawn],
    }
    facts = {"dataset": "CelebAMask-HQ", "split": split, "pictures": len(numbers), "seed": seed, "rows_sha256": rows_sha256}
    data = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata({"e4s": json.dumps(facts)}), data)
    write_atomic(out, data.getvalue())
    return Drawn(out, len(numbers), split, rows_sha256)


def _test_numbers(folder: Path) -> tuple[list[int], str]:
    """Numbers of the test pictures, ascending, and how they were found."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder{near_path(folder)}; {UNPACKED}")
    if not (folder / MAPPING).is_file():
        inside = next((name for name in sorted(folder.iterdir()) if (name / MAPPING).is_file()), None)
        raise UsageError(f"{folder}: no {MAPPING} in it; {f'give {inside}' if inside else UNPACKED}")
    if not (folder / PICTURES).is_dir():
        raise UsageError(f"{folder}: no folder {PICTURES} in it; {UNPACKED}")
    originals = _originals(folder / MAPPING)
    found = next((folder / name for name in PARTITIONS if (folder / name).is_file()), None)
    if found is None:
        chosen = [number for number, original in originals.items() if original >= FIRST_TEST]
        return sorted(chosen), f"CelebA's test set: original {FIRST_TEST}.jpg or later"
    sets = _partition(found)
    unlisted = [original for original in originals.values() if original not in sets]
    if unlisted:
        raise UsageError(
            f"{found}: {unlisted[0]:06d}.jpg is not listed ({len(unlisted)} of {len(originals)} are not); give CelebA's own file"
        )
    return sorted(number for number, original in originals.items() if sets[original] == TEST), f"CelebA's test set: 2 in {found.name}"


def _originals(path: Path) -> dict[int, int]:
    """The mapping file's lines `idx orig_idx orig_file` -> number in CelebAMask-HQ: number in CelebA's file name."""
    originals: dict[int, int] = {}
    for line, cells in _lines(path):
        match = re.fullmatch(r"(\d+)\.jpg", cells[2]) if len(cells) == 3 and cells[0].isdecimal() else None
        if match is None:
            raise UsageError(
                f"{path}: line {line} should be a number, CelebA's index and a file name such as 000001.jpg, is {' '.join(cells)!r}"
            )
        if int(cells[0]) in originals:
            raise UsageError(f"{path}: number {cells[0]} stands in two lines; unpack the file again")
        originals[int(cells[0])] = int(match[1])
    if not originals:
        raise UsageError(f"{path}: no pictures listed; unpack the file again")
    return originals


def _partition(path: Path) -> dict[int, int]:
    """CelebA's lines `000001.jpg 0` -> number in the file name: 0 train, 1 validation, 2 test."""
    sets: dict[int, int] = {}
    for line, cells in _lines(path):
        match = re.fullmatch(r"(\d+)\.jpg", cells[0])
        if match is None or len(cells) != 2 or cells[1] not in ("0", "1", "2"):
            raise UsageError(f"{path}: line {line} should be a file name and 0, 1 or 2, such as 000001.jpg 0, is {' '.join(cells)!r}")
        sets[int(match[1])] = int(cells[1])
    return sets


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """Line numbers and cells (between spaces or commas) of a list, without empty lines and a heading."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a text file; unpack it again") from None
    split = [(number, re.split(r"[\s,]+", line.strip())) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    return split[1:] if split and not any(cell.endswith(".jpg") for cell in split[0][1]) else split


def _require_pictures(folder: Path, numbers: Sequence[int]) -> None:
    missing = [number for number in numbers if not (folder / PICTURES / f"{number}.jpg").is_file()]
    if missing:
        raise UsageError(
            f"{folder / PICTURES / f'{missing[0]}.jpg'}: no such picture ({len(missing)} of the {len(numbers)} drawn are missing); "
            "unpack the data set again"
        )
