"""Manifests as other programs write them: one reader for pairs and videos, one sentence for what cannot be read."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.inputs import PairRow, read_pairs
from flows.video_plan import read_videos
from tasks.graph import UsageError

Text = pytest.CaptureFixture[str]
ROWS = "source,target\na.jpg,b.jpg\n"


def pairs_of(path: Path, content: str | bytes, name: str = "pairs.csv") -> list[PairRow]:
    """Pairs of a manifest with this content in a folder."""
    (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_pairs(str(path / name))


def refused(path: Path, content: str | bytes, name: str = "pairs.csv") -> str:
    with pytest.raises(UsageError) as error:
        pairs_of(path, content, name)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (ROWS.encode(), "pairs.csv"),
        (ROWS.encode(), "PAIRS.CSV"),
        (ROWS.encode("utf-8-sig"), "pairs.csv"),
        (ROWS.encode("utf-16"), "pairs.csv"),
        (ROWS.encode("utf-16-le"), "pairs.csv"),
        (ROWS.encode("utf-16-be"), "pairs.csv"),
        (b"\xef\xbb\xbfsource;target\r\na.jpg;b.jpg\r\n", "pairs.csv"),
        (b"sep=;\r\nsource;target\r\na.jpg;b.jpg\r\n", "pairs.csv"),
        (b"source\ttarget\na.jpg\tb.jpg\n", "pairs.csv"),
        (b"source\ttarget\na.jpg\tb.jpg\n", "pairs.tsv"),
        (b"source , target\n a.jpg , b.jpg \n", "pairs.csv"),
        (b"\nsource,target,,\na.jpg,b.jpg,,\n,,,\n\n", "pairs.csv"),
        (b'"source","target"\r"a.jpg","b.jpg"\r', "pairs.csv"),
    ],
)
def test_tables_as_programs_write_them(content: bytes, name: str, tmp_path: Path) -> None:
    (row,) = pairs_of(tmp_path, content, name)
    assert (row.id, row.source, row.target, row.problem) == ("000000", str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg"), "")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("videos", [False, True])
def test_floats_are_whole_numbers_and_nothing_is_the_default(kind: str, videos: bool, tmp_path: Path) -> None:
    path, second = tmp_path / f"m.{kind}", "video" if videos else "target"
    if kind == "csv":
        path.write_text(f"source,{second},source_face\na.jpg,b.jpg,2.0\na.jpg,b.jpg,\na.jpg,b.jpg,NaN\na.jpg,b.jpg,1.5\n")
    else:
        faces = pa.array([2.0, None, float("nan"), 1.5])
        pq.write_table(pa.table({"source": ["a.jpg"] * 4, second: ["b.jpg"] * 4, "source_face": faces}), path)
    read = read_videos if videos else read_pairs
    rows = list(read(str(path), source_face=3))
    assert [row.source_face for row in rows[:3]] == [2, 3, 3]
    reasons = [getattr(row, "reason", "") or getattr(row, "problem", "") for row in rows]
    assert reasons == ["", "", "", "source_face must be a whole number from 0, got '1.5' in row 4"]


@pytest.mark.parametrize("face", ["-1", "99999999999", "first"])
def test_a_face_that_is_no_number_fails_its_row_alone(face: str, tmp_path: Path) -> None:
    first, second = pairs_of(tmp_path, f"source,target,target_face\na.jpg,b.jpg,{face}\na.jpg,b.jpg,0\n")
    assert first.problem == f"target_face must be a whole number from 0, got {face!r} in row 1"
    assert second.problem == ""


def test_windows_1252_is_read_and_said(tmp_path: Path, capsys: Text) -> None:
    (tmp_path / "café.jpg").touch()
    (row,) = pairs_of(tmp_path, "id;source;target\né;café.jpg;b.jpg\n".encode("cp1252"))
    assert (row.id, row.source, row.problem) == ("é", str(tmp_path / "café.jpg"), "")
    assert "pairs.csv: not UTF-8; letters such as é are read as Windows-1252; save it as UTF-8" in capsys.readouterr().err


def test_names_in_other_normal_forms_are_found(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Zoë") for form in ("NFC", "NFD"))
    (tmp_path / decomposed).mkdir()
    (tmp_path / decomposed / f"{composed}.jpg").touch()
    for spelled in (composed, decomposed):
        row, missing = pairs_of(tmp_path, f"id,source,target\n{spelled},{spelled}/{spelled}.jpg,b.jpg\nx,{spelled}/ü.jpg,b.jpg\n")
        assert Path(row.source).exists()
        assert (row.id, row.problem, missing.problem) == (composed, "", "")


@pytest.mark.parametrize("binary", [False, True])
def test_a_name_that_is_not_utf8_fails_alone_with_a_printable_sentence(binary: bool, tmp_path: Path) -> None:
    name = b"caf\xe9.jpg"
    Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).touch()
    (tmp_path / "a.jpg").touch()
    if binary:
        pq.write_table(pa.table({"source": pa.array([name, b"a.jpg"]), "target": ["a.jpg"] * 2}), tmp_path / "pairs.parquet")
        bad, good = read_pairs(str(tmp_path))
    else:
        bad, good = pairs_of(tmp_path, b"source,target\n" + name + b",a.jpg\na.jpg,a.jpg\n")
    assert bad.problem == "the cell source of row 1: the file name caf\\xe9.jpg is not UTF-8; rename it"
    assert bad.source.encode() == bytes(tmp_path) + b"/caf\\xe9.jpg"
    assert good.problem == ""


def test_a_folder_with_a_name_that_is_not_utf8_is_paired(tmp_path: Path) -> None:
    for folder, names in (("S", [b"caf\xe9.jpg", b"d.jpg"]), ("T", [b"1.jpg", b"2.jpg"])):
        (tmp_path / folder).mkdir()
        for name in names:
            Path(os.fsdecode(bytes(tmp_path / folder) + b"/" + name)).touch()
    bad, good = read_pairs(f"{tmp_path}/S:{tmp_path}/T")
    assert bad.problem == "the file name caf\\xe9.jpg is not UTF-8; rename it"
    assert bad.source.isascii() and good.problem == ""


def test_home_and_variables_in_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("E4S_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("E4S_NOTHING", raising=False)
    (tmp_path / "$5.jpg").touch()
    first, second = pairs_of(tmp_path, "source,target\n~/a.jpg,${E4S_DATA}/b.jpg\n$5.jpg,$E4S_NOTHING/b.jpg\n")
    assert (first.source, first.target) == (str(tmp_path / "home/a.jpg"), str(tmp_path / "data/b.jpg"))
    assert second.source == str(tmp_path / "$5.jpg")
    assert "the cell target of row 2: $E4S_NOTHING/b.jpg: the environment variable E4S_NOTHING is not set" in second.problem


@pytest.mark.parametrize("cell", [r"C:\photos\a.jpg", "C:/photos/a.jpg", r"photos\a.jpg", r"\\server\photos\a.jpg"])
def test_a_windows_path_is_said_so(cell: str, tmp_path: Path) -> None:
    first, second = pairs_of(tmp_path, f"source,target\n{cell},b.jpg\na.jpg,b.jpg\n")
    assert first.problem == f"the cell source of row 1: {cell} is a Windows path; write it with / and as a path of this machine"
    assert second.problem == ""


def refused_path(manifest: str) -> str:
    with pytest.raises(UsageError) as error:
        read_pairs(manifest)
    return str(error.value)


def test_a_windows_path_as_manifest() -> None:
    assert "a Windows path" in refused_path(r"C:\photos\pairs.csv")


def test_a_backslash_that_is_part_of_a_name_is_no_windows_path(tmp_path: Path) -> None:
    (tmp_path / "a\\b.jpg").touch()
    (row,) = pairs_of(tmp_path, "source,target\na\\b.jpg,b.jpg\n")
    assert row.problem == ""


@pytest.mark.parametrize(
    ("content", "name", "parts"),
    [
        ("a.jpg,b.jpg\n", "pairs.csv", ["the first line is no header (it reads a.jpg, b.jpg)", "put a line source,target above it"]),
        ("Source,target\na,b\n", "pairs.csv", ["no column source (it has Source, target)", "rename Source to source"]),
        ("sorce,target\na,b\n", "pairs.csv", ["rename sorce to source"]),
        ("source,target,Source Face\na,b,1\n", "pairs.csv", ["the column 'Source Face' would be ignored; did you mean source_face?"]),
        ("source,target,source\na,b,c\n", "pairs.csv", ["the column source stands twice"]),
        (b"PK\x03\x04 and so on", "pairs.xlsx", ["a spreadsheet; save its sheet as CSV"]),
        (b"PK\x03\x04 and so on", "pairs.csv", ["a spreadsheet; save its sheet as CSV"]),
        (b"\xd0\xcf\x11\xe0 and so on", "pairs.xls", ["a spreadsheet"]),
        (b"", "pairs.csv", ["no column source and no column target"]),
        (b"\xff\xd8\xff", "pairs.jpg", ["a manifest is a .csv or a .parquet file"]),
        ("source,target\n\n,,\n", "pairs.csv", ["no rows"]),
        (b"\xff\xfes", "pairs.csv", ["cannot be read"]),
        (b"source,target\n" + b"a" * 200_000 + b",b\n", "pairs.csv", ["cannot be read (field larger than field limit"]),
    ],
)
def test_tables_that_are_refused(content: str | bytes, name: str, parts: list[str], tmp_path: Path) -> None:
    said = refused(tmp_path, content, name)
    assert str(tmp_path / name) in said
    for part in parts:
        assert part in said


def test_a_column_that_looks_like_another_is_warned_about(tmp_path: Path, capsys: Text) -> None:
    assert pairs_of(tmp_path, "source,target,sorce_face,comment\na,b,1,nice\n")[0].source_face == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "the column 'sorce_face' is ignored; did you mean source_face?" in line


def test_rows_that_do_not_fit_the_header_fail_alone(tmp_path: Path) -> None:
    comma, good, short = pairs_of(tmp_path, "source,target\nParis, 2024.jpg,b.jpg\na.jpg,b.jpg\na.jpg\n")
    assert comma.problem == "row 1 has 3 cells, the header 2; put cells that hold a ',' into quotation marks"
    assert good.problem == ""
    assert short.problem == "the cell target is empty in row 3; fill it in"
    (broken,) = pairs_of(tmp_path, 'source,target\n"a.jpg,b.jpg\na.jpg,b.jpg\n')
    assert "line break" in broken.problem
    (zero,) = pairs_of(tmp_path, b"source,target\na\0.jpg,b.jpg\n")
    assert "zero byte" in zero.problem


@pytest.mark.parametrize("videos", [False, True])
@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (("x", "y", "x"), "rows 1 and 3 have the id 'x'"),
        (("Anna", "y", "anna"), "rows 1 and 3 have ids that differ in case only, 'Anna' and 'anna'"),
        (("e\u0301", "\u00e9"), "rows 1 and 2 have the id '\u00e9'"),
        (("000001", ""), "rows 1 and 2 have the id '000001'"),
    ],
)
def test_ids_that_would_be_one_output_are_refused(ids: tuple[str, ...], said: str, videos: bool, tmp_path: Path) -> None:
    second = "video" if videos else "target"
    (tmp_path / "m.csv").write_text(f"id,source,{second}\n" + "".join(f"{name},a,b\n" for name in ids))
    with pytest.raises(UsageError, match=said):
        list((read_videos if videos else read_pairs)(str(tmp_path / "m.csv")))


def folders(tmp_path: Path, sources: list[str], targets: list[str]) -> str:
    for folder, names in (("S", sources), ("T", targets)):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    return f"{tmp_path}/S:{tmp_path}/T"


def test_hidden_files_in_folders_are_no_pictures(tmp_path: Path) -> None:
    given = folders(tmp_path, ["._1.jpg", "1.jpg", "2.jpg", "Thumbs.db"], ["1.jpg", "2.jpg", ".DS_Store", ".hidden.png"])
    (tmp_path / "T/folder.jpg").mkdir()
    assert [(Path(row.source).name, Path(row.target).name) for row in read_pairs(given)] == [("1.jpg", "1.jpg"), ("2.jpg", "2.jpg")]


def test_folders_of_unequal_numbers_are_refused(tmp_path: Path) -> None:
    given = folders(tmp_path, ["._1.jpg", "1.jpg", "2.jpg"], ["1.jpg", "2.jpg", "3.jpg"])
    assert "S has 2 images and" in refused_path(given)
    assert "T has 3 (3.jpg has no partner)" in refused_path(given)


def test_folders_whose_names_are_shifted_are_warned_about(tmp_path: Path, capsys: Text) -> None:
    assert len(read_pairs(folders(tmp_path, ["1.jpg", "2.jpg"], ["2.jpg", "3.jpg"]))) == 2
    assert "1.jpg goes with 2.jpg; give a manifest if that is not meant" in capsys.readouterr().err


def test_folders_are_sorted_alike_whatever_the_normal_form(tmp_path: Path, capsys: Text) -> None:
    names = ["\u00e9.jpg", "f.jpg"]
    given = folders(tmp_path, names, [unicodedata.normalize("NFD", name) for name in names])
    assert [Path(row.source).name for row in read_pairs(given)] == ["f.jpg", "\u00e9.jpg"]
    assert [unicodedata.normalize("NFC", Path(row.target).name) for row in read_pairs(given)] == ["f.jpg", "\u00e9.jpg"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("manifest", "offered"), [("people/pair.parquet", "people/pairs.parquet"), ("peple/pairs.parquet", "people/pairs.parquet")]
)
def test_a_misspelt_manifest_is_offered(manifest: str, offered: str, tmp_path: Path) -> None:
    (tmp_path / "people").mkdir()
    (tmp_path / "people/pairs.parquet").touch()
    for read in (read_pairs, read_videos):
        with pytest.raises(UsageError, match=f"no such manifest \\(did you mean {tmp_path}/{offered}\\?\\)"):
            list(read(str(tmp_path / manifest)))
    with pytest.raises(UsageError, match=f"no such folder \\(did you mean {tmp_path}/people\\?\\)"):
        read_pairs(f"{tmp_path}/peopel:{tmp_path}/people")


def test_videos_are_read_from_a_folder_and_by_the_same_rules(tmp_path: Path) -> None:
    (tmp_path / "carla.png").touch()
    (tmp_path / "videos.csv").write_bytes(b"source;video;face\na.jpg;b.mp4;1.0\na.jpg;b.mp4;\na.jpg;b.mp4;carla.png\na.jpg;b.mp4;largst\n")
    rows = list(read_videos(str(tmp_path)))
    assert [row.face for row in rows[:3]] == ["1", "0", str(tmp_path / "carla.png")]
    assert [row.reason for row in rows] == ["", "", "", "the cell face of row 4: largst: no such picture (did you mean largest?)"]


@pytest.mark.parametrize(
    ("face", "said"),
    [("largst", "did you mean largest"), ("carl.png", "did you mean .*carla.png"), ("none", "no such picture")],
)
def test_a_person_who_is_not_there_is_refused_before_any_work(
    face: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "carla.png").touch()
    (tmp_path / "videos.csv").write_text("source,video\na.jpg,b.mp4\n")
    with pytest.raises(UsageError, match=said):
        list(read_videos("videos.csv", face=face))
