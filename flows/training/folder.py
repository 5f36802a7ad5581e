"""The folder of a training: one process at a time works in it, with the settings that it was begun with.

Only what may change between two commands does: `training.json` holds the settings, `opened` compares. Imports neither torch nor Prefect.
"""

from __future__ import annotations

import json
import math
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from flows.training.data import PEOPLE_PER_SHARD
from storage.run import RunError, lock_folder, make_folder, unlock
from storage.store import write_atomic
from tasks.graph import UsageError

VALIDATION_SHARDS = 2  # held out, the first ones

_SHARDS, _HEAD, _TEACH, _OBJECTIVE, _NETWORK = "data/shard-*.npz", "preview_head.pt", "teach.pt", "objective.pt", "network.pt"


@dataclass(frozen=True, kw_only=True)
class FolderSettings:
    """What a folder is made with; the options are called as the fields. Raises UsageError for what cannot be."""

    SETTLED_BY: ClassVar[Mapping[str, str]]
    """Setting -> the files that hold what it decided: before that it may change. What says how, not what, is not in it."""
    MAY_GROW: ClassVar[tuple[str, ...]] = ()
    CHECKPOINTS: ClassVar[tuple[str, ...]] = ()

    network: str  # what the folder is for: another network's is refused
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UsageError."""
        if self.seed < 0:
            raise UsageError(f"seed must be 0 or more, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(FolderSettings):
    """What `e4s train rgi` takes."""

    SETTLED_BY: ClassVar[Mapping[str, str]] = {
        "seed": _SHARDS,
        "people": _SHARDS,
        "head_steps": _HEAD,
        "teach_steps": _TEACH,
        "teach_batch": _TEACH,
        "objective_steps": _OBJECTIVE,
        "objective_batch": _OBJECTIVE,
    }
    MAY_GROW: ClassVar[tuple[str, ...]] = ("people", "teach_steps", "objective_steps")
    CHECKPOINTS: ClassVar[tuple[str, ...]] = (_HEAD, _TEACH, _OBJECTIVE)

    network: str = "rgi"
    people: int = 4096  # synthetic people, two pictures each
    head_steps: int = 1500
    teach_steps: int = 4000
    objective_steps: int = 1000
    teach_batch: int = 16  # pictures a step
    objective_batch: int = 4
    teach_minutes: float = 0.0  # 0: no limit
    objective_minutes: float = 0.0

    def __post_init__(self) -> None:
        check_people(self.people)
        for name in ("head_steps", "teach_steps", "objective_steps", "teach_batch", "objective_batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{_option(name)[2:]} must be at least 1, got {getattr(self, name)}")
        for name in ("teach_minutes", "objective_minutes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{_option(name)[2:]} must be 0 or more (0: no limit), got {getattr(self, name):g}")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(FolderSettings):
    """What `e4s train visibility` and the other small networks take."""

    SETTLED_BY: ClassVar[Mapping[str, str]] = {"seed": _NETWORK, "version": _NETWORK, "steps": _NETWORK}
    MAY_GROW: ClassVar[tuple[str, ...]] = ("steps",)
    CHECKPOINTS: ClassVar[tuple[str, ...]] = (_NETWORK,)

    version: int = 1  # of the recipe: raised when a checkpoint of before cannot be gone on from
    steps: int = 10000
    minutes: float = 0.0  # 0: no limit

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.minutes < math.inf:
            raise UsageError(f"minutes must be 0 or more (0: no limit), got {self.minutes:g}")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class DataSettings(FolderSettings):
    """What a folder of shards is made with, which trainings of several networks read."""

    SETTLED_BY: ClassVar[Mapping[str, str]] = {"seed": "shard-*.npz", "people": "shard-*.npz"}
    MAY_GROW: ClassVar[tuple[str, ...]] = ("people",)

    network: str = "data"
    people: int = 640

    def __post_init__(self) -> None:
        check_people(self.people)
        super().__post_init__()


def check_people(people: int) -> None:
    """Raises UsageError if these are too few to learn from."""
    least = (VALIDATION_SHARDS + 1) * PEOPLE_PER_SHARD
    if people < least:
        raise UsageError(f"people must be at least {least}, of whom {VALIDATION_SHARDS * PEOPLE_PER_SHARD} are held out, got {people}")


@contextmanager
def opened(folder: Path, settings: FolderSettings, option: str = "--out") -> Iterator[Path]:
    """The folder, made if need be, locked, its settings stored; `option` is how the user names it.

    Raises UsageError if what is there was made with settings that these cannot go on from, or for another network; RunError if the folder
    cannot be written, another process works in it, or a file of it is damaged. Damaged shards are removed, with a line on stderr, and
    so made again.
    """
    make_folder(folder, option)
    lock = lock_folder(folder, option)
    try:
        path = folder / "training.json"
        if path.is_file():
            _check_same(folder, _read(path), settings, option)
        _check_files(folder, settings)
        write_atomic(path, (json.dumps(asdict(settings), indent=2) + "\n").encode())
        yield folder
    finally:
        unlock(lock)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError):
        raise RunError(f"{path}: cannot be read; remove it to go on with the settings that are given now") from None


def _check_same(folder: Path, made_with: dict[str, Any], settings: FolderSettings, option: str) -> None:
    network = made_with.get("network", "rgi")  # the only one before there were others
    if network != settings.network:
        raise UsageError(f"{folder} holds the training of {network}, not of {settings.network}: choose another {option}")
    for name, file in settings.SETTLED_BY.items():
        new = getattr(settings, name)
        old = made_with.get(name, new)
        ended = name == "teach_steps" and (folder / _OBJECTIVE).is_file()  # the objective went on from there
        grows = name in settings.MAY_GROW and not ended
        if old == new or not any(folder.glob(file)) or (grows and new > old):
            continue
        ways = [f"give at least {old}" if grows else f"give {old} again"]
        if name == "head_steps":
            ways.append(f"remove {_HEAD} and {_OBJECTIVE} to fit the head anew")
        if ended:
            ways.append(f"remove {_OBJECTIVE} to teach on and begin that part anew")
        raise UsageError(f"{folder} was made with {_option(name)} {old}, now {new}: {', '.join(ways)}, or choose another {option}")


def _check_files(folder: Path, settings: FolderSettings) -> None:
    for name in settings.CHECKPOINTS:
        if (folder / name).is_file() and not zipfile.is_zipfile(folder / name):
            raise RunError(f"{folder / name}: the checkpoint cannot be read; remove it to do its part again")
    for shard in (*folder.glob(_SHARDS), *folder.glob("shard-*.npz"), *folder.glob("photos-*.npz")):
        if not zipfile.is_zipfile(shard):
            print(f"e4s: {shard} is damaged; making it again", file=sys.stderr)
            shard.unlink()


def _option(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"
