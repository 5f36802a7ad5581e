"""Head pose by 6DRepNet360 (Hempel et al., ICIP 2022; IEEE TIP 2024): yaw, pitch, roll of an aligned face in degrees."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e4s_models.checks import check_shape
from e4s_models.face_crops import loose_squares
from e4s_models.onnx_network import OnnxNetwork, in_batches_of_one_on_cpu

if TYPE_CHECKING:
    from typing import Self

SIDE = 224  # px
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB in [0, 1]
_SIX_NUMBERS = "/linear_reg/Gemm_output_0"  # the graph's tensor before it makes a matrix of it, for a batch of one only


class HeadPose(nn.Module):
    """ResNet-50 with six outputs that stand for a rotation."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def load(cls) -> Self:
        """Open the verified weights `head_pose_6drepnet`."""
        return cls(OnnxNetwork.load("head_pose_6drepnet", _SIX_NUMBERS)).eval()

    def forward(self, squares: Tensor) -> Tensor:
        """RGB (B, 3, 224, 224) [-1, 1] -> rotation matrices (B, 3, 3)."""
        check_shape(squares, f"B 3 {SIDE} {SIDE}")
        return rotation_of(self.network(((squares + 1) / 2 - self.mean) / self.std))

    @torch.inference_mode()
    def degrees(self, faces: Tensor) -> Tensor:
        """FFHQ-aligned faces, RGB (B, 3, H, H) float32 [-1, 1] -> yaw, pitch, roll (B, 3) in degrees."""
        return angles_of(in_batches_of_one_on_cpu(self, loose_squares(faces, SIDE)))


def rotation_of(six: Tensor) -> Tensor:
    """Six numbers (B, 6) -> rotation matrices (B, 3, 3): Gram-Schmidt on two columns (Zhou et al., CVPR 2019, Eq. 15)."""
    check_shape(six, "B 6")
    x = F.normalize(six[:, :3])
    z = F.normalize(torch.linalg.cross(x, six[:, 3:]))
    return torch.stack([x, torch.linalg.cross(z, x), z], dim=2)


def angles_of(rotation: Tensor) -> Tensor:
    """Rotation matrices (B, 3, 3) = roll about z @ yaw about y @ pitch about x -> yaw, pitch, roll (B, 3) in degrees."""
    check_shape(rotation, "B 3 3")
    yaw = torch.atan2(-rotation[:, 2, 0], torch.hypot(rotation[:, 0, 0], rotation[:, 1, 0]))
    pitch = torch.atan2(rotation[:, 2, 1], rotation[:, 2, 2])
    roll = torch.atan2(rotation[:, 1, 0], rotation[:, 0, 0])
    return torch.rad2deg(torch.stack([yaw, pitch, roll], dim=1))
