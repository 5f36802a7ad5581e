"""What the user gives -> pairs: a manifest (csv, parquet) or two folders."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from storage.parquet import open_parquet, read_batches
from tasks.graph import UsageError

_COLUMNS = ("id", "source", "target", "source_face", "target_face", "truth")
_ID = re.compile(r"[\w-][\w.-]{0,99}")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True, slots=True)
class PairRow:
    """One line of a manifest; paths are absolute or relative to the working folder."""

    id: str
    source: str
    target: str
    source_face: int = 0
    target_face: int = 0
    truth: str = ""  # the picture that the result should equal; "" if the manifest has no column for it
    problem: str = ""  # why the row cannot be used


def read_pairs(manifest: str, *, source_face: int = 0, target_face: int = 0) -> list[PairRow]:
    """Pairs of a manifest, a folder that holds `pairs.parquet` or `pairs.csv`, or two folders joined by `:` (files matched by sorted name).

    A manifest needs the columns source and target and may have id, source_face, target_face and truth (the picture that the result
    should equal, for `e4s report`; then each row needs it); relative paths are resolved from its own folder. A row with an empty
    cell, or with the id of an earlier row, gets a `problem`; anything wrong with the whole raises
    UsageError. The same pair in several rows is fine: each row has its output, and it is computed once. The table is read in pieces: a
    million rows take seconds and a few hundred MB.
    """
    path = Path(manifest)
    if not path.exists() and ":" in manifest:
        sources, _, targets = manifest.partition(":")
        return _folder_pairs(Path(sources), Path(targets), source_face, target_face)
    if path.is_dir():
        found = [path / name for name in ("pairs.parquet", "pairs.csv") if (path / name).exists()]
        if not found:
            raise UsageError(f"{path}: a folder without pairs.parquet or pairs.csv; give a manifest, or two folders as SOURCES:TARGETS")
        path = found[0]
    if not path.exists():
        raise UsageError(f"{path}: no such manifest; give a .csv or .parquet file with the columns source and target")
    try:
        return _read_pairs(path, source_face, target_face)
    except (pa.ArrowException, csv.Error, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path}: the manifest cannot be read ({error})") from None


def row_id(number: int) -> str:
    """The id of a row that has none: 000000, 000001, ..."""
    return f"{number:06d}"


def check_id(number: int, given: Any) -> str:
    """The id of a manifest's row, which names its output file. Raises UsageError if it cannot."""
    name = row_id(number) if given in (None, "") else str(given)
    if not _ID.fullmatch(name) or len(name.encode()) > 200:
        raise UsageError(
            f"row {number + 1}: id {name!r} may hold only letters, digits, '_', '-' and '.', 100 at most, not starting with '.'"
        )
    return name


def _read_pairs(path: Path, source_face: int, target_face: int) -> list[PairRow]:
    rows = _read_table(path)
    first = next(rows, None)
    if first is None:
        raise UsageError(f"{path}: the manifest has no rows")
    missing = [name for name in ("source", "target") if name not in first]
    if missing:
        raise UsageError(f"{path}: the manifest has no column {' and no column '.join(missing)} (it has {', '.join(first) or 'none'})")
    read = _Cells(path.parent, source_face, target_face)
    pairs: dict[str, PairRow] = {}
    for number, row in enumerate(chain((first,), rows)):
        pair = read.pair(number, row)
        if pair.id in pairs:
            problem = f"row {number + 1} has the id {pair.id!r} of an earlier row; ids must be unique, or leave the column out"
            pair = replace(pair, id=f"{pair.id}#{number + 1}", problem=problem)  # no id of a manifest's own: '#' is refused there
        pairs[pair.id] = pair
    return list(pairs.values())


def _read_table(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        with open_parquet(path) as file:
            wanted = [name for name in file.schema_arrow.names if name in _COLUMNS]
            if not {"source", "target"} <= set(wanted):
                yield dict.fromkeys(file.schema_arrow.names)
                return
            for batch in read_batches(file, 10_000, wanted):
                yield from batch.to_pylist()
    elif path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file, restkey="(no header)"):
                yield {str(name): cell for name, cell in row.items()}
    else:
        raise UsageError(f"{path}: a manifest is a .csv or a .parquet file")


class _Cells:
    """The cells of a manifest's rows -> pairs; paths that repeat are held once."""

    def __init__(self, folder: Path, source_face: int, target_face: int) -> None:
        self._folder, self._faces = folder, {"source": source_face, "target": target_face}
        self._paths: dict[str, str] = {"": ""}

    def pair(self, number: int, row: dict[str, Any]) -> PairRow:
        """Raises UsageError for an id that cannot name a file."""
        problem = ""
        paths: dict[str, str] = {}
        faces: dict[str, int] = {}
        for role in (*self._faces, *(("truth",) if "truth" in row else ())):
            cell = "" if row[role] is None else str(row[role]).strip()
            if not cell:
                problem = f"the cell {role} is empty in row {number + 1}; fill it in"
            paths[role] = self._path(cell)
        for role, default in self._faces.items():
            index = row.get(f"{role}_face")
            try:
                faces[role] = default if index in (None, "") else int(str(index))
            except ValueError:
                faces[role] = 0
                problem = f"{role}_face must be a whole number, got {index!r} in row {number + 1}"
        name = check_id(number, row.get("id"))
        return PairRow(name, paths["source"], paths["target"], faces["source"], faces["target"], paths.get("truth", ""), problem)

    def _path(self, cell: str) -> str:
        if cell not in self._paths:
            self._paths[cell] = str((self._folder / cell).absolute())
        return self._paths[cell]


def _folder_pairs(sources: Path, targets: Path, source_face: int, target_face: int) -> list[PairRow]:
    listed = []
    for folder in (sources, targets):
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; give a manifest, or two folders as SOURCES:TARGETS")
        listed.append(sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES))
        if not listed[-1]:
            raise UsageError(f"{folder}: no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
    if len(listed[0]) != len(listed[1]):
        raise UsageError(
            f"{sources} has {len(listed[0])} images and {targets} has {len(listed[1])}; two folders are paired one to one by sorted name"
        )
    pairs = zip(*listed, strict=True)
    return [PairRow(row_id(number), str(s.absolute()), str(t.absolute()), source_face, target_face) for number, (s, t) in enumerate(pairs)]
