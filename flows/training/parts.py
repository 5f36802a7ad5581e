"""Parts of a training as Prefect tasks, and the part that all trainings begin with: people to learn from."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from e4s_models.weights import WeightsError
from flows.step import run_step
from flows.training.data import PEOPLE_PER_SHARD, make_shards, shard_path
from storage.run import RunError
from storage.store import write_atomic
from tasks.graph import UsageError


class TrainingCrash(Exception):
    """A program error stopped a part; a sentence."""


def part(folder: Path, function: Callable[..., None], *arguments: object) -> None:
    """One part as a Prefect task; its checkpoints are its own business. Raises TrainingCrash for what it did not foresee."""
    name = function.__name__
    try:
        run_step(name, name, partial(function, *arguments))
    except (UsageError, RunError, WeightsError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
            raise  # a file's or the disk's fault
        write_atomic(folder / "error.txt", traceback.format_exc().encode())
        first = str(error).strip().partition("\n")[0]
        raise TrainingCrash(
            f"the training stopped in its part {name} by a program error ({type(error).__name__}: {first}); {folder / 'error.txt'} has the "
            "traceback, and the same command continues from the last checkpoint"
        ) from error


def make_people(data: Path, people: int, seed: int) -> None:
    """Make the shards of synthetic people that are missing."""
    missing = [number for number in range(-(-people // PEOPLE_PER_SHARD)) if not shard_path(data, number).is_file()]
    for number in make_shards(data, iter(missing), seed):
        print(f"people: {min(people, (number + 1) * PEOPLE_PER_SHARD)} of {people}", flush=True)
