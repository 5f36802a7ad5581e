from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from e4s_models.face_crops import FFHQ_LANDMARKS
from e4s_models.warp import ffhq_crop_to_frame
from tasks.stage import ItemError
from tasks.track import (
    BRIDGED,
    DETECTED,
    NONE,
    Course,
    Faces,
    SmoothConfig,
    TrackConfig,
    choose_tracks,
    find_cuts,
    follow,
    group_people,
    link_faces,
    no_course,
    shot_feature,
    smooth_course,
)

CONFIG = TrackConfig()
FACE = FFHQ_LANDMARKS.numpy().astype(np.float64) / 8 - 64  # about its centre, 128 px crop
RAW = SmoothConfig(centre=0, axes=0, landmarks=0)
Face = tuple[int, float, float, float, int]  # frame, x, y, side, person


def faces_of(rows: list[Face], with_features: bool = True) -> Faces:
    rows = sorted(rows)
    place = np.array([(x, y) for _, x, y, _, _ in rows], np.float64).reshape(-1, 2)
    side = np.array([side for _, _, _, side, _ in rows], np.float64)
    features = np.eye(8, dtype=np.float32)[[person for *_, person in rows]] * 3 + 0.1
    return Faces(
        np.array([frame for frame, *_ in rows], np.int64),
        np.column_stack((place - side[:, None] / 2, place + side[:, None] / 2)),
        np.full(len(rows), 1.5),
        FACE * (side / 64)[:, None, None] + place[:, None],
        features if with_features else None,
    )


def cuts_at(frames: int, *places: int) -> np.ndarray:
    cuts = np.zeros(frames, bool)
    cuts[[0, *places]] = True
    return cuts


def walk(frames: range, x: float, person: int, side: float = 64, speed: float = 2) -> list[Face]:
    return [(frame, x + speed * (frame - frames[0]), 100, side, person) for frame in frames]


def spans(tracks: list) -> list[tuple[int, int]]:
    return [(track.span[0], track.span[-1]) for track in tracks]


@pytest.mark.parametrize("with_features", [True, False])
def test_two_faces_that_pass_each_other_stay_two(with_features: bool) -> None:
    faces = faces_of(walk(range(20), 100, 0, speed=6) + walk(range(20), 214, 1, speed=-6), with_features)
    tracks = link_faces(faces, cuts_at(20), CONFIG)
    assert spans(tracks) == [(0, 19), (0, 19)]
    steps = [np.diff(faces.box[track.rows, 0]) for track in tracks]
    assert [set(np.round(step)) for step in steps] == [{6.0}, {-6.0}]


def test_short_gaps_are_bridged_long_ones_and_cuts_are_not() -> None:
    seen = walk(range(30), 100, 0)
    short = [face for face in seen if face[0] not in range(10, 10 + CONFIG.max_gap)]
    tracks = link_faces(faces_of(short), cuts_at(30), CONFIG)
    assert spans(tracks) == [(0, 29)]
    course = follow(faces_of(short), tracks, 30)
    assert (course.state[10 : 10 + CONFIG.max_gap] == BRIDGED).all()
    assert (
        np.abs(course.landmarks.mean(axis=1)[:, 0] - (100 + 2 * np.arange(30)) - (course.landmarks[0].mean(axis=0)[0] - 100)).max() < 1e-9
    )
    long = [face for face in seen if face[0] not in range(10, 11 + CONFIG.max_gap)]
    assert spans(link_faces(faces_of(long), cuts_at(30), CONFIG)) == [(0, 9), (23, 29)]
    assert spans(link_faces(faces_of(seen), cuts_at(30, 12), CONFIG)) == [(0, 11), (12, 29)]


def test_a_stranger_in_the_same_place_is_another_track() -> None:
    rows = walk(range(10), 100, 0) + walk(range(10, 20), 120, 1)
    assert spans(link_faces(faces_of(rows), cuts_at(20), CONFIG)) == [(0, 9), (10, 19)]
    assert spans(link_faces(faces_of(rows, with_features=False), cuts_at(20), CONFIG)) == [(0, 19)]


def test_a_jump_or_another_size_is_another_track() -> None:
    assert len(link_faces(faces_of(walk(range(5), 100, 0) + walk(range(5, 9), 300, 0)), cuts_at(9), CONFIG)) == 2
    assert len(link_faces(faces_of(walk(range(5), 100, 0) + walk(range(5, 9), 110, 0, side=120)), cuts_at(9), CONFIG)) == 2


def test_chance_finds_are_dropped() -> None:
    faces = faces_of(walk(range(6), 100, 0))
    assert link_faces(replace(faces, score=np.full(6, 0.3)), cuts_at(6), CONFIG) == []
    assert len(link_faces(replace(faces, score=np.array([0.3, 0.3, 0.6, 0.3, 0.3, 0.3])), cuts_at(6), CONFIG)) == 1


SHOTS = walk(range(10), 100, 0, side=60) + walk(range(10), 300, 1, side=90) + walk(range(12, 30), 100, 0, side=80)


def test_a_person_is_known_again_after_a_cut() -> None:
    tracks = link_faces(faces_of(SHOTS), cuts_at(30, 11), CONFIG)
    people = group_people(tracks, CONFIG)
    assert [spans(sorted(person, key=lambda track: track.span[0])) for person in people] == [[(0, 9), (12, 29)], [(0, 9)]]
    chosen = choose_tracks(tracks, cuts_at(30, 11), 0, CONFIG)
    course = follow(faces_of(SHOTS), chosen, 30)
    assert course.without_face.tolist() == [10, 11]
    assert course.run.tolist() == [0] * 10 + [-1] * 2 + [1] * 18
    assert np.nanmax(course.landmarks[:10, :, 0]) < 200
    assert np.isnan(course.landmarks[10]).all()
    assert set(course.state) == {NONE, DETECTED}


def test_twins_side_by_side_are_two_people() -> None:
    tracks = link_faces(faces_of(walk(range(9), 100, 0) + walk(range(9), 400, 0)), cuts_at(9), CONFIG)
    assert len(group_people(tracks, CONFIG)) == 2
    reference = np.eye(8, dtype=np.float32)[0] + 0.05
    assert len(choose_tracks(tracks, cuts_at(9), reference, CONFIG)) == 1


def test_by_index_and_by_reference() -> None:
    faces = faces_of(SHOTS)
    assert faces.features is not None
    tracks = link_faces(faces, cuts_at(30, 11), CONFIG)
    assert spans(choose_tracks(tracks, cuts_at(30, 11), 1, CONFIG)) == [(0, 9)]
    for person, expected in ((0, [(0, 9), (12, 29)]), (1, [(0, 9)])):
        reference = np.eye(8, dtype=np.float32)[person] + 0.05
        assert spans(choose_tracks(tracks, cuts_at(30, 11), reference, CONFIG)) == expected
    with pytest.raises(ItemError, match=r"nobody in the video is like the reference picture \(cosine 0\.\d\d, 0\.3"):
        choose_tracks(tracks, cuts_at(30, 11), np.eye(8)[5], CONFIG)
    with pytest.raises(ItemError, match="person 2 was asked for but 2 people were found: choose --face 0 to 1"):
        choose_tracks(tracks, cuts_at(30, 11), 2, CONFIG)
    with pytest.raises(ItemError, match="counted from 0"):
        choose_tracks(tracks, cuts_at(30, 11), -1, CONFIG)
    with pytest.raises(ItemError, match="no face was found in the video"):
        choose_tracks([], cuts_at(30), 0, CONFIG)


def test_without_features_the_largest_of_each_shot() -> None:
    faces, cuts = faces_of(SHOTS, with_features=False), cuts_at(30, 11)
    tracks = link_faces(faces, cuts, CONFIG)
    chosen = choose_tracks(tracks, cuts, 0, CONFIG)
    assert spans(chosen) == [(0, 9), (12, 29)]
    assert faces.side[chosen[0].rows[0]] == 90
    assert spans(choose_tracks(tracks, cuts, 1, CONFIG)) == [(0, 9)]
    with pytest.raises(ItemError, match="no shot shows so many"):
        choose_tracks(tracks, cuts, 2, CONFIG)
    with pytest.raises(ValueError, match="needs identity features"):
        choose_tracks(tracks, cuts, np.ones(8), CONFIG)


def test_a_lost_face_that_comes_back_in_the_shot_goes_on_without_features() -> None:
    rows = [face for face in walk(range(60), 100, 0) if face[0] not in range(20, 40)]
    faces = faces_of(rows, with_features=False)
    assert spans(choose_tracks(link_faces(faces, cuts_at(60), CONFIG), cuts_at(60), 0, CONFIG)) == [(0, 19), (40, 59)]


def scene(seed: int, shift: int = 0, light: float = 1.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (6, 10, 3)).repeat(30, axis=0).repeat(30, axis=1)
    return np.clip(np.roll(blocks, shift, axis=1) * light, 0, 255).astype(np.uint8)


def test_cuts_are_found_and_pans_flashes_and_noise_are_not() -> None:
    pan = [scene(0, 6 * step) for step in range(10)]
    flash = [scene(0, 60), scene(0, 60, 4.0), *[scene(0, 60)] * 4]
    other = [scene(1, 2 * step) for step in range(10)]
    features = np.stack([shot_feature(rgb) for rgb in pan + flash + other])
    assert np.flatnonzero(find_cuts(features, CONFIG)).tolist() == [0, 16]
    assert find_cuts(features[:1], CONFIG).tolist() == [True]
    assert find_cuts(features[:0], CONFIG).tolist() == []


def course_of(path: np.ndarray, turn: np.ndarray | None = None, noise: float = 0.0, scale: float = 2.0) -> Course:
    """A face whose centre follows `path` (T, 2), turned by `turn` (T,) radians; crop side 256 px."""
    count = len(path)
    angle = np.zeros(count) if turn is None else turn
    turned = np.stack([FACE @ np.array(((np.cos(a), np.sin(a)), (-np.sin(a), np.cos(a)))) for a in angle]) * scale
    random = np.random.default_rng(3)
    landmarks = turned + path[:, None] + noise * random.standard_normal((count, 68, 2))
    return Course(np.full(count, DETECTED, np.uint8), np.zeros(count, np.int64), landmarks, np.ones(count))


TIME = np.arange(80.0)
STILL = np.zeros((80, 2)) + 300
HALF = 128.0  # px of the crop of `course_of`


def jitter(values: np.ndarray) -> float:
    return float(np.linalg.norm(values[2:] - 2 * values[1:-1] + values[:-2], axis=1).mean())


def test_a_crop_is_the_ffhq_crop() -> None:
    course = course_of(STILL[:3], np.array([0.2, 0.2, 0.2]))
    crops = smooth_course(course, SmoothConfig())
    for side in (256, 1024):
        assert np.abs(crops.crop_to_frame(1, side) - ffhq_crop_to_frame(course.landmarks[1], side)).max() < 1e-9


def test_noise_is_smoothed_by_the_published_gaussians() -> None:
    course = course_of(STILL, noise=0.5)
    raw, crops = smooth_course(course, RAW), smooth_course(course, SmoothConfig())
    assert jitter(crops.centre) < 0.6 * jitter(raw.centre)
    assert jitter(crops.axis) < 0.1 * jitter(raw.axis)
    assert jitter(crops.landmarks[:, 30]) < 0.6 * jitter(raw.landmarks[:, 30])
    places = np.arange(-12, 13)
    weights = np.exp(-0.5 * (places / 3.0) ** 2)
    assert np.abs(crops.axis[40] - (weights / weights.sum()) @ raw.axis[28:53]).max() < 1e-9


def test_strong_noise_does_not_switch_smoothing_off() -> None:
    course = course_of(STILL, noise=6.0)
    crops = smooth_course(course, SmoothConfig(farthest=1, axes_farthest=1))
    plain = smooth_course(course, SmoothConfig(tolerance=1e9, axes_tolerance=1e9, farthest=1, axes_farthest=1))
    assert jitter(crops.axis) < 1.3 * jitter(plain.axis)
    assert jitter(crops.centre) < 1.3 * jitter(plain.centre)
    assert np.mean([jitter(crops.landmarks[:, i]) for i in range(68)]) < 1.1 * np.mean([jitter(plain.landmarks[:, i]) for i in range(68)])


def test_steady_motion_has_no_lag_even_at_the_ends() -> None:
    course = course_of(STILL + TIME[:, None] * (25, -9))
    raw, crops = smooth_course(course, RAW), smooth_course(course, SmoothConfig())
    assert np.abs(crops.centre - raw.centre).max() < 1e-6
    assert np.abs(crops.landmarks - raw.landmarks).max() < 1e-6


def test_fast_motion_is_followed() -> None:
    shake = STILL + np.column_stack((40 * np.sin(2 * np.pi * TIME / 20), np.zeros(80)))
    nod = 0.5 * np.sin(2 * np.pi * TIME / 24)
    course = course_of(shake, nod)
    raw, crops = smooth_course(course, RAW), smooth_course(course, SmoothConfig())
    plain = smooth_course(course, SmoothConfig(tolerance=1e9, axes_tolerance=1e9, farthest=1e9, axes_farthest=1e9))
    for name, limit in (("centre", 0.01), ("axis", 0.03), ("landmarks", 0.012)):
        error, plain_error = (np.linalg.norm(getattr(each, name) - getattr(raw, name), axis=-1).max() / HALF for each in (crops, plain))
        assert error < limit
        assert error < 0.75 * plain_error


def test_a_jump_is_not_smeared() -> None:
    course = course_of(STILL + np.where(TIME > 40, 50, 0)[:, None])
    raw, crops = smooth_course(course, RAW), smooth_course(course, SmoothConfig())
    assert np.linalg.norm(crops.centre - raw.centre, axis=1).max() <= 0.0201 * np.linalg.norm(raw.axis, axis=1).max()


def test_nothing_is_smoothed_across_cuts_and_gaps() -> None:
    course = course_of(STILL + np.where(TIME > 40, 500, 0)[:, None], noise=0.5)
    run = np.where(TIME > 40, 1, 0)
    run[60:63] = -1
    run[63:] = 2
    course.landmarks[60:63] = np.nan
    course = replace(course, run=run)
    crops = smooth_course(course, SmoothConfig())
    assert np.isnan(crops.centre[60:63]).all()
    for part in (slice(0, 41), slice(41, 60), slice(63, 80)):
        alone = Course(course.state[part], course.run[part], course.landmarks[part], course.score[part])
        assert (smooth_course(alone, SmoothConfig()).centre == crops.centre[part]).all()


def test_a_chunk_needs_its_overlap_only() -> None:
    shake = STILL + np.column_stack((40 * np.sin(2 * np.pi * TIME / 20), 3 * TIME))
    course = replace(course_of(shake, 0.3 * np.sin(TIME), noise=0.5), run=np.where(TIME > 33, 1, 0))
    config = SmoothConfig()
    whole = smooth_course(course, config)
    assert config.overlap == 12
    for start, stop in ((0, 10), (10, 25), (25, 50), (31, 34), (70, 80)):
        window = slice(max(0, start - config.overlap), min(80, stop + config.overlap))
        part = smooth_course(Course(course.state[window], course.run[window], course.landmarks[window], course.score[window]), config)
        own = slice(start - window.start, stop - window.start)
        for name in ("centre", "axis", "landmarks"):
            assert (getattr(part, name)[own] == getattr(whole, name)[start:stop]).all()


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_short_stretches(count: int) -> None:
    course = course_of(STILL[:count] + TIME[:count, None] * 3)
    crops = smooth_course(course, SmoothConfig())
    assert np.isfinite(crops.centre).all()
    assert np.abs(crops.landmarks - course.landmarks).max() < 1e-6


def test_a_video_without_the_person() -> None:
    crops = smooth_course(no_course(4), SmoothConfig())
    assert np.isnan(crops.centre).all()
    assert len(smooth_course(no_course(0), SmoothConfig()).centre) == 0
    assert no_course(4).without_face.tolist() == [0, 1, 2, 3]


def test_settings_and_tables_are_checked() -> None:
    with pytest.raises(ValueError, match="max_gap"):
        TrackConfig(max_gap=-1)
    with pytest.raises(ValueError, match="tolerances"):
        SmoothConfig(tolerance=0)
    with pytest.raises(ValueError, match="ordered by frame"):
        replace(faces_of(walk(range(3), 0, 0)), frame=np.array([2, 1, 0]))
