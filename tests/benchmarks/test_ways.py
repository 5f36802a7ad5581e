"""Ways side by side on pairs of synthetic people, in the profile without a generator."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import identity, known_answer
from benchmarks.ways import limited
from e4s_models.weights import WeightsError, weight_path

Text = pytest.CaptureFixture[str]
WAYS = ("composite", "paste")


@pytest.fixture(scope="module", autouse=True)
def weights_of_the_protocols() -> None:
    for name in {*known_answer.PROTOCOL.weights(), *identity.PROTOCOL.weights()}:
        try:
            weight_path(name)
        except WeightsError as error:
            pytest.skip(str(error))


@pytest.fixture
def manifest(people: list[Path], tmp_path: Path) -> Path:
    """The second person into the first and into the third, who are the right answer."""
    path = tmp_path / "known.csv"
    rows = [f"{people[1]},{target},{target}" for target in (people[0], people[2])]
    path.write_text("\n".join(["source,target,truth", *rows]))
    return path


def test_known_answers_are_measured_and_the_same_command_computes_nothing(manifest: Path, tmp_path: Path, capsys: Text) -> None:
    arguments = ["--photos", str(manifest), "--work", str(tmp_path / "work"), "--profile", "fast", "--ways", *WAYS]
    assert known_answer.main([*arguments, "--limit", "1"]) == 0
    assert re.search(r"^\| truth_psnr, dB \| pixels_in_face \| 1 \| \d\d\.\d+ \| \d\d\.\d+ \|$", capsys.readouterr().out, re.M)
    assert known_answer.main(arguments) == 0
    first = capsys.readouterr()
    assert "2 pairs: 1 done before, 1 to do" in first.out + first.err
    assert re.search(r"^\| truth_cosine \| sface \| 2 \|", first.out, re.M)
    assert re.search(r"^\| reenact, s a pair \| \| \| \d+\.\d{3} \| \d+\.\d{3} \|$", first.out, re.M)
    assert known_answer.main(arguments) == 0
    again = capsys.readouterr()
    assert "2 pairs: 2 done before, 0 to do" in again.out + again.err
    assert [line for line in again.out.splitlines() if line.startswith("|")] == [
        line for line in first.out.splitlines() if line.startswith("|")
    ]


@pytest.mark.slow
def test_photographs_are_compared(manifest: Path, tmp_path: Path, capsys: Text) -> None:
    arguments = ["--photos", str(manifest), "--work", str(tmp_path / "work"), "--profile", "fast", "--ways", *WAYS]
    assert identity.main(arguments) == 0
    out = capsys.readouterr().out
    for metric, network in identity.LINES:
        assert re.search(rf"^\| {metric}\S* .*\| {network} \|", out, re.M), (metric, network)


def test_a_manifest_without_true_pictures_is_refused(people: list[Path], tmp_path: Path, capsys: Text) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(f"source,target\n{people[0]},{people[1]}\n")
    with pytest.raises(SystemExit):
        known_answer.main(["--photos", str(path), "--work", str(tmp_path / "work")])
    assert "the manifest has no column truth" in capsys.readouterr().err


def test_a_limited_manifest_keeps_faces_and_true_pictures(tmp_path: Path) -> None:
    path = tmp_path / "known.csv"
    path.write_text("id,source,target,target_face,truth\na,s.png,t.png,1,u.png\nb,s.png,t.png,0,u.png\n")
    written = limited(path, tmp_path / "work", 1).read_text().splitlines()
    assert written == [
        "id,source,target,source_face,target_face,truth",
        f"a,{tmp_path}/s.png,{tmp_path}/t.png,0,1,{tmp_path}/u.png",
    ]
