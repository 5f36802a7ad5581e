"""`e4s invert`: one picture -> style codes -> the picture that the generator makes of them, side by side, and how far they differ."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from e4s_models.warp import resample
from flows.execution.process import require_weights, use_threads
from flows.pictures import require_picture
from flows.plan import pick_device
from flows.profiles import check_effect, make_settings
from flows.single import run_node
from flows.stages import PAIR_NODES
from storage.codec import encode_png
from storage.run import check_writable
from storage.store import write_atomic
from tasks.encode import GENERATOR_WEIGHTS
from tasks.frame import MAX_PIXELS, ImageFile, hash_file, probe
from tasks.graph import STAGES, Graph, Node, UsageError
from tasks.runner import cpu_threads
from tasks.stage import Array, UInt8
from tasks.swap_codes import generate, regions_in_picture

if TYPE_CHECKING:
    from e4s_models.mobile_stylegan import MobileStyleGAN

METRIC_WEIGHTS = ("lpips_alexnet", "arcface_mbf")

NODES = (
    Node("align", "align", "image", {"image": "image", "face_index": "face_index"}),
    Node("parse", "parse", "image", {"face": "align.face"}),
    Node(
        "encode_driven",  # as the source of a swap is encoded, with the profile's steps
        "encode",
        "image",
        {"image": "image", "face": "align.face", "labels": "parse.regions", "crop_to_frame": "align.crop_to_frame"},
    ),
)


def invert(
    image: str,
    output: str,
    *,
    profile: str,
    stages: Sequence[str] = (),
    changes: Sequence[str] = (),
    device: str = "auto",
    face: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, float]:
    """Write face.png, reconstruction.png, side_by_side.png, codes.npz and metrics.json to the folder `output`; returns the metrics.

    Raises UsageError, WeightsError, RunError when nothing can be written to `output`, or ItemError when the picture cannot be read or shows
    no face.
    """
    check_writable(Path(output), "-o")
    require_picture(image)
    probe(image, max_pixels)
    settings = make_settings(profile, stages, changes, pick_device(device))
    elsewhere = {node.name for node in PAIR_NODES} - {node.name for node in NODES} - set(STAGES)  # nodes that a profile may set
    settings = replace(settings, options={name: table for name, table in settings.options.items() if name not in elsewhere})
    graph = Graph(NODES, ("encode_driven", "codes"), settings)
    check_effect(graph, stages, changes, used=[node.stage for node in NODES], elsewhere=elsewhere)
    encode = graph.stages["encode_driven"]
    if not {"codes", "to_canvas"} <= encode.writes.keys():
        raise UsageError(f"encode={encode.backend} makes no codes of the embedded generator; use --stage encode=encoder")
    needed = {weight for name, stage in graph.stages.items() for weight in stage.weights(graph.configs[name])}
    require_weights(sorted({*needed, *GENERATOR_WEIGHTS, *METRIC_WEIGHTS}))
    use_threads(cpu_threads())
    from e4s_models.mobile_stylegan import MobileStyleGAN

    known: dict[str, Any] = {"image": ImageFile(image, hash_file(image)), "face_index": face}
    for node in NODES:  # the metrics need all of them, whatever the encoder reads
        made = run_node(graph, node.name, {read: known[graph.wire(node, read)] for read in graph.reads(node.name)})
        known |= {f"{node.name}.{name}": value for name, value in made.items()}
    crop, regions, codes, to_canvas = (
        known[name] for name in ("align.face", "parse.regions", "encode_driven.codes", "encode_driven.to_canvas")
    )
    again = reconstruct(MobileStyleGAN.load(settings.device), codes, regions, to_canvas)
    metrics = measure(again, crop)
    folder = Path(output)
    for name, picture in (("face", crop), ("reconstruction", again), ("side_by_side", np.concatenate([crop, again], axis=1))):
        write_atomic(folder / f"{name}.png", encode_png(picture))
    stored = io.BytesIO()
    np.savez_compressed(stored, codes=codes, regions=regions, to_canvas=to_canvas)
    write_atomic(folder / "codes.npz", stored.getvalue())
    write_atomic(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    return metrics


def reconstruct(generator: MobileStyleGAN, codes: Array, regions: UInt8, to_canvas: Array) -> UInt8:
    """The aligned face (H, W, 3) uint8 that codes (12, 23, 512) and its own region ids (H, W) uint8 give."""
    picture = generate(generator, codes, regions_in_picture(regions, to_canvas))
    return resample(picture, to_canvas, *regions.shape)


def measure(made: UInt8, face: UInt8) -> dict[str, float]:
    """SSIM, PSNR (dB), RMSE and LPIPS on [0, 1], and the cosine of ArcFace's features, of two aligned faces (H, H, 3) uint8."""
    import torch

    from e4s_models.id_networks import ID_NETWORKS
    from e4s_models.lpips_net import Lpips
    from evaluation.lpips import lpips
    from evaluation.psnr import psnr
    from evaluation.retrieval import cosines
    from evaluation.rmse import rmse
    from evaluation.ssim import ssim

    pair = [torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None] / 255 for picture in (made, face)]
    network = ID_NETWORKS["arcface_mbf"]("cpu")
    features = [network.features(picture * 2 - 1).numpy() for picture in pair]
    values = {"ssim": ssim(*pair), "psnr": psnr(*pair), "rmse": rmse(*pair), "lpips": lpips(Lpips.load(), *pair)}
    return {name: float(value[0]) for name, value in values.items()} | {"identity_cosine": float(cosines(*features)[0])}
