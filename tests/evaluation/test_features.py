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
from evaluation.features import NETWORKS, FeatureNetwork, find_landmarks
from evaluation.metrics import METRICS, PairData, measure

RUNNABLE = [network for network in NETWORKS.values() if network.load and network.name != "hopenet"]


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


def test_missing_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("E4S_WEIGHTS", raising=False)
    monkeypatch.setenv("E4S_HOME", str(tmp_path))
    assert "e4s models pull sface" in NETWORKS["sface"].missing()
    assert "e4s models add --from FOLDER hopenet" in NETWORKS["hopenet"].missing()
    assert NETWORKS["hopenet"].sha256 == ""
