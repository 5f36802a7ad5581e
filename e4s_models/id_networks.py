"""Identity networks: aligned face -> feature whose cosine says how alike two people are.

Each cuts its own crop. Faces are RGB (B, 3, H, H) float32 [-1, 1], FFHQ-aligned (1024 px under the declared
protocols); landmarks (B, 68, 2) px of those crops, dlib's, or None for the mean ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from e4s_models.checks import check_shape
from e4s_models.face_crops import arcface_squares, as_pixels, default_landmarks
from e4s_models.onnx_network import OnnxNetwork, in_batches_of_one_on_cpu

if TYPE_CHECKING:
    from typing import Self

DLIB_SIDE: Final = 150  # px of dlib's face chip
_DLIB_PADDING: Final = 0.25  # of the chip, around the face; dlib's own setting


class IdNetwork(Protocol):
    """What identity metrics need of a network."""

    def features(self, faces: Tensor, landmarks: Tensor | None = None) -> Tensor:
        """Faces (B, 3, H, H) [-1, 1], landmarks (B, 68, 2) px or None -> features (B, D) float32, not normalised."""


class TemplateIdNetwork(nn.Module):
    """A network on ArcFace's 112 px template, from its published ONNX file. Differentiable with respect to the faces."""

    def __init__(self, network: nn.Module, scale: float, shift: float) -> None:
        """`scale`, `shift`: what turns [-1, 1] into the values that the network reads."""
        super().__init__()
        self.network = network
        self.scale, self.shift = scale, shift

    @classmethod
    def load(cls, name: str, *, scale: float, shift: float) -> Self:
        """Open the verified weights of that registry name."""
        return cls(OnnxNetwork.load(name), scale, shift).eval()

    def forward(self, squares: Tensor) -> Tensor:
        """Faces on the template, RGB (B, 3, 112, 112) [-1, 1] -> features (B, D)."""
        check_shape(squares, "B 3 112 112")
        features: Tensor = self.network(squares * self.scale + self.shift)
        return features

    @torch.inference_mode()
    def features(self, faces: Tensor, landmarks: Tensor | None = None) -> Tensor:
        """See `IdNetwork`; the five-point similarity of each face's landmarks to the template."""
        return in_batches_of_one_on_cpu(self, arcface_squares(faces, landmarks))


class DlibIdNetwork:
    """dlib's ResNet-29, run by dlib on the CPU, on dlib's own face chip. Euclidean distances below 0.6 mean one person."""

    def __init__(self, network: Any) -> None:
        self._network = network

    @classmethod
    def load(cls) -> Self:
        """Open the verified weights `dlib_face_id`."""
        import dlib

        from e4s_models.weights import weight_path

        return cls(dlib.face_recognition_model_v1(str(weight_path("dlib_face_id"))))

    def features(self, faces: Tensor, landmarks: Tensor | None = None) -> Tensor:
        """See `IdNetwork`; the result lies on the device of the faces."""
        import dlib

        shape = check_shape(faces, "B 3 H H")
        points = default_landmarks(faces) if landmarks is None else landmarks
        check_shape(points, f"{shape['B']} 68 2")
        features = np.empty((shape["B"], 128), np.float32)
        box = dlib.rectangle(0, 0, shape["H"] - 1, shape["H"] - 1)
        for index, (picture, places) in enumerate(zip(as_pixels(faces), points.cpu().round().long().tolist(), strict=True)):
            found = dlib.full_object_detection(box, [dlib.point(x, y) for x, y in places])  # dlib's points are whole px
            chip = dlib.get_face_chip(picture, found, DLIB_SIDE, _DLIB_PADDING)
            features[index] = self._network.compute_face_descriptor(chip)
        return torch.from_numpy(features).to(faces.device)


ID_NETWORKS: Mapping[str, Callable[[str], IdNetwork]] = {
    "arcface_mbf": lambda device: TemplateIdNetwork.load("arcface_mbf", scale=1.0, shift=0.0).to(device),
    "sface": lambda device: TemplateIdNetwork.load("sface", scale=127.5, shift=127.5).to(device),
    "dlib_face_id": lambda device: DlibIdNetwork.load(),
}
"""Registry name -> how to load it onto a device; crops and dimensions are declared in `evaluation.features`."""
