"""Training pictures whose regional style codes are known: synthetic people, whole and mixed by region and style layer.

A shard (`shard-00000.npz`) follows from its number and the seed alone, so making them can stop and go on anywhere.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from e4s_models.regions import BISENET19_TO_REGIONS, INNER_FACE, NUM_REGIONS
from flows.training.augment import augment
from storage.store import write_atomic
from tasks.stage import Float32, UInt8

if TYPE_CHECKING:
    from torch import Tensor

    from e4s_models.face_parser import FaceParser
    from e4s_models.mobile_stylegan import MobileStyleGAN

SIDE = 256  # px of the stored pictures: what the encoder sees
PEOPLE_PER_SHARD = 16  # two pictures each: as they are, and mixed with somebody else
TRUNCATION = (0.5, 1.0)
NUM_LAYERS = 23
_LEAST_AREA = 5e-4  # share of the picture


@dataclass(frozen=True)
class Shard:
    """Pictures with the codes that made them."""

    images: UInt8  # (N, 256, 256, 3) RGB
    labels: UInt8  # (N, 256, 256) region ids
    codes: Float32  # (N, 2, 512): the style codes A and B of each picture
    takes_b: npt.NDArray[np.bool_]  # (N, 12, 23): regions and style layers that code B made

    def regional_codes(self) -> Float32:
        """(N, 12, 23, 512): the code of every region and style layer."""
        return np.where(self.takes_b[..., None], self.codes[:, None, None, 1], self.codes[:, None, None, 0])


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.npz"


def read_shard(path: Path) -> Shard:
    with np.load(path, allow_pickle=False) as stored:
        return Shard(**{name: stored[name] for name in ("images", "labels", "codes", "takes_b")})


def make_shards(folder: Path, numbers: Iterator[int] | range, seed: int) -> Iterator[int]:
    """Make the shards that do not exist yet; yields each number when its file is there."""
    from e4s_models.face_parser import FaceParser
    from e4s_models.mobile_stylegan import MobileStyleGAN

    networks: tuple[MobileStyleGAN, FaceParser] | None = None
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        path = shard_path(folder, number)
        if not path.is_file():
            networks = networks or (MobileStyleGAN.load(), FaceParser.load("cpu"))
            shard = _make(*networks, np.random.Generator(np.random.PCG64([seed, number])))
            data = io.BytesIO()
            np.savez(data, images=shard.images, labels=shard.labels, codes=shard.codes, takes_b=shard.takes_b)
            write_atomic(path, data.getvalue())
        yield number


def draw_mix(rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Which regions and layers take code B, (12, 23): a swapped face, single regions, late style layers, or regions in late layers."""
    regions = np.zeros(NUM_REGIONS, bool)
    kind = rng.integers(4)
    if kind == 0:
        regions[list(INNER_FACE)] = True
    else:
        regions[:] = rng.random(NUM_REGIONS) < 0.5 if kind != 2 else True
    first = 0 if kind in (0, 1) and rng.random() < 0.5 else int(rng.integers(3, 17))
    return regions[:, None] & (np.arange(NUM_LAYERS) >= first)


def _make(generator: MobileStyleGAN, parser: FaceParser, rng: np.random.Generator) -> Shard:
    import torch
    from torch.nn.functional import interpolate

    images, labels, codes, takes_b = [], [], [], []
    with torch.inference_mode():
        mean = generator.mean_w
        for _ in range(PEOPLE_PER_SHARD):
            z = torch.from_numpy(rng.standard_normal((2, 512), np.float32))
            truncation = torch.from_numpy(rng.uniform(*TRUNCATION, (2, 1)).astype(np.float32))
            pair = mean + truncation * (generator.map(z) - mean)  # (2, 512)
            mix = draw_mix(rng)
            whole = generator.synthesize(pair[:1, None].expand(1, NUM_LAYERS, -1)).clamp(-1, 1)  # (1, 3, 1024, 1024)
            parsed = parser(interpolate(whole, (512, 512), mode="bilinear", antialias=True)).argmax(dim=1)[0].numpy()
            regions = BISENET19_TO_REGIONS[parsed]  # (512, 512)
            chosen = torch.where(torch.from_numpy(mix)[..., None], pair[1], pair[0])  # (12, 23, 512)
            mixed = generator.synthesize(chosen[None], torch.from_numpy(regions)[None]).clamp(-1, 1)
            for face, takes in ((whole, np.zeros_like(mix)), (mixed, mix)):
                small = interpolate(face, (SIDE, SIDE), mode="area")[0].permute(1, 2, 0)
                images.append(small.add(1).mul(127.5).round().to(torch.uint8).numpy())
                labels.append(regions[::2, ::2])
                codes.append(pair.numpy())
                takes_b.append(takes)
    return Shard(np.stack(images), np.stack(labels), np.stack(codes), np.stack(takes_b))


@dataclass(frozen=True)
class Batch:
    """Pictures as networks take them."""

    faces: Tensor  # (B, 3, 256, 256) float32 RGB [-1, 1]
    labels: Tensor  # (B, 256, 256) uint8 region ids
    codes: Tensor  # (B, 12, 23, 512)
    present: Tensor  # (B, 12) float32: 1 for regions large enough to tell a code from


def batch_of(images: UInt8, labels: UInt8, codes: Float32) -> Batch:
    """Arrays (B, H, W, 3), (B, H, W) and (B, 12, 23, 512) as a batch."""
    import torch

    faces = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    areas = np.stack([(labels == region).mean(axis=(1, 2)) for region in range(NUM_REGIONS)], axis=1)
    present = torch.from_numpy((areas > _LEAST_AREA).astype(np.float32))
    return Batch(faces, torch.from_numpy(labels), torch.from_numpy(codes), present)


class Pool:
    """Shards in memory; new files are taken in as they appear."""

    def __init__(self, folder: Path, first: int) -> None:
        """`first`: how many shards, the first ones, are held out."""
        self.folder, self.first = folder, first
        self._shards: dict[Path, Shard] = {}

    def refresh(self) -> int:
        """Read new shards; returns how many pictures there are."""
        for path in sorted(self.folder.glob("shard-*.npz"))[self.first :]:
            if path not in self._shards:
                self._shards[path] = read_shard(path)
        return sum(len(shard.images) for shard in self._shards.values())

    def draw(self, count: int, rng: np.random.Generator) -> Batch:
        """A batch of augmented pictures."""
        shards = list(self._shards.values())
        drawn = []
        for _ in range(count):
            shard = shards[int(rng.integers(len(shards)))]
            k = int(rng.integers(len(shard.images)))
            image, labels = augment(shard.images[k], shard.labels[k], rng)
            drawn.append((image, labels, np.where(shard.takes_b[k][..., None], shard.codes[k, 1], shard.codes[k, 0])))
        images, labelled, codes = (np.stack(part) for part in zip(*drawn, strict=True))
        return batch_of(images, labelled, codes)
