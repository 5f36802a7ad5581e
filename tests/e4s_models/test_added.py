"""Adding published checkpoints: read safely, converted once, verified ever after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from e4s_models.added import add, folder, load_added, record, verify_added
from e4s_models.published import fill
from e4s_models.weights import WeightsError, WeightsMissing
from flows.cli import main

DATA = Path(__file__).parents[1] / "data"
FILE = "faceseg/79999_iter.pth"


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E4S_HOME", str(tmp_path / "home"))


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A folder laid out like the authors', with filled weights."""
    path = tmp_path / "checkpoints" / FILE
    path.parent.mkdir(parents=True)
    state = fill(json.loads((DATA / "bisenet.json").read_text())["keys"], 3)
    torch.save({f"module.{key}": value for key, value in state.items()}, path)
    return tmp_path / "checkpoints"


def test_a_checkpoint_is_converted_once_and_loads_equal(checkpoints: Path) -> None:
    with pytest.raises(WeightsMissing, match=FILE):
        load_added("bisenet")
    assert add(checkpoints, ["bisenet"]) == {"bisenet": "added"}
    assert add(checkpoints, ["bisenet"]) == {"bisenet": "unchanged"}
    published = torch.load(checkpoints / FILE, weights_only=True)
    ours = load_added("bisenet").state_dict()
    assert ours.keys() == {key.removeprefix("module.") for key in published}
    assert all(torch.equal(ours[key.removeprefix("module.")], value) for key, value in published.items())
    assert verify_added()["bisenet"] == "ok"
    assert not list(folder().glob("*.tmp"))


def test_another_file_of_that_name_is_refused(checkpoints: Path) -> None:
    add(checkpoints, ["bisenet"])
    first = record("bisenet")
    state = torch.load(checkpoints / FILE, weights_only=True)
    state["module.conv_out.conv_out.weight"] += 1
    torch.save(state, checkpoints / FILE)
    with pytest.raises(WeightsError, match="not the file first imported"):
        add(checkpoints, ["bisenet"])
    assert record("bisenet") == first
    assert add(checkpoints, ["bisenet"], replace=True) == {"bisenet": "added"}
    assert record("bisenet") != first


def test_a_changed_conversion_is_noticed(checkpoints: Path) -> None:
    add(checkpoints, ["bisenet"])
    path = folder() / "bisenet.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert verify_added()["bisenet"] == "damaged"
    with pytest.raises(WeightsError, match="was changed since"):
        load_added("bisenet")
    assert add(checkpoints, ["bisenet"]) == {"bisenet": "added"}
    assert verify_added()["bisenet"] == "ok"


def test_keys_that_do_not_fit_are_all_listed(checkpoints: Path) -> None:
    state = torch.load(checkpoints / FILE, weights_only=True)
    del state["module.cp.resnet.conv1.weight"]
    state["module.extra"] = torch.zeros(1)
    state["module.conv_out.conv_out.weight"] = torch.zeros(2, 2)
    torch.save(state, checkpoints / FILE)
    with pytest.raises(WeightsError) as error:
        add(checkpoints, ["bisenet"])
    for key in ("cp.resnet.conv1.weight", "extra", "conv_out.conv_out.weight"):
        assert key in str(error.value)
    assert record("bisenet") is None


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


@pytest.mark.parametrize("content", ["pickle", "text", "list", "empty"])
def test_what_is_no_plain_checkpoint_is_refused(checkpoints: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoints / FILE
    if content in ("pickle", "list"):
        torch.save({"a": Evil()} if content == "pickle" else [torch.zeros(1)], path)
    else:
        path.write_text("no checkpoint" if content == "text" else "")
    with pytest.raises(WeightsError, match=r"79999_iter\.pth"):
        add(checkpoints, ["bisenet"])
    assert "executed" not in capsys.readouterr().out


def test_the_command(checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "add", "--from", str(checkpoints)]) == 0
    assert "bisenet: added" in capsys.readouterr().out
    main(["models", "verify"])
    assert "published bisenet: ok" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert main(["models", "add", "--from", str(tmp_path / "empty")]) == 2
    assert main(["models", "add", "--from", str(tmp_path / "nowhere")]) == 1
    assert main(["models", "add", "--from", str(checkpoints), "nothing"]) == 1
    assert "unknown network 'nothing'" in capsys.readouterr().err
