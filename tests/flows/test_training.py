"""Training of the encoder, as small as it can be made: data, resuming, and the whole flow."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import flows.training.data as data_module
from e4s_models.mobile_stylegan import MobileStyleGAN
from e4s_models.regions import NUM_REGIONS
from flows.training.augment import augment
from flows.training.data import NUM_LAYERS, Pool, draw_mix, make_shards, read_shard, shard_path
from flows.training.objective import ObjectiveSettings, train
from flows.training.teach import CodeLoss, TeachSettings, new_encoder, teach, w_basis
from flows.training.trainee import StyleGan2Trainee, gradient_penalty
from tasks.graph import UsageError

SEED = 3
CODES = 4096  # enough for a basis


@pytest.fixture(scope="module")
def generator() -> MobileStyleGAN:
    return MobileStyleGAN.load()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of one person, two pictures each."""
    folder = tmp_path_factory.mktemp("training") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module, "PEOPLE_PER_SHARD", 1)
        list(make_shards(folder, range(3), SEED))
    return folder


def test_pictures_are_those_of_their_codes(data: Path, generator: MobileStyleGAN) -> None:
    shard = read_shard(shard_path(data, 1))
    assert shard.images.shape == (2, 256, 256, 3)
    for image, labels, codes in zip(shard.images, shard.labels, shard.regional_codes(), strict=True):
        with torch.inference_mode():
            made = generator.synthesize(torch.from_numpy(codes)[None], torch.from_numpy(labels)[None])
        small = torch.nn.functional.avg_pool2d(made.clamp(-1, 1), 4)[0].permute(1, 2, 0).add(1).mul(127.5).numpy()
        assert np.abs(small - image).mean() < 1.5  # stored labels are half as fine as those it was made with
    assert not shard.takes_b[0].any()
    assert shard.takes_b[1].any()


def test_a_shard_follows_from_seed_and_number(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "PEOPLE_PER_SHARD", 1)
    assert list(make_shards(tmp_path, range(2, 3), SEED)) == [2]
    again, first = read_shard(shard_path(tmp_path, 2)), read_shard(shard_path(data, 2))
    assert np.array_equal(again.images, first.images)
    assert np.array_equal(again.codes, first.codes)
    assert not np.array_equal(first.codes, read_shard(shard_path(data, 1)).codes)


def test_mixes_leave_early_layers_and_regions_apart() -> None:
    rng = np.random.default_rng(0)
    mixes = np.stack([draw_mix(rng) for _ in range(300)])
    assert mixes.shape == (300, NUM_REGIONS, NUM_LAYERS)
    assert 0.1 < mixes.mean() < 0.6
    assert (mixes[:, :, -1] >= mixes[:, :, 0]).all(), "what is mixed early is mixed late"


def test_augmentation_keeps_shapes_and_moves_labels_with_the_picture() -> None:
    image = np.zeros((128, 128, 3), np.uint8)
    image[32:96, 32:96] = 255
    labels = (image[..., 0] // 255 * 6).astype(np.uint8)
    kept = []
    for seed in range(40):
        changed, followed = augment(image, labels, np.random.default_rng(seed))
        assert (changed.shape, followed.shape, changed.dtype, followed.dtype) == ((128, 128, 3), (128, 128), np.uint8, np.uint8)
        kept.append(((changed.mean(axis=2) > 127) == (followed == 6)).mean())
    assert np.mean(kept) > 0.95
    assert any(not np.array_equal(augment(image, labels, np.random.default_rng(seed))[1], labels) for seed in range(10))


def test_code_loss_is_zero_for_the_code_and_one_for_a_doubled_style(generator: MobileStyleGAN) -> None:
    loss = CodeLoss(generator)
    codes = generator.mean_w.expand(1, NUM_REGIONS, NUM_LAYERS, 512)
    present = torch.ones(1, NUM_REGIONS)
    assert not loss(codes[:, :, :4], codes, present).any()
    off = loss(codes[:, :, :4] + w_basis(generator, 1024)[0], codes, present)
    assert off.shape == (NUM_LAYERS,)
    assert (off > 0).all()
    present[:, 3:] = 0
    wrong = codes[:, :, :4].clone()
    wrong[:, 3:] += 5
    assert not loss(wrong, codes, present).any(), "absent regions do not count"
    assert not loss(wrong, codes, torch.zeros_like(present)).any(), "a batch without known codes costs nothing"


def test_the_basis_spans_w(generator: MobileStyleGAN) -> None:
    basis = w_basis(generator, CODES)
    z = torch.from_numpy(np.random.default_rng(8).standard_normal((2000, 512), np.float32))
    with torch.inference_mode():
        w = generator.map(z) - generator.mean_w
    coordinates = torch.linalg.solve(basis.t().double(), w.t().double())  # (512, N)
    assert coordinates[:50].std(dim=1).sub(1).abs().max() < 0.15
    assert (basis[:-1].norm(dim=1) >= basis[1:].norm(dim=1)).all()


def test_teaching_that_was_stopped_goes_on_to_the_same_weights(data: Path, tmp_path: Path, generator: MobileStyleGAN) -> None:
    torch.set_num_threads(1)
    settings = {"batch": 2, "save_every": 2, "validation": 1, "seed": SEED, "basis_codes": CODES}
    whole = teach(data, tmp_path / "whole", generator, TeachSettings(steps=4, **settings), report=lambda line: None)  # type: ignore[arg-type]

    class Stop(Exception):
        pass

    def stop(line: str) -> None:
        raise Stop  # after the log, before the checkpoint of step 4 is written: the steps since the last one are done again

    reports: list[str] = []
    first = TeachSettings(steps=4, **settings)  # type: ignore[arg-type]
    with pytest.raises(Stop):
        teach(data, tmp_path / "parts", generator, first, report=lambda line: stop(line) if reports else reports.append(line))
    again = teach(data, tmp_path / "parts", generator, first, report=lambda line: None)
    for (name, one), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    lines = [json.loads(line) for line in (tmp_path / "whole/teach.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[0]["mean_code"] > 0


def test_the_flow_ends_with_its_files_however_few_the_steps(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import flows.train_rgi as flow_module
    import flows.training.folder as folder_module
    import flows.training.parts as parts_module

    monkeypatch.setattr(parts_module, "run_step", lambda name, title, work: work())  # the parts, without a server
    for module in (parts_module, folder_module):
        monkeypatch.setattr(module, "PEOPLE_PER_SHARD", 1)
    monkeypatch.setattr(flow_module, "show_samples", lambda *_: None)
    (tmp_path / "data").symlink_to(data)
    small = {"people": 3, "head_steps": 1, "teach_steps": 1, "teach_batch": 2, "objective_batch": 1}
    flow_module.train_rgi.fn(out=str(tmp_path), **small, objective_steps=1, seed=SEED)
    for name in ("teach.jsonl", "objective.jsonl", "curves.png", "code_encoder.safetensors", "preview_head.safetensors"):
        assert (tmp_path / name).stat().st_size > 0, name
    with pytest.raises(UsageError, match="people must be at least 3"):
        flow_module.train_rgi.fn(out=str(tmp_path), people=2)
    with pytest.raises(UsageError, match="with --seed 3, now 4"):
        flow_module.train_rgi.fn(out=str(tmp_path), **small, objective_steps=1, seed=4)
    taught = (tmp_path / "teach.pt").read_bytes()
    flow_module.train_rgi.fn(out=str(tmp_path), **small, objective_steps=2, seed=SEED)
    assert [json.loads(line)["step"] for line in (tmp_path / "objective.jsonl").read_text().splitlines()] == [1, 2]
    assert (tmp_path / "teach.pt").read_bytes() == taught, "the objective went on from it"


def test_stylegan2_trains_by_the_same_objective(data: Path, tmp_path: Path, generator: MobileStyleGAN) -> None:
    from e4s_models.discriminator import Discriminator
    from e4s_models.reconstruction_loss import LossWeights, ReconstructionLoss
    from e4s_models.stylegan2 import StyleGAN2

    torch.manual_seed(0)
    small = StyleGAN2(side=64, region_layers=5, max_width=16)
    trainee = StyleGan2Trainee(small, Discriminator(side=64, max_width=16))
    encoder = new_encoder(generator, 0, trainee.groups, CODES)
    before = {name: value.clone() for name, value in small.named_parameters()}
    judged = [value.clone() for value in trainee.discriminator.parameters()]
    reconstruction = ReconstructionLoss.load(weights=LossWeights(identity=0, parsing=0))
    pool = Pool(data, 1)
    settings = ObjectiveSettings(steps=2, batch=2, save_every=1, judge_every=2)
    train(encoder, trainee, pool, reconstruction, None, tmp_path, settings, report=lambda line: None)
    moved = {name for name, value in small.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("convs.") and int(name.split(".")[1]) < 5 for name in moved), "only the first K layers learn"
    assert any(not torch.equal(a, b) for a, b in zip(judged, trainee.discriminator.parameters(), strict=True))
    lines = [json.loads(line) for line in (tmp_path / "objective.jsonl").read_text().splitlines()]
    assert "judging" in lines[0]
    assert "judging" not in lines[1], "the discriminator is stepped every other step"
    assert gradient_penalty(trainee.discriminator, torch.rand(2, 3, 64, 64)) > 0
