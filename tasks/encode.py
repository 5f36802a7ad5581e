"""Stage `encode`: a picture -> regional style codes of the embedded generator.

Backend `synth` looks the code up that the picture was generated from, so it takes synthetic people only (`e4s synth`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from e4s_models.regions import NUM_REGIONS
from e4s_models.weights import weight_digest
from tasks.frame import probe
from tasks.stage import Float32, Inputs, Outputs, PassingError, Stage, each

MANIFEST = "people.parquet"
W_DIGEST = "e4s:w_sha256"  # PNG text chunk: `w_digest` of the code
GENERATOR = "e4s:generator"  # PNG text chunk: sha256 of the synthesis network's constants
GENERATOR_WEIGHT = "mobile_stylegan_synthesis_bin"
GENERATOR_WEIGHTS = tuple(f"mobile_stylegan_{part}_{kind}" for part in ("mapping", "synthesis") for kind in ("xml", "bin"))
NUM_LAYERS = 23
SIDE = 1024  # px that the generator makes
_REMEDY = "use --stage swap=composite, or people made by `e4s synth`"


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    pass


def w_digest(w: Float32) -> str:
    """sha256, as hex, of a style code (512,) as little-endian float32 bytes."""
    return hashlib.sha256(np.ascontiguousarray(w, "<f4").tobytes()).hexdigest()


def known_w(path: str, text: dict[str, str], read_manifest: Callable[[Path], dict[str, Float32]]) -> Float32:
    """The style code (512,) that a synthetic picture was made from.

    `text` is the picture's PNG text; the code stands in the `people.parquet` in the picture's folder or the one above. Raises PassingError
    when the picture is not such a person, the manifest lacks it, or the code's digest is not the one in the picture.
    """
    wanted = text.get(W_DIGEST)
    if wanted is None:
        raise PassingError(f"{path} is no synthetic person (it has no {W_DIGEST} text), so its style code is unknown: {_REMEDY}.")
    if text.get(GENERATOR) != weight_digest(GENERATOR_WEIGHT):
        raise PassingError(f"{path} was made by another generator, its style code would show someone else: {_REMEDY}.")
    folder = Path(path).parent
    found = next((at / MANIFEST for at in (folder, folder.parent) if (at / MANIFEST).is_file()), None)
    if found is None:
        raise PassingError(
            f"{path}: no {MANIFEST} in its folder or the one above, so its style code is unknown: copy it there, or {_REMEDY}."
        )
    w = read_manifest(found).get(wanted)
    if w is None:
        raise PassingError(f"{path} is not in {found}: copy the manifest that was made with the picture, or {_REMEDY}.")
    if w.shape != (512,) or w_digest(w) != wanted:
        raise PassingError(f"{found}: the style code of {path} is damaged: make it again with `e4s synth`, or use --stage swap=composite.")
    return w


class Manifests:
    """Style codes by digest of the manifests read so far; one that changes is read again."""

    def __init__(self) -> None:
        self._codes: dict[tuple[Path, int, int], dict[str, Float32]] = {}

    def __call__(self, path: Path) -> dict[str, Float32]:
        """Codes (512,) of a `people.parquet` by their digest. Raises PassingError if it cannot be read."""
        import pyarrow as pa

        from storage.parquet import read_parquet

        try:
            state = path.stat()
            if (known := (path, state.st_mtime_ns, state.st_size)) not in self._codes:
                table = read_parquet(path, columns=["w_sha256", "w"])
                codes = np.asarray(table["w"].combine_chunks().flatten(), np.float32).reshape(len(table), -1)
                self._codes[known] = dict(zip(table["w_sha256"].to_pylist(), codes, strict=True))
            return self._codes[known]
        except (pa.ArrowException, OSError, ValueError) as error:
            raise PassingError(f"{path} cannot be read ({error}): make it again with `e4s synth`, or use --stage swap=composite.") from None


def encode(manifests: Manifests, config: EncodeConfig, inputs: Inputs) -> Outputs:
    """Reads `image` and `crop_to_frame` (3, 3), px of an aligned crop -> px of a picture.

    Writes `codes` (12, 23, 512) float16: one W, the same in every region and style layer; and `to_canvas`, that same transform: synthetic
    people fill the generator's own square.
    """
    image = inputs["image"]
    w = known_w(image.path, image.text(), manifests)
    if (sides := probe(image.path)) != (SIDE, SIDE):
        raise PassingError(f"{image.path} is {sides[1]} x {sides[0]} px, the generator makes {SIDE} x {SIDE}: {_REMEDY} at full size.")
    codes = np.broadcast_to(w.astype(np.float16), (NUM_REGIONS, NUM_LAYERS, len(w))).copy()
    return {"codes": codes, "to_canvas": inputs["crop_to_frame"]}


STAGE = Stage(
    name="encode",
    backend="synth",
    version=2,
    config=EncodeConfig,
    load=lambda config, device: Manifests(),
    run=each(encode),
    reads=("image", "crop_to_frame"),
    writes={"codes": "array", "to_canvas": "array"},
    weights=lambda config: (GENERATOR_WEIGHT,),
    libraries=("numpy", "pyarrow", "pillow"),
)

BACKENDS = {"synth": STAGE}
