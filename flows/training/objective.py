"""Second part of the training: the paper's objective on pictures (Eq. 18-24), through the generator."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e4s_models.code_encoder import CodeEncoder, per_layer
from e4s_models.reconstruction_loss import ReconstructionLoss
from flows.training.data import Pool
from flows.training.trainee import Trainee, fooling_loss, gradient_penalty, judging_loss


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    steps: int = 2000
    batch: int = 4
    rate: float = 1e-4  # the paper's, decayed by a cosine
    adversarial: float = 0.01  # Eq. 24, where the generator has a discriminator
    judge_every: int = 15  # generator steps per step of the discriminator
    penalty: float = 10.0  # R1
    codes: float = 1.0  # weight of the distance to known codes, where there are some (ours: it holds codes near W)
    flips: float = 0.5  # chance that a picture is mirrored (then its code is unknown)
    seed: int = 0
    save_every: int = 50
    minutes: float = 0.0  # 0: no limit


def train(
    encoder: CodeEncoder,
    trainee: Trainee,
    pool: Pool,
    reconstruction: ReconstructionLoss,
    code_loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
    out: Path,
    settings: ObjectiveSettings,
    report: Callable[[str], None] = print,
    sample: Callable[[int], None] = lambda step: None,
) -> None:
    """Train `encoder` (and what the trainee lets tune) in place, or go on from `out/objective.pt`.

    Writes that checkpoint and `out/objective.jsonl` every `save_every` steps and calls `sample` with the step then. `code_loss` is
    `flows.training.teach.CodeLoss` or None where codes are not known.
    """
    device = encoder.mean_code.device
    tuned = list(trainee.tuned())
    optimizer = torch.optim.Adam([*encoder.parameters(), *tuned], lr=settings.rate, betas=(0.9, 0.99))
    judge = trainee.discriminator
    judge_optimizer = torch.optim.Adam(judge.parameters(), lr=settings.rate, betas=(0.0, 0.99)) if judge else None
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "objective.pt"
    state: dict[str, Any] = {"step": 0, "spent": 0.0}
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        encoder.load_state_dict(state["encoder"])
        optimizer.load_state_dict(state["optimizer"])
        for parameter, value in zip(tuned, state["tuned"], strict=True):
            parameter.data.copy_(value)
        if judge and judge_optimizer:
            judge.load_state_dict(state["judge"])
            judge_optimizer.load_state_dict(state["judge_optimizer"])
    step, began = int(state["step"]), time.monotonic() - float(state["spent"])
    running: list[dict[str, float]] = []
    encoder.eval()  # batches are small: normalisation keeps the statistics that were taught
    while (progress := progress_of(step, settings.steps, began, settings.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        rng = np.random.Generator(np.random.PCG64([settings.seed, 1, step]))
        if not running:
            pool.refresh()
        batch = pool.draw(settings.batch, rng)
        flip = torch.from_numpy(rng.random(settings.batch) < settings.flips)
        faces = torch.where(flip.view(-1, 1, 1, 1), batch.faces.flip(3), batch.faces).to(device)
        labels = torch.where(flip.view(-1, 1, 1), batch.labels.flip(2), batch.labels).to(device)
        with halved(device.type):
            grouped = encoder(faces, labels).float()
        made = trainee.render(per_layer(grouped, trainee.groups), labels)
        real = F.interpolate(faces, made.shape[-2:], mode="area")
        losses = {"reconstruction": reconstruction(made, reconstruction.of(real)).mean()}
        if code_loss is not None:
            present = batch.present.to(device) * ~flip.to(device)[:, None]
            losses["codes"] = settings.codes * code_loss(grouped, batch.codes.to(device), present).mean()
        if judge:
            losses["fooling"] = settings.adversarial * fooling_loss(judge(made))
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        torch.autograd.backward(total)
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        if judge and judge_optimizer and step % settings.judge_every == 0:
            judged = judging_loss(judge(real), judge(made.detach())) + settings.penalty / 2 * gradient_penalty(judge, real)
            judge_optimizer.zero_grad()
            torch.autograd.backward(judged)
            judge_optimizer.step()
            losses["judging"] = judged
        running.append({name: value.item() for name, value in losses.items()})
        step += 1
        if step % settings.save_every == 0 or progress_of(step, settings.steps, began, settings.minutes) >= 1:
            spent = time.monotonic() - began
            means = {name: float(np.mean([row[name] for row in running if name in row])) for name in running[-1]}
            line = {"step": step, **means, "rate": optimizer.param_groups[0]["lr"], "minutes": spent / 60}
            running = []
            with (out / "objective.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            report(" ".join(f"{name} {value:.4g}" for name, value in line.items()))
            state = {"encoder": encoder.state_dict(), "optimizer": optimizer.state_dict(), "tuned": [p.data for p in tuned], "step": step}
            state |= {"spent": spent, "settings": asdict(settings)}
            if judge and judge_optimizer:
                state |= {"judge": judge.state_dict(), "judge_optimizer": judge_optimizer.state_dict()}
            save(state, checkpoint)
            sample(step)
    encoder.eval()


def halved(device: str) -> AbstractContextManager[object]:
    """Compute in bfloat16 where that is faster: on a GPU, and on CPUs with AVX-512; others take forty times as long for it."""
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512")


def progress_of(step: int, steps: int, began: float, minutes: float) -> float:
    """How much of a part is over, by steps or by time, from 0 to 1 and beyond; `began` is on the clock of `time.monotonic`."""
    return max(step / max(1, steps), (time.monotonic() - began) / 60 / minutes if minutes else 0.0)


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that an interruption leaves the old one or the new one."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
