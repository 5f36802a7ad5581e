"""Sound tracks that the output's container does not take -> AAC, made before any frame is worked on."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final

from tasks.stage import ItemError
from tasks.video import FrameTable, Track, decode_packet, open_video

if TYPE_CHECKING:
    from av.container import OutputContainer

_REMEDY: Final = "convert it to AAC, or leave it out by --set output.sound=drop."
_BITS: Final = 96_000  # per second and channel
_LAYOUTS: Final = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}  # by the number of channels; others are mixed down
_LEAD: Final = 1  # s before the first sample in a sound file, whose times must not be negative: AAC begins with samples to be left out


@dataclass(frozen=True)
class Sound:
    """Converted sound tracks of a video."""

    tracks: tuple[int, ...]
    """Indices of the tracks in the video, in the order of the streams in `data`."""
    data: bytes
    """A NUT file of AAC packets; times are relative to the video's earliest stream, `_LEAD` later."""


def convert_sound(path: str, table: FrameTable, tracks: Sequence[Track]) -> Sound:
    """Encode sound tracks of a video as AAC; gaps are filled by silence, so that the sound stays with the picture.

    Raises ItemError for a track that cannot be decoded.
    """
    import av

    data = io.BytesIO()
    try:
        with open_video(path) as reader, av.open(data, "w", format="nut", options={"fflags": "+bitexact"}) as container:
            writers = {track.index: _Writer(container, table, track) for track in tracks}
            # All encoders are opened, by the first frames, before a packet is written.
            waiting: list[Any] = []
            for packet in reader.demux([reader.streams[index] for index in writers]):
                writer = writers[packet.stream.index]
                frames, _ = decode_packet(packet)
                waiting += [encoded for frame in frames for encoded in writer.encode(frame)]
                if all(each.stream for each in writers.values()):
                    container.mux(waiting)
                    waiting.clear()
            for writer in writers.values():
                waiting += writer.finish()
            container.mux(waiting)
    except (av.error.FFmpegError, ValueError) as error:
        raise ItemError(
            f"the sound cannot be converted to AAC ({error}): convert it, or leave it out by --set output.sound=drop."
        ) from error
    return Sound(tuple(track.index for track in tracks), data.getvalue())


class _Writer:
    """One track on its way: decoded frames -> samples without gaps -> AAC packets."""

    def __init__(self, container: OutputContainer, table: FrameTable, track: Track) -> None:
        self._container, self._origin, self._track = container, table.origin, track
        self.stream: Any = None
        self._following = 0  # time of the frame after the last one, as its own

    def encode(self, frame: Any) -> Iterator[Any]:
        """Packets that are ready after one more frame, PyAV's AudioFrame."""
        if self.stream is None:
            self._open(frame)
        if frame.pts is None:  # what a decoder gives when it is flushed
            frame.pts = self._following
        self._following = frame.pts + round(Fraction(frame.samples, frame.sample_rate) / frame.time_base)
        self._graph.push(frame)
        yield from self._drain()

    def finish(self) -> Iterator[Any]:
        """The last packets. Raises ItemError if there was no frame."""
        if self.stream is None:
            raise ItemError(f"the {self._track.codec} sound can neither be copied nor decoded: {_REMEDY}")
        self._graph.push(None)
        yield from self._drain()
        yield from self.stream.encode(None)

    def _open(self, frame: Any) -> None:
        import av
        from av.filter import Graph

        rates = sorted(av.Codec("aac", "w").audio_rates or [frame.sample_rate])
        rate = next((each for each in rates if each >= frame.sample_rate), rates[-1])
        layout = _LAYOUTS.get(frame.layout.nb_channels, "stereo")
        self.stream = self._container.add_stream("aac", rate=rate, layout=layout, options={"flags": "+bitexact", "threads": "1"})
        self.stream.bit_rate = _BITS * self.stream.codec_context.layout.nb_channels
        self.stream.time_base = self.stream.codec_context.time_base = Fraction(1, rate)
        self.stream.codec_context.open()
        self._rate = rate
        self._graph = Graph()
        steps = [
            self._graph.add_abuffer(
                format=frame.format.name, sample_rate=frame.sample_rate, layout=frame.layout.name, time_base=frame.time_base
            ),
            self._graph.add("aresample", "async=1"),
            self._graph.add("aformat", f"sample_fmts=fltp:sample_rates={rate}:channel_layouts={layout}"),
            self._graph.add("asetnsamples", f"n={self.stream.codec_context.frame_size}:p=0"),
            self._graph.add("abuffersink"),
        ]
        self._graph.link_nodes(*steps).configure()

    def _drain(self) -> Iterator[Any]:
        import av

        while True:
            try:
                frame: Any = self._graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            shift = round((_LEAD - self._origin) * self._rate)
            frame.pts = round(frame.pts * frame.time_base * self._rate) + shift
            frame.time_base = Fraction(1, self._rate)
            yield from self.stream.encode(frame)


def converted_packets(reader: Any, streams: Mapping[int, Any]) -> Iterator[tuple[Fraction, Any]]:
    """(decoding time in s, packet) of an opened `Sound.data`, for streams of an output by the number of those in it."""
    if not streams:
        return
    for packet in reader.demux([reader.streams[number] for number in streams]):
        if not packet.size:
            continue
        packet.pts -= round(_LEAD / packet.time_base)
        packet.dts = packet.pts
        packet.stream = streams[packet.stream.index]
        yield packet.dts * Fraction(packet.time_base), packet
