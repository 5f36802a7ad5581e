"""The loop that all small networks are trained by: a `Recipe` says what is learnt, the loop keeps checkpoint, curves and samples.

Every step draws from a generator of its own (seed and step), so a training that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from flows.training.faces import FacePool
from flows.training.folder import NetworkSettings
from flows.training.objective import progress_of, save
from storage.codec import encode_png
from storage.run import read_lines
from storage.store import write_atomic
from tasks.stage import UInt8

Batch = Mapping[str, Tensor]

CHECKPOINT, LOG = "network.pt", "network.jsonl"
_AVERAGE = 0.998  # highest decay of the moving average of weights, which is what ships
_WARM_UP = 100  # steps


class Recipe(ABC):
    """One network: how it begins, what it sees, what it is told, how it is judged. Adding a network is writing one of these."""

    name: ClassVar[str]
    """As in `e4s train NAME`; the weights are called so, too."""
    batch: int = 8
    """Examples a step."""
    rate: float = 1e-3
    """Highest learning rate."""
    save_every: int = 200
    """Steps between checks, which write checkpoint, curves and samples."""
    checked: int = 64
    """Held-out faces of a check."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The network with the weights it begins with; what does not learn has no gradient."""

    @abstractmethod
    def example(self, pool: FacePool, rng: np.random.Generator) -> Mapping[str, Any]:
        """One example, arrays by name; stacked to a batch."""

    @abstractmethod
    def losses(self, network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Scalars whose sum is learnt from."""

    @abstractmethod
    def measure(self, network: nn.Module, pool: FacePool) -> Mapping[str, float]:
        """Figures on what is held out, the same examples each time."""

    @abstractmethod
    def samples(self, network: nn.Module, pool: FacePool) -> UInt8:
        """A picture (H, W, 3) that shows what the network makes of what is held out."""

    def rate_of(self, parameter: str) -> float:
        """Share of the learning rate that a parameter, by its name, learns with."""
        return 1.0

    def batch_of(self, pool: FacePool, rng: np.random.Generator, device: str = "cpu") -> Batch:
        """A batch of examples."""
        examples = [self.example(pool, rng) for _ in range(self.batch)]
        return {name: torch.from_numpy(np.stack([example[name] for example in examples])).to(device) for name in examples[0]}


def train(
    recipe: Recipe,
    data: Path,
    out: Path,
    settings: NetworkSettings,
    device: str = "cpu",
    report: Callable[[str], None] = print,
) -> nn.Module:
    """Train, or go on from `out/network.pt`; returns the averaged network.

    Writes that checkpoint, `out/network.jsonl` (a line per check), `out/curves.png` and `out/samples/*.png` every `save_every` steps.
    """
    torch.manual_seed(settings.seed)
    network = recipe.build().to(device)
    for parameter in network.parameters():
        if parameter.dim() == 4:  # kernels; faster on CPUs
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    average = AveragedModel(network, avg_fn=averaged, use_buffers=True)
    optimizer = torch.optim.AdamW(_groups(recipe, network), lr=recipe.rate, weight_decay=1e-4, betas=(0.9, 0.99))
    pool = FacePool(data)
    checkpoint = out / CHECKPOINT
    step, spent = 0, 0.0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    began = time.monotonic() - spent
    running: list[dict[str, float]] = []
    while (progress := progress_of(step, settings.steps, began, settings.minutes)) < 1:
        if not running:
            known = pool.refresh()
        share = min(1.0, (step + 1) / _WARM_UP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * group["share"] * share
        network.train()
        batch = recipe.batch_of(pool, np.random.Generator(np.random.PCG64([settings.seed, 4, step])), device)
        losses = recipe.losses(network, batch)
        optimizer.zero_grad()
        torch.autograd.backward(torch.stack(list(losses.values())).sum())
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(network)
        running.append({name: loss.item() for name, loss in losses.items()})
        step += 1
        if step % recipe.save_every == 0 or progress_of(step, settings.steps, began, settings.minutes) >= 1:
            spent = time.monotonic() - began
            average.eval()
            with torch.no_grad():
                measured = recipe.measure(average.module, pool)
            means = {name: float(np.mean([row[name] for row in running])) for name in running[0]}
            line = {"step": step, "faces": known, "rate": recipe.rate * share, **means, **measured, "minutes": spent / 60}
            running = []
            with (out / LOG).open("a") as log:
                log.write(json.dumps(line) + "\n")
            report(" ".join(f"{name} {value:.4g}" for name, value in line.items()))
            state = {"network": network.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            save(state | {"step": step, "spent": spent}, checkpoint)
            draw_curves(out, [*means, *measured])
            with torch.no_grad():
                write_atomic(out / "samples" / f"{step:06d}.png", encode_png(recipe.samples(average.module, pool)))
    return average.module.eval()


def averaged(average: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
    """Moving average of weights whose memory grows with the steps done: a short training forgets where it began, too."""
    decay = min(_AVERAGE, (1 + int(count)) / (10 + int(count)))
    return average + (current - average) * (1 - decay) if current.is_floating_point() else current


def trained(recipe: Recipe, out: Path) -> nn.Module:
    """The averaged network of `out/network.pt`."""
    average = AveragedModel(recipe.build(), use_buffers=True)
    average.load_state_dict(torch.load(out / CHECKPOINT, weights_only=True, map_location="cpu")["average"])
    module: nn.Module = average.module
    return module.eval()


def _groups(recipe: Recipe, network: nn.Module) -> list[dict[str, Any]]:
    """Parameters by the share of the rate that they learn with."""
    by_share: dict[float, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            by_share.setdefault(recipe.rate_of(name), []).append(parameter)
    return [{"params": parameters, "share": share} for share, parameters in by_share.items()]


def draw_curves(out: Path, names: Sequence[str]) -> None:
    """A panel for each named value over steps, `out/curves.png`."""
    lines, _ = read_lines(out / LOG)
    panels = []
    for name in names:
        by_step = {line["step"]: line[name] for line in lines if name in line}  # steps that were done again: as they were at last
        panels.append(_panel(name, np.array(sorted(by_step.items()), np.float64).reshape(-1, 2)))
    write_atomic(out / "curves.png", encode_png(np.concatenate(panels, axis=1)))


def _panel(name: str, points: np.ndarray[Any, np.dtype[np.float64]]) -> UInt8:
    panel = np.full((240, 360, 3), 255, np.uint8)
    if len(points):
        low, high, last = min(0.0, points[:, 1].min()), points[:, 1].max(), points[-1, 0]
        rise = (points[:, 1] - low) / max(high - low, 1e-9)
        pixels = np.stack([20 + points[:, 0] / last * 320, 220 - rise * 180], axis=1).astype(np.int32)
        cv2.polylines(panel, [pixels], False, (20, 60, 160), 2, cv2.LINE_AA)
        text = f"{name}: {points[-1, 1]:.4f} at {int(last)}"
        cv2.putText(panel, text, (8, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return panel
