"""What the user gives -> pairs: a manifest (csv, parquet) or two folders."""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.graph import UsageError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class PairRow:
    """One line of a manifest; paths are absolute or relative to the working folder."""

    id: str
    source: str
    target: str
    source_face: int = 0
    target_face: int = 0
    problem: str = ""  # why the row cannot be used


def read_pairs(manifest: str, *, source_face: int = 0, target_face: int = 0) -> list[PairRow]:
    """Pairs of a manifest, a folder that holds `pairs.parquet` or `pairs.csv`, or two folders joined by `:` (files matched by sorted name).

    A manifest needs the columns source and target and may have id, source_face and target_face; relative paths are resolved from its
    own folder. A row with an empty cell gets a `problem`; anything wrong with the whole raises UsageError.
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
    rows = _read_table(path)
    if not rows:
        raise UsageError(f"{path}: the manifest has no rows")
    missing = [name for name in ("source", "target") if name not in rows[0]]
    if missing:
        raise UsageError(f"{path}: the manifest has no column {' and no column '.join(missing)} (it has {', '.join(rows[0])})")
    pairs = [_pair(number, row, path.parent, source_face, target_face) for number, row in enumerate(rows)]
    name, count = Counter(pair.id for pair in pairs).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{path}: id {name!r} stands in {count} rows; ids must be unique, or leave the column out")
    return pairs


def _read_table(path: Path) -> list[dict[str, object]]:
    try:
        if path.suffix == ".parquet":
            schema = pq.read_schema(path)
            wanted = [name for name in schema.names if name in ("id", "source", "target", "source_face", "target_face")]
            if not {"source", "target"} <= set(wanted):
                return [dict.fromkeys(schema.names)]
            return list(pq.read_table(path, columns=wanted).to_pylist())
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                return [{str(name): cell for name, cell in row.items()} for row in csv.DictReader(file, restkey="(no header)")]
    except (pa.ArrowException, csv.Error, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path}: the manifest cannot be read ({error})") from None
    raise UsageError(f"{path}: a manifest is a .csv or a .parquet file")


def row_id(number: int) -> str:
    """The id of a row that has none: 000000, 000001, ..."""
    return f"{number:06d}"


def _pair(number: int, row: dict[str, object], folder: Path, source_face: int, target_face: int) -> PairRow:
    problem = ""
    paths = {}
    for role in ("source", "target"):
        cell = str(row[role] or "").strip()
        if not cell:
            problem = f"the cell {role} is empty in row {number + 1}; fill it in"
        paths[role] = str((folder / cell).absolute()) if cell else ""
    faces = {}
    for role, default in (("source", source_face), ("target", target_face)):
        index = row.get(f"{role}_face")
        try:
            faces[role] = default if index in (None, "") else int(str(index))
        except ValueError:
            faces[role], problem = 0, f"{role}_face must be a whole number, got {index!r} in row {number + 1}"
    name = str(row.get("id") or row_id(number))
    if not re.fullmatch(r"[\w-][\w.-]{0,99}", name) or len(name.encode()) > 200:  # it names the output file
        raise UsageError(
            f"row {number + 1}: id {name!r} may hold only letters, digits, '_', '-' and '.', 100 at most, not starting with '.'"
        )
    return PairRow(name, paths["source"], paths["target"], faces["source"], faces["target"], problem)


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
