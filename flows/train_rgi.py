"""The Prefect flow that trains the regional encoder of the embedded generator (`e4s train rgi`); the same command goes on where it stopped.

OUT/data/shard-*.npz     pictures of synthetic people with their codes
OUT/preview_head.pt      the 128 px head
OUT/teach.pt, .jsonl     first part: codes are known and learnt directly
OUT/objective.pt, .jsonl second part: the paper's objective through the generator (Eq. 18-24)
OUT/samples/*.png        faces, their reconstructions: after each part and as it goes on
OUT/curves.png           losses over steps
OUT/code_encoder.safetensors, preview_head.safetensors   what ships
OUT/training.json        the settings (`flows/training/folder.py`)
OUT/error.txt            the traceback of the last program error
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from prefect import flow

from e4s_models.code_encoder import CodeEncoder
from e4s_models.preview_head import PreviewHead
from e4s_models.weights import load_strict, save_shipped
from flows.step import run_flow, tracked
from flows.tracking import Once
from flows.training.data import Pool, read_shard, shard_path
from flows.training.folder import VALIDATION_SHARDS, TrainingSettings, opened
from flows.training.parts import make_people, part
from storage.codec import encode_png
from storage.run import read_lines
from storage.store import write_atomic

if TYPE_CHECKING:
    from e4s_models.mobile_stylegan import MobileStyleGAN

_opened: dict[str, Once[Path]] = {}  # work in folders that this process holds already


@flow(name="train-rgi", persist_result=False, validate_parameters=False)
def train_rgi(
    out: str,
    people: int = 4096,
    head_steps: int = 1500,
    teach_steps: int = 4000,
    objective_steps: int = 1000,
    teach_batch: int = 16,
    objective_batch: int = 4,
    teach_minutes: float = 0.0,
    objective_minutes: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
) -> Path:
    """Make data, fit the head, teach, train by the objective, export; each part goes on from its own checkpoint.

    Args:
        out: folder for everything. Goes on from what is there if that was made with these settings; people and steps may grow.
        people: synthetic people, two pictures each; rounded up to whole shards.
        head_steps, teach_steps, objective_steps: of the three parts.
        teach_batch, objective_batch: pictures in a step of the last two.
        teach_minutes, objective_minutes: end a part after that time, its schedule shortened to fit; 0: no limit.
        seed: decides people, augmentation and order.
        device: of the objective; data, head and teaching run on the CPU.

    Returns the folder. Same arguments, same machine: same bytes, unless minutes end a part or a GPU computes. Raises UsageError, RunError
    (see `opened`), and TrainingCrash.
    """
    settings = TrainingSettings(
        people=people,
        head_steps=head_steps,
        teach_steps=teach_steps,
        objective_steps=objective_steps,
        teach_batch=teach_batch,
        objective_batch=objective_batch,
        teach_minutes=teach_minutes,
        objective_minutes=objective_minutes,
        seed=seed,
    )
    with tracked():
        if work := _opened.pop(out, None):
            return work()
        with opened(Path(out), settings) as folder:
            return _train(folder, settings, device)


def _train(folder: Path, settings: TrainingSettings, device: str) -> Path:
    part(folder, make_people, folder / "data", settings.people, settings.seed)
    part(folder, fit_head, folder, settings.head_steps, settings.seed)
    part(folder, teach_codes, folder, settings)
    part(folder, train_objective, folder, settings, device)
    part(folder, export, folder)
    return folder


def run_opened(folder: Path, settings: TrainingSettings, device: str) -> None:
    """Run the flow in a folder that this process has opened; `PREFECT_API_URL` must point at a server. Raises as the flow does.

    Without a server the work is done all the same.
    """
    work = _opened[str(folder)] = Once(partial(_train, folder, settings, device))
    arguments = {name: value for name, value in asdict(settings).items() if name != "network"}
    run_flow(partial(train_rgi, out=str(folder), **arguments, device=device), work)


def fit_head(folder: Path, steps: int, seed: int) -> None:
    from flows.training.head import fit

    fit(folder / "data", folder / "preview_head.pt", _generator(), steps, seed, VALIDATION_SHARDS)


def teach_codes(folder: Path, training: TrainingSettings) -> None:
    if (folder / "objective.pt").is_file():
        return  # that part began from what was taught by then
    from flows.training.teach import TeachSettings, teach

    generator = _generator()
    settings = TeachSettings(
        steps=training.teach_steps,
        batch=training.teach_batch,
        minutes=training.teach_minutes,
        seed=training.seed,
        validation=VALIDATION_SHARDS,
    )
    encoder = teach(folder / "data", folder, generator, settings)
    show_samples(folder, "teach", generator, encoder)


def train_objective(folder: Path, training: TrainingSettings, device: str) -> None:
    from e4s_models.reconstruction_loss import ReconstructionLoss
    from flows.training.objective import ObjectiveSettings, train
    from flows.training.teach import CodeLoss
    from flows.training.trainee import MobileTrainee

    generator, head = _generator(), _head(folder)
    encoder = _encoder(_last_checkpoint(folder))
    encoder.freeze_early()
    trainee = MobileTrainee(generator.to(device), head.to(device))
    pool = Pool(folder / "data", VALIDATION_SHARDS)
    settings = ObjectiveSettings(
        steps=training.objective_steps, batch=training.objective_batch, minutes=training.objective_minutes, seed=training.seed
    )
    code_loss = CodeLoss(generator).to(device)
    encoder.to(device)
    train(
        encoder,
        trainee,
        pool,
        ReconstructionLoss.load(device),
        code_loss,
        folder,
        settings,
        sample=lambda step: show_samples(folder, f"objective-{step:06d}", generator, encoder),
    )


def export(folder: Path) -> None:
    """Write what ships, the curves, and the digests that the registry must declare."""
    encoder = _encoder(_last_checkpoint(folder))
    for name, network in (("code_encoder", encoder), ("preview_head", _head(folder))):
        path = folder / f"{name}.safetensors"
        print(f"{path.name}: sha256 {save_shipped(network, path)}, {path.stat().st_size} bytes", flush=True)
    _draw_curves(folder)


def show_samples(folder: Path, name: str, generator: MobileStyleGAN, encoder: CodeEncoder, count: int = 6) -> None:
    """Held-out pictures above what the generator makes of their predicted codes, at 256 px."""
    import torch
    from torch.nn.functional import interpolate

    from flows.training.data import batch_of

    shard = read_shard(shard_path(folder / "data", 0))
    batch = batch_of(shard.images[:count], shard.labels[:count], shard.regional_codes()[:count])
    device = encoder.mean_code.device
    encoder.eval()
    made = []
    with torch.inference_mode():
        for face, labels in zip(torch.split(batch.faces.to(device), 1), torch.split(batch.labels.to(device), 1), strict=True):
            picture = generator.synthesize(encoder.codes(face, labels), labels)
            made.append(interpolate(picture.clamp(-1, 1), batch.faces.shape[-2:], mode="area"))
        rows = [torch.cat(list(row), dim=2) for row in (batch.faces, torch.cat(made).cpu())]
        sheet = torch.cat(rows, dim=1).permute(1, 2, 0).add(1).mul(127.5).round().to(torch.uint8).numpy()
    write_atomic(folder / "samples" / f"{name}.png", encode_png(np.ascontiguousarray(sheet)))


def _draw_curves(folder: Path) -> None:
    import cv2

    panels = []
    for name, value in (("teach", "whole"), ("teach", "mixed"), ("objective", "reconstruction"), ("objective", "codes")):
        lines, _ = read_lines(folder / f"{name}.jsonl")
        by_step = {line["step"]: line[value] for line in lines if value in line}  # steps that were done again: as they were at last
        points = np.array(sorted(by_step.items()))
        panel = np.full((240, 360, 3), 255, np.uint8)
        if len(points):
            top, last = points[:, 1].max(), points[-1, 0]
            pixels = np.stack([20 + points[:, 0] / last * 320, 220 - points[:, 1] / top * 180], axis=1).astype(np.int32)
            cv2.polylines(panel, [pixels], False, (20, 60, 160), 2, cv2.LINE_AA)
            text = f"{name} {value}: {points[-1, 1]:.4f} at {int(last)} (top {top:.4f})"
            cv2.putText(panel, text, (8, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
        panels.append(panel)
    write_atomic(folder / "curves.png", encode_png(np.concatenate(panels, axis=1)))


def _generator() -> MobileStyleGAN:
    from e4s_models.mobile_stylegan import MobileStyleGAN

    return MobileStyleGAN.load()


def _last_checkpoint(folder: Path) -> Path:
    trained = folder / "objective.pt"
    return trained if trained.is_file() else folder / "teach.pt"


def _encoder(checkpoint: Path) -> CodeEncoder:
    import torch

    encoder = CodeEncoder()
    load_strict(encoder, torch.load(checkpoint, weights_only=True, map_location="cpu")["encoder"], checkpoint.name)
    return encoder.eval()


def _head(folder: Path) -> PreviewHead:
    import torch

    head = PreviewHead()
    load_strict(head, torch.load(folder / "preview_head.pt", weights_only=True), "preview_head.pt")
    return head.eval()
