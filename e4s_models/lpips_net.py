"""LPIPS version 0.1 with the AlexNet trunk: perceptual distance of two pictures (Zhang et al., CVPR 2018, Eq. 1).

Plain PyTorch; weights of trunk and linear heads from the registry's `lpips_alexnet`. Differentiable, so that it also serves as a loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e4s_models.checks import check_shape

if TYPE_CHECKING:
    from typing import Self

MIN_SIDE = 35  # px; below that the last feature map is empty
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # the authors' constants, for RGB in [-1, 1]
_EPSILON = 1e-10
_CONVOLUTIONS = (  # inputs, outputs, kernel, stride, padding; the second and third follow a max pool
    (3, 64, 11, 4, 2),
    (64, 192, 5, 1, 2),
    (192, 384, 3, 1, 1),
    (384, 256, 3, 1, 1),
    (256, 256, 3, 1, 1),
)
_POOLED = (1, 2)


class Lpips(nn.Module):
    """AlexNet's five activations, unit length per pixel; squared differences weighted per channel and averaged over pixels."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(nn.Conv2d(*shape) for shape in _CONVOLUTIONS)
        self.heads = nn.ModuleList(nn.Conv2d(shape[1], 1, 1, bias=False) for shape in _CONVOLUTIONS)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def load(cls) -> Self:
        """Open the verified weights `lpips_alexnet`; parameters are frozen, gradients flow to the pictures."""
        from e4s_models.weights import load_numpy_pickle, load_strict, weight_path

        network = cls()
        load_strict(network, _state(load_numpy_pickle(weight_path("lpips_alexnet"))), "lpips_alexnet")
        return network.eval().requires_grad_(False)

    def activations(self, images: Tensor) -> list[Tensor]:
        """RGB (B, 3, H, W) [-1, 1] -> the five activations [B, C, h, w], each pixel of unit length."""
        x = (images - self.shift) / self.scale
        features = []
        for index, convolution in enumerate(self.trunk):
            if index in _POOLED:
                x = F.max_pool2d(x, 3, 2)
            x = convolution(x).relu()
            length = (x.square().sum(1, keepdim=True) + _EPSILON**2).sqrt()  # a square under the root: its slope at 0 is finite
            features.append(x / (length + _EPSILON))
        return features

    def differences(self, images: Tensor, references: Tensor) -> list[Tensor]:
        """Weighted squared differences of both batches' activations: RGB (B, 3, H, W) [-1, 1] -> five maps [B, 1, h, w]."""
        shape = check_shape(images, "B 3 H W")
        check_shape(references, f"{shape['B']} 3 {shape['H']} {shape['W']}")
        if min(shape["H"], shape["W"]) < MIN_SIDE:
            raise ValueError(f"LPIPS needs pictures of at least {MIN_SIDE} px, got {shape['W']}x{shape['H']} px")
        pairs = zip(self.heads, self.activations(images), self.activations(references), strict=True)
        return [head((a - b).square()) for head, a, b in pairs]

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distance of RGB (B, 3, H, W) float32 [-1, 1] to references: (B,), 0 is equality."""
        return torch.stack([layer.mean((1, 2, 3)) for layer in self.differences(images, references)]).sum(0)

    def spatial(self, images: Tensor, references: Tensor) -> Tensor:
        """The distance per pixel: (B, H, W); the five maps enlarged bilinearly and added, as the authors' `spatial=True`."""
        size = images.shape[-2:]
        layers = [F.interpolate(layer, size, mode="bilinear") for layer in self.differences(images, references)]
        return torch.cat(layers, dim=1).sum(1)


def _state(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """JAX's kernels (h, w, in, out) under our names."""
    state: dict[str, Tensor] = {}
    for index in range(len(_CONVOLUTIONS)):
        trunk, head = arrays["AlexNet_0"][f"Conv_{index}"], arrays[f"NetLinLayer_{index}"]["Conv_0"]
        state[f"trunk.{index}.weight"] = torch.from_numpy(trunk["kernel"]).permute(3, 2, 0, 1).contiguous()
        state[f"trunk.{index}.bias"] = torch.from_numpy(trunk["bias"])
        state[f"heads.{index}.weight"] = torch.from_numpy(head["kernel"]).permute(3, 2, 0, 1).contiguous()
    return state
