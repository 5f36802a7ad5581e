"""The dense face mesh: geometry by hand, networks on synthetic people."""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from e4s_models.face_mesh import (
    BLENDSHAPE_NAMES,
    FaceMesh,
    Float32,
    Similarity,
    UInt8,
    fit_similarity,
    load_expression_basis,
    read_geometry,
)


@pytest.fixture(scope="module")
def mesh() -> FaceMesh:
    return FaceMesh.load()


@pytest.fixture(scope="module")
def face(people: list[Path]) -> UInt8:
    return np.ascontiguousarray(cv2.imread(str(people[0]))[..., ::-1], np.uint8)


@pytest.fixture(scope="module")
def points(mesh: FaceMesh, face: UInt8) -> Float32:
    return mesh.landmarks(face)[0]


def test_geometry_is_a_closed_symmetric_face(mesh: FaceMesh) -> None:
    geometry = mesh.geometry
    assert geometry.vertices.shape == (468, 3) and mesh.triangles.shape == (898, 3)
    assert np.count_nonzero(geometry.weights) == 33
    nose, chin, brow = geometry.vertices[[1, 152, 10]]
    assert brow[1] < nose[1] < chin[1] and nose[2] < chin[2]  # y down, z away from the camera
    mirror = geometry.mirror
    assert mirror.shape == (478,)
    np.testing.assert_array_equal(mirror[mirror], np.arange(478))
    assert (mirror[33], mirror[61], mirror[1], mirror[468], mirror[469]) == (263, 291, 1, 473, 476)
    triangles = {frozenset(t) for t in mesh.triangles.tolist()}
    assert {frozenset(mirror[list(t)].tolist()) for t in triangles} == triangles


def test_geometry_message_of_another_mesh_is_refused() -> None:
    vertex = b"".join(b"\x1d" + struct.pack("<f", v) for v in (1, 2, 3, 0, 0))
    message = bytes([0x0A, len(vertex)]) + vertex + b"\x12\x07\x08\x00\x15" + struct.pack("<f", 1)
    with pytest.raises(ValueError, match="expected a mesh of 468 vertices, got 1 vertices"):
        read_geometry(message)


def test_similarity_is_recovered() -> None:
    yaw = np.radians(30)
    turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]], np.float32)
    known = Similarity(2.0, turn, np.array([5, -3, 1], np.float32))
    points = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [9, 9, 9]], np.float32)
    moved = known.apply(points)
    np.testing.assert_allclose(moved[2], [5, -1, 1], atol=1e-6)  # (0, 1, 0) lies on the axis of the turn
    np.testing.assert_allclose(known.inverse().apply(moved), points, atol=1e-5)
    moved[4] += 100  # has no weight
    fitted = fit_similarity(points, moved, np.array([1, 1, 1, 1, 0], np.float32))
    assert fitted.scale == pytest.approx(2, abs=1e-5)
    assert fitted.angles == pytest.approx((30, 0, 0), abs=1e-4)
    np.testing.assert_allclose(fitted.shift, [5, -3, 1], atol=1e-5)


def test_landmarks_lie_on_the_face(mesh: FaceMesh, face: UInt8) -> None:
    points, presence = mesh.landmarks(face)
    assert points.shape == (478, 3) and points.dtype == np.float32
    assert presence > 0.99
    # an FFHQ-aligned crop: the eyes' middle, the mouth's middle
    np.testing.assert_allclose(points[[33, 133, 362, 263], :2].mean(0), [512, 480], atol=25)
    assert abs(points[13, 0] - 512) < 60 and 660 < points[13, 1] < 780
    assert points[1, 2] < points[234, 2]  # the nose is nearer than the cheek's edge
    np.testing.assert_array_equal(points, mesh.landmarks(face)[0])


def test_landmarks_follow_the_picture(mesh: FaceMesh, face: UInt8, points: Float32) -> None:
    move = np.array([[0.9, -0.15, 120], [0.15, 0.9, -40]])  # 9.5 degrees, 0.91
    turned = cv2.warpAffine(face, move, (1024, 1024), borderMode=cv2.BORDER_REFLECT_101)
    expected = points[:, :2] @ move[:, :2].T + move[:, 2]
    found = mesh.landmarks(np.asarray(turned, np.uint8))[0]
    assert np.linalg.norm(found[:, :2] - expected, axis=1).mean() < 5  # px
    half = np.asarray(cv2.resize(face, (512, 512), interpolation=cv2.INTER_AREA), np.uint8)
    assert np.linalg.norm(2 * mesh.landmarks(half)[0][:, :2] + 0.5 - points[:, :2], axis=1).mean() < 2


def test_no_face_has_no_presence(mesh: FaceMesh) -> None:
    assert mesh.landmarks(np.full((256, 256, 3), 128, np.uint8))[1] < 0.1
    with pytest.raises(ValueError, match=r"expected shape \(H, W, 3\), got \(256, 256\)"):
        mesh.landmarks(np.zeros((256, 256), np.uint8))


def test_blendshapes_see_an_opened_mouth_and_a_closed_eye(mesh: FaceMesh, points: Float32) -> None:
    before = mesh.blendshapes(points, 1024)
    assert before.shape == (52,) and before.dtype == np.float32 and len(BLENDSHAPE_NAMES) == 52
    assert before.min() >= 0 and before.max() <= 1
    basis = load_expression_basis()
    pose = mesh.geometry.pose(points)
    for name, amount in (("jawOpen", 1.0), ("eyeBlinkLeft", 1.0)):
        index = BLENDSHAPE_NAMES.index(name)
        shape = pose.inverse().apply(points)
        shape[:468] += amount * basis[index]
        assert mesh.blendshapes(pose.apply(shape), 1024)[index] > before[index] + 0.05


def test_expression_basis_moves_what_it_names(mesh: FaceMesh) -> None:
    basis = load_expression_basis()
    assert basis.shape == (52, 468, 3) and np.isfinite(basis).all()
    assert np.abs(basis).max() < 3  # cm
    jaw, smile, blink = (basis[BLENDSHAPE_NAMES.index(name)] for name in ("jawOpen", "mouthSmileLeft", "eyeBlinkLeft"))
    assert jaw[152, 1] - jaw[10, 1] > 1 > abs(jaw[1, 1] - jaw[10, 1])  # the chin sinks from the forehead, the nose stays
    assert smile[291, 1] < -0.2 and smile[291, 0] > 0.2  # the person's left corner, on the image's right, goes up and out
    assert blink[386, 1] > 0.2 and blink[386, 1] > 2 * abs(blink[159, 1])  # the left lid
    left, right = basis[BLENDSHAPE_NAMES.index("mouthSmileLeft")], basis[BLENDSHAPE_NAMES.index("mouthSmileRight")]
    np.testing.assert_allclose(left[mesh.geometry.mirror[:468]] * [-1, 1, 1], right, atol=0.02)
