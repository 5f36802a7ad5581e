"""The feature networks of an evaluation as stages: what they make is cached in the store by key, like everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from e4s_models.warp import ffhq_crop_to_frame, resample, transform_points
from e4s_models.weights import WeightsError
from evaluation.features import Extract, FeatureNetwork, Kind
from storage.keys import canonical
from tasks.stage import Cost, Inputs, ItemError, Outputs, Stage, UInt8

if TYPE_CHECKING:
    from torch import Tensor

    from e4s_models.lpips_net import Lpips

GPU_BATCH = 16  # aligned crops of 1024 px: 200 MB as float32


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

    A network of faces reads `face` (S, S, 3) uint8 and `landmarks` (68, 2) px of it, and writes (D,) float32. One that compares reads what
    `COMPARING` says, and writes (columns of `evaluation.metrics.COMPARED`,) float64.
    """
    comparing = COMPARING.get(network.kind)
    return Stage(
        name=network.name,
        backend="evaluation",
        version=network.version,
        config=FeatureConfig,
        load=comparing.load if comparing else _loader(network),
        run=comparing.run if comparing else _extract,
        reads=tuple(comparing.wires) if comparing else ("face", "landmarks"),
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


def _compare_with_answer(model: tuple[Lpips | None, str], config: FeatureConfig, batch: Sequence[Inputs]) -> list[Outputs | ItemError]:
    """Inside the face of the true picture, at `config.side` px; one pair at a time."""
    return [_compared_with_answer(model, config.side, inputs) for inputs in batch]


def _compared_with_answer(model: tuple[Lpips | None, str], side: int, inputs: Inputs) -> Outputs | ItemError:
    import torch

    from evaluation.answer import inside_face
    from evaluation.preservation import compare

    network, device = model
    result, truth = inputs["image"].read().rgb8, inputs["truth"].read().rgb8
    if result.shape != truth.shape:
        sizes = [f"{picture.shape[1]} x {picture.shape[0]}" for picture in (truth, result)]
        return ItemError(f"truth is {sizes[0]} px, the result {sizes[1]}: it must be the very picture that the result should equal")
    landmarks = transform_points(inputs["crop_to_frame"], inputs["landmarks"])  # px of the frame
    crop_to_frame = ffhq_crop_to_frame(landmarks, side)
    inside = inside_face(transform_points(np.linalg.inv(crop_to_frame), landmarks), side)
    images, references = (_pictures([resample(rgb, crop_to_frame, side, side)], device) / 255 for rgb in (result, truth))
    return {"features": compare(images, references, torch.from_numpy(inside[None]).to(device), network).cpu().numpy()[0]}


def _compare_skin(model: tuple[None, str], config: FeatureConfig, batch: Sequence[Inputs]) -> list[Outputs | ItemError]:
    from evaluation.colour import skin_outliers

    names = ("face", "regions", "landmarks", "target_face", "target_regions")
    shares = [skin_outliers(*(inputs[name] for name in names)) for inputs in batch]
    return [
        {"features": np.array([share])} if np.isfinite(share) else ItemError("the output or its target shows no skin") for share in shares
    ]


@dataclass(frozen=True)
class Comparison:
    """How one kind of network compares the output with another picture."""

    run: Callable[..., list[Outputs | ItemError]]
    load: Callable[..., Any]
    wires: Mapping[str, str]  # what it reads -> where the evaluation's graph makes it


_OUTSIDE = {
    "image": "swapped.image",
    "face": "target.align.face",
    "regions": "target.parse.regions",
    "crop_to_frame": "target.align.crop_to_frame",
}
_ANSWER = {
    "image": "swapped.image",
    "truth": "truth.image",
    "landmarks": "truth.align.landmarks",
    "crop_to_frame": "truth.align.crop_to_frame",
}
_SKIN = {
    "face": "align_swapped.face",
    "landmarks": "align_swapped.landmarks",
    "regions": "parse_swapped.regions",
    "target_face": "target.align.face",
    "target_regions": "target.parse.regions",
}

COMPARING: Mapping[Kind, Comparison] = {
    "pixels": Comparison(_compare, _no_model, _OUTSIDE),
    "lpips": Comparison(_compare, _load_lpips, _OUTSIDE),
    "skin": Comparison(_compare_skin, _no_model, _SKIN),
    "answer": Comparison(_compare_with_answer, _no_model, _ANSWER),
    "answer_lpips": Comparison(_compare_with_answer, _load_lpips, _ANSWER),
}
"""Kinds of networks that compare the output with its target, or with the picture that it should equal."""


def _pictures(pictures: Sequence[UInt8], device: str) -> Tensor:
    """RGB (S, S, 3) uint8 each -> (B, 3, S, S) float32 [0, 255]; bytes travel to the device, not floats."""
    import torch

    return torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float()
