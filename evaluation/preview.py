"""A short clip for a page: pictures -> a small MP4 that every browser plays."""

from __future__ import annotations

import io
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, Final

import numpy as np

from evaluation.report import Picture, thumbnail

SIDE: Final = 480  # px, longest side of one of the two pictures
_TICK: Final = Fraction(1, 1000)  # s
_EXACT: Final = {"flags": "+bitexact"}


def side_by_side(before: Picture, after: Picture) -> Picture:
    """Two RGB pictures of one size, beside each other, shrunk to at most `SIDE` px each; sides are even, as H.264 wants them."""
    scale = min(1.0, SIDE / max(before.shape[:2]))
    shrunk = [thumbnail(one, round(scale * max(one.shape[:2]))) for one in (before, after)]
    height, width = (size // 2 * 2 or 2 for size in shrunk[0].shape[:2])
    both = np.zeros((height, 2 * width + 4, 3), np.uint8)
    for place, one in zip((0, width + 4), shrunk, strict=True):
        rows, columns = min(height, one.shape[0]), min(width, one.shape[1])
        both[:rows, place : place + columns] = one[:rows, :columns]
    return both


def write_clip(pictures: Iterable[tuple[float, Picture]]) -> bytes:
    """(time in s, RGB (H, W, 3) uint8 with even sides), times ascending -> MP4 without sound; the same pictures give the same bytes."""
    import av

    data = io.BytesIO()
    with av.open(data, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream: Any = None
        begun = 0
        for time, picture in pictures:
            if stream is None:
                options = {"crf": "27", "preset": "veryfast", "threads": "1", **_EXACT}
                stream = container.add_stream("libx264", rate=1000, options=options)
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = "yuv420p"
                stream.codec_context.time_base = _TICK
                begun = round(time / _TICK)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time / _TICK) - begun, _TICK
            container.mux(stream.encode(frame))
        if stream is None:
            raise ValueError("a clip needs at least one picture")
        container.mux(stream.encode(None))
    return data.getvalue()
