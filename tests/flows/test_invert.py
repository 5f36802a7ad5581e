"""`e4s invert` and the default way to swap, through the command line, on synthetic people."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from flows.cli import main


def read(path: Path) -> np.ndarray:
    image = cv2.imread(str(path))
    assert image is not None
    return np.asarray(image)


def test_inverting_writes_what_it_says_and_steps_help(people_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(people_folder / "people/000001.png")
    metrics = []
    for steps in (0, 3):
        out = tmp_path / str(steps)
        assert main(["invert", image, "-o", str(out), "--refine", str(steps), "--device", "cpu"]) == 0
        metrics.append(json.loads((out / "metrics.json").read_text()))
        assert {path.name for path in out.iterdir()} == {"face.png", "reconstruction.png", "side_by_side.png", "codes.npz", "metrics.json"}
    assert "psnr" in capsys.readouterr().out
    assert metrics[1]["psnr"] > metrics[0]["psnr"]
    assert metrics[1]["lpips"] < metrics[0]["lpips"]
    assert metrics[1]["identity_cosine"] > metrics[0]["identity_cosine"]
    sheet, face = read(tmp_path / "3/side_by_side.png"), read(tmp_path / "3/face.png")
    assert sheet.shape == (1024, 2048, 3)
    assert np.array_equal(sheet[:, :1024], face)
    with np.load(tmp_path / "3/codes.npz") as stored:
        assert stored["codes"].shape == (12, 23, 512)
        assert stored["regions"].shape == (1024, 1024)


def test_the_known_code_inverts_best(people_folder: Path, tmp_path: Path) -> None:
    image = str(people_folder / "people/000001.png")
    assert main(["invert", image, "-o", str(tmp_path), "--stage", "encode=synth", "--device", "cpu"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["psnr"] > 28
    assert metrics["identity_cosine"] > 0.95


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["nowhere.png"], 1, "nowhere.png: no such picture"),
        (["{noise}"], 2, "no face"),
        (["{person}", "--refine", "-1"], 1, "steps must be 0 to"),
        (["{person}", "--stage", "encode=rgi"], 1, "encode"),
        (["{person}", "--face", "3"], 2, "face"),
        (["{person}", "--set", "swap.target_layers=3"], 1, "--set swap.target_layers=3 has no effect here"),
        (["{person}", "--set", "parse_swapped.side=256"], 1, "--set parse_swapped.side=256 has no effect here"),
        (["{person}", "--stage", "recolor=none"], 1, "--stage recolor=none has no effect here"),
        (["{person}", "--set", "swop.side=3"], 1, "unknown stage 'swop'"),
    ],
)
def test_what_cannot_be_inverted_is_one_sentence(
    arguments: list[str], code: int, part: str, people_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = tmp_path / "noise.png"
    cv2.imwrite(str(noise), np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8))
    named = {"{noise}": str(noise), "{person}": str(people_folder / "people/000001.png")}
    given = [named.get(argument, argument) for argument in arguments]
    assert main(["invert", *given, "-o", str(tmp_path / "out"), "--device", "cpu"]) == code
    error = capsys.readouterr().err.strip()
    assert part in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_where_nothing_can_be_written_nothing_is_computed(people_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for folder, part in (
        ("/proc/e4s", "cannot be written"),
        (str(tmp_path / "file"), "a file stands"),
        (str(tmp_path / "file/x"), "a file stands"),
    ):
        assert main(["invert", str(people_folder / "nowhere.png"), "-o", folder]) == 1, "before the picture is looked at"
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line
        assert "choose another -o" in line


def test_a_profile_may_set_stages_that_are_not_run(people_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("[align]\nside = 256\n[swap]\nhole = 'eq17'\n[parse_driven]\n[encode]\nbackend = 'encoder'\n")
    image = str(people_folder / "people/000000.png")
    assert main(["invert", image, "-o", str(tmp_path), "--profile", str(tmp_path / "own.toml"), "--device", "cpu"]) == 0
    assert read(tmp_path / "face.png").shape == (256, 256, 3)


def test_the_default_swap_shows_the_source(people_folder: Path, tmp_path: Path) -> None:
    import torch

    from e4s_models.id_networks import ID_NETWORKS

    source, target = (people_folder / f"people/{index:06d}.png" for index in (0, 1))
    out = tmp_path / "out.png"
    assert main(["swap", str(source), str(target), "-o", str(out), "--refine", "3", "--device", "cpu"]) == 0
    network = ID_NETWORKS["dlib_face_id"]("cpu")
    faces = torch.from_numpy(np.stack([read(path)[..., ::-1] for path in (out, source, target)])).permute(0, 3, 1, 2).float() / 127.5 - 1
    swapped, wanted, other = network.features(faces)
    assert (swapped - wanted).norm() < (swapped - other).norm()
    assert np.array_equal(read(out)[:40], read(target)[:40]), "beside the face nothing changes"
