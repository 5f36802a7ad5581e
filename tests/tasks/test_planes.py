from __future__ import annotations

from dataclasses import replace

import av
import numpy as np
import pytest
from video_clips import picture

from tasks.planes import Colour, FormatError, PlanarFrame, Turn, padded, paste_patch, pixel_format
from tasks.video import planar
from tasks.video_write import to_av

YUV = ("yuv420p", "yuv422p", "yuv444p", "yuv411p", "nv12", "nv21", "yuyv422", "uyvy422", "yuv420p10le", "yuv422p10le", "p010le", "yuva420p")
OTHER = ("gray", "gray10le", "rgb24", "bgr24", "bgr0", "argb", "rgba64le", "gbrp", "gbrp10le")
SIZES = ((34, 26), (33, 25))


def frame_of(pixels: str, size: tuple[int, int] = (34, 26), smooth: bool = True, colour: Colour | None = None) -> PlanarFrame:
    return replace(planar(picture(3, size, pixels, smooth=smooth)), colour=colour or Colour(5, 1))


def samples(frame: PlanarFrame) -> dict[str, np.ndarray]:
    return {role: frame.component(role) for role in frame.format.components}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pixels", YUV + OTHER)
def test_planes_go_to_the_encoder_bit_for_bit(pixels: str, size: tuple[int, int]) -> None:
    if pixels[:4] in ("yuyv", "uyvy") and size[0] % 2:
        pytest.skip("FFmpeg has no packed 4:2:2 of odd width")
    frame = frame_of(pixels, size, smooth=False)
    again = planar(to_av(frame))
    assert [plane.tobytes() for plane in again.planes] == [plane.tobytes() for plane in frame.planes]
    assert again.check() == frame.check()


@pytest.mark.parametrize("pixels", ["pal8", "monob", "grayf32le", "cuda"])
def test_formats_without_plain_samples_are_refused(pixels: str) -> None:
    with pytest.raises(FormatError, match=pixels):
        pixel_format(pixels)


@pytest.mark.parametrize(("matrix", "range_"), [(5, 1), (1, 1), (1, 2), (9, 1), (6, 2)])
def test_rgb_view_equals_swscales(matrix: int, range_: int) -> None:
    frame = frame_of("yuv444p", (64, 48), colour=Colour(matrix, range_))
    theirs = to_av(frame).reformat(
        format="rgb24",
        src_colorspace=matrix,
        src_color_range=range_,
        dst_color_range=2,
        interpolation=av.video.reformatter.Interpolation.BICUBIC,
    )
    assert np.abs(frame.rgb8().astype(int) - theirs.to_ndarray()).max() <= 2


def test_matrix_and_range_decide_colours() -> None:
    views = {c: frame_of("yuv420p", colour=c).rgb8().astype(int) for c in (Colour(5, 1), Colour(1, 1), Colour(5, 2))}
    assert np.abs(views[Colour(5, 1)] - views[Colour(1, 1)]).max() > 10
    assert np.abs(views[Colour(5, 1)] - views[Colour(5, 2)]).max() > 10


def test_a_stream_that_does_not_say_is_bt601_when_small_and_bt709_when_large() -> None:
    assert Colour().shares(576) == Colour(6).shares(576)
    assert Colour().shares(720) == Colour(1).shares(720)
    with pytest.raises(FormatError, match="8"):
        Colour(8).shares(100)


def test_black_and_white_by_hand() -> None:
    limited = frame_of("yuv420p")
    for role, value in {"Y": 235, "U": 128, "V": 128}.items():
        limited.component(role)[:] = value
    assert (limited.rgb8() == 255).all()
    limited.component("Y")[:] = 16
    assert (limited.rgb8() == 0).all()
    full = replace(limited, colour=Colour(5, 2))
    assert (full.rgb8() == 16).all()


def test_chroma_is_placed_where_the_standard_says() -> None:
    """A horizontal chroma ramp: with left siting luma column 2 i shows chroma sample i unchanged, with centred siting none does."""
    frame = frame_of("yuv420p", (16, 8))
    frame.component("Y")[:], frame.component("U")[:] = 120, 128
    frame.component("V")[:] = 100 + 8 * np.arange(8)
    red = frame.rgb8()[4, :, 0].astype(int)
    exact = 255 / 219 * (120 - 16) + 255 * 2 * (1 - 0.299) / 224 * (100 + 8 * np.arange(8) - 128)
    assert np.abs(red[::2] - exact.clip(0, 255)).max() <= 1
    centred = replace(frame, colour=Colour(5, 1, centred=True)).rgb8()[4, :, 0].astype(int)
    assert np.abs(centred[2:-2:2] - exact[1:-1]).min() >= 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pixels", YUV + OTHER)
def test_outside_the_mask_no_bit_changes_and_inside_the_patch_is_seen(pixels: str, size: tuple[int, int]) -> None:
    if pixels[:4] in ("yuyv", "uyvy") and size[0] % 2:
        pytest.skip("FFmpeg has no packed 4:2:2 of odd width")
    frame = frame_of(pixels, size, smooth=False)
    before = frame.check()
    patch = np.empty((19, 25, 3), np.uint8)
    patch[:] = 180, 90, 60
    weights = np.zeros((19, 25), np.float32)
    weights[2:17, 3:24] = 1.0
    weights[5, 5] = 0.0
    left, top = 7, 5
    result = paste_patch(frame, patch, weights, left, top)
    assert frame.check() == before
    touched = np.zeros((frame.height, frame.width), bool)
    touched[top : top + 19, left : left + 25] = weights > 0
    for role, new in samples(result).items():
        c = frame.format.components[role]
        block = np.pad(touched, ((0, -frame.height % c.down), (0, -frame.width % c.across)))
        block = block.reshape(block.shape[0] // c.down, c.down, -1, c.across).any(axis=(1, 3))
        assert (new[~block] == samples(frame)[role][~block]).all()
        if role != "A":
            assert (new[block] != samples(frame)[role][block]).any()
    inner = result.rgb8()[top + 9 : top + 13, left + 12 : left + 16].astype(int)
    gray = "R" not in frame.format.components and "U" not in frame.format.components
    expected = np.full(3, round(0.299 * 180 + 0.587 * 90 + 0.114 * 60)) if gray else np.array((180, 90, 60))
    assert np.abs(inner - expected).max() <= 3


def test_padding_bits_of_the_planes_keep_theirs() -> None:
    """bgr0 has a byte that is no component."""
    frame = frame_of("bgr0", smooth=False)
    result = paste_patch(frame, np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), np.float32), 2, 2)
    assert (result.planes[0][:, 3::4] == frame.planes[0][:, 3::4]).all()


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv420p10le", "nv12", "rgb24", "gray"])
def test_pasting_a_smooth_frame_onto_itself_changes_nearly_nothing(pixels: str) -> None:
    frame = frame_of(pixels, (64, 48))
    for role in frame.format.components:
        ramp = np.add.outer(np.arange(frame.component(role).shape[0]), np.arange(frame.component(role).shape[1]))
        scale = 1 << frame.format.components[role].bits - 8
        frame.component(role)[:] = (110 + ramp // 4) * scale
    rgb = frame.rgb8()
    result = paste_patch(frame, rgb, np.ones(rgb.shape[:2], np.float32), 0, 0)
    for role, new in samples(result).items():
        scale = 1 << frame.format.components[role].bits - 8
        assert np.abs(new.astype(int) - samples(frame)[role].astype(int)).max() <= 2 * scale


def test_half_weight_is_the_mean() -> None:
    frame = frame_of("yuv444p")
    frame.component("Y")[:], frame.component("U")[:], frame.component("V")[:] = 100, 100, 160
    white = np.full((8, 8, 3), 255, np.uint8)
    result = paste_patch(frame, white, np.full((8, 8), 0.5, np.float32), 4, 4)
    assert [int(result.component(role)[8, 8]) for role in "YUV"] == [168, 114, 144]  # white is 235, 128, 128; 167.5 rounds to even


def test_a_patch_beyond_the_frame_is_cut_off() -> None:
    frame = frame_of("yuv420p")
    patch, weights = np.zeros((10, 10, 3), np.uint8), np.ones((10, 10), np.float32)
    assert paste_patch(frame, patch, weights, 100, 0).check() == frame.check()
    result = paste_patch(frame, patch, weights, -6, -6)
    assert (result.component("Y")[:4, :4] == 16).all()
    assert (result.component("Y")[4:] == frame.component("Y")[4:]).all()


MATRICES = {  # (a, b, c, d) -> where the coded top left corner of a 3 x 2 picture goes: x, y in the upright one
    (1, 0, 0, 1): (0, 0),
    (0, 1, -1, 0): (-1, 0),
    (-1, 0, 0, -1): (-1, -1),
    (0, -1, 1, 0): (0, -1),
    (-1, 0, 0, 1): (-1, 0),
    (1, 0, 0, -1): (0, -1),
    (0, 1, 1, 0): (0, 0),
    (0, -1, -1, 0): (-1, -1),
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_turned_video_is_seen_upright_and_pasted_where_it_was_seen(matrix: tuple[int, int, int, int]) -> None:
    a, b, c, d = (value << 16 for value in matrix)
    turn = Turn.of_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30))
    coded = np.array([[1, 0, 0], [0, 0, 0]])
    x, y = MATRICES[matrix]
    assert turn.upright(coded)[y, x] == 1
    assert (turn.coded(turn.upright(coded)) == coded).all()
    frame = replace(frame_of("yuv420p", (34, 26)), turn=turn)
    width, height = frame.size
    assert frame.rgb8().shape == (height, width, 3)
    patch = np.zeros((6, 4, 3), np.uint8)
    patch[:, 2:] = 255
    result = paste_patch(frame, patch, np.ones((6, 4), np.float32), 8, 4).rgb8().astype(int)
    assert result[4:10, 8:10].mean() < 40
    assert result[4:10, 10:12].mean() > 215
    assert (np.delete(result, np.s_[2:12], axis=0) == np.delete(frame.rgb8().astype(int), np.s_[2:12], axis=0)).all()


def test_padding_repeats_the_edge() -> None:
    frame = frame_of("yuv420p", (33, 25), smooth=False)
    large = padded(frame, (2, 2))
    assert (large.width, large.height) == (34, 26)
    assert (large.component("Y")[:25, :33] == frame.component("Y")).all()
    assert (large.component("Y")[25, :33] == frame.component("Y")[24]).all()
    assert (large.component("Y")[:25, 33] == frame.component("Y")[:, 32]).all()
    assert (large.component("U") == frame.component("U")).all()


def test_a_wrong_plane_is_refused() -> None:
    frame = frame_of("yuv420p")
    with pytest.raises(ValueError, match="yuv420p of 32 x 26 px has planes"):
        replace(frame, width=32)
