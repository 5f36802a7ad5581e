import hashlib
import shutil
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from e4s_models.weights import weight_digest
from flows.synth import draw_pairs, make_clip, make_people


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.p*"))}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    make_people(2, 7, folder, pairs=2, size=256)
    return folder


def test_people_and_their_manifest(two: Path) -> None:
    table = pq.read_table(two / "people.parquet")
    rows = table.to_pylist()
    assert [row["file"] for row in rows] == ["people/000000.png", "people/000001.png"]
    assert [row["seed"] for row in rows] == [7, 8]
    assert str(table.schema.field("w").type) == "fixed_size_list<element: float>[512]"
    for row in rows:
        data = (two / row["file"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert row["w_sha256"] == hashlib.sha256(np.array(row["w"], "<f4").tobytes()).hexdigest()
        assert (row["consent"], row["truncation"]) == ("synthetic", 0.7)
        assert row["synthesis_sha256"] == weight_digest("mobile_stylegan_synthesis_bin")
        with Image.open(two / row["file"]) as image:
            assert (image.size, image.mode) == ((256, 256), "RGB")
            assert image.text == {  # type: ignore[attr-defined]
                "e4s:seed": str(row["seed"]),
                "e4s:truncation": "0.7",
                "e4s:w_sha256": row["w_sha256"],
                "e4s:consent": "synthetic",
                "e4s:generator": weight_digest("mobile_stylegan_synthesis_bin"),
            }
            pixels = np.asarray(image).astype(float)
        middle, edge = pixels[96:160, 96:160].mean(axis=(0, 1)), pixels.std()
        assert middle[0] > middle[2] + 10, "the middle of a face is skin: more red than blue"
        assert edge > 20


def test_the_same_bytes_again_and_a_person_does_not_depend_on_the_count(two: Path, tmp_path: Path) -> None:
    make_people(1, 8, tmp_path / "other", size=256)
    assert (tmp_path / "other/people/000000.png").read_bytes() == (two / "people/000001.png").read_bytes()
    make_people(2, 7, tmp_path / "again", pairs=2, size=256)
    assert digests(tmp_path / "again") == digests(two)


def test_only_what_is_missing_or_damaged_is_made_again(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(two, folder)
    import flows.synth

    made: list[Path] = []
    real = flows.synth.write_atomic
    monkeypatch.setattr(flows.synth, "write_atomic", lambda path, data: (made.append(path), real(path, data)))
    steps: list[tuple[int, int]] = []
    make_people(2, 7, folder, pairs=2, size=256, progress=lambda done, all_: steps.append((done, all_)))
    assert [path for path in made if path.suffix == ".png"] == []
    assert steps == [(1, 2), (2, 2)]
    (folder / "people/000000.png").unlink()
    with (folder / "people/000001.png").open("r+b") as file:
        file.write(b"\0")
    make_people(2, 7, folder, pairs=2, size=256)
    assert [path.name for path in made if path.suffix == ".png"] == ["000000.png", "000001.png"]
    assert digests(folder) == digests(two)


def test_a_folder_grows_and_never_loses_people(two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(two, folder)
    make_people(3, 7, folder, size=256)
    make_people(1, 7, folder, size=256)
    assert pq.read_table(folder / "people.parquet")["seed"].to_pylist() == [7, 8, 9]
    with pytest.raises(ValueError, match="holds other people"):
        make_people(2, 8, folder, size=256)


def test_pairs_by_hand() -> None:
    assert sorted(draw_pairs(3, 6, 0)) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    some = draw_pairs(50, 400, 1)
    assert len(set(some)) == 400
    assert all(source != target for source, target in some)
    assert some != draw_pairs(50, 400, 2)


def test_with_people_enough_every_source_is_another() -> None:
    drawn = draw_pairs(500, 500, 0)  # `e4s synth --pairs 500`
    assert len({source for source, _ in drawn}) == len({target for _, target in drawn}) == 500
    assert all(source != target for source, target in drawn)


def test_pairs_file(two: Path) -> None:
    pairs = pq.read_table(two / "pairs.parquet").to_pylist()
    assert [pair["id"] for pair in pairs] == ["000000", "000001"]
    assert sorted((pair["source"], pair["target"]) for pair in pairs) == [
        ("people/000000.png", "people/000001.png"),
        ("people/000001.png", "people/000000.png"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"count": 3, "pairs": 7}, "pairs must be 0 to 6 with 3 people, got 7"),
        ({"pairs": -1}, "pairs must be 0 to 2"),
        ({"truncation": 0}, "truncation must be above 0"),
        ({"truncation": 1.6}, r"at most 1\.5, got 1\.6"),
        ({"truncation": float("nan")}, "truncation"),
        ({"size": 2048}, "size must be 64 to 1024 px"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_people(**{"count": 2, "seed": 0, "out": tmp_path / "out", **arguments})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["", "/people"])
def test_out_is_a_file(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="a file: give a folder"):
        make_people(1, 0, f"{tmp_path}/file{below}")
    assert (tmp_path / "file").read_text() == "mine"


def test_clip_moves_sounds_and_is_the_same_again(tmp_path: Path) -> None:
    paths = [make_clip(1, tmp_path / name, seconds=0.6, fps=5, size=128) for name in ("a.mp4", "b.mp4")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]
    with av.open(str(paths[0])) as clip:
        assert "creation_time" not in clip.metadata
        assert (clip.streams.video[0].codec_context.name, clip.streams.audio[0].codec_context.name) == ("h264", "aac")
        assert float(clip.streams.video[0].duration * clip.streams.video[0].time_base) == pytest.approx(0.6)
        assert float(clip.streams.audio[0].duration * clip.streams.audio[0].time_base) == pytest.approx(0.6, abs=0.03)
        frames = [frame.to_ndarray(format="rgb24").astype(float) for frame in clip.decode(video=0)]
        clip.seek(0)
        sound = np.concatenate([frame.to_ndarray()[0] for frame in clip.decode(audio=0)])
    assert len(frames) == 3
    assert frames[0].shape == (128, 128, 3)
    assert np.abs(frames[1] - frames[2]).mean() > 4, "the head turns"
    assert np.abs(frames[1] - frames[2]).mean() < 60, "it is still the same scene"
    assert 0.02 < np.sqrt((sound**2).mean()) < 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out": "clip.avi"}, r"give the name of an \.mp4 file"),
        ({"size": 101}, "size must be even"),
        ({"fps": 0}, "fps must be 1 to 120"),
        ({"seconds": 0.01}, "seconds must be long enough for one frame, got 0.01"),
        ({"seconds": float("inf")}, "seconds"),
        ({"truncation": 2}, "truncation"),
    ],
)
def test_bad_clip_arguments(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    given = {"seed": 0, "out": "clip.mp4", **arguments}
    given["out"] = tmp_path / str(given["out"])
    with pytest.raises(ValueError, match=message):
        make_clip(**given)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
