"""Recipe `inpaint`: faces beside which the outline of a wider face was erased get back what was there (Eq. 17, 26).

The hole of an example is the paper's mismatch region: what is inner face in another picture and not in this one. It is filled with skin
before it is erased, as the target's old face fills it in a swap, but the network does not look into the hole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from e4s_models.inpaint_small import SmallInpaintNet, continued
from e4s_models.lpips_net import Lpips
from e4s_models.regions import INNER_FACE
from flows.training.faces import FacePool
from flows.training.loop import Batch, Recipe
from flows.training.photograph import moved, photograph
from flows.training.visibility import as_faces
from tasks.face_network import to_picture
from tasks.stage import UInt8

_SIDE = 128
_LEAST_HOLE = 0.01  # share of the picture
_TRIES = 8  # other faces that are looked at for a hole


@dataclass(frozen=True)
class Example:
    """What was there, and where it was erased."""

    truth: UInt8  # (128, 128, 3)
    hole: UInt8  # (128, 128), 1 where it is erased


def draw_example(pool: FacePool, rng: np.random.Generator) -> Example:
    """A face of the pool and the mismatch with another one's inner face, which is turned, scaled and moved."""
    return erased(pool.draw(rng), [pool.draw(rng)[1] for _ in range(_TRIES)], rng)


def erased(face: tuple[UInt8, UInt8], others: list[UInt8], rng: np.random.Generator) -> Example:
    """The face (RGB and region ids, 256 px) with the first of the others' mismatch regions that is large enough; else a disk beside it."""
    image, labels = moved(*face, rng)
    own = np.isin(labels, INNER_FACE)
    for other in others:
        hole = _placed(np.isin(other, INNER_FACE).astype(np.uint8), rng) & ~own
        if hole.mean() >= _LEAST_HOLE:
            break
    else:
        disk = cv2.circle(np.zeros(labels.shape, np.uint8), tuple(rng.integers(40, 216, 2).tolist()), 24, 1, -1)
        hole = (disk > 0) & ~own
    truth = cv2.resize(photograph(image, rng), (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    small = cv2.resize(hole.astype(np.uint8) * 255, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    return Example(np.asarray(truth, np.uint8), (small > 0).astype(np.uint8))


def _placed(inner: UInt8, rng: np.random.Generator) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """An inner face, mostly wider or longer than it was."""
    side = len(inner)
    matrix = np.asarray(cv2.getRotationMatrix2D((side / 2, side / 2), rng.normal(0, 4), 1), np.float64)
    matrix[0, :2] *= rng.uniform(0.95, 1.3)
    matrix[1, :2] *= rng.uniform(0.95, 1.2)
    matrix[:, 2] = side / 2 - matrix[:, :2] @ np.full(2, side / 2) + rng.normal(0, 0.03 * side, 2)
    return np.asarray(cv2.warpAffine(inner, matrix, (side, side), flags=cv2.INTER_NEAREST) > 0)


class InpaintRecipe(Recipe):
    """Squared error within the hole, and LPIPS of the filled face (Eq. 26)."""

    name = "inpaint"
    batch = 8
    rate = 1e-3
    save_every = 100
    checked = 48

    def __init__(self) -> None:
        self._perceptual = Lpips.load()
        self._examples: tuple[tuple[int, int], list[Example]] | None = None

    def build(self) -> nn.Module:
        return SmallInpaintNet()

    def example(self, pool: FacePool, rng: np.random.Generator) -> Mapping[str, Any]:
        drawn = draw_example(pool, rng)
        return {"truth": drawn.truth, "hole": drawn.hole}

    def losses(self, network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        truth, holes = as_faces(batch["truth"]), batch["hole"][:, None].float()
        painted = network(truth, holes)
        squares = ((painted - truth).square() * holes).sum() / (3 * holes.sum())
        filled = torch.where(holes > 0, painted, truth)
        return {"squares": squares, "lpips": 5 * self._perceptual.to(truth.device)(filled, truth).mean()}

    def measure(self, network: nn.Module, pool: FacePool) -> Mapping[str, float]:
        """PSNR within holes, dB, and LPIPS: of the network, and of the smooth continuation that it begins as."""
        figures: dict[str, list[float]] = {"psnr": [], "psnr_smooth": [], "lpips_filled": [], "lpips_smooth": []}
        for example in self._held_out(pool):
            truth, hole = as_faces(torch.from_numpy(example.truth)[None]), example.hole > 0
            painted, smooth = fill(network, example)
            for made, psnr, perceptual in ((painted, "psnr", "lpips_filled"), (smooth, "psnr_smooth", "lpips_smooth")):
                error = (made[hole].astype(np.float32) - example.truth[hole]) / 255
                figures[psnr].append(-10 * math.log10(max(float((error**2).mean()), 1e-8)))
                figures[perceptual].append(float(self._perceptual.cpu()(as_faces(torch.from_numpy(made)[None]), truth)))
        return {name: float(np.mean(values)) for name, values in figures.items() if values}

    def samples(self, network: nn.Module, pool: FacePool) -> UInt8:
        """Rows: what is left, the smooth continuation, what is painted, the truth."""
        columns = []
        for example in self._held_out(pool)[::4]:
            left = np.where(example.hole[..., None] > 0, np.uint8(128), example.truth)
            painted, smooth = fill(network, example)
            columns.append(np.concatenate([left, smooth, painted, example.truth]))
        return np.concatenate(columns, axis=1)

    def _held_out(self, pool: FacePool) -> list[Example]:
        """The same examples each time."""
        known = len(pool.held_out_people), len(pool.held_out_photos)
        if self._examples is None or self._examples[0] != known:
            sets = [faces for faces in (pool.held_out_people, pool.held_out_photos) if len(faces)]
            made = []
            for number in range(self.checked):
                rng = np.random.Generator(np.random.PCG64([19, number]))
                faces = sets[number % len(sets)]
                made.append(erased(faces.pick(rng), [faces.pick(rng)[1] for _ in range(_TRIES)], rng))
            self._examples = known, made
        return self._examples[1]


def fill(network: nn.Module, example: Example) -> tuple[UInt8, UInt8]:
    """The face whose hole the network fills, and with a smooth continuation in it, (128, 128, 3) each."""
    assert isinstance(network, SmallInpaintNet)
    device = next(network.parameters()).device
    faces = as_faces(torch.from_numpy(example.truth)[None]).to(device)
    holes = torch.from_numpy(example.hole).to(device)[None, None].float()
    with torch.no_grad():
        return to_picture(network.fill(faces, holes)), to_picture(continued(faces, holes))
