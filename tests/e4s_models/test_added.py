"""Adding published checkpoints: read safely, converted once, verified ever after."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from e4s_models.added import add, convert, folder, load_added, record, verify_added
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


@pytest.mark.parametrize(
    "content", ["pickle", "legacy pickle", "list", "text", "empty", "truncated", "truncated legacy", "numbers", "sparse"]
)
def test_what_is_no_plain_checkpoint_is_refused(checkpoints: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoints / FILE
    state = torch.load(path, weights_only=True)
    if content.startswith("truncated"):
        stream = io.BytesIO()
        torch.save(state, stream, _use_new_zipfile_serialization=content == "truncated")
        path.write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    elif content in ("text", "empty"):
        path.write_text("no checkpoint" if content == "text" else "")
    else:
        odd = {"numbers": {**state, "epoch": 3}, "sparse": {**state, "module.extra": torch.eye(2).to_sparse()}, "list": [torch.zeros(1)]}
        torch.save(odd.get(content, {"a": Evil()}), path, _use_new_zipfile_serialization=content != "legacy pickle")
    with pytest.raises(WeightsError, match=r"79999_iter\.pth") as error:
        add(checkpoints, ["bisenet"])
    assert len(str(error.value).splitlines()) == 1
    assert "executed" not in capsys.readouterr().out
    assert record("bisenet") is None


def test_the_older_file_format_is_read_too(checkpoints: Path) -> None:
    torch.save(torch.load(checkpoints / FILE, weights_only=True), checkpoints / FILE, _use_new_zipfile_serialization=False)
    assert add(checkpoints, ["bisenet"]) == {"bisenet": "added"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_become_float32_and_the_source_is_said(checkpoints: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.load(checkpoints / FILE, weights_only=True)
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    torch.save(state, checkpoints / FILE)
    assert main(["models", "add", "--from", str(checkpoints), "bisenet"]) == 0
    name = str(dtype).removeprefix("torch.")
    assert f"bisenet: added ({name} in the file, float32 here)" in capsys.readouterr().out
    known = record("bisenet")
    assert known is not None
    assert known.dtype == name
    ours = load_added("bisenet").state_dict()["conv_out.conv_out.weight"]
    assert ours.dtype == torch.float32
    assert torch.equal(ours, state["module.conv_out.conv_out.weight"].float())


def test_numbers_that_are_not_finite_are_refused(checkpoints: Path) -> None:
    state = torch.load(checkpoints / FILE, weights_only=True)
    state["module.conv_out.conv_out.weight"][0, 0] = float("nan")
    torch.save(state, checkpoints / FILE)
    with pytest.raises(WeightsError, match=r"not finite in conv_out\.conv_out\.weight"):
        add(checkpoints, ["bisenet"])
    assert record("bisenet") is None
    assert not list(folder().glob("*"))


def test_parts_and_their_prefixes(tmp_path: Path) -> None:
    """CodeFormer's file has its weights under `params_ema`, face-vid2vid's in three parts; each may carry `module.`."""
    from e4s_models.added import published_state
    from e4s_models.published import published

    path = tmp_path / "file.pth"
    for name, parts in (("codeformer", ["params_ema"]), ("facevid2vid", ["generator", "kp_detector", "he_estimator"])):
        torch.save({part: {"module.a": torch.ones(1)} for part in parts} | {"epoch": 3}, path)
        keys = {"module.a"} if len(parts) == 1 else {f"{part}.a" for part in parts}
        assert published_state(published(name), path).keys() == keys
        torch.save({parts[0]: 3}, path)
        with pytest.raises(WeightsError, match=f"has no state dict {parts[0]}"):
            published_state(published(name), path)


def test_one_file_is_converted_without_being_added(checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors import safe_open

    source, output = checkpoints / FILE, tmp_path / "parser.safetensors"
    assert main(["models", "convert", str(source), "--as", "bisenet", "-o", str(output)]) == 0
    assert f"{output}: sha256 " in capsys.readouterr().out
    assert record("bisenet") is None
    first = output.read_bytes()
    (tmp_path / "plain").touch()
    assert output.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert convert(source, "bisenet", output)
    assert output.read_bytes() == first
    add(checkpoints, ["bisenet"])
    known = record("bisenet")
    assert known is not None
    assert (folder() / "bisenet.safetensors").read_bytes() == first
    with safe_open(output, "pt") as stored:
        origin = json.loads(stored.metadata()["e4s"])
    assert origin == {"name": "bisenet", "source": "79999_iter.pth", "source_sha256": known.source_sha256, "source_dtype": "float32"}
    for wrong, message in (
        ([str(source), "--as", "nothing", "-o", str(output)], "unknown network 'nothing'"),
        ([str(source), "--as", "bisenet", "-o", str(tmp_path / "parser.pth")], "name it so"),
        ([str(source), "--as", "bisenet", "-o", str(tmp_path / "nowhere" / "a.safetensors")], "existing folder"),
        ([str(tmp_path / "nowhere.pth"), "--as", "bisenet", "-o", str(output)], "no such file"),
        ([str(source), "--as", "hopenet", "-o", str(output)], "is it the file of another network?"),
    ):
        assert main(["models", "convert", *wrong]) == 1
        assert message in capsys.readouterr().err


def test_one_bad_file_does_not_stop_the_others(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = checkpoints / "pose/hopenet_robust_alpha1.pkl"
    bad.parent.mkdir()
    bad.write_text("no checkpoint")
    assert main(["models", "add", "--from", str(checkpoints), "hopenet", "bisenet"]) == 2
    captured = capsys.readouterr()
    assert "bisenet: added" in captured.out
    assert "hopenet_robust_alpha1.pkl cannot be read" in captured.err
    assert "not added: hopenet" in captured.err


def test_a_damaged_record_is_reported(checkpoints: Path) -> None:
    add(checkpoints, ["bisenet"])
    (folder() / "bisenet.json").write_text("{")
    assert verify_added()["bisenet"] == "damaged"
    with pytest.raises(WeightsError, match=r"bisenet\.json is damaged"):
        load_added("bisenet")


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
