from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from video_clips import MS, frame_times, make_video, packets

import tasks.video
from tasks.graph import UsageError
from tasks.planes import PlanarFrame, paste_patch
from tasks.stage import ItemError, PassingError
from tasks.video import FrameTable, ProbeConfig, probe, read_frames, repair_times, table_digest
from tasks.video_write import (
    EncodeConfig,
    check_encoder,
    chunk_ranges,
    copies_video,
    deliver,
    encode_chunk,
    encode_group,
    join,
    output_container,
    remux,
)

EXACT = EncodeConfig(codec="ffv1", pixel_format="same", gop=5)
BROWSER = EncodeConfig(gop=5, preset="veryfast")
TURNED = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
CONSTANT = [40 * index for index in range(12)]
VARIABLE = [0, 40, 100, 133, 134, 1500, 1540, 2000, 2017, 2059, 2100]
Change = Callable[[int, PlanarFrame], PlanarFrame]


def rewrite(source: Path, out: Path, config: EncodeConfig, chunk: int = 10, change: Change = lambda index, frame: frame) -> Path:
    table = probe(str(source))

    def segments() -> Iterator[bytes]:
        for start, stop in chunk_ranges(len(table), chunk, config):
            frames = enumerate(read_frames(str(source), table, start, stop), start)
            yield from encode_chunk(table, start, (change(index, frame) for index, frame in frames), config)

    return join(table, str(source), segments(), out, config)


def assert_same_times(source: Path, out: Path) -> None:
    """Within one tick of the output; a track of MP4 whose start is hidden (AAC's priming) has it shown in MKV, and all is later by that."""
    tick = probe(str(out)).time_base
    before, after = frame_times(source), frame_times(out)
    assert len(before) == len(after)
    hidden = Fraction(1024, 48000) if out.suffix == ".mkv" and source.suffix in (".mp4", ".mov") and sounds(source) else 0
    assert max(abs(a + hidden - b) for a, b in zip(before, after, strict=True)) <= tick


def sounds(path: Path) -> list[bytes]:
    return [data for data, _ in packets(path, "audio")]


CLIPS = {
    "constant.mkv": {"times": CONSTANT, "sound": [("aac", 0.48)]},
    "variable.mkv": {"times": VARIABLE, "sound": [("aac", 2.1)]},
    "silent.mkv": {"times": VARIABLE},
    "two_tracks.mkv": {"times": CONSTANT, "sound": [("aac", 0.5), ("libopus", 0.4)]},
    "long_sound.mkv": {"times": CONSTANT, "sound": [("aac", 1.5)]},
    "short_sound.mkv": {"times": CONSTANT, "sound": [("aac", 0.2)]},
    "late_sound.mkv": {"times": CONSTANT, "sound": [("flac", 0.4)], "sound_from": 0.137},
    "late_video.mkv": {"times": [217 + time for time in CONSTANT], "sound": [("flac", 0.6)]},
    "fine.mov": {"times": [1001 * index for index in range(12)], "tick": Fraction(1, 24000), "codec": "libx264", "sound": [("aac", 0.5)]},
    "reordered.mp4": {"times": CONSTANT, "codec": "libx264", "options": {"bf": "3", "g": "6"}, "sound": [("aac", 0.5)], "smooth": True},
    "stream.ts": {"times": [3003 * i for i in range(12)], "tick": Fraction(1, 90000), "codec": "libx264", "sound": [("mp2", 0.5)]},
    "odd_start.ts": {
        "times": [3003 * index + 1234 for index in range(12)],
        "tick": Fraction(1, 90000),
        "codec": "libx264",
        "sound": [("mp3", 0.5)],
    },
    "old.avi": {"times": list(range(12)), "tick": Fraction(1, 25), "codec": "mpeg4", "sound": [("mp3", 0.5)]},
    "web.webm": {"times": CONSTANT, "codec": "libvpx-vp9", "sound": [("libopus", 0.5)]},
    "one.mp4": {"times": [0], "codec": "libx264"},
    "odd.mkv": {"times": CONSTANT, "size": (33, 25)},
    "turned.mp4": {"times": CONSTANT, "codec": "libx264", "matrix": TURNED},
    "deep.mkv": {"times": CONSTANT, "pixels": "yuv422p10le"},
    "gray.mkv": {"times": CONSTANT, "pixels": "gray"},
    "rgb.mkv": {"times": CONSTANT, "pixels": "bgr0"},
    "full_range.mkv": {"times": CONSTANT, "colour": (1, 2)},
}


@pytest.fixture(params=CLIPS)
def clip(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_video(tmp_path / request.param, **CLIPS[request.param])


def test_one_frame_out_for_one_in_at_the_same_time_with_the_same_sound(clip: Path, tmp_path: Path) -> None:
    for config in (EXACT, BROWSER):
        out = rewrite(clip, tmp_path / "out" / clip.name, config)
        before, after = probe(str(clip)), probe(str(out))
        assert_same_times(clip, out) if "mp4" in out.name or before.container.startswith("mat") else None
        assert len(after) == len(before)
        assert sounds(out) == sounds(clip)
        assert after.matrix == before.matrix
        if config is EXACT:
            assert (after.check == before.check).all()
            assert after.size == before.size
            views = [next(read_frames(str(path), table, 0, 1)).rgb8() for path, table in ((clip, before), (out, after))]
            assert (views[0] == views[1]).all()
        assert not list(out.parent.glob(".*"))


def test_a_video_without_a_face_is_copied_packet_by_packet(clip: Path, tmp_path: Path) -> None:
    before = probe(str(clip))
    out = remux(before, str(clip), tmp_path / "out" / clip.name)
    after = probe(str(out))
    assert (after.check == before.check).all()
    assert sounds(out) == sounds(clip)
    if clip.suffix != ".ts":  # start codes become lengths
        assert [data for data, _ in packets(out, "video", raw=True)] == [data for data, _ in packets(clip, "video", raw=True)]
    assert_same_times(clip, out)


@pytest.mark.parametrize("name", ["constant.mkv", "variable.mkv", "deep.mkv", "odd.mkv"])
def test_outside_the_mask_planes_reach_the_file_bit_for_bit(name: str, tmp_path: Path) -> None:
    clip = make_video(tmp_path / name, **CLIPS[name])
    patch, weights = np.full((9, 9, 3), 200, np.uint8), np.ones((9, 9), np.float32)
    out = rewrite(clip, tmp_path / "out.mkv", EXACT, change=lambda index, frame: paste_patch(frame, patch, weights, 5 + index, 6))
    before, after = probe(str(clip)), probe(str(out))
    pairs = zip(read_frames(str(clip), before, 0, len(before)), read_frames(str(out), after, 0, len(after)), strict=True)
    for index, (old, new) in enumerate(pairs):
        left = 5 + index
        for role, c in old.format.components.items():
            kept = np.ones(old.component(role).shape, bool)
            kept[6 // c.down : -(-15 // c.down), left // c.across : -(-(left + 9) // c.across)] = False
            assert (old.component(role)[kept] == new.component(role)[kept]).all()
            assert (old.component(role)[~kept] != new.component(role)[~kept]).any()


@pytest.mark.parametrize("config", [EXACT, BROWSER])
def test_the_file_does_not_depend_on_chunks(config: EncodeConfig, tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mkv", [40 * index for index in range(53)], smooth=True, sound=[("flac", 2.2)])
    files = [rewrite(clip, tmp_path / f"out{chunk}.mkv", config, chunk).read_bytes() for chunk in (10, 25, 1000)]
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("config", [EXACT, BROWSER, EncodeConfig(codec="libx265", preset="ultrafast"), EncodeConfig(codec="libvpx-vp9")])
def test_no_time_and_no_tool_is_named(config: EncodeConfig, tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mkv", CONSTANT, size=(64, 48))
    out = rewrite(clip, tmp_path / "out.mkv", config)
    data = out.read_bytes()
    assert not re.findall(rb"x26[45]|Lavc|Lavf\d|libvpx", data)
    with av.open(str(out)) as container:
        assert "creation_time" not in container.metadata | container.streams.video[0].metadata
    assert rewrite(clip, tmp_path / "again.mkv", config).read_bytes() == data


def test_chunks_are_whole_groups() -> None:
    assert chunk_ranges(100, 10, EncodeConfig(gop=48)) == [(0, 48), (48, 96), (96, 100)]
    assert chunk_ranges(11, 10, EncodeConfig(gop=5)) == [(0, 10), (10, 11)]
    with pytest.raises(ValueError, match="at least 1 frame"):
        chunk_ranges(5, 0, EncodeConfig())


def test_what_a_browser_plays(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mkv", CONSTANT, pixels="yuv444p", size=(65, 49), sound=[("aac", 0.5)])
    out = rewrite(clip, tmp_path / "out.mkv", EncodeConfig(gop=5))
    assert out.name == "out.mp4"
    data = out.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.width, stream.height) == ("h264", "yuv420p", 66, 50)
        keys = [index for index, frame in enumerate(container.decode(stream)) if frame.key_frame]
        assert set(keys) >= {0, 5, 10}


def test_sound_that_mp4_does_not_take_makes_it_mkv(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mkv", CONSTANT, sound=[("aac", 0.5), ("pcm_s16le", 0.4)])
    out = rewrite(clip, tmp_path / "out.mp4", BROWSER)
    assert out.name == "out.mkv"
    assert sounds(out) == sounds(clip)
    assert output_container(probe(str(clip)), BROWSER) == "mkv"
    assert output_container(probe(str(clip)), EXACT) == "mkv"


def test_codecs_that_no_container_of_ours_takes(tmp_path: Path) -> None:
    table = probe(str(make_video(tmp_path / "clip.mkv", CONSTANT)))
    refused = ("wmv1", "wmv2", "wmv3", "flv", "h263", "huffyuv", "ffvhuff", "cinepak", "qtrle", "dvvideo")
    taken = ("h264", "hevc", "vp8", "vp9", "mpeg4", "mpeg2video", "mjpeg", "ffv1", "theora", "prores", "libdav1d")
    assert [codec for codec in (*refused, *taken) if not copies_video(replace(table, codec=codec))] == list(refused)


UNCOPYABLE = {
    "a.wmv": ("wmv2", "wmav2"),
    "b.avi": ("mpeg4", "adpcm_ima_wav"),
    "c.mov": ("qtrle", "pcm_alaw"),
    "d.avi": ("mpeg4", "adpcm_ms"),
}


@pytest.mark.parametrize("name", UNCOPYABLE)
@pytest.mark.parametrize("config", [EXACT, BROWSER])
def test_sound_that_cannot_be_copied_becomes_aac_at_its_time(name: str, config: EncodeConfig, tmp_path: Path) -> None:
    codec, sound = UNCOPYABLE[name]
    clip = make_video(
        tmp_path / name,
        range(40),
        tick=Fraction(1, 25),
        codec=codec,
        pixels="rgb24" if codec == "qtrle" else "yuv420p",
        size=(64, 48),
        sound=[(sound, 1.2)],
        sound_from=0.4,
        smooth=True,
        format="asf" if name == "a.wmv" else None,
    )
    table = probe(str(clip))
    delivery = deliver(table, config)
    assert (delivery.container, [track.codec for track in delivery.converted]) == ("mp4" if config is BROWSER else "mkv", [sound])
    assert delivery.notes == [f"sound converted to AAC: {sound} cannot be copied into Matroska"]
    out = rewrite(clip, tmp_path / "out.mkv", config)
    assert out.suffix == f".{delivery.container}"
    (pitch, begin, end), heard_now = heard(clip), heard(out)
    assert heard_now == (pytest.approx(pitch, rel=0.01), pytest.approx(begin, abs=0.03), pytest.approx(end, abs=0.03))
    assert begin > 0.3 or name.endswith(".avi")  # which cannot say that a track begins later
    copy, drop = replace(config, sound="copy"), replace(config, sound="drop")
    with pytest.raises(ItemError, match=f"the {sound} sound cannot be copied into Matroska"):
        deliver(table, copy)
    assert deliver(table, drop).notes == [f"sound left out: {sound} cannot be copied into Matroska"]
    assert not sounds(rewrite(clip, tmp_path / "silent.mkv", drop))


def heard(path: Path) -> tuple[float, float, float]:
    """Pitch of the tone, Hz, and when it begins and ends, s after the first frame of the video."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    with av.open(str(path)) as container:
        first = next(container.decode(video=0))
    to_mono = av.AudioResampler("flt", "mono", 48000)
    parts = [part.to_ndarray()[0] for frame in [*frames, None] for part in to_mono.resample(frame)]
    wave = np.concatenate(parts)
    loud = np.flatnonzero(np.abs(wave) > 0.05)
    ahead = float(frames[0].pts * frames[0].time_base - first.pts * first.time_base)
    tone = wave[loud[0] : loud[-1]]
    return np.abs(np.fft.rfft(tone)).argmax() * 48000 / len(tone), ahead + loud[0] / 48000, ahead + loud[-1] / 48000


def test_mp4_that_is_wanted_takes_other_sound_as_aac(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mkv", CONSTANT, sound=[("aac", 0.5), ("pcm_s16le", 0.4)])
    delivery = deliver(probe(str(clip)), replace(BROWSER, container="mp4"))
    assert delivery.notes == ["sound converted to AAC: pcm_s16le cannot be copied into MP4"]
    out = rewrite(clip, tmp_path / "out.mkv", replace(BROWSER, container="mp4"))
    assert out.name == "out.mp4"
    assert [track.codec for track in probe(str(out)).tracks] == ["aac", "aac"]
    assert len(set(sounds(clip)) & set(sounds(out))) >= 20  # the first track is copied


@pytest.mark.parametrize("times", [[0, 40, 40, 120, 160], [0, 40, 120, 80, 160, 200], [10, 50, 51, 51, 52]])
def test_duplicate_and_backward_times_are_repaired_and_counted(times: list[int], tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mkv", times)
    table = probe(str(clip))
    assert table.repaired == 1
    assert (np.diff(table.pts) > 0).all()
    for out in (
        rewrite(clip, tmp_path / "out.mkv", EXACT),
        rewrite(clip, tmp_path / "out.mp4", BROWSER),
        remux(table, str(clip), tmp_path / "r"),
    ):
        after = probe(str(out))
        assert len(after) == len(times)
        assert after.repaired == 0
        written = [pts * after.tick for pts in after.pts.tolist()]
        expected = [pts * table.tick - table.origin for pts in table.pts.tolist()]
        assert max(abs(a - b) for a, b in zip(written, expected, strict=True)) <= after.tick
        good = [i for i, time in enumerate(times) if time * MS - table.origin == expected[i]]
        assert len(good) == len(times) - 1


def test_repair_changes_as_few_times_as_possible() -> None:
    def repaired(raw: list[int | None], step: int = 10) -> tuple[list[int], int, int]:
        times, parts, count = repair_times(raw, step)
        return times.tolist(), parts, count

    assert repaired([0, 10, 25]) == ([0, 10, 25], 1, 0)
    assert repaired([0, 10, 10, 30]) == ([0, 10, 20, 30], 1, 1)
    assert repaired([0, 1000, 20, 30]) == ([0, 10, 20, 30], 1, 1)
    assert repaired([0, None, 20]) == ([0, 10, 20], 1, 1)
    assert repaired([None, None, None]) == ([0, 10, 20], 1, 3)
    assert repaired([5, 6, 6, 7]) == ([10, 12, 13, 14], 2, 1)  # no tick between 6 and 7: ticks are halved
    assert repaired([0, 10, 20, 0, 10, 20]) == ([0, 10, 20, 30, 40, 50], 1, 3)
    assert repaired([50, 0, 10, 20]) == ([-10, 0, 10, 20], 1, 1)


def test_any_stretch_is_read_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open groups of pictures: frames before a key frame need the group before. No stretch needs a second attempt."""
    begun: list[int] = []
    decode_from = tasks.video._decode_from
    monkeypatch.setattr(tasks.video, "_decode_from", lambda *arguments: begun.append(arguments[2]) or decode_from(*arguments))
    clip = make_video(
        tmp_path / "clip.mkv",
        [40 * index for index in range(40)],
        codec="libx264",
        smooth=True,
        options={"bf": "3", "g": "8", "x264-params": "open-gop=1:scenecut=0"},
    )
    table = probe(str(clip))
    assert len(table.entries) > 3
    for start, stop in ((0, 40), (7, 9), (8, 8), (15, 20), (22, 31), (39, 40)):
        begun.clear()
        frames = list(read_frames(str(clip), table, start, stop))
        assert [frame.check() for frame in frames] == table.check[start:stop].tolist()
        assert len(begun) == (start < stop)
    with pytest.raises(ValueError, match="the video has 40"):
        next(read_frames(str(clip), table, 0, 41))


def test_a_refused_packet_is_counted_and_leaves_a_gap(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mkv", CONSTANT)
    with av.open(str(clip)) as source, av.open(str(tmp_path / "gap.mkv"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0], opaque=True)
        for index, packet in enumerate(source.demux(video=0)):
            if packet.size:
                copy = av.Packet(b"\0\1\2" if index == 5 else bytes(packet))
                copy.pts, copy.dts, copy.time_base, copy.stream = packet.pts, packet.dts, packet.time_base, stream
                copy.is_keyframe = packet.is_keyframe
                out.mux_one(copy)
    table = probe(str(tmp_path / "gap.mkv"))
    assert (table.damaged, table.packets, table.repaired) == (1, 12, 0)
    assert table.pts.tolist() == [time for time in CONSTANT if time != 200]
    out = probe(str(rewrite(tmp_path / "gap.mkv", tmp_path / "out.mp4", BROWSER)))
    assert [pts * out.tick for pts in out.pts.tolist()] == [time * MS for time in CONSTANT if time != 200]


def test_an_entry_that_is_none_costs_time_not_frames(tmp_path: Path) -> None:
    clip = make_video(
        tmp_path / "clip.mkv", [40 * i for i in range(30)], codec="libx264", smooth=True, options={"g": "10", "sc_threshold": "0"}
    )
    table = probe(str(clip))
    wrong = replace(table, entries=(*table.entries[:2], replace(table.entries[2], frame=18)))
    frames = list(read_frames(str(clip), wrong, 19, 23))
    assert [frame.check() for frame in frames] == table.check[19:23].tolist()


def test_reading_starts_at_the_key_frame_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = make_video(
        tmp_path / "clip.mkv", [40 * i for i in range(30)], codec="libx264", smooth=True, options={"g": "10", "sc_threshold": "0"}
    )
    table = probe(str(clip))
    decoded = []
    original = tasks.video.planar
    monkeypatch.setattr(tasks.video, "planar", lambda *arguments: decoded.append(1) or original(*arguments))
    assert len(list(read_frames(str(clip), table, 22, 24))) == 2
    assert len(decoded) == 4


def test_a_video_that_changed_is_noticed(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mkv", CONSTANT)
    table = probe(str(clip))
    make_video(clip, CONSTANT, seed=1)
    with pytest.raises(PassingError, match="was changed while running"):
        list(read_frames(str(clip), table, 3, 5))


def test_the_table_survives_parquet_and_names_frames_by_content(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mkv", CONSTANT, size=(32, 24), sound=[("aac", 0.5)], matrix=TURNED)
    table = probe(str(clip))
    again = FrameTable.from_arrow(table.to_arrow())
    assert table_digest(again) == table_digest(table)
    assert {name: value for name, value in vars(again).items() if not isinstance(value, np.ndarray)} == {
        name: value for name, value in vars(table).items() if not isinstance(value, np.ndarray)
    }
    assert table.duration == Fraction(12 * 40, 1000)
    copy = tmp_path / "copy.mkv"
    copy.write_bytes(clip.read_bytes())
    assert probe(str(copy)).frame_id(3) == table.frame_id(3) != table.frame_id(4)
    with pytest.raises(IndexError, match="the video has 12"):
        table.frame_id(12)


@pytest.fixture
def h264(tmp_path: Path) -> Path:
    times = [40 * index for index in range(50)]
    return make_video(tmp_path / "clip.mkv", times, size=(64, 48), codec="libx264", options={"g": "10"}, sound=[("aac", 2.0)])


def refused(path: Path) -> str:
    with pytest.raises(ItemError) as caught:
        probe(str(path))
    sentence = str(caught.value)
    assert sentence.count("\n") == 0
    return sentence


def test_what_is_not_a_video_gets_one_sentence(tmp_path: Path, h264: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"")
    assert refused(bad) == "the video file is empty: fetch or export it again."
    bad.write_text("hello\n" * 1000)
    assert "is not a video" in refused(bad)
    bad.write_text(f"#EXTM3U\n#EXTINF:1,\n{h264}\n")
    assert "is not a video" in refused(bad)
    bad.write_bytes((Path(__file__).parents[2] / "docs" / "demo.jpg").read_bytes())
    assert "is not a video" in refused(bad)
    bad.write_bytes(h264.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/XYZ"))
    assert "uses a codec that cannot be decoded" in refused(bad)
    with av.open(str(bad), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert "has no video track" in refused(bad)
    for path in (tmp_path / "gone.mp4", tmp_path):
        with pytest.raises(PassingError, match="is not a file"):
            probe(str(path))


def test_a_pixel_format_without_samples_is_refused(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.nut", list(range(3)), tick=Fraction(1, 25), codec="rawvideo", pixels="monow")
    assert refused(clip) == "the pixel format monow cannot be worked on: convert the video to yuv420p."


def test_a_file_that_is_cut_short_is_refused_unless_asked_for(h264: Path) -> None:
    data = h264.read_bytes()
    h264.write_bytes(data[: len(data) // 2])
    sentence = refused(h264)
    assert sentence.startswith("the video is cut short: 1.0 s at its end are missing (25 frames are there)")
    table = probe(str(h264), ProbeConfig(lost_tail=100))
    assert len(table) == 25
    assert len(list(read_frames(str(h264), table, 20, 25))) == 5


def test_an_mp4_that_is_cut_short(h264: Path, tmp_path: Path) -> None:
    whole = remux(probe(str(h264)), str(h264), tmp_path / "whole.mp4")
    data = whole.read_bytes()
    (tmp_path / "tail.mp4").write_bytes(data[: len(data) // 2])
    assert "is cut short" in refused(tmp_path / "tail.mp4")
    (tmp_path / "head.mp4").write_bytes(data[: data.index(b"moov")])
    assert "damaged or cut short" in refused(tmp_path / "head.mp4")


def test_damage_is_counted_and_the_rest_passes(h264: Path, tmp_path: Path) -> None:
    data = bytearray(h264.read_bytes())
    for place in np.random.default_rng(1).integers(3000, len(data) - 3000, 20):
        data[place] ^= 0xFF
    h264.write_bytes(bytes(data))
    table = probe(str(h264))
    assert table.damaged > 0
    assert 40 <= len(table) <= 50
    out = rewrite(h264, tmp_path / "out.mkv", EXACT)
    assert (probe(str(out)).check == table.check).all()


def test_nothing_decodable_and_no_frames(h264: Path, tmp_path: Path) -> None:
    with av.open(str(h264)) as source, av.open(str(tmp_path / "noise.mkv"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0], opaque=True)
        for index in range(3):
            packet = av.Packet(b"\x00\x00\x00\x02\x1f\xff")
            packet.pts = packet.dts = 40 * index
            packet.time_base, packet.stream = MS, stream
            out.mux_one(packet)
    assert refused(tmp_path / "noise.mkv") == "none of the video's 3 packets could be decoded as h264: export it again."
    with av.open(str(h264)) as source, av.open(str(tmp_path / "none.mkv"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0], opaque=True)
        sound = out.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            packet.stream = sound
            if packet.size:
                out.mux_one(packet)
    assert refused(tmp_path / "none.mkv") == "the video has no frames: export it again."


def test_wrong_settings_get_one_sentence(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mkv", CONSTANT)
    table = probe(str(clip))
    frame = next(read_frames(str(clip), table, 0, 1))
    with pytest.raises(ItemError, match="there is no video encoder libx999"):
        output_container(table, EncodeConfig(codec="libx999"))
    with pytest.raises(ItemError, match="libx264 does not take rgb24"):
        encode_group(table, 0, [frame], EncodeConfig(pixel_format="rgb24"))
    with pytest.raises(ItemError, match="MP4 file does not take ffv1"):
        output_container(table, EncodeConfig(codec="ffv1", container="mp4"))
    with pytest.raises(ValueError, match="quality 0 to 63"):
        EncodeConfig(quality=99)
    with pytest.raises(ValueError, match="multiple of 5"):
        next(encode_chunk(table, 3, [frame], EXACT))
    segments = list(encode_chunk(table, 0, read_frames(str(clip), table, 0, 10), EXACT))
    with pytest.raises(ItemError, match="hold 10 frames but the video has 12"):
        join(table, str(clip), segments, tmp_path / "out.mkv", EXACT)
    assert not (tmp_path / "out.mkv").exists()
    assert not list(tmp_path.glob(".*"))


FILL = """
import resource, signal, sys
from pathlib import Path
from tasks.video import probe
from tasks.video_write import remux
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
table = probe(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    remux(table, sys.argv[1], Path(sys.argv[2]))
except OSError as error:
    print(error.errno, error.filename)
"""


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_a_full_disk_leaves_nothing_behind(container: str, tmp_path: Path) -> None:
    """The kernel's limit on file sizes stands for the disk: the write fails the same way, with another number."""
    sound = [("aac", 2.0)] if container == "mp4" else [("pcm_s16le", 2.0)]
    clip = make_video(tmp_path / "clip.mkv", [40 * i for i in range(50)], codec="libx264", size=(64, 48), sound=sound)
    folder = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", FILL, str(clip), str(folder / "out.mp4")], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(errno.EFBIG), str(folder / f"out.{container}")]
    assert list(folder.iterdir()) == []


def test_a_kill_before_publishing_leaves_the_old_file(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mkv", CONSTANT, codec="libx264")
    out = tmp_path / "out.mp4"
    out.write_bytes(b"old")
    code = (
        "import sys; from pathlib import Path; from tasks.video import probe; from tasks.video_write import remux;"
        "remux(probe(sys.argv[1]), sys.argv[1], Path(sys.argv[2]))"
    )
    for point in ("mid-video:3", "before-publish"):
        done = subprocess.run([sys.executable, "-c", code, str(clip), str(out)], env=os.environ | {"E4S_FAULT": point}, check=False)
        assert done.returncode == -signal.SIGKILL
        assert out.read_bytes() == b"old"
    subprocess.run([sys.executable, "-c", code, str(clip), str(out)], check=True)
    assert len(probe(str(out))) == 12


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"codec": "h999"}, "output.codec: there is no video encoder h999 here; choose libx264"),
        ({"codec": "aac"}, "output.codec: there is no video encoder aac here"),
        ({"quality": 60}, "output.quality must be 0 to 51 for libx264, got 60"),
        ({"pixel_format": "nonsense"}, "output.pixel_format: libx264 does not take nonsense; choose same, yuv420p"),
        ({"preset": "warp"}, "output: libx264 does not take these settings .* preset warp"),
    ],
)
def test_settings_that_no_encoder_takes_are_said_before_any_work(settings: dict[str, Any], sentence: str) -> None:
    check_encoder(EncodeConfig())
    check_encoder(EncodeConfig(codec="ffv1", pixel_format="same"))
    with pytest.raises(UsageError, match=sentence):
        check_encoder(EncodeConfig(**settings))
