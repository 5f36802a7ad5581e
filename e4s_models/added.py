"""Networks whose weights the user adds: the authors' own checkpoint files, converted once and verified ever after.

<E4S_HOME>/weights/published/NAME.safetensors   our names, float32
<E4S_HOME>/weights/published/NAME.json          source file and its sha256, sha256 of the converted file
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e4s_models.published import PUBLISHED, Published, load_published, published
from e4s_models.weights import WeightsError, WeightsMissing, home

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Added:
    """What is known of a converted checkpoint."""

    name: str
    file: str  # of the authors' folder
    source_sha256: str  # at the first import; another file of that name is refused afterwards
    sha256: str  # of the converted file


def folder() -> Path:
    """Where converted checkpoints lie."""
    return home() / "weights" / "published"


def record(name: str) -> Added | None:
    """What was added under a name, None if nothing was."""
    try:
        return Added(**json.loads((folder() / f"{name}.json").read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise WeightsError(
            f"{folder() / f'{name}.json'} is damaged; remove it and run `e4s models add --from FOLDER {name}` again"
        ) from None


def add(source: Path, names: Sequence[str] = (), *, replace: bool = False) -> dict[str, str]:
    """Convert the published files found in `source`; returns a state per name: added, unchanged or absent.

    A file is read with `weights_only=True` and must fit its network exactly. Raises WeightsError listing missing, unexpected and misshapen
    keys, or when a file differs from the one first imported (unless `replace`).
    """
    if not source.is_dir():
        raise WeightsError(f"{source}: no such folder; give the authors' checkpoint folder")
    for name in names:
        if name not in PUBLISHED:
            raise WeightsError(f"unknown network {name!r}; choose from {', '.join(PUBLISHED)}")
    return {name: _add(published(name), source, replace) for name in names or PUBLISHED}


def load_added(name: str, device: str = "cpu") -> torch.nn.Module:
    """A network with the weights that the user added. Raises WeightsMissing, or WeightsError if the converted file was changed."""
    from safetensors.torch import load_file

    known = record(name)
    path = folder() / f"{name}.safetensors"
    if known is None or not path.is_file():
        raise WeightsMissing(f"{name} was not added: run `e4s models add --from FOLDER` with the folder that holds {published(name).file}")
    if _sha256(path) != known.sha256:
        raise WeightsError(f"{path} was changed since it was converted; run `e4s models add --from FOLDER {name}` again")
    module = published(name).build()
    module.load_state_dict(load_file(path))
    return module.to(device).eval().requires_grad_(False)


def verify_added() -> dict[str, str]:
    """State of every network that can be added: ok, absent or damaged."""
    states = {}
    for name in PUBLISHED:
        known, path = record(name), folder() / f"{name}.safetensors"
        states[name] = "absent" if known is None else "ok" if path.is_file() and _sha256(path) == known.sha256 else "damaged"
    return states


def _add(declared: Published, source: Path, replace: bool) -> str:
    from safetensors.torch import save_file

    path = next((at for at in (source / declared.file, source / Path(declared.file).name) if at.is_file()), None)
    if path is None:
        return "absent"
    sha256, known = _sha256(path), record(declared.name)
    if known and known.source_sha256 != sha256 and not replace:
        raise WeightsError(
            f"{path} is not the file first imported as {declared.name} (sha256 {known.source_sha256}, now {sha256}); "
            "check where it comes from, or add --replace"
        )
    converted = folder() / f"{declared.name}.safetensors"
    if known and known.source_sha256 == sha256 and converted.is_file() and _sha256(converted) == known.sha256:
        return "unchanged"
    module = load_published(declared, published_state(declared, path))
    folder().mkdir(parents=True, exist_ok=True)
    temporary = converted.with_suffix(f".{os.getpid()}.tmp")
    save_file({key: value.contiguous() for key, value in module.state_dict().items()}, temporary)
    added = Added(declared.name, declared.file, sha256, _sha256(temporary))
    temporary.replace(converted)
    temporary.write_text(json.dumps(asdict(added), indent=2) + "\n", "utf-8")
    temporary.replace(folder() / f"{declared.name}.json")
    return "added"


def published_state(declared: Published, path: Path) -> dict[str, Any]:
    """Entries of a published file under their published names (`part.key` if it has several parts). Raises WeightsError."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsError(f"{path} cannot be read as a plain checkpoint ({reason}); fetch it again from the authors' release") from None
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict; fetch it again from the authors' release")
    missing = [part for part in declared.parts if part not in content]
    if missing:
        raise WeightsError(f"{path} has no entry {', '.join(missing)} (it has {', '.join(map(str, list(content)[:8]))})")
    if not declared.parts:
        return dict(content)
    if len(declared.parts) == 1:
        return dict(content[declared.parts[0]]) | ({"latent_avg": content["latent_avg"]} if "latent_avg" in content else {})
    return {f"{part}.{key}": value for part in declared.parts for key, value in content[part].items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
