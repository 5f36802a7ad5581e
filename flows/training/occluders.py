"""Things in front of a face, drawn with exact masks: hands, microphones, cups, masks, text, other heads, hair, sticks, panes, anything.

A kind is a function `(Scene, rng) -> Layer`. `TRAINED` kinds teach the visibility network, `UNSEEN` ones only judge it: what it makes of
things it has never met. Everything is decided by `rng`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from e4s_models.regions import INNER_FACE, Region
from tasks.stage import Float32, UInt8

_FONTS = (
    cv2.FONT_HERSHEY_SIMPLEX,
    cv2.FONT_HERSHEY_DUPLEX,
    cv2.FONT_HERSHEY_COMPLEX,
    cv2.FONT_HERSHEY_TRIPLEX,
    cv2.FONT_HERSHEY_SCRIPT_COMPLEX,
)
_LETTERS = "ABCDEFGHIKLMNOPRSTUVWXYZabcdefghiklmnoprstuvwxyz0123456789&%@#!?.:- "
_HEAD = (*INNER_FACE, Region.HAIR, Region.EARS, Region.NECK)
_NAILS = (235.0, 190.0, 180.0)

Point = tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """The face that is covered, and another picture that lends heads, hair and textures."""

    image: UInt8  # (S, S, 3) RGB
    labels: UInt8  # (S, S) region ids
    other_image: UInt8  # (S, S, 3)
    other_labels: UInt8  # (S, S)

    @property
    def side(self) -> int:
        return len(self.image)

    def face_box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the inner face, px; the picture's middle where there is none."""
        rows, columns = np.nonzero(np.isin(self.labels, INNER_FACE))
        if len(rows) < 50:
            return self.side * 0.25, self.side * 0.3, self.side * 0.75, self.side * 0.85
        left, right = np.percentile(columns, (2, 98))
        top, bottom = np.percentile(rows, (2, 98))
        return float(left), float(top), float(right), float(bottom)

    def face_point(self, rng: np.random.Generator, margin: float = 0.0) -> Point:
        """A point of the face's box, widened by a share of it."""
        left, top, right, bottom = self.face_box()
        return (
            float(rng.uniform(left - margin * (right - left), right + margin * (right - left))),
            float(rng.uniform(top - margin * (bottom - top), bottom + margin * (bottom - top))),
        )

    def skin_colour(self) -> Float32:
        """Median colour (3,) of the skin, in [0, 255]."""
        skin = self.image[self.labels == Region.SKIN]
        return np.asarray(np.median(skin, axis=0) if len(skin) > 20 else (190, 140, 120), np.float32)


@dataclass(frozen=True)
class Layer:
    """What lies in front."""

    colour: Float32  # (S, S, 3) RGB in [0, 255]
    alpha: Float32  # (S, S) in [0, 1]


Kind = Callable[[Scene, np.random.Generator], Layer]


def occlude(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[UInt8, Float32]:
    """The face with one thing in front of it: RGB (S, S, 3) uint8 and how much of each pixel the thing covers, (S, S) in [0, 1]."""
    layer = KINDS[kind](scene, rng)
    alpha, colour = layer.alpha, layer.colour
    if rng.random() < 0.15:
        alpha, colour = _motion_blur(alpha, colour, rng)
    elif rng.random() < 0.6:
        alpha = np.asarray(cv2.GaussianBlur(alpha, (0, 0), float(rng.uniform(0.3, 1.1))), np.float32)
    base = scene.image.astype(np.float32)
    if rng.random() < 0.4 and kind not in ("text", "pane"):
        base = base * (1 - _contact_shadow(alpha, rng))[..., None]
    mixed = base + alpha[..., None] * (colour - base)
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8), alpha


def _motion_blur(alpha: Float32, colour: Float32, rng: np.random.Generator) -> tuple[Float32, Float32]:
    size = int(rng.integers(3, 12)) | 1
    kernel = np.zeros((size, size), np.float32)
    angle = rng.uniform(0, math.pi)
    reach = (math.cos(angle) * size / 2, math.sin(angle) * size / 2)
    middle = size / 2 - 0.5
    ends = [(round(middle + sign * reach[0]), round(middle + sign * reach[1])) for sign in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], 1.0, 1)
    kernel /= kernel.sum()
    blurred = np.asarray(cv2.filter2D(alpha, -1, kernel), np.float32)
    spread = np.asarray(cv2.filter2D(colour * alpha[..., None], -1, kernel), np.float32) / np.maximum(blurred, 1e-3)[..., None]
    return blurred, np.asarray(spread, np.float32)


def _contact_shadow(alpha: Float32, rng: np.random.Generator) -> Float32:
    """Share of light that the thing takes from the face beside it, (S, S)."""
    side = len(alpha)
    move = np.array([[1, 0, rng.normal(0, 0.02) * side], [0, 1, abs(rng.normal(0.01, 0.015)) * side]], np.float32)
    moved = cv2.warpAffine(alpha, move, (side, side), flags=cv2.INTER_LINEAR)
    return np.asarray(cv2.GaussianBlur(moved, (0, 0), float(rng.uniform(0.006, 0.03)) * side), np.float32) * np.float32(
        rng.uniform(0.1, 0.6)
    )


# Textures and shading


def _noise(side: int, rng: np.random.Generator, coarsest: int, finest: int) -> Float32:
    """Noise over several octaves, (S, S), mean 0, deviation about 1; cells per side from `coarsest` to `finest`."""
    total = np.zeros((side, side), np.float32)
    cells, weight = max(1, coarsest), 1.0
    while cells <= finest:
        grid = rng.standard_normal((cells + 1, cells + 1), np.float32)
        total += np.float32(weight) * np.asarray(cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC), np.float32)
        cells, weight = cells * 2, weight * 0.6
    return np.asarray((total - total.mean()) / max(float(total.std()), 1e-6), np.float32)


def _random_colour(rng: np.random.Generator) -> Float32:
    """Gray as often as not; dark and pale ones as well."""
    level = rng.uniform(5, 250)
    spread = 0.0 if rng.random() < 0.35 else rng.uniform(0, 120)
    return np.asarray(np.clip(level + rng.uniform(-spread, spread, 3), 0, 255), np.float32)


def _texture(scene: Scene, rng: np.random.Generator) -> Float32:
    """A surface (S, S, 3) in [0, 255]: part of the other picture, noise, stripes, checks, or nearly plain."""
    side, way = scene.side, rng.random()
    if way < 0.45:
        size = int(rng.integers(side // 8, side))
        top, left = (int(rng.integers(0, side - size + 1)) for _ in range(2))
        patch = scene.other_image[top : top + size, left : left + size]
        patch = np.rot90(patch, int(rng.integers(4)))
        surface = cv2.resize(np.ascontiguousarray(patch), (side, side), interpolation=cv2.INTER_CUBIC).astype(np.float32)
        return np.asarray(np.clip(surface * rng.uniform(0.6, 1.3) * rng.normal(1, 0.08, 3), 0, 255), np.float32)
    one, two = _random_colour(rng), _random_colour(rng)
    if way < 0.6:
        share = np.asarray(1 / (1 + np.exp(-2 * _noise(side, rng, int(rng.integers(2, 12)), 96))), np.float32)
    elif way < 0.75:
        angle, period = rng.uniform(0, math.pi), rng.uniform(3, side / 5)
        y, x = np.mgrid[:side, :side].astype(np.float32)
        phase = (x * math.cos(angle) + y * math.sin(angle)) / period + 0.15 * _noise(side, rng, 2, 8)
        other_phase = (y * math.cos(angle) - x * math.sin(angle)) / period
        stripes = np.clip(np.sin(2 * math.pi * phase) * rng.uniform(1, 8), -1, 1) / 2 + 0.5
        checks = np.clip(np.sin(2 * math.pi * other_phase) * 4, -1, 1) / 2 + 0.5
        share = np.asarray(stripes if rng.random() < 0.6 else (stripes + checks) / 2, np.float32)
    else:
        share = np.asarray(0.5 + rng.uniform(0, 0.15) * _noise(side, rng, 1, int(rng.integers(2, 64))), np.float32)
        two = np.asarray(np.clip(one + rng.normal(0, 25, 3), 0, 255), np.float32)
    grain = rng.uniform(0, 6) * rng.standard_normal((side, side, 1), np.float32) if rng.random() < 0.5 else np.float32(0)
    return np.asarray(np.clip(one + share[..., None] * (two - one) + grain, 0, 255), np.float32)


def _rounded(alpha: Float32, rng: np.random.Generator, depth: float, light: Point | None = None) -> Float32:
    """Brightness (S, S) around 1 of a body whose outline is `alpha` and whose edges fall away over `depth` px."""
    shade = np.ones_like(alpha)
    box = _bounds(alpha > 0, 2)
    part = alpha[box]
    distance = np.asarray(cv2.distanceTransform((part > 0.5).astype(np.uint8), cv2.DIST_L2, 3), np.float32)
    rise = np.clip(distance / max(depth, 1.0), 0, 1)
    height = np.asarray(cv2.GaussianBlur(np.sqrt(np.maximum(1 - (1 - rise) ** 2, 0)), (0, 0), max(depth / 5, 0.8)), np.float32) * depth
    slope_x, slope_y = (np.asarray(cv2.Sobel(height, cv2.CV_32F, *order, ksize=3, scale=1 / 8), np.float32) for order in ((1, 0), (0, 1)))
    length = np.sqrt(1 + slope_x**2 + slope_y**2)
    across, down = light or (float(rng.normal(0, 0.6)), float(rng.normal(-0.5, 0.5)))
    lit = (-slope_x * across - slope_y * down + 1) / (length * math.sqrt(1 + across**2 + down**2))
    ambient = rng.uniform(0.35, 0.7)
    shade[box] = ambient + (1 - ambient) * np.clip(lit, 0, 1) * 1.2
    return shade


def _bounds(mask: npt.NDArray[np.bool_], margin: int = 0) -> tuple[slice, slice]:
    """The smallest box that holds all of a mask (S, S), widened; everything where the mask is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return slice(None), slice(None)
    return (
        slice(max(0, int(rows[0]) - margin), int(rows[-1]) + 1 + margin),
        slice(max(0, int(columns[0]) - margin), int(columns[-1]) + 1 + margin),
    )


def _canvas(side: int) -> UInt8:
    return np.zeros((side, side), np.uint8)


def _share(mask: npt.NDArray[Any]) -> Float32:
    """(S, S) uint8 -> [0, 1]."""
    return np.asarray(mask, np.float32) / np.float32(255)


def _polygon(side: int, points: Float32) -> Float32:
    mask = _canvas(side)
    cv2.fillPoly(mask, [np.rint(points * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    return _share(mask)


def _capsule(side: int, start: Point, end: Point, wide: float, narrow: float) -> Float32:
    """A rod with round ends, `wide` px across at its start and `narrow` at its end: (S, S) in [0, 1]."""
    heading = math.atan2(end[1] - start[1], end[0] - start[0])
    turns = np.linspace(math.pi / 2, 3 * math.pi / 2, 9) + heading
    back = np.column_stack([start[0] + wide / 2 * np.cos(turns), start[1] + wide / 2 * np.sin(turns)])
    front = np.column_stack([end[0] - narrow / 2 * np.cos(turns), end[1] - narrow / 2 * np.sin(turns)])
    return _polygon(side, np.concatenate([back, front]).astype(np.float32))


def _blob(side: int, centre: Point, radius: float, rng: np.random.Generator, roughness: float = 0.25, stretch: float = 1.0) -> Float32:
    """A closed smooth outline around `centre`."""
    count = 48
    angles = np.linspace(0, 2 * math.pi, count, endpoint=False)
    distance = np.ones(count)
    for wave in range(1, 6):
        distance += roughness / wave * rng.normal() * np.cos(wave * angles + rng.uniform(0, 2 * math.pi))
    distance = np.maximum(distance, 0.2) * radius
    turn = rng.uniform(0, math.pi)
    x, y = distance * np.cos(angles) * stretch, distance * np.sin(angles) / stretch
    turned = np.column_stack([x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)])
    return _polygon(side, (turned + centre).astype(np.float32))


class _Painter:
    """Parts painted one over the other, each with its own colour."""

    def __init__(self, side: int) -> None:
        self.colour = np.zeros((side, side, 3), np.float32)
        self.alpha = np.zeros((side, side), np.float32)

    def add(self, colour: Float32, alpha: Float32) -> None:
        """Lay a part (S, S, 3) over what is there where its `alpha` (S, S) says so."""
        box = _bounds(alpha > 0)
        above, below = alpha[box], self.alpha[box]
        covered = above + below * (1 - above)
        share = (above / np.maximum(covered, 1e-6))[..., None]
        self.colour[box] += share * (colour[box] - self.colour[box])
        self.alpha[box] = covered

    def layer(self) -> Layer:
        return Layer(np.clip(self.colour, 0, 255), self.alpha)


# Kinds


def _shape(scene: Scene, rng: np.random.Generator) -> Layer:
    """Anything: a blob, a polygon or a box with any surface, flat or round."""
    side, centre = scene.side, scene.face_point(rng, 0.15)
    radius = float(rng.uniform(0.04, 0.3)) * side
    way = rng.random()
    if way < 0.5:
        alpha = _blob(side, centre, radius, rng, float(rng.uniform(0.05, 0.5)), float(rng.uniform(0.6, 1.7)))
    elif way < 0.75:
        angles = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(3, 8))))
        reach = radius * rng.uniform(0.5, 1.4, len(angles))
        alpha = _polygon(side, np.column_stack([centre[0] + reach * np.cos(angles), centre[1] + reach * np.sin(angles)]).astype(np.float32))
    else:
        alpha = _capsule(side, centre, scene.face_point(rng, 0.6), radius, radius * float(rng.uniform(0.4, 1.5)))
    surface = _texture(scene, rng)
    if rng.random() < 0.25:  # skin-coloured: colour alone must not decide
        surface = scene.skin_colour() * (1 + 0.05 * _noise(side, rng, 3, 64))[..., None] * np.float32(rng.uniform(0.6, 1.25))
    if rng.random() < 0.5:
        surface = surface * _rounded(alpha, rng, radius * float(rng.uniform(0.2, 0.9)))[..., None]
    if rng.random() < 0.2:
        alpha = alpha * np.float32(rng.uniform(0.4, 0.95))
    return Layer(np.asarray(np.clip(surface, 0, 255), np.float32), alpha)


def _hand(scene: Scene, rng: np.random.Generator) -> Layer:
    """Fingers, a palm, often a forearm or a sleeve; the skin is the person's own, or somebody else's."""
    side = scene.side
    tip = np.array(scene.face_point(rng, -0.05))
    angle = rng.normal(math.pi / 2, 0.7)  # where the arm comes from, as seen from the finger tips: mostly from below
    back = np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-back[1], back[0]])
    size = float(rng.uniform(0.3, 0.62)) * side  # wrist to finger tip
    skin = scene.skin_colour() if rng.random() < 0.6 else np.array([222, 176, 150], np.float32) * np.float32(rng.uniform(0.35, 1.1))
    skin = np.asarray(np.clip(skin * rng.normal(1, 0.06, 3) * rng.uniform(0.75, 1.2), 20, 255), np.float32)
    mottled = (1 + 0.035 * _noise(side, rng, 4, 96))[..., None]
    light = (float(rng.normal(0, 0.6)), float(rng.normal(-0.5, 0.5)))
    painter = _Painter(side)
    flat = rng.random() < 0.15  # a plain drawing

    def paint(alpha: Float32, depth: float, tone: float = 1.0) -> None:
        shade = np.float32(1) if flat else _rounded(alpha, rng, depth, light)[..., None]
        painter.add(np.clip(skin * tone * mottled * shade, 0, 255), alpha)

    palm_at = tip + back * size * 0.62
    width = size * float(rng.uniform(0.36, 0.46))
    wrist = palm_at + back * size * 0.34
    elbow = wrist + back * size * 2
    if rng.random() < 0.9:
        arm = _capsule(side, _at(wrist), _at(elbow), width * 0.72, width * 0.95)
        paint(arm, width * 0.4)
        if rng.random() < 0.5:
            sleeve = _capsule(side, _at(wrist + back * size * rng.uniform(0.1, 0.5)), _at(elbow), width * 0.9, width * 1.2)
            painter.add(_texture(scene, rng) * _rounded(sleeve, rng, width * 0.5, light)[..., None], sleeve)
    corners = [palm_at + along * back * size * 0.3 + out * across * width * wide for along, out, wide in _PALM]
    palm = np.asarray(cv2.GaussianBlur(_polygon(side, np.array(corners, np.float32)), (0, 0), size * 0.02), np.float32)
    paint(np.clip((palm - 0.3) * 3, 0, 1), width * 0.35, 0.97)
    mirrored = 1 if rng.random() < 0.5 else -1
    spread = float(rng.uniform(0.02, 0.22))
    bend = float(rng.normal(0, 0.12))
    fingers = int(rng.choice([1, 2, 4, 4, 4, 4]))
    for finger in range(fingers):
        place = (finger - (fingers - 1) / 2) / 3
        root = palm_at - back * size * 0.22 + across * width * 0.8 * place
        length = size * (0.42 - 0.08 * abs(place + 0.15)) * float(rng.uniform(0.85, 1.1))
        heading = -back * math.cos(place * spread * 3) + across * math.sin(place * spread * 3)
        thick = width * float(rng.uniform(0.2, 0.25)) * (0.9 if finger == fingers - 1 else 1)
        knuckle = root + heading * length * 0.5
        bent = heading * math.cos(bend) + np.array([-heading[1], heading[0]]) * math.sin(bend)
        end = knuckle + bent * length * 0.5
        whole = np.maximum(
            _capsule(side, _at(root), _at(knuckle), thick * 1.08, thick), _capsule(side, _at(knuckle), _at(end), thick, thick * 0.82)
        )
        paint(whole, thick * 0.5, float(rng.uniform(0.93, 1.04)))
        if not flat and rng.random() < 0.7:
            nail = _capsule(side, _at(end - bent * thick * 0.1), _at(end + bent * thick * 0.12), thick * 0.45, thick * 0.45)
            colour = np.asarray(_NAILS if rng.random() < 0.7 else _random_colour(rng), np.float32)
            painter.add(np.broadcast_to(0.6 * colour + 0.4 * skin, (side, side, 3)), nail * np.float32(0.8))
    if rng.random() < 0.7 and fingers == 4:
        root = palm_at + across * width * 0.42 * mirrored
        heading = -back * 0.7 + across * 0.7 * mirrored
        thumb = _capsule(side, _at(root), _at(root + heading * size * 0.3), width * 0.28, width * 0.21)
        paint(thumb, width * 0.13)
    return painter.layer()


_PALM = ((-1, -1, 0.45), (-1, 1, 0.45), (0.2, 1, 0.5), (1, 1, 0.36), (1, -1, 0.36), (0.2, -1, 0.5))


def _at(point: np.ndarray[tuple[int, ...], np.dtype[np.floating]]) -> Point:
    return float(point[0]), float(point[1])


def _microphone(scene: Scene, rng: np.random.Generator) -> Layer:
    side, centre = scene.side, scene.face_point(rng, 0.05)
    radius = float(rng.uniform(0.05, 0.13)) * side
    angle = rng.normal(math.pi / 2, 0.6)
    end = centre[0] + math.cos(angle) * side, centre[1] + math.sin(angle) * side
    painter = _Painter(side)
    rod = _capsule(side, centre, end, radius * float(rng.uniform(0.5, 1.1)), radius * float(rng.uniform(0.5, 1.1)))
    metal = _random_colour(rng) * (0.3 if rng.random() < 0.7 else 1)
    flat = rng.random() < 0.25
    painter.add(np.clip(metal * (1 if flat else _rounded(rod, rng, radius * 0.5)[..., None]) + np.zeros((side, side, 3)), 0, 255), rod)
    head = _blob(side, centre, radius, rng, float(rng.uniform(0, 0.04)), float(rng.uniform(0.85, 1.2)))
    y, x = np.mgrid[:side, :side].astype(np.float32)
    period = rng.uniform(2, 6)
    if rng.random() < 0.6:
        grain = 1 + 0.25 * np.sin(2 * math.pi * (x + y) / period) * np.sin(2 * math.pi * (x - y) / period)  # a wire mesh
    else:
        grain = 1 + rng.uniform(0.05, 0.3) * rng.standard_normal((side, side), np.float32)  # foam
    colour = (_random_colour(rng) if rng.random() < 0.4 else np.full(3, rng.uniform(10, 110), np.float32)) * grain[..., None]
    painter.add(np.clip(colour * (1 if flat else _rounded(head, rng, radius * 0.9)[..., None]), 0, 255).astype(np.float32), head)
    if rng.random() < 0.3:  # a hand holds it
        held = _hand(scene, rng)
        lower = np.asarray(np.clip((np.arange(side, dtype=np.float32)[:, None] - centre[1] - radius * 1.5) / 6, 0, 1), np.float32)
        painter.add(held.colour, held.alpha * lower)
    return painter.layer()


def _cup(scene: Scene, rng: np.random.Generator) -> Layer:
    """A cup, a glass or a bowl at the mouth."""
    side, (left, top, right, bottom) = scene.side, scene.face_box()
    x = float(rng.uniform(left, right))
    y = float(rng.uniform(top + 0.5 * (bottom - top), bottom))
    width, height = float(rng.uniform(0.14, 0.4)) * side, float(rng.uniform(0.18, 0.5)) * side
    narrow = float(rng.uniform(0.6, 1.05))
    turn = float(rng.normal(0, 0.2))
    corners = np.array([(-0.5, 0), (0.5, 0), (0.5 * narrow, 1), (-0.5 * narrow, 1)], np.float32) * (width, height)
    matrix = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]], np.float32)
    alpha = _polygon(side, (corners @ matrix.T + (x, y)).astype(np.float32))
    painter = _Painter(side)
    surface = _texture(scene, rng) if rng.random() < 0.5 else np.broadcast_to(_random_colour(rng), (side, side, 3))
    across = (np.mgrid[:side, :side][1] - x) / width
    painter.add(np.clip(surface * (1 - rng.uniform(0.3, 1.2) * (across - rng.normal(0, 0.2)) ** 2)[..., None], 0, 255), alpha)
    if rng.random() < 0.7:
        rim = _canvas(side)
        cv2.ellipse(
            rim,
            (round(x), round(y)),
            (round(width / 2), max(1, round(width * rng.uniform(0.03, 0.2)))),
            math.degrees(turn),
            0,
            360,
            255,
            -1,
            cv2.LINE_AA,
        )
        shade = rng.uniform(0.3, 1.2)
        painter.add(
            np.clip(painter.colour[min(side - 1, round(y) + 3), min(side - 1, round(x))] * shade + np.zeros((side, side, 3)), 0, 255),
            _share(rim),
        )
    layer = painter.layer()
    if rng.random() < 0.15:
        return Layer(layer.colour, layer.alpha * np.float32(rng.uniform(0.45, 0.8)))
    return layer


def _mask(scene: Scene, rng: np.random.Generator) -> Layer:
    """A face mask or a scarf over mouth and nose."""
    side, (left, top, right, bottom) = scene.side, scene.face_box()
    width, height = right - left, bottom - top
    nose = top + height * float(rng.uniform(0.42, 0.68))
    middle = (left + right) / 2 + float(rng.normal(0, 0.04)) * width
    wide = width * float(rng.uniform(0.42, 0.6))
    chin = bottom + height * float(rng.uniform(-0.03, 0.15))
    points = [
        (-1, 0.12),
        (-0.45, 0.04),
        (0, -0.02),
        (0.45, 0.04),
        (1, 0.12),
        (0.92, 0.6),
        (0.5, 0.95),
        (0, 1.03),
        (-0.5, 0.95),
        (-0.92, 0.6),
    ]
    outline = np.array([(middle + x * wide, nose + y * (chin - nose)) for x, y in points], np.float32)
    outline = outline + rng.normal(0, 0.012 * side, outline.shape).astype(np.float32)
    alpha = _polygon(side, outline.astype(np.float32))
    alpha = np.clip((np.asarray(cv2.GaussianBlur(alpha, (0, 0), 0.02 * side)) - 0.35) * 4, 0, 1).astype(np.float32)
    tint = np.array([(190, 215, 230), (240, 240, 240), (30, 30, 32), (150, 190, 200)], np.float32)[rng.integers(4)]
    surface = _texture(scene, rng) if rng.random() < 0.4 else np.broadcast_to(tint * np.float32(rng.uniform(0.8, 1.05)), (side, side, 3))
    y = np.mgrid[:side, :side][0].astype(np.float32)
    folds = 1 + rng.uniform(0, 0.12) * np.sin(2 * math.pi * y / rng.uniform(0.05, 0.12) / side)
    painter = _Painter(side)
    if rng.random() < 0.6:
        for sign, ear in ((-1, left), (1, right)):
            strap = _capsule(
                side, (middle + sign * wide * 0.95, nose + 0.2 * (chin - nose)), (ear + sign * width * 0.12, nose - height * 0.12), 2.2, 2.2
            )
            painter.add(np.broadcast_to(tint, (side, side, 3)), strap)
    painter.add(np.clip(surface * folds[..., None] * _rounded(alpha, rng, width * 0.35)[..., None], 0, 255), alpha)
    return painter.layer()


def _text(scene: Scene, rng: np.random.Generator) -> Layer:
    """Words, a logo with a panel, or a watermark."""
    side = scene.side
    alpha = _canvas(side)
    words = "".join(rng.choice(list(_LETTERS), int(rng.integers(3, 16))))
    scale = float(rng.uniform(0.35, 2.2)) * side / 256
    thick = max(1, round(scale * rng.uniform(0.8, 4)))
    x, y = scene.face_point(rng, 0.1)
    start = round(x - rng.uniform(0.1, 0.9) * len(words) * 16 * scale), round(y)
    font = int(rng.choice(_FONTS))
    lines = int(rng.integers(1, 3)) if rng.random() < 0.3 else 1
    for line in range(lines):
        cv2.putText(alpha, words, (start[0], start[1] + round(line * 34 * scale)), font, scale, 255, thick, cv2.LINE_AA)
    turn = cv2.getRotationMatrix2D((x, y), float(rng.normal(0, 12)), 1)
    painter = _Painter(side)
    colour = _random_colour(rng)
    if rng.random() < 0.3:
        box = np.array([(-0.3, -0.16), (0.3, -0.16), (0.3, 0.05), (-0.3, 0.05)], np.float32) * side * np.float32(rng.uniform(0.4, 1.5)) + (
            x,
            y,
        )
        panel = _polygon(side, box.astype(np.float32)) * np.float32(rng.uniform(0.5, 1))
        painter.add(np.broadcast_to(_random_colour(rng), (side, side, 3)), panel)
    elif rng.random() < 0.5:
        halo = cv2.dilate(alpha, np.ones((3, 3), np.uint8))
        painter.add(np.broadcast_to(255 - colour, (side, side, 3)), _share(cv2.warpAffine(halo, turn, (side, side))))
    letters = _share(cv2.warpAffine(alpha, turn, (side, side), flags=cv2.INTER_LINEAR))
    opacity = 1.0 if rng.random() < 0.65 else float(rng.uniform(0.45, 0.9))
    painter.add(np.broadcast_to(colour, (side, side, 3)), letters * np.float32(opacity))
    return painter.layer()


def _moved(image: Float32, matrix: Float32, side: int) -> Float32:
    return np.asarray(cv2.warpAffine(image, matrix, (side, side), flags=cv2.INTER_LINEAR), np.float32)


def _head(scene: Scene, rng: np.random.Generator) -> Layer:
    """Another person's head, cut out, or in an oval with what is behind it."""
    side = scene.side
    alpha = np.isin(scene.other_labels, _HEAD).astype(np.float32)
    if rng.random() < 0.25:
        oval = _canvas(side)
        cv2.ellipse(oval, (side // 2, side // 2), (round(side * 0.36), round(side * 0.47)), 0, 0, 360, 255, -1, cv2.LINE_AA)
        alpha = _share(oval)
    elif rng.random() < 0.3:
        alpha = np.isin(scene.other_labels, INNER_FACE).astype(np.float32)
    alpha = np.asarray(cv2.GaussianBlur(alpha, (0, 0), float(rng.uniform(0.6, 3))), np.float32)
    scale = float(rng.uniform(0.4, 1.25))
    matrix = np.asarray(cv2.getRotationMatrix2D((side / 2, side / 2), float(rng.normal(0, 18)), scale), np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    reach = side * (0.16 + 0.3 * scale) * float(rng.uniform(0.65, 1.1))
    matrix[:, 2] += (math.cos(angle) * reach * 1.1, math.sin(angle) * reach)
    colour = scene.other_image.astype(np.float32) * np.float32(rng.uniform(0.7, 1.25))
    if rng.random() < 0.5:  # in the same light
        skin = np.median(scene.other_image[scene.other_labels == Region.SKIN], axis=0) if (scene.other_labels == Region.SKIN).any() else 150
        colour = colour * (scene.skin_colour() / np.maximum(skin, 20)).astype(np.float32)
    return Layer(np.clip(_moved(colour, matrix, side), 0, 255), _moved(alpha, matrix, side))


def _hair(scene: Scene, rng: np.random.Generator) -> Layer:
    """Strands across the face, or a lock of somebody's hair."""
    side = scene.side
    if rng.random() < 0.4 and (scene.other_labels == Region.HAIR).mean() > 0.05:
        alpha = np.asarray(
            cv2.GaussianBlur((scene.other_labels == Region.HAIR).astype(np.float32), (0, 0), float(rng.uniform(0.6, 2.5))), np.float32
        )
        matrix = np.asarray(
            cv2.getRotationMatrix2D((side / 2, side / 2), float(rng.normal(0, 40)), float(rng.uniform(0.6, 1.2))), np.float32
        )
        matrix[:, 2] += rng.normal(0, 0.16 * side, 2)
        matrix[1, 2] += 0.12 * side
        return Layer(_moved(scene.other_image.astype(np.float32), matrix, side), _moved(alpha, matrix, side))
    colour = np.array([(30, 22, 18), (75, 48, 30), (140, 100, 60), (205, 175, 125), (120, 115, 112), (110, 45, 25)], np.float32)[
        rng.integers(6)
    ]
    left, top, right, bottom = scene.face_box()
    root = np.array([rng.uniform(left, right), top - 0.1 * (bottom - top)])
    fall = np.array([rng.normal(0, 0.3), rng.uniform(0.25, 1.1)]) * (bottom - top)
    bow = rng.normal(0, 0.15, 2) * side
    colours, strands = np.zeros((side, side, 3), np.float32), _canvas(side)
    steps = np.linspace(0, 1, 24)[:, None]
    for _ in range(int(rng.integers(3, 70))):
        start = root + rng.normal(0, 0.05, 2) * side * (2, 0.5)
        end = root + fall + rng.normal(0, 0.06, 2) * side
        middle = (start + end) / 2 + bow + rng.normal(0, 0.02, 2) * side
        curve = np.rint(((1 - steps) ** 2 * start + 2 * steps * (1 - steps) * middle + steps**2 * end) * 16).astype(np.int32)
        thick = int(rng.integers(1, 3))
        cv2.polylines(strands, [curve], False, int(rng.integers(130, 256)), thick, cv2.LINE_AA, 4)
        cv2.polylines(colours, [curve], False, np.clip(colour * rng.uniform(0.6, 1.5), 1, 255).tolist(), thick + 2, cv2.LINE_8, 4)
    return Layer(colours, _share(strands))


def _stick(scene: Scene, rng: np.random.Generator) -> Layer:
    """Straws, pens, forks, bars: one to five thin rods."""
    side = scene.side
    painter = _Painter(side)
    parallel = rng.normal(0, 1, 2)
    parallel = parallel / max(np.hypot(*parallel), 1e-6)
    thick = float(rng.uniform(0.012, 0.07)) * side
    for _ in range(int(rng.choice([1, 1, 1, 2, 3, 5]))):
        at = np.array(scene.face_point(rng, 0.05))
        ends = _at(at - parallel * side * rng.uniform(0.05, 1)), _at(at + parallel * side * rng.uniform(0.3, 1))
        rod = _capsule(side, ends[0], ends[1], thick, thick)
        surface = _texture(scene, rng) if rng.random() < 0.4 else np.broadcast_to(_random_colour(rng), (side, side, 3))
        painter.add(np.clip(surface * _rounded(rod, rng, thick * 0.6)[..., None], 0, 255), rod)
    return painter.layer()


def _food(scene: Scene, rng: np.random.Generator) -> Layer:
    """Something round at the mouth: fruit, a bun, a ball, ice cream."""
    side, (left, top, right, bottom) = scene.side, scene.face_box()
    centre = float(rng.uniform(left, right)), float(rng.uniform(top + 0.4 * (bottom - top), bottom))
    radius = float(rng.uniform(0.05, 0.17)) * side
    painter = _Painter(side)
    for layer in range(int(rng.integers(1, 4))):
        part = _blob(
            side,
            (centre[0], centre[1] + layer * radius * 0.5),
            radius * float(rng.uniform(0.8, 1.1)),
            rng,
            0.1,
            float(rng.uniform(0.8, 1.4)),
        )
        warm = np.array([rng.uniform(90, 255), rng.uniform(30, 210), rng.uniform(0, 120)], np.float32)
        surface = warm * (1 + rng.uniform(0.02, 0.15) * _noise(side, rng, 6, 96))[..., None]
        painter.add(np.clip(surface * _rounded(part, rng, radius * 0.8)[..., None], 0, 255), part)
    return painter.layer()


def _pane(scene: Scene, rng: np.random.Generator) -> Layer:
    """Something half transparent: a pane, a veil, smoke, a coloured plate."""
    side = scene.side
    alpha = _blob(side, scene.face_point(rng), float(rng.uniform(0.1, 0.35)) * side, rng, 0.3, float(rng.uniform(0.6, 1.6)))
    if rng.random() < 0.4:
        alpha = alpha * np.clip(0.6 + 0.35 * _noise(side, rng, 3, 24), 0, 1)
    return Layer(_texture(scene, rng), np.asarray(alpha * rng.uniform(0.35, 0.85), np.float32))


def _sunglasses(scene: Scene, rng: np.random.Generator) -> Layer:
    """Glasses that nothing is seen through."""
    return _glasses(scene, rng, 1.0) or _shape(scene, rng)


def clear_glasses(scene: Scene, rng: np.random.Generator) -> UInt8:
    """Put glasses on the face that its eyes show through, RGB (S, S, 3): they are part of the face, not a thing in front of it."""
    layer = _glasses(scene, rng, float(rng.uniform(0.0, 0.25)))
    if layer is None:
        return scene.image
    base = scene.image.astype(np.float32)
    alpha = np.asarray(cv2.GaussianBlur(layer.alpha, (0, 0), float(rng.uniform(0.3, 0.9))), np.float32)[..., None]
    return np.clip(np.rint(base + alpha * (layer.colour - base)), 0, 255).astype(np.uint8)


def _glasses(scene: Scene, rng: np.random.Generator, opacity: float) -> Layer | None:
    """Glasses whose lenses hide that share of what is behind them; None where no eyes are seen."""
    side = scene.side
    rows, columns = np.nonzero(np.isin(scene.labels, (Region.EYES, Region.BROWS)))
    if len(rows) < 8:
        return None
    left, right = np.percentile(columns, (3, 97))
    middle, level = (left + right) / 2, float(np.percentile(rows, 70))
    width, height = (right - left) * float(rng.uniform(0.22, 0.32)), (right - left) * float(rng.uniform(0.15, 0.3))
    apart = (right - left) * float(rng.uniform(0.26, 0.32))
    turn = float(rng.normal(0, 2))
    painter = _Painter(side)
    frame = _random_colour(rng) * np.float32(0.25 if rng.random() < 0.7 else 1)
    round_lenses, thick = rng.random() < 0.5, int(rng.integers(1, 4))
    for sign in (-1, 1):
        at = middle + sign * apart, level + sign * apart * math.tan(math.radians(turn))
        if round_lenses:
            oval = _canvas(side)
            cv2.ellipse(oval, (round(at[0]), round(at[1])), (round(width), round(height)), turn, 0, 360, 255, -1, cv2.LINE_AA)
            lens = _share(oval)
        else:
            box = np.array([(-1, -0.8), (1, -0.8), (0.85, 0.9), (-0.85, 0.9)], np.float32) * (width, height) + at
            lens = _polygon(side, box.astype(np.float32))
        arm = _capsule(side, (at[0] + sign * width, at[1]), (middle + sign * (right - left) * 0.85, at[1] - height * 0.2), 3, 3)
        painter.add(np.broadcast_to(frame, (side, side, 3)), arm)
        shine = np.clip(_noise(side, rng, 2, 6), 0, 2)[..., None] * rng.uniform(0, 50)
        painter.add(np.clip(np.broadcast_to(frame * 0.7, (side, side, 3)) + shine, 0, 255).astype(np.float32), lens * np.float32(opacity))
        if opacity < 1:
            rim = np.clip(lens - np.asarray(cv2.erode(lens, np.ones((2 * thick + 1,) * 2, np.uint8)), np.float32), 0, 1)
            painter.add(np.broadcast_to(frame, (side, side, 3)), rim)
    gap = max(apart - width, 0)
    painter.add(np.broadcast_to(frame, (side, side, 3)), _capsule(side, (middle - gap, level), (middle + gap, level), 3, 3))
    return painter.layer()


def _phone(scene: Scene, rng: np.random.Generator) -> Layer:
    """A phone or a camera before the face, often held."""
    side, (x, y) = scene.side, scene.face_point(rng)
    width = float(rng.uniform(0.18, 0.32)) * side
    height = width * float(rng.uniform(0.6, 2.0))
    turn = float(rng.normal(0, 0.3))
    matrix = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]], np.float32)
    corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)], np.float32) * (width, height)
    body = _polygon(side, (corners @ matrix.T + (x, y)).astype(np.float32))
    painter = _Painter(side)
    painter.add(np.clip(_random_colour(rng) * 0.4 + 6 * _noise(side, rng, 1, 4)[..., None], 0, 255).astype(np.float32), body)
    for across, down, radius in ((-0.3, -0.36, 0.09), (-0.3, -0.2, 0.09), (-0.1, -0.36, 0.05)):
        at = np.array([across * width, down * height], np.float32) @ matrix.T + (x, y)
        lens = _blob(side, _at(at), radius * width, rng, 0, 1)
        painter.add(np.broadcast_to(np.float32(rng.uniform(0, 60)), (side, side, 3)), lens)
    if rng.random() < 0.5:
        for finger in range(4):
            start = np.array([0.5 * width, (-0.2 + 0.17 * finger) * height], np.float32) @ matrix.T + (x, y)
            end = np.array([0.15 * width, (-0.16 + 0.17 * finger) * height], np.float32) @ matrix.T + (x, y)
            part = _capsule(side, _at(start), _at(end), width * 0.17, width * 0.14)
            painter.add(np.clip(scene.skin_colour() * _rounded(part, rng, width * 0.08)[..., None], 0, 255), part)
    return painter.layer()


def _leaves(scene: Scene, rng: np.random.Generator) -> Layer:
    """A twig with pointed leaves."""
    side = scene.side
    start, end = np.array(scene.face_point(rng, 0.3)), np.array(scene.face_point(rng, 0.3))
    painter = _Painter(side)
    painter.add(np.broadcast_to(np.array([85, 65, 40], np.float32), (side, side, 3)), _capsule(side, _at(start), _at(end), 4, 2))
    for _ in range(int(rng.integers(4, 11))):
        at = start + (end - start) * rng.random()
        angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(0.08, 0.2) * side
        along, out = np.array([math.cos(angle), math.sin(angle)]), np.array([-math.sin(angle), math.cos(angle)])
        width = length * rng.uniform(0.15, 0.3)
        steps = np.linspace(0, 1, 12)
        bow = np.sin(math.pi * steps) * width
        edges = [at + along * length * step + out * swell for step, swell in zip(steps, bow, strict=True)]
        edges += [at + along * length * step - out * swell for step, swell in zip(steps[::-1], bow[::-1], strict=True)]
        leaf = _polygon(side, np.array(edges, np.float32))
        green = np.array([rng.uniform(20, 130), rng.uniform(70, 190), rng.uniform(10, 80)], np.float32)
        painter.add(np.clip(green * (1 + 0.1 * _noise(side, rng, 8, 64))[..., None] * _rounded(leaf, rng, width)[..., None], 0, 255), leaf)
    return painter.layer()


def _bottle(scene: Scene, rng: np.random.Generator) -> Layer:
    """A bottle with a label, its neck at the mouth."""
    side, (left, top, right, bottom) = scene.side, scene.face_box()
    x, y = float(rng.uniform(left, right)), float(rng.uniform(top + 0.55 * (bottom - top), bottom))
    width, turn = float(rng.uniform(0.12, 0.24)) * side, float(rng.normal(0, 0.5))
    outline = [(-0.18, 0), (0.18, 0), (0.2, 0.8), (0.5, 1.3), (0.5, 4), (-0.5, 4), (-0.5, 1.3), (-0.2, 0.8)]
    matrix = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]], np.float32)
    body = _polygon(side, ((np.array(outline, np.float32) * width) @ matrix.T + (x, y)).astype(np.float32))
    painter = _Painter(side)
    glass = np.array([(40, 80, 40), (90, 50, 20), (200, 215, 220), (30, 60, 130)], np.float32)[rng.integers(4)]
    painter.add(np.clip(glass * _rounded(body, rng, width * 0.4)[..., None], 0, 255), body)
    label = np.array([(-0.5, 1.7), (0.5, 1.7), (0.5, 2.8), (-0.5, 2.8)], np.float32) * width
    painter.add(_texture(scene, rng), _polygon(side, (label @ matrix.T + (x, y)).astype(np.float32)))
    return painter.layer()


TRAINED: Mapping[str, Kind] = {
    "shape": _shape,
    "hand": _hand,
    "microphone": _microphone,
    "cup": _cup,
    "mask": _mask,
    "text": _text,
    "head": _head,
    "hair": _hair,
    "stick": _stick,
    "food": _food,
    "pane": _pane,
    "sunglasses": _sunglasses,
}
UNSEEN: Mapping[str, Kind] = {"phone": _phone, "leaves": _leaves, "bottle": _bottle}
KINDS: Mapping[str, Kind] = {**TRAINED, **UNSEEN}
