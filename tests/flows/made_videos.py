"""A small run of videos, written by the libraries alone: a real clip, real tracking, pasting and encoding, no network in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from e4s_models.video_faces import VideoFaceDetector
from e4s_models.warp import ffhq_crop_to_frame, scale_of
from storage.video_run import FRAME_SCHEMA, KIND, VideoRow, VideoRunFolder
from tasks.planes import PlanarFrame, paste_patch
from tasks.video import FrameTable, probe, read_frames
from tasks.video_write import EncodeConfig, encode_chunk, join

PASSED, FAILED = (0, 1), (8,)  # frames of the made video that show no swap
REASON = "the mouth is hidden"


def made_run(folder: Path, source: Path, clip: Path, shake: float = 0.0) -> VideoRunFolder:
    """A run of `clip`, whose face became another's colour, moved by up to `shake` px to and fro, and of two videos that have no output."""
    run = VideoRunFolder(folder)
    run.create()
    table = probe(str(clip))
    detector = VideoFaceDetector.load()
    rgb = (frame.rgb8() for frame in read_frames(str(clip), table, 0, len(table)))
    points = [faces[0].landmarks for faces in detector.detect_chunk(rgb, len(table))]
    output = join(
        table,
        str(clip),
        encode_chunk(table, 0, _swapped(clip, table, points, shake), EncodeConfig()),
        run.outputs / "a.mp4",
        EncodeConfig(),
    )
    crops = [ffhq_crop_to_frame(one, 2) for one in points]
    status = ["passed" if index in PASSED else "failed" if index in FAILED else "swapped" for index in range(len(table))]
    centres = np.stack([matrix[:2] @ (0.5, 0.5, 1.0) for matrix in crops])
    columns = {
        "frame": np.arange(len(table)),
        "time": [float(time * table.tick) for time in table.pts.tolist()],
        "status": status,
        "stage": ["parse" if one == "failed" else None for one in status],
        "reason": [REASON if one == "failed" else None for one in status],
        "cut": np.arange(len(table)) == 0,
        "bridged": np.zeros(len(table), np.bool_),
        "x": centres[:, 0],
        "y": centres[:, 1],
        "size": [2 * scale_of(matrix) for matrix in crops],
        "angle": np.zeros(len(table)),
        "box": [[0.0, 0.0, 1.0, 1.0]] * len(table),
        "score": np.ones(len(table)),
    }
    run.write_frames("a", pa.table(columns, schema=FRAME_SCHEMA))
    done = VideoRow(
        id="a",
        source=str(source),
        source_sha256=_sha256(source),
        video=str(clip),
        video_sha256=table.sha256,
        status="done",
        output="outputs/a.mp4",
        output_sha256=_sha256(output),
        output_size=output.stat().st_size,
        key="0" * 64,
        seconds=48.0,
        frames=len(table),
        swapped=status.count("swapped"),
        passed=status.count("passed"),
        failed=status.count("failed"),
        shots=1,
    )
    failed = VideoRow(id="b", source=str(source), video="gone.mp4", status="failed", stage="input", reason="video: gone.mp4 is not a file")
    run.write_rows([done, failed, VideoRow(id="c", source=str(source), video="later.mp4")])
    node = {"stage": "align", "backend": "dlib", "version": 1, "config": {"side": 256}, "weights": {"dlib_landmarks68": "ab" * 32}}
    request = {"profile": "fast", "stages": [], "changes": [], "max_pixels": 100_000_000}
    words = dict.fromkeys(("e4s", "python", "platform", "processor", "written"), "1")
    run.write_settings(
        {
            "kind": KIND,
            "store": "",
            "request": request,
            "device": "cpu",
            "cpu_threads": 2,
            "libraries": {"av": "1"},
            "nodes": {"align": node},
            **words,
        }
    )
    run.append_log("stage", stage="align", items=21, seconds=1.5)
    return run


def _swapped(clip: Path, table: FrameTable, points: list[npt.NDArray[np.float32]], shake: float) -> Iterator[PlanarFrame]:
    for index, frame in enumerate(read_frames(str(clip), table, 0, len(table))):
        if index in (*PASSED, *FAILED):
            yield frame
            continue
        rgb = frame.rgb8()
        hull = np.zeros(rgb.shape[:2], np.uint8)
        cv2.fillConvexPoly(hull, cv2.convexHull(points[index].astype(np.int32)), 255)
        moved = cv2.warpAffine(
            rgb, np.float64([[1, 0, shake * (-1) ** index], [0, 1, 0]]), rgb.shape[1::-1], borderMode=cv2.BORDER_REPLICATE
        )
        weights = cv2.GaussianBlur(hull.astype(np.float32) / 255, (0, 0), 5)
        yield paste_patch(frame, moved[..., [0, 2, 1]], weights, 0, 0)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
