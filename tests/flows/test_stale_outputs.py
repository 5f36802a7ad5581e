"""What becomes of outputs that no row stands for any more: nothing that exists only there is removed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flows.plan import Request, make_plan
from flows.stale import remove_stale
from storage.run import Row, RunFolder
from storage.store import Finished, Store

Text = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def made(folder: RunFolder, name: str = "a") -> tuple[Store, Row, Path]:
    """A store with the result of one pair, its row, and its output."""
    store = Store(str(folder.path / "store"))
    picture = np.random.default_rng(list(name.encode())).integers(0, 255, (16, 16, 3), np.uint8)
    (artifact,) = store.publish([Finished(f"key of {name}", "paste", {"result": ("image", picture)})])
    payload = artifact.payloads["result"]
    row = Row(id=name, source="s.png", target="t.png", status="done", key=artifact.key)
    row.output, row.output_sha256, row.output_size = f"outputs/{name}.png", payload.sha256, payload.size
    output = folder.path / row.output
    output.write_bytes(store.read_bytes(artifact, "result"))
    return store, row, folder.path / "store" / payload.file


def kept(folder: RunFolder) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder.path / "replaced").glob("*"))]


def test_an_output_whose_payload_is_whole_is_removed(folder: RunFolder) -> None:
    store, row, _ = made(folder)
    remove_stale(folder, [row], {}, store)
    assert not (folder.path / row.output).exists()
    assert kept(folder) == []


def test_an_output_whose_payload_is_damaged_is_moved(folder: RunFolder, capsys: Text) -> None:
    store, row, payload = made(folder)
    whole = payload.read_bytes()
    payload.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    remove_stale(folder, [row], {}, store)
    assert kept(folder) == [whole]
    assert store.lookup([row.key]) == {}  # computed again when it is needed
    assert "1 moved to" in capsys.readouterr().err


def test_an_output_whose_payload_is_gone_is_moved(folder: RunFolder) -> None:
    store, row, payload = made(folder)
    whole = payload.read_bytes()
    payload.unlink()
    remove_stale(folder, [row], {}, store)
    assert kept(folder) == [whole]


@pytest.mark.parametrize("to_be_made_again", [True, False])
def test_an_output_that_was_edited_is_moved(folder: RunFolder, to_be_made_again: bool) -> None:
    store, row, _ = made(folder)
    (folder.path / row.output).write_bytes(b"painted over by hand")
    again = Row(id=row.id, source=row.source, target=row.target, key=row.key)
    remove_stale(folder, [row], {row.id: again} if to_be_made_again else {}, store)
    assert not (folder.path / row.output).exists()
    assert kept(folder) == [b"painted over by hand"]


def test_nothing_that_was_moved_before_is_replaced(folder: RunFolder) -> None:
    store, row, payload = made(folder)
    payload.unlink()
    for content in (b"one", b"two", b"one"):
        (folder.path / row.output).write_bytes(content)
        remove_stale(folder, [row], {}, store)
    assert sorted(kept(folder)) == [b"one", b"two"]


def test_what_planning_takes_from_the_store_replaces_no_other_output(people: list[Path], tmp_path: Path) -> None:
    from flows.engine import execute
    from flows.progress import Lines

    manifest = tmp_path / "pairs.csv"
    manifest.write_text(f"id,source,target\na,{people[0]},{people[1]}\n")
    run = RunFolder(tmp_path / "run")

    def go(store: str, *changes: str) -> bytes:
        plan = make_plan(Request(manifest=str(manifest), run=str(run.path), profile="fast", device="cpu", store=store, changes=changes))
        execute(plan, Lines())
        plan.close()
        return (run.path / "outputs/a.png").read_bytes()

    first = go("")
    assert go(str(tmp_path / "shared"), "paste.feather=0.1") != first
    for entry in (run.path / "store/payload").rglob("*.png"):  # as if the run's own store was lost
        entry.unlink()
    second = (run.path / "outputs/a.png").read_bytes()
    assert go(str(tmp_path / "shared"), "paste.feather=0.1") == second
    (run.path / "outputs/a.png").write_bytes(b"painted over by hand")
    assert go(str(tmp_path / "shared"), "paste.feather=0.1") == second
    assert b"painted over by hand" in kept(run)
