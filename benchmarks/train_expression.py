"""Learn the expression basis that ships as `expression_basis`: `python -m benchmarks.train_expression [--people N] [--out FILE]`.

Ridge regression of canonical vertices on blendshape coefficients over synthetic people: whose face it is averages out, the pose that
leaks into the vertices is regressed out beside the coefficients, and every face counts twice, once mirrored. One fifth is held out.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch

from benchmarks.result import Results
from e4s_models.face_mesh import BLENDSHAPE_NAMES, NUM_BLENDSHAPES, NUM_VERTICES, FaceMesh, Geometry
from e4s_models.mobile_stylegan import CODE_DIM, NUM_LAYERS, MobileStyleGAN

Float64 = npt.NDArray[np.float64]

TRUNCATION = 0.85  # wider than for pictures to look at: expressions vary more
RIDGE = 1.0
SEED = 5000  # of the first person


@torch.inference_mode()
def observe(people: int) -> tuple[Float64, Float64]:
    """Landmarks (N, 478, 3) px and coefficients (N, 52) of that many synthetic people."""
    generator, mesh = MobileStyleGAN.load(), FaceMesh.load()
    points, coefficients = [], []
    for seed in range(SEED, SEED + people):
        z = np.random.Generator(np.random.PCG64(seed)).standard_normal((1, CODE_DIM), np.float32)
        code = torch.lerp(generator.mean_w, generator.map(torch.from_numpy(z)), TRUNCATION)
        with torch.autocast("cpu", torch.bfloat16):
            image = generator.synthesize(code[:, None].expand(1, NUM_LAYERS, CODE_DIM))[0].float()
        face = (image.clamp(-1, 1) + 1).mul(127.5).round().byte().permute(1, 2, 0).contiguous().numpy()
        found, presence = mesh.landmarks(face)
        if presence > 0.5:
            points.append(found)
            coefficients.append(mesh.blendshapes(found, len(face)))
    return np.array(points, np.float64), np.array(coefficients, np.float64)


def observations(geometry: Geometry, points: Float64, coefficients: Float64) -> tuple[Float64, Float64]:
    """Regressors (2 N, 57) (coefficients, then pose terms) and canonical vertices (2 N, 468 * 3); every face, then its mirror image."""
    names = list(BLENDSHAPE_NAMES)
    other = {"Left": "Right", "Right": "Left"}
    swap = [names.index(next((n.removesuffix(s) + o for s, o in other.items() if n.endswith(s)), n)) for n in names]
    mirror = geometry.mirror[:NUM_VERTICES]
    rows, shapes = [], []
    for face, weights in zip(points.astype(np.float32), coefficients, strict=True):
        pose = geometry.pose(face)
        yaw, pitch, _ = (angle / 20 for angle in pose.angles)  # degrees, of the order of 1
        shape = pose.inverse().apply(face)[:NUM_VERTICES]
        for side, values, vertices in ((yaw, weights, shape), (-yaw, weights[swap], shape[mirror] * [-1, 1, 1])):
            rows.append([*values, side, pitch, side * side, pitch * pitch, side * pitch])
            shapes.append(vertices.ravel())
    return np.array(rows), np.array(shapes, np.float64)


def fit(rows: Float64, shapes: Float64) -> tuple[Float64, Float64, Float64]:
    """Ridge regression: mean row, mean shape and weights (57, 468 * 3)."""
    row, shape = rows.mean(0), shapes.mean(0)
    centred = rows - row
    return row, shape, np.linalg.solve(centred.T @ centred + RIDGE * np.eye(rows.shape[1]), centred.T @ (shapes - shape))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=int, default=300)
    parser.add_argument("--out", type=Path, help="where to write the basis (.npz); nothing is written without it")
    parser.add_argument("--quick", action="store_true", help="40 people")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    geometry = Geometry.load()
    rows, shapes = observations(geometry, *observe(40 if arguments.quick else arguments.people))
    held = 2 * (len(rows) // 10)
    row, shape, weights = fit(rows[:-held], shapes[:-held])
    left = shapes[-held:] - shape - (rows[-held:] - row) @ weights
    before, after = (np.linalg.norm(v.reshape(-1, NUM_VERTICES, 3), axis=2).mean() for v in (shapes[-held:] - shape, left))
    results = Results("train_expression")
    results.claim("held_out_residual", float(after / before), 0.75 if arguments.quick else 0.6)
    if arguments.out:
        basis = fit(rows, shapes)[2][:NUM_BLENDSHAPES].reshape(NUM_BLENDSHAPES, NUM_VERTICES, 3)
        np.savez(arguments.out, basis=basis.astype(np.float16))
        content = arguments.out.read_bytes()
        print(f"{arguments.out}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")
    return results.exit_code()


if __name__ == "__main__":
    sys.exit(main())
