"""What is known of a video's frames before they go through the stages: crop, dense mesh, label map and light of the followed face.

The crop follows from the person's smoothed course. The others are found by the stages `mesh`, `parse` and `light`, in a group's frames and
those around them, and smoothed over time. The results stand for those stages' outputs (`tasks.graph.Item.given`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from e4s_models.regions import BISENET19_TO_REGIONS
from e4s_models.warp import resample, scale_of, transform_points
from tasks.light import share_light
from tasks.planes import PlanarFrame
from tasks.runner import Worker
from tasks.stage import Array, Float32, Inputs, ItemError, Outputs, UInt8
from tasks.track import Crops, SmoothConfig, smooth_mesh
from tasks.video_pass import Way

Known = dict[str, Outputs]
"""Outputs by node."""


def aligned(rgb: UInt8, crops: Crops, frame: int, side: int) -> Outputs:
    """What stage `align` writes, of a frame RGB (H, W, 3) whose face is followed: nothing is searched, the crop is cut by the course."""
    crop_to_frame = crops.crop_to_frame(frame, side)
    return {
        "face": resample(rgb, crop_to_frame, side, side),
        "crop_to_frame": crop_to_frame,
        "landmarks": transform_points(np.linalg.inv(crop_to_frame), crops.landmarks[frame]).astype(np.float32),
    }


@dataclass
class _Look:
    """What the stages found in one frame; None: nothing, or not asked."""

    mesh: Array | None = None
    """(478, 3) px of the frame."""
    labels: UInt8 | None = None
    """(side, side), 19 classes."""
    light: Float32 | None = None
    """(cells, cells, 4)"""
    had: set[str] = field(default_factory=set)
    """Nodes that were asked."""


class Steady:
    """Meshes, label maps and light of one person in one video, smoothed over time, group by group.

    What was found is kept until a later group no longer needs it, so that groups in order find nothing twice. The results do not depend on
    the groups.
    """

    def __init__(self, worker: Worker, way: Way, config: SmoothConfig) -> None:
        self._worker, self._way, self._config = worker, way, config
        self._side: int = worker.graph.configs["align"].side
        self._looks: dict[int, _Look] = {}
        self._reach = reaches(worker.graph.fingerprints, config)
        self.spent: dict[str, tuple[int, float]] = {}
        """Node -> frames that its stage looked at for the last group, and the seconds it took."""

    def group(self, start: int, stop: int, frames: Callable[[int, int], Iterator[PlanarFrame]]) -> dict[int, Known]:
        """Frames [start, stop) with the face -> what is known of them; `frames` reads any stretch of the video.

        A frame in which a stage finds nothing has no entry for it: the stage itself will say why.
        """
        with_face = self._way.with_face
        self.spent = {}
        found: dict[int, Known] = {frame: {} for frame in range(start, stop) if with_face[frame]}
        if not found or not self._reach:
            return found
        self._look(start, stop, frames)
        if "mesh" in self._reach:
            self._add_meshes(found, start, stop)
        for frame in found:
            labels = self._around(frame, "labels", self._config.mask, self._reach.get("parse", 0))
            if labels:
                smooth = vote(*labels)
                found[frame]["parse"] = {"labels19": smooth, "regions": BISENET19_TO_REGIONS[smooth]}
            light = self._around(frame, "light", self._config.light, self._reach.get("light", 0))
            if light:
                found[frame]["light"] = {"skin": share_light(*light)}
        far = max(self._reach.values())
        self._looks = {frame: look for frame, look in self._looks.items() if stop - far <= frame < stop + far}
        return found

    def _look(self, start: int, stop: int, frames: Callable[[int, int], Iterator[PlanarFrame]]) -> None:
        """Let the stages look at what they have not seen yet of the group and around it."""
        total = len(self._way.state)
        asked: dict[int, set[str]] = {}
        for node, reach in self._reach.items():
            for frame in range(max(0, start - reach), min(total, stop + reach)):
                if self._way.with_face[frame] and node not in self._looks.setdefault(frame, _Look()).had:
                    asked.setdefault(frame, set()).add(node)
        if not asked:
            return
        first, last = min(asked), max(asked) + 1
        for frame, planes in enumerate(frames(first, last), first):
            if frame in asked:
                self._look_at(planes.rgb8(), frame, asked[frame])

    def _look_at(self, rgb: UInt8, frame: int, nodes: set[str]) -> None:
        look = self._looks[frame]
        matrix = self._way.crops.crop_to_frame(frame, self._side)
        face = resample(rgb, matrix, self._side, self._side)
        if "mesh" in nodes:
            mesh = self._compute("mesh", {"face": face})
            if mesh:
                points = mesh["points"].astype(np.float64)
                look.mesh = np.column_stack([transform_points(matrix, points[:, :2]), points[:, 2] * scale_of(matrix)])
        if nodes & {"parse", "light"} and look.labels is None:
            parsed = self._compute("parse", {"face": face})
            if parsed:
                look.labels = parsed["labels19"]
        if "light" in nodes and look.labels is not None:
            light = self._compute("light", {"face": face, "regions": BISENET19_TO_REGIONS[look.labels]})
            if light:
                look.light = light["skin"]
        look.had |= nodes

    def _compute(self, node: str, inputs: Inputs) -> Outputs | None:
        began = time.perf_counter()
        (outputs,) = self._worker.compute(node, [inputs])
        count, seconds = self.spent.get(node, (0, 0.0))
        self.spent[node] = count + 1, seconds + time.perf_counter() - began
        return None if isinstance(outputs, ItemError) else outputs

    def _around(self, frame: int, what: str, sigma: float, reach: int) -> tuple[Array, Float32, int] | None:
        """What was found in the frames around, of the same stretch (n, ...), their weights (n,), the frame's own place; None: nothing."""
        if not sigma or getattr(self._looks[frame], what) is None:
            return None
        run = self._way.run
        near = range(max(0, frame - reach), min(len(run), frame + reach + 1))
        there = [
            other for other in near if run[other] == run[frame] and other in self._looks and getattr(self._looks[other], what) is not None
        ]
        weights = np.exp(-0.5 * ((np.array(there) - frame) / sigma) ** 2).astype(np.float32)
        return np.stack([getattr(self._looks[other], what) for other in there]), weights, there.index(frame)

    def _add_meshes(self, found: Mapping[int, Known], start: int, stop: int) -> None:
        reach, way = self._reach["mesh"], self._way
        first, last = max(0, start - reach), min(len(way.state), stop + reach)
        looks = {frame: self._looks[frame].mesh for frame in range(first, last) if frame in self._looks}
        meshes = {frame: mesh for frame, mesh in looks.items() if mesh is not None}
        if not meshes:
            return
        points = np.full((last - first, *next(iter(meshes.values())).shape), np.nan)
        run = np.full(last - first, -1, np.int64)
        for frame, mesh in meshes.items():
            points[frame - first], run[frame - first] = mesh, way.run[frame]
        smooth = smooth_mesh(points, run, np.hypot(*way.crops.axis[first:last].T), self._config)
        model = self._worker.model("mesh")
        for frame in found.keys() & meshes.keys():
            matrix, mesh = way.crops.crop_to_frame(frame, self._side), smooth[frame - first]
            inside = np.column_stack([transform_points(np.linalg.inv(matrix), mesh[:, :2]), mesh[:, 2] / scale_of(matrix)])
            inside = inside.astype(np.float32)
            found[frame]["mesh"] = {"points": inside, "blendshapes": model.blendshapes(inside, self._side)}


def reaches(nodes: Mapping[str, object], config: SmoothConfig) -> dict[str, int]:
    """Node whose outputs are smoothed over time -> frames on each side that decide a frame's."""
    reach = {
        "mesh": config.overlap if config.mesh else 0,
        "parse": config.mask_reach,
        "light": config.light_reach,
    }
    return {node: frames for node, frames in reach.items() if frames and node in nodes}


def vote(labels: UInt8, weights: Float32, here: int) -> UInt8:
    """Label maps (T, H, W) of frames and their weights (T,) -> that of frame `here`, each pixel decided by the weighted majority.

    What moves steadily stays where it is; what shows in one frame alone goes. Where votes are even, the frame's own counts.
    """
    own = np.asarray(labels[here])
    differing = (labels != own).any(axis=0)
    if not differing.any():
        return own
    there = labels[:, differing]  # [T, N]
    classes = np.unique(there)
    weights = weights + np.where(np.arange(len(weights)) == here, 1e-4, 0)
    votes = np.stack([(weights[:, None] * (there == each)).sum(axis=0) for each in classes])
    result: UInt8 = own.copy()
    result[differing] = classes[votes.argmax(axis=0)]
    return result
