"""Published checkpoints: what each file holds, how its entries are named here, and how a network is proven equal to the published one.

A network file declares a `Published`; `PUBLISHED` lists the modules that do. Reference vectors (`NAME.json`, `NAME_caseN.npz`) are
described in the README of the folder that holds them.
"""

from __future__ import annotations

import importlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]
Case = Mapping[str, Array]

PUBLISHED = {
    "bisenet": "e4s_models.face_parser",
    "codeformer": "e4s_models.codeformer",
    "facevid2vid": "e4s_models.facevid2vid",
    "gpen": "e4s_models.gpen",
    "hopenet": "e4s_models.hopenet",
    "inpaint": "e4s_models.inpaint_net",
    "irse50": "e4s_models.irse50",
    "recolor": "e4s_models.recolor_net",
    "rgi": "e4s_models.rgi",
}
"""Reference name -> the module whose `PUBLISHED_<NAME>` declares it."""


@dataclass(frozen=True, kw_only=True)
class Amplified:
    """An output that magnifies the float32 rounding of the earlier outputs it is made of.

    It is compared twice: computed from the reference's own earlier outputs, under the usual limit; and end to end, under a limit that is
    measured on the case (`amplified_limit`).
    """

    output: str
    given: tuple[str, ...]  # the earlier outputs
    run: Callable[[torch.nn.Module, Case], Array]
    """`output` from the case's inputs and its entries `given`."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published network."""

    name: str
    file: str  # of the authors' checkpoint folder
    parts: tuple[str, ...] = ()
    """Keys of the checkpoint under which its state dicts lie; none: the file is one plain state dict. With several parts, entries are
    named `part.key` here."""
    build: Callable[[], torch.nn.Module]
    """The network with our names, in evaluation mode."""
    rename: Callable[[str], str | None] = lambda key: key
    """Published key -> ours; None for an entry that inference does not need."""
    run: Callable[[torch.nn.Module, Case], dict[str, Array]]
    """A reference case's inputs -> its outputs under the names in the npz."""
    amplified: tuple[Amplified, ...] = ()


_LIMIT = 1e-4  # difference over the largest reference value
_ROUNDING = 1e-6  # of the largest value: how far two right float32 runs of a deep network differ
_DRAWS = 2  # of rounding noise
_SLACK = 3.0  # times the change that the noise makes
_LARGEST_LIMIT = 5e-3  # half of what outputs of two cases differ by at least


@dataclass(frozen=True)
class Check:
    """One line of the comparison with a reference case."""

    network: str
    case: str
    output: str
    error: float  # largest difference over the largest absolute reference value; of integers: share that differs
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def published(name: str) -> Published:
    """The declaration of a published network."""
    found: Published = getattr(importlib.import_module(PUBLISHED[name]), f"PUBLISHED_{name.upper()}")
    return found


def load_published(declared: Published, state: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Build a network and load entries under their published names. Raises WeightsError listing missing, unexpected, misshapen keys."""
    from e4s_models.weights import load_strict

    module = declared.build()
    renamed = {ours: value for key, value in state.items() if (ours := declared.rename(key.removeprefix("module."))) is not None}
    load_strict(module, renamed, declared.name)
    return module.eval().requires_grad_(False)


def fill(entries: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, torch.Tensor]:
    """A state dict filled by key as the reference's README says; entries of kind `keep` are left out."""
    import torch

    state: dict[str, torch.Tensor] = {}
    for key, entry in entries.items():
        shape, kind = entry["shape"], entry["kind"]
        if kind == "keep":
            continue
        if kind == "zero":
            state[key] = torch.zeros(shape, dtype=getattr(torch, entry["dtype"]))
            continue
        rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())]))
        value = rng.standard_normal(shape).astype(np.float32) * np.float32(entry["std"]) + np.float32(entry["mean"])
        state[key] = torch.from_numpy(np.asarray(np.abs(value) + np.float32(0.5) if kind == "positive" else value, np.float32))
    return state


def filled_state(declared: Published, spec: Mapping[str, Any], case: Case) -> dict[str, torch.Tensor]:
    """All entries of a published file, filled from the case's seed (or seeds, one per part); `latent_avg` comes from the case itself."""
    import torch

    seeds = np.atleast_1d(case["weight_seed"])
    nested = len(declared.parts) > 1
    groups = [(f"{part}.", spec["keys"][part]) for part in declared.parts] if nested else [("", spec["keys"])]
    state: dict[str, torch.Tensor] = {}
    for (prefix, entries), seed in zip(groups, seeds, strict=True):
        state |= {prefix + key: value for key, value in fill(entries, int(seed)).items()}
    if "latent_avg" in case:
        state["latent_avg"] = torch.from_numpy(np.asarray(case["latent_avg"], np.float32))
    return state


def check_reference(folder: Path) -> Iterator[Check]:
    """Compare every network that has vectors in `folder` (NAME.json, NAME_*.npz) with them."""
    for spec_path in sorted(folder.glob("*.json")):
        name = spec_path.stem
        if name not in PUBLISHED:
            continue
        declared, spec = published(name), json.loads(spec_path.read_text("utf-8"))
        for path in sorted(folder.glob(f"{name}_*.npz")):
            with np.load(path, allow_pickle=False) as stored:
                case = dict(stored)
            yield from check_case(declared, load_published(declared, filled_state(declared, spec, case)), case, path.stem)


def check_case(declared: Published, module: torch.nn.Module, case: Case, label: str) -> list[Check]:
    """Compare all outputs of a network with those stored in a case."""
    import torch

    with torch.inference_mode():
        outputs, limits, checks = declared.run(module, case), {}, []
        for amplified in declared.amplified:
            direct = amplified.run(module, case)
            described = f"{amplified.output} from stored {', '.join(amplified.given)}"
            checks.append(compare(declared.name, label, described, direct, case[amplified.output]))
            limits[amplified.output] = amplified_limit(amplified, module, case, direct)
    usual = (compare(declared.name, label, output, value, case[output], limits.get(output, _LIMIT)) for output, value in outputs.items())
    return [*usual, *checks]


def amplified_limit(amplified: Amplified, module: torch.nn.Module, case: Case, direct: Array) -> float:
    """The limit for an output end to end: 3 times the change that rounding of up to 1e-6 in the earlier outputs makes; 1e-4 to 5e-3.

    `direct` is the output from the case's own earlier outputs. The noise is drawn from fixed seeds.
    """
    change = 0.0
    for seed in range(_DRAWS):
        rng = np.random.Generator(np.random.PCG64(seed))
        rounded = {name: _with_rounding(case[name], rng) for name in amplified.given}
        change = max(change, compare("", "", "", amplified.run(module, {**case, **rounded}), direct).error)
    return min(max(_LIMIT, _SLACK * change), _LARGEST_LIMIT)


def _with_rounding(value: Array, rng: np.random.Generator) -> Array:
    step = _ROUNDING * float(np.abs(value).max())
    return (value + rng.uniform(-step, step, value.shape)).astype(value.dtype)


def compare(network: str, case: str, output: str, ours: Array, reference: Array, limit: float = _LIMIT) -> Check:
    """Largest difference in relation to the largest reference value (at most `limit`), or share of unequal integers (at most 0.1 %)."""
    if ours.shape != reference.shape:
        return Check(network, case, f"{output} (shape {ours.shape}, not {reference.shape})", float("inf"), 0.0)
    if np.issubdtype(reference.dtype, np.integer):
        return Check(network, case, output, float((ours != reference).mean()), 1e-3)
    largest = max(float(np.abs(reference).max()), 1e-12)
    return Check(network, case, output, float(np.abs(ours.astype(np.float64) - reference).max()) / largest, limit)
