"""The folder of a training: one process at a time works in it, with the settings that it was begun with.

Only what may change between two commands does: `training.json` holds the settings, `opened` compares. Imports neither torch nor Prefect.
"""

from __future__ import annotations

import json
import math
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.training.data import PEOPLE_PER_SHARD
from storage.run import RunError, lock_folder, make_folder, unlock
from storage.store import write_atomic
from tasks.graph import UsageError

VALIDATION_SHARDS = 2  # held out, the first ones

_SHARDS, _HEAD, _TEACH, _OBJECTIVE = "data/shard-*.npz", "preview_head.pt", "teach.pt", "objective.pt"
_SETTLED_BY = {"seed": _SHARDS, "people": _SHARDS, "head_steps": _HEAD, "teach_steps": _TEACH, "objective_steps": _OBJECTIVE}
"""Setting -> the files that hold what it decided: before that it may change. Minutes and device say how, not what, and always may."""
_MAY_GROW = ("people", "teach_steps", "objective_steps")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What `e4s train rgi` takes; the options are called as the fields."""

    people: int = 4096  # synthetic people, two pictures each
    head_steps: int = 1500
    teach_steps: int = 4000
    objective_steps: int = 1000
    teach_minutes: float = 0.0  # 0: no limit
    objective_minutes: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UsageError."""
        least = (VALIDATION_SHARDS + 1) * PEOPLE_PER_SHARD
        if self.people < least:
            raise UsageError(
                f"people must be at least {least}, of whom {VALIDATION_SHARDS * PEOPLE_PER_SHARD} are held out, got {self.people}"
            )
        for name in ("head_steps", "teach_steps", "objective_steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{_option(name)[2:]} must be at least 1, got {getattr(self, name)}")
        for name in ("teach_minutes", "objective_minutes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{_option(name)[2:]} must be 0 or more (0: no limit), got {getattr(self, name):g}")
        if self.seed < 0:
            raise UsageError(f"seed must be 0 or more, got {self.seed}")


@contextmanager
def opened(folder: Path, settings: TrainingSettings) -> Iterator[Path]:
    """The folder, made if need be, locked, its settings stored.

    Raises UsageError if what is there was made with settings that these cannot go on from; RunError if the folder cannot be written,
    another process works in it, or a file of it is damaged. Damaged shards are removed, with a line on stderr, and so made again.
    """
    make_folder(folder, "--out")
    lock = lock_folder(folder, "--out")
    try:
        path = folder / "training.json"
        if path.is_file():
            _check_same(folder, _read(path), settings)
        _check_files(folder)
        write_atomic(path, (json.dumps(asdict(settings), indent=2) + "\n").encode())
        yield folder
    finally:
        unlock(lock)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError):
        raise RunError(f"{path}: cannot be read; remove it to go on with the settings that are given now") from None


def _check_same(folder: Path, made_with: dict[str, Any], settings: TrainingSettings) -> None:
    for name, file in _SETTLED_BY.items():
        new = getattr(settings, name)
        old = made_with.get(name, new)
        ended = name == "teach_steps" and (folder / _OBJECTIVE).is_file()  # the objective went on from there
        grows = name in _MAY_GROW and not ended
        if old == new or not any(folder.glob(file)) or (grows and new > old):
            continue
        ways = [f"give at least {old}" if grows else f"give {old} again"]
        if name == "head_steps":
            ways.append(f"remove {_HEAD} and {_OBJECTIVE} to fit the head anew")
        if ended:
            ways.append(f"remove {_OBJECTIVE} to teach on and begin that part anew")
        raise UsageError(f"{folder} was made with {_option(name)} {old}, now {new}: {', '.join(ways)}, or choose another --out")


def _check_files(folder: Path) -> None:
    for name in (_HEAD, _TEACH, _OBJECTIVE):
        if (folder / name).is_file() and not zipfile.is_zipfile(folder / name):
            raise RunError(f"{folder / name}: the checkpoint cannot be read; remove it to do its part again")
    for shard in folder.glob(_SHARDS):
        if not zipfile.is_zipfile(shard):
            print(f"e4s: {shard} is damaged; making it again", file=sys.stderr)
            shard.unlink()


def _option(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"
