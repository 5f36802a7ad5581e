"""The report page: one self-contained HTML file, from plain data."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt

from e4s_models.regions import REGION_COLORS

Picture = npt.NDArray[np.uint8]

_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent); }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 120rem; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.sheet { overflow-x: auto; } .pair { display: flex; gap: .4rem; margin-bottom: .9rem; }
figure { margin: 0; flex: none; } figure img { display: block; width: 176px; border-radius: 4px; }
figure.main img { outline: 2px solid #4a90d9; outline-offset: -2px; }
figcaption { font-size: .75rem; opacity: .75; } .name { font-size: .8rem; opacity: .75; margin: 0 0 .2rem; }
code { font-size: .85em; } .muted { opacity: .7; }
"""


@dataclass(frozen=True)
class PairPictures:
    """One row of the contact sheet: a title, pictures by name in order, and which of them are the ones to compare."""

    title: str
    pictures: Mapping[str, Picture]
    main: Sequence[str] = ("source", "target", "result")


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that the page says."""

    title: str
    summary: Sequence[str]
    stage_seconds: Mapping[str, tuple[int, float]]  # stage -> items computed, seconds
    pairs: Sequence[PairPictures]
    failures: Mapping[str, int] = field(default_factory=dict)  # reason -> count
    settings: Mapping[str, str] = field(default_factory=dict)


def show_regions(regions: Picture) -> Picture:
    """Label map (H, W) uint8 -> RGB (H, W, 3) uint8."""
    return np.asarray(REGION_COLORS[np.minimum(regions, len(REGION_COLORS) - 1)])


def render(report: Report) -> str:
    """The page as HTML text; pictures are embedded as JPEG in the size they come in (see `thumbnail`)."""
    parts = [f"<h1>{html.escape(report.title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in report.summary)]
    if report.failures:
        rows = "".join(f"<tr><td class=number>{count}</td><td>{html.escape(reason)}</td></tr>" for reason, count in report.failures.items())
        parts.append(f"<h2>Failed</h2><table><tr><th class=number>pairs</th><th>reason</th></tr>{rows}</table>")
    parts.append("<h2>Contact sheet</h2><div class=sheet>")
    parts += [_pair(pair) for pair in report.pairs]
    parts.append("</div><h2>Time per stage</h2><table><tr><th>stage</th><th class=number>items</th><th class=number>seconds</th>")
    parts.append("<th class=number>seconds per item</th></tr>")
    for stage, (items, seconds) in report.stage_seconds.items():
        numbers = (str(items), f"{seconds:.2f}", f"{seconds / max(items, 1):.3f}")
        parts.append(f"<tr><td>{html.escape(stage)}</td>" + "".join(f"<td class=number>{n}</td>" for n in numbers) + "</tr>")
    rows = "".join(f"<tr><td>{html.escape(n)}</td><td><code>{html.escape(v)}</code></td></tr>" for n, v in report.settings.items())
    parts.append(f"</table><h2>What ran</h2><table>{rows}</table>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(report.title)}</title>'
    return f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{"".join(parts)}</body></html>\n'


def _pair(pair: PairPictures) -> str:
    figures = "".join(
        f'<figure{" class=main" if name in pair.main else ""}><img alt="{html.escape(name)}" src="{_embedded(picture)}">'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, picture in pair.pictures.items()
    )
    return f"<p class=name>{html.escape(pair.title)}</p><div class=pair>{figures}</div>"


def _embedded(picture: Picture) -> str:
    done, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 88])
    if not done:
        raise ValueError(f"OpenCV could not encode a {picture.shape} picture")
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def thumbnail(picture: Picture, side: int = 256) -> Picture:
    """RGB (H, W, 3) -> longest side `side` px, with antialiasing."""
    scale = side / max(picture.shape[:2])
    size = (max(round(picture.shape[1] * scale), 1), max(round(picture.shape[0] * scale), 1))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR), dtype=np.uint8)
