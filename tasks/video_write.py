"""Frames -> a video file with the input's times and sound: closed segments, encoded apart, then joined by copying packets.

Segments begin at fixed frame numbers (a grid of `EncodeConfig.gop` frames) and are encoded by an encoder of their own, so the file does not
depend on how frames were divided into chunks or on what was encoded before. Nothing about time, machine or tool versions is written.
"""

from __future__ import annotations

import errno
import heapq
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from storage.faults import fault_point
from tasks.graph import UsageError
from tasks.planes import PlanarFrame, padded, pixel_format
from tasks.stage import ItemError
from tasks.video import FrameTable, Track, open_video
from tasks.video_sound import Sound, convert_sound, converted_packets

if TYPE_CHECKING:
    from av.container import OutputContainer

Container = Literal["mp4", "mkv"]

_MUXERS: Final = {"mp4": "mp4", "mkv": "matroska"}
_IN_MP4: Final = {  # what players expect in MP4
    "video": {"h264", "hevc", "av1", "vp9", "mpeg4"},
    "audio": {"aac", "mp3", "mp3float", "ac3", "eac3", "alac", "opus", "libopus", "flac"},
    "subtitle": {"mov_text"},
}
_MKV_SUBTITLES: Final = {"subrip", "srt", "ass", "ssa", "webvtt", "pgssub", "hdmv_pgs_subtitle", "dvdsub", "dvd_subtitle"}
_EXACT: Final = {"fflags": "+bitexact"}
_EVEN: Final = {"libx264", "libx265", "libsvtav1", "libopenh264"}  # encoders that take whole chroma blocks only
_NO_SEI: Final = {"libx264": "filter_units=remove_types=6", "libx265": "filter_units=remove_types=39-40"}  # they name the encoder
_REORDER: Final = 2  # frames that a picture is encoded ahead of its turn at most: B-frames in a pyramid
_LEAD: Final = 64  # ms before the first frame of a segment file, where a millisecond stands for a frame


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    codec: str = "libx264"  # an encoder of FFmpeg
    quality: int = 18  # constant rate factor where the codec has one; 0 is best
    preset: str = "medium"  # where the codec has one
    pixel_format: str = "yuv420p"  # what every browser plays; "same": the input's
    gop: int = 48  # frames between key frames; chunks are made of whole groups
    b_frames: int = 2
    container: str = "auto"  # mp4, mkv, or auto: mp4 where it takes the codecs
    sound: str = "convert"  # what the container does not take becomes AAC; copy: its video fails; drop: it is left out
    options: tuple[tuple[str, str], ...] = ()  # further options of the encoder

    def __post_init__(self) -> None:
        if self.gop < 1 or not 0 <= self.quality <= 63 or not 0 <= self.b_frames <= 16:
            raise ValueError(f"gop must be at least 1, quality 0 to 63, b_frames 0 to 16, got {self.gop}, {self.quality}, {self.b_frames}")
        if self.container not in ("auto", *_MUXERS):
            raise ValueError(f"container must be auto, mp4 or mkv, got {self.container}")
        if self.sound not in ("convert", "copy", "drop"):
            raise ValueError(f"sound must be convert, copy or drop, got {self.sound}")


_NO_ENCODER: Final = "there is no video encoder {} here; choose libx264, libx265, libsvtav1, libvpx-vp9 or ffv1"
_WORST: Final = {"libx264": 51, "libx265": 51}  # constant rate factors


def chunk_ranges(frames: int, chunk: int, config: EncodeConfig) -> list[tuple[int, int]]:
    """Frame ranges [start, stop) of chunks of about `chunk` frames: whole groups of pictures, at least one."""
    if chunk < 1:
        raise ValueError(f"a chunk must have at least 1 frame, got {chunk}")
    size = -(-chunk // config.gop) * config.gop
    return [(start, min(start + size, frames)) for start in range(0, frames, size)]


def check_encoder(config: EncodeConfig) -> None:
    """Open the encoder as for a small picture. Raises UsageError if there is none of that name or it does not take the settings."""
    import av

    try:
        codec = av.Codec(config.codec, "w")
    except ValueError:
        codec = None
    if codec is None or codec.type != "video":
        raise UsageError(f"output.codec: {_NO_ENCODER.format(config.codec)}")
    worst = _WORST.get(config.codec, 63)
    if config.quality > worst:
        raise UsageError(f"output.quality must be 0 to {worst} for {config.codec}, got {config.quality}")
    wanted, offered = config.pixel_format, [each.name for each in codec.video_formats or ()]
    if wanted == "same":
        wanted = offered[0] if offered else "yuv420p"
    elif offered and wanted not in offered:
        raise UsageError(f"output.pixel_format: {config.codec} does not take {wanted}; choose same, {' or '.join(offered[:4])}")
    if config.container == "mp4" and codec.canonical_name not in _IN_MP4["video"]:
        raise UsageError(f"output.container: an MP4 file does not take {codec.canonical_name} video; choose auto or mkv, or codec libx264")
    context: Any = av.CodecContext.create(codec, "w")
    context.width = context.height = 64
    context.pix_fmt, context.time_base, context.options = wanted, Fraction(1, 25), _options(config)
    try:
        context.open()
    except av.error.FFmpegError as error:
        tried = f"preset {config.preset}, b_frames {config.b_frames}, options {dict(config.options)}"
        raise UsageError(f"output: {config.codec} does not take these settings ({error.strerror}): {tried}") from None


@dataclass(frozen=True)
class Delivery:
    """How an output will be written, known before any frame is worked on."""

    container: Container
    converted: tuple[Track, ...] = ()
    """Sound tracks that become AAC."""
    left_out: tuple[Track, ...] = ()
    """Sound tracks that the output lacks."""

    @property
    def notes(self) -> list[str]:
        """What is to be known of the output, a sentence per codec."""
        return [
            f"{what}: {codec} cannot be copied into {'Matroska' if not _is_in_mkv(codec) else 'MP4'}"
            for what, tracks in (("sound converted to AAC", self.converted), ("sound left out", self.left_out))
            for codec in dict.fromkeys(track.codec for track in tracks)
        ]


def deliver(table: FrameTable, config: EncodeConfig, *, copied: bool = False) -> Delivery:
    """Choose container and sound of an output: MP4 if it takes the video and all sound that some container takes, else Matroska.

    `copied`: the input's own video packets are kept. Raises ItemError where the settings allow no output.
    """
    codec = table.codec if copied else _codec_name(config.codec)
    wanted = "auto" if copied else config.container
    if wanted == "mp4" and codec not in _IN_MP4["video"]:
        raise ItemError(f"an MP4 file does not take {codec} video: choose container mkv or codec libx264.")
    audio = [track for track in table.tracks if track.kind == "audio"]
    possible = [track for track in audio if wanted == "mp4" or track.codec in _IN_MP4["audio"] or _is_in_mkv(track.codec)]
    fits = codec in _IN_MP4["video"] and (wanted == "mp4" or all(track.codec in _IN_MP4["audio"] for track in possible))
    container: Container = "mp4" if fits and wanted != "mkv" else "mkv"
    refused = tuple(track for track in audio if track.packets and not _takes(container, track.codec))
    if refused and config.sound == "copy":
        name = "MP4" if container == "mp4" and _is_in_mkv(refused[0].codec) else "Matroska"
        raise ItemError(f"the {refused[0].codec} sound cannot be copied into {name}: convert it to AAC (--set output.sound=convert).")
    return Delivery(container, converted=refused) if config.sound == "convert" else Delivery(container, left_out=refused)


def output_container(table: FrameTable, config: EncodeConfig) -> Container:
    """Return the container of an encoded output, see `deliver`."""
    return deliver(table, config).container


def copies_video(table: FrameTable) -> bool:
    """Return whether some container of ours takes the input's own video packets."""
    return table.codec in _IN_MP4["video"] or _is_in_mkv(table.codec)


def _takes(container: Container, codec: str) -> bool:
    return codec in _IN_MP4["audio"] if container == "mp4" else _is_in_mkv(codec)


@cache
def _is_in_mkv(decoder: str) -> bool:
    """Whether FFmpeg writes what a decoder of that name reads into Matroska."""
    import av

    with av.open(io.BytesIO(), "w", format="matroska") as container:
        return av.Codec(decoder, "r").canonical_name in container.supported_codecs


def encode_chunk(table: FrameTable, start: int, frames: Iterable[PlanarFrame], config: EncodeConfig) -> Iterator[bytes]:
    """Encode frames from `start` (on the grid) on; yields one closed segment per group of pictures, a Matroska file of its packets.

    One group is in memory at a time, compressed. Raises ItemError if the encoder refuses the frames.
    """
    if start % config.gop:
        raise ValueError(f"a chunk must begin at a multiple of {config.gop} frames, got {start}")
    source = iter(frames)
    for first in itertools.count(start, config.gop):
        group = list(itertools.islice(source, 1))
        if not group:
            return
        yield encode_group(table, first, itertools.chain(group, itertools.islice(source, config.gop - 1)), config)


def encode_group(table: FrameTable, first: int, frames: Iterable[PlanarFrame], config: EncodeConfig) -> bytes:
    """One closed group of pictures, frames `first` and following of the video, as a Matroska file: packet times are frame numbers."""
    import av

    data = io.BytesIO()
    try:
        with av.open(data, "w", format="matroska", options=_EXACT) as container:
            source = iter(frames)
            frame = next(source)
            target = _target(frame, config)
            stream = _encoder(container, table, frame, target, config)
            names: dict[int, int] = {}
            order = itertools.count()
            sei = _NO_SEI.get(config.codec)
            clean: Any = None

            def put(packets: Iterable[Any]) -> None:
                nonlocal clean
                for packet in packets:
                    if sei and clean is None:
                        clean = av.BitStreamFilterContext(sei, stream)
                    number, key = names[packet.pts], packet.is_keyframe
                    for kept in clean.filter(packet) if clean else [packet]:
                        kept.time_base = Fraction(1, 1000)
                        kept.pts, kept.dts, kept.duration = number + _LEAD, next(order), 1
                        kept.is_keyframe = key
                        kept.stream = stream
                        container.mux_one(kept)

            for index, each in enumerate(itertools.chain([frame], source)):
                if index == config.gop or first + index >= len(table):
                    raise ValueError(f"group {first}: more frames arrived than it has")
                picture = to_av(each, target, pad=config.codec in _EVEN)
                picture.pts = int(table.pts[first + index] - table.pts[first])
                picture.time_base = table.tick
                names[picture.pts * table.tick.numerator] = index
                picture.pts *= table.tick.numerator
                picture.time_base = stream.codec_context.time_base
                put(stream.encode(picture))
            put(stream.encode(None))
    except av.error.FFmpegError as error:
        raise ItemError(
            f"{config.codec} refuses {frame.width} x {frame.height} px {target} ({error.strerror}): choose another codec or pixel format."
        ) from error
    return data.getvalue()


def join(table: FrameTable, source: str, segments: Iterable[bytes], out: Path, config: EncodeConfig, sound: Sound | None = None) -> Path:
    """Join the segments of a whole video, in order, with the sound of `source`; returns the path, whose suffix follows the container.

    `sound` holds the tracks that are to be converted (see `deliver`); where it is not given they are converted now.
    The file appears under its name only when it is whole: written beside it, read back, synced, renamed. Raises ItemError if the segments
    do not make the whole video, OSError (ENOSPC, ...) if it cannot be written.
    """

    def video(container: OutputContainer, tick: Fraction, stack: ExitStack) -> tuple[Any, Iterator[tuple[Fraction, Any]]]:
        readers = (stack.enter_context(_segment(segment)) for segment in segments)
        first = next(readers, None)
        if first is None:
            raise ItemError("no segment was given: a video needs at least one.")
        stream = container.add_stream_from_template(first.streams.video[0], opaque=True)
        return stream, _joined(table, itertools.chain([first], readers), stream, tick)

    return _publish(table, source, out, deliver(table, config), sound, video)


def remux(table: FrameTable, source: str, out: Path, config: EncodeConfig | None = None, sound: Sound | None = None) -> Path:
    """A video with nothing to change: every packet of `source` as it is, in a container as `join` writes it; returns the path.

    `copies_video` says whether that is possible; sound is written as by `join`.
    """

    def video(container: OutputContainer, tick: Fraction, stack: ExitStack) -> tuple[Any, Iterator[tuple[Fraction, Any]]]:
        reader = stack.enter_context(open_video(source))
        template = reader.streams[table.stream]
        stream = container.add_stream_from_template(template, opaque=True)
        return stream, _copied(table, reader, template, stream, tick)

    return _publish(table, source, out, deliver(table, config or EncodeConfig(), copied=True), sound, video)


Video = Callable[["OutputContainer", Fraction, ExitStack], tuple[Any, Iterator[tuple[Fraction, Any]]]]
"""(container, tick, what to close) -> the added stream and its packets, each with its decoding time in s."""


def _publish(table: FrameTable, source: str, out: Path, delivery: Delivery, sound: Sound | None, video: Video) -> Path:
    import av

    kind = delivery.container
    if sound is None and delivery.converted:
        sound = convert_sound(source, table, delivery.converted)
    out = out.with_suffix(f".{kind}")
    tick = Fraction(1, table.tick.denominator) if kind == "mp4" else Fraction(1, 1000)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    options = _EXACT | ({"movflags": "+faststart", "movie_timescale": str(_movie_timescale(table, tick))} if kind == "mp4" else {})
    try:
        with ExitStack() as stack:
            container = stack.enter_context(av.open(f"file:{temporary}", "w", format=_MUXERS[kind], options=options))
            stream, packets = video(container, tick, stack)
            stream.time_base = tick
            if kind == "mp4" and stream.codec_context.name == "hevc":
                stream.codec_context.codec_tag = "hvc1"  # what Safari plays
            if table.matrix is not None:
                stream.set_display_matrix(table.matrix)
            audio = _sound(table, source, container, delivery, sound, stack)
            counts: dict[int, int] = {}
            for _, packet in heapq.merge(packets, *audio, key=lambda timed: timed[0]):
                counts[packet.stream.index] = counts.get(packet.stream.index, 0) + 1
                container.mux_one(packet)
                fault_point("mid-video")
        _check_whole(temporary, counts)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        fault_point("before-publish")
        temporary.replace(out)
        _sync_folder(out.parent)
    except av.error.FFmpegError as error:
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, os.strerror(error.errno), str(out)) from error
        raise ItemError(f"the video cannot be written ({error.strerror}): choose another codec or container.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return out


def _movie_timescale(table: FrameTable, tick: Fraction) -> int:
    """Ticks per second in which MP4 says how late a track begins: so fine that no start is rounded, where that is possible."""
    rates = [Fraction(track.time_base).denominator for track in table.tracks if track.kind == "audio"]
    common = lcm(tick.denominator, *rates)
    return common if common <= 1_000_000 else max(tick.denominator, 1000)


@contextmanager
def _segment(data: bytes) -> Iterator[Any]:
    import av

    with av.open(io.BytesIO(data), format="matroska") as container:
        yield container


def _joined(table: FrameTable, readers: Iterable[Any], stream: Any, tick: Fraction) -> Iterator[tuple[Fraction, Any]]:
    """Packets of all segments with the input's times.

    Decoding times are the presentation times in order, `_REORDER` frames earlier: they need not be known by the segments and do not
    depend on them.
    """
    times, ends = _times(table, tick)
    begun = 0
    extradata: bytes | None = None
    order = itertools.count()
    for reader in readers:
        codec = reader.streams.video[0].codec_context
        extradata = extradata if extradata is not None else codec.extradata
        if codec.extradata != extradata:
            raise ItemError("the segments were encoded with different settings: encode them again.")
        numbers = 0
        for packet in reader.demux(video=0):
            if not packet.size:
                continue
            number, place = begun + packet.pts - _LEAD, next(order)
            if not 0 <= number < len(times):
                break
            packet.stream, packet.time_base = stream, tick
            packet.pts, packet.duration = times[number], ends[number] - times[number]
            packet.dts = _decoding_time(times, ends, place - _REORDER)
            if packet.dts > packet.pts:
                raise ItemError(f"the encoder reorders by more than {_REORDER} frames: set b_frames to 2 or less.")
            numbers += 1
            yield packet.dts * tick, packet
        begun += numbers
    if begun != len(times):
        raise ItemError(f"the segments hold {begun} frames but the video has {len(times)}: encode what is missing.")


def _copied(table: FrameTable, reader: Any, template: Any, stream: Any, tick: Fraction) -> Iterator[tuple[Fraction, Any]]:
    """The input's own video packets with their own times; with the table's where those are not whole or had to be repaired."""
    own_times = table.timed and not table.repaired
    of_table = iter([] if own_times else _packet_times(table, tick))
    last: int | None = None
    for packet in reader.demux(template):
        if not packet.size:
            continue
        if own_times:
            packet.pts, packet.dts = (round((time * table.time_base - table.origin) / tick) for time in (packet.pts, packet.dts))
            packet.duration = round((packet.duration or 0) * table.time_base / tick)
        else:
            packet.pts, packet.dts, packet.duration = next(of_table)
        if last is not None and packet.dts <= last:  # rounding to a coarser tick
            packet.dts = last + 1
            packet.pts = max(packet.pts, packet.dts)
        last = packet.dts
        packet.stream, packet.time_base = stream, tick
        yield packet.dts * tick, packet


def _packet_times(table: FrameTable, tick: Fraction) -> list[tuple[int, int, int]]:
    """(presentation time, decoding time, duration) of every video packet, in the file's order, ticks.

    Decoding times are the presentation times in order, as much earlier as the file's own order needs.
    """
    times, ends = _times(table, tick)
    frame_of = dict(zip(table.packet.tolist(), range(len(times)), strict=True))
    ahead = max(packet - frame for packet, frame in frame_of.items())
    result = []
    for packet in range(table.packets):
        decode = _decoding_time(times, ends, packet - ahead)
        frame = frame_of.get(packet)
        result.append((decode, decode, 0) if frame is None else (times[frame], decode, ends[frame] - times[frame]))
    return result


def _times(table: FrameTable, tick: Fraction) -> tuple[list[int], list[int]]:
    """When frames begin and end, ticks of the output."""
    times = table.times(tick)
    return times, [*times[1:], times[-1] + max(1, round(table.last * table.tick / tick))]


def _decoding_time(times: list[int], ends: list[int], place: int) -> int:
    """The presentation time at that place in order; before the first and after the last frame it goes on at their pace."""
    if place < 0:
        return times[0] + place * (ends[0] - times[0])
    return times[place] if place < len(times) else ends[-1] + (place - len(times)) * (ends[-1] - times[-1])


def _sound(
    table: FrameTable, source: str, container: OutputContainer, delivery: Delivery, sound: Sound | None, stack: ExitStack
) -> list[Iterator[tuple[Fraction, Any]]]:
    """Add the tracks that the output has; returns their packets, of copied and of converted ones, times relative to the earliest stream."""
    import av

    reader = stack.enter_context(open_video(source))
    made = stack.enter_context(av.open(io.BytesIO(sound.data), format="nut")) if sound else None
    subtitles = _IN_MP4["subtitle"] if delivery.container == "mp4" else _MKV_SUBTITLES
    streams: dict[int, Any] = {}
    converted: dict[int, Any] = {}  # by their place among the converted ones
    for track in table.tracks:
        if track.packets and track not in delivery.left_out and (track.kind == "audio" or track.codec in subtitles):
            template = reader.streams[track.index]
            place = sound.tracks.index(track.index) if sound and track in delivery.converted else None
            try:
                added = container.add_stream_from_template(made.streams[place] if made and place is not None else template, opaque=True)
            except ValueError:
                if track.kind == "audio":
                    sentence = f"the {track.codec} sound cannot be copied into an .{delivery.container} file"
                    raise ItemError(f"{sentence}: leave it out by --set output.sound=drop.") from None
                continue
            added.metadata.update({name: value for name, value in template.metadata.items() if name in ("language", "title")})
            added.disposition = template.disposition
            if place is None:
                streams[track.index] = added
            else:
                converted[place] = added
    return [_sound_packets(table, reader, streams), converted_packets(made, converted)]


def _sound_packets(table: FrameTable, reader: Any, streams: dict[int, Any]) -> Iterator[tuple[Fraction, Any]]:
    if not streams:
        return
    shifts = {index: round(table.origin / Fraction(reader.streams[index].time_base)) for index in streams}
    following = dict.fromkeys(streams, 0)
    for packet in reader.demux([reader.streams[index] for index in streams]):
        if not packet.size:
            continue
        index = packet.stream.index
        known = packet.dts if packet.dts is not None else packet.pts
        packet.dts = following[index] if known is None else known - shifts[index]
        packet.pts = packet.dts if packet.pts is None else packet.pts - shifts[index]
        following[index] = packet.dts + (packet.duration or 0)
        packet.stream = streams[index]
        yield packet.dts * Fraction(packet.time_base), packet


def _check_whole(path: Path, counts: dict[int, int]) -> None:
    """Read the written file back: every packet must be in it."""
    import av

    found = dict.fromkeys(counts, 0)
    with av.open(f"file:{path}", options={"ignore_editlist": "1"} if path.suffixes[-2] == ".mp4" else {}) as container:
        for packet in container.demux():
            if packet.size:
                found[packet.stream.index] = found.get(packet.stream.index, 0) + 1
    if found != counts:
        raise OSError(errno.EIO, "the written video does not hold every packet", str(path))


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut; a file system that cannot is left alone."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _codec_name(encoder: str) -> str:
    """The codec that an encoder writes: libx264 -> h264. Raises ItemError for one that this FFmpeg does not have."""
    import av

    try:
        return str(av.Codec(encoder, "w").canonical_name)
    except ValueError:
        raise ItemError(f"{_NO_ENCODER.format(encoder)}.") from None


def _target(frame: PlanarFrame, config: EncodeConfig) -> str:
    """Pixel format of the output; "same" is the frame's, or one that the encoder takes and that holds the same samples."""
    import av
    from av.codec.codec import find_best_pix_fmt_of_list

    same = config.pixel_format == "same"
    wanted = frame.format.name.replace("yuvj", "yuv") if same else config.pixel_format  # the stream says the range, not the format
    formats = av.Codec(config.codec, "w").video_formats
    offered = [wanted] if formats is None else [each.name for each in formats]
    if wanted not in offered and same:
        best, loss = find_best_pix_fmt_of_list(offered, wanted, "A" in frame.format.components)
        wanted = best.name if best is not None and not loss else wanted
    if wanted not in offered:
        raise ItemError(f"{config.codec} does not take {wanted}: choose another pixel format, for instance yuv420p, or another codec.")
    return wanted


def _encoder(container: OutputContainer, table: FrameTable, frame: PlanarFrame, target: str, config: EncodeConfig) -> Any:
    """An output stream that encodes with one thread, without its own name in the packets."""
    stream: Any = container.add_stream(config.codec, rate=table.rate, options=_options(config))
    block = pixel_format(target).block if config.codec in _EVEN else (1, 1)
    stream.width, stream.height = (-(-size // step) * step for size, step in zip((frame.width, frame.height), block, strict=True))
    stream.pix_fmt = target
    context = stream.codec_context
    context.time_base = Fraction(1, table.tick.denominator)
    context.thread_count = 1
    context.colorspace, context.color_range = _written_colour(frame, target)
    context.color_primaries, context.color_trc = table.primaries, table.transfer
    if table.sample_aspect:
        context.sample_aspect_ratio = table.sample_aspect
    return stream


def _options(config: EncodeConfig) -> dict[str, str]:
    common = {"flags": "+bitexact", "threads": "1", "g": str(config.gop)}
    rate = {"crf": str(config.quality)}
    pyramid = {"bf": str(config.b_frames)}
    special = {
        "libx264": rate | pyramid | {"preset": config.preset, "x264-params": "cpu-independent=1"},
        "libx265": rate | pyramid | {"preset": config.preset, "x265-params": "pools=none:frame-threads=1:info=0:log-level=none"},
        "libvpx-vp9": rate | {"b": "0", "cpu-used": "4", "row-mt": "0"},
        "libsvtav1": rate | {"preset": config.preset if config.preset.isdigit() else "8", "svtav1-params": "lp=1"},
        "ffv1": {"level": "3", "slices": "4", "slicecrc": "1", "g": "1"},
        "mpeg4": pyramid | {"qscale": str(max(1, config.quality // 4))},
    }
    return common | special.get(config.codec, {}) | dict(config.options)


def _written_colour(frame: PlanarFrame, target: str) -> tuple[int, int]:
    """(AVColorSpace, AVColorRange) that the output says: the input's, unless it has to become Y, U, V first."""
    if target.startswith(("rgb", "bgr", "gbr")):
        return 0, 2
    if "R" in frame.format.components:
        return (6 if frame.height <= 576 else 1), 1
    full = frame.colour.is_full(frame.format)
    return frame.colour.matrix, 2 if full else frame.colour.range


def to_av(frame: PlanarFrame, target: str | None = None, pad: bool = False) -> Any:
    """A frame for PyAV's encoders: the same planes, bit for bit, if `target` is the frame's own pixel format, else converted.

    With `pad` odd sides grow to whole chroma blocks by repeating the edge.
    """
    import av
    from av.video.reformatter import Interpolation

    name = frame.format.name.replace("yuvj", "yuv")
    matrix, colour_range = _written_colour(frame, target or name)
    if pad:
        frame = padded(frame, pixel_format(target or name).block)
    picture = av.VideoFrame(frame.width, frame.height, name)
    for plane, samples in zip(picture.planes, frame.planes, strict=True):
        memory = np.frombuffer(memoryview(plane), np.uint8)
        memory[:] = 0
        memory[: len(samples) * plane.line_size].reshape(len(samples), plane.line_size)[:, : samples.shape[1]] = samples
    if target is not None and target != name:
        source_range = 2 if frame.colour.is_full(frame.format) else 1
        picture = picture.reformat(
            format=target,
            src_colorspace=matrix or frame.colour.matrix,
            dst_colorspace=matrix or frame.colour.matrix,
            src_color_range=source_range,
            dst_color_range=colour_range or source_range,
            interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT,
        )
    picture.colorspace, picture.color_range = matrix, colour_range
    return picture
