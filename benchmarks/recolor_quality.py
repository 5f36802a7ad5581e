"""Colours brought back: `python -m benchmarks.recolor_quality --data FOLDER [--photos FOLDER]`.

A face is shown in colours and light changed at random, beside a mirrored picture of itself as it was; every way of recoloring is to
bring its own colours back. PSNR, LPIPS and CIEDE2000 over the inner face, at 256 px, mean over faces. Faces are those that a training's
data folder holds out, and, with `--photos`, photographs that nothing was trained on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.result import Results
from e4s_models.lpips_net import Lpips
from e4s_models.regions import INNER_FACE
from evaluation.lpips import lpips
from flows.engine import use_threads
from flows.training.faces import FacePool
from flows.training.photograph import expose, side_light
from flows.training.photos import photo_files
from tasks import align, parse
from tasks.frame import ImageFile, hash_file
from tasks.graph import backends
from tasks.stage import Inputs, ItemError, UInt8

SEED = 920_000
SIDE = 256
WAYS = ("none", "guided", "lab", "learned")

Face = tuple[UInt8, UInt8]


def changed(face: UInt8, rng: np.random.Generator) -> UInt8:
    """The face (S, S, 3) in other colours, another exposure and light from another side."""
    picture = expose(face.astype(np.float32) / np.float32(255), rng)
    if rng.random() < 0.5:
        picture = picture * side_light(len(face), rng)[..., None]
    return np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8)


def photographs(folder: Path, limit: int) -> Iterator[Face]:
    """Aligned and labelled photographs, 256 px."""
    configs = align.STAGE.config(side=2 * SIDE), parse.STAGE.config()
    networks = align.STAGE.load(configs[0], "cpu"), parse.STAGE.load(configs[1], "cpu")
    for path in photo_files(folder)[:limit]:
        image = ImageFile(str(path), hash_file(str(path)))
        (aligned,) = align.STAGE.run(networks[0], configs[0], [{"image": image, "face_index": 0}])
        if isinstance(aligned, ItemError):
            continue
        (parsed,) = parse.STAGE.run(networks[1], configs[1], [{"face": aligned["face"]}])
        assert not isinstance(parsed, ItemError)
        yield aligned["face"][::2, ::2], parsed["regions"][::2, ::2]


def recolorings() -> dict[str, Callable[[Inputs], UInt8]]:
    """The ways that this version has, by name."""
    found: dict[str, Callable[[Inputs], UInt8]] = {}
    for way in WAYS:
        if way not in backends("recolor"):
            continue
        stage = backends("recolor")[way]
        config = stage.config()
        model = stage.load(config, "cpu")

        def run(inputs: Inputs, stage=stage, config=config, model=model) -> UInt8:  # type: ignore[no-untyped-def]
            (result,) = stage.run(model, config, [inputs])
            assert not isinstance(result, ItemError)
            return np.asarray(result["recolored"], np.uint8)

        found[way] = run
    return found


def measure(
    made: UInt8, truth: UInt8, inner: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], network: Lpips
) -> tuple[float, float, float]:
    """PSNR (dB), LPIPS and CIEDE2000 over the inner face."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    error = (made[inner].astype(np.float64) - truth[inner]) / 255
    psnr = -10 * math.log10(max(float((error**2).mean()), 1e-8))
    tensors = [torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255 for picture in (made, truth)]
    perceptual = float(lpips(network, tensors[0], tensors[1], torch.from_numpy(inner)[None])[0])
    difference = float(deltaE_ciede2000(rgb2lab(made), rgb2lab(truth))[inner].mean())  # type: ignore[no-untyped-call]
    return psnr, perceptual, difference


def judge(faces: Sequence[Face], network: Lpips) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """Mean figures (3,) of every way."""
    ways = recolorings()
    rows: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    for number, (truth, regions) in enumerate(faces):
        rng = np.random.Generator(np.random.PCG64([SEED, number]))
        inner = np.isin(regions, INNER_FACE)
        if inner.mean() < 0.02:
            continue
        inputs = {
            "swapped": changed(truth, rng),
            "swapped_regions": regions,
            "seen_regions": regions,
            "mask": np.where(inner, 255, 0).astype(np.uint8),
            "target_face": np.ascontiguousarray(truth[:, ::-1]),
            "target_regions": np.ascontiguousarray(regions[:, ::-1]),
        }
        for way, run in ways.items():
            rows[way].append(measure(run(inputs), truth, inner, network))
    return {way: np.array(values).mean(axis=0) for way, values in rows.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data folder of a training: its held-out faces judge")
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="folders of photographs that nothing was trained on")
    parser.add_argument("--limit", type=int, default=200, help="faces of each kind")
    chosen = parser.parse_args(arguments)
    use_threads(2)
    pool, network = FacePool(chosen.data), Lpips.load()
    held_out = [pool.held_out_people, pool.held_out_photos]
    sets = [
        (name, list(zip(faces.images, faces.labels, strict=True))) for name, faces in zip(("people", "portraits"), held_out, strict=True)
    ]
    sets += [(folder.name, list(photographs(folder, chosen.limit))) for folder in chosen.photos]
    results = Results("recolor_quality")
    for name, faces in sets:
        faces = faces[: chosen.limit]
        if not faces:
            continue
        means = judge(faces, network)
        for way, (psnr, perceptual, difference) in means.items():
            print(f"{name:16} {way:8} n={len(faces):3}  PSNR {psnr:6.2f} dB  LPIPS {perceptual:.4f}  CIEDE2000 {difference:.2f}")
        best = [other for way, other in means.items() if way in ("guided", "lab")]
        results.claim(f"{name}_psnr", float(means["learned"][0]), float(max(row[0] for row in best)), ">=")
        results.claim(f"{name}_lpips", float(means["learned"][1]), float(min(row[1] for row in best)), "<=")
        results.claim(f"{name}_ciede2000", float(means["learned"][2]), float(min(row[2] for row in best)), "<=")
    return results.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
