"""Recipe `recolor`: faces in gray get their own colours and light back from a moved, often mirrored picture of themselves (Eq. 10-14, 25).

Beyond the paper, the reference may be lit from another side than the gray face: then it is not mirrored, and the light has to come from
it too.
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
from torch.nn.functional import avg_pool2d, interpolate

from e4s_models.lpips_net import Lpips
from e4s_models.recolor_small import SmallRecolorNet, recolored
from e4s_models.regions import INNER_FACE, Region
from flows.training.faces import FacePool
from flows.training.loop import Batch, Recipe
from flows.training.photograph import expose, moved, side_light
from flows.training.visibility import as_faces
from tasks.face_network import to_picture
from tasks.stage import Float32, UInt8

_SIDE = 128  # px of the pictures that are compared; the network sees half of it
_HEAD = (*INNER_FACE, Region.HAIR, Region.EARS, Region.NECK)


@dataclass(frozen=True)
class Example:
    """What the network sees and what it should paint, all 128 px."""

    gray: UInt8  # (S, S, 3): the face without colours, in another light
    ids: UInt8  # (S, S) its region ids
    reference: UInt8  # (S, S, 3)
    reference_ids: UInt8  # (S, S)
    truth: UInt8  # (S, S, 3)


def draw_example(face: tuple[UInt8, UInt8], rng: np.random.Generator) -> Example:
    """An example from a face: RGB (256, 256, 3) and region ids."""
    image, labels = moved(*face, rng)
    picture = cv2.resize(image, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32) / np.float32(255)
    ids = np.ascontiguousarray(labels[::2, ::2])
    gray = np.repeat((picture @ np.array([0.299, 0.587, 0.114], np.float32))[..., None], 3, axis=2)
    truth = np.clip(expose(picture, rng), 0, 1) if rng.random() < 0.7 else picture
    flip = rng.random() < 0.5
    if not flip and rng.random() < 0.6:  # light from a side of its own: a mirrored reference would have it on the other
        truth = np.clip(truth * side_light(_SIDE, rng)[..., None], 0, 1)
    gray = np.clip(gray ** np.float32(math.exp(rng.normal(0, 0.3))) * np.float32(math.exp(rng.normal(0, 0.2))), 0, 1)
    if rng.random() < 0.5:
        gray = np.clip(gray * side_light(_SIDE, rng)[..., None], 0, 1)
    reference, reference_ids = _displaced(_bytes(truth), ids, rng)
    if flip:
        reference, reference_ids = np.ascontiguousarray(reference[:, ::-1]), np.ascontiguousarray(reference_ids[:, ::-1])
    return Example(_bytes(gray), ids, reference, reference_ids, _bytes(truth))


def _bytes(picture: Float32) -> UInt8:
    return np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8)


def _displaced(image: UInt8, ids: UInt8, rng: np.random.Generator) -> tuple[UInt8, UInt8]:
    """Turned, scaled, shifted and bent, as the target's face is beside the swapped one: nothing lies where it lay."""
    matrix = cv2.getRotationMatrix2D((_SIDE / 2, _SIDE / 2), rng.normal(0, 5), 1 + rng.normal(0, 0.06))
    y, x = np.mgrid[:_SIDE, :_SIDE].astype(np.float32)
    bend = rng.standard_normal((2, 6, 6), np.float32) * np.float32(0.02 * _SIDE)
    across, down = (cv2.resize(part, (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC) for part in bend)
    at_x = (matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2] + across + rng.normal(0, 0.02 * _SIDE)).astype(np.float32)
    at_y = (matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2] + down + rng.normal(0, 0.02 * _SIDE)).astype(np.float32)
    bent = cv2.remap(image, at_x, at_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    followed = cv2.remap(ids, at_x, at_y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT)
    return np.asarray(bent, np.uint8), np.asarray(followed, np.uint8)


class RecolorRecipe(Recipe):
    """Squared error within the head and LPIPS (Eq. 25)."""

    name = "recolor"
    batch = 4
    rate = 1e-3
    save_every = 100
    checked = 48

    def __init__(self) -> None:
        self._perceptual = Lpips.load()
        self._examples: tuple[tuple[int, int], list[Example]] | None = None

    def build(self) -> nn.Module:
        return SmallRecolorNet()

    def example(self, pool: FacePool, rng: np.random.Generator) -> Mapping[str, Any]:
        drawn = draw_example(pool.draw(rng), rng)
        return {
            "gray": drawn.gray,
            "ids": drawn.ids,
            "reference": drawn.reference,
            "reference_ids": drawn.reference_ids,
            "truth": drawn.truth,
        }

    def losses(self, network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        truth = as_faces(batch["truth"])
        small = network(*_halved(batch["gray"], batch["reference"], batch["ids"], batch["reference_ids"]))
        painted = recolored(as_faces(batch["gray"]), small)
        head = torch.isin(batch["ids"], torch.tensor([int(region) for region in _HEAD], device=truth.device))[:, None]
        weight = 0.1 + 0.9 * head.float()
        squares = (painted - truth).square().mean(dim=1, keepdim=True)
        perceptual = self._perceptual.to(truth.device)(_shown(painted, truth, weight), truth)
        # The paper's weights are 1 and 1 on pictures in [0, 255] / 127.5 - 1 at 256 px; at 128 px colours need more of the first.
        return {"squares": 5 * (squares * weight).sum() / weight.sum(), "lpips": perceptual.mean()}

    def measure(self, network: nn.Module, pool: FacePool) -> Mapping[str, float]:
        """PSNR within the inner face, dB, of the network and of the guidance alone."""
        figures: dict[str, list[float]] = {"psnr": [], "psnr_guidance": []}
        for example in self._held_out(pool):
            painted, guidance = paint(network, example)
            inner = np.isin(example.ids, INNER_FACE)
            for name, made in (("psnr", painted), ("psnr_guidance", guidance)):
                error = (made[inner].astype(np.float32) - example.truth[inner].astype(np.float32)) / 255
                figures[name].append(-10 * math.log10(max(float((error**2).mean()), 1e-8)))
        return {name: float(np.mean(values)) for name, values in figures.items() if values}

    def samples(self, network: nn.Module, pool: FacePool) -> UInt8:
        """Rows: what is seen in gray, the reference, the guidance, what is painted, the truth."""
        columns = []
        for example in self._held_out(pool)[::4]:
            painted, guidance = paint(network, example)
            columns.append(np.concatenate([example.gray, example.reference, guidance, painted, example.truth]))
        return np.concatenate(columns, axis=1)

    def _held_out(self, pool: FacePool) -> list[Example]:
        """The same examples each time."""
        known = len(pool.held_out_people), len(pool.held_out_photos)
        if self._examples is None or self._examples[0] != known:
            sets = [faces for faces in (pool.held_out_people, pool.held_out_photos) if len(faces)]
            made = []
            for number in range(self.checked):
                rng = np.random.Generator(np.random.PCG64([18, number]))
                made.append(draw_example(sets[number % len(sets)].pick(rng), rng))
            self._examples = known, made
        return self._examples[1]


def _halved(gray: Tensor, reference: Tensor, ids: Tensor, reference_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the network takes, from pictures (B, S, S, 3) and region ids (B, S, S)."""
    faces = [avg_pool2d(as_faces(images), 2) for images in (gray, reference)]
    return faces[0], faces[1], ids[:, ::2, ::2], reference_ids[:, ::2, ::2]


def _shown(painted: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """What is painted where it counts, the truth elsewhere."""
    return torch.where(weight > 0.5, painted, truth)


def paint(network: nn.Module, example: Example) -> tuple[UInt8, UInt8]:
    """What the network paints and its color guidance, (S, S, 3) each."""
    assert isinstance(network, SmallRecolorNet)
    device = network.gray.device
    arrays = (example.gray, example.reference, example.ids, example.reference_ids)
    gray, reference, ids, reference_ids = (torch.from_numpy(array)[None].to(device) for array in arrays)
    inputs = _halved(gray, reference, ids, reference_ids)
    with torch.no_grad():
        guidance_small = interpolate(network.guide(*inputs), (SmallRecolorNet.side,) * 2, mode="bilinear")
        made = [recolored(as_faces(gray), small) for small in (network(*inputs), guidance_small)]
    painted, guidance = (to_picture(tensor) for tensor in made)
    return painted, guidance
