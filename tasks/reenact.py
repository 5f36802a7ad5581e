"""Stage `reenact`: the source person in the target's pose and expression, drawn by warping the source's own pixels over a dense mesh.

Backend `mesh` plans the driven mesh in the canonical frame (source's shape, target's change of expression, target's pose) and maps each
pixel back to the source. Backend `none` keeps the source face as it is (ablation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape
from e4s_models.face_mesh import (
    NUM_POINTS,
    NUM_VERTICES,
    Float32,
    Geometry,
    Int32,
    UInt8,
    fit_similarity,
    load_expression_basis,
)
from tasks.stage import Cost, Inputs, ItemError, Outputs, Stage, each

Bool = npt.NDArray[np.bool_]

# Vertex loops of MediaPipe's mesh, named by image side (the right eye of a person is on the image's left).
_LIP_CORNERS = (78, 308)
_UPPER_LIP = (191, 80, 81, 82, 13, 312, 311, 310, 415)  # inner rim, image left to right
_LOWER_LIP = (95, 88, 178, 87, 14, 317, 402, 318, 324)
_EYES = (  # corners (image left, right), upper lid, lower lid, iris centre, iris right, iris left
    ((33, 133), (246, 161, 160, 159, 158, 157, 173), (7, 163, 144, 145, 153, 154, 155), 468, 469, 471),
    ((362, 263), (398, 384, 385, 386, 387, 388, 466), (382, 381, 380, 374, 373, 390, 249), 473, 474, 476),
)
_OVAL = (10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377,
         152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109)  # fmt: skip
_SUBPIXEL = 4  # bits of the rasteriser's fixed point


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the driven mesh is planned and drawn."""

    expression: float = 1.0  # share of the target's change of expression that is followed
    follow_gaze: bool = True
    max_displacement: float = 2.5  # cm, a vertex moves no further by expression (mouth wide open: 4 at the chin)
    eye_follow: float = 0.5  # share of the lids' opening taken from the target itself, the rest from the coefficients
    max_eye_opening: float = 1.35  # times the source's: beyond it the iris is drawn out
    borrow_mouth: float = 0.5  # source's opening / driven opening: below it the inner mouth is the target's
    max_gaze: float = 0.4  # half widths of the eye
    mouth_shade: float = 0.55  # how much darker the teeth get while the lips close over them
    hidden_detail: float = 30.0  # grey levels: how much detail what is not seen in the source may have
    rim: tuple[float, float] = (0.015, 0.06)  # face widths from the mesh's outline in the source: unusable below, trusted above
    hidden: tuple[float, float] = (0.05, 0.3)  # cosine of normal and view in the source: unusable below, trusted above


@dataclass(frozen=True)
class Model:
    geometry: Geometry
    basis: Float32  # (52, 468, 3) cm


def _load(config: MeshConfig, device: str) -> Model:
    return Model(Geometry.load(), load_expression_basis())


# ---- planning: where each vertex goes ----


def _spread(where: Float32, handles: Float32, moves: Float32, sigma: float) -> Float32:
    """Carry the handles' moves to the vertices near them, fading with distance: (N, 3), (H, 3), (H, 3), cm -> (N, 3)."""
    distance = ((where[:, None] - handles[None]) ** 2).sum(-1)
    weights = np.exp(-distance / (2 * (sigma / 3) ** 2)) + 1e-12  # sharp: a vertex follows the handles beside it
    fade = np.exp(-distance.min(1) / (2 * sigma**2))
    return np.asarray((weights @ moves) / weights.sum(1, keepdims=True) * fade[:, None], np.float32)


def _set_gap(
    shape: Float32, template: Float32, upper: Sequence[int], lower: Sequence[int], gaps: Float32, parts: tuple[float, float], sigma: float
) -> None:
    """Move the two rims of an opening, and what is near them on their side, so that upper - lower = gaps (P, 3) cm; in place."""
    up, low = list(upper), list(lower)
    excess = gaps - (shape[up] - shape[low])
    # which side of the opening a vertex is on is read off the neutral template
    line = np.interp(template[:, 0], template[up, 0], (template[up, 1] + template[low, 1]) / 2)
    above = template[:, 1] < line
    above[up], above[low] = True, False
    for side, rim, share in ((above, up, parts[0]), (~above, low, -parts[1])):
        shape[:NUM_VERTICES][side] += _spread(template[side], template[rim], np.float32(share) * excess, sigma)


def _width(shape: Float32, corners: tuple[int, int]) -> float:
    return float(np.linalg.norm(shape[corners[1]] - shape[corners[0]]))


def plan_points(model: Model, config: MeshConfig, source: Float32, target: Float32, change: Float32) -> Float32:
    """Where the source's mesh goes: its own shape, changed by the difference of expression, in the target's pose.

    source, target (478, 3) px; change (52,) = target's coefficients minus source's. Returns the driven points (478, 3) px of the
    target's crop (irises not moved for gaze).
    """
    geometry = model.geometry
    template = geometry.vertices
    source_pose, target_pose = geometry.pose(source), geometry.pose(target)
    neutral = source_pose.inverse().apply(source)  # (478, 3) cm, the source seen from the front
    wanted = target_pose.inverse().apply(target)
    move = np.tensordot(config.expression * change, model.basis, 1).astype(np.float32)  # (468, 3)
    length = np.linalg.norm(move, axis=1, keepdims=True)
    move *= config.max_displacement * np.tanh(length / config.max_displacement) / np.maximum(length, 1e-6)
    shape = neutral.copy()
    shape[:NUM_VERTICES] += move
    # lips: the opening is the target's, in proportion to the mouth's width, so that closed lips close
    ratio = np.clip(_width(shape, _LIP_CORNERS) / _width(wanted, _LIP_CORNERS), 0.75, 1.3)
    up, low = list(_UPPER_LIP), list(_LOWER_LIP)
    gaps = shape[up] - shape[low]
    gaps[:, 1:] += config.expression * (ratio * (wanted[up] - wanted[low]) - gaps)[:, 1:]
    _set_gap(shape, template, _UPPER_LIP, _LOWER_LIP, gaps, (0.3, 0.7), 1.2)
    for corners, upper, lower, *_ in _EYES:
        up, low = list(upper), list(lower)
        have, own, theirs = (points[up] - points[low] for points in (shape, neutral, wanted))
        openness = [
            float(np.linalg.norm(gap, axis=1).mean()) / _width(points, corners)
            for gap, points in ((have, shape), (own, neutral), (theirs, wanted))
        ]
        shut = min(max((0.2 - openness[2]) / 0.1, 0.0), 1.0)  # a shut eye is shut, whatever the coefficients say
        follow = config.expression * max(config.eye_follow, shut)
        goal = min((1 - follow) * openness[0] + follow * openness[2], config.max_eye_opening * openness[1])
        _set_gap(shape, template, upper, lower, have * (goal / max(openness[0], 1e-6)), (0.8, 0.2), 0.5)
    placed = fit_similarity(shape[:NUM_VERTICES], target[:NUM_VERTICES], geometry.weights)
    return placed.apply(shape)


# ---- drawing ----


def _inside_mouth(triangles: Int32) -> Bool:
    """Which triangles close the opening between the lips: (T,)."""
    return np.asarray(np.isin(triangles, [*_LIP_CORNERS, *_UPPER_LIP, *_LOWER_LIP]).all(1), np.bool_)


def _paint(points: Float32, triangles: Int32, side: tuple[int, int]) -> Int32:
    """Painter's rasterisation: the number of the triangle seen at each pixel, -1 where none; triangles turned away are left out."""
    corners = points[triangles]  # (T, 3, 3)
    a, b = corners[:, 1, :2] - corners[:, 0, :2], corners[:, 2, :2] - corners[:, 0, :2]
    facing = _FRONT * (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]) > 0.5  # px²
    depth = corners[:, :, 2].mean(1) + np.where(_inside_mouth(triangles), float(np.ptp(points[:, 2])), 0)  # behind the lips
    fixed = np.round(corners[:, :, :2] * (1 << _SUBPIXEL)).astype(np.int32)
    ids = np.full(side, -1, np.int32)
    for index in np.argsort(-depth, kind="stable"):  # far ones first
        if facing[index]:
            cv2.fillConvexPoly(ids, fixed[index], int(index), shift=_SUBPIXEL)
    return ids


_FRONT = -1  # sign of a front-facing triangle's area in image axes


def _affine(onto: Float32, points: Float32, triangles: Int32) -> Float32:
    """Per triangle the affine map that takes points (x, y) to onto (.., C): (T, C, 3)."""
    corners = np.concatenate([points[triangles][:, :, :2], np.ones((len(triangles), 3, 1), np.float32)], 2).astype(np.float64)
    area = np.linalg.det(corners)
    corners[np.abs(area) < 0.4] = np.eye(3)  # px²: such a triangle is not painted
    return np.asarray(np.swapaxes(np.linalg.solve(corners, onto[triangles].astype(np.float64)), 1, 2), np.float64).astype(np.float32)


def _evaluate(affine: Float32, ids: Int32, mask: Bool, here: Float32) -> Float32:
    """Apply each masked pixel's triangle's map to the pixel's place: (N, C)."""
    at, xy = affine[ids[mask]], here[mask]
    return np.asarray(at[:, :, 0] * xy[:, :1] + at[:, :, 1] * xy[:, 1:] + at[:, :, 2], np.float32)


def _sample(image: UInt8, xy: Float32) -> Float32:
    """Read the image at xy (H, W, 2) px: (H, W, 3)."""
    return cv2.remap(image, xy[..., 0], xy[..., 1], cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REFLECT_101).astype(np.float32)


def _window(mask: Bool, margin: int) -> tuple[slice, slice]:
    """The box of a mask with a margin (px), cut to the picture."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return slice(max(0, rows[0] - margin), rows[-1] + margin + 1), slice(max(0, columns[0] - margin), columns[-1] + margin + 1)


def _normalised_blur(values: Float32, weight: Float32, sigma: float) -> Float32:
    """Blur values (H, W, C) with weights (H, W), so that nothing leaks in from where the weight is 0."""
    total = cv2.GaussianBlur(weight, (0, 0), sigma)
    return np.asarray(cv2.GaussianBlur(values * weight[..., None], (0, 0), sigma) / np.maximum(total, 1e-6)[..., None], np.float32)


def _shrink(values: Float32, size: tuple[int, int]) -> Float32:
    """Area-average to size (width, height)."""
    return np.asarray(cv2.resize(values, size, interpolation=cv2.INTER_AREA), np.float32)


def _fill(values: Float32, weight: Float32) -> Float32:
    """Spread values (H, W, C) from where weight (H, W) is to everywhere, smoothly: push-pull over a pyramid (Gortler 1996)."""
    stack = [np.dstack([values * weight[..., None], weight]).astype(np.float32)]
    while min(stack[-1].shape[:2]) > 2:
        stack.append(np.asarray(cv2.pyrDown(stack[-1]), np.float32))
    filled = stack[-1][..., :-1] / np.maximum(stack[-1][..., -1:], 1e-6)
    for level in reversed(stack[:-1]):
        known = np.clip(level[..., -1:], 0, 1)
        up = cv2.pyrUp(filled, dstsize=(level.shape[1], level.shape[0]))
        filled = level[..., :-1] / np.maximum(level[..., -1:], 1e-6) * known + up * (1 - known)
    return np.asarray(filled, np.float32)


def _fill_coarsely(values: Float32, weight: Float32) -> Float32:
    """`_fill` of the low frequencies: at a quarter of the resolution."""
    size, small = (weight.shape[1], weight.shape[0]), (max(2, weight.shape[1] // 4), max(2, weight.shape[0] // 4))
    share = _shrink(weight, small)
    coarse = np.asarray(_shrink(values * weight[..., None], small) / np.maximum(share, 1e-6)[..., None], np.float32)
    filled = _fill(_normalised_blur(coarse, share, 4.0), np.clip(2 * cv2.GaussianBlur(share, (0, 0), 4.0) - 0.2, 0, 1).astype(np.float32))
    return np.asarray(cv2.resize(filled, size, interpolation=cv2.INTER_LINEAR), np.float32)


def _view(points: Float32, triangles: Int32, side: tuple[int, int], config: MeshConfig) -> tuple[Float32, Float32, Float32]:
    """How each vertex is seen in its picture, three times (468,): cosine of normal and view; confidence, 0 turned away or covered,
    1 seen from the front; and 0 at the face's outline to 1 well inside."""
    hidden, rim = config.hidden, config.rim
    corners = points[triangles]
    normals = _FRONT * np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])  # (T, 3), towards +z where front-facing
    summed = np.zeros((NUM_VERTICES, 3))
    for k in range(3):
        np.add.at(summed, triangles[:, k], normals)
    cosine = summed[:, 2] / np.maximum(np.linalg.norm(summed, axis=1), 1e-6)
    ramp = np.clip((cosine - hidden[0]) / (hidden[1] - hidden[0]), 0, 1)
    ids = _paint(points, triangles, side)
    depth = np.full(side, np.inf, np.float32)
    mask = ids >= 0
    depth[mask] = _evaluate(_affine(points[:, 2:], points, triangles), ids, mask, _pixels(side))[:, 0]
    x = np.clip(np.round(points[:NUM_VERTICES, 0]).astype(int), 0, side[1] - 1)
    y = np.clip(np.round(points[:NUM_VERTICES, 1]).astype(int), 0, side[0] - 1)
    behind = points[:NUM_VERTICES, 2] - depth[y, x]
    tolerance = 0.03 * float(np.ptp(points[:NUM_VERTICES, 0]))
    covered = np.clip(behind / tolerance - 1, 0, 1)
    covered[~np.isfinite(covered)] = 0
    # The mesh's outline misses the face's by some pixels: close to it, the picture may show what lies behind the face.
    inside = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5)[y, x] / float(np.ptp(points[:NUM_VERTICES, 0]))
    inner = np.clip((inside - rim[0]) / (rim[1] - rim[0]), 0, 1)
    return cosine.astype(np.float32), np.asarray(ramp * ramp * (3 - 2 * ramp) * (1 - covered), np.float32), np.asarray(inner, np.float32)


def _seen_and_revealed(source: tuple[Float32, Float32, Float32], driven: tuple[Float32, Float32, Float32]) -> tuple[Float32, Float32]:
    """From the views of source and driven face: how far each vertex is seen in the source, and how far it comes into view anew.

    At the outline the source counts as unseen. On a side that turns into view this is mended; on one that does not, the outline
    stays as it is.
    """
    turned = np.clip((driven[0] - source[0] - 0.05) / 0.2, 0, 1)
    seen = source[1] * source[2]
    return seen, np.clip(driven[1] * (driven[2] + turned * (1 - driven[2])) - seen, 0, 1)


def _outline(points: Float32, ids: Int32) -> tuple[Float32, Float32]:
    """The drawn face's centre (2,) and its outline: the oval's vertices (36, 2) px.

    Vertices of the far side that the face itself hides are replaced by points of the silhouette, spread evenly between the
    neighbours that are seen.
    """
    rows, columns = np.nonzero(ids >= 0)
    centre = np.array([columns.mean(), rows.mean()])
    oval = points[list(_OVAL), :2] - centre
    radius = np.arange(1, 1.5 * max(ids.shape))

    def silhouette(angle: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Radius of the drawn face in each direction."""
        x = np.clip(np.rint(centre[0] + np.cos(angle)[:, None] * radius), 0, ids.shape[1] - 1).astype(int)
        y = np.clip(np.rint(centre[1] + np.sin(angle)[:, None] * radius), 0, ids.shape[0] - 1).astype(int)
        inside = (ids[y, x] >= 0) & ((x > 0) & (y > 0) & (x < ids.shape[1] - 1) & (y < ids.shape[0] - 1))
        return np.asarray((inside * radius).max(1))

    angle = np.arctan2(oval[:, 1], oval[:, 0])
    length = np.hypot(oval[:, 0], oval[:, 1])
    hidden = silhouette(angle) > 1.04 * length
    if hidden.any() and (~hidden).sum() >= 3:
        seen = np.flatnonzero(~hidden)
        turn = np.unwrap(np.append(angle[seen], angle[seen[0]]))
        index = np.append(seen, seen[0] + len(_OVAL))
        spread = np.interp((np.flatnonzero(hidden) - seen[0]) % len(_OVAL) + seen[0], index, turn)
        reach = np.maximum(silhouette(spread), 1.0)
        oval[hidden] = np.column_stack([np.cos(spread), np.sin(spread)]) * reach[:, None]
    return centre.astype(np.float32), (centre + oval).astype(np.float32)


def _extend(known: Float32, weight: Float32, border: Float32) -> Float32:
    """Harmonic extension, coarse to fine: known displacement (N, N, 2) where weight (N, N) > 0, border values on the frame."""
    sizes = [len(weight)]
    while sizes[-1] > 16:
        sizes.append(sizes[-1] // 2)
    field: Float32 | None = None
    kernel = np.array([[0, 0.25, 0], [0.25, 0, 0.25], [0, 0.25, 0]], np.float32)
    for size in reversed(sizes):
        share = _shrink(weight, (size, size))
        values = _shrink(known * weight[..., None], (size, size)) / np.maximum(share, 1e-6)[..., None]
        edge = _shrink(border, (size, size))
        fixed = share > 0.25
        frame = np.zeros((size, size), bool)
        frame[[0, -1]] = frame[:, [0, -1]] = True
        field = edge.copy() if field is None else np.asarray(cv2.resize(field, (size, size)), np.float32)
        for _ in range(12 if size > 128 else 40):
            field[frame] = edge[frame]
            field[fixed] = values[fixed]
            field = np.asarray(cv2.filter2D(field, -1, kernel, borderType=cv2.BORDER_REPLICATE), np.float32)
        field[fixed] = values[fixed]
    assert field is not None
    return np.asarray(field, np.float32)


def _pixels(side: tuple[int, int]) -> Float32:
    return np.stack(np.meshgrid(np.arange(side[1], dtype=np.float32), np.arange(side[0], dtype=np.float32)), -1)


def _surroundings(driven: Float32, source: Float32, driven_ids: Int32, source_ids: Int32) -> Float32:
    """Where the pixels around the face come from: outline goes to outline, fading into the head's similarity; (H, W, 2) px."""
    side = driven_ids.shape
    fans = []
    for points, ids in ((driven, driven_ids), (source, source_ids)):
        centre, loop = _outline(points, ids)
        fans.append(np.vstack([centre[None], loop]))
    k = np.arange(len(_OVAL))
    spokes = np.column_stack([np.zeros_like(k), k + 1, (k + 1) % len(k) + 1]).astype(np.int32)
    ids = np.full(side, -1, np.int32)
    for index, corners in enumerate(np.round(fans[0][spokes] * (1 << _SUBPIXEL)).astype(np.int32)):
        cv2.fillConvexPoly(ids, corners, index, shift=_SUBPIXEL)
    mask = ids >= 0
    here = _pixels(side)
    field = np.zeros((*side, 2), np.float32)
    field[mask] = _evaluate(_affine(fans[1], fans[0], spokes), ids, mask, here) - here[mask]
    # at the frame: the similarity of the two pictures' heads, without the turn out of the plane
    to_source = fit_plane(fans[0], fans[1])
    border = here @ to_source[:, :2].T + to_source[:, 2] - here
    small = (256, 256)
    weight = _shrink(mask.astype(np.float32), small)
    known = np.asarray(_shrink(field, small) / np.maximum(weight, 1e-6)[..., None], np.float32)
    outer = cv2.resize(
        _extend(known, (weight > 0.6).astype(np.float32), _shrink(border, small)), (side[1], side[0]), interpolation=cv2.INTER_CUBIC
    )
    outer[mask] = field[mask]
    return np.asarray(here + outer, np.float32)


def fit_plane(points: Float32, onto: Float32) -> Float32:
    """The plane similarity that takes points (N, 2) onto others with least squared error: (2, 3)."""
    a, b = (p.astype(np.float64) @ [1, 1j] for p in (points, onto))
    turn = ((b - b.mean()) * (a - a.mean()).conj()).sum() / (np.abs(a - a.mean()) ** 2).sum()
    shift = b.mean() - turn * a.mean()
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]], np.float32)


def _eye_map(eye: int, driven: Float32, source: Float32, xy: Float32, gaze: float) -> Float32:
    """Where the pixels xy (N, 2) inside a driven eye come from: the eyeball is moved, not squashed, under the lids; (N, 2)."""
    corners, upper, lower, centre, right, left = _EYES[eye]
    frames = []
    for points in (driven, source):
        a, b = points[corners[0], :2], points[corners[1], :2]
        half = (b - a) / 2
        lids = (points[list(upper), :2].mean(0) - points[list(lower), :2].mean(0)) / np.hypot(*half)
        frames.append(((a + b) / 2, half, float(np.hypot(*lids))))
    (d_mid, d_half, d_open), (s_mid, s_half, s_open) = frames
    d_size, s_size = np.hypot(*d_half), np.hypot(*s_half)
    rel = (xy - d_mid) / d_size
    d_axis, s_axis = d_half / d_size, s_half / s_size
    u, v = rel @ d_axis, rel @ np.array([-d_axis[1], d_axis[0]])
    v = v * min(1.0, s_open / max(d_open, 1e-6))
    iris = float((source[centre, :2] - s_mid) @ s_axis / s_size)
    radius = float(np.linalg.norm(source[right, :2] - source[left, :2]) / 2 / s_size)
    moved = np.clip(iris + gaze, -0.9 + radius, 0.9 - radius)
    u = np.interp(u, [-1.05, moved - radius, moved + radius, 1.05], [-1.05, iris - radius, iris + radius, 1.05])
    return np.asarray(s_mid + s_size * (u[:, None] * s_axis + v[:, None] * np.array([-s_axis[1], s_axis[0]])), np.float32)


def _gaze(points: Float32) -> float:
    """Where the irises are between the corners of their eyes, mean of both: -1 image left, 1 image right."""
    at = []
    for corners, _, _, centre, *_ in _EYES:
        a, b = points[corners[0], :2], points[corners[1], :2]
        half = (b - a) / 2
        at.append(float((points[centre, :2] - (a + b) / 2) @ half / (half @ half)))
    return sum(at) / 2


def _opening(points: Float32) -> float:
    """Mean gap between the lips' inner rims, px."""
    return float(np.linalg.norm(points[list(_UPPER_LIP), :2] - points[list(_LOWER_LIP), :2], axis=1).mean())


def draw(
    model: Model, config: MeshConfig, source_face: UInt8, source: Float32, driven: Float32, target_face: UInt8, target: Float32
) -> tuple[UInt8, UInt8]:
    """Warp the source face onto the driven points.

    Faces RGB (H, W, 3) uint8, points (478, 3) px. Returns the driven face (H, W, 3) and the mask (H, W) of what really is the
    source's texture (255) and not mirrored, stretched or borrowed (0).
    """
    geometry = model.geometry
    triangles = geometry.triangles
    side = target_face.shape[:2]
    whole_ids = _paint(driven, triangles, side)
    if not (whole_ids >= 0).any():
        raise ItemError("reenact: the driven face lies outside the crop; check that both faces are aligned crops")
    around = _surroundings(driven, source, whole_ids, _paint(source, triangles, source_face.shape[:2]))
    image = _sample(source_face, around)

    box = _window(whole_ids >= 0, 8)
    ids, here = whole_ids[box], _pixels(side)[box]
    face = ids >= 0
    cover = face.astype(np.float32)

    def carry(onto: Float32) -> Float32:
        """Where each pixel of the face comes from, with the kinks at the triangles' edges rounded off."""
        move = np.zeros((*ids.shape, 2), np.float32)
        move[face] = _evaluate(_affine(onto[:, :2], driven, triangles), ids, face, here) - here[face]
        change = _normalised_blur(move, cover, 4.0) - move
        change *= np.exp(-((change / 1.5) ** 2).sum(-1, keepdims=True))  # a jump (lips that meet, the nose's edge) stays a jump
        return np.asarray(np.where(face[..., None], here + move + change, around[box]), np.float32)

    pixels = _sample(source_face, carry(_tuck_lips(source, driven)))
    views = _view(source, triangles, source_face.shape[:2], config), _view(driven, triangles, side, config)
    seen, revealed = _seen_and_revealed(*views)
    shares = np.column_stack([revealed, revealed * seen[geometry.mirror[:NUM_VERTICES]], seen]).astype(np.float32)
    share = np.zeros((*ids.shape, 3), np.float32)
    share[face] = _evaluate(_affine(shares, driven, triangles), ids, face, here)
    share = np.clip(_normalised_blur(share, cover, 6.0), 0, 1) * cover[..., None]
    if float(share[..., 0].max()) > 0.02:
        pixels = _complete(pixels, share, cover, _sample(source_face, carry(source[geometry.mirror])), config)

    own = np.asarray(face & (share[..., 0] < 0.5), np.bool_)
    pixels, own = _draw_mouth(pixels, own, config, triangles, ids, here, source_face, source, driven, target_face, target)
    pixels = _draw_eyes(pixels, here, config, source_face, source, driven, target)

    edge = cv2.GaussianBlur(cover, (0, 0), 1.2)[..., None]
    image[box] += edge * (pixels - image[box])
    limit = np.array([source_face.shape[1] - 0.5, source_face.shape[0] - 0.5], np.float32)
    visible = np.asarray(((around >= -0.5) & (around <= limit)).all(-1), np.bool_)
    visible[box] = np.where(face, own, visible[box])
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), np.where(visible, 255, 0).astype(np.uint8)


def _closing(source: Float32, driven: Float32) -> float:
    """How much of the source mouth's opening the driven mouth closes: 0 none, 1 all."""
    have = _opening(source) * _width(driven[:, :2], _LIP_CORNERS) / _width(source[:, :2], _LIP_CORNERS)
    return min(max(1 - _opening(driven) / max(have, 1e-6), 0.0), 1.0)


def _tuck_lips(source: Float32, driven: Float32) -> Float32:
    """The source's points with the lips' rims drawn a little into the lips where they close: teeth must not show along the seam."""
    points = source.copy()
    up, low = list(_UPPER_LIP), list(_LOWER_LIP)
    across = points[_LIP_CORNERS[1], :2] - points[_LIP_CORNERS[0], :2]
    down = np.array([-across[1], across[0]], np.float32)  # as long as the mouth is wide
    tuck = np.float32(0.025 * _closing(source, driven)) * down
    points[up, :2] -= tuck
    points[low, :2] += tuck
    return points


def _complete(pixels: Float32, share: Float32, cover: Float32, other: Float32, config: MeshConfig) -> Float32:
    """Complete what the source's picture does not show: share (H, W, 3) of each pixel that is hidden there, that is so but is
    seen mirrored, and that is seen.

    Colour comes smoothly from the part that is seen, detail from the other half of the face, held small: hair or background that
    lies there is no skin.
    """
    hidden, mirrored = share[..., :1], share[..., 1:2]
    trust = np.clip(2 * share[..., 2] - 1, 0, 1) * np.clip(1 - 4 * share[..., 0], 0, 1) * cover
    base = _fill_coarsely(pixels, trust)
    other = other + _fill_coarsely(pixels - other, trust)  # the halves are lit differently
    detail = pixels + mirrored / np.maximum(hidden, 1e-6) * (other - pixels) - base
    limit = config.hidden_detail
    return np.asarray(pixels + hidden * (base + limit * np.tanh(detail / limit) - pixels), np.float32)


def _draw_mouth(
    pixels: Float32,
    own: Bool,
    config: MeshConfig,
    triangles: Int32,
    ids: Int32,
    here: Float32,
    source_face: UInt8,
    source: Float32,
    driven: Float32,
    target_face: UInt8,
    target: Float32,
) -> tuple[Float32, Bool]:
    """Fill the driven lips' opening: the source's teeth where its mouth is open enough, else the target's."""
    mask = np.asarray((ids >= 0) & _inside_mouth(triangles)[ids], np.bool_)
    if not mask.any():
        return pixels, own
    box = _window(mask, 4)
    mask = np.asarray(mask[box], np.bool_)
    soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 1.5)
    width = _width(driven[:, :2], _LIP_CORNERS)
    needed, closing = _opening(driven), _closing(source, driven)
    opened = min(max(needed / (0.02 * width) - 1, 0.0), 1.0)  # 0: closed, the lips' own seam is best, darkened where teeth were
    pixels[box] *= 1 - (config.mouth_shade * closing * (1 - opened) * np.minimum(2.5 * soft, 1))[..., None]
    if opened == 0:
        return pixels, own
    size = width / _width(source[:, :2], _LIP_CORNERS)
    borrow = _opening(source) * size < config.borrow_mouth * needed
    onto = (target if borrow else source).copy()
    if closing > 0:  # closing lips cover the teeth; they do not squash them
        up, low = list(_UPPER_LIP), list(_LOWER_LIP)
        onto[low, :2] = onto[up, :2] + (driven[low, :2] - driven[up, :2]) / size
    xy = here[box].copy()
    xy[mask] = _evaluate(_affine(onto[:, :2], driven, triangles), ids[box], mask, here[box])
    inside = _sample(target_face if borrow else source_face, xy) * np.float32(1 - config.mouth_shade * closing)
    feather = np.clip(2 * soft - 0.6, 0, 1) * mask * opened
    pixels[box] += feather[..., None] * (inside - pixels[box])
    if borrow:
        own[box] &= ~mask
    return pixels, own


def _draw_eyes(
    pixels: Float32, here: Float32, config: MeshConfig, source_face: UInt8, source: Float32, driven: Float32, target: Float32
) -> Float32:
    """Redraw the eyeballs under the driven lids, looking where the target looks."""
    gaze = float(np.clip(_gaze(target) - _gaze(source), -config.max_gaze, config.max_gaze)) if config.follow_gaze else 0.0
    for eye, (corners, upper, lower, *_) in enumerate(_EYES):
        loop = driven[[corners[0], *upper, corners[1], *lower[::-1]], :2] - here[0, 0]
        mask = np.zeros(pixels.shape[:2], np.uint8)
        cv2.fillPoly(mask, [np.round(loop * (1 << _SUBPIXEL)).astype(np.int32)], 255, lineType=cv2.LINE_AA, shift=_SUBPIXEL)
        if not mask.any():
            continue
        box = _window(mask > 0, 8)
        at = here[box]
        drawn = _sample(source_face, _eye_map(eye, driven, source, at.reshape(-1, 2), gaze).reshape(at.shape))
        height = np.linalg.norm(driven[list(upper), :2] - driven[list(lower), :2], axis=1).mean()
        feather = cv2.GaussianBlur(mask[box].astype(np.float32) / 255, (0, 0), max(0.8, 0.06 * float(height)))
        feather = np.clip(2 * feather - 1, 0, 1)  # from the lid's edge inwards: the lashes stay the mesh's
        pixels[box] += feather[..., None] * (drawn - pixels[box])
    return pixels


def _reenact(model: Model, config: MeshConfig, inputs: Inputs) -> Outputs:
    source_face, target_face = inputs["source_face"], inputs["target_face"]
    source, target = inputs["source_points"], inputs["target_points"]
    for face, points in ((source_face, source), (target_face, target)):
        check_shape(face, "H W 3")
        check_shape(points, f"{NUM_POINTS} 3")
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise ItemError("reenact: the face mesh has points that are no numbers; make the stage `mesh` anew for both faces")
    driven = plan_points(model, config, source, target, inputs["target_blendshapes"] - inputs["source_blendshapes"])
    image, visible = draw(model, config, source_face, source, driven, target_face, target)
    return {"driven": image, "visible": visible}


_READS = ("source_face", "source_points", "source_blendshapes", "target_face", "target_points", "target_blendshapes")


@dataclass(frozen=True, kw_only=True)
class NoneConfig:
    """Nothing to set."""


def _keep(model: None, config: NoneConfig, inputs: Inputs) -> Outputs:
    face = inputs["source_face"]
    check_shape(face, "H W 3")
    return {"driven": face, "visible": np.full(face.shape[:2], 255, np.uint8)}


MESH = Stage(
    name="reenact",
    backend="mesh",
    version=1,
    config=MeshConfig,
    load=_load,
    run=each(_reenact),
    reads=_READS,
    writes={"driven": "image", "visible": "labels"},
    weights=lambda config: ("face_mesh", "expression_basis"),
    cost=Cost(threads=True),
)
NONE = Stage(
    name="reenact",
    backend="none",
    version=1,
    config=NoneConfig,
    run=each(_keep),
    reads=("source_face",),
    writes={"driven": "image", "visible": "labels"},
    cost=Cost(threads=True),
)
BACKENDS = {"mesh": MESH, "none": NONE}
