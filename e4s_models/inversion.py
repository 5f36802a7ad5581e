"""Regional GAN inversion after the encoder: its codes are corrected by feeding its own pictures back, then refined by optimization.

The optimization's loss is the training's (`ReconstructionLoss`, Eq. 22) at the size that `render` makes, with a weak pull to the start.
What moves is the deviation from the start in units of W's standard deviations, a part shared by all regions and one per region, each by
group of style layers, so that codes stay where the generator makes faces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from e4s_models.checks import check_shape
from e4s_models.code_encoder import per_layer

Render = Callable[[Tensor], Tensor]
"""Codes (B, R, L, D) -> RGB (B, 3, S, S), about [-1, 1]; S is the size at which pictures are compared."""
Loss = Callable[[Tensor], Tensor]
"""RGB (B, 3, S, S) [-1, 1] -> (B,), how far each picture is from the face it shall show."""


@dataclass(frozen=True, kw_only=True)
class RefineSettings:
    steps: int = 50
    rate: float = 0.05  # Adam, in standard deviations of W
    pull: float = 0.01  # weight of the mean squared deviation from the start
    patience: int = 15  # steps without gain before it stops
    gain: float = 0.002  # relative


def feed_back(start: Tensor, encode: Callable[[Tensor], Tensor], render: Render, face: Tensor, passes: int, share: float = 0.6) -> Tensor:
    """Codes corrected by what the encoder makes of its own pictures: c + share * (encode(face) - encode(render(c))), over and over.

    Where the generator shows just the face, both are encoded alike and nothing moves, so what the encoder always gets wrong in the same
    way is taken out; no gradients. (ReStyle, Alaluf et al. 2021, trains an encoder for such passes; this one was not.)

    Args:
        start: (B, R, L, D) codes, such as the encoder's of the face.
        encode: pictures as `render` makes them -> codes.
        render: makes pictures of codes.
        face: (B, 3, S, S) the face itself, as large as the pictures, so that both are blurred alike.
        passes: how often; measured: most is gained by 2, and from 4 on nothing.
        share: of the difference that is added.
    """
    if not passes:
        return start
    wanted, codes = encode(face), start
    for _ in range(passes):
        codes = codes + share * (wanted - encode(render(codes).clamp(-1, 1)))
    return codes


def refine(
    start: Tensor,
    render: Render,
    loss: Loss,
    basis: Tensor,
    groups: Sequence[int],
    settings: RefineSettings,
) -> tuple[Tensor, list[float]]:
    """Codes whose pictures have a lower loss than those of `start`.

    Args:
        start: (B, R, L, D) codes, such as the encoder's.
        render: makes pictures of codes; gradients must flow through it.
        loss: of those pictures, such as `ReconstructionLoss`.
        basis: (N, D): directions along which codes may move, each as long as one standard deviation.
        groups: ends of the groups of style layers that move together; the last is L.
        settings: steps, rates and weights.

    Returns the codes with the lowest loss (of each face), and the mean loss per step. Raises ValueError on other shapes, and in inference
    mode, where no gradient can be had.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("codes cannot be refined in inference mode; leave it by torch.inference_mode(False)")
    bound = check_shape(start, "B R L D")
    if groups[-1] != bound["L"]:
        raise ValueError(f"the groups must end with layer {bound['L']}, got {groups[-1]}")
    shape = (bound["B"], 1, len(groups), len(basis))
    shared = torch.zeros(shape, device=start.device, requires_grad=True)
    local = torch.zeros((bound["B"], bound["R"], *shape[2:]), device=start.device, requires_grad=True)
    optimizer = torch.optim.Adam(
        [{"params": [shared], "lr": settings.rate}, {"params": [local], "lr": settings.rate / 2}], betas=(0.9, 0.9)
    )
    best, best_loss, losses, since = start.clone(), torch.full((bound["B"],), torch.inf, device=start.device), [], 0
    for step in range(settings.steps + 1):
        warm = min(1.0, (settings.steps - step + 1) / max(1.0, 0.3 * settings.steps))  # falls to 0 over the last third
        for group, rate in zip(optimizer.param_groups, (settings.rate, settings.rate / 2), strict=True):
            group["lr"] = rate * warm
        with torch.enable_grad():
            moved = shared + local
            codes = start + per_layer(moved @ basis, groups)
            each = loss(render(codes))
            total = (each + settings.pull * moved.square().mean(dim=(1, 2)).sum(dim=1)).sum()
        losses.append(each.mean().item())
        better = (each < best_loss).detach()
        best = torch.where(better[:, None, None, None], codes.detach(), best)
        gained = bool((each.detach() < best_loss * (1 - settings.gain)).any())
        best_loss = torch.where(better, each.detach(), best_loss)
        since = 0 if gained else since + 1
        if step == settings.steps or since >= settings.patience:
            break
        optimizer.zero_grad()
        torch.autograd.backward(total)
        optimizer.step()
    return best, losses
