"""Generators that an encoder can be trained for, behind one interface: codes and region ids in, comparable pictures out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e4s_models.code_encoder import LAYER_GROUPS
from e4s_models.discriminator import Discriminator
from e4s_models.mobile_stylegan import MobileStyleGAN
from e4s_models.preview_head import SIDE as PREVIEW_SIDE
from e4s_models.preview_head import PreviewHead, preview
from e4s_models.stylegan2 import StyleGAN2


class Trainee(Protocol):
    """What the objective needs of a generator."""

    @property
    def side(self) -> int:
        """px of the pictures that `render` makes and the losses see."""

    @property
    def groups(self) -> Sequence[int]:
        """Ends of the groups of style layers that share one predicted code."""

    def render(self, codes: Tensor, region_ids: Tensor) -> Tensor:
        """Codes (B, 12, L, 512), region ids (B, H, W) uint8 -> RGB (B, 3, side, side), about [-1, 1]; differentiable."""

    def tuned(self) -> Iterator[nn.Parameter]:
        """The generator's own parameters that are trained with the encoder."""

    @property
    def discriminator(self) -> nn.Module | None:
        """Judges pictures of `side` px, if training is adversarial."""


class MobileTrainee:
    """The embedded generator through its 128 px head: frozen, cheap, no adversary."""

    side = PREVIEW_SIDE
    groups = LAYER_GROUPS
    discriminator = None

    def __init__(self, generator: MobileStyleGAN, head: PreviewHead) -> None:
        self.generator, self.head = generator.requires_grad_(False), head.requires_grad_(False)

    def render(self, codes: Tensor, region_ids: Tensor) -> Tensor:
        return preview(self.generator, self.head, codes, region_ids)

    def tuned(self) -> Iterator[nn.Parameter]:
        return iter(())


class StyleGan2Trainee:
    """StyleGAN2 at full size: its first K style layers learn too, against a discriminator (the paper's Sec. 4.2)."""

    def __init__(self, generator: StyleGAN2, discriminator: Discriminator) -> None:
        """`generator.region_layers` is K; a discriminator of the generator's side, usually pretrained."""
        self.generator, self.discriminator = generator, discriminator
        self.side = generator.side
        layers = generator.num_layers
        self.groups = tuple(sorted({*(end for end in (4, 8, 13) if end < layers), layers}))

    def render(self, codes: Tensor, region_ids: Tensor) -> Tensor:
        return self.generator(codes, region_ids)  # type: ignore[no-any-return]

    def tuned(self) -> Iterator[nn.Parameter]:
        for layer, conv in enumerate(self.generator.convs):
            if layer < self.generator.region_layers:
                yield from conv.parameters()


def fooling_loss(judged: Tensor) -> Tensor:
    """What the generator pays for pictures judged (B,) or (B, 1) as made up: Eq. 23 in its non-saturating form."""
    return F.softplus(-judged).mean()


def judging_loss(real: Tensor, made: Tensor) -> Tensor:
    """What the discriminator pays for its judgements of real and made pictures (Eq. 23)."""
    return F.softplus(-real).mean() + F.softplus(made).mean()


def gradient_penalty(discriminator: nn.Module, real: Tensor) -> Tensor:
    """R1: mean squared gradient of the judgements with respect to real pictures (B, 3, S, S)."""
    real = real.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()
