"""Backends from outside `tasks` that swap nothing: the aligned face comes out as it went in, under a mask for paste-back.

What is left of a video's work is decoding, following the face, pasting and encoding. With these backends and `inpaint=none` no network
runs but the detector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from tasks.stage import Inputs, Kind, Outputs, Stage, each


@dataclass(frozen=True, kw_only=True)
class PassThroughConfig:
    """Nothing to set."""


def _reenact(model: None, config: PassThroughConfig, inputs: Inputs) -> Outputs:
    return {"driven": inputs["target_face"]}


def _swap(model: None, config: PassThroughConfig, inputs: Inputs) -> Outputs:
    """Writes `mask` (S, S) uint8, 255 in an ellipse about the face, and an empty `hole`."""
    side = inputs["driven"].shape[0]
    mask = np.zeros((side, side), np.uint8)
    cv2.ellipse(mask, (side // 2, side // 2), (side // 4, side // 3), 0, 0, 360, 255, -1)
    return {"mask": mask, "hole": np.zeros_like(mask)}


def _blend(model: None, config: PassThroughConfig, inputs: Inputs) -> Outputs:
    return {"blended": inputs["target_face"]}


def _stage(name: str, run: Any, reads: tuple[str, ...], writes: Mapping[str, Kind]) -> Stage:
    backend = f"{__name__}:{name}"
    libraries = ("numpy", "opencv-python-headless")
    return Stage(
        name=name, backend=backend, version=1, config=PassThroughConfig, run=each(run), reads=reads, writes=writes, libraries=libraries
    )


BACKENDS = {
    stage.backend: stage
    for stage in (
        _stage("reenact", _reenact, ("source_face", "target_face"), {"driven": "image"}),
        _stage("swap", _swap, ("driven",), {"mask": "labels", "hole": "labels"}),
        _stage("blend", _blend, ("target_face", "mask"), {"blended": "image"}),
    )
}
