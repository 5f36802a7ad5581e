"""Tables that users give, as other programs write them: one reader for manifests of pairs and of videos.

CSV and Parquet give the same cells: text without space around it, "" where nothing stands (None and NaN, too). Text is UTF-8, UTF-16 or
Windows-1252, its separator `,`, `;` or a tab. Paths in cells are found as the file system spells them.
"""

from __future__ import annotations

import csv
import math
import os
import re
import sys
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, Final

import pyarrow as pa

from storage.parquet import open_parquet, read_batches
from storage.spelling import near_path, nearest
from tasks.graph import UsageError

SUFFIXES: Final = (".csv", ".tsv", ".txt", ".parquet")
_SPREADSHEETS: Final = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
_SPREADSHEET_STARTS: Final = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # zip: Excel, LibreOffice, Numbers; OLE: old Excel
_PARQUET_START: Final = b"PAR1"
_SEPARATORS: Final = (",", ";", "\t")
_ALIKE: Final = 0.85  # likeness from which the name of a column that is ignored is warned about
_EMPTY: Final = ("", "nan", "none", "null", "<na>")  # of a number's cell, in lower case
_WHOLE = re.compile(r"0*(\d{1,6})(\.0*)?")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|.*\\")
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")
_FILE_NAME = re.compile(r".*(/|\\|\.[A-Za-z][A-Za-z0-9]{2,3}$)")
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are no UTF-8, as Python keeps them in names


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a table."""

    number: int  # from 1, the header not counted
    cells: Mapping[str, str]  # by column; of the columns that were asked for
    problem: str = ""  # why the row cannot be used


def find_manifest(manifest: str, stem: str, needed: Sequence[str]) -> Path:
    """Return the table that `manifest` names: itself, or `stem`.parquet, .csv or .tsv in the folder that it is. Raises UsageError."""
    path = Path(manifest)
    wanted = f"a .csv or .parquet file with the columns {' and '.join(needed)}"
    if path.is_dir():
        names = [f"{stem}{suffix}" for suffix in (".parquet", ".csv", ".tsv")]
        found = [path / name for name in names if (path / name).exists()]
        if not found:
            raise UsageError(f"{path}: a folder without {stem}.parquet or {stem}.csv{near_path(path / names[0])}; give {wanted}")
        return found[0]
    if is_windows_path(manifest) and not path.exists():
        raise UsageError(f"{manifest}: a Windows path; write it with / and as a path of this machine")
    if not path.exists():
        raise UsageError(f"{printable(manifest)}: no such manifest{near_path(path)}; give {wanted}")
    return path


def read_rows(path: Path, columns: Sequence[str], needed: Sequence[str]) -> Iterator[Record]:
    """Yield the rows of a table, those without any cell left out.

    `columns`: those that are read, of which the `needed` ones must be there; others are ignored, but not if they look like one of these.
    Raises UsageError for a table that cannot be read, or whose header is missing or wrong. Rows are read in pieces, so that a million
    take a few hundred MB at most.
    """
    try:
        yield from _read_rows(path, columns, needed)
    except (pa.ArrowException, csv.Error, UnicodeError, OSError) as error:
        raise UsageError(f"{path}: the manifest cannot be read ({error}); write it again as CSV (UTF-8) or Parquet") from None


def _read_rows(path: Path, columns: Sequence[str], needed: Sequence[str]) -> Iterator[Record]:
    suffix = path.suffix.lower()
    if suffix not in (*SUFFIXES, *_SPREADSHEETS):
        raise UsageError(f"{path}: a manifest is a .csv or a .parquet file")
    with path.open("rb") as file:
        start = file.read(4)
    if suffix in _SPREADSHEETS or start.startswith(_SPREADSHEET_STARTS):
        raise UsageError(f"{path}: a spreadsheet; save its sheet as CSV (in Excel: CSV UTF-8) and give that file")
    if suffix == ".parquet" or start == _PARQUET_START:
        rows = _parquet_rows(path, columns, needed)
    else:
        rows = _text_rows(path, start, columns, needed)
    number, warned = 0, False
    for cells, problem in rows:
        if not any(cells.values()) and not problem:
            continue
        number += 1
        if not warned and any(map(_ESCAPED.search, cells.values())):
            warned = True
            print(
                f"e4s: {path}: not UTF-8; letters such as é are read as Windows-1252; save it as UTF-8 (in Excel: CSV UTF-8)",
                file=sys.stderr,
            )
        yield Record(number, cells, f"row {number} {problem}" if problem else "")
    if not number:
        raise UsageError(f"{path}: the manifest has no rows")


def _parquet_rows(path: Path, columns: Sequence[str], needed: Sequence[str]) -> Iterator[tuple[dict[str, str], str]]:
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        _check_header(path, names, columns, needed)
        for batch in read_batches(file, 10_000, [name for name in names if name in columns]):
            for row in batch.to_pylist():
                yield {name: _text(value) for name, value in row.items()}, ""


def _text(value: Any) -> str:
    """Return a Parquet value as CSV would have it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return os.fsdecode(value).strip() if isinstance(value, bytes) else str(value).strip()


def _text_rows(path: Path, start: bytes, columns: Sequence[str], needed: Sequence[str]) -> Iterator[tuple[dict[str, str], str]]:
    encoding = _encoding(start)
    # what is no UTF-8 is kept byte by byte: it may be a file's own name
    with path.open(newline="", encoding=encoding, errors="surrogateescape" if encoding.startswith("utf-8") else "strict") as file:
        separator, lines = _separator(file, needed)
        reader = csv.reader(lines, delimiter=separator)
        names = [name.strip() for name in next(reader, [])]
        _check_header(path, names, columns, needed)
        for row in reader:
            cells = [cell.strip() for cell in row]
            found = {name: cell for name, cell in zip(names, cells, strict=False) if name in columns}
            problem = ""
            if any(cells[len(names) :]):
                problem = f"has {len(cells)} cells, the header {len(names)}; put cells that hold a {separator!r} into quotation marks"
            elif any("\n" in cell for cell in found.values()):
                problem = "has a cell with a line break in it; close its quotation mark"
            yield {**{name: "" for name in names if name in columns}, **found}, problem


def _encoding(start: bytes) -> str:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    # a header begins with a plain letter, of which UTF-16 makes two bytes
    if start[1:2] == b"\0":
        return "utf-16-le"
    return "utf-16-be" if start[:1] == b"\0" else "utf-8-sig"


def _separator(file: IO[str], needed: Sequence[str]) -> tuple[str, Iterator[str]]:
    """Return the separator that the header shows, and the lines from the header on; Excel's own line `sep=;` counts."""
    first = next((line for line in file if line.strip()), "")
    said = re.fullmatch(r'"?sep=(.)"?\s*', first, re.IGNORECASE)
    if said:
        return said[1], iter(file)

    def fits(separator: str) -> tuple[int, int]:
        cells = [cell.strip() for cell in next(csv.reader([first], delimiter=separator), [])]
        return len(set(needed) & set(cells)), len(cells)

    return max(_SEPARATORS, key=fits), chain((first,), file)


def _check_header(path: Path, names: Sequence[str], columns: Sequence[str], needed: Sequence[str]) -> None:
    """Refuse a header that lacks a needed column, names one twice or misspells one. Raises UsageError."""
    there = [name for name in names if name]
    missing = [name for name in needed if name not in names]
    if len(missing) == len(needed) and any(_FILE_NAME.match(name) for name in there):
        raise UsageError(
            f"{path}: the first line is no header (it reads {printable(', '.join(there))}); put a line {','.join(needed)} above it"
        )
    shown = printable(", ".join(there)) or "none"
    if missing:
        alike = {name: nearest(name, _others(there, columns)) for name in missing}
        offered = ", ".join(f"rename {found} to {name} if that is meant" for name, found in alike.items() if found)
        lacking = f"the manifest has no column {' and no column '.join(missing)} (it has {shown})"
        raise UsageError(f"{path}: {lacking}" + (f"; {offered}" if offered else ""))
    twice = next((name for name in columns if there.count(name) > 1), "")
    if twice:
        raise UsageError(f"{path}: the column {twice} stands twice; leave one out")
    for name in _others(there, columns):
        same = next((known for known in columns if _plain(known) == _plain(name)), "")
        if same:
            raise UsageError(f"{path}: the column {name!r} would be ignored; did you mean {same}? Rename it")
        if close := nearest(name, columns, _ALIKE):
            print(f"e4s: {path}: the column {printable(name)!r} is ignored; did you mean {close}?", file=sys.stderr)


def _others(names: Sequence[str], columns: Collection[str]) -> list[str]:
    return [name for name in names if name not in columns]


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold()


def path_cell(record: Record, column: str, paths: PathCells) -> tuple[str, str]:
    """Return the absolute path in a row's cell ("" where the table has no such column), and a problem, or ""."""
    if column not in record.cells:
        return "", ""
    cell = record.cells[column]
    if not cell:
        return "", f"the cell {column} is empty in row {record.number}; fill it in"
    path, problem = paths.find(cell)
    return path, f"the cell {column} of row {record.number}: {problem}" if problem else ""


def is_windows_path(text: str) -> bool:
    """Return whether a path looks like C:\\photos or photos\\1.jpg."""
    return bool(_WINDOWS.match(text))


def whole_number(column: str, cell: str, default: int) -> tuple[int, str]:
    """Return the number of a cell such as 1 or 1.0, or the default for an empty one or NaN; and a problem, or ""."""
    if cell.casefold() in _EMPTY:
        return default, ""
    if found := _WHOLE.fullmatch(cell):
        return int(found[1]), ""
    return 0, f"{column} must be a whole number from 0, got {printable(cell)!r}"


def legacy_text(cell: str) -> str:
    """Return a cell whose bytes are no UTF-8 as Windows-1252 has it."""
    return os.fsencode(cell).decode("cp1252", "replace") if _ESCAPED.search(cell) else cell


def printable(text: str) -> str:
    """Return a text that any terminal and file takes: bytes that are no UTF-8 are shown as \\xe9."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") if _ESCAPED.search(text) else text


def name_problem(path: str) -> str:
    """Return what is wrong with a path whose bytes are no UTF-8, which no table can hold; "" for others."""
    return f"the file name {printable(Path(path).name)} is not UTF-8; rename it" if _ESCAPED.search(path) else ""


class PathCells:
    """Cells that hold paths -> absolute paths; each is looked up once."""

    def __init__(self, folder: Path) -> None:
        """`folder`: what relative paths are relative to."""
        self._folder = folder
        self._found: dict[str, tuple[str, str]] = {"": ("", "")}
        self._listed: dict[Path, dict[str, str]] = {}

    def find(self, cell: str) -> tuple[str, str]:
        """Return the absolute path that a cell names, and a problem, or ""."""
        if cell not in self._found:
            path, problem = self._find(cell)
            problem = problem or name_problem(path)
            self._found[cell] = printable(path), problem
        return self._found[cell]

    def _find(self, cell: str) -> tuple[str, str]:
        if "\0" in cell:
            return "", f"{cell!r} holds a zero byte; correct the path"
        path = (self._folder / cell).absolute()
        plain = cell.isascii() and not cell.startswith("~") and not any(letter in cell for letter in "$\\:")
        if plain or os.path.lexists(path):
            return str(path), ""
        if is_windows_path(cell):
            return str(path), f"{cell} is a Windows path; write it with / and as a path of this machine"
        expanded = os.path.expandvars(os.path.expanduser(legacy_text(cell)))  # noqa: PTH111 (a Path raises for an unknown user)
        if unset := _VARIABLE.search(expanded):
            return str(path), f"{cell}: the environment variable {unset[1]} is not set; set it or write the path out"
        return str(self._spelled((self._folder / expanded).absolute())), ""

    def _spelled(self, path: Path) -> Path:
        """Return a path as the file system spells it: composed and decomposed letters (NFC, NFD) are the same."""
        if str(path).isascii() or path.exists() or path == path.parent:
            return path
        parent = self._spelled(path.parent)
        if parent not in self._listed:
            names = os.listdir(parent) if parent.is_dir() else []  # noqa: PTH208 (names alone)
            self._listed[parent] = {unicodedata.normalize("NFC", name): name for name in sorted(names)}
        return parent / self._listed[parent].get(unicodedata.normalize("NFC", path.name), path.name)


class Ids:
    """The ids of a manifest's rows, which name the output files."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: dict[str, tuple[int, str]] = {}

    def take(self, record: Record) -> str:
        """Return the id of a row. Raises UsageError if it cannot name a file, or is that of an earlier row, case being ignored."""
        name = check_id(record.number - 1, legacy_text(record.cells.get("id", "")))
        number, earlier = self._seen.setdefault(name.casefold(), (record.number, name))
        if number != record.number:
            same = f"the id {name!r}" if name == earlier else f"ids that differ in case only, {earlier!r} and {name!r}"
            raise UsageError(
                f"{self._path}: rows {number} and {record.number} have {same}; an id names the row's output: "
                "make them differ, or leave the column out"
            )
        return name


_ID = re.compile(r"[\w-][\w.-]{0,99}")


def row_id(number: int) -> str:
    """The id of a row that has none: 000000, 000001, ..."""
    return f"{number:06d}"


def check_id(number: int, given: str) -> str:
    """Return the id of a manifest's row (counted from 0), letters composed (NFC). Raises UsageError if it cannot name a file."""
    name = unicodedata.normalize("NFC", given) if given else row_id(number)
    if not _ID.fullmatch(name) or len(name.encode()) > 200:
        raise UsageError(
            f"row {number + 1}: id {name!r} may hold only letters, digits, '_', '-' and '.', 100 at most, not starting with '.'"
        )
    return name
