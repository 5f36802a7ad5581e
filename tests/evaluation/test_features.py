"""The declared feature networks on pictures: what comes out, what fails, and degenerate runs through real networks."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from e4s_models import added
from e4s_models.dlib_face import FaceDetector
from e4s_models.face_crops import default_landmarks
from e4s_models.hopenet import HopeNet
from e4s_models.user_network import add_user_network
from evaluation.features import NETWORKS, FeatureNetwork, find_landmarks
from evaluation.metrics import METRICS, PairData, measure

RUNNABLE = [network for network in NETWORKS.values() if network.load and network.weight and network.name != "hopenet"]


@pytest.fixture(scope="module")
def faces(people: list[Path]) -> Tensor:
    """Two people, (2, 3, 1024, 1024) [-1, 1]."""
    pictures = np.stack([cv2.imread(str(path))[..., ::-1] for path in people[:2]])
    return torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize("network", RUNNABLE, ids=lambda network: network.name)
def test_features_are_as_declared(network: FeatureNetwork, faces: Tensor) -> None:
    if network.missing():
        pytest.skip(network.missing())
    assert network.load
    extract = network.load("cpu")
    extracted = extract(faces, None)
    assert extracted.features.shape == (2, network.dimensions) and extracted.features.dtype == np.float32
    assert extracted.failures == {} and np.isfinite(extracted.features).all()
    assert np.abs(extracted.features[0] - extracted.features[1]).max() > 0.01
    np.testing.assert_array_equal(extract(faces[1:], None).features, extracted.features[1:])


def test_landmarks_are_found_in_the_middle_or_not_at_all(faces: Tensor) -> None:
    aside = torch.roll(faces[:1], 350, 3)  # a face at the edge is not the aligned one
    found = find_landmarks(FaceDetector.load(), torch.cat([torch.zeros_like(aside), faces[:1], aside]))
    assert found.features.shape == (3, 136)
    assert dict(found.failures) == dict.fromkeys((0, 2), "no face found by the landmark detector")
    away = found.features[1].reshape(68, 2) - default_landmarks(faces)[0].numpy()
    assert np.hypot(*away.T).mean() < 40  # px of 1024 from the mean face


def test_a_picture_without_a_face_fails_with_a_reason(faces: Tensor) -> None:
    load = NETWORKS["blendshapes"].load
    assert load
    extracted = load("cpu")(torch.cat([torch.zeros_like(faces[:1]), faces[:1]]), None)
    assert dict(extracted.failures) == {0: "no face found by the landmark network"}
    data = PairData(
        features={"swapped": extracted.features, "target": extracted.features},
        failures={"swapped": extracted.failures, "target": extracted.failures},
    )
    measured = measure(METRICS["expression"], data, protocol="open", network="blendshapes", sha256="0" * 64).measured
    assert (measured.value, measured.count, measured.failed) == (0, 1, {"no face found by the landmark network": 1})
    assert (measured.protocol, measured.network, measured.sha256) == ("open", "blendshapes", "0" * 64)


def test_hopenet_reads_the_loose_square_once_it_is_added(faces: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    small = HopeNet(counts=(1, 1, 1, 1), width=4).eval()
    monkeypatch.setattr(added, "load_added", lambda name, device: small)
    load = NETWORKS["hopenet"].load
    assert load
    angles = load("cpu")(faces, None).features
    assert angles.shape == (2, 3) and (np.abs(angles) <= 99).all()
    monkeypatch.setattr(added, "load_added", lambda name, device: torch.nn.Identity())
    with pytest.raises(TypeError, match="expected a HopeNet under the name hopenet, got Identity"):
        load("cpu")


class Columns(torch.nn.Module):
    """As many numbers as asked for, each its own: the mean level plus its place."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers = numbers

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(1, 2, 3))[:, None] + torch.arange(self.numbers)


def add_columns(folder: Path, role: str, numbers: int, *more: str) -> None:
    file = folder / f"{role}{numbers}.pt"
    torch.jit.trace(Columns(numbers), torch.zeros(1, 3, 10, 8)).save(str(file))
    file.with_suffix(".toml").write_text("\n".join(["height = 10", "width = 8", f"dimensions = {numbers}", *more]))
    add_user_network(role, file, replace=True)


def test_of_deep3ds_coefficients_the_expression_counts(faces: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("E4S_HOME", str(tmp_path))
    network = NETWORKS["deep3d"]
    assert "`e4s models add --network deep3d --file FILE`" in network.missing() and network.sha256 == ""
    assert network.load
    for numbers, first in ((257, 80), (64, 0)):
        add_columns(tmp_path, "deep3d", numbers)
        assert (network.missing(), network.resolution, len(network.sha256)) == ("", "8 x 10 px", 64)
        features = network.load("cpu")(faces, None).features
        assert features.shape == (2, 64)
        np.testing.assert_allclose(features - features[:, :1], np.tile(np.arange(64), (2, 1)), atol=1e-4)
        assert (np.abs(features[:, 0] - first) <= 1.5).all()
    add_columns(tmp_path, "deep3d", 80)
    assert network.missing().startswith("deep3d was added with 80 numbers per face; expected the 257 coefficients, or the 64 of the exp")


def test_a_crop_that_cannot_be_cut_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("E4S_HOME", str(tmp_path))
    add_columns(tmp_path, "cosface", 9, 'crop = "MTCNN box grown by 20 px"')
    assert "added with the crop 'MTCNN box grown by 20 px', which cannot be cut here" in NETWORKS["cosface"].missing()
    add_columns(tmp_path, "cosface", 9)
    assert NETWORKS["cosface"].missing() == ""
    (tmp_path / "weights/user/cosface.network").write_bytes(b"PK")
    assert "was changed since it was added" in NETWORKS["cosface"].missing()


def test_missing_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("E4S_WEIGHTS", raising=False)
    monkeypatch.setenv("E4S_HOME", str(tmp_path))
    assert "e4s models pull sface" in NETWORKS["sface"].missing()
    assert "e4s models add --from FOLDER hopenet" in NETWORKS["hopenet"].missing()
    assert NETWORKS["hopenet"].sha256 == ""
