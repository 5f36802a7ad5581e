"""What the visibility network finds in front of held-out faces: `python -m benchmarks.visibility --data FOLDER [--photos-too]`.

Faces are those that a training's data folder holds out (`e4s train visibility --data FOLDER`); without `--data` people are made in
`--work` with a seed that nothing was trained on. In front of each come things of kinds trained on and not, drawn by fixed seeds.
Reported: overlap (IoU) of the thing within the face and itself, per kind; false alarms on the same faces with nothing in front, as they
are and made up, as a share of face pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.result import Results
from e4s_models.regions import INNER_FACE
from e4s_models.visibility_net import Seen, VisibilityNet
from flows.execution.process import use_threads
from flows.training.data import PEOPLE_PER_SHARD, make_shards
from flows.training.faces import FacePool, FaceSet
from flows.training.occluders import TRAINED, UNSEEN
from flows.training.visibility import draw_example, overlap_of
from tasks.stage import UInt8
from tasks.visibility import NetworkConfig, visible_of

SEED = 910_000  # of the people that are made here
_CERTAIN = 0.5  # share of a pixel that a thing covers if it counts


def in_front(network: VisibilityNet, image: UInt8) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Where the stage says that something is in front."""
    return visible_of(network, image, NetworkConfig()) < 128


def overlaps(network: VisibilityNet, faces: FaceSet, count: int) -> dict[str, list[float]]:
    """IoU by kind of `count` faces, each with one thing in front that covers at least 1 % of the face."""
    kinds = [*TRAINED, *UNSEEN]
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    number = done = 0
    while done < count:
        rng = np.random.Generator(np.random.PCG64([SEED, number]))
        kind = kinds[number % len(kinds)]
        number += 1
        face = faces.pick(rng)
        image, truth, _ = draw_example(face, faces.pick(rng), [kind], rng)
        thing = truth[Seen.OCCLUDER] > _CERTAIN
        inner = truth[Seen.FACE] > 0.5
        if (thing.sum() < 0.01 * np.isin(face[1], INNER_FACE).sum()) or not inner.any():
            continue
        area = inner | thing
        found[kind].append(overlap_of(in_front(network, image) & area, thing))
        done += 1
    return found


def alarms(network: VisibilityNet, faces: FaceSet, count: int) -> list[float]:
    """Share of face pixels that are taken for something in front, on faces with nothing there."""
    shares = []
    for number in range(count):
        rng = np.random.Generator(np.random.PCG64([SEED + 1, number]))
        image, truth, _ = draw_example(faces.pick(rng), faces.pick(rng), [], rng, light=bool(number % 2))
        inner = truth[Seen.FACE] > 0.5
        shares.append(float(in_front(network, image)[inner].mean()))
    return shares


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="data folder of a training: its held-out faces judge")
    parser.add_argument("--work", type=Path, default=Path("visibility-work"), help="where people are made if there is no --data")
    parser.add_argument("--occluded", type=int, default=300)
    parser.add_argument("--clean", type=int, default=200)
    parser.add_argument("--photos-too", action="store_true", help="judge by held-out photographs as well, in lines of their own")
    parser.add_argument("--quick", action="store_true", help="few faces: that it runs, not how well")
    chosen = parser.parse_args(arguments)
    use_threads(2)
    if chosen.quick:
        chosen.occluded, chosen.clean = 15, 4
    network = VisibilityNet.load()
    if chosen.data is None:
        shards = 1 if chosen.quick else -(-chosen.clean // (2 * PEOPLE_PER_SHARD))
        list(make_shards(chosen.work, range(shards), SEED))
    pool = FacePool(chosen.data or chosen.work)
    results = Results("visibility")
    sets = [("", pool.held_out_people)]
    if chosen.photos_too:
        sets.append(("photos_", pool.held_out_photos))
    for name, faces in sets:
        found = overlaps(network, faces, chosen.occluded)
        for kind, values in found.items():
            print(
                f"{name}{kind:12} n={len(values):3}  IoU {np.mean(values):.3f}  worst {np.min(values):.3f}" if values else f"{kind}: none"
            )
        shares = alarms(network, faces, chosen.clean)
        print(f"{name}clean faces  n={len(shares)}  from {len(faces)} pictures, worst {max(shares):.4f}")
        if not chosen.quick:
            every = [value for values in found.values() for value in values]
            unseen = [value for kind in UNSEEN for value in found[kind]]
            results.claim(f"{name}iou", float(np.mean(every)), 0.85, ">=")
            results.claim(f"{name}iou_unseen_kinds", float(np.mean(unseen)), 0.85, ">=")
            results.claim(f"{name}false_alarms", float(np.mean(shares)), 0.01, "<=")
    return results.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
