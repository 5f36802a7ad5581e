"""Photographs as training pictures: one face of each, aligned and labelled as the pipeline does it.

`photos-*.npz` beside the shards of synthetic people. Which photographs are held out is decided by file name alone, per set (the name
before its number), so that it is the same in every training.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from flows.training.data import SIDE
from storage.store import write_atomic
from tasks.graph import UsageError
from tasks.stage import ItemError, UInt8

PHOTOS_PER_SHARD = 64
HELD_OUT_SHARE = 0.1  # the last of each set


def photo_files(folder: Path) -> list[Path]:
    """The JPEG and PNG files of a folder, by name. Raises UsageError if there are none."""
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    except OSError as error:
        raise UsageError(f"--photos {folder}: {error.strerror}; give a folder of portraits") from None
    if not files:
        raise UsageError(f"--photos {folder}: no JPEG or PNG files in it; give a folder of portraits")
    return files


def held_out(names: Sequence[str]) -> set[str]:
    """The last tenth of each set of photographs; a set is what its files are called before their number."""
    kept: set[str] = set()
    for _, members in groupby(sorted(names), key=lambda name: re.sub(r"\d+\.\w+$", "", name)):
        of_set = list(members)
        kept.update(of_set[len(of_set) - round(len(of_set) * HELD_OUT_SHARE) :])
    return kept


def photo_shard(folder: Path, number: int) -> Path:
    return folder / f"photos-{number:05d}.npz"


def make_photo_shards(folder: Path, photos: Path) -> Iterator[int]:
    """Align and label the photographs of which there is no shard yet; yields each shard's number when its file is there.

    A shard holds `images` (N, 256, 256, 3) uint8 RGB, `labels` (N, 256, 256) uint8 region ids, `names` (N,) and `held_out` (N,) bool;
    photographs without a usable face are left out.
    """
    from tasks import align, parse
    from tasks.frame import ImageFile, hash_file

    files = photo_files(photos)
    kept = held_out([path.name for path in files])
    networks = None
    for number in range(-(-len(files) // PHOTOS_PER_SHARD)):
        if not photo_shard(folder, number).is_file():
            configs = align.STAGE.config(side=2 * SIDE), parse.STAGE.config()
            networks = networks or (align.STAGE.load(configs[0], "cpu"), parse.STAGE.load(configs[1], "cpu"))
            images: list[UInt8] = []
            labels: list[UInt8] = []
            names: list[str] = []
            for path in files[number * PHOTOS_PER_SHARD : (number + 1) * PHOTOS_PER_SHARD]:
                image = ImageFile(str(path), hash_file(str(path)))
                (aligned,) = align.STAGE.run(networks[0], configs[0], [{"image": image, "face_index": 0}])
                if isinstance(aligned, ItemError):
                    continue
                (parsed,) = parse.STAGE.run(networks[1], configs[1], [{"face": aligned["face"]}])
                assert not isinstance(parsed, ItemError)
                images.append(_halved(aligned["face"]))
                labels.append(parsed["regions"][::2, ::2])
                names.append(path.name)
            data = io.BytesIO()
            held = np.array([name in kept for name in names], bool)
            stacked = np.zeros((0, SIDE, SIDE, 3), np.uint8), np.zeros((0, SIDE, SIDE), np.uint8)
            np.savez(
                data,
                images=np.stack(images) if images else stacked[0],
                labels=np.stack(labels) if labels else stacked[1],
                names=np.array(names, np.str_),
                held_out=held,
            )
            write_atomic(photo_shard(folder, number), data.getvalue())
        yield number


def _halved(image: UInt8) -> UInt8:
    """Means of 2 x 2 px: (2H, 2W, 3) -> (H, W, 3)."""
    height, width = image.shape[0] // 2, image.shape[1] // 2
    return np.asarray(np.rint(image.reshape(height, 2, width, 2, 3).mean(axis=(1, 3))), np.uint8)
