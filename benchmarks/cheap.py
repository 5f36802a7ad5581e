"""Stages that compute next to nothing, as backends from outside `tasks`: what is left is the cost of planning, running and storing.

`make_inputs` writes small pictures, a manifest of pairs and the profile that names these backends. A stage may be told to take `seconds`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.codec import encode_png
from tasks.stage import Inputs, Kind, Outputs, Stage, each

PAIR_STAGES = ("reenact", "swap", "blend", "inpaint", "paste")
STAGES = ("align", *PAIR_STAGES)


@dataclass(frozen=True, kw_only=True)
class CheapConfig:
    seconds: float = 0.0  # to wait per item


def _wait(config: CheapConfig) -> None:
    if config.seconds:
        time.sleep(config.seconds)


def _align(model: None, config: CheapConfig, inputs: Inputs) -> Outputs:
    _wait(config)
    return {"face": inputs["image"].read().rgb8[:2, :2]}


def _reenact(model: None, config: CheapConfig, inputs: Inputs) -> Outputs:
    _wait(config)
    return {"driven": np.concatenate([inputs["source_face"], inputs["target_face"]])}


def _pass_on(model: None, config: CheapConfig, value: Any, output: str) -> Outputs:
    _wait(config)
    return {output: value}


def _swap(model: None, config: CheapConfig, inputs: Inputs) -> Outputs:
    return _pass_on(model, config, inputs["driven"], "hole")


def _blend(model: None, config: CheapConfig, inputs: Inputs) -> Outputs:
    return _pass_on(model, config, inputs["hole"], "blended")


def _inpaint(model: None, config: CheapConfig, inputs: Inputs) -> Outputs:
    return _pass_on(model, config, inputs["blended"], "inpainted")


def _paste(model: None, config: CheapConfig, inputs: Inputs) -> Outputs:
    return _pass_on(model, config, inputs["face"], "result")


def _stage(name: str, run: Any, reads: tuple[str, ...], writes: Mapping[str, Kind], device: Any = "cpu") -> Stage:
    backend = f"{__name__}:{name}"
    return Stage(name=name, backend=backend, version=1, config=CheapConfig, run=each(run), reads=reads, writes=writes, device=device)


BACKENDS = {
    stage.backend: stage
    for stage in (
        _stage("align", _align, ("image",), {"face": "array"}),
        _stage("reenact", _reenact, ("source_face", "target_face"), {"driven": "array"}),
        _stage("swap", _swap, ("driven",), {"hole": "array"}, device="any"),
        _stage("blend", _blend, ("hole",), {"blended": "array"}),
        _stage("inpaint", _inpaint, ("blended",), {"inpainted": "array"}),
        _stage("paste", _paste, ("face",), {"result": "image"}),
    )
}


def make_inputs(folder: Path, pairs: int) -> tuple[str, str]:
    """Write pictures and `pairs` different pairs of them; returns the manifest and the profile.

    Every picture serves about the square root of that number.
    """
    count = 2
    while count * (count - 1) < pairs:
        count += 1
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:04d}.png" for number in range(count)]
    for number, name in enumerate(names):
        color = np.array([number % 256, number // 256, 128], np.uint8)
        (folder / name).write_bytes(encode_png(np.broadcast_to(color, (8, 8, 3))))
    chosen = [(source, target) for source in names for target in names if source != target][:pairs]
    pq.write_table(pa.table({"source": [pair[0] for pair in chosen], "target": [pair[1] for pair in chosen]}), folder / "pairs.parquet")
    profile = folder / "cheap.toml"
    profile.write_text("".join(f'[{stage}]\nbackend = "{__name__}:{stage}"\n' for stage in STAGES), "utf-8")
    return str(folder / "pairs.parquet"), str(profile)
