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
    BLENDSHAPE_NAMES,
    NUM_POINTS,
    NUM_VERTICES,
    Float32,
    Geometry,
    Int32,
    UInt8,
    fit_similarity,
    load_expression_basis,
)
from e4s_models.morphology import grow, shrink
from e4s_models.push_pull import blur_normalised, fill_low_frequencies, shrink_area
from e4s_models.regions import Region
from tasks.stage import Cost, Inputs, ItemError, Outputs, Stage, each

Bool = npt.NDArray[np.bool_]

# Vertex loops of MediaPipe's mesh, named by image side (the right eye of a person is on the image's left).
_LIP_CORNERS = (78, 308)
_UPPER_LIP = (191, 80, 81, 82, 13, 312, 311, 310, 415)  # inner rim, image left to right
_LOWER_LIP = (95, 88, 178, 87, 14, 317, 402, 318, 324)
_INNER_LIPS = (*_LIP_CORNERS, *_UPPER_LIP, *_LOWER_LIP)
_EYES = (  # corners (image left, right), upper lid, lower lid, iris centre, iris right, iris left
    ((33, 133), (246, 161, 160, 159, 158, 157, 173), (7, 163, 144, 145, 153, 154, 155), 468, 469, 471),
    ((362, 263), (398, 384, 385, 386, 387, 388, 466), (382, 381, 380, 374, 373, 390, 249), 473, 474, 476),
)
_OVAL = (10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377,
         152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109)  # fmt: skip
_SKIN = (Region.SKIN, Region.NOSE)
_FEATURES = (Region.LIPS, Region.BROWS, Region.EYES, Region.NOSE, Region.SKIN, Region.MOUTH)
_RAMP = 0.2  # width of the ramp between own and borrowed mouth, in ratios of openings
_SHUT = 0.06  # opening of lids, in eye widths, below which no eyeball is seen
_SUBPIXEL = 4  # bits of the rasteriser's fixed point
_MOUTH_SHAPES = tuple(index for index, name in enumerate(BLENDSHAPE_NAMES) if name.startswith(("jaw", "mouth")) and name != "mouthClose")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the driven mesh is planned and drawn."""

    expression: float = 1.0  # share of the target's change of expression that is followed
    follow_gaze: bool = True
    max_displacement: float = 2.5  # cm, a vertex moves no further by expression (mouth wide open: 4 at the chin)
    lip_follow: float = 0.7  # share of the lips' shape taken from a target with a strong expression of the mouth
    eye_follow: float = 0.75  # share of the lids' opening taken from the target itself, the rest from the coefficients
    wink: float = 0.12  # difference of the lids' openings (in eye widths) from which on the target's eyes are not a pair
    max_eye_opening: float = 1.35  # times the source's: beyond it the iris is drawn out
    borrow_mouth: float = 0.8  # source's opening / driven opening: below about it the inner mouth is the target's
    borrow_wide: float = 1.5  # the same ratio above which about the inner mouth is the target's, too: teeth are not squashed
    max_gaze: float = 0.4  # half widths of the eye
    mouth_shade: float = 0.55  # how much darker the teeth get while the lips close over them
    hidden_detail: float = 30.0  # grey levels: how much detail what is not seen in the source may have
    rim: tuple[float, float] = (0.015, 0.06)  # face widths from the mesh's outline in the source: unusable below, trusted above
    hidden: tuple[float, float] = (0.05, 0.3)  # cosine of normal and view in the source: unusable below, trusted above
    stretch: tuple[float, float] = (0.25, 0.42)  # px of the source per px of the driven face: no texture below, full trust above
    closed_eye: float = 0.14  # opening of the source's lids, in eye widths, below which its eyes cannot be opened
    eye_patch: float = 0.022  # reach around eyes that the source does not show and the target lends, as a fraction of the side
    lens_frame: float = 0.016  # width of the strip along the outline of glasses that is their frame, as a fraction of the side
    hair: float = 0.012  # strip of skin along the source's hair that counts as hair, as a fraction of the side
    fringe: float = 0.08  # reach of the fringe, likewise: in it, skin darker than the face's is strands or their shadow
    fringe_contrast: float = 3.0  # robust deviations of the skin's luminance from which on it counts as such
    clear_lens: float = 0.6  # brightness of eyes behind lenses, as a share of the skin's, below which the lenses are dark


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


def _eye_opening(points: Float32, eye: int) -> float:
    """Return the mean gap between the lids of an eye (0 or 1), in widths of the eye."""
    corners, upper, lower, *_ = _EYES[eye]
    gaps = points[list(upper)] - points[list(lower)]
    return float(np.linalg.norm(gaps, axis=1).mean()) / _width(points, corners)


def mouth_strength(blendshapes: Float32) -> float:
    """Return how strong the mouth's expression is, from coefficients (52,) [0, 1]: 0 at rest, 1 from half of one coefficient on."""
    strongest = float(blendshapes[list(_MOUTH_SHAPES)].max())
    return min(max((strongest - 0.15) / 0.35, 0.0), 1.0)


def _follow_lips(shape: Float32, wanted: Float32, share: float) -> None:
    """Move the inner rim of the lips by `share` towards the target's, and what is near it; in place.

    A strong expression decides the form of the mouth more than the person does. The rim is followed relative to its own centre, so the
    mouth stays at its place in the face. The lips follow the rim, so they keep their thickness.
    """
    if share <= 0:
        return
    rim = list(_INNER_LIPS)
    goal = wanted[rim] - wanted[rim].mean(0) + shape[rim].mean(0)
    moves = np.asarray(share * (goal - shape[rim]), np.float32)
    shape[:NUM_VERTICES] += _spread(shape[:NUM_VERTICES], shape[rim].copy(), moves, 1.2)


def plan_points(
    model: Model, config: MeshConfig, source: Float32, target: Float32, change: Float32, mouth_strength: float = 0.0
) -> Float32:
    """Return where the source's mesh goes: its own shape, changed by the difference of expression, in the target's pose.

    Args:
        model: geometry and basis of the mesh.
        config: how expression is followed.
        source: points (478, 3) px of the source's crop.
        target: points (478, 3) px of the target's crop.
        change: (52,) coefficients of the target minus those of the source.
        mouth_strength: of the target's mouth, [0, 1], see `mouth_strength`.

    Returns the driven points (478, 3) px of the target's crop (irises not moved for gaze).
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
    _follow_lips(shape, wanted, config.lip_follow * config.expression * mouth_strength)
    # The opening of the lips is the target's, in proportion to the mouth's width, so that closed lips close.
    ratio = np.clip(_width(shape, _LIP_CORNERS) / _width(wanted, _LIP_CORNERS), 0.75, 1.3)
    up, low = list(_UPPER_LIP), list(_LOWER_LIP)
    gaps = shape[up] - shape[low]
    gaps[:, 1:] += config.expression * (ratio * (wanted[up] - wanted[low]) - gaps)[:, 1:]
    _set_gap(shape, template, _UPPER_LIP, _LOWER_LIP, gaps, (0.3, 0.7), 1.2)
    openings = [[_eye_opening(points, eye) for points in (shape, neutral, wanted)] for eye in range(len(_EYES))]
    closed = _eyes_closed(neutral, config)
    theirs = [opening[2] for opening in openings]
    if abs(theirs[0] - theirs[1]) < config.wink:  # a pair: both lids follow the mean of the target's
        theirs = [sum(theirs) / 2] * 2
    for (_, upper, lower, *_), (have, own, _), their in zip(_EYES, openings, theirs, strict=True):
        up, low = list(upper), list(lower)
        shut = min(max((0.2 - their) / 0.1, 0.0), 1.0)  # a shut eye is shut, whatever the coefficients say
        follow = config.expression * max(config.eye_follow, shut)
        wide = np.inf if closed else config.max_eye_opening * own  # closed eyes are drawn anew, so that no iris is stretched
        goal = min((1 - follow) * have + follow * their, wide)
        _set_gap(shape, template, upper, lower, (shape[up] - shape[low]) * (goal / max(have, 1e-6)), (0.8, 0.2), 0.5)
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
        share = shrink_area(weight, (size, size))
        values = shrink_area(known * weight[..., None], (size, size)) / np.maximum(share, 1e-6)[..., None]
        edge = shrink_area(border, (size, size))
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
    weight = shrink_area(mask.astype(np.float32), small)
    known = np.asarray(shrink_area(field, small) / np.maximum(weight, 1e-6)[..., None], np.float32)
    outer = cv2.resize(
        _extend(known, (weight > 0.6).astype(np.float32), shrink_area(border, small)), (side[1], side[0]), interpolation=cv2.INTER_CUBIC
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


@dataclass(frozen=True)
class Face:
    """A face as it is read or drawn: its crop and its mesh."""

    pixels: UInt8
    """RGB (H, W, 3)."""
    points: Float32
    """(478, 3) px of the crop."""


@dataclass(frozen=True)
class DrivenFace:
    """The source in the target's pose and expression."""

    image: UInt8
    """RGB (H, W, 3)."""
    visible: UInt8
    """(H, W): how far a pixel is the source's own texture (255), or the target's own inner mouth, and not mirrored, guessed, stretched or
    covered by glasses (0)."""
    regions: UInt8
    """(H, W) region ids: the source's labels, carried by the map that carries its pixels."""


def draw(model: Model, config: MeshConfig, source_face: Face, source_regions: UInt8, driven: Float32, target_face: Face) -> DrivenFace:
    """Warp the source face with its label map (H, W) onto the driven points (478, 3) px of the target's crop."""
    geometry = model.geometry
    triangles = geometry.triangles
    source, target = source_face.points, target_face.points
    side = target_face.pixels.shape[:2]
    source_side = source_face.pixels.shape[:2]
    whole_ids = _paint(driven, triangles, side)
    if not (whole_ids >= 0).any():
        raise ItemError("reenact: the driven face lies outside the crop; check that both faces are aligned crops")
    origin = _surroundings(driven, source, whole_ids, _paint(source, triangles, source_side))  # px of the source, per pixel
    image = _sample(source_face.pixels, origin)
    limit = np.array([source_side[1] - 0.5, source_side[0] - 0.5], np.float32)
    visible: Float32 = np.asarray(((origin >= -0.5) & (origin <= limit)).all(-1), np.float32)

    box = _window(whole_ids >= 0, 8)
    ids, here = whole_ids[box], _pixels(side)[box]
    face = ids >= 0
    cover = face.astype(np.float32)
    around = origin[box].copy()

    def carry(onto: Float32) -> Float32:
        """Where each pixel of the face comes from, with the kinks at the triangles' edges rounded off."""
        move = np.zeros((*ids.shape, 2), np.float32)
        move[face] = _evaluate(_affine(onto[:, :2], driven, triangles), ids, face, here) - here[face]
        change = blur_normalised(move, cover, 4.0) - move
        change *= np.exp(-((change / 1.5) ** 2).sum(-1, keepdims=True))  # a jump (lips that meet, the nose's edge) stays a jump
        return np.asarray(np.where(face[..., None], here + move + change, around), np.float32)

    origin[box] = carry(_tuck_lips(source, driven))
    pixels = _sample(source_face.pixels, origin[box])
    views = _view(source, triangles, source_side, config), _view(driven, triangles, side, config)
    seen, revealed = _seen_and_revealed(*views)
    shares = np.column_stack([revealed, revealed * seen[geometry.mirror[:NUM_VERTICES]], seen]).astype(np.float32)
    share = np.zeros((*ids.shape, 3), np.float32)
    share[face] = _evaluate(_affine(shares, driven, triangles), ids, face, here)
    share = np.clip(blur_normalised(share, cover, 6.0), 0, 1) * cover[..., None]
    regions = _read_labels(source_regions, origin)
    if float(share[..., 0].max()) > 0.02:
        mirrored = carry(source[geometry.mirror])
        pixels = _complete(pixels, share, cover, _sample(source_face.pixels, mirrored), config)
        hidden = share[..., 0] > 0.5
        regions[box][hidden] = _skin_unless_feature(_read_labels(source_regions, mirrored))[hidden]

    own = np.clip(1.5 - 2.5 * share[..., 0], 0, 1) * _sharpness(source, driven, triangles, ids, cover, config.stretch)
    visible[box] = np.where(face, own, visible[box])
    clear = _lenses_are_clear(source_face.pixels, source_regions, source, config)
    in_front = _covered(source_face, source_regions, clear, config)
    in_front = np.asarray(cv2.remap(in_front, origin[..., 0], origin[..., 1], cv2.INTER_LINEAR), np.uint8)
    visible *= np.float32(1) - in_front.astype(np.float32) / 255
    covered = np.asarray(in_front[box].astype(np.float32) / 255 * cover, np.float32)
    if covered.any():
        skin = np.isin(regions[box], _SKIN)
        pixels = _uncover(pixels, covered, np.asarray(visible[box] * skin, np.float32))
        hidden = face & ((covered > 0.5) | (regions[box] == Region.HAIR))
        regions[box] = np.where(hidden, _skin_unless_feature(regions[box]), regions[box])
    if not clear or _eyes_closed(source, config):
        eyes = _around_eyes(driven, side, config.eye_patch)
        visible *= 1 - eyes
        pixels = _borrow_eyes(pixels, eyes[box], _sample(target_face.pixels, carry(target)))
    regions = _label_openings(regions, driven)
    patch = visible[box]
    pixels, patch = _draw_mouth(pixels, patch, config, triangles, ids, here, source_face, driven, target_face)
    visible[box] = patch
    if clear and not _eyes_closed(source, config):
        pixels = _draw_eyes(pixels, here, config, source_face, driven, target)

    edge = cv2.GaussianBlur(cover, (0, 0), 1.2)[..., None]
    image[box] += edge * (pixels - image[box])
    return DrivenFace(np.clip(np.rint(image), 0, 255).astype(np.uint8), np.rint(255 * visible).astype(np.uint8), regions)


def _read_labels(labels: UInt8, xy: Float32) -> UInt8:
    """Read a label map at xy (H, W, 2) px, the nearest pixel: (H, W)."""
    read = cv2.remap(labels, xy[..., 0], xy[..., 1], cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(read, np.uint8)


def _skin_unless_feature(labels: UInt8) -> UInt8:
    """Return labels in which only features of the face stay: what else lies before skin that is guessed is not guessed, too."""
    return np.where(np.isin(labels, _FEATURES), labels, np.uint8(Region.SKIN)).astype(np.uint8)


def _sharpness(source: Float32, driven: Float32, triangles: Int32, ids: Int32, cover: Float32, limits: tuple[float, float]) -> Float32:
    """Return per pixel of the box (H, W) [0, 1] how little the source's texture is stretched.

    A triangle's map has two singular values; the smaller one says how many px of the source a px of the driven face has.
    """
    maps = _affine(source[:, :2], driven, triangles)[:, :, :2]
    least = np.linalg.svd(maps.astype(np.float64), compute_uv=False)[:, 1]
    share = np.clip((least - limits[0]) / (limits[1] - limits[0]), 0, 1).astype(np.float32)
    spread = np.where(ids >= 0, share[ids], 0).astype(np.float32)
    return np.asarray(blur_normalised(spread[..., None], cover, 0.01 * max(cover.shape))[..., 0], np.float32)


def _eyes_closed(source: Float32, config: MeshConfig) -> bool:
    """Return whether the source's eyes are closed, as a pair."""
    return sum(_eye_opening(source, eye) for eye in range(len(_EYES))) / len(_EYES) < config.closed_eye


def _eye_loop(points: Float32, eye: int) -> Float32:
    """Return the outline of an eye's opening (N, 2) px."""
    corners, upper, lower, *_ = _EYES[eye]
    return points[[corners[0], *upper, corners[1], *lower[::-1]], :2]


def _fill_loop(loop: Float32, side: tuple[int, int]) -> UInt8:
    """Fill an outline (N, 2) px: (H, W) uint8, 255 inside, antialiased."""
    mask = np.zeros(side, np.uint8)
    fixed = np.round(loop * (1 << _SUBPIXEL)).astype(np.int32)
    cv2.fillPoly(mask, [fixed], 255, lineType=cv2.LINE_AA, shift=_SUBPIXEL)
    return mask


def _covered(source_face: Face, labels: UInt8, clear: bool, config: MeshConfig) -> UInt8:
    """Return what stands before the source's face (H, W), 255: hair, strands and their shadow, and glasses with their bridge.

    The parser sees strands and bridges as skin; they are far darker than the skin of the whole face. Behind clear lenses the face is
    seen: only the strip along their outline, the frame, counts as glasses. Computed at half the resolution.
    """
    height, width = labels.shape
    half = (max(1, width // 2), max(1, height // 2))
    small = np.asarray(cv2.resize(labels, half, interpolation=cv2.INTER_NEAREST), np.uint8)
    image = np.asarray(cv2.resize(source_face.pixels, half, interpolation=cv2.INTER_AREA), np.uint8)
    side = max(half)
    luminance = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (0, 0), 0.002 * side).astype(np.float32)
    hair, skin = np.asarray(small == Region.HAIR), np.isin(small, _SKIN)
    dark = np.zeros(small.shape, np.bool_)
    if skin.any():
        centre = float(np.median(luminance[skin]))
        spread = max(1.4826 * float(np.median(np.abs(luminance[skin] - centre))), 4.0)
        dark = np.asarray(skin & (luminance < centre - config.fringe_contrast * spread))
    strands = np.asarray(dark & grow(hair, config.fringe * side)) if hair.any() else hair
    covered = grow(hair, config.hair * side) | grow(strands, 0.004 * side)
    glasses = np.asarray(small == Region.GLASSES)
    if glasses.any():
        if clear:
            glasses &= ~shrink(glasses, config.lens_frame * side)
        reach = 0.4 * config.lens_frame * side  # of the frame's shadow
        gap = cv2.morphologyEx(glasses.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((1, round(0.12 * side) | 1), np.uint8)) > 0
        covered |= grow(glasses | (gap & dark), reach)  # the parser leaves thin bridges out of the glasses
    mask = covered.astype(np.uint8) * np.uint8(255)
    return np.asarray(cv2.resize(mask, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)


def _uncover(pixels: Float32, covered: Float32, skin: Float32) -> Float32:
    """Replace what is covered (H, W) [0, 1] by the colour of the skin around it, continued smoothly."""
    if float(skin.max()) < 0.5:
        return pixels
    return np.asarray(pixels + covered[..., None] * (fill_low_frequencies(pixels, skin) - pixels), np.float32)


def _around_eyes(driven: Float32, side: tuple[int, int], reach: float) -> Float32:
    """Return a soft mask (H, W) of both driven eyes with what is `reach` sides around them."""
    mask = np.zeros(side, np.uint8)
    for eye in range(len(_EYES)):
        mask |= _fill_loop(_eye_loop(driven, eye), side)
    grown = grow(mask > 127, reach * max(side))
    return np.asarray(cv2.GaussianBlur(grown.astype(np.float32), (0, 0), 0.2 * reach * max(side)), np.float32)


def _borrow_eyes(pixels: Float32, eyes: Float32, theirs: Float32) -> Float32:
    """Draw the target's eyes, (H, W, 3) on the driven mesh, where the source shows none: their detail on the driven face's colour."""
    base = fill_low_frequencies(pixels, 1 - eyes)
    theirs = theirs + fill_low_frequencies(base - theirs, 1 - eyes)
    return np.asarray(pixels + eyes[..., None] * (theirs - pixels), np.float32)


def _lenses_are_clear(image: UInt8, labels: UInt8, points: Float32, config: MeshConfig) -> bool:
    """Return whether the skin behind the source's lenses is about as bright as beside them; also where it wears none."""
    glasses = np.asarray(labels == Region.GLASSES)
    if not glasses.any():
        return True
    lenses = shrink(glasses, config.lens_frame * max(labels.shape))
    for eye in range(len(_EYES)):
        lenses &= _fill_loop(_eye_loop(points, eye), labels.shape[:2]) == 0
    skin = labels == Region.SKIN
    if not skin.any() or not lenses.any():
        return True
    luminance = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return bool(np.median(luminance[lenses]) >= config.clear_lens * np.median(luminance[skin]))


def _label_openings(regions: UInt8, driven: Float32) -> UInt8:
    """Label the openings of lids and lips by the driven mesh: what the source shows there may be closed, or of another shape."""
    side = regions.shape[:2]
    labelled = regions.copy()
    labelled[regions == Region.MOUTH] = Region.LIPS
    around = np.zeros(side, np.bool_)
    for eye in range(len(_EYES)):
        inside = _fill_loop(_eye_loop(driven, eye), side) > 127
        if _eye_opening(driven, eye) >= _SHUT:
            around |= inside
            labelled[inside] = Region.EYES
    stray = (labelled == Region.EYES) & ~grow(around, 0.008 * max(side))
    labelled[stray] = Region.SKIN
    if _opening(driven) > 0.02 * _width(driven[:, :2], _LIP_CORNERS):
        loop = driven[[_LIP_CORNERS[0], *_UPPER_LIP, _LIP_CORNERS[1], *_LOWER_LIP[::-1]], :2]
        labelled[_fill_loop(loop, side) > 127] = Region.MOUTH
    return labelled


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
    base = fill_low_frequencies(pixels, trust)
    other = other + fill_low_frequencies(pixels - other, trust)  # the halves are lit differently
    detail = pixels + mirrored / np.maximum(hidden, 1e-6) * (other - pixels) - base
    limit = config.hidden_detail
    return np.asarray(pixels + hidden * (base + limit * np.tanh(detail / limit) - pixels), np.float32)


def _draw_mouth(
    pixels: Float32,
    visible: Float32,
    config: MeshConfig,
    triangles: Int32,
    ids: Int32,
    here: Float32,
    source_face: Face,
    driven: Float32,
    target_face: Face,
) -> tuple[Float32, Float32]:
    """Fill the driven lips' opening: the source's teeth where its mouth is open as wide, else the target's.

    `pixels` (H, W, 3), `visible` (H, W), `ids` (H, W) and `here` (H, W, 2) are of the box around the face. Returns the first two anew.
    """
    mask = np.asarray((ids >= 0) & _inside_mouth(triangles)[ids], np.bool_)
    if not mask.any():
        return pixels, visible
    source, target = source_face.points, target_face.points
    box = _window(mask, 4)
    mask = np.asarray(mask[box], np.bool_)
    soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 1.5)
    width = _width(driven[:, :2], _LIP_CORNERS)
    needed, closing = _opening(driven), _closing(source, driven)
    # 0: closed, the lips' own seam is best, darkened where teeth were
    opened = min(max(needed / (0.02 * width) - 1, 0.0), 1.0)
    pixels[box] *= 1 - (config.mouth_shade * closing * (1 - opened) * np.minimum(2.5 * soft, 1))[..., None]
    if opened == 0:
        return pixels, visible
    size = width / _width(source[:, :2], _LIP_CORNERS)
    borrow = _borrowed_share(_opening(source) * size / needed, config)
    onto = source.copy()
    if closing > 0:  # closing lips cover the teeth; they do not squash them
        up, low = list(_UPPER_LIP), list(_LOWER_LIP)
        onto[low, :2] = onto[up, :2] + (driven[low, :2] - driven[up, :2]) / size
    inside = np.zeros((*mask.shape, 3), np.float32)
    mouths = ((source_face, onto, (1 - borrow) * (1 - config.mouth_shade * closing)), (target_face, target, borrow))
    for face, points, weight in mouths:
        if weight > 0:
            xy = here[box].copy()
            xy[mask] = _evaluate(_affine(points[:, :2], driven, triangles), ids[box], mask, here[box])
            inside += np.float32(weight) * _sample(face.pixels, xy)
    feather = np.clip(2 * soft - 0.6, 0, 1) * mask * opened
    pixels[box] += feather[..., None] * (inside - pixels[box])
    visible[box] = np.maximum(visible[box], feather)
    return pixels, visible


def _borrowed_share(ratio: float, config: MeshConfig) -> float:
    """Return the share of the target's inner mouth, [0, 1], from the source's opening over the driven one.

    It changes in ramps: in a video, where the target's mouth opens slowly, teeth fade instead of jumping.
    """
    narrow = (config.borrow_mouth + _RAMP / 2 - ratio) / _RAMP
    wide = (ratio - config.borrow_wide + _RAMP / 2) / _RAMP
    return min(max(narrow, wide, 0.0), 1.0)


def _draw_eyes(pixels: Float32, here: Float32, config: MeshConfig, source_face: Face, driven: Float32, target: Float32) -> Float32:
    """Redraw the eyeballs under the driven lids, looking where the target looks."""
    source = source_face.points
    gaze = float(np.clip(_gaze(target) - _gaze(source), -config.max_gaze, config.max_gaze)) if config.follow_gaze else 0.0
    for eye, (_, upper, lower, *_) in enumerate(_EYES):
        mask = _fill_loop(_eye_loop(driven, eye) - here[0, 0], pixels.shape[:2])
        if not mask.any():
            continue
        box = _window(mask > 0, 8)
        at = here[box]
        drawn = _sample(source_face.pixels, _eye_map(eye, driven, source, at.reshape(-1, 2), gaze).reshape(at.shape))
        height = np.linalg.norm(driven[list(upper), :2] - driven[list(lower), :2], axis=1).mean()
        feather = cv2.GaussianBlur(mask[box].astype(np.float32) / 255, (0, 0), max(0.8, 0.06 * float(height)))
        feather = np.clip(2 * feather - 1, 0, 1)  # from the lid's edge inwards: the lashes stay the mesh's
        pixels[box] += feather[..., None] * (drawn - pixels[box])
    return pixels


def turned_by(model: Model, source: Float32, target: Float32) -> float:
    """Return the angle in degrees between the heads of two meshes (478, 3) px, roll left out: alignment takes it away."""
    yaw, pitch, _ = model.geometry.pose(source).angles
    yaw_there, pitch_there, _ = model.geometry.pose(target).angles
    return float(np.hypot(yaw - yaw_there, pitch - pitch_there))


def _reenact(model: Model, config: MeshConfig, inputs: Inputs) -> Outputs:
    """Reads faces RGB (H, W, 3) uint8, points (478, 3) px, `blendshapes` (52,), `source_regions` (H, W) uint8.

    Writes `driven` (H, W, 3), `visible`, `regions` (H, W) as `DrivenFace` says, and `turned` (1,) float32: see `turned_by`.
    """
    source, target = (Face(inputs[f"{role}_face"], inputs[f"{role}_points"]) for role in ("source", "target"))
    for face in (source, target):
        check_shape(face.pixels, "H W 3")
        check_shape(face.points, f"{NUM_POINTS} 3")
    if not (np.isfinite(source.points).all() and np.isfinite(target.points).all()):
        raise ItemError("reenact: the face mesh has points that are no numbers; make the stage `mesh` anew for both faces")
    wanted = inputs["target_blendshapes"]
    change = wanted - inputs["source_blendshapes"]
    driven = plan_points(model, config, source.points, target.points, change, mouth_strength(wanted))
    drawn = draw(model, config, source, inputs["source_regions"], driven, target)
    turned = np.array([turned_by(model, source.points, target.points)], np.float32)
    return {"driven": drawn.image, "visible": drawn.visible, "regions": drawn.regions, "turned": turned}


_READS = (
    "source_face",
    "source_points",
    "source_blendshapes",
    "source_regions",
    "target_face",
    "target_points",
    "target_blendshapes",
)


@dataclass(frozen=True, kw_only=True)
class NoneConfig:
    """Nothing to set."""


def _keep(model: None, config: NoneConfig, inputs: Inputs) -> Outputs:
    face = inputs["source_face"]
    check_shape(face, "H W 3")
    return {"driven": face, "visible": np.full(face.shape[:2], 255, np.uint8), "regions": inputs["source_regions"]}


MESH = Stage(
    name="reenact",
    backend="mesh",
    version=2,
    config=MeshConfig,
    load=_load,
    run=each(_reenact),
    reads=_READS,
    writes={"driven": "image", "visible": "labels", "regions": "labels", "turned": "array"},
    weights=lambda config: ("face_mesh", "expression_basis"),
    cost=Cost(threads=True),
)
NONE = Stage(
    name="reenact",
    backend="none",
    version=2,
    config=NoneConfig,
    run=each(_keep),
    reads=("source_face", "source_regions"),
    writes={"driven": "image", "visible": "labels", "regions": "labels"},
    cost=Cost(threads=True),
)
BACKENDS = {"mesh": MESH, "none": NONE}
