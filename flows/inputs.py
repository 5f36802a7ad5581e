"""What the user gives -> pairs: a manifest (csv, parquet) or two folders."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.tables import Ids, PathCells, find_manifest, is_windows_path, name_problem, path_cell, printable, read_rows, row_id, whole_number
from storage.spelling import near_path
from tasks.graph import UsageError

_COLUMNS = ("id", "source", "target", "source_face", "target_face", "truth")
NEEDED = ("source", "target")
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
    should equal, for `e4s report`; then each row needs it); relative paths are resolved from its own folder, `~` and `$NAME` in them
    are replaced. A row with an empty or wrong cell gets a `problem`; anything wrong with the whole, such as an id that stands twice, raises
    UsageError. The same pair in several rows is fine: each row has its output, and it is computed once.
    """
    if not Path(manifest).exists() and ":" in manifest and not is_windows_path(manifest):
        sources, _, targets = manifest.partition(":")
        return _folder_pairs(Path(sources), Path(targets), source_face, target_face)
    return list(_read_pairs(find_manifest(manifest, "pairs", NEEDED), source_face, target_face))


def _read_pairs(path: Path, source_face: int, target_face: int) -> Iterator[PairRow]:
    paths, ids = PathCells(path.parent), Ids(path)
    defaults = {"source_face": source_face, "target_face": target_face}
    for record in read_rows(path, _COLUMNS, NEEDED):
        cells, problem = record.cells, record.problem
        found: dict[str, str] = {}
        for role in ("source", "target", "truth"):
            found[role], wrong = path_cell(record, role, paths)
            problem = problem or wrong
        faces: dict[str, int] = {}
        for column, default in defaults.items():
            faces[column], wrong = whole_number(column, cells.get(column, ""), default)
            problem = problem or (f"{wrong} in row {record.number}" if wrong else "")
        yield PairRow(
            ids.take(record),
            found["source"],
            found["target"],
            faces["source_face"],
            faces["target_face"],
            truth=found["truth"],
            problem=problem,
        )


def _folder_pairs(sources: Path, targets: Path, source_face: int, target_face: int) -> list[PairRow]:
    """Pair the pictures of two folders by sorted name. Raises UsageError, where the numbers of pictures differ, too."""
    listed = [_pictures(folder) for folder in (sources, targets)]
    if len(listed[0]) != len(listed[1]):
        raise UsageError(
            f"{sources} has {len(listed[0])} images and {targets} has {len(listed[1])}{_alone(*listed)}; "
            "two folders are paired one to one by sorted name: make them equal, or give a manifest"
        )
    pairs = list(zip(*listed, strict=True))
    by_name = [_stem(source) == _stem(target) for source, target in pairs]
    if {_stem(source) for source in listed[0]} & {_stem(target) for target in listed[1]} and not all(by_name):
        source, target = pairs[by_name.index(False)]
        print(
            f"e4s: {sources} and {targets} are paired by sorted name, though only some names are in both: "
            f"{printable(source.name)} goes with {printable(target.name)}; give a manifest if that is not meant",
            file=sys.stderr,
        )
    rows = []
    for number, pair in enumerate(pairs):
        first, second = (str(path.absolute()) for path in pair)
        problem = name_problem(first) or name_problem(second)
        rows.append(PairRow(row_id(number), printable(first), printable(second), source_face, target_face, problem=problem))
    return rows


def _pictures(folder: Path) -> list[Path]:
    """Return the pictures right in a folder in the order of their names; hidden files, such as macOS's `._1.jpg`, are none."""
    if not folder.is_dir():
        raise UsageError(f"{printable(str(folder))}: no such folder{near_path(folder)}; give a manifest, or two folders as SOURCES:TARGETS")
    files = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")]
    found = sorted((path for path in files if not path.is_dir()), key=lambda path: (unicodedata.normalize("NFC", path.name), path.name))
    if not found:
        raise UsageError(f"{folder}: no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
    return found


def _stem(path: Path) -> str:
    return unicodedata.normalize("NFC", path.stem)


def _alone(sources: Sequence[Path], targets: Sequence[Path]) -> str:
    """Return ` (3.jpg has no partner)` for the first picture whose name is in one folder only, if the folders share other names."""
    stems = {_stem(path) for path in sources} & {_stem(path) for path in targets}
    alone = [path.name for path in (*sources, *targets) if _stem(path) not in stems]
    return f" ({printable(alone[0])} has no partner)" if stems and alone else ""
