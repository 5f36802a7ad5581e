"""Stage `paste`: the finished crop back into its frame; what the mask does not cover stays bit-identical."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor

import cv2
import numpy as np

from e4s_models.checks import check_shape
from e4s_models.warp import Matrix, resample, transform_points
from tasks.frame import Pixels
from tasks.stage import Cost, Float32, Inputs, Outputs, Stage, UInt8, each


@dataclass(frozen=True, kw_only=True)
class PasteConfig:
    dilate: float = 0.008  # how far the mask grows before it is feathered, as a fraction of the crop's side
    feather: float = 0.016  # width of the ramp from the frame (0, at the grown mask's edge) to the crop (1), likewise

    def __post_init__(self) -> None:
        if not (0 <= self.dilate <= 0.25 and 0 <= self.feather <= 0.25):
            raise ValueError(f"dilate and feather are fractions of the crop's side from 0 to 0.25, got {self.dilate} and {self.feather}")


def feather(mask: UInt8, config: PasteConfig) -> Float32:
    """Weights (S, S) float32 [0, 1] of the crop from a mask (S, S) uint8, 128 and more = repaint.

    The mask grows by `dilate`, then its weights rise from 0 at its edge and at the crop's edges to 1 inside.
    """
    side = max(mask.shape)
    reach = ceil(config.dilate * side) + 2
    outside = np.pad((mask < 128).astype(np.uint8), reach, constant_values=1)
    if outside.all():
        return np.zeros(mask.shape, np.float32)
    grown = (cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= config.dilate * side).astype(np.uint8)
    grown[:reach], grown[-reach:], grown[:, :reach], grown[:, -reach:] = 0, 0, 0, 0  # the crop ends there
    depth = cv2.distanceTransform(grown, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[reach:-reach, reach:-reach]
    ramp = np.clip((depth - 0.5) / max(config.feather * side, 0.5), 0, 1)
    return np.asarray(ramp * ramp * (3 - 2 * ramp), np.float32)  # smoothstep


@dataclass(frozen=True, eq=False)
class Patch:
    """A crop as it lies in the frame."""

    pixels: Float32
    """RGB (h, w, 3) [0, 255]."""
    weights: Float32
    """(h, w) [0, 1], 1 = crop; 0 wherever the frame's pixel keeps its bits."""
    left: int
    """px of the frame."""
    top: int


def warp_patch(face: UInt8, weights: Float32, crop_to_frame: Matrix, width: int, height: int) -> Patch | None:
    """A crop RGB (S, S, 3) uint8 with weights (S, S) [0, 1] -> its part of a frame of `width` x `height` px; None if it has none.

    `crop_to_frame` (3, 3) as in `e4s_models.warp`. Pixels whose centre lies where the weight is 0 have weight 0.
    """
    side = check_shape(face, "S S 3")["S"]
    check_shape(weights, f"{side} {side}")
    check_shape(crop_to_frame, "3 3")
    if not np.isfinite(crop_to_frame).all() or np.linalg.det(crop_to_frame[:2, :2]) <= 0:
        raise ValueError(f"crop_to_frame must be a finite similarity without reflection, got {crop_to_frame.tolist()}")
    ys, xs = np.nonzero(weights.any(axis=1))[0], np.nonzero(weights.any(axis=0))[0]
    if not len(ys):
        return None
    edges = np.array([(x, y) for x in (xs[0] - 1, xs[-1] + 1) for y in (ys[0] - 1, ys[-1] + 1)])
    corners = transform_points(crop_to_frame, edges)
    left, top = (max(0, floor(value) - 1) for value in corners.min(axis=0))
    right, bottom = (min(size, ceil(value) + 2) for size, value in zip((width, height), corners.max(axis=0), strict=True))
    if left >= right or top >= bottom:
        return None  # the face lies outside the frame
    place_to_frame = np.eye(3)
    place_to_frame[:2, 2] = left, top
    place_to_crop = np.linalg.inv(crop_to_frame) @ place_to_frame
    rows, columns = bottom - top, right - left
    warped = resample(face.astype(np.float32), place_to_crop, rows, columns)  # [h, w, 3]
    weight = np.clip(resample(weights, place_to_crop, rows, columns, border="zero"), 0, 1)  # [h, w]
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP  # filters reach beyond the weights: only pixels whose centre lies on them count
    weight[cv2.warpAffine((weights > 0).astype(np.uint8), place_to_crop[:2], (columns, rows), flags=flags) == 0] = 0
    return Patch(warped, weight, left, top)


def paste(pixels: Pixels, face: UInt8, weights: Float32, crop_to_frame: Matrix) -> Pixels:
    """Blend a crop into a frame: RGB (H, W, 3) uint8 or uint16 with RGB (S, S, 3) uint8 -> like the frame.

    `weights` (S, S) [0, 1], 1 = crop; `crop_to_frame` (3, 3) as in `e4s_models.warp`. Pixels whose centre lies where
    the weight is 0 keep their bits; only the bounding box of the others is worked on.
    """
    check_shape(pixels, "H W 3")
    result = pixels.copy()
    patch = warp_patch(face, weights, crop_to_frame, pixels.shape[1], pixels.shape[0])
    if patch is None:
        return result
    white = 257 if pixels.dtype == np.uint16 else 1  # 255 * 257 = 65535
    rows, columns = patch.weights.shape
    place = result[patch.top : patch.top + rows, patch.left : patch.left + columns]
    blended = place + (patch.pixels * white - place) * patch.weights[..., None]
    place[...] = np.clip(np.rint(blended), 0, 255 * white).astype(pixels.dtype)
    return result


def like_frame(face: UInt8, pixels: Pixels) -> UInt8:
    """The crop RGB (S, S, 3), gray if the frame RGB (H, W, 3) is: a gray frame stays gray."""
    if (pixels[..., :1] == pixels).all():
        return np.repeat(cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    return face


def _paste(model: None, config: PasteConfig, inputs: Inputs) -> Outputs:
    """Reads `image`, `face` (S, S, 3) and `mask` (S, S) uint8, `crop_to_frame` (3, 3); writes `result`: the frame, RGB or RGBA."""
    frame = inputs["image"].read()
    face = like_frame(frame.in_own_colors(inputs["face"]), frame.pixels)
    result = paste(frame.pixels, face, feather(inputs["mask"], config), inputs["crop_to_frame"])
    return {"result": result if frame.alpha is None else np.dstack((result, frame.alpha))}


STAGE = Stage(
    name="paste",
    backend="feather",
    version=2,
    config=PasteConfig,
    run=each(_paste),
    reads=("image", "face", "mask", "crop_to_frame"),
    writes={"result": "image"},
    libraries=("numpy", "opencv-python-headless", "pillow"),
    cost=Cost(threads=True),
)

BACKENDS = {"feather": STAGE}
