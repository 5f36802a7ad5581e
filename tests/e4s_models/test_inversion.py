"""Refining codes: on a small differentiable picture maker, and on the real generator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from e4s_models.inversion import RefineSettings, feed_back, refine

GROUPS = (2, 3)


class Painter:
    """Codes (B, 2, 3, 4) -> pictures (B, 3, 8, 8): a fixed linear map."""

    def __init__(self) -> None:
        self.weight = torch.randn(24, 192, generator=torch.Generator().manual_seed(0)) / 5

    def __call__(self, codes: Tensor) -> Tensor:
        return (codes.flatten(1) @ self.weight).view(-1, 3, 8, 8)


def run(steps: int, start: Tensor, wanted: Tensor, **changes: float) -> tuple[Tensor, list[float]]:
    painter = Painter()
    settings = RefineSettings(steps=steps, rate=0.1, **changes)  # type: ignore[arg-type]
    with torch.no_grad():  # as a stage is run
        return refine(start, painter, lambda made: (made - wanted).square().mean(dim=(1, 2, 3)), torch.eye(4), GROUPS, settings)


@pytest.fixture
def goal() -> tuple[Tensor, Tensor]:
    """A start and the picture of codes that can be reached from it by groups."""
    moved = torch.randn(2, 2, 2, 4, generator=torch.Generator().manual_seed(1)) / 2
    codes = moved[:, :, [0, 0, 1]]
    return torch.zeros_like(codes), Painter()(codes)


def test_passes_take_out_what_the_encoder_always_adds() -> None:
    painter = Painter()
    codes = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(2)) / 10
    face, inverse = painter(codes), torch.linalg.pinv(painter.weight)
    assert face.abs().max() < 1

    def encode(pictures: Tensor) -> Tensor:
        return (pictures.flatten(1) @ inverse).view_as(codes) + 0.1

    for passes, left in ((0, 0.1), (1, 0.04), (2, 0.016)):
        got = feed_back(encode(face), encode, painter, face, passes, share=0.6)
        torch.testing.assert_close(got - codes, torch.full_like(codes, left), rtol=1e-3, atol=1e-4)


def test_more_steps_come_nearer(goal: tuple[Tensor, Tensor]) -> None:
    ends = [run(steps, *goal)[1][-1] for steps in (0, 10, 60)]
    assert ends[0] > 2 * ends[1] > 4 * ends[2]


def test_layers_of_a_group_move_together_and_regions_apart(goal: tuple[Tensor, Tensor]) -> None:
    codes, _ = run(30, *goal)
    assert torch.equal(codes[:, :, 0], codes[:, :, 1])
    assert not torch.equal(codes[:, :, 0], codes[:, :, 2])
    assert not torch.equal(codes[:, 0], codes[:, 1])


def test_a_batch_gives_what_single_faces_give(goal: tuple[Tensor, Tensor]) -> None:
    start, wanted = goal
    both, _ = run(20, start, wanted)
    for item in range(2):
        alone, _ = run(20, start[item : item + 1], wanted[item : item + 1])
        torch.testing.assert_close(alone[0], both[item], rtol=1e-4, atol=1e-5)


def test_the_start_is_kept_where_nothing_is_gained(goal: tuple[Tensor, Tensor]) -> None:
    start, _ = goal
    codes, losses = run(50, start, Painter()(start), patience=5)
    assert torch.equal(codes, start)
    assert len(losses) == 6, "it stops after `patience` steps without gain"


def test_the_pull_keeps_codes_near_the_start(goal: tuple[Tensor, Tensor]) -> None:
    free, held = (run(60, *goal, pull=pull)[0] for pull in (0.0, 0.5))
    assert held.square().mean() < 0.5 * free.square().mean()


def test_what_cannot_work_is_said(goal: tuple[Tensor, Tensor]) -> None:
    start, wanted = goal
    with pytest.raises(ValueError, match="must end with layer 3"):
        refine(start, Painter(), lambda made: made.mean(dim=(1, 2, 3)), torch.eye(4), (2,), RefineSettings())
    with torch.inference_mode(), pytest.raises(ValueError, match="inference mode"):
        run(2, start, wanted)
