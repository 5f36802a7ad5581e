"""Identity, head pose and Inception networks on generated people. What a machine lacks weights for is skipped and named."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from e4s_models.face_crops import default_landmarks
from e4s_models.face_mesh import FaceMesh
from e4s_models.head_pose import HeadPose, angles_of, rotation_of
from e4s_models.id_networks import ID_NETWORKS, IdNetwork, TemplateIdNetwork
from e4s_models.inception_fid import InceptionFid
from e4s_models.weights import WeightsError, weight_path


def need(name: str) -> None:
    try:
        weight_path(name)
    except WeightsError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def faces(people: list[Path]) -> Tensor:
    """Four people, (4, 3, 1024, 1024) [-1, 1]."""
    pictures = np.stack([cv2.imread(str(path))[..., ::-1] for path in people])
    return torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module", params=ID_NETWORKS)
def identity(request: pytest.FixtureRequest) -> IdNetwork:
    need(request.param)
    return ID_NETWORKS[request.param]("cpu")


def test_a_mirrored_face_is_the_same_person(identity: IdNetwork, faces: Tensor) -> None:
    features, mirrored = (normalize(identity.features(batch)) for batch in (faces, faces.flip(3)))
    similar = mirrored @ features.T
    assert similar.argmax(1).tolist() == [0, 1, 2, 3]
    others = similar[~torch.eye(4, dtype=torch.bool)]
    assert similar.diagonal().min() > others.max() + 0.02


def test_features_do_not_depend_on_the_batch_or_the_call(identity: IdNetwork, faces: Tensor) -> None:
    together = identity.features(faces)
    assert together.dtype == torch.float32 and len(together) == 4
    assert torch.equal(together, torch.cat([identity.features(faces[i : i + 1]) for i in range(4)]))


def test_landmarks_are_followed(identity: IdNetwork, faces: Tensor) -> None:
    """A face moved in its crop has the feature it had, if its landmarks are told."""
    moved = torch.roll(faces[:1], (40, -60), (2, 3))
    landmarks = default_landmarks(moved) + torch.tensor([-60.0, 40.0])
    cases = (identity.features(faces[:1]), identity.features(moved, landmarks), identity.features(moved))
    here, told, untold = (normalize(features)[0] for features in cases)
    assert here @ told > 0.99
    assert here @ told > here @ untold


def test_wrong_landmarks_are_refused(identity: IdNetwork, faces: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected shape \(2, 68, 2\)"):
        identity.features(faces[:2], torch.zeros(1, 68, 2))


def test_template_network_scales_its_input() -> None:
    network = TemplateIdNetwork(torch.nn.Identity(), scale=127.5, shift=127.5)
    assert network(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 112, 112)).unique().tolist() == [0, 255]


def test_rotation_of_six_numbers() -> None:
    six = torch.tensor([[2.0, 0, 0, 5.0, 3.0, 0], [0, 1.0, 0, 0, 0, 1.0]])
    rotations = rotation_of(six)
    torch.testing.assert_close(rotations[0], torch.eye(3))  # the second column is made orthogonal to the first
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).expand(2, 3, 3))
    assert torch.linalg.det(rotations) == pytest.approx([1, 1])


def test_angles_by_hand() -> None:
    yaw, pitch, roll = np.radians((30, -20, 10))
    about_y = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
    about_z = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
    rotation = torch.from_numpy(about_z @ about_y @ about_x)[None]
    assert angles_of(rotation)[0].tolist() == pytest.approx([30, -20, 10])


def test_head_pose_follows_the_face(faces: Tensor, people: list[Path]) -> None:
    """Yaw agrees with that of the face mesh, mirroring turns it round, and batches do not matter."""
    need("head_pose_6drepnet")
    network, mesh = HeadPose.load(), FaceMesh.load()
    degrees = network.degrees(faces)
    assert degrees.shape == (4, 3)
    pixels = [np.ascontiguousarray(cv2.imread(str(path))[..., ::-1]) for path in people]
    expected = [mesh.geometry.pose(mesh.landmarks(picture)[0]).angles[0] for picture in pixels]
    np.testing.assert_allclose(degrees[:, 0], expected, atol=4)
    mirrored = network.degrees(faces[:2].flip(3))
    np.testing.assert_allclose(mirrored * torch.tensor([-1, 1, -1]), degrees[:2], atol=3)
    assert torch.equal(degrees[1:2], network.degrees(faces[1:2]))


def test_inception_features(faces: Tensor) -> None:
    need("fid_inception")
    network = InceptionFid.load()
    features = network.features(faces[:2])
    assert features.shape == (2, 2048) and features.min() >= 0
    assert torch.equal(features[1:], network.features(faces[1:2]))
    assert not torch.allclose(features[0], features[1], atol=0.1)
