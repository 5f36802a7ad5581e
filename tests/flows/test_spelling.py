"""The command line forgives and warns: near misses are offered, sizes want a unit, a wrong path has one exit code."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e4s_models.weights import WEIGHTS
from flows.cache import parse_size
from flows.cli import _parser, main
from flows.evaluate import _protocol
from flows.models import verify_weights
from flows.plan import BaseRequest, pick_device
from flows.profiles import make_settings
from flows.video_plan import VideoRequest
from storage.run import RunError, RunFolder
from storage.spelling import near_miss, near_path
from tasks.graph import UsageError, backends, make_config, pick_backend

Text = pytest.CaptureFixture[str]


def test_the_nearest_word_is_offered_and_nothing_far() -> None:
    assert near_miss("Swpa", ("swap", "blend")) == " (did you mean swap?)"
    assert near_miss("ID", ("id", "source")) == " (did you mean id?)"
    assert near_miss("zzz", ("swap", "blend")) == near_miss("x", ()) == ""


def test_the_nearest_path_is_offered_as_it_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/k").mkdir(parents=True)
    Path("runs/k/run.json").touch()
    assert near_path("runs/kk") == " (did you mean runs/k?)"
    assert near_path("rums/k/run.json") == " (did you mean runs/k/run.json?)"
    assert near_path("rums/nothing.like.it") == " (did you mean runs?)"
    assert near_path("runs/completely-different") == near_path("/nowhere/at/all") == ""


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: backends("swop"), "unknown stage 'swop' (did you mean swap?)"),
        (lambda: pick_backend("swap", "fusd"), "no backend 'fusd' (did you mean fused?)"),
        (lambda: make_config(pick_backend("blend", None), {"level": 3}), "no setting 'level' (did you mean levels?)"),
        (lambda: make_settings("mobil"), "unknown profile 'mobil' (did you mean mobile?)"),
        (lambda: _protocol("opne"), "unknown protocol 'opne' (did you mean open?)"),
        (lambda: pick_device("cdua"), "--device 'cdua' (did you mean cuda?)"),
        (lambda: BaseRequest(manifest="m", run="r", retry=("fail",)), "--retry 'fail' (did you mean failed?)"),  # type: ignore[arg-type]
        (lambda: VideoRequest(manifest="m", run="r", keep="finale"), "--keep 'finale' (did you mean final?)"),  # type: ignore[arg-type]
        (lambda: verify_weights(["cosfase"]), "unknown network 'cosfase' (did you mean cosface?)"),
        (lambda: verify_weights([f"{next(iter(WEIGHTS))}x"]), f"(did you mean {next(iter(WEIGHTS))}?)"),
        (lambda: parse_size("50"), "--max-size '50': give a number with a unit"),
        (lambda: parse_size("50 GO"), "(B, KB, MB, GB, TB, KiB, MiB, GiB or TiB)"),
    ],
)
def test_every_refused_word_is_offered_its_neighbour(ask: object, said: str) -> None:
    with pytest.raises(UsageError) as error:
        ask()  # type: ignore[operator]
    assert said in str(error.value)


def test_a_misspelt_run_folder_is_offered(tmp_path: Path) -> None:
    (tmp_path / "runs/k").mkdir(parents=True)
    with pytest.raises(RunError, match=r"not a run folder .*did you mean .*runs/k"):
        RunFolder(tmp_path / "runs/kk").read_settings()


@pytest.mark.parametrize(
    "command",
    [
        ["pairs", "{}/pair.csv", "--run", "{}/run"],
        ["pairs", "{}/S:{}/T", "--run", "{}/run"],
        ["videos", "{}/pair.csv", "--run", "{}/run"],
        ["swap", "{}/a.jpg", "{}/pairs.csv", "-o", "{}/out.png"],
        ["swap", "{}/pairs.csv", "{}/a.jpg", "-o", "{}/out.png"],
        ["invert", "{}/a.jpg", "-o", "{}/look"],
        ["status", "{}/rum"],
        ["status", "{}/rum", "--follow"],
        ["status", "{}/rum", "--failed"],
        ["status", "{}/rum", "--why"],
        ["report", "{}/rum"],
        ["stage", "{}/rum", "swap", "a", "-o", "{}/look"],
        ["cache", "list", "{}/rum"],
        ["models", "pull", "--from", "{}/weihgts"],
        ["models", "add", "--from", "{}/weihgts"],
        ["models", "convert", "{}/a.pt", "--as", "rgi", "-o", "{}/a.safetensors"],
        ["models", "check-reference", "{}/refs"],
        ["manifest", "celebamask-hq", "{}/celeba", "--out", "{}/p.parquet"],
    ],
)
def test_a_path_that_is_not_there_has_one_exit_code(command: list[str], tmp_path: Path, capsys: Text) -> None:
    (tmp_path / "pairs.csv").touch()
    assert main([word.replace("{}", str(tmp_path)) for word in command]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert len(printed.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.csv"], "nothing was begun"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pairs", "a.csv", "--run", "r", "--refin", "3"], "unrecognized arguments: --refin 3; did you mean --refine?"),
        (["cache", "prune", "store", "--unus"], "unrecognized arguments: --unus; did you mean --unused?"),
        (["pair", "a.csv"], "invalid choice 'pair' (did you mean pairs?)"),
        (["cache", "lst", "store"], "invalid choice 'lst' (did you mean list?)"),
        (["pairs", "a.csv", "--run", "r", "--keep", "al"], "invalid choice 'al' (did you mean all?)"),
    ],
)
def test_options_are_written_out_and_offered(arguments: list[str], said: str, capsys: Text) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 1
    assert said in capsys.readouterr().err


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


@pytest.mark.parametrize("parser", parsers(_parser()), ids=lambda parser: parser.prog)
def test_help_shows_every_default_and_no_parser_guesses(parser: argparse.ArgumentParser) -> None:
    assert not parser.allow_abbrev
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.option_strings and action.nargs != 0 and action.default not in (None, "", [], argparse.SUPPRESS):
            text = formatter._expand_help(action)
            assert "default" in text, (parser.prog, action.option_strings, text)


def test_ctrl_c_while_following_says_that_the_run_goes_on(tmp_path: Path, capsys: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    run = RunFolder(tmp_path)
    run.create()
    run.write_settings({})
    run.append_log("begin", items=2, todo=2, done=0, failed=0)
    lock = run.lock()
    monkeypatch.setattr("flows.status.time.sleep", interrupt)
    assert main(["status", str(tmp_path), "--follow"]) == 130
    lock.close()
    assert capsys.readouterr().err == f"\ne4s: no longer followed; the run itself goes on, `e4s status {tmp_path}` shows it\n"


def test_a_name_that_is_not_utf8_on_the_command_line_is_one_sentence(tmp_path: Path) -> None:
    name = os.fsdecode(bytes(tmp_path) + b"/caf\xe9")
    Path(name).mkdir()
    for command in (["pairs", f"{name}/pairs.csv"], ["videos", f"{name}/videos.csv"]):
        command = [sys.executable, "-m", "flows.cli", *command, "--run", str(tmp_path / "run")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
        assert done.returncode == 1
        assert "caf\\xe9" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_the_shell_completes_commands_and_options(tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    for line, expected in (("e4s pai", ["pairs"]), ("e4s pairs --ref", ["--refine"])):
        answers = tmp_path / "answers"
        environment = {
            **os.environ,
            "_ARGCOMPLETE": "1",
            "_ARGCOMPLETE_STDOUT_FILENAME": str(answers),
            "_ARGCOMPLETE_IFS": "|",
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
        }
        subprocess.run([sys.executable, "-m", "flows.cli"], env=environment, check=True, cwd=Path(__file__).parents[2])
        assert [word.strip() for word in answers.read_text().split("|")] == expected
