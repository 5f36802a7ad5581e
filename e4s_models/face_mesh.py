"""Dense face mesh: 478 landmarks in 3-D, 52 blendshape coefficients, the canonical mesh and a linear expression basis.

Source: MediaPipe's `face_landmarker_v2_with_blendshapes.task` (a zip of two tflite networks and the canonical geometry), run with a
light tflite runtime on one thread so that the same crop gives the same bytes.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape

if TYPE_CHECKING:
    from typing import Self

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

NUM_POINTS = 478  # 468 of the mesh, then 5 of each iris (centre, right, top, left, bottom)
NUM_VERTICES = 468
NUM_BLENDSHAPES = 52

_GEOMETRY = "geometry_pipeline_metadata_landmarks.binarypb"
_SIDE = 256  # px, input of the landmark network
_ROI_SCALE = 1.5  # square region over the box of the points, as MediaPipe tracks
_EYE_CORNERS = (33, 263)  # outer ones: their line is the roll of the region

# The 146 points that the blendshape network reads: the outlines of face, eyes, brows and lips, the nose bridge and both irises
# (MediaPipe face_blendshapes_graph, kLandmarksSubsetIdxs).
_BLENDSHAPE_POINTS = np.fromstring(
    """0 1 4 5 6 7 8 10 13 14 17 21 33 37 39 40 46 52 53 54 55 58 61 63 65 66 67 70 78 80 81 82 84 87 88 91 93 95 103 105 107 109 127
    132 133 136 144 145 146 148 149 150 152 153 154 155 157 158 159 160 161 162 163 168 172 173 176 178 181 185 191 195 197 234 246
    249 251 263 267 269 270 276 282 283 284 285 288 291 293 295 296 297 300 308 310 311 312 314 317 318 321 323 324 332 334
    336 338 356 361 362 365 373 374 375 377 378 379 380 381 382 384 385 386 387 388 389 390 397 398 400 402 405 409 415 454 466 468
    469 470 471 472 473 474 475 476 477""",
    np.int64,
    sep=" ",
)

BLENDSHAPE_NAMES = (
    "_neutral", "browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight", "cheekPuff", "cheekSquintLeft",
    "cheekSquintRight", "eyeBlinkLeft", "eyeBlinkRight", "eyeLookDownLeft", "eyeLookDownRight", "eyeLookInLeft", "eyeLookInRight",
    "eyeLookOutLeft", "eyeLookOutRight", "eyeLookUpLeft", "eyeLookUpRight", "eyeSquintLeft", "eyeSquintRight", "eyeWideLeft",
    "eyeWideRight", "jawForward", "jawLeft", "jawOpen", "jawRight", "mouthClose", "mouthDimpleLeft", "mouthDimpleRight", "mouthFrownLeft",
    "mouthFrownRight", "mouthFunnel", "mouthLeft", "mouthLowerDownLeft", "mouthLowerDownRight", "mouthPressLeft", "mouthPressRight",
    "mouthPucker", "mouthRight", "mouthRollLower", "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper", "mouthSmileLeft",
    "mouthSmileRight", "mouthStretchLeft", "mouthStretchRight", "mouthUpperUpLeft", "mouthUpperUpRight", "noseSneerLeft",
    "noseSneerRight",
)  # fmt: skip
"""The network's output order (ARKit's names)."""


def message_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Read one level of a protobuf message: (field number, int, or bytes of a fixed32, fixed64 or length-delimited value)."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value, at

    at = 0
    while at < len(message):
        tag, at = varint(at)
        if tag & 7 == 0:
            value, at = varint(at)
            yield tag >> 3, value
            continue
        if tag & 7 == 2:
            size, at = varint(at)
        else:
            size = {1: 8, 5: 4}[tag & 7]
        yield tag >> 3, message[at : at + size]
        at += size


def read_geometry(message: bytes) -> tuple[Float32, Int32, Float32]:
    """Parse MediaPipe's `geometry_pipeline_metadata`: canonical vertices (468, 3) cm, triangles (T, 3), Procrustes weights (468,).

    The vertices are turned to image axes: x right, y down, z away from the camera; the face looks at the camera.
    Raises ValueError when the message does not hold that mesh.
    """
    mesh = b""
    weights = np.zeros(NUM_VERTICES, np.float32)
    for number, value in message_fields(message):
        if number == 1:
            mesh = value
        elif number == 2:
            landmark = dict(message_fields(value))
            weights[landmark[1]] = struct.unpack("<f", landmark[2])[0]
    floats = [struct.unpack("<f", value)[0] for number, value in message_fields(mesh) if number == 3]  # x y z u v per vertex
    indices = [value for number, value in message_fields(mesh) if number == 4]
    if len(floats) != 5 * NUM_VERTICES or len(indices) % 3 or not weights.any():
        raise ValueError(f"expected a mesh of {NUM_VERTICES} vertices, got {len(floats) / 5:g} vertices and {len(indices) / 3:g} triangles")
    vertices = np.array(floats, np.float32).reshape(NUM_VERTICES, 5)[:, :3] * np.array([1, -1, -1], np.float32)
    return vertices, np.array(indices, np.int32).reshape(-1, 3), weights


@dataclass(frozen=True)
class Similarity:
    """x -> scale * rotation @ x + shift, in 3-D."""

    scale: float
    rotation: Float32  # (3, 3)
    shift: Float32  # (3,)

    def apply(self, points: Float32) -> Float32:
        """Points (N, 3) -> (N, 3)."""
        return np.asarray(self.scale * points @ self.rotation.T + self.shift, np.float32)

    def inverse(self) -> Similarity:
        """The transform back."""
        return Similarity(1 / self.scale, self.rotation.T.copy(), np.asarray(-(self.rotation.T @ self.shift) / self.scale, np.float32))

    @property
    def angles(self) -> tuple[float, float, float]:
        """Yaw, pitch, roll in degrees (rotation = roll about z @ pitch about x @ yaw about y)."""
        r = self.rotation
        yaw, pitch, roll = np.arctan2(-r[2, 0], r[2, 2]), np.arcsin(np.clip(r[2, 1], -1, 1)), np.arctan2(-r[0, 1], r[1, 1])
        return float(np.degrees(yaw)), float(np.degrees(pitch)), float(np.degrees(roll))


def fit_similarity(points: Float32, onto: Float32, weights: Float32) -> Similarity:
    """Weighted orthogonal Procrustes: the similarity that takes points (N, 3) onto others (N, 3) with least squared error."""
    weight = (weights / weights.sum()).astype(np.float64)[:, None]
    a, b = points.astype(np.float64), onto.astype(np.float64)
    a_mean, b_mean = (weight * a).sum(0), (weight * b).sum(0)
    a, b = a - a_mean, b - b_mean
    u, s, vt = np.linalg.svd((weight * b).T @ a)
    flip = np.array([1, 1, np.sign(np.linalg.det(u @ vt))])
    rotation = (u * flip) @ vt
    scale = float((s * flip).sum() / (weight * a * a).sum())
    return Similarity(scale, rotation.astype(np.float32), (b_mean - scale * rotation @ a_mean).astype(np.float32))


@dataclass(frozen=True)
class Geometry:
    """The canonical face: neutral, frontal, mirror-symmetric in topology."""

    vertices: Float32  # (468, 3) cm, image axes
    triangles: Int32  # (898, 3), closed over eyes and mouth
    weights: Float32  # (468,) of the rigid fit

    @classmethod
    def load(cls) -> Self:
        """Read the canonical face from the verified weights `face_mesh`, without opening a network."""
        from e4s_models.weights import weight_path

        with zipfile.ZipFile(weight_path("face_mesh")) as bundle:
            return cls(*read_geometry(bundle.read(_GEOMETRY)))

    @cached_property
    def mirror(self) -> Int32:
        """(478,) point -> its mirror image on the other half of the face."""
        flipped = self.vertices * np.array([-1, 1, 1], np.float32)
        distance = ((flipped[:, None] - self.vertices[None]) ** 2).sum(-1)
        iris = [473, 476, 475, 474, 477, 468, 471, 470, 469, 472]
        # iris rings run centre, image right, top, left, bottom: mirroring swaps the eyes and left with right
        return np.asarray(np.concatenate([distance.argmin(1), iris]), np.int32)

    def pose(self, points: Float32) -> Similarity:
        """Canonical cm -> crop px of points (478, 3), fitted on the rigid parts."""
        return fit_similarity(self.vertices, points[:NUM_VERTICES], self.weights)


def load_expression_basis() -> Float32:
    """Displacement of each canonical vertex per unit of each blendshape coefficient: (52, 468, 3) cm, image axes.

    Learnt by `benchmarks/train_expression.py`; see `docs/expression_basis.md`.
    """
    from e4s_models.weights import weight_path

    with np.load(weight_path("expression_basis")) as stored:
        basis: Float32 = stored["basis"].astype(np.float32)
    check_shape(basis, f"{NUM_BLENDSHAPES} {NUM_VERTICES} 3")
    return basis


class FaceMesh:
    """The landmark and blendshape networks. Not for several threads at once: an interpreter has state."""

    def __init__(self, task: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        # the plain kernels: fewer differences between machines than with a delegate, and quick enough
        plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES

        with zipfile.ZipFile(task) as bundle:
            self.geometry = Geometry(*read_geometry(bundle.read(_GEOMETRY)))
            self._landmarks, self._blendshapes = (
                Interpreter(model_content=bundle.read(f"{name}.tflite"), num_threads=1, experimental_op_resolver_type=plain)
                for name in ("face_landmarks_detector", "face_blendshapes")
            )
        for network in (self._landmarks, self._blendshapes):
            network.allocate_tensors()

    @classmethod
    def load(cls) -> Self:
        """Open the verified weights `face_mesh`."""
        from e4s_models.weights import weight_path

        return cls(weight_path("face_mesh"))

    @property
    def triangles(self) -> Int32:
        """(898, 3) vertex indices."""
        return self.geometry.triangles

    def landmarks(self, face: UInt8) -> tuple[Float32, float]:
        """Find the dense landmarks of the one face of an aligned crop.

        RGB (H, W, 3) uint8 -> points (478, 3) float32: x, y px of the crop (pixel centres at integers), z px of the same scale, growing
        away from the camera; presence [0, 1]. The second pass reads an upright square at 1.5 times the first pass's box.
        """
        shape = check_shape(face, "H W 3")
        side = float(max(shape["H"], shape["W"]))
        points, _ = self._read(face, (shape["W"] / 2 - 0.5, shape["H"] / 2 - 0.5), side, 0.0)
        low, high = points[:, :2].min(0), points[:, :2].max(0)
        across = points[_EYE_CORNERS[1], :2] - points[_EYE_CORNERS[0], :2]
        roll = float(np.arctan2(across[1], across[0]))
        centre = (low + high) / 2
        return self._read(face, (float(centre[0]), float(centre[1])), _ROI_SCALE * float((high - low).max()), roll)

    def _read(self, face: UInt8, centre: tuple[float, float], side: float, roll: float) -> tuple[Float32, float]:
        """One pass over the square region of that centre, side (px) and roll (radians)."""
        scale = side / _SIDE
        turn = scale * np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])
        shift = np.array(centre) - turn @ np.full(2, _SIDE / 2 - 0.5)
        to_crop = np.column_stack([turn, shift])
        smooth = cv2.GaussianBlur(face, (0, 0), 0.35 * scale) if scale > 1.5 else face  # the region shrinks: no aliasing
        region = cv2.warpAffine(
            smooth, to_crop, (_SIDE, _SIDE), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
        )
        network = self._landmarks
        network.set_tensor(network.get_input_details()[0]["index"], region[None].astype(np.float32) / np.float32(255))
        network.invoke()
        outputs = network.get_output_details()
        raw = network.get_tensor(outputs[0]["index"]).reshape(NUM_POINTS, 3)
        logit = float(network.get_tensor(outputs[1]["index"]).reshape(-1)[0])
        points = np.empty((NUM_POINTS, 3), np.float32)
        points[:, :2] = (raw[:, :2] - 0.5) @ turn.T + shift  # the network counts from the pixel's corner
        points[:, 2] = raw[:, 2] * scale
        return points, float(1 / (1 + np.exp(-logit)))

    def blendshapes(self, points: Float32, size: int) -> Float32:
        """Points (478, 3) px of a crop of that size (px) -> 52 expression coefficients [0, 1] in the order of `BLENDSHAPE_NAMES`."""
        check_shape(points, f"{NUM_POINTS} 3")
        network = self._blendshapes
        network.set_tensor(network.get_input_details()[0]["index"], points[None, _BLENDSHAPE_POINTS, :2].astype(np.float32))
        network.invoke()
        return np.array(network.get_tensor(network.get_output_details()[0]["index"]), np.float32).reshape(NUM_BLENDSHAPES)
