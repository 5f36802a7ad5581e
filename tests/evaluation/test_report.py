"""The page from plain data: names are escaped, missing numbers say why, nothing is loaded, and it stays small."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
from made import evaluation, line

from evaluation.protocols import load_quoted
from evaluation.report import (
    Extremes,
    Failure,
    PairPictures,
    Report,
    StageRan,
    extreme_rows,
    has_spread,
    headline,
    markdown,
    render,
    table_rows,
    thumbnail,
)
from evaluation.results import Unavailable

HOSTILE = '"><script>alert(1)</script>'
NOTHING = Report(title="e4s pairs: bench", summary=["0 pairs."])


class _Reader(HTMLParser):
    """Tags that are opened and closed in order, and the text of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def noise(seed: int, side: int = 256) -> np.ndarray:
    small = np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (side // 16, side // 16, 3), np.uint8)
    return thumbnail(small, side)


def pair(title: str, names: tuple[str, ...] = ("source", "target", "result"), value: str = "") -> PairPictures:
    return PairPictures(title, {name: noise(index, 64) for index, name in enumerate(names)}, ("result",), value)


def full() -> Report:
    """A report with something in every part."""
    lines = [
        line("id_top1", [1.0, 0.0, 1.0, 0.5], "sface"),
        line("id_cosine", [0.4, 0.5, 0.6, 0.7], "sface"),
        line("pose", [1.0, 2.0, 4.0, None], "6drepnet360"),
        line("expression", [None] * 4, "blendshapes"),
        line("fid", [0.0] * 4, "inception_fid_helper", whole=12.5),
    ]
    found = replace(
        evaluation(lines, ["a", "b", "c", "d"]),
        unavailable=[
            Unavailable(protocol="paper", metric="id_top1", network="cosface", reason="not here; `e4s models add` takes it"),
            Unavailable(protocol="paper", metric="id_top5", network="cosface", reason="not here; `e4s models add` takes it"),
        ],
    )
    history = [
        {
            "time": f"2026-11-{day:02}T06:00:00+00:00",
            "values": {"pose/6drepnet360/open": {"value": value, "low": 1.0, "high": 4.0, "count": day}},
        }
        for day, value in ((2, 3.0), (5, 2.0))
    ]
    return Report(
        title="e4s pairs: bench",
        summary=["4 pairs."],
        notes=["The run is not finished: 6 pairs left."],
        evaluation=found,
        history=history,
        quoted=load_quoted(),
        extremes=[Extremes(title="Pose distance", better="lower", best=[pair("a", value="1.00°")], worst=[pair("c", value="4.00°")])],
        failures=[Failure(where="in the result", reason="no face found", pairs=["d"])],
        pairs=[pair("a: x.png into y.png")],
        pairs_text="1 pair, stage by stage",
        stage_seconds={"align": (8, 2.0), "paste": (4, 6.0), "enhance": (0, 0.0)},
        settings={"profile": "fast"},
        stages=[StageRan(name="align", backend="dlib v1", settings="side = 256", weights={"landmarks": "cd" * 32})],
    )


def test_the_page_holds_all_of_it_and_loads_nothing() -> None:
    page = render(full())
    read = _Reader(page)
    for part in (
        "The run is not finished",
        "Table 2 of the paper, quoted",
        "not comparable one to one",
        "this run",
        "no face found",
        "25.0%",
    ):
        assert part in read.text
    for statement in ("abababababab", "a crop", "224 px", "share of pairs whose source ranks among the first 1"):
        assert statement in read.text
    assert "cdcdcdcdcdcd" in read.text
    sources = [attributes["src"] or "" for tag, attributes in read.tags if tag == "img"]
    assert len(sources) == 9
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    assert all(attributes.get("alt") for tag, attributes in read.tags if tag == "img")
    assert {tag for tag, _ in read.tags} & {"link", "script", "iframe", "object"} == set()
    assert not re.search(r"https?:|url\(|@import", page)
    links = {(attributes["href"] or "")[1:] for tag, attributes in read.tags if tag == "a"}
    assert links == {attributes["id"] for tag, attributes in read.tags if tag == "h2"} != set()


def test_numbers_of_the_table() -> None:
    text = _Reader(render(full())).text
    assert "0.625" in text  # (1 + 0 + 1 + 0.5) / 4
    assert "2.33°" in text
    assert "12.5 none 4" in text  # FID: no interval, and the page says why
    assert "No interval: a number of the whole set." in text
    assert "No interval: 4 pairs are too few (at least 10)." in text
    assert "none: no pairs" in text  # expression
    assert "id_top1, id_top5 cosface not measured: not here" in text
    assert "nan" not in text.lower().replace("inpainting", "")


def test_quoted_rows_are_marked_and_as_printed() -> None:
    page = render(full())
    rows = re.findall(r'<tr class="quoted">.*?</tr>', page)
    assert len(rows) == len(load_quoted())
    assert all("quoted</span>" in row for row in rows)
    assert any("FSGAN" in row and "0.17" in row for row in rows)
    assert any("E4S without recoloring" in row and ">0.40<" in row for row in rows)  # not 0.4


def test_a_measured_row_beside_quoted_ones_names_protocol_and_networks() -> None:
    """Two protocols give two rows; the same network under both is drawn once."""
    values = [1.0, 2.0, 4.0, 3.0]
    lines = [line("pose", values, "hopenet", "paper"), line("preserved_rmse", values, "pixels", "paper")]
    lines += [
        line("id_top1", [1.0, 0.0, 1.0, 0.5], "sface"),
        line("pose", values, "6drepnet360"),
        line("expression", values, "blendshapes"),
    ]
    lines += [line("preserved_rmse", values, "pixels")]
    page = render(replace(full(), evaluation=evaluation(lines, "abcd"), history=()))
    rows = [_Reader(row).text for row in re.findall(r'<tr class="ours">.*?</tr>', page)]
    assert rows == ["this run measured, paper: hopenet 2.50", "this run measured, open: sface, 6drepnet360 0.625 2.50"]
    drawn = [attributes["aria-label"] or "" for tag, attributes in _Reader(page).tags if tag == "svg"]
    assert len([label for label in drawn if "RMSE" in label]) == 1
    assert len([label for label in drawn if "Pose" in label]) == 2


def test_charts_of_what_has_a_distribution_and_a_history() -> None:
    report = full()
    read = _Reader(render(report))
    spoken = [attributes["aria-label"] or "" for tag, attributes in read.tags if tag == "svg"]
    assert len(spoken) == 3
    assert spoken[0].startswith("Pose distance, 6drepnet360: from 3.00 (2 pairs) to 2.00 (5 pairs)")
    assert "ID similarity, sface: 4 pairs from 0.400 to 0.700, median 0.550" in spoken[1]
    assert "3 pairs" in spoken[2]
    assert "Over time" not in render(replace(report, history=report.history[:1]))


def test_hostile_names_are_text_everywhere() -> None:
    report = full()
    assert report.evaluation is not None
    hostile = replace(
        report,
        title=HOSTILE,
        summary=[HOSTILE],
        notes=[HOSTILE],
        pairs=[pair(HOSTILE, (HOSTILE,))],
        failures=[Failure(where=HOSTILE, reason=HOSTILE, pairs=[HOSTILE])],
        settings={HOSTILE: HOSTILE},
        stage_seconds={HOSTILE: (1, 1.0)},
        stages=[StageRan(name=HOSTILE, backend=HOSTILE, settings=HOSTILE, weights={HOSTILE: HOSTILE})],
        extremes=[Extremes(title=HOSTILE, better="lower", best=[pair(HOSTILE, value=HOSTILE)], worst=[])],
        evaluation=replace(report.evaluation, unavailable=[Unavailable(protocol=HOSTILE, metric=HOSTILE, network=HOSTILE, reason=HOSTILE)]),
    )
    read = _Reader(render(hostile))
    assert "script" not in {tag for tag, _ in read.tags}
    assert read.text.count(HOSTILE) > 10
    assert "<script" not in markdown(hostile)
    assert "\n| a" not in markdown(replace(hostile, title="x\n| a"))


def test_no_pairs_one_pair_no_metrics() -> None:
    assert "Metrics" not in _Reader(render(NOTHING)).text
    assert "results were not searched for faces" in render(NOTHING)
    empty = evaluation([line("pose", [])], [])
    read = _Reader(render(replace(NOTHING, evaluation=empty)))
    assert "none: no pairs" in read.text
    one = evaluation([line("pose", [1.5]), line("id_top1", [1.0])], ["a"])
    text = _Reader(render(replace(NOTHING, evaluation=one))).text
    assert "1.50° none 1" in text
    assert "no interval: 1 pair is too few (at least 10)" in text
    assert headline(empty, 0) == ""
    assert headline(one, 1) == "100% of the results find their own source first among 1, by net; pose is 1.50° off the target's."
    few = evaluation([line("fid", [0.0, 0.0], whole=12.5)], ["a", "b"])
    assert headline(few, 2) == "FID 12.5 of 2 pairs (compare with as many only)."


def test_equal_values_have_no_histogram() -> None:
    assert not has_spread(line("pose", [2.0, 2.0, None]))
    assert not has_spread(line("id_top1", [0.0, 1.0]))
    assert has_spread(line("pose", [2.0, 2.5, None]))


def test_ends_of_a_metric() -> None:
    lower = line("pose", [3.0, 1.0, None, 2.0, 1.0])
    assert extreme_rows(lower, 2) == ([1, 4], [0, 3])
    assert extreme_rows(line("id_cosine", [0.1, 0.9, 0.5]), 3) == ([1, 2], [0])
    assert extreme_rows(line("pose", [1.0])) == ([0], [])
    assert extreme_rows(line("pose", [None])) == ([], [])


def test_markdown_has_the_same_numbers() -> None:
    text = markdown(full())
    assert "| Pose distance | 6drepnet360 | open | 2.33° |" in text
    assert "- 1 pair, in the result: no face found (d)" in text
    assert "- id\\_top1, id\\_top5, cosface: not here" in text
    assert [row["value"] for row in table_rows(full())] == ["0.625", "0.550", "2.33°", "none", "12.5"]
    assert [row["95% interval"] for row in table_rows(full())] == [
        "none: 4 pairs are too few (at least 10)",
        "none: 4 pairs are too few (at least 10)",
        "none: 3 pairs are too few (at least 10)",
        "none: no pairs",
        "none: a number of the whole set",
    ]
    assert "None." in markdown(NOTHING)


def test_five_hundred_pairs_stay_below_five_megabytes() -> None:
    """As many pictures as the page of a large run holds, of noise, which is harder to compress than faces."""
    names = ("source", "target", "result", *(f"stage {index}" for index in range(10)))
    noisy = {name: noise(index, 224) for index, name in enumerate(names)}
    small = {name: noise(index, 160) for index, name in enumerate(names[:3])}
    ends = Extremes(title="", better="lower", best=[PairPictures("a", small)] * 3, worst=[PairPictures("b", small)] * 3)
    values = np.random.Generator(np.random.PCG64(0)).standard_normal(500).tolist()
    found = evaluation([line("pose", values)], [f"{index:06}" for index in range(500)])
    page = render(replace(full(), evaluation=found, pairs=[PairPictures("a", noisy)] * 24, extremes=[ends] * 7))
    assert len(page) < 5_000_000


def test_thumbnails_keep_their_shape() -> None:
    assert thumbnail(np.zeros((1000, 500, 3), np.uint8), 100).shape == (100, 50, 3)
    assert thumbnail(np.zeros((1, 3000, 3), np.uint8), 100).shape == (1, 100, 3)
