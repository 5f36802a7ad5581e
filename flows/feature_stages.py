"""The feature networks of an evaluation as stages: what they make is cached in the store by key, like everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from e4s_models.warp import resample
from e4s_models.weights import WeightsError
from evaluation.features import Extract, FeatureNetwork
from storage.keys import canonical
from tasks.stage import Cost, Inputs, ItemError, Outputs, Stage, UInt8

if TYPE_CHECKING:
    from torch import Tensor

    from e4s_models.lpips_net import Lpips

GPU_BATCH = 16  # aligned crops of 1024 px: 200 MB as float32
COMPARING = ("pixels", "lpips")  # kinds of networks that compare the output with its target


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """What decides features beside weights and libraries: how the input is cut."""

    crop: str = ""
    side: int = 0  # px that the network reads
    convention: str = ""  # of a file that the user added, with its sha256


def feature_config(network: FeatureNetwork) -> dict[str, Any]:
    """Settings of the network's stage."""
    declared = canonical({"sha256": network.sha256, **network.convention()}).decode() if network.role else ""
    return {"crop": network.crop, "side": network.side, "convention": declared}


def feature_stage(network: FeatureNetwork) -> Stage:
    """The stage, named like its network, that writes `features`.

    A network of faces reads `face` (S, S, 3) uint8 and `landmarks` (68, 2) px of it, and writes (D,) float32. One that compares reads
    `image` and of the target `face`, `regions` and `crop_to_frame`, and writes (columns of `evaluation.metrics.COMPARED`,) float64 on what
    lies outside the target's face.
    """
    comparing = network.kind in COMPARING
    return Stage(
        name=network.name,
        backend="evaluation",
        version=network.version,
        config=FeatureConfig,
        load=(_load_lpips if network.kind == "lpips" else _no_model) if comparing else _loader(network),
        run=_compare if comparing else _extract,
        reads=("image", "face", "regions", "crop_to_frame") if comparing else ("face", "landmarks"),
        writes={"features": "array"},
        weights=lambda config: (network.weight,) if network.weight else (),
        libraries=(*network.libraries, *(("opencv-python-headless",) if comparing else _runtime(network))),
        device=network.device,
        cost=Cost(gpu_batch=GPU_BATCH),
    )


def _runtime(network: FeatureNetwork) -> tuple[str, ...]:
    """The distribution that runs a file which the user added."""
    if not network.role:
        return ()
    from e4s_models.user_network import require_user_network

    return ("onnxruntime",) if require_user_network(network.role)[1] == "onnx" else ()


def _loader(network: FeatureNetwork) -> Any:
    def load(config: FeatureConfig, device: str) -> tuple[Extract, str]:
        assert network.load is not None
        return network.load(device), device

    return load


def _no_model(config: FeatureConfig, device: str) -> tuple[None, str]:
    return None, device


def _load_lpips(config: FeatureConfig, device: str) -> tuple[Lpips, str]:
    from e4s_models.lpips_net import Lpips

    return Lpips.load().to(device), device


def _extract(model: tuple[Extract, str], config: FeatureConfig, batch: Sequence[Inputs]) -> list[Outputs | ItemError]:
    import torch

    extract, device = model
    faces = _pictures([inputs["face"] for inputs in batch], device) / 127.5 - 1
    landmarks = torch.from_numpy(np.stack([inputs["landmarks"] for inputs in batch])).to(device)
    try:
        extracted = extract(faces, landmarks)
    except WeightsError as error:  # a file that the user added gives for some face what is no feature
        if len(batch) == 1:
            return [ItemError(str(error))]
        return [outcome for one in batch for outcome in _extract(model, config, [one])]
    return [
        ItemError(extracted.failures[row]) if row in extracted.failures else {"features": extracted.features[row]}
        for row in range(len(batch))
    ]


def _compare(model: tuple[Lpips | None, str], config: FeatureConfig, batch: Sequence[Inputs]) -> list[Outputs | ItemError]:
    import torch

    from evaluation.preservation import compare, outside_face

    network, device = model
    frames = [inputs["image"].read().rgb8 for inputs in batch]
    crops = [
        resample(rgb, inputs["crop_to_frame"], *inputs["face"].shape[:2]) for rgb, inputs in zip(frames, batch, strict=True)
    ]  # where the target's crop was taken
    outside = outside_face(torch.from_numpy(np.stack([inputs["regions"] for inputs in batch])).to(device))
    images, references = (_pictures(faces, device) / 255 for faces in (crops, [inputs["face"] for inputs in batch]))
    compared = compare(images, references, outside, network).cpu().numpy()
    return [
        {"features": row} if np.isfinite(row).all() else ItemError("the target's crop shows nothing outside its face") for row in compared
    ]


def _pictures(pictures: Sequence[UInt8], device: str) -> Tensor:
    """RGB (S, S, 3) uint8 each -> (B, 3, S, S) float32 [0, 255]; bytes travel to the device, not floats."""
    import torch

    return torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float()
