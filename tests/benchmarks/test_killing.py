"""What the soaks count: processes that outlive their command, keys finished twice; and that a soak goes on with its own options only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.killing as killing
from benchmarks.killing import MARK, keys_twice, marked
from benchmarks.soak import KilledSoak
from storage.store import Finished, Store

OUTLIVES = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)"


def test_a_process_that_outlives_its_command_is_found_counted_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "one")
    subprocess.run([sys.executable, "-c", OUTLIVES], check=True)  # also what has left the process group is known by its mark
    (left,) = marked("one")
    assert marked("another") == []
    monkeypatch.setattr(killing, "LINGER", 0.2)
    soak = KilledSoak(tmp_path, 1, 0, 4, "")
    soak.wait_for_the_rest("another")
    assert (soak.tally.left_over, left.is_running()) == (0, True)
    soak.wait_for_the_rest("one")
    assert (soak.tally.left_over, marked("one")) == (1, [])


def test_keys_that_are_finished_twice(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    first = [store.publish([Finished(key, "align", reason="no face")])[0] for key in ("a" * 64, "b" * 64, "c" * 64)]
    assert keys_twice(store) == 0
    store.void(first[0])
    store.publish([Finished(artifact.key, "align", reason="no face") for artifact in first[:2]])
    assert keys_twice(store) == 1  # b: the first entry of a was cancelled


def test_a_soak_goes_on_with_its_own_options_only(tmp_path: Path) -> None:
    soak = KilledSoak(tmp_path, 50, 0, 12, "")
    soak.tally.kills = 7
    soak.save()
    assert KilledSoak(tmp_path, 60, 0, 12, "").tally.kills == 7
    with pytest.raises(RuntimeError, match=r"soak\.json is of a soak with .*'pairs': 12.* not .*'pairs': 4.*; give another --work"):
        KilledSoak(tmp_path, 50, 0, 4, "")
