"""First part of the training: codes are known, so the encoder learns them directly; no generator runs backwards."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from e4s_models.code_encoder import LAYER_GROUPS, CodeEncoder, per_layer
from e4s_models.face_parser import FaceParser
from flows.training.data import Pool, Shard, batch_of, read_shard
from flows.training.objective import halved, progress_of, save

if TYPE_CHECKING:
    from e4s_models.mobile_stylegan import MobileStyleGAN

BASIS_CODES = 32768
"""Mapped codes whose covariance makes the basis."""


@dataclass(frozen=True, kw_only=True)
class TeachSettings:
    steps: int = 4000
    batch: int = 16
    rate: float = 6e-4  # highest learning rate of the heads
    trunk_rate: float = 0.3  # of it, for the pretrained trunk
    seed: int = 0
    save_every: int = 100
    validation: int = 2  # shards held out, the first ones
    minutes: float = 0.0  # 0: no limit; else the schedule is stretched to end then
    basis_codes: int = BASIS_CODES


class CodeLoss(nn.Module):
    """Distance of codes as the generator sees it: of the styles that its layers make of them, each relative to the layer's mean square."""

    metric: Tensor
    basis: Tensor

    def __init__(self, generator: MobileStyleGAN) -> None:
        super().__init__()
        mean = generator.mean_w.double()
        matrices = []
        for style in generator.styles():
            square = style(mean[None]).double().square().mean()
            matrices.append(style.weight.t() @ style.weight / (square * len(style.weight)))
        self.register_buffer("metric", torch.stack(matrices).float())  # (23, 512, 512)

    def forward(self, predicted: Tensor, true: Tensor, present: Tensor) -> Tensor:
        """Codes (B, 12, 4, 512) by group, (B, 12, 23, 512) true, regions to count (B, 12) in 0..1 -> (23,) mean squared relative errors."""
        error = (per_layer(predicted, LAYER_GROUPS) - true).permute(2, 0, 1, 3).flatten(1, 2)  # (23, B * 12, 512)
        squares = (torch.bmm(error, self.metric) * error).sum(dim=2)  # (23, B * 12)
        return (squares * present.flatten()).sum(dim=1) / present.sum().clamp(min=1)


def w_basis(generator: MobileStyleGAN, codes: int = BASIS_CODES) -> Tensor:
    """(512, 512): rows are the principal components of W, each times its standard deviation, the largest first (fixed draws, float64)."""
    z = np.random.Generator(np.random.PCG64(1)).standard_normal((codes, 512), np.float32)
    with torch.inference_mode(False), torch.no_grad():
        w = torch.cat([generator.map(part) for part in torch.split(torch.from_numpy(z), 4096)]).double()
        variances, components = torch.linalg.eigh(torch.cov(w.t()))  # ascending
        signs = components.gather(0, components.abs().argmax(dim=0, keepdim=True)).sign()
        basis: Tensor = (components * signs * variances.clamp(min=0).sqrt()).t().flip(0).float()
        return basis


def new_encoder(generator: MobileStyleGAN, seed: int, groups: Sequence[int] = LAYER_GROUPS, basis_codes: int = BASIS_CODES) -> CodeEncoder:
    """An untrained encoder on the parser's trunk, which says about the mean code for everybody."""
    torch.manual_seed(seed)
    encoder = CodeEncoder(groups=groups)
    encoder.trunk.load_state_dict(FaceParser.load("cpu").cp.resnet.state_dict())
    encoder.mean_code.copy_(generator.mean_w)
    encoder.basis.copy_(w_basis(generator, basis_codes))
    nn.init.normal_(encoder.out.weight, std=0.01)
    nn.init.zeros_(encoder.out.bias)
    return encoder


def teach(data: Path, out: Path, generator: MobileStyleGAN, settings: TeachSettings, report: Callable[[str], None] = print) -> CodeEncoder:
    """Train, or go on from `out/teach.pt`; writes that checkpoint and `out/teach.jsonl` (a line per validation) as it goes."""
    encoder, loss_of = new_encoder(generator, settings.seed, basis_codes=settings.basis_codes), CodeLoss(generator)
    encoder.freeze_early()
    heads = [p for name, p in encoder.named_parameters() if not name.startswith("trunk.")]
    groups = [{"params": heads}, {"params": [p for p in encoder.trunk.parameters() if p.requires_grad]}]
    optimizer = torch.optim.AdamW(groups, lr=settings.rate, weight_decay=0.01, betas=(0.9, 0.98))
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "teach.pt"
    step, spent = 0, 0.0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        encoder.load_state_dict(state["encoder"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    pool = Pool(data, first=settings.validation)
    held_out = [read_shard(path) for path in sorted(data.glob("shard-*.npz"))[: settings.validation]]
    began = time.monotonic() - spent
    running: list[float] = []
    while (progress := progress_of(step, settings.steps, began, settings.minutes)) < 1:
        if step % settings.save_every == 0 or not running:
            known = pool.refresh()
        rate = settings.rate * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate, rate * settings.trunk_rate
        batch = pool.draw(settings.batch, np.random.Generator(np.random.PCG64([settings.seed, 0, step])))
        encoder.train()
        with halved("cpu"):
            predicted = encoder(batch.faces, batch.labels)
        loss = loss_of(predicted.float(), batch.codes, batch.present).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        running.append(loss.item())
        step += 1
        if step % settings.save_every == 0 or progress_of(step, settings.steps, began, settings.minutes) >= 1:
            spent = time.monotonic() - began
            checked = validate(encoder, loss_of, held_out)
            line = {"step": step, "pictures": known, "rate": rate, "loss": float(np.mean(running)), **checked}
            line["minutes"] = spent / 60
            running = []
            with (out / "teach.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            report(" ".join(f"{name} {value:.4g}" for name, value in line.items()))
            state = {"encoder": encoder.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            save(state | {"spent": spent, "settings": asdict(settings)}, checkpoint)
    return encoder.eval()


def validate(encoder: CodeEncoder, loss_of: CodeLoss, shards: Sequence[Shard]) -> dict[str, float]:
    """Relative code error on held-out pictures, whole and mixed, and of the mean code (the encoder that learnt nothing)."""
    encoder.eval()
    totals: dict[str, list[float]] = {"whole": [], "mixed": [], "mean_code": []}
    for shard in shards:
        for name, part in (("whole", slice(0, None, 2)), ("mixed", slice(1, None, 2))):
            batch = batch_of(shard.images[part], shard.labels[part], shard.regional_codes()[part])
            with torch.inference_mode(), halved("cpu"):
                predicted = encoder(batch.faces, batch.labels).float()
            totals[name].append(loss_of(predicted, batch.codes, batch.present).mean().item())
            if name == "whole":
                totals["mean_code"].append(loss_of(encoder.mean_code.expand_as(predicted), batch.codes, batch.present).mean().item())
    return {name: float(np.mean(values)) for name, values in totals.items()}
