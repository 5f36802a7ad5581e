"""Evaluation networks that the user brings: declared, tried when added, verified ever after."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from e4s_models.user_network import ROLES, add_user_network, folder, load_user_network, user_convention, user_network_state
from e4s_models.weights import WeightsError, WeightsMissing, weight_path
from flows.cli import main

SMALL = """
height = 8
width = 6
dimensions = 4
"""


class Means(nn.Module):
    """The mean of each channel, and the top left value of the first."""

    def __init__(self, channel_axis: int = 1) -> None:
        super().__init__()
        self.others = (2, 3) if channel_axis == 1 else (1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.mean(dim=self.others), x[:, :1, 0, 0]], dim=1)


class Two(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        means = Means()(x)
        return means[:, :2], 2 * means


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E4S_HOME", str(tmp_path / "home"))


def traced(path: Path, module: nn.Module | None = None, convention: str = SMALL, layout: str = "NCHW") -> Path:
    torch.jit.trace(module or Means(), torch.zeros((1, 3, 8, 6) if layout == "NCHW" else (1, 8, 6, 3))).save(str(path))
    path.with_suffix(".toml").write_text(convention)
    return path


def faces(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 8, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_file_is_registered_once_and_runs_as_declared(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match="--network cosface"):
        load_user_network("cosface")
    file = traced(tmp_path / "own.pt")
    assert add_user_network("cosface", file) == "added"
    assert add_user_network("cosface", file) == "unchanged"
    assert user_network_state("cosface") == "ok"
    assert user_convention("cosface").dimensions == 4
    network = load_user_network("cosface")
    assert network.name == "own.pt"
    assert len(network.sha256) == 64
    outputs = network(faces(3))
    expected = Means()((faces(3) + 1) * 127.5 / 128 - 127.5 / 128)  # CosFace's own (x - 127.5) / 128
    np.testing.assert_allclose(outputs, expected.numpy(), atol=1e-6)
    np.testing.assert_array_equal(outputs[:1], network(faces(3)[:1]))
    assert network(faces(0)).shape == (0, 4)
    assert not list(folder().glob("*.tmp"))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("colour", ["RGB", "BGR"])
def test_colour_layout_and_scale_are_as_declared(tmp_path: Path, colour: str, layout: str) -> None:
    convention = f'{SMALL}colour = "{colour}"\nlayout = "{layout}"\nmean = [0, 1, 2]\nstd = [1, 2, 4]\n'
    add_user_network("cosface", traced(tmp_path / "own.pt", Means(1 if layout == "NCHW" else 3), convention, layout))
    picture = torch.zeros(1, 3, 8, 6)  # grey level 127.5
    picture[:, 0] = 1  # red: 255
    (found,) = load_user_network("cosface")(picture)
    levels = [255.0, 127.5, 127.5] if colour == "RGB" else [127.5, 127.5, 255.0]
    means = [level - mean for level, mean in zip(levels, (0, 1, 2), strict=True)]
    expected = [value / std for value, std in zip(means, (1, 2, 4), strict=True)]
    np.testing.assert_allclose(found, [*expected, expected[0]], rtol=1e-6)


def message(*parts: tuple[int, int | bytes]) -> bytes:
    """A protobuf message of small fields: (number, value)."""
    return b"".join(
        bytes([number << 3, value]) if isinstance(value, int) else bytes([number << 3 | 2, len(value)]) + value for number, value in parts
    )


def global_average_onnx(sides: tuple[int, int]) -> bytes:
    """An ONNX graph: the mean of each channel of one picture, (1, 3, H, W) -> (1, 3, 1, 1)."""

    def described(name: bytes, shape: tuple[int, ...]) -> bytes:
        dimensions = message(*((1, message((1, size))) for size in shape))
        return message((1, name), (2, message((1, message((1, 1), (2, dimensions))))))

    node = message((1, b"x"), (2, b"y"), (4, b"GlobalAveragePool"))
    graph = message((1, node), (2, b"g"), (11, described(b"x", (1, 3, *sides))), (12, described(b"y", (1, 3, 1, 1))))
    return message((1, 7), (7, graph), (8, message((1, b""), (2, 11))))


def test_an_onnx_file_of_fixed_batch(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    file = tmp_path / "own.onnx"
    file.write_bytes(global_average_onnx((8, 6)))
    file.with_suffix(".toml").write_text(SMALL.replace("4", "3") + "mean = [0, 0, 0]\nstd = [1, 1, 1]\n")
    add_user_network("inception", file)
    found = load_user_network("inception")(faces(3))
    np.testing.assert_allclose(found, ((faces(3) + 1) * 127.5).mean(dim=(2, 3)).numpy(), rtol=1e-5)
    file.write_bytes(global_average_onnx((6, 8)))
    with pytest.raises(WeightsError, match="correct `height`, `width` or `layout`"):
        add_user_network("inception", file, replace=True)


def test_a_real_onnx_file() -> None:
    pytest.importorskip("onnxruntime")
    try:
        file = weight_path("arcface_mbf")
    except WeightsError as error:
        pytest.skip(str(error))
    assert add_user_network("cosface", file) == "added"
    network = load_user_network("cosface")
    faces = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    outputs = network(faces)
    assert outputs.shape == (2, 512)
    assert outputs.dtype == np.float32
    np.testing.assert_array_equal(network(faces[1:]), outputs[1:])
    with pytest.raises(WeightsError, match=r"its convention says \(B, 3, 224, 224\)"):
        add_user_network("deep3d", file)


def test_one_of_several_outputs(tmp_path: Path) -> None:
    file = traced(tmp_path / "two.pt", Two())
    with pytest.raises(WeightsError, match="2 outputs"):
        add_user_network("cosface", file)
    file.with_suffix(".toml").write_text(SMALL + 'output = "1"\n')
    add_user_network("cosface", file)
    assert load_user_network("cosface")(faces()).shape == (2, 4)


def test_another_file_and_a_changed_copy_are_refused(tmp_path: Path) -> None:
    file = traced(tmp_path / "own.pt")
    add_user_network("cosface", file)
    other = traced(tmp_path / "other.pt", nn.Sequential(Means(), nn.Linear(4, 4)))
    with pytest.raises(WeightsError, match="not the file first added"):
        add_user_network("cosface", other)
    copy = folder() / "cosface.network"
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    assert user_network_state("cosface") == "damaged"
    with pytest.raises(WeightsError, match="was changed since"):
        load_user_network("cosface")
    assert add_user_network("cosface", file) == "added"
    assert add_user_network("cosface", other, replace=True) == "added"
    assert load_user_network("cosface").name == "other.pt"


def test_other_numbers_than_when_added_are_noticed(tmp_path: Path) -> None:
    add_user_network("cosface", traced(tmp_path / "own.pt"))
    path = folder() / "cosface.json"
    stored = json.loads(path.read_text())
    stored["probe"][0][0] += 0.01
    path.write_text(json.dumps(stored))
    with pytest.raises(WeightsError, match="other numbers here"):
        load_user_network("cosface")
    path.write_text("{")
    assert user_network_state("cosface") == "damaged"
    with pytest.raises(WeightsError, match="is damaged"):
        load_user_network("cosface")


class Constant(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))[:, :1] * 0 + torch.ones(1, 4)


class Infinite(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Means()(x) / 0


@pytest.mark.parametrize(
    ("module", "convention", "message"),
    [
        (Means(), SMALL.replace("4", "5"), r"shape \(1, 4\) per face, expected 5 numbers"),
        (Constant(), SMALL, "same output for two different pictures"),
        (Infinite(), SMALL, "not finite"),
        (nn.Sequential(nn.Flatten(), nn.Linear(144, 4)), SMALL.replace("8", "9"), "cannot be run as its convention says"),
        (Means(), SMALL + "size = 3", "unknown entry 'size'"),
        (Means(), SMALL + "std = [0, 1, 1]", "those of std above 0"),
        (Means(), SMALL + "mean = 127.5", "three grey levels"),
        (Means(), SMALL + 'colour = "GBR"', "RGB or BGR"),
        (Means(), "height = -1", "above 0"),
        (Means(), "height", "is not TOML"),
    ],
)
def test_a_wrong_file_or_convention_is_refused(tmp_path: Path, module: nn.Module, convention: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        add_user_network("cosface", traced(tmp_path / "own.pt", module, convention))
    assert user_network_state("cosface") == "absent"


def test_what_is_no_network_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "file.onnx"
    path.write_text("no network")
    with pytest.raises(WeightsError, match="cannot be opened as ONNX"):
        add_user_network("cosface", path)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=r"cannot be opened as TorchScript .* torch\.jit\.trace"):
        add_user_network("cosface", path)
    with pytest.raises(WeightsError, match="unknown network 'other'; choose from cosface, deep3d, inception"):
        add_user_network("other", path)
    with pytest.raises(WeightsError, match="no such file"):
        add_user_network("cosface", tmp_path / "nowhere.onnx")


def test_published_conventions_differ_where_the_networks_do() -> None:
    assert {role: (known.height, known.dimensions) for role, known in ROLES.items()} == {
        "cosface": (112, 512),
        "deep3d": (224, 257),
        "inception": (299, 2048),
    }


def test_faces_of_another_size_are_refused(tmp_path: Path) -> None:
    add_user_network("cosface", traced(tmp_path / "own.pt"))
    with pytest.raises(ValueError, match=r"expected shape \(B, 3, 8, 6\), got \(1, 3, 6, 8\)"):
        load_user_network("cosface")(torch.zeros(1, 3, 6, 8))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = traced(tmp_path / "own.pt")
    assert main(["models", "add", "--network", "cosface", "--file", str(file)]) == 0
    assert "cosface: added (6 x 8 px, RGB" in capsys.readouterr().out
    main(["models", "verify"])
    assert "network cosface: ok" in capsys.readouterr().out
    (folder() / "cosface.network").write_bytes(b"PK")
    assert main(["models", "verify"]) == 2
    assert "run `e4s models add --network cosface --file FILE`" in capsys.readouterr().err
    for wrong in (
        ["--network", "cosface"],
        ["--file", str(file)],
        [],
        ["--from", str(tmp_path), "--network", "cosface", "--file", str(file)],
        ["--network", "cosface", "--file", str(file), "bisenet"],
        ["--from", str(tmp_path), "--convention", str(file)],
        ["--network", "cosface", "--file", str(file), "--convention", str(tmp_path / "nowhere.toml")],
    ):
        assert main(["models", "add", *wrong]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
