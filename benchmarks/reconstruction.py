"""How well faces are inverted: `python -m benchmarks.reconstruction --people 200 [--photos FOLDER] [--out rows.jsonl]`.

Per face SSIM, PSNR, RMSE, LPIPS on [0, 1] of the aligned 1024 px crop, and ArcFace's cosine, for the mean face, the encoder by itself
("one pass"), with its feedback passes ("steps 0"), with refining steps on top and, of synthetic people, the code that made the picture.
People have seeds from 900000 on, which nothing was trained or tuned on. Rows are appended to `--out` as they are made, and what is there
is not made again; a longer `--people` or other `--ways` and `--steps` add rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.result import Results
from e4s_models.face_parser import FaceParser
from e4s_models.mobile_stylegan import NUM_LAYERS, MobileStyleGAN
from e4s_models.regions import BISENET19_TO_REGIONS, NUM_REGIONS
from e4s_models.weights import weight_digest
from flows.execution.process import use_threads
from flows.invert import measure, reconstruct
from flows.profiles import make_settings
from flows.synth import person_w, picture
from tasks import align, encode_regions
from tasks.encode_regions import EncoderConfig
from tasks.frame import ImageFile, hash_file
from tasks.parse import parse_labels
from tasks.stage import Array, ItemError, UInt8

FIRST_SEED = 900_000
TRUNCATION = 0.7
METRICS = ("ssim", "psnr", "rmse", "lpips", "identity_cosine")
WAYS = ("mean", "one pass", "steps", "true code")
PAPER = {"encoder": {"ssim": 0.82, "psnr": 19.85, "rmse": 0.105}, "refined": {"ssim": 0.86, "psnr": 23.02, "rmse": 0.07}}
"""The paper's Table 3 (CelebAMask-HQ): RGI, and RGI with optimization."""

Face = tuple[str, UInt8, Array | None]
"""Name, aligned crop (1024, 1024, 3), the code that made it."""


def people(generator: MobileStyleGAN, count: int) -> Iterator[Face]:
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        w = person_w(generator, seed, TRUNCATION)
        yield f"person {seed}", picture(generator, w), w


def photos(folder: Path) -> Iterator[Face]:
    config = align.STAGE.config(side=1024)
    model = align.STAGE.load(config, "cpu")
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")):
        image = ImageFile(str(path), hash_file(str(path)))
        result = align.STAGE.run(model, config, [{"image": image, "face_index": 0}])[0]
        if isinstance(result, ItemError):
            print(f"{path.name}: {result}", file=sys.stderr)
        else:
            yield f"photo {path.name}", result["face"], None


def invert_all(
    faces: Iterator[Face],
    ways: Sequence[str],
    configs: Mapping[str, EncoderConfig],
    known: set[tuple[str, str]],
    generator: MobileStyleGAN,
) -> Iterator[dict[str, Any]]:
    """A row per face and way, of WAYS and by the name of a config; those in `known` left out."""
    parser = FaceParser.load("cpu")
    networks = {name: encode_regions.STAGE.load(config, "cpu") for name, config in configs.items()}
    to_canvas = np.eye(3)
    mean = np.broadcast_to(generator.mean_w.numpy(), (NUM_REGIONS, NUM_LAYERS, 512))
    for name, face, w in faces:
        given = {"mean": mean} if "mean" in ways else {}
        if w is not None and "true code" in ways:
            given["true code"] = np.broadcast_to(w, mean.shape)
        left = [way for way in (*given, *configs) if (name, way) not in known]
        if not left:
            continue
        tensor = torch.from_numpy(face).permute(2, 0, 1).float() / 127.5 - 1
        regions = BISENET19_TO_REGIONS[parse_labels(parser, [tensor], 512)[0].numpy()]
        for way in left:
            began = time.perf_counter()
            if way in given:
                codes = given[way]
            else:
                (result,) = encode_regions.STAGE.run(networks[way], configs[way], [{"face": face, "labels": regions}])
                assert isinstance(result, dict)
                codes = result["codes"]
            seconds = time.perf_counter() - began
            made = reconstruct(generator, codes, regions, to_canvas)
            yield {"face": name, "way": way, "encoder": weight_digest("code_encoder"), "seconds": round(seconds, 3), **measure(made, face)}


def main(arguments: Sequence[str] | None = None) -> int:
    defaults = make_settings("codes").options["encode_driven"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--photos", type=Path, help="folder of photographs")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, defaults["steps"], 50])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="which to make; rows of others that are there are kept")
    parser.add_argument("--out", type=Path, help="rows, JSON lines; kept between calls")
    parser.add_argument("--quick", action="store_true", help="one person, few steps: that it runs, not how well")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.people, chosen.steps = 1, [0, 1]
    use_threads(2)
    rows = [json.loads(line) for line in chosen.out.read_text("utf-8").splitlines()] if chosen.out and chosen.out.is_file() else []
    rows = [row for row in rows if row.get("encoder") == weight_digest("code_encoder")]  # of the encoder as it is now
    known = {(row["face"], row["way"]) for row in rows}
    generator = MobileStyleGAN.load()
    steps = sorted(set(chosen.steps))
    configs = {"one pass": EncoderConfig()} if "one pass" in chosen.ways else {}
    if "steps" in chosen.ways:
        configs |= {f"steps {n}": EncoderConfig(passes=defaults["passes"], steps=n) for n in steps}
    sources = [people(generator, chosen.people), *([photos(chosen.photos)] if chosen.photos else [])]
    for faces in sources:
        for row in invert_all(faces, chosen.ways, configs, known, generator):
            rows.append(row)
            if chosen.out:
                with chosen.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    results = Results("reconstruction")
    for kind in ("person", "photo"):
        mine = [row for row in rows if row["face"].startswith(kind)]
        for way in dict.fromkeys(row["way"] for row in mine):
            of_way = [row for row in mine if row["way"] == way]
            means = {name: float(np.mean([row[name] for row in of_way])) for name in METRICS}
            median = float(np.median([row["seconds"] for row in of_way]))
            shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
            print(f"{kind:7} {way:10} n={len(of_way):4}  {shown}  {median:.2f} s")
            paper = PAPER.get("encoder" if way in ("one pass", "steps 0") else "refined" if way == f"steps {steps[-1]}" else "")
            if paper and kind == "person" and not chosen.quick:
                for name, value in paper.items():
                    results.claim(f"{way.replace(' ', '_')}_{name}", means[name], value, "<=" if name == "rmse" else ">=")
    return results.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
