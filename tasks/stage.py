"""What a stage is: a pure function on a batch, declared once with all that decides its bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

Inputs = Mapping[str, Any]
"""What a stage reads of one item: name -> value (see `Kind`), or the root input `image`: a `tasks.frame.ImageFile`."""

Outputs = dict[str, Array]
"""What a stage writes of one item: name -> value."""

Kind = Literal["image", "labels", "array"]
"""image: RGB (H, W, 3) uint8 (RGBA or 16 bit allowed), stored as PNG. labels: (H, W) uint8 (label map or mask), stored as gray PNG.
array: any numpy array, stored in Parquet. The stored form loses nothing, so a value handed over in memory equals one read back."""


class ItemError(Exception):
    """One item cannot be processed: the sentence says what was found and what to do. The other items go on.

    It follows from the inputs' content and the config alone, so it is remembered by key: the sentence names no path.
    """


class PassingError(ItemError):
    """One item cannot be processed now, for a reason outside its content (a file that is gone, memory): not remembered."""


@dataclass(frozen=True)
class Cost:
    """How a stage uses the machine."""

    gpu_batch: int = 1  # items per call on a GPU; on CPU a stage always gets one item at a time
    threads: bool = False  # run() may work on several items at once, a thread each (no torch, no interpreter state)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One backend of one stage.

    `run(model, config, batch)` gets what `load(config, device)` returned and a list of items, and returns one `Outputs` or one
    `ItemError` per item, in order. It must not depend on the order or the size of the batch, on time, on random numbers or on paths.
    """

    name: str
    backend: str
    version: int
    """Raise it whenever the bytes change for the same inputs and config."""
    config: type
    """Frozen dataclass of plain values; every field takes part in the artifact key."""
    run: Callable[[Any, Any, Sequence[Inputs]], Sequence[Outputs | ItemError]]
    reads: tuple[str, ...]
    writes: Mapping[str, Kind]
    optional: tuple[str, ...] = ()
    """What it also reads where the chosen backend of the stage before writes it; where none does, nothing is read and no key changes."""
    load: Callable[[Any, str], Any] = lambda config, device: None
    weights: Callable[[Any], tuple[str, ...]] = lambda config: ()
    """Names in `e4s_models.weights.WEIGHTS` that the stage needs with this config."""
    libraries: tuple[str, ...] = ("numpy", "opencv-python-headless")
    """Distributions whose version takes part in the artifact key, because they compute the bytes."""
    device: Literal["cpu", "any"] = "cpu"
    cost: Cost = field(default_factory=Cost)
    note: tuple[str, Callable[[Array], str]] | None = None
    """Which output says what limits the result, and how it reads as text ("" for no limit): a row's column `note`."""


def each(function: Callable[[Any, Any, Inputs], Outputs]) -> Callable[[Any, Any, Sequence[Inputs]], list[Outputs | ItemError]]:
    """Lift a function on one item, which may raise `ItemError`, to the batch form of `Stage.run`."""

    def run(model: Any, config: Any, batch: Sequence[Inputs]) -> list[Outputs | ItemError]:
        results: list[Outputs | ItemError] = []
        for inputs in batch:
            try:
                results.append(function(model, config, inputs))
            except ItemError as error:
                results.append(error)
        return results

    return run
