"""Videos as users have them -> a table of their frames, and any stretch of frames in the decoder's own pixel format.

A frame is known by the sha256 of the video's bytes and its place in the order of presentation. The table is built once, by demuxing and
decoding the whole file: packets alone do not say which frames a decoder presents (edit lists, hidden frames, damage).
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.keys import digest, digest_bytes
from tasks.frame import hash_file
from tasks.planes import Colour, FormatError, PlanarFrame, Turn, pixel_format
from tasks.stage import ItemError, PassingError

if TYPE_CHECKING:
    from av.container import InputContainer

Int64 = npt.NDArray[np.int64]

# No playlist that opens other files, no picture that is read as a video of one frame, no text that is drawn.
_FORMATS: Final = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,"
    "h264,hevc,m4v,av1,obu,ivf,nut,mxf,gif,yuv4mpegpipe,dv,rm,wtv"
)
_COLUMNS: Final = ("pts", "packet", "check", "key_frame")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    lost_tail: float = 0.5  # s; a file whose header promises more than it holds by this much is refused as cut short
    max_pixels: int = 120_000_000  # px of a frame

    def __post_init__(self) -> None:
        if self.lost_tail <= 0 or self.max_pixels < 1:
            raise ValueError(f"lost_tail and max_pixels must be above 0, got {self.lost_tail} and {self.max_pixels}")


@dataclass(frozen=True)
class Track:
    """A stream that is not the video: sound or subtitles."""

    index: int
    kind: str  # audio or subtitle
    codec: str
    packets: int
    time_base: str  # s, a fraction
    start: str | None  # s, a fraction, of the first presented sample


@dataclass(frozen=True)
class Entry:
    """A packet at which decoding can begin."""

    packet: int  # number of the video packet in the file's order
    frame: int  # index of its frame
    pts: int | None
    dts: int | None
    pos: int | None  # byte
    size: int


@dataclass(frozen=True, eq=False)
class FrameTable:
    """What there is to know about a video before its frames are worked on."""

    sha256: str
    """Of the video's bytes."""
    container: str
    codec: str
    pixels: str
    """Pixel format of every frame."""
    width: int
    """px, coded."""
    height: int
    stream: int
    """Index of the video stream."""
    time_base: Fraction
    """s, of the file's own times."""
    tick: Fraction
    """s, of `pts`: the time base, or a part of it where repaired times need one."""
    rate: Fraction
    """Frames per second, nominal."""
    origin: Fraction
    """s, where the earliest stream begins."""
    pts: Int64
    """(T,) presentation times, ticks, strictly increasing."""
    last: int
    """Duration of the last frame, ticks."""
    packet: Int64
    """(T,) number of the video packet, in the file's order, that holds the frame."""
    check: npt.NDArray[np.uint32]
    """(T,) `PlanarFrame.check` of every frame."""
    key_frame: npt.NDArray[np.bool_]
    """(T,)"""
    entries: tuple[Entry, ...]
    tracks: tuple[Track, ...]
    colour: Colour = field(default_factory=Colour)
    matrix: tuple[int, ...] | None = None
    """Display matrix, 9 numbers."""
    sample_aspect: Fraction | None = None
    primaries: int = 2
    """AVColorPrimaries."""
    transfer: int = 2
    """AVColorTransferCharacteristic; 16 and 18 are HDR."""
    packets: int = 0
    """Video packets."""
    timed: bool = True
    """Every video packet has both times, and decoding times increase."""
    repaired: int = 0
    """Frames whose time was missing, a duplicate or backward."""
    damaged: int = 0
    """Packets that the decoder refused and frames that it marked as damaged."""
    lost_seconds: float = 0.0
    """What the header promises and the file does not hold."""
    dropped: tuple[str, ...] = field(default=())
    """Streams that no output carries: further pictures, data."""

    def __len__(self) -> int:
        return len(self.pts)

    @property
    def turn(self) -> Turn:
        return Turn.of_matrix(self.matrix)

    @property
    def size(self) -> tuple[int, int]:
        """Width, height px of the upright picture."""
        return (self.height, self.width) if self.turn.transpose else (self.width, self.height)

    @cached_property
    def duration(self) -> Fraction:
        """s, from the first frame's beginning to the last one's end."""
        return (int(self.pts[-1]) + self.last - int(self.pts[0])) * self.tick

    def frame_id(self, index: int) -> str:
        """The identity of a frame, 64 hex digits: the root input of whatever is made of it."""
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} was asked for but the video has {len(self)}")
        return digest(["video frame", self.sha256, index])

    def times(self, tick: Fraction) -> list[int]:
        """Presentation times relative to the earliest stream in whole ticks of an output, strictly increasing."""
        times: list[int] = []
        for pts in self.pts.tolist():
            time = round((pts * self.tick - self.origin) / tick)
            times.append(max(time, times[-1] + 1) if times else time)
        return times

    def to_arrow(self) -> pa.Table:
        """A row per frame; everything else is in the schema's metadata."""
        columns = {"frame": np.arange(len(self))} | {name: getattr(self, name) for name in _COLUMNS}
        facts = {name: value for name, value in vars(self).items() if name not in (*_COLUMNS, "duration")}
        facts |= {name: [asdict(row) for row in facts[name]] for name in ("entries", "tracks")} | {"colour": asdict(self.colour)}
        text = json.dumps(facts, default=str, sort_keys=True)
        return pa.table(columns).replace_schema_metadata({"e4s:video": text})

    @classmethod
    def from_arrow(cls, table: pa.Table) -> FrameTable:
        """The inverse of `to_arrow`."""
        facts: dict[str, Any] = json.loads(table.schema.metadata[b"e4s:video"])
        for name in ("time_base", "tick", "rate", "origin"):
            facts[name] = Fraction(facts[name])
        facts["sample_aspect"] = Fraction(facts["sample_aspect"]) if facts["sample_aspect"] else None
        facts["matrix"] = tuple(facts["matrix"]) if facts["matrix"] else None
        facts["entries"] = tuple(Entry(**row) for row in facts["entries"])
        facts["tracks"] = tuple(Track(**row) for row in facts["tracks"])
        facts |= {"colour": Colour(**facts["colour"]), "dropped": tuple(facts["dropped"])}
        return cls(**facts, **{name: table[name].to_numpy() for name in _COLUMNS})


def probe(path: str, config: ProbeConfig | None = None) -> FrameTable:
    """Demux and decode a video once, one frame in memory at a time, and describe its frames.

    Packets that cannot be decoded are counted in `damaged` and the rest goes on: what was never decoded is a gap in time. Raises ItemError
    for a file that is not a video, has no frame, a codec or pixel format that cannot be worked on, frames of several sizes, or that is
    cut short.
    """
    config = config or ProbeConfig()
    if not Path(path).is_file():
        raise PassingError(f"{path} is not a file: give the path of one video file.")
    sha256 = hash_file(path)
    with open_video(path) as container:
        stream = _video_stream(container)
        tracks = [other for other in container.streams if other.type in ("audio", "subtitle") and other.codec_context is not None]
        seen = _Seen(stream.codec_context.name, config.max_pixels)
        counts = dict.fromkeys((track.index for track in tracks), 0)
        first: dict[int, Fraction] = {}
        end = Fraction(0)
        for packet in container.demux():
            at = packet.pts if packet.pts is not None else packet.dts
            if at is not None and packet.size:
                first.setdefault(packet.stream.index, at * packet.time_base)
                end = max(end, (at + (packet.duration or 0)) * packet.time_base)
            if packet.stream.index == stream.index:
                seen.feed(packet)
            elif packet.stream.index in counts and packet.size:
                counts[packet.stream.index] += 1
        if not seen.raw:
            if seen.number:
                name = stream.codec_context.name
                raise ItemError(f"none of the video's {seen.number} packets could be decoded as {name}: export it again.")
            raise ItemError("the video has no frames: export it again.")
        frame = seen.first
        assert frame is not None
        time_base, rate = Fraction(stream.time_base), Fraction(stream.guessed_rate or stream.average_rate or 25)
        step = max(1, round(1 / rate / time_base))
        pts, refine, repaired = repair_times(seen.raw, step)
        lost = _lost_seconds(container, stream, end, first)
        if lost >= config.lost_tail:
            raise ItemError(
                f"the video is cut short: {float(lost):.1f} s at its end are missing ({len(pts)} frames are there): "
                "fetch it again, or raise lost_tail to work on what is there."
            )
        starts = {track.index: _start(track, first) for track in tracks}
        known = [start for start in starts.values() if start is not None]
        return FrameTable(
            sha256=sha256,
            container=container.format.name,
            codec=stream.codec_context.name,
            pixels=frame.format.name,
            width=frame.width,
            height=frame.height,
            stream=stream.index,
            time_base=time_base,
            tick=time_base / refine,
            rate=rate,
            origin=min([int(pts[0]) * time_base / refine, *known]),
            pts=pts,
            last=max(1, (seen.last_duration or step) * refine),
            packet=np.array(seen.packets, np.int64),
            check=np.array(seen.checks, np.uint32),
            key_frame=np.array(seen.keys, np.bool_),
            entries=seen.entries(),
            tracks=tuple(
                Track(t.index, t.type, t.codec_context.name, counts[t.index], str(t.time_base), _text(starts[t.index])) for t in tracks
            ),
            colour=frame.colour,
            matrix=seen.matrix,
            sample_aspect=Fraction(stream.sample_aspect_ratio) if stream.sample_aspect_ratio else None,
            primaries=int(stream.codec_context.color_primaries),
            transfer=int(stream.codec_context.color_trc),
            packets=seen.number,
            timed=seen.timed,
            repaired=repaired,
            damaged=seen.damaged,
            lost_seconds=float(lost),
            dropped=tuple(f"{o.type} {o.index}" for o in container.streams if o.index not in {stream.index, *counts}),
        )


def read_frames(path: str, table: FrameTable, start: int, stop: int) -> Iterator[PlanarFrame]:
    """Frames [start, stop) of a video as `probe` saw them, one in memory at a time.

    Decoding begins at the last entry before `start`; every frame's check is compared, and where one differs (an entry that is none: open
    groups of pictures, damage) the entry before is tried, at last the file's beginning. Raises PassingError if the file has changed.
    """
    if not 0 <= start <= stop <= len(table):
        raise ValueError(f"frames {start} to {stop} were asked for but the video has {len(table)}")
    entry = bisect.bisect_right([e.frame for e in table.entries], start) - 1
    while start < stop:
        with closing(_decode_from(path, table, entry)) as frames:
            for index, frame in frames:
                if index < start:
                    continue
                if index > start or frame.check() != int(table.check[index]):
                    break
                yield frame
                start += 1
                if start == stop:
                    return
        entry -= 1
        if entry < -1:
            raise PassingError(f"{path} was changed while running: leave the inputs alone during a run and start it again.")


class Playhead:
    """Reads a video forwards, stretch by stretch: where one goes on near the end of the one before, nothing is decoded twice."""

    _NEAR = 64  # frames that are rather decoded than sought

    def __init__(self, path: str, table: FrameTable) -> None:
        self._path, self._table = path, table
        self._reader: Iterator[PlanarFrame] = iter(())
        self._next = -1  # frame that the reader gives next
        self._last: PlanarFrame | None = None  # the one before it

    def frames(self, start: int, stop: int) -> Iterator[PlanarFrame]:
        """Frames [start, stop), as `read_frames`. One call at a time; the next may begin with the last frame of the one before."""
        if self._last is not None and start == self._next - 1 and start < stop:
            yield self._last
            start += 1
        if not 0 <= start - self._next <= self._NEAR or self._next < 0:
            self.close()
            self._reader, self._next = read_frames(self._path, self._table, start, len(self._table)), start
        while self._next < stop:
            self._last = next(self._reader)
            self._next += 1
            if self._next > start:
                yield self._last

    def close(self) -> None:
        """Close the file; reading may begin anew."""
        if isinstance(self._reader, Generator):
            self._reader.close()
        self._reader, self._next, self._last = iter(()), -1, None


def repair_times(raw: list[int | None], step: int) -> tuple[Int64, int, int]:
    """Times as the decoder gave them -> strictly increasing ones.

    As few as possible are changed (what is kept is a longest increasing subsequence); the others are spread evenly between their kept
    neighbours, at the ends in steps of `step`.

    Returns (times (T,) in parts of the input's tick, how many parts a tick has, how many times were changed).
    """
    kept = _longest_increasing(raw)
    if len(kept) == len(raw):
        return np.array(raw, np.int64), 1, 0
    if not kept:
        return np.arange(len(raw), dtype=np.int64) * step, 1, len(raw)
    known = [int(raw[index] or 0) for index in kept]
    steps = [(b - a) / (j - i) for i, j, a, b in zip(kept, kept[1:], known, known[1:], strict=False)]
    pace = max(1, round(float(np.median(steps)))) if steps else step
    parts = 1
    for i, j, a, b in zip(kept, kept[1:], known, known[1:], strict=False):
        parts = max(parts, -(-(j - i) // (b - a)))
    times = np.zeros(len(raw), np.int64)
    times[kept] = np.array(known, np.int64) * parts
    for i, j in itertools.pairwise(kept):
        gap = int(times[j] - times[i])
        for k in range(i + 1, j):
            times[k] = times[i] + gap * (k - i) // (j - i)
    for k in range(kept[0]):
        times[k] = times[kept[0]] - (kept[0] - k) * pace * parts
    for k in range(kept[-1] + 1, len(raw)):
        times[k] = times[kept[-1]] + (k - kept[-1]) * pace * parts
    return times, parts, len(raw) - len(kept)


def _longest_increasing(raw: list[int | None]) -> list[int]:
    """Indices of a longest strictly increasing subsequence of the known times; of several the one that ends first."""
    tails: list[int] = []
    ends: list[int] = []
    before = [-1] * len(raw)
    for index, time in enumerate(raw):
        if time is None:
            continue
        place = bisect.bisect_left(tails, time)
        before[index] = ends[place - 1] if place else -1
        if place == len(tails):
            tails.append(time)
            ends.append(index)
        elif place < len(tails) - 1 or time < tails[place]:
            tails[place], ends[place] = time, index
    chain: list[int] = []
    index = ends[-1] if ends else -1
    while index >= 0:
        chain.append(index)
        index = before[index]
    return chain[::-1]


class _Seen:
    """What demuxing and decoding the video stream showed."""

    def __init__(self, codec: str, max_pixels: int) -> None:
        self.codec, self.max_pixels = codec, max_pixels
        self.number = 0
        self.damaged = 0
        self.last_duration = 0
        self.timed = True
        self.raw: list[int | None] = []
        self.packets: list[int] = []
        self.checks: list[int] = []
        self.keys: list[bool] = []
        self.first: PlanarFrame | None = None
        self.matrix: tuple[int, ...] | None = None
        self._key_packets: dict[int, tuple[int | None, int | None, int | None, int]] = {}
        self._frame_of: dict[int, int] = {}
        self._decoding_time: int | None = None

    def feed(self, packet: Any) -> None:
        """Decode one packet (the last, empty one flushes)."""
        if packet.size:
            packet.opaque = self.number
            if packet.is_keyframe:
                self._key_packets[self.number] = packet.pts, packet.dts, packet.pos, packet.size
            self.number += 1
            late = packet.dts is not None and (self._decoding_time is None or packet.dts > self._decoding_time)
            self.timed &= packet.pts is not None and late
            self._decoding_time = packet.dts
            self.last_duration = packet.duration or self.last_duration
        frames, refused = decode_packet(packet)
        self.damaged += refused
        for frame in frames:
            planes = planar(frame, self.codec, self.max_pixels)
            if self.first is None:
                self.first, self.matrix = planes, _matrix(frame)
            elif (planes.format, planes.width, planes.height) != (self.first.format, self.first.width, self.first.height):
                now, then = (f"{p.width} x {p.height} px {p.format.name}" for p in (planes, self.first))
                raise ItemError(f"frame {len(self.raw)} is {now} but the video began with {then}: convert it to one size.")
            if frame.opaque in self._key_packets:
                self._frame_of.setdefault(frame.opaque, len(self.raw))
            self.damaged += bool(frame.is_corrupt)
            self.raw.append(frame.pts if frame.pts is not None else frame.dts)
            self.packets.append(frame.opaque if frame.opaque is not None else len(self.raw) - 1)
            self.checks.append(planes.check())
            self.keys.append(bool(frame.key_frame))

    def entries(self) -> tuple[Entry, ...]:
        found = [Entry(packet, frame, *self._key_packets[packet]) for packet, frame in self._frame_of.items()]
        return tuple(sorted(found, key=lambda entry: entry.frame))


def planar(frame: Any, codec: str = "", max_pixels: int = ProbeConfig.max_pixels) -> PlanarFrame:
    """A decoded frame of PyAV as planes of our own. Raises ItemError if its pixel format cannot be worked on."""
    if frame.width * frame.height > max_pixels:
        raise ItemError(f"the video has {frame.width} x {frame.height} px, more than the limit of {max_pixels} px: shrink it.")
    try:
        pixels = pixel_format(frame.format.name)
        colour = Colour(int(frame.colorspace), int(frame.color_range), centred=codec == "mjpeg")
        if "U" in pixels.components:
            colour.shares(frame.height)
    except FormatError as error:
        raise ItemError(f"{error}.") from None
    planes = []
    for plane, (rows, row_bytes) in zip(frame.planes, pixels.plane_shapes(frame.width, frame.height), strict=True):
        samples = np.frombuffer(plane, np.uint8)
        planes.append(samples[: rows * plane.line_size].reshape(rows, plane.line_size)[:, :row_bytes].copy())
    return PlanarFrame(pixels, frame.width, frame.height, tuple(planes), colour, Turn.of_matrix(_matrix(frame)))


def _matrix(frame: Any) -> tuple[int, ...] | None:
    """The display matrix that the container or the stream says."""
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    return None if data is None else tuple(np.frombuffer(data, "<i4")[:9].tolist())


def decode_packet(packet: Any) -> tuple[list[Any], int]:
    """(frames, 1 if the decoder refused the packet)."""
    import av

    try:
        return packet.decode(), 0
    except (av.error.InvalidDataError, av.error.UndefinedError, av.error.PatchWelcomeError, av.error.UnknownError, av.error.BugError):
        return [], 1
    except av.error.EOFError:
        return [], 0


def _decode_from(path: str, table: FrameTable, entry: int) -> Generator[tuple[int, PlanarFrame], None, None]:
    """(index, frame) in order of presentation from an entry on; entry -1 is the file's beginning."""
    by_place = {(e.pts, e.pos, e.size): e for e in table.entries}
    with open_video(path) as container:
        stream = _video_stream(container)
        begun: Entry | None = None
        if entry > 0:
            wanted = table.entries[entry]
            time = wanted.pts if wanted.pts is not None else wanted.dts
            try:
                container.seek(time or 0, stream=stream, backward=True)
            except (OSError, ValueError):  # a container without an index
                return
        number, index = 0, 0 if entry <= 0 else -1
        for packet in container.demux(stream):
            if packet.size:
                if entry > 0 and begun is None:
                    begun = by_place.get((packet.pts, packet.pos, packet.size)) if packet.is_keyframe else None
                    if begun is None or begun.frame > wanted.frame:
                        begun = None
                        continue
                    number = begun.packet
                packet.opaque = number
                number += 1
            for frame in decode_packet(packet)[0]:
                if index < 0:
                    assert begun is not None
                    if frame.opaque != begun.packet:
                        continue  # presented before the entry; may need pictures before it
                    index = begun.frame
                yield index, replace(planar(frame, table.codec), turn=table.turn)
                index += 1


@contextmanager
def open_video(path: str) -> Iterator[InputContainer]:
    """Open a video file; what FFmpeg refuses becomes a sentence. No other file and no address is opened, whatever the file says."""
    import av

    try:
        container = av.open(f"file:{path}", options={"protocol_whitelist": "file", "format_whitelist": _FORMATS})
    except (av.error.InvalidDataError, av.error.ArgumentError, av.error.DemuxerNotFoundError, av.error.EOFError) as error:
        raise ItemError(_not_a_video(path)) from error
    except OSError as error:
        raise PassingError(f"{path} cannot be read ({error.strerror}): correct its path or check the disk.") from None
    with container:
        yield container


def _not_a_video(path: str) -> str:
    with Path(path).open("rb") as file:
        head = file.read(12)
    if not head:
        return "the video file is empty: fetch or export it again."
    if head[4:8] == b"ftyp" or head[:4] in (b"\x1aE\xdf\xa3", b"RIFF"):
        return "the video is damaged or cut short (its index cannot be read): fetch or export it again."
    return "the file is not a video that can be read here: give an MP4, MOV, MKV, WebM, AVI, MPEG, FLV or OGG file."


def _video_stream(container: InputContainer) -> Any:
    """The video: not a cover picture; of several the one marked as default, else the first. One thread, so that damage decodes alike."""
    from av.stream import Disposition

    videos = [s for s in container.streams if s.type == "video" and not s.disposition & Disposition.attached_pic]
    if not videos:
        raise ItemError("the file has no video track: give a file with pictures.")
    stream = next((s for s in videos if s.disposition & Disposition.default), videos[0])
    if stream.codec_context is None:
        raise ItemError("the video uses a codec that cannot be decoded here: convert it to H.264.")
    stream.codec_context.thread_count = 1
    stream.codec_context.copy_opaque = True
    return stream


def _start(stream: Any, first: dict[int, Fraction]) -> Fraction | None:
    """When a stream begins to be presented, s."""
    return stream.start_time * Fraction(stream.time_base) if stream.start_time is not None else first.get(stream.index)


def _text(value: Fraction | None) -> str | None:
    return None if value is None else str(value)


def _lost_seconds(container: InputContainer, stream: Any, end: Fraction, first: dict[int, Fraction]) -> Fraction:
    """By how much the times that the header promises exceed those of the packets, s; 0 where a header is not to be relied on."""
    if not {"mov", "matroska", "avi"} & set(container.format.name.split(",")):
        return Fraction(0)
    promised = []
    if container.duration is not None:
        promised.append(Fraction(container.duration, 1_000_000) + Fraction(container.start_time or 0, 1_000_000))
    if stream.duration is not None:
        promised.append((stream.duration + (stream.start_time or 0)) * Fraction(stream.time_base))
    return max(Fraction(0), max(promised, default=end) - end) if first else Fraction(0)


def table_digest(table: FrameTable) -> str:
    """sha256 of all that the table says: equal tables of equal videos."""
    schema = table.to_arrow()
    columns = b"".join(np.ascontiguousarray(schema[name].to_numpy()).tobytes() for name in schema.column_names)
    return digest_bytes(columns + schema.schema.metadata[b"e4s:video"])
