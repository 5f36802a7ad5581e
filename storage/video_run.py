"""The run folder of videos: a row per video in `manifest.parquet`, a row per frame in `frames/<id>.parquet`.

The rest is as in `storage.run`: run.json (its `kind` is "videos"), log.jsonl, attempts.jsonl, `outputs`.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from storage.parquet import read_parquet
from storage.run import BaseRow, DamagedFile, RunFiles, RunFolder
from storage.store import write_atomic

KIND: Final = "videos"

FrameStatus = Literal["swapped", "passed", "failed"]
"""passed: without the face, so untouched. failed: with the face, but its swap failed, so untouched too; the reason says why."""

VIDEO_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),  # picture of the face that is wanted
        ("video", pa.string()),
        ("source_sha256", pa.string()),
        ("source_reading", pa.string()),  # how the picture is decoded, where an earlier version did so otherwise
        ("video_sha256", pa.string()),
        ("source_face", pa.int32()),  # which face of the picture, 0 = largest
        ("face", pa.string()),  # who is swapped: a number (0 fills most of the video) or the path of a picture of the person
        ("face_sha256", pa.string()),  # of that picture, else ""
        ("frames", pa.int64()),  # swapped + passed + failed = frames, for a video that is done
        ("swapped", pa.int64()),
        ("passed", pa.int64()),
        ("failed", pa.int64()),
        ("repaired", pa.int64()),  # frames whose time was missing, a duplicate or backward
        ("damaged", pa.int64()),  # packets that the decoder refused and frames that it marked
        ("shots", pa.int32()),
        ("status", pa.string()),  # left, done, failed
        ("stage", pa.string()),  # where it failed
        ("reason", pa.string()),
        ("note", pa.string()),  # what is to be known of a video that is done, such as that it shows no face
        ("output", pa.string()),  # relative to the run folder
        ("output_sha256", pa.string()),
        ("output_size", pa.int64()),
        ("key", pa.string()),  # of all that decides the output
        ("seconds", pa.float64()),  # compute spent on this video, by all commands on the run folder together
        ("attempts", pa.int32()),
        ("quarantined", pa.bool_()),
    ]
)

FRAME_SCHEMA = pa.schema(
    [
        ("frame", pa.int64()),  # in the order of presentation
        ("time", pa.float64()),  # s, relative to the earliest stream
        ("status", pa.string()),  # see FrameStatus
        ("stage", pa.string()),  # where it failed
        ("reason", pa.string()),
        ("cut", pa.bool_()),  # a new shot begins here; true for frame 0
        ("bridged", pa.bool_()),  # no face was detected, its place is interpolated
        # The crop that was worked on, smoothed, px of the upright frame; null where there is no face.
        ("x", pa.float64()),  # its centre
        ("y", pa.float64()),
        ("size", pa.float64()),  # its side
        ("angle", pa.float64()),  # degrees clockwise from the frame's x axis to the crop's
        ("box", pa.list_(pa.float64(), 4)),  # left, top, right, bottom px around the smoothed landmarks; null where there is no face
        ("score", pa.float64()),  # of the detector; null where nothing was detected
    ],
    metadata={"e4s": "frames"},
)


@dataclass(kw_only=True, slots=True)
class VideoRow(BaseRow):
    """One video of a run."""

    video: str
    video_sha256: str = ""
    face: str = "0"
    face_sha256: str = ""
    frames: int = 0
    swapped: int = 0
    passed: int = 0
    failed: int = 0
    repaired: int = 0
    damaged: int = 0
    shots: int = 0
    note: str = ""


class VideoRunFolder(RunFiles[VideoRow]):
    """A run folder whose items are videos."""

    noun = "video"
    schema = VIDEO_SCHEMA
    row = VideoRow

    def frames_file(self, video: str) -> Path:
        """Where the frames of the video with that id are listed."""
        return self.path / "frames" / f"{video}.parquet"

    def write_frames(self, video: str, frames: pa.Table) -> None:
        """Replace a video's list of frames."""
        buffer = io.BytesIO()
        pq.write_table(frames.select(FRAME_SCHEMA.names).cast(FRAME_SCHEMA), buffer, compression="zstd")
        write_atomic(self.frames_file(video), buffer.getvalue(), durable=True)

    def read_frames(self, video: str) -> pa.Table:
        """A video's frames (FRAME_SCHEMA); empty if it is not done. Raises DamagedFile."""
        file = self.frames_file(video)
        if not file.exists():
            return FRAME_SCHEMA.empty_table()
        try:
            return read_parquet(file.read_bytes(), FRAME_SCHEMA)
        except (pa.ArrowException, OSError) as error:
            raise DamagedFile(f"{file}: cannot be read ({error}); repeat the run's command: it is written again") from None


def open_run(path: str | Path) -> RunFiles[Any]:
    """The run folder of whichever kind its run.json names; of pairs where there is none."""
    folder = RunFolder(path)
    try:
        kind = json.loads(folder.settings.read_bytes()).get("kind")
    except (OSError, ValueError, AttributeError):
        kind = None
    return VideoRunFolder(path) if kind == KIND else folder
