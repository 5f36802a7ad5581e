"""Faces with their labels that the small networks learn from: synthetic people and, where there are some, photographs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flows.training.data import SIDE, read_shard
from flows.training.folder import VALIDATION_SHARDS
from tasks.stage import UInt8

_PHOTO_SHARE = 0.5  # of the drawn faces, where there are photographs


@dataclass(frozen=True)
class FaceSet:
    """Pictures with region ids."""

    images: UInt8  # (N, 256, 256, 3) RGB
    labels: UInt8  # (N, 256, 256)

    def __len__(self) -> int:
        return len(self.images)

    def pick(self, rng: np.random.Generator) -> tuple[UInt8, UInt8]:
        """One of them."""
        k = int(rng.integers(len(self)))
        return self.images[k], self.labels[k]


class FacePool:
    """The faces of a data folder, in memory; new files are taken in as they appear.

    The first shards of people and the last tenth of each set of photographs are held out.
    """

    def __init__(self, data: Path) -> None:
        self.data = data
        self._people: dict[Path, FaceSet] = {}
        self._photos: dict[Path, tuple[FaceSet, FaceSet]] = {}
        self.held_out_people = _joined([_people_of(path) for path in sorted(data.glob("shard-*.npz"))[:VALIDATION_SHARDS]])
        self.held_out_photos = self._photographs = _joined([])
        self.refresh()

    def refresh(self) -> int:
        """Read the shards that have appeared; returns how many faces there are to learn from."""
        for path in sorted(self.data.glob("shard-*.npz"))[VALIDATION_SHARDS:]:
            if path not in self._people:
                self._people[path] = _people_of(path)
        new = [path for path in sorted(self.data.glob("photos-*.npz")) if path not in self._photos]
        for path in new:
            self._photos[path] = _photos_of(path)
        if new:
            self._photographs = _joined([learnt for learnt, _ in self._photos.values()])
            self.held_out_photos = _joined([kept for _, kept in self._photos.values()])
        return sum(len(shard) for shard in self._people.values()) + len(self._photographs)

    def draw(self, rng: np.random.Generator) -> tuple[UInt8, UInt8]:
        """A face to learn from: RGB (256, 256, 3) and region ids (256, 256)."""
        shards = list(self._people.values())
        photo = len(self._photographs) > 0 and (not shards or rng.random() < _PHOTO_SHARE)
        faces = self._photographs if photo else shards[int(rng.integers(len(shards)))]
        return faces.pick(rng)


def _people_of(path: Path) -> FaceSet:
    shard = read_shard(path)
    return FaceSet(shard.images, shard.labels)


def _photos_of(path: Path) -> tuple[FaceSet, FaceSet]:
    """Photographs to learn from, and those held out."""
    with np.load(path, allow_pickle=False) as stored:
        held = stored["held_out"]
        images, labels = stored["images"], stored["labels"]
    return FaceSet(images[~held], labels[~held]), FaceSet(images[held], labels[held])


def _joined(sets: Sequence[FaceSet]) -> FaceSet:
    none = FaceSet(np.zeros((0, SIDE, SIDE, 3), np.uint8), np.zeros((0, SIDE, SIDE), np.uint8))
    return FaceSet(np.concatenate([faces.images for faces in (none, *sets)]), np.concatenate([faces.labels for faces in (none, *sets)]))
