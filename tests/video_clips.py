"""Small real videos for the tests, made by FFmpeg through PyAV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

MS = Fraction(1, 1000)


def picture(index: int, size: tuple[int, int], pixels: str, seed: int = 0, smooth: bool = False) -> av.VideoFrame:
    """A frame whose planes are noise, or moving ramps (`smooth`); another one for every index."""
    random = np.random.Generator(np.random.PCG64([seed, index]))
    frame = av.VideoFrame(*size, pixels)
    for number, plane in enumerate(frame.planes):
        memory = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        if smooth:
            rows, columns = np.indices(memory.shape)
            memory[:] = 60 + (columns * 2 + rows + 5 * index + 40 * number) % 120
        else:
            memory[:] = random.integers(16, 236, memory.shape)
            if "p10" in pixels or "gray10" in pixels:
                memory.view("<u2")[:] %= 1024
    return frame


def make_video(
    path: Path,
    times: Sequence[int],
    *,
    tick: Fraction = MS,
    size: tuple[int, int] = (34, 26),
    codec: str = "ffv1",
    pixels: str = "yuv420p",
    sound: Sequence[tuple[str, float]] = (),
    sound_from: float = 0.0,
    matrix: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    colour: tuple[int, int] = (2, 0),
    smooth: bool = False,
    seed: int = 0,
    format: str | None = None,
    shown: Callable[[int], np.ndarray] | None = None,
) -> Path:
    """A video with frames at `times` and sound tracks (codec, seconds); codecs that do not reorder may have times twice or backward.

    `shown` gives RGB pictures (H, W, 3) uint8 by index; without it noise or ramps are shown.
    """
    with av.open(str(path), "w", format=format) as container:
        stream: Any = container.add_stream(codec, rate=25, options={"threads": "1", **(options or {})})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.time_base = tick
        stream.time_base = tick
        stream.codec_context.colorspace, stream.codec_context.color_range = colour
        if matrix is not None:
            stream.set_display_matrix(matrix)
        tracks = [_sound(container, name, seconds) for name, seconds in sound]
        ordered = sorted(set(times)) == list(times)
        for index, time in enumerate(times):
            frame = picture(index, size, pixels, seed, smooth) if shown is None else av.VideoFrame.from_ndarray(shown(index), "rgb24")
            frame = frame.reformat(format=pixels)
            frame.pts, frame.time_base = (time if ordered else index), tick
            frame.colorspace, frame.color_range = colour
            for packet in stream.encode(frame):
                _mux(container, packet, times, tick, ordered)
            for track in tracks:
                track.write(until=float(time * tick), start=sound_from)
        for packet in stream.encode(None):
            _mux(container, packet, times, tick, ordered)
        for track in tracks:
            track.write(until=None, start=sound_from)
    return path


def _mux(container: Any, packet: Any, times: Sequence[int], tick: Fraction, ordered: bool) -> None:
    if not ordered:
        index = packet.pts
        packet.pts, packet.dts, packet.duration, packet.time_base = times[index], min(times) + index, 1, tick
    container.mux_one(packet)


class _sound:
    """A tone that is encoded as far as the video has come."""

    def __init__(self, container: Any, codec: str, seconds: float) -> None:
        self.container, self.rate = container, 48000
        self.stream = container.add_stream(codec, rate=self.rate, layout="mono")
        if codec.startswith("wma"):
            self.stream.bit_rate = 64_000  # its default has no room in one channel
        self.stream.codec_context.open()
        self.format = self.stream.codec_context.format.name
        self.length, self.done = round(seconds * self.rate), 0

    def write(self, until: float | None, start: float) -> None:
        block = self.stream.codec_context.frame_size or 1024
        end = self.length if until is None else min(self.length, round((until - start) * self.rate))
        while self.done < end and (until is None or self.done + block <= end):
            length = min(block, self.length - self.done)
            wave = 0.1 * np.sin(np.arange(self.done, self.done + length) / 30)
            kind, peak = {"flt": (np.float32, 1), "s16": (np.int16, 2**15), "s32": (np.int32, 2**31)}[self.format[:3]]
            wave = (wave * peak).astype(kind)
            frame = av.AudioFrame.from_ndarray(wave[None], format=self.format, layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = self.rate, self.done + round(start * self.rate), Fraction(1, self.rate)
            self.container.mux(self.stream.encode(frame))
            self.done += length
        if until is None:
            self.container.mux(self.stream.encode(None))


def packets(path: Path, kind: str, raw: bool = False) -> list[tuple[bytes, Fraction]]:
    """(bytes, presentation time in s) of every packet of every stream of that kind; `raw`: what edit lists hide as well."""
    with av.open(str(path), options={"ignore_editlist": "1"} if raw else {}) as container:
        streams = [stream for stream in container.streams if stream.type == kind]
        if not streams:
            return []
        return [(bytes(p), (p.pts if p.pts is not None else p.dts or 0) * p.time_base) for p in container.demux(streams) if p.size]


def frame_times(path: Path) -> list[Fraction]:
    """Presentation times of the decoded frames relative to the earliest stream, s."""
    with av.open(str(path)) as container:
        starts = [s.start_time * s.time_base for s in container.streams if s.start_time is not None and s.type == "audio"]
        times = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    origin = min([*starts, min(times)])
    return [time - origin for time in times]
