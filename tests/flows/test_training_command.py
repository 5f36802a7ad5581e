"""`e4s train rgi` as a command: who may work in its folder, with which settings, and what is said when something goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flows.cli import main
from flows.training.data import shard_path
from flows.training.folder import TrainingSettings, opened
from storage.run import RunError
from tasks.graph import UsageError

Text = pytest.CaptureFixture[str]

SETTINGS = TrainingSettings(people=64, head_steps=10, teach_steps=20, objective_steps=5, seed=3)


def train(out: Path, *more: str) -> int:
    return main(["train", "rgi", "--out", str(out), "--people", "48", "--device", "cpu", *more])


def one_sentence(capsys: Text, *parts: str) -> None:
    """All that stands on stderr is one line, which holds the parts."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("e4s: ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--people", "2"], ["people must be at least 48"]),
        (["--teach-steps", "0"], ["teach-steps must be at least 1", "got 0"]),
        (["--teach-minutes", "-5"], ["teach-minutes must be 0 or more", "got -5"]),
        (["--objective-minutes", "nan"], ["objective-minutes must be 0 or more"]),
        (["--seed", "-1"], ["seed must be 0 or more"]),
        (["--device", "quantum"], ["quantum"]),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_made(
    arguments: list[str], parts: list[str], tmp_path: Path, capsys: Text
) -> None:
    assert train(tmp_path / "out", *arguments) == 1
    one_sentence(capsys, *parts)
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_used(tmp_path: Path, capsys: Text) -> None:
    (tmp_path / "file").touch()
    assert train(tmp_path / "file") == 1
    one_sentence(capsys, str(tmp_path / "file"), "choose another --out")
    assert train(Path("/proc/e4s-training")) == 1
    one_sentence(capsys, "/proc/e4s-training", "cannot be written", "choose another --out")


def test_a_second_process_on_the_folder_is_refused_before_it_writes(tmp_path: Path, capsys: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # without a lock the command would end there
    with opened(tmp_path, SETTINGS):
        before = sorted(path.name for path in tmp_path.iterdir())
        assert train(tmp_path, "--seed", "3") == 1
        one_sentence(capsys, "another process is working", str(os.getpid()), "choose another --out")
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    with opened(tmp_path, SETTINGS):
        pass


@pytest.mark.parametrize(
    ("made", "changes", "part"),
    [
        (("data/shard-00000.npz",), {"seed": 4}, "--seed 3, now 4: give 3 again, or choose"),
        (("data/shard-00000.npz",), {"people": 48}, "--people 64, now 48: give at least 64, or choose"),
        (("teach.pt",), {"teach_steps": 19}, "--teach-steps 20, now 19: give at least 20, or choose"),
        (("objective.pt",), {"objective_steps": 1}, "--objective-steps 5, now 1: give at least 5, or choose"),
        (("preview_head.pt",), {"head_steps": 11}, "--head-steps 10, now 11: give 10 again, remove preview_head.pt and objective.pt"),
        (("teach.pt", "objective.pt"), {"teach_steps": 21}, "--teach-steps 20, now 21: give 20 again, remove objective.pt"),
    ],
)
def test_what_would_mix_two_trainings_is_refused(made: tuple[str, ...], changes: dict[str, int], part: str, tmp_path: Path) -> None:
    with opened(tmp_path, SETTINGS):
        pass
    for name in made:
        checkpoint(tmp_path / name)
    stored = (tmp_path / "training.json").read_bytes()
    with pytest.raises(UsageError, match=part), opened(tmp_path, replace(SETTINGS, **changes)):
        pass
    assert (tmp_path / "training.json").read_bytes() == stored
    with opened(tmp_path, SETTINGS):
        pass


@pytest.mark.parametrize(
    "changes",
    [{"people": 80}, {"head_steps": 11}, {"teach_steps": 30}, {"objective_steps": 6}, {"teach_minutes": 2.0, "objective_minutes": 1.5}],
)
def test_more_people_steps_and_other_minutes_go_on(changes: dict[str, float], tmp_path: Path) -> None:
    with opened(tmp_path, SETTINGS):
        for name in ("data/shard-00000.npz", "teach.pt", *([] if "teach_steps" in changes else ["objective.pt"])):
            checkpoint(tmp_path / name)
    grown = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    with opened(tmp_path, grown) as folder:
        assert folder == tmp_path
    assert {name: json.loads((tmp_path / "training.json").read_text())[name] for name in changes} == changes
    with opened(tmp_path, grown):
        pass


def test_damaged_files_are_named(tmp_path: Path, capsys: Text) -> None:
    with opened(tmp_path, SETTINGS):
        pass
    (tmp_path / "teach.pt").write_bytes(b"")
    with pytest.raises(RunError, match=r"teach\.pt: .* cannot be read; remove it"), opened(tmp_path, SETTINGS):
        pass
    (tmp_path / "teach.pt").unlink()
    shard = tmp_path / "data/shard-00001.npz"
    checkpoint(shard)
    shard.write_bytes(shard.read_bytes()[:-40])
    with opened(tmp_path, SETTINGS):
        assert not shard.exists(), "it is made again"
    assert capsys.readouterr().err == f"e4s: {shard} is damaged; making it again\n"
    (tmp_path / "training.json").write_text('{"seed": ')
    with pytest.raises(RunError, match=r"training\.json: cannot be read"), opened(tmp_path, SETTINGS):
        pass


def test_a_damaged_shard_does_not_let_another_seed_in(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number, content in ((0, b"cut"), (1, b"cut, too")):
        shard_path(tmp_path / "data", number).write_bytes(content)
    (tmp_path / "training.json").write_text('{"seed": 3}')
    with pytest.raises(UsageError, match="was made with --seed 3, now 4"), opened(tmp_path, TrainingSettings(seed=4)):
        pass
    assert shard_path(tmp_path / "data", 0).is_file(), "refused before anything is removed"


def test_planning_a_training_loads_neither_torch_nor_prefect(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from flows.training.data import shard_path
from flows.training.folder import TrainingSettings, opened
with opened(Path({str(tmp_path)!r}), TrainingSettings()): pass
print([name for name in ("torch", "prefect") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def checkpoint(path: Path) -> None:
    """An archive, as checkpoints and shards are."""
    path.parent.mkdir(exist_ok=True)
    np.savez(path.open("wb"), step=1)
