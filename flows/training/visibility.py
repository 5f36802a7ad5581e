"""Recipe `visibility`: things drawn in front of faces, with exact masks; the network says where they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from e4s_models.face_parser import FaceParser
from e4s_models.regions import INNER_FACE, Region
from e4s_models.visibility_net import Seen, VisibilityNet
from flows.training.faces import FacePool
from flows.training.loop import Batch, Recipe
from flows.training.occluders import TRAINED, UNSEEN, Scene, clear_glasses, occlude
from flows.training.photograph import cast_shadow, make_up, moved, photograph
from tasks.stage import Float32, UInt8

CLEAN_SHARE = 0.35  # of the examples: nothing in front
_SHADES = 0.5  # glasses darker than this share of the skin: nobody knows what to say of them
_EDGE = 0.15, 0.85  # coverage between which a pixel says nothing

Example = tuple[UInt8, Float32, Float32]
"""RGB (S, S, 3), truth (3, S, S) of `Seen` in [0, 1], weight (S, S)."""


Judged = tuple[str, UInt8, Float32, npt.NDArray[np.bool_]]
"""What a held-out example judges, RGB, truth, inner face (S, S)."""


def draw_example(
    face: tuple[UInt8, UInt8], other: tuple[UInt8, UInt8], kinds: list[str], rng: np.random.Generator, light: bool = True
) -> Example:
    """A face (RGB and region ids) with things of the given kinds in front of it, as a photograph (or, without `light`, as it is)."""
    image, labels = moved(*face, rng)
    if rng.random() < 0.2:
        image = make_up(image, labels, rng)
    if rng.random() < 0.12 and not (labels == Region.GLASSES).any():
        image = clear_glasses(Scene(image, labels, *other), rng)
    if rng.random() < 0.3:
        image = cast_shadow(image, rng)
    inner = np.isin(labels, INNER_FACE)
    weight = np.where(_shaded_glasses(image, labels), np.float32(0), np.float32(1))
    covered = np.zeros(labels.shape, np.float32)
    for kind in kinds:
        image, alpha = occlude(Scene(image, labels, *moved(*other, rng)), kind, rng)
        covered = np.maximum(covered, alpha)
    if light:
        image = photograph(image, rng)
    weight[covered > 0.5] = 1
    # A pixel that is half covered has no right answer: it neither helps nor counts.
    weight[(covered > _EDGE[0]) & (covered < _EDGE[1]) & _near_edge(covered)] = 0
    hidden = (covered > 0.3).astype(np.float32)
    truth = np.stack([(1 - hidden) * ~inner, (1 - hidden) * inner, hidden]).astype(np.float32)
    return image, truth, weight * (1 + 2 * np.isin(labels, INNER_FACE)).astype(np.float32)


def _near_edge(covered: Float32) -> npt.NDArray[np.bool_]:
    """Where coverage changes within two px: the border of a thing, not the inside of a pane."""
    square = np.ones((5, 5), np.uint8)
    return np.asarray(cv2.dilate(covered, square) - cv2.erode(covered, square) > 0.3)


def _shaded_glasses(image: UInt8, labels: UInt8) -> npt.NDArray[np.bool_]:
    """Pixels of glasses of which one cannot tell whether the eyes show through."""
    glasses, skin = labels == Region.GLASSES, labels == Region.SKIN
    if not glasses.any() or not skin.any():
        return np.asarray(glasses)
    dark = np.median(image[glasses]) < _SHADES * np.median(image[skin])
    return np.asarray(glasses & dark)


def draw_kinds(rng: np.random.Generator, clean: float = CLEAN_SHARE) -> list[str]:
    """What is in front in one example: nothing, one thing, or more."""
    if rng.random() < clean:
        return []
    names = list(TRAINED)
    return [names[int(rng.integers(len(names)))] for _ in range(int(rng.choice([1, 1, 1, 2, 3])))]


class VisibilityRecipe(Recipe):
    """Cross entropy over three classes and the overlap of what is in front."""

    name = "visibility"
    batch = 8
    rate = 2e-3
    save_every = 50
    window = 160
    """px that are learnt from: the middle of a face fills them."""

    def __init__(self) -> None:
        self._examples: tuple[tuple[int, int], list[Judged]] | None = None

    def build(self) -> nn.Module:
        network = VisibilityNet()
        network.start_from(FaceParser.load("cpu"))
        return network

    def rate_of(self, parameter: str) -> float:
        return 0.1 if parameter.startswith("levels.") else 1.0

    def example(self, pool: FacePool, rng: np.random.Generator) -> Mapping[str, Any]:
        image, truth, weight = draw_example(pool.draw(rng), pool.draw(rng), draw_kinds(rng), rng)
        room = len(image) - self.window
        top, left = (int(np.clip(rng.normal(share, 0.2), 0, 1) * room) for share in (0.6, 0.5))
        part = (slice(top, top + self.window), slice(left, left + self.window))
        return {"faces": image[part].copy(), "truth": truth[:, *part].copy(), "weight": weight[part].copy()}

    def losses(self, network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        scores = log_softmax(network(as_faces(batch["faces"])), dim=1)
        truth, weight = batch["truth"], batch["weight"]
        entropy = -(scores * truth).sum(dim=1)
        hidden, true = scores[:, Seen.OCCLUDER].exp(), truth[:, Seen.OCCLUDER]
        both, either = ((part * weight).sum(dim=(1, 2)) for part in (hidden * true, hidden + true))
        overlap = 1 - (2 * both + 50) / (either + 50)  # 50 px: nothing in front and nothing seen is a full overlap
        return {"entropy": (entropy * weight).sum() / weight.sum(), "overlap": 0.5 * overlap.mean()}

    def measure(self, network: nn.Module, pool: FacePool) -> Mapping[str, float]:
        """IoU of the occluder within the face, on kinds trained on and not; false alarms on clean faces, share of face pixels."""
        figures: dict[str, list[float]] = {"iou": [], "iou_unseen": [], "alarms": []}
        for name, image, truth, inner in self._held_out(pool):
            hidden = predict(network, image)[Seen.OCCLUDER] > 0.5
            if name == "alarms":
                figures[name].append(float(hidden[inner].mean()))
            else:
                true = truth[Seen.OCCLUDER] > 0.5
                area = inner | true
                figures[name].append(overlap_of(hidden & area, true & area))
        return {name: float(np.mean(values)) for name, values in figures.items() if values}

    def samples(self, network: nn.Module, pool: FacePool) -> UInt8:
        """Pictures above what is seen in them: green the face, red what is in front."""
        columns = []
        for number, (_, image, _, _) in enumerate(self._held_out(pool)):
            if number % 8 == 0:
                columns.append(np.concatenate([image, shown(image, predict(network, image))]))
        return np.concatenate(columns, axis=1)

    def _held_out(self, pool: FacePool) -> list[Judged]:
        """The same examples each time: what they judge, picture, truth, inner face."""
        known = len(pool.held_out_people), len(pool.held_out_photos)
        if self._examples and self._examples[0] == known:
            return self._examples[1]
        examples = []
        sets = [faces for faces in (pool.held_out_people, pool.held_out_photos) if len(faces)]
        for number in range(self.checked):
            rng = np.random.Generator(np.random.PCG64([17, number]))
            faces = sets[number % len(sets)]
            name = ("iou", "iou", "iou_unseen", "alarms")[number // 2 % 4]
            kinds = {"iou": list(TRAINED), "iou_unseen": list(UNSEEN), "alarms": []}[name]
            chosen = [kinds[number // 4 % len(kinds)]] if kinds else []
            image, truth, _ = draw_example(faces.pick(rng), faces.pick(rng), chosen, rng)
            inner = truth[Seen.FACE] > 0.5
            if (chosen and truth[Seen.OCCLUDER].sum() < 100) or not inner.any():
                continue
            examples.append((name, image, truth, inner))
        self._examples = known, examples
        return examples


def as_faces(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def predict(network: nn.Module, image: UInt8) -> Float32:
    """Probabilities (3, S, S) of `Seen` for one picture (S, S, 3)."""
    device = next(network.parameters()).device
    with torch.no_grad():
        scores: Tensor = network(as_faces(torch.from_numpy(image)[None]).to(device))
        probabilities: Float32 = scores.softmax(dim=1)[0].cpu().numpy()
    return probabilities


def overlap_of(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> float:
    """Intersection over union of two masks; 1 where both are empty."""
    union = float((one | other).sum())
    return float((one & other).sum()) / union if union else 1.0


def shown(image: UInt8, probabilities: Float32) -> UInt8:
    """The picture tinted by what is seen: green the face, red what is in front."""
    tint = np.zeros_like(image, np.float32)
    tint[..., 0], tint[..., 1] = 255 * probabilities[Seen.OCCLUDER], 160 * probabilities[Seen.FACE]
    share = 0.55 * (1 - probabilities[Seen.OTHER])[..., None]
    return np.asarray(np.rint(image * (1 - share) + tint * share), np.uint8)
