"""Evaluation networks that the user brings: an ONNX or TorchScript file with a declared input convention, verified ever after.

<E4S_HOME>/weights/user/ROLE.network   a copy of the file
<E4S_HOME>/weights/user/ROLE.json      its sha256, its convention, and what it gave for fixed inputs when it was added
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from e4s_models.weights import WeightsError, WeightsMissing, home

if TYPE_CHECKING:
    import torch

Float32 = npt.NDArray[np.float32]
Run = Callable[[Float32], Float32]
"""One picture as the file wants it, (1, ...) -> its output, any shape."""

_PROBES = 2  # fixed inputs on which a file is tried
_TOLERANCE = 1e-3  # of the largest output, between machines and versions of the runtime


@dataclass(frozen=True, kw_only=True)
class Convention:
    """What a file wants and gives."""

    height: int  # px
    width: int  # px
    colour: Literal["RGB", "BGR"] = "RGB"
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)  # grey levels 0 to 255, channels in the file's order; subtracted
    std: tuple[float, float, float] = (127.5, 127.5, 127.5)  # grey levels; divided by
    crop: str  # how a face is cut for it, a sentence
    dimensions: int  # numbers per face
    meaning: str  # of these numbers, a sentence
    output: str = ""  # which of several outputs: a name (ONNX) or an index (TorchScript); empty: the only one


ROLES: Mapping[str, Convention] = {
    "cosface": Convention(
        height=112,
        width=112,
        std=(128.0, 128.0, 128.0),
        crop="ArcFace's 112 px template by five points",
        dimensions=512,
        meaning="identity; two faces are compared by the cosine",
    ),
    "deep3d": Convention(
        height=224,
        width=224,
        mean=(0.0, 0.0, 0.0),
        std=(255.0, 255.0, 255.0),
        crop="as Deep3DFaceRecon aligns: five points to the mean face's",
        dimensions=257,
        meaning="coefficients: identity 80, expression 64, texture 80, angles 3, light 27, translation 3",
    ),
    "inception": Convention(
        height=299,
        width=299,
        crop="the whole aligned crop",
        dimensions=2048,
        meaning="pool features of the standard FID Inception",
    ),
}
"""Role -> the convention of its published network; a TOML file beside the user's file changes single entries."""


@dataclass(frozen=True)
class _Record:
    role: str
    file: str  # the user's name for it
    kind: Literal["onnx", "torchscript"]
    sha256: str
    convention: Convention
    probe: tuple[tuple[float, ...], ...]  # outputs for `_probes`


class UserNetwork:
    """A verified file, run on the CPU. `sha256` names it, `convention` says what it wants.

    It is given one face at a time: many exports fix the batch at one, and no face's output may depend on its neighbours.
    """

    def __init__(self, record: _Record, run: Run) -> None:
        self.role, self.sha256, self.convention = record.role, record.sha256, record.convention
        self.name = record.file
        self._run = run

    def __call__(self, faces: torch.Tensor) -> Float32:
        """Outputs for faces cut as `convention.crop` says: RGB (B, 3, height, width) float32 [-1, 1] -> (B, dimensions) float32.

        Raises ValueError on other shapes and WeightsError if the file gives anything else.
        """
        from e4s_models.checks import check_shape

        wanted = self.convention
        check_shape(faces, f"B 3 {wanted.height} {wanted.width}")
        pictures = _as_declared(faces.detach().cpu().float().numpy(), wanted)
        outputs = [self._output(pictures[index : index + 1]) for index in range(len(pictures))]
        return np.stack(outputs) if outputs else np.zeros((0, wanted.dimensions), np.float32)

    def _output(self, picture: Float32) -> Float32:
        found, expected = self._run(picture), self.convention.dimensions
        if found.size != expected:
            raise WeightsError(
                f"{self.name} gives an output of shape {found.shape} per face, expected {expected} numbers: "
                "correct `dimensions` or `output` in its convention, or take another file"
            )
        if not np.isfinite(found).all():
            raise WeightsError(f"{self.name} gives numbers that are not finite: check its convention, or take another file")
        return found.astype(np.float32).reshape(expected)


def folder() -> Path:
    """Where the user's files are kept."""
    return home() / "weights" / "user"


def add_user_network(role: str, file: Path, convention: Path | None = None, *, replace: bool = False) -> str:
    """Register a file under a role; returns added or unchanged.

    `convention` is a TOML file whose entries replace the role's own; without one, FILE.toml beside the file is taken if it exists. The file
    is run once on fixed inputs, and later loads must give the same. Raises WeightsError if it cannot be run as declared, or differs from
    the one first added (unless `replace`).
    """
    declared = _convention(role, convention, file)
    content = _read(file)
    sha256, known = hashlib.sha256(content).hexdigest(), _known(role)
    if known and known.sha256 != sha256 and not replace:
        raise WeightsError(
            f"{file} is not the file first added as {role} (sha256 {known.sha256}, now {sha256}); "
            "check where it comes from, or add --replace"
        )
    copy = folder() / f"{role}.network"
    if known and known.sha256 == sha256 and known.convention == declared and user_network_state(role) == "ok":
        return "unchanged"
    kind: Literal["onnx", "torchscript"] = "torchscript" if content[:2] == b"PK" else "onnx"  # TorchScript is a zip archive
    record = _Record(role, file.name, kind, sha256, declared, ())
    network = _opened(record, content)
    outputs = _probe(network)
    if not np.ptp(outputs, axis=0).any():
        raise WeightsError(f"{file} gives the same output for two different pictures: check its convention, or take another file")
    record = _Record(role, file.name, kind, sha256, declared, tuple(tuple(row) for row in outputs.tolist()))
    folder().mkdir(parents=True, exist_ok=True)
    _write(copy, content)
    _write(folder() / f"{role}.json", (json.dumps(asdict(record)) + "\n").encode())
    return "added"


def load_user_network(role: str) -> UserNetwork:
    """The network that the user added. Raises WeightsMissing if there is none, WeightsError if it changed or computes something else."""
    known, content = _verified(role)
    network = _opened(known, content)
    expected = np.asarray(known.probe, np.float32)
    if np.abs(_probe(network) - expected).max() > _TOLERANCE * np.abs(expected).max():
        raise WeightsError(
            f"{role} ({known.file}) gives other numbers here than when it was added: the runtime has changed; "
            f"run `e4s models add --network {role} --file FILE --replace` and compute its results anew"
        )
    return network


def require_user_network(role: str) -> tuple[str, str]:
    """Check that a network was added and is unchanged, without running it: its sha256 and kind (onnx, torchscript).

    Raises WeightsMissing or WeightsError as `load_user_network` does.
    """
    known, _ = _verified(role)
    return known.sha256, known.kind


def _verified(role: str) -> tuple[_Record, bytes]:
    """What is known of a role's file, and the file itself."""
    _role(role)
    known, copy = _known(role), folder() / f"{role}.network"
    if known is None or not copy.is_file():
        raise WeightsMissing(f"{role} was not added: run `e4s models add --network {role} --file FILE` with its ONNX or TorchScript file")
    content = _read(copy)
    if hashlib.sha256(content).hexdigest() != known.sha256:
        raise WeightsError(f"{copy} was changed since it was added; run `e4s models add --network {role} --file FILE` again")
    return known, content


def user_network_state(role: str) -> str:
    """ok, absent or damaged; the file is read, not run."""
    copy = folder() / f"{role}.network"
    try:
        known = _known(role)
    except WeightsError:
        return "damaged"
    if known is None:
        return "absent"
    return "ok" if copy.is_file() and hashlib.sha256(_read(copy)).hexdigest() == known.sha256 else "damaged"


def user_convention(role: str) -> Convention:
    """The convention under which a role is registered, its published one before that."""
    own = _role(role)
    known = _known(role)
    return known.convention if known else own


def _role(role: str) -> Convention:
    try:
        return ROLES[role]
    except KeyError:
        raise WeightsError(f"unknown network {role!r}; choose from {', '.join(ROLES)}") from None


def _convention(role: str, path: Path | None, file: Path) -> Convention:
    """The role's convention with the entries of a TOML file in place of its own."""
    own = _role(role)
    if path is None:
        path = file.with_suffix(".toml")
        if not path.is_file():
            return own
    try:
        changes = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; give the TOML file that declares the input of {file.name}") from None
    except ValueError as error:
        raise WeightsError(f"{path} is not TOML: {error}") from None
    return _changed(own, changes, str(path))


def _changed(own: Convention, changes: Mapping[str, Any], source: str) -> Convention:
    known = [field.name for field in fields(Convention)]
    for name, value in changes.items():
        if name not in known:
            raise WeightsError(f"{source}: unknown entry {name!r}; an input convention has {', '.join(known)}")
        if not _fits(name, value):
            raise WeightsError(f"{source}: {name} = {value!r} does not fit; {_EXPECTED[name]}")
    values = {name: tuple(map(float, value)) if name in ("mean", "std") else value for name, value in changes.items()}
    return Convention(**asdict(own) | values)


_EXPECTED = {
    **dict.fromkeys(("height", "width", "dimensions"), "expected a whole number above 0"),
    **dict.fromkeys(("mean", "std"), "expected three grey levels (0 to 255), those of std above 0"),
    **dict.fromkeys(("crop", "meaning", "output"), "expected a text"),
    "colour": "expected RGB or BGR",
    "layout": "expected NCHW or NHWC",
}


def _fits(name: str, value: object) -> bool:
    if name in ("height", "width", "dimensions"):
        return type(value) is int and value > 0
    if name in ("mean", "std"):
        numbers = isinstance(value, list | tuple) and len(value) == 3 and all(type(part) in (int, float) for part in value)
        return numbers and (name == "mean" or all(part > 0 for part in value))  # type: ignore[attr-defined]
    return isinstance(value, str) and value in {"colour": ("RGB", "BGR"), "layout": ("NCHW", "NHWC")}.get(name, (value,))


def _known(role: str) -> _Record | None:
    path = folder() / f"{role}.json"
    try:
        stored = json.loads(path.read_text("utf-8"))
        convention = _changed(_role(role), stored.pop("convention"), str(path))
        return _Record(**stored, convention=convention)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError, WeightsError):
        raise WeightsError(f"{path} is damaged; remove it and run `e4s models add --network {role} --file FILE` again") from None


def _read(file: Path) -> bytes:
    """All of a file: what is opened is then what was hashed."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise WeightsError(f"{file}: no such file; give the network's ONNX or TorchScript file") from None


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _probe(network: UserNetwork) -> Float32:
    """Outputs for the fixed inputs: (2, dimensions)."""
    import torch

    shape = (_PROBES, 3, network.convention.height, network.convention.width)
    return network(torch.from_numpy(np.random.Generator(np.random.PCG64(0)).uniform(-1, 1, shape).astype(np.float32)))


def _as_declared(faces: Float32, wanted: Convention) -> Float32:
    """RGB (B, 3, H, W) [-1, 1] -> what the file wants, (B, 3, H, W) or (B, H, W, 3)."""
    levels = (faces + 1) * 127.5  # grey levels
    if wanted.colour == "BGR":
        levels = levels[:, ::-1]
    mean, std = (np.asarray(value, np.float32).reshape(1, 3, 1, 1) for value in (wanted.mean, wanted.std))
    pictures = (levels - mean) / std
    return np.ascontiguousarray(pictures if wanted.layout == "NCHW" else pictures.transpose(0, 2, 3, 1), np.float32)


def _opened(record: _Record, content: bytes) -> UserNetwork:
    return UserNetwork(record, (_open_onnx if record.kind == "onnx" else _open_torchscript)(record, content))


def _open_onnx(record: _Record, content: bytes) -> Run:
    try:
        import onnxruntime  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise WeightsError(f"{record.file} is an ONNX file, which onnxruntime runs: `pip install onnxruntime`, then repeat") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its failures come as exceptions
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own types, none of them public
        raise WeightsError(f"{record.file} cannot be opened as ONNX ({_first_line(error)}); give an ONNX or TorchScript file") from None
    inputs, outputs = session.get_inputs(), [output.name for output in session.get_outputs()]
    wanted = record.convention
    output = wanted.output or outputs[0]
    if len(inputs) != 1:
        raise WeightsError(f"{record.file} has {len(inputs)} inputs ({', '.join(entry.name for entry in inputs)}), expected one")
    if output not in outputs or (len(outputs) > 1 and not wanted.output):
        raise WeightsError(f"{record.file} has the outputs {', '.join(outputs)}: say which with `output` in its convention")
    shape = inputs[0].shape
    sides = (3, wanted.height, wanted.width) if wanted.layout == "NCHW" else (wanted.height, wanted.width, 3)
    if len(shape) != 4 or any(isinstance(found, int) and found != side for found, side in zip(shape[1:], sides, strict=True)):
        raise WeightsError(
            f"{record.file} takes an input of shape {tuple(shape)}, its convention says (B, {', '.join(map(str, sides))}): "
            "correct `height`, `width` or `layout`"
        )

    def run(picture: Float32) -> Float32:
        try:
            return np.asarray(session.run([output], {inputs[0].name: picture})[0])
        except Exception as error:
            raise WeightsError(f"{record.file} cannot be run as its convention says: {_first_line(error)}") from None

    return run


def _open_torchscript(record: _Record, content: bytes) -> Run:
    import torch

    try:
        module = torch.jit.load(io.BytesIO(content), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except Exception as error:  # RuntimeError of many kinds
        raise WeightsError(
            f"{record.file} cannot be opened as TorchScript ({_first_line(error)}); export a plain checkpoint with torch.jit.trace"
        ) from None

    @torch.inference_mode()
    def run(picture: Float32) -> Float32:
        try:
            outputs = module(torch.from_numpy(picture))
            if isinstance(outputs, list | tuple):
                if len(outputs) > 1 and not record.convention.output:
                    raise WeightsError(f"{record.file} has {len(outputs)} outputs: say which with `output` (0, 1, ...) in its convention")
                outputs = outputs[int(record.convention.output or 0)]
            array: Float32 = outputs.float().cpu().numpy()
            return array
        except WeightsError:
            raise
        except Exception as error:
            raise WeightsError(f"{record.file} cannot be run as its convention says: {_first_line(error)}") from None

    return run


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
