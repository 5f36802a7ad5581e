"""Training of the small networks: what is drawn, what is held out, resuming, refusals, and the whole command's parts."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from e4s_models.regions import INNER_FACE, Region
from e4s_models.visibility_net import Seen, VisibilityNet
from flows.cli import main
from flows.training import loop, parts
from flows.training.data import shard_path
from flows.training.faces import FacePool
from flows.training.folder import DataSettings, NetworkSettings, opened
from flows.training.inpaint import erased
from flows.training.occluders import KINDS, TRAINED, UNSEEN, Scene, clear_glasses, occlude
from flows.training.photograph import cast_shadow, make_up, moved, photograph
from flows.training.photos import held_out, make_photo_shards, photo_shard
from flows.training.recipes import RECIPES, load_recipe
from flows.training.recolor import draw_example as draw_recoloring
from flows.training.visibility import VisibilityRecipe, draw_example, overlap_of
from tasks.graph import UsageError
from tasks.stage import UInt8

SIDE = 256
FIRST_HELD_OUT = 2  # shards


def face(seed: int) -> tuple[UInt8, UInt8]:
    """A drawing of a head and its region ids: training code needs regions, not beauty."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((SIDE, SIDE), np.uint8)
    middle = SIDE // 2, SIDE // 2 + 10
    for region, at, axes in (
        (Region.HAIR, (middle[0], middle[1] - 20), (82, 100)),
        (Region.SKIN, middle, (62, 84)),
        (Region.EYES, (middle[0] - 26, middle[1] - 20), (11, 5)),
        (Region.EYES, (middle[0] + 26, middle[1] - 20), (11, 5)),
        (Region.NOSE, (middle[0], middle[1] + 10), (9, 18)),
        (Region.LIPS, (middle[0], middle[1] + 44), (20, 7)),
    ):
        cv2.ellipse(labels, at, axes, 0, 0, 360, int(region), -1)
    colours = rng.integers(30, 226, (12, 3)).astype(np.uint8)
    noise = rng.integers(0, 12, (SIDE, SIDE, 3)).astype(np.uint8)
    return colours[labels] + noise, labels


def write_people(data: Path) -> None:
    """Shards of drawn heads where those of synthetic people belong: two held out, one to learn from."""
    data.mkdir(parents=True, exist_ok=True)
    for number in range(FIRST_HELD_OUT + 1):
        faces = [face(2 * number + k) for k in range(2)]
        np.savez(
            shard_path(data, number),
            images=np.stack([image for image, _ in faces]),
            labels=np.stack([labels for _, labels in faces]),
            codes=np.zeros((2, 2, 512), np.float32),
            takes_b=np.zeros((2, 12, 23), bool),
        )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_people(tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawn_thing_covers_what_its_mask_says(kind: str) -> None:
    """Without its mask the face is as it was, but for the thing's own shadow, which only darkens."""
    scene = Scene(*face(0), *face(1))
    covered = []
    for seed in range(6):
        image, alpha = occlude(scene, kind, np.random.default_rng(seed))
        assert image.shape == scene.image.shape and image.dtype == np.uint8
        assert alpha.shape == (SIDE, SIDE) and alpha.dtype == np.float32
        assert alpha.min() >= 0 and alpha.max() <= 1 + 1e-5
        assert (image[alpha == 0] <= scene.image[alpha == 0]).all()
        again, alpha_again = occlude(scene, kind, np.random.default_rng(seed))
        assert np.array_equal(image, again) and np.array_equal(alpha, alpha_again)
        covered.append(float((alpha > 0.3).mean()))
    assert 0.002 < np.mean(covered) < 0.6


def test_kinds_that_only_judge_are_not_taught() -> None:
    assert not set(TRAINED) & set(UNSEEN)
    assert set(KINDS) == set(TRAINED) | set(UNSEEN)


def test_photographs_keep_their_shape_and_labels_follow_moves() -> None:
    image, labels = face(0)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        changed = photograph(image, rng)
        assert (changed.shape, changed.dtype) == (image.shape, np.uint8)
        assert (cast_shadow(image, rng) <= image).all()
        painted = make_up(image, labels, rng)
        assert np.array_equal(painted[labels == Region.BACKGROUND][:50], image[labels == Region.BACKGROUND][:50])
        turned, followed = moved(np.repeat(labels[..., None], 3, axis=2) * 20, labels, rng)
        inside = cv2.erode((followed == Region.SKIN).astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
        assert (np.abs(turned[inside].astype(int) - Region.SKIN * 20) <= 1).mean() > 0.99


def test_truth_of_an_example_is_one_class_per_pixel_and_clean_faces_show_no_thing() -> None:
    image, truth, weight = draw_example(face(0), face(1), ["mask"], np.random.default_rng(0))
    assert image.shape == (SIDE, SIDE, 3)
    assert np.array_equal(truth.sum(axis=0), np.ones((SIDE, SIDE)))
    assert truth[Seen.OCCLUDER].sum() > 500
    assert weight.min() >= 0
    _, clean, _ = draw_example(face(0), face(1), [], np.random.default_rng(0))
    assert not clean[Seen.OCCLUDER].any()
    assert clean[Seen.FACE].mean() == pytest.approx(np.isin(face(0)[1], INNER_FACE).mean(), abs=0.05)


def test_dark_glasses_say_nothing() -> None:
    image, labels = face(0)
    image[labels == Region.SKIN] = 200
    labels[100:120, 80:180] = Region.GLASSES
    image[100:120, 80:180] = 20
    _, truth, weight = draw_example((image, labels), face(1), [], np.random.default_rng(3), light=False)
    assert (weight == 0).sum() == pytest.approx(2000, rel=0.3)
    assert truth[Seen.FACE][weight == 0].all()


def test_clear_glasses_are_part_of_the_face_and_its_eyes_show_through() -> None:
    scene = Scene(*face(0), *face(1))
    eyes = scene.labels == Region.EYES
    changed = []
    for seed in range(8):
        image = clear_glasses(scene, np.random.default_rng(seed))
        difference = np.abs(image.astype(int) - scene.image).max(axis=2)
        assert not difference[scene.labels == Region.LIPS].any()
        changed.append(((difference > 20).mean(), difference[eyes].mean()))
    drawn, over_eyes = np.mean(changed, axis=0)
    assert 0.005 < drawn < 0.1
    assert over_eyes < 40
    eyeless = Scene(scene.image, np.zeros_like(scene.labels), *face(1))
    assert np.array_equal(clear_glasses(eyeless, np.random.default_rng(0)), scene.image), "no eyes, no glasses"


def test_a_mirrored_reference_has_the_truths_colours() -> None:
    for seed in range(8):
        drawn = draw_recoloring(face(seed), np.random.default_rng(seed))
        assert (drawn.gray[..., 0] == drawn.gray[..., 2]).all()
        hair = [picture[ids == Region.HAIR].mean() for picture, ids in ((drawn.truth, drawn.ids), (drawn.reference, drawn.reference_ids))]
        assert hair[0] == pytest.approx(hair[1], abs=25)


def test_what_is_erased_for_inpainting_is_never_the_face_itself() -> None:
    """The mismatch region: inner face of another picture, and not of this one."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        flat = np.where(np.isin(face(seed)[1], INNER_FACE)[..., None], np.uint8(250), np.uint8(0))
        drawn = erased((np.ascontiguousarray(np.broadcast_to(flat, (SIDE, SIDE, 3))), face(seed)[1]), [face(seed + 1)[1]] * 4, rng)
        assert drawn.hole.mean() > 0.005
        assert set(np.unique(drawn.hole)) == {0, 1}
        inside = drawn.truth[cv2.erode(drawn.hole, np.ones((3, 3), np.uint8)) > 0]
        assert inside.mean() < 60 if len(inside) else True, "the erased part shows no face"


def test_overlap_of_masks() -> None:
    one, other = np.array([1, 1, 0, 0], bool), np.array([0, 1, 1, 0], bool)
    assert overlap_of(one, other) == pytest.approx(1 / 3)
    assert overlap_of(one & ~one, one & ~one) == 1


def test_the_last_tenth_of_every_set_of_photographs_is_held_out() -> None:
    names = [f"a_{number:04}.jpg" for number in range(20)] + [f"b_{number:04}.jpg" for number in range(30)]
    assert held_out(names) == {"a_0018.jpg", "a_0019.jpg", "b_0027.jpg", "b_0028.jpg", "b_0029.jpg"}


def test_photographs_become_aligned_faces_and_those_without_one_are_left_out(tmp_path: Path, people: list[Path]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, path in enumerate(people[:2]):
        picture = cv2.imread(str(path))
        cv2.imwrite(str(photos / f"set_{number:04}.jpg"), cv2.resize(picture, (512, 512), interpolation=cv2.INTER_AREA))
    cv2.imwrite(str(photos / "set_0009.jpg"), np.full((200, 200, 3), 128, np.uint8))
    (photos / "README.md").write_text("not a picture")
    assert list(make_photo_shards(tmp_path, photos)) == [0]
    with np.load(photo_shard(tmp_path, 0)) as stored:
        assert stored["images"].shape == (2, SIDE, SIDE, 3)
        assert list(stored["names"]) == ["set_0000.jpg", "set_0001.jpg"]
        assert all(np.isin(labels, INNER_FACE).mean() > 0.1 for labels in stored["labels"])
    written = photo_shard(tmp_path, 0).stat().st_mtime_ns
    assert list(make_photo_shards(tmp_path, photos)) == [0]
    assert photo_shard(tmp_path, 0).stat().st_mtime_ns == written


def test_what_is_held_out_is_never_drawn(data: Path) -> None:
    pool = FacePool(data)
    assert pool.refresh() == 2
    assert len(pool.held_out_people) == 4
    known = {image.tobytes() for image in pool.held_out_people.images}
    assert not {pool.draw(np.random.default_rng(seed))[0].tobytes() for seed in range(20)} & known


def small(name: str) -> loop.Recipe:
    """A recipe that ends within a second or two."""
    recipe = load_recipe(name)
    recipe.batch = recipe.save_every = 2
    recipe.checked = 6
    if isinstance(recipe, VisibilityRecipe):
        recipe.window = 96
    return recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(name: str, data: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    settings = NetworkSettings(network=name, steps=4, seed=5)

    class Stop(Exception):
        pass

    reports: list[str] = []

    def stop_at_the_second(line: str) -> None:
        reports.append(line)
        if len(reports) == 2:
            raise Stop  # after the log, before the checkpoint of step 4 is written: the steps since the last one are done again

    made = {}
    for folder in ("whole", "parts"):
        out = tmp_path / folder
        (out / "samples").mkdir(parents=True)
        if folder == "parts":
            with pytest.raises(Stop):
                loop.train(small(name), data, out, settings, report=stop_at_the_second)
        made[folder] = loop.train(small(name), data, out, settings, report=lambda line: None)
        assert (out / "curves.png").stat().st_size > 0
        assert {path.name for path in (out / "samples").iterdir()} == {"000002.png", "000004.png"}
    for (key, one), other in zip(made["whole"].state_dict().items(), made["parts"].state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    for (key, one), other in zip(
        made["whole"].state_dict().items(), loop.trained(load_recipe(name), tmp_path / "whole").state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), key
    assert [json.loads(line)["step"] for line in (tmp_path / "whole" / loop.LOG).read_text().splitlines()] == [2, 4]


def test_a_perfect_answer_costs_nothing() -> None:
    recipe = load_recipe("visibility")
    pool_face = face(0), face(1)
    examples = [draw_example(*pool_face, kinds, np.random.default_rng(1)) for kinds in (["mask"], [])]
    truth, weight = (np.stack([example[k] for example in examples]) for k in (1, 2))
    batch = {
        "faces": torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8),
        "truth": torch.from_numpy(truth),
        "weight": torch.from_numpy(weight),
    }

    class Knowing(nn.Module):
        def forward(self, faces: torch.Tensor) -> torch.Tensor:
            return 40 * (torch.from_numpy(truth) - 0.5)

    losses = recipe.losses(Knowing(), batch)
    assert losses["entropy"] == pytest.approx(0, abs=1e-4)
    assert losses["overlap"] == pytest.approx(0, abs=1e-4)


def test_the_average_of_a_short_training_forgets_its_beginning() -> None:
    average = torch.zeros(())
    for count in range(1, 101):
        average = loop.averaged(average, torch.ones(()), count)
    assert average > 0.99
    assert loop.averaged(torch.tensor(3), torch.tensor(4), 5) == 4


def test_the_first_half_of_the_trunk_stays_the_parsers(data: Path, tmp_path: Path) -> None:
    recipe = small("visibility")
    before = recipe.build().state_dict()
    (tmp_path / "samples").mkdir()
    after = loop.train(recipe, data, tmp_path, NetworkSettings(network="visibility", steps=2), report=lambda line: None).state_dict()
    for key, value in after.items():
        if key.startswith(("stem.", "levels.0.", "levels.1.")):
            assert torch.equal(value, before[key]), key
    assert not torch.equal(after["out.weight"], before["out.weight"])


def test_the_parts_end_with_what_ships(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    import flows.train_network as flow_module

    monkeypatch.setattr(parts, "run_step", lambda name, title, work: work())  # the parts, without a server
    monkeypatch.setattr(parts, "PEOPLE_PER_SHARD", 16)
    recipe = small("visibility")
    monkeypatch.setattr(flow_module, "load_recipe", lambda name: recipe)
    settings = NetworkSettings(network="visibility", steps=2)
    with opened(tmp_path / "out", settings) as out:
        flow_module.train_parts(out, settings, data, DataSettings(people=48), None, "cpu")
    state = load_file(out / "visibility.safetensors")
    assert all(value.dtype in (torch.float16, torch.int64) for value in state.values())
    network: nn.Module = VisibilityNet()
    network.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in state.items()})


def test_the_folder_of_another_network_or_version_is_refused(tmp_path: Path) -> None:
    settings = NetworkSettings(network="visibility")
    with opened(tmp_path, settings):
        (tmp_path / "network.pt").write_bytes(b"PK\x05\x06" + bytes(18))  # an empty zip
    other = NetworkSettings(network="recolor")
    with pytest.raises(UsageError, match="training of visibility, not of recolor: choose another --out"), opened(tmp_path, other):
        pass
    with pytest.raises(UsageError, match="--version 1, now 2"), opened(tmp_path, NetworkSettings(network="visibility", version=2)):
        pass
    with pytest.raises(UsageError, match="at least 10000"), opened(tmp_path, NetworkSettings(network="visibility", steps=9999)):
        pass
    with opened(tmp_path, NetworkSettings(network="visibility", steps=20000, minutes=3)):
        pass


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--minutes", "nan"], "minutes must be 0 or more"),
        (["--people", "3"], "people must be at least 48"),
        (["--seed", "-1"], "seed must be 0 or more"),
        (["--photos", "/nowhere"], "--photos /nowhere: No such file or directory; give a folder of portraits"),
    ],
)
def test_settings_out_of_range_are_one_sentence(
    arguments: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "visibility", "--out", str(tmp_path / "out"), "--device", "cpu", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("e4s: ") and part in line
    assert not (tmp_path / "out").exists()
