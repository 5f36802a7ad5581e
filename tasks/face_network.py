"""Faces in and out of networks that work at a size of their own, and the networks that restore what this loses.

Shared by the backends that the published checkpoints serve (`tasks.*_rgi`, `tasks.*_network`, `tasks.enhance`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, cast

import cv2
import numpy as np

from e4s_models.checks import check_shape
from e4s_models.weights import weight_digest
from tasks.stage import Float32, UInt8

if TYPE_CHECKING:
    from torch import Tensor, nn

    from e4s_models.codeformer import CodeFormer
    from e4s_models.gpen import Gpen

Enhancer = Literal["gpen", "codeformer", "none"]
ENHANCERS = ("gpen", "codeformer", "none")
FIDELITY = 0.8  # of CodeFormer, published: 0 trusts the codebook, 1 the input

Restore = Callable[[UInt8], UInt8]
"""Aligned face, RGB (S, S, 3) uint8 -> the same face in more detail, at the network's own size."""


def check_enhancer(name: str) -> None:
    """Raise ValueError for a name that is none of `ENHANCERS`."""
    if name not in ENHANCERS:
        raise ValueError(f"enhance must be one of {', '.join(ENHANCERS)}, got {name!r}")


def enhancer_weights(name: str) -> tuple[str, ...]:
    """Names of the weights that an enhancer needs."""
    return () if name == "none" else (name,)


def load_enhancer(name: str, device: str, fidelity: float = FIDELITY) -> Restore:
    """The restoration network of that name; `none` returns the face as it is."""
    if name == "none":
        return lambda face: face
    network = _enhancer(name, device, weight_digest(name))

    def restore(face: UInt8) -> UInt8:
        faces = to_tensor(fit(face, network.side), network)  # [1, 3, 512, 512]
        return to_picture(network(faces, fidelity).faces if name == "codeformer" else network(faces))

    return restore


@lru_cache
def _enhancer(name: str, device: str, digest: str) -> Gpen | CodeFormer:
    """Loaded once per process, however many stages restore faces with it; `digest` tells other weights of that name apart."""
    from e4s_models.added import load_added

    return cast("Gpen | CodeFormer", load_added(name, device))


def fit(picture: UInt8, side: int) -> UInt8:
    """Bring RGB (H, H, 3) or a map (H, H) uint8 to `side`: cell means when it shrinks, cubic when it grows."""
    if len(picture) == side:
        return picture
    interpolation = cv2.INTER_AREA if side < len(picture) else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture, (side, side), interpolation=interpolation), np.uint8)


def fit_labels(labels: UInt8, side: int) -> UInt8:
    """Bring a label map (H, H) uint8 to `side` by the nearest pixel."""
    return np.asarray(cv2.resize(labels, (side, side), interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)


def to_tensor(face: UInt8, network: nn.Module) -> Tensor:
    """RGB (S, S, 3) uint8 -> (1, 3, S, S) float32 [-1, 1] where the network is."""
    import torch

    check_shape(face, "S S 3")
    device = next(network.parameters()).device
    return torch.from_numpy(np.ascontiguousarray(face)).to(device).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_labels(regions: UInt8, network: nn.Module) -> Tensor:
    """Region ids (S, S) uint8 -> (1, S, S) uint8 where the network is."""
    import torch

    check_shape(regions, "S S")
    return torch.from_numpy(np.ascontiguousarray(regions)).to(next(network.parameters()).device)[None]


def to_picture(faces: Tensor) -> UInt8:
    """RGB (1, 3, S, S) float, [-1, 1] or a little beyond -> (S, S, 3) uint8."""
    import torch

    check_shape(faces, "1 3 S S")
    picture: UInt8 = faces[0].add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    return picture


def soft_edge(mask: Float32, threshold: float = 0.6) -> Float32:
    """Soften the edge of a mask (S, S) [0, 1] (published `SoftErosion`): a cone filter, then all from `threshold` on is 1.

    The cone is 15 px wide at 1024. What lies below the threshold is stretched to [0, 1], so the ramp begins about 7 px outside the edge.
    """
    side = check_shape(mask, "S S")["S"]
    reach = max(round(7 * side / 1024), 1)
    row = np.arange(-reach, reach + 1, dtype=np.float32)
    distance = np.hypot(row[:, None], row)
    cone = distance.max() - distance
    soft = np.asarray(cv2.filter2D(mask, -1, cone / cone.sum(), borderType=cv2.BORDER_CONSTANT), np.float32)
    soft[soft < 1e-4] = 0  # the filter's rounding, which would reach over the whole picture
    below = soft < threshold
    highest = float(soft[below].max(initial=0))
    return np.asarray(np.where(below, soft / max(highest, 1e-6), 1), np.float32)


def mix(under: UInt8, over: UInt8, weight: Float32) -> UInt8:
    """Lay one picture (S, S, 3) uint8 over another by weights (S, S) in [0, 1]; pixels of weight 0 keep their bits."""
    mixed = under + (over.astype(np.float32) - under) * weight[..., None]
    return np.asarray(np.rint(mixed).clip(0, 255), np.uint8)
