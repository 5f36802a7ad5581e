"""The page of a run of videos from plain data, and its charts."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from xml.etree import ElementTree

import av
import numpy as np
import pytest

from evaluation.charts import Series, curves, timeline
from evaluation.preview import SIDE, side_by_side, write_clip
from evaluation.report import Failure
from evaluation.video import Steadiness, landmark_jitter, landmark_jumps
from evaluation.video_report import StripFrame, VideoMeasures, VideoPart, VideoReport, headline, render_videos, told_videos

NAN = float("nan")
TIMES = np.array([0.0, 0.1, 0.2, NAN, 1.0, 1.1, 1.2])


def measures(before: float = 0.5, after: float = 0.6) -> VideoMeasures:
    jumps = np.array([NAN, 1.0, NAN, NAN, NAN, 2.0, NAN])
    alike = np.array([0.5, 0.6, 0.7, NAN, 0.5, 0.6, 0.7])
    return VideoMeasures(
        times=TIMES,
        jumps_before=jumps * before,
        jumps_after=jumps * after,
        alike_before=alike - 0.4,
        alike_after=alike,
        jitter_before=Steadiness(before, 2),
        jitter_after=Steadiness(after, 2),
        identity_jitter=Steadiness(0.02, 4),
        frames=6,
        faceless=0,
        network="sface",
    )


def part(name: str = "a", **more: object) -> VideoPart:
    picture = np.full((20, 30, 3), 90, np.uint8)
    frame = StripFrame(title="frame 3, 0.12 s", status="swapped", before=picture, after=picture)
    found = VideoPart(
        id=name,
        title="anna.png into <b>talk</b>.mp4",
        status="done",
        output=f"../outputs/{name}.mp4",
        frames=7,
        swapped=4,
        passed=2,
        failed=1,
        spans=[("swapped", 0.0, 0.8), ("passed", 0.8, 1.0), ("failed", 1.0, 1.2)],
        failures=[Failure(where="parse", reason="the mouth is hidden", pairs=["5"])],
        clip=b"a clip",
        clip_text="both",
        poster=picture,
        strip=[frame, replace(frame, title="frame 5, 0.20 s", status="failed")],
        measures=measures(),
    )
    return replace(found, **more)


def page(*parts: VideoPart, clips: str = "") -> str:
    return render_videos(VideoReport(title="e4s videos: night", summary=["one", "two"], videos=parts), clips)


def test_the_page_shows_clip_strip_curves_and_counts() -> None:
    html = page(part())
    assert 'src="data:video/mp4;base64,YSBjbGlw"' in html
    assert html.count("data:image/webp") == 5  # the clip's poster, two frames before and after
    assert "frame 5, 0.20 s<br><b>failed</b>" in html
    assert "anna.png into &lt;b&gt;talk&lt;/b&gt;.mp4" in html
    assert "0.500 % in the input, 0.600 % in the output, 1.20 times as much" in html
    assert "Cosine to the source (sface): 0.600 in the output, 0.200 in the input" in html
    assert "the mouth is hidden" in html
    assert not re.search(r"(src|href)=\"https?:", html)
    assert "<script" not in html


def test_clips_beside_the_page_are_named_by_their_video() -> None:
    html = page(part("a"), part("b"), clips="clips")
    assert re.findall(r'<video[^>]* src="([^"]+)"', html) == ["clips/a.mp4", "clips/b.mp4"]
    assert "lie in the folder clips" in html


def test_a_video_without_output_has_a_row_and_no_section() -> None:
    html = page(VideoPart(id="x", title="a into b", status="failed", reason="input: gone"))
    assert "<td>failed</td>" in html
    assert 'id="video-x"' not in html


def test_what_was_not_measured_is_said() -> None:
    html = page(part(measures=None, not_measured="there are no 3 swapped frames in a row."))
    assert "Not measured: there are no 3 swapped frames in a row." in html
    assert "landmark jitter" not in html


def test_the_headline_takes_the_median_over_videos() -> None:
    parts = [part(str(ratio), measures=measures(1.0, ratio)) for ratio in (1.1, 1.2, 9.0)]
    assert (
        headline(parts)
        == "Landmarks jitter 1.20 times as much as in the input, median of 3 videos; the cosine to the source's identity is 0.600."
    )
    assert headline([part(measures=None)]) == ""


def test_numbers_as_data() -> None:
    (told,) = told_videos(VideoReport(title="", summary=[], videos=[part()]))
    assert (told["id"], told["swapped"], told["identity_network"]) == ("a", 4, "sface")
    assert told["jitter_ratio"] == pytest.approx(1.2)


def test_curves_break_where_a_value_is_missing() -> None:
    svg = curves(
        [Series("output", TIMES, np.where(np.isfinite(TIMES), 1.0, NAN)), Series("input", TIMES, np.arange(7.0))],
        (0, 2),
        label="x",
        spoken="y",
    )
    lines = [element for element in ElementTree.fromstring(str(svg)).iter() if element.tag == "polyline"]
    assert [len(line.attrib["points"].split()) for line in lines] == [3, 3, 7]
    assert [line.attrib["class"] for line in lines] == ["thin line", "thin line", "thin line other"]


def test_a_timeline_runs_true_to_scale() -> None:
    svg = ElementTree.fromstring(str(timeline([("swapped", 0.0, 3.0), ("passed", 3.0, 4.0)], spoken="4 s")))
    first, second = (element.attrib for element in svg.iter() if element.tag == "rect")
    assert float(first["width"]) == pytest.approx(3 * float(second["width"]))
    assert first["height"] != second["height"]  # not told by colour alone


def test_jumps_are_the_jitter_frame_by_frame() -> None:
    points = np.zeros((5, 68, 2))
    points[:, 36, 0], points[:, 45, 0] = -50, 50  # eye distance 100 px
    points[2, :, 1] = 3.0  # one frame lies 3 px off
    found = np.array([True] * 5)
    np.testing.assert_allclose(landmark_jumps(points, found), [NAN, 3.0, 6.0, 3.0, NAN])
    assert landmark_jitter(points, found).value == pytest.approx(4.0)
    assert np.isfinite(landmark_jumps(points, np.array([True, True, False, True, True]))).sum() == 0


def test_a_clip_plays_its_pictures_at_their_times() -> None:
    before, after = (np.full((270, 960, 3), value, np.uint8) for value in (40, 200))
    picture = side_by_side(before, after)
    assert picture.shape == (134, 2 * SIDE + 4, 3)
    assert (picture[60, SIDE // 2, 0], picture[60, SIDE + 100, 0]) == (40, 200)
    data = write_clip((time, picture) for time in (2.0, 2.04, 2.5))
    with av.open(io.BytesIO(data)) as container:
        assert [float(frame.pts * frame.time_base) for frame in container.decode(video=0)] == pytest.approx([0, 0.04, 0.5])
    assert data == write_clip((time, picture) for time in (2.0, 2.04, 2.5))
    with pytest.raises(ValueError, match="at least one picture"):
        write_clip([])
