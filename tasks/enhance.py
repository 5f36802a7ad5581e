"""Stage `enhance`: restore detail in the recolored face. Backend `none` (default) passes it through.

Backends `gpen` and `codeformer` are the published face restoration networks at 512 px.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from e4s_models.checks import check_shape
from tasks.face_network import FIDELITY, Restore, fit, load_enhancer
from tasks.stage import Cost, Inputs, Outputs, Stage, UInt8, each

if TYPE_CHECKING:
    from e4s_models.realesrgan import RealESRGAN


@dataclass(frozen=True)
class NoneConfig:
    """No settings."""


@dataclass(frozen=True, kw_only=True)
class RealESRGANConfig:
    side: int = 256  # px the face is shrunk to before it is enlarged by four; slow: about 20 s on a CPU core at 256, 5 s at 128
    amount: float = 1.0  # share of the enhanced picture in the result, 0..1

    def __post_init__(self) -> None:
        if self.side < 16 or not 0 <= self.amount <= 1:
            raise ValueError(f"side must be at least 16 and amount in 0..1, got {self.side} and {self.amount}")


@dataclass(frozen=True, kw_only=True)
class RestoreConfig:
    amount: float = 1.0  # share of the restored picture in the result, 0..1

    def __post_init__(self) -> None:
        if not 0 <= self.amount <= 1:
            raise ValueError(f"amount must be in 0..1, got {self.amount}")


@dataclass(frozen=True, kw_only=True)
class CodeFormerConfig(RestoreConfig):
    fidelity: float = FIDELITY  # from 0, the codebook alone, to 1, as near to the input as the network can

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.fidelity <= 1:
            raise ValueError(f"fidelity must be in 0..1, got {self.fidelity}")


def enhance(network: RealESRGAN, face: UInt8, config: RealESRGANConfig) -> UInt8:
    """Shrink RGB (H, W, 3) uint8 to `config.side`, enlarge it by four, and bring it back to H x W. For faces that are blurred or upscaled.

    The network invents texture, so a face that is sharp at H x W loses by it.
    """
    size = check_shape(face, "H W 3")
    scale = config.side / max(size["H"], size["W"])
    small = face
    if scale < 1:
        shape = (round(size["W"] * scale), round(size["H"] * scale))
        small = np.asarray(cv2.resize(face, shape, interpolation=cv2.INTER_AREA), np.uint8)
    large = network.upscale(small)
    shrinks = large.shape[0] > size["H"]
    fitted = cv2.resize(large, (size["W"], size["H"]), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return np.asarray(cv2.addWeighted(fitted, config.amount, face, 1 - config.amount, 0), np.uint8)


def _load(config: RealESRGANConfig, device: str) -> RealESRGAN:
    from e4s_models.realesrgan import RealESRGAN

    return RealESRGAN.load()


def _run_restore(restore: Restore, config: RestoreConfig, inputs: Inputs) -> Outputs:
    face = inputs["face"]
    restored = fit(restore(face), check_shape(face, "S S 3")["S"])
    return {"enhanced": np.asarray(cv2.addWeighted(restored, config.amount, face, 1 - config.amount, 0), np.uint8)}


def _run(network: RealESRGAN, config: RealESRGANConfig, inputs: Inputs) -> Outputs:
    return {"enhanced": enhance(network, inputs["face"], config)}


NONE = Stage(
    name="enhance",
    backend="none",
    version=1,
    config=NoneConfig,
    run=each(lambda model, config, inputs: {"enhanced": inputs["face"]}),
    reads=("face",),
    writes={"enhanced": "image"},
    libraries=(),
    cost=Cost(threads=True),
)

REALESRGAN = Stage(
    name="enhance",
    backend="realesrgan",
    version=1,
    config=RealESRGANConfig,
    load=_load,
    run=each(_run),
    reads=("face",),
    writes={"enhanced": "image"},
    weights=lambda config: ("realesrgan_param", "realesrgan_bin"),
    libraries=("numpy", "opencv-python-headless", "ncnn"),
)


def _restoration(backend: str, config: type[RestoreConfig], load: Callable[[Any, str], Restore]) -> Stage:
    return Stage(
        name="enhance",
        backend=backend,
        version=1,
        config=config,
        load=load,
        run=each(_run_restore),
        reads=("face",),
        writes={"enhanced": "image"},
        weights=lambda config: (backend,),
        libraries=("numpy", "opencv-python-headless", "torch"),
        device="any",
    )


GPEN = _restoration("gpen", RestoreConfig, lambda config, device: load_enhancer("gpen", device))
CODEFORMER = _restoration("codeformer", CodeFormerConfig, lambda config, device: load_enhancer("codeformer", device, config.fidelity))

BACKENDS: Mapping[str, Stage] = {"none": NONE, "realesrgan": REALESRGAN, "gpen": GPEN, "codeformer": CODEFORMER}
