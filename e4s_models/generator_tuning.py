"""Tuning of a generator's weights to faces, their style codes fixed (pivotal tuning, arXiv 2106.05744; the paper's Appendix B).

Codes show a face as far as the generator can make it. Tuning moves the weights of some of its layers until the picture of those codes shows
what is left: freckles, the colour of the lips, fine structure. `tune` knows no generator, only losses that depend on weights; a `Tunable`
draws a square window of the picture for it: `TunableMobile` by the embedded generator, `TunableStyleGAN2` by the published one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from e4s_models.checks import check_shape

if TYPE_CHECKING:
    from e4s_models.mobile_stylegan import MobileStyleGAN
    from e4s_models.reconstruction_loss import ReconstructionLoss
    from e4s_models.stylegan2 import StyleGAN2

Weights = Mapping[str, Tensor]
"""Weights of a network by the names of its state dict."""
Render = Callable[[Weights], Tensor]
"""Weights that replace the generator's own -> RGB (1, 3, w, w) of the window that was asked for, about [-1, 1]."""
WeightLoss = Callable[[Weights], Tensor]
"""Weights that replace the generator's own -> (), how far the picture of one face is from that face."""

STRIDE = 16  # px of the finished picture: windows begin and end at multiples
_WINDOW_SIDE = 128  # px of the embedded generator's features from which on only the window is drawn; what lies before costs little
_MARGIN = 16  # px of the finished picture that its last six 3x3 convolutions see beyond the window
_SMALLEST = 1e-4  # a layer's root mean square is taken as at least this, so that zeros can move


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    steps: int = 200  # updates per face (published: 200)
    rate: float = 1e-3  # Adam; in units of each tensor's root mean square, which is about 1 in the published generator


@dataclass(frozen=True)
class Window:
    """A square part of the finished picture, px."""

    top: int
    left: int
    side: int

    @classmethod
    def around(cls, mask: Tensor, side: int) -> Window:
        """The smallest window on multiples of `STRIDE` that holds a mask (H, W) bool enlarged to `side`; all of it for an empty one."""
        if not mask.any():
            return cls(0, 0, side)
        ends = []
        for axis in (1, 0):
            found = torch.nonzero(mask.any(dim=axis))[:, 0]
            ends.append((int(found[0]) * side // mask.shape[1 - axis], -(-(int(found[-1]) + 1) * side // mask.shape[1 - axis])))
        size = min(side, (-(-max(last - first for first, last in ends) // STRIDE) + 1) * STRIDE)
        top, left = (min(first // STRIDE * STRIDE, side - size) for first, _ in ends)
        return cls(top, left, size)

    def grown(self, margin: int, side: int) -> Window:
        """With a margin around it, as far as a picture of `side` allows."""
        size = min(side, self.side + 2 * margin)
        return Window(min(max(0, self.top - margin), side - size), min(max(0, self.left - margin), side - size), size)

    def of(self, maps: Tensor, side: int) -> Tensor:
        """Its part of maps (..., s, s) of a picture of `side`: s divides `side`, or is a multiple of it."""
        scale = maps.shape[-1] / side
        top, left, size = (round(px * scale) for px in (self.top, self.left, self.side))
        return maps[..., top : top + size, left : left + size]


class Tunable(Protocol):
    """A generator as `tune_faces` sees it."""

    side: int
    """px of the finished picture."""

    def weights(self, first_side: int, last_side: int) -> dict[str, Tensor]:
        """Convolutions and biases of the layers that make features, or colours, of `first_side` to `last_side` px, as they are."""

    def render(self, codes: Tensor, region_ids: Tensor, first_side: int, window: Window) -> Render:
        """Draw a window of one face again and again: codes (1, R, L, D), region_ids (1, H, H) uint8."""


class TunableMobile:
    """The embedded generator: what lies before the tuned layers is computed once, and from 128 px on only the window is drawn."""

    side = 1024

    def __init__(self, generator: MobileStyleGAN) -> None:
        self.generator = generator

    def weights(self, first_side: int, last_side: int) -> dict[str, Tensor]:
        """As `Tunable`; the first block makes 8 px, the last 512, and the colours have 1024."""
        sides = {f"blocks.{k}.": 8 << k for k in range(len(self.generator.blocks))} | {"to_image.": self.side}
        return _chosen(self.generator, sides, first_side, last_side)

    def render(self, codes: Tensor, region_ids: Tensor, first_side: int, window: Window) -> Render:
        """As `Tunable`; H must divide 1024 or be a multiple of it."""
        generator, begin, split = self.generator, first_side // 2, max(first_side // 2, _WINDOW_SIDE)
        with torch.no_grad():
            start = generator.synthesize(codes, region_ids, stop_after=begin)
        wide = window.grown(_MARGIN, self.side)
        inner = Window(window.top - wide.top, window.left - wide.left, window.side)
        steps = torch.arange(self.side, device=region_ids.device) * region_ids.shape[1] // self.side
        ids = wide.of(region_ids[:, steps][:, :, steps], self.side)
        maps = {name: noise for name, noise in generator.named_buffers() if name.endswith(".noise") and noise.shape[-1] > split}
        noises = {name: wide.of(noise, self.side) for name, noise in maps.items()}

        def render(weights: Weights) -> Tensor:
            x = start
            if split > begin:
                x = functional_call(generator, dict(weights), (codes, region_ids, split, (begin, start)))
            picture = functional_call(generator, {**weights, **noises}, (codes, ids, None, (split, wide.of(x, self.side))))
            return inner.of(picture, wide.side)

        return render


class TunableStyleGAN2:
    """The published generator; the whole picture is drawn each time."""

    def __init__(self, generator: StyleGAN2) -> None:
        self.generator, self.side = generator, generator.side

    def weights(self, first_side: int, last_side: int) -> dict[str, Tensor]:
        """As `Tunable`; the first layer makes 4 px."""
        sides = {f"convs.{i}.": 4 << (i + 1) // 2 for i in range(len(self.generator.convs))}
        sides |= {f"to_rgbs.{i}.": 4 << i for i in range(len(self.generator.to_rgbs))}
        return _chosen(self.generator, sides, first_side, last_side)

    def render(self, codes: Tensor, region_ids: Tensor, first_side: int, window: Window) -> Render:
        """As `Tunable`."""
        return lambda weights: window.of(functional_call(self.generator, dict(weights), (codes, region_ids)), self.side)


def _chosen(generator: nn.Module, sides: Mapping[str, int], first: int, last: int) -> dict[str, Tensor]:
    """Parameters of layers by prefix and side, but not those that map codes to styles: codes mean the same before and after."""
    prefixes = tuple(prefix for prefix, side in sides.items() if first <= side <= last)
    return {name: value for name, value in generator.named_parameters() if name.startswith(prefixes) and ".style." not in name}


def face_loss(render: Render, window: Window, face: Tensor, mask: Tensor, compared: int, reconstruction: ReconstructionLoss) -> WeightLoss:
    """How far the pictures of `render` are from a face where a mask says so; elsewhere the face itself stands, so nothing there counts.

    Eq. 22 at `compared` px, and the squared error of all pixels of the finished picture: without it nothing would hold what is finer
    than `compared` px, and a checked pattern appears there.

    Args:
        render: draws the window.
        window: of the finished picture.
        face: (1, 3, S, S) RGB [-1, 1], S the side of the finished picture.
        mask: (1, H, H) bool, where they are compared.
        compared: px, a multiple of 64 that divides S.
        reconstruction: Eq. 22.
    """
    side = check_shape(face, "1 3 S S")["S"]
    small = F.interpolate(face, (compared, compared), mode="area")
    wanted = reconstruction.of(small)
    weight = window.of(F.interpolate(mask[:, None].float(), (side, side), mode="area"), side)  # (1, 1, w, w)
    box = window.of(face, side)
    size = window.side * compared // side
    top, left = (px * compared // side for px in (window.top, window.left))
    around = (left, compared - left - size, top, compared - top - size)

    def loss(weights: Weights) -> Tensor:
        difference = (render(weights) - box) * weight
        distance: Tensor = reconstruction(small + F.pad(F.interpolate(difference, (size, size), mode="area"), around), wanted)
        return distance[0] + difference.square().sum() / (3 * side * side)

    return loss


def tune(weights: Weights, losses: Sequence[WeightLoss], settings: TuneSettings) -> tuple[dict[str, Tensor], list[float]]:
    """Changes of weights that lower losses: of one face, or of all driven frames of a video together.

    Args:
        weights: those that may change, as they are; they are not touched.
        losses: one per face; every step is one update for each face, in order.
        settings: steps and rate.

    Returns what to add to each weight, float16, and the mean loss per step. Raises ValueError for no face, and in inference mode, where no
    gradient can be had.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("weights cannot be tuned in inference mode; leave it by torch.inference_mode(False)")
    if not losses:
        raise ValueError("tuning needs at least one face, got none")
    scales = {name: float(value.square().mean().sqrt().clamp(min=_SMALLEST)) for name, value in weights.items()}
    moved = {name: torch.zeros_like(value, requires_grad=True) for name, value in weights.items()}
    optimizer = torch.optim.Adam(list(moved.values()), lr=settings.rate)
    curve = []
    for step in range(settings.steps):
        for group in optimizer.param_groups:  # falls to 0 over the last third
            group["lr"] = settings.rate * min(1.0, (settings.steps - step) / max(1.0, settings.steps / 3))
        found = []
        for loss in losses:
            with torch.enable_grad():
                value = loss({name: base + scales[name] * moved[name] for name, base in weights.items()})
            optimizer.zero_grad()
            torch.autograd.backward(value)
            optimizer.step()
            found.append(value.item())
        curve.append(sum(found) / len(found))
    return {name: (scales[name] * change.detach()).half() for name, change in moved.items()}, curve


def changed(network: nn.Module, changes: Weights) -> dict[str, Tensor]:
    """Weights of a network with changes added, for `torch.func.functional_call`. Raises ValueError for changes of another network."""
    known = dict(network.named_parameters())
    for name, change in changes.items():
        if name not in known or known[name].shape != change.shape:
            had = f"{tuple(known[name].shape)}" if name in known else "none"
            raise ValueError(f"the tuning changes {name} {tuple(change.shape)}, the network has {had}: it was made for another generator")
    return {name: known[name] + change.to(known[name]) for name, change in changes.items()}


def pack(changes: Weights) -> npt.NDArray[np.uint8]:
    """Changes as the bytes of a safetensors file, (N,) uint8: one array that says itself what it holds."""
    return np.frombuffer(safetensors.numpy.save({name: value.cpu().numpy() for name, value in sorted(changes.items())}), np.uint8)


def unpack(packed: npt.NDArray[np.uint8]) -> dict[str, Tensor]:
    """The changes that `pack` made an array of."""
    return {name: torch.from_numpy(value) for name, value in safetensors.numpy.load(packed.tobytes()).items()}


def run_tuned(network: nn.Module, packed: npt.NDArray[np.uint8] | None, codes: Tensor, region_ids: Tensor) -> Tensor:
    """The picture (B, 3, S, S) of codes and region ids by a generator, with packed changes of its weights if there are any."""
    weights = {} if packed is None else changed(network, unpack(packed))
    picture: Tensor = functional_call(network, weights, (codes, region_ids))
    return picture
