"""Networks whose weights the user adds: the authors' own checkpoint files, converted once and verified ever after.

<E4S_HOME>/weights/published/NAME.safetensors   our names, float32
<E4S_HOME>/weights/published/NAME.json          source file and its sha256, sha256 of the converted file
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from e4s_models.published import PUBLISHED, Published, load_published, published
from e4s_models.weights import Converted, Weight, WeightsError, WeightsMissing, home

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Added:
    """What is known of a converted checkpoint."""

    name: str
    file: str  # of the authors' folder
    source_sha256: str  # at the first import; another file of that name is refused afterwards
    sha256: str  # of the converted file
    dtype: str = "float32"  # of the weights in the source; they are float32 here


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


def added_weight(name: str) -> Weight | None:
    """A network that the user adds, as the registry describes weights; sha256 "" and size 0 before that. None for other names."""
    if name not in PUBLISHED:
        return None
    known, path = record(name), folder() / f"{name}.safetensors"
    return Weight(
        name=name,
        file=path.name,
        sha256=known.sha256 if known else "",
        size=path.stat().st_size if path.is_file() else 0,
        licence="as the authors' release says",
        origin="the authors' checkpoint folder, converted",
        inputs="RGB in [-1, 1]",
        sources=(Converted(),),
    )


def add(source: Path, names: Sequence[str] = (), *, replace: bool = False) -> dict[str, str]:
    """Convert the published files found in `source`; returns a state per name: added, unchanged or absent.

    A file is read with `weights_only=True` and must fit its network exactly. Raises WeightsError listing missing, unexpected and misshapen
    keys, or when a file differs from the one first imported (unless `replace`).
    """
    check_request(source, names)
    return {name: _add(published(name), source, replace) for name in names or PUBLISHED}


def check_request(source: Path, names: Sequence[str]) -> None:
    """Raises WeightsError if there is no such folder or a network of that name is not known."""
    if not source.is_dir():
        raise WeightsError(f"{source}: no such folder; give the authors' checkpoint folder")
    for name in names:
        _declared(name)


def convert(file: Path, name: str, output: Path) -> str:
    """Write one published file as safetensors under our names, without registering it; returns the sha256 of the result.

    The result's metadata entry `e4s` is JSON: name, source file, its sha256, dtype of its weights. Raises WeightsError.
    """
    if output.suffix != ".safetensors":
        raise WeightsError(f"{output}: the result is a .safetensors file; name it so")
    if output.is_dir() or not output.parent.is_dir():
        raise WeightsError(f"{output}: not a file name in an existing folder")
    declared = _declared(name)
    if not file.is_file():
        raise WeightsError(f"{file}: no such file; give a published {Path(declared.file).name}")
    with _converted(declared, file, _sha256(file), output) as (temporary, _):
        sha256 = _sha256(temporary)
        temporary.replace(output)
    return sha256


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
    try:
        module.load_state_dict(load_file(path))
    except RuntimeError:  # its entries have other names or shapes
        raise WeightsError(f"{path} was converted by another version of e4s; run `e4s models add --from FOLDER {name}` again") from None
    return module.to(device).eval().requires_grad_(False)


def verify_added() -> dict[str, str]:
    """State of every network that can be added: ok, absent or damaged."""
    states = {}
    for name in PUBLISHED:
        path = folder() / f"{name}.safetensors"
        try:
            known = record(name)
        except WeightsError:
            states[name] = "damaged"
            continue
        states[name] = "absent" if known is None else "ok" if path.is_file() and _sha256(path) == known.sha256 else "damaged"
    return states


def _add(declared: Published, source: Path, replace: bool) -> str:
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
    folder().mkdir(parents=True, exist_ok=True)
    with _converted(declared, path, sha256, converted) as (temporary, dtype):
        added = Added(declared.name, declared.file, sha256, _sha256(temporary), dtype)
        temporary.replace(converted)
        temporary.write_text(json.dumps(asdict(added), indent=2) + "\n", "utf-8")
        temporary.replace(folder() / f"{declared.name}.json")
    return "added"


def _declared(name: str) -> Published:
    if name not in PUBLISHED:
        raise WeightsError(f"unknown network {name!r}; choose from {', '.join(PUBLISHED)}")
    return published(name)


@contextlib.contextmanager
def _converted(declared: Published, source: Path, sha256: str, target: Path) -> Iterator[tuple[Path, str]]:
    """A published file converted under a temporary name beside `target`, and the source's dtype; what is left of it is removed."""
    from safetensors.torch import save_file

    state = published_state(declared, source)
    dtype = "/".join(sorted({str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point()}))
    module = load_published(declared, state)
    entries = {key: value.contiguous() for key, value in module.state_dict().items()}
    bad = [key for key, value in entries.items() if not value.isfinite().all()]
    if bad:
        raise WeightsError(f"{source} holds numbers that are not finite in {', '.join(bad[:8])}; fetch it again from the authors' release")
    # One entry: safetensors writes several in random order, and equal sources shall give equal files.
    origin = json.dumps({"name": declared.name, "source": source.name, "source_sha256": sha256, "source_dtype": dtype})
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.touch()
        usual = temporary.stat().st_mode  # safetensors lets nobody but the owner read
        save_file(entries, temporary, metadata={"e4s": origin})
        temporary.chmod(usual)
        yield temporary, dtype
    finally:
        temporary.unlink(missing_ok=True)


def published_state(declared: Published, path: Path) -> dict[str, torch.Tensor]:
    """Entries of a published file under their published names (`part.key` if it has several parts). Raises WeightsError.

    The tensors stay in the file until they are read, where its format allows that.
    """
    import torch

    with path.open("rb") as file:
        mapped = file.read(2) == b"PK"  # the zip format; the older one is read into memory
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        first = str(error).partition("\n")[0]
        reason = first if " " in first else "it is none"  # some of torch's reasons are a bare number
        raise WeightsError(f"{path} cannot be read as a plain checkpoint ({reason}); fetch it again from the authors' release") from None
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict; fetch it again from the authors' release")
    missing = [part for part in declared.parts if not isinstance(content.get(part), Mapping)]
    if missing:
        raise WeightsError(f"{path} has no state dict {', '.join(missing)} (it has {', '.join(map(str, list(content)[:8]))})")
    if not declared.parts:
        state = dict(content)
    elif len(declared.parts) == 1:
        state = dict(content[declared.parts[0]]) | ({"latent_avg": content["latent_avg"]} if "latent_avg" in content else {})
    else:
        state = {f"{part}.{str(key).removeprefix('module.')}": value for part in declared.parts for key, value in content[part].items()}
    odd = [str(key) for key, value in state.items() if not (isinstance(key, str) and _plain(value))]
    if odd:
        raise WeightsError(
            f"{path} holds something other than plain tensors in {', '.join(odd[:8])}; fetch it again from the authors' release"
        )
    return state


def _plain(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized and not value.is_complex()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
