"""Stages that raise where a picture was made for it, as backends from outside `tasks`: one culprit must not stop the others.

`align` is that of `benchmarks.cheap`, for pairs of tiny pictures; `blend` is the pipeline's own, for real pairs and for frames of videos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks import cheap
from tasks import blend
from tasks.stage import Array, Inputs, ItemError, Outputs, Stage

GREEN = 2.5  # times as much green as red: no person has such a skin


def is_poisoned(rgb: Array) -> bool:
    """Return whether a stage is to raise on this picture, RGB (H, W, 3): one that is far too green."""
    red, green, _ = np.asarray(rgb, np.float64).mean(axis=(0, 1))
    return bool(green > GREEN * max(red, 1.0))


def poison(rgb: Array) -> Array:
    """Return the picture as `is_poisoned` looks for it; faces are found in it all the same."""
    return (rgb * np.array([0.25, 1.0, 0.6])).astype(np.uint8)


def _align(model: Any, config: Any, batch: Sequence[Inputs]) -> Sequence[Outputs | ItemError]:
    if any(is_poisoned(inputs["image"].read().rgb8) for inputs in batch):
        raise ZeroDivisionError("a poisoned picture")
    return _ALIGN.run(model, config, batch)


def _blend(model: Any, config: Any, batch: Sequence[Inputs]) -> Sequence[Outputs | ItemError]:
    if any(is_poisoned(inputs["target_face"]) for inputs in batch):
        raise ZeroDivisionError("a poisoned picture")
    return _BLEND.run(model, config, batch)


_ALIGN = cheap.BACKENDS["benchmarks.cheap:align"]
_BLEND = blend.BACKENDS["multiband"]

BACKENDS: Mapping[str, Stage] = {
    f"{__name__}:{stage.name}": replace(stage, backend=f"{__name__}:{stage.name}", run=run)
    for stage, run in ((_ALIGN, _align), (_BLEND, _blend))
}
