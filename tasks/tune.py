"""Stage `tune`: the generator's layers fitted to the driven source, its codes fixed (pivotal tuning; the paper's Appendix B).

`none` writes nothing, so `swap` reads nothing of it. `pti` tunes the embedded generator, `pti_rgi` the published StyleGAN2.
What is written is the change of weights, so the networks stay as they are for the next item.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from e4s_models.regions import INNER_FACE
from tasks.encode import GENERATOR_WEIGHTS
from tasks.face_network import to_labels, to_tensor
from tasks.stage import Inputs, ItemError, Outputs, Stage, each

if TYPE_CHECKING:
    from torch import Tensor, nn

    from e4s_models.generator_tuning import Tunable, WeightLoss
    from e4s_models.reconstruction_loss import ReconstructionLoss
    from e4s_models.rgi import RGI

SIDES = (128, 256, 512, 1024)
_LOSS = ("lpips_alexnet", "face_parser")


@dataclass(frozen=True, kw_only=True)
class NoneConfig:
    """No settings."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    steps: int = 20  # updates per face; the paper: 200 per frame
    rate: float = 1e-3  # of Adam, as published, in units of each weight tensor's root mean square
    side: int = 256  # px at which generated and driven face are compared
    first_side: int = 32  # px of the first layers that are tuned
    last_side: int = 128  # px of the last; beyond half of `side` a checked pattern appears in smooth skin
    face_only: bool = True  # compare the inner face only, which is what a swap shows of it
    identity: float = 0.0  # weight of the identity network in what the steps minimise; the paper has 0.1, which gained nothing here

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 10000:
            raise ValueError(f"steps must be 1 to 10000, got {self.steps}; to tune nothing use --stage tune=none")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, got {self.rate:g}")
        if self.side not in SIDES:
            raise ValueError(f"side must be one of {', '.join(map(str, SIDES))} px, got {self.side}")
        if self.first_side not in (8, 16, 32, 64, 128, 256, 512):
            raise ValueError(f"first_side must be a power of two from 8 to 512 px, got {self.first_side}")
        if self.last_side not in (8, 16, 32, 64, 128, 256, 512, 1024) or self.last_side < self.first_side:
            raise ValueError(f"last_side must be a power of two from first_side ({self.first_side}) to 1024 px, got {self.last_side}")
        if not 0 <= self.identity <= 10:
            raise ValueError(f"identity must be 0 to 10, got {self.identity:g}")


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """Of a video, whose generator is tuned once."""

    frames: int = 8  # driven frames that it is tuned to, spread over the video; each gets `tune.steps` updates

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"frames must be at least 1, got {self.frames}")


@dataclass(frozen=True, kw_only=True)
class TuneRGIConfig(TuneConfig):
    first_side: int = 128  # px; below, the published generator's weights are 2.4 million numbers a layer
    last_side: int = 256


@dataclass(frozen=True)
class Networks:
    """What is tuned, how an item says its codes, and what says how far a picture is from a face."""

    tunable: Tunable
    generator: nn.Module
    codes: Callable[[Inputs], Tensor]  # (1, 12, L, 512)
    reconstruction: ReconstructionLoss


def tune_faces(networks: Networks, config: TuneConfig, faces: Sequence[Inputs]) -> Outputs:
    """One set of changes for all driven faces of a source: of a pair one, of a video as many frames as are given.

    Each face has `face` (H, H, 3) uint8 RGB, aligned, H at least 64, `regions` (H, H) uint8 and its codes: `codes` (12, 23, 512), or
    `styles` (12, 1280) for the published generator. Writes `tuning` (N,) uint8: a safetensors file of float16 changes by the weights'
    names. Raises ItemError if a face shows no inner face.
    """
    import torch

    from e4s_models.generator_tuning import TuneSettings, pack, tune

    with torch.inference_mode(False), torch.no_grad():  # tuning needs gradients
        losses = [_face_loss(networks, config, inputs) for inputs in faces]
        changes, _ = tune(
            networks.tunable.weights(config.first_side, config.last_side), losses, TuneSettings(steps=config.steps, rate=config.rate)
        )
    return {"tuning": pack(changes)}


def _face_loss(networks: Networks, config: TuneConfig, inputs: Inputs) -> WeightLoss:
    import torch

    from e4s_models.generator_tuning import Window, face_loss

    tunable = networks.tunable
    face, regions = to_tensor(inputs["face"], networks.generator), to_labels(inputs["regions"], networks.generator)
    mask = torch.isin(regions, torch.tensor(INNER_FACE, device=regions.device))
    if not mask.any():
        raise ItemError("no face region was found in the driven face; check that source and target show a face")
    if not config.face_only:
        mask = torch.ones_like(mask)
    window = Window.around(mask[0], tunable.side)
    render = tunable.render(networks.codes(inputs), regions, config.first_side, window)
    if face.shape[-1] != tunable.side:
        face = torch.nn.functional.interpolate(face, (tunable.side, tunable.side), mode="bilinear", antialias=True)
    return face_loss(render, window, face, mask, min(config.side, tunable.side), networks.reconstruction)


def _tune_one(networks: Networks, config: TuneConfig, inputs: Inputs) -> Outputs:
    return tune_faces(networks, config, [inputs])


def _load_mobile(config: TuneConfig, device: str) -> Networks:
    import torch

    from e4s_models.generator_tuning import TunableMobile
    from e4s_models.mobile_stylegan import MobileStyleGAN

    with torch.inference_mode(False):  # tuning needs gradients
        generator = MobileStyleGAN.load(device)

        def codes(inputs: Inputs) -> Tensor:
            return torch.from_numpy(inputs["codes"].astype(np.float32))[None].to(device)

        return Networks(TunableMobile(generator), generator, codes, _reconstruction(config, device))


def _load_published(config: TuneConfig, device: str) -> Networks:
    import torch

    from e4s_models.added import load_added
    from e4s_models.rgi import RGI

    with torch.inference_mode(False):  # tuning needs gradients
        network = load_added("rgi", device)
        assert isinstance(network, RGI)
        return published_networks(network, _reconstruction(config, device))


def published_networks(network: RGI, reconstruction: ReconstructionLoss) -> Networks:
    """The networks of `pti_rgi`, of a published network loaded outside of inference mode."""
    import torch

    from e4s_models.generator_tuning import TunableStyleGAN2

    def codes(inputs: Inputs) -> Tensor:
        return network.style_codes(torch.from_numpy(inputs["styles"])[None].to(network.mapper.latent_avg.device))

    return Networks(TunableStyleGAN2(network.generator), network.generator, codes, reconstruction)


def _reconstruction(config: TuneConfig, device: str) -> ReconstructionLoss:
    from e4s_models.reconstruction_loss import LossWeights, ReconstructionLoss

    return ReconstructionLoss.load(device, LossWeights(identity=config.identity))


def _weights(generator: tuple[str, ...]) -> Callable[[TuneConfig], tuple[str, ...]]:
    return lambda config: (*generator, *_LOSS, *(("arcface_mbf",) if config.identity else ()))


NONE = Stage(name="tune", backend="none", version=1, config=NoneConfig, run=each(lambda model, config, inputs: {}), reads=(), writes={})

PTI = Stage(
    name="tune",
    backend="pti",
    version=1,
    config=TuneConfig,
    load=_load_mobile,
    run=each(_tune_one),
    reads=("face", "regions", "codes"),
    writes={"tuning": "array"},
    weights=_weights(GENERATOR_WEIGHTS),
    libraries=("numpy", "torch"),
    device="any",
)

PTI_RGI = replace(
    PTI, backend="pti_rgi", config=TuneRGIConfig, load=_load_published, reads=("face", "regions", "styles"), weights=_weights(("rgi",))
)

BACKENDS = {stage.backend: stage for stage in (NONE, PTI, PTI_RGI)}
