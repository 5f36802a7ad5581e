"""What the commands share: the parser, groups of options, and the request that the options of a pipeline make."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from storage.spelling import near_miss, nearest

if TYPE_CHECKING:
    from flows.plan import Request
    from tasks.runner import Keep

    Commands = argparse._SubParsersAction["Parser"]

EXIT_INTERRUPTED = 130
EXIT_CODES = "exit codes: 0 all done, 1 usage or program error, 2 some items failed (listed), 130 interrupted"


class HelpFormatter(argparse.HelpFormatter):
    """Names the default of every option that has one and does not name it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        shown = action.option_strings and action.nargs != 0 and action.default not in (None, "", [], argparse.SUPPRESS)
        return f"{text} (default %(default)s)" if text and shown and "default" not in text else text


class Parser(argparse.ArgumentParser):
    """One sentence and exit code 1 for arguments that are wrong. An option is written out: a beginning of it is refused."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, "formatter_class": HelpFormatter, **options})

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(action, f"invalid choice {value!r}{near_miss(str(value), choices)}; choose {', '.join(choices)}")

    def error(self, message: str) -> NoReturn:
        print(f"e4s: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(1)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """What this parser does not know is its own error, so that the sentence names the command and the option that may be meant."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            alike = nearest(unknown[0].partition("=")[0], options)
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {alike}?" if alike else ""))
        return parsed, unknown


class Choose(argparse.Action):
    """Collects `name=value` texts and refuses two values of one name. `const`: the name that the option stands for."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        text = f"{self.const}={value}" if self.const else value
        earlier: list[str] = getattr(namespace, self.dest)
        name = text.partition("=")[0]
        for other in earlier:
            if other != text and other.partition("=")[0] == name:
                parser.error(f"{other} and {text} contradict each other; leave one out")
        setattr(namespace, self.dest, [*earlier, text])


def add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        default="mobile",
        help="mobile (default, 1024 px, swap=fused), fast (256 px, swap=composite, for tests), codes (1024 px, swap=codes with 20 steps), "
        "paper (the authors' checkpoints), or a .toml file",
    )
    parser.add_argument(
        "--stage", action=Choose, default=[], metavar="STAGE=BACKEND", help="another backend, such as swap=composite; may be repeated"
    )
    parser.add_argument(
        "--set", action=Choose, default=[], metavar="STAGE.SETTING=VALUE", help="a setting, such as blend.levels=6; may be repeated"
    )
    parser.add_argument(
        "--refine",
        action=Choose,
        dest="set",
        const="encode_driven.steps",
        default=[],
        type=int,
        metavar="STEPS",
        help="steps of optimization after the encoder, of the source's codes (default 0, with --profile codes 20): "
        "--set encode_driven.steps=STEPS",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; cuda without a GPU is an error")
    parser.add_argument("--max-pixels", type=int, default=120_000_000, help="pictures with more pixels are refused, width x height px")


def add_pipeline(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument(
        "--keep",
        choices=("all", "resume", "final"),
        default="all",
        help="intermediates that are stored: all (default); resume: per-image work, codes of driven faces and results; final: results only",
    )
    parser.add_argument("--store", default="", help="artifact store, a folder or URL (default: RUN/store); share one between runs")
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="threads of the computing libraries per process; bytes are promised for one count "
        "(default: the cores; with --dask local:N the cores divided by N; with --dask tcp://... 1)",
    )
    parser.add_argument("--face", type=int, default=0, help="which face of the target picture, 0 = largest")
    parser.add_argument("--source-face", type=int, default=0, help="which face of the source picture, 0 = largest")


def add_dask(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--dask",
        default="",
        metavar="WHERE",
        help=f"carry {what} on Dask workers: tcp://HOST:PORT of a running scheduler (docs/cluster.md), or local:N for N processes here",
    )
    parser.add_argument(
        "--dask-wait", type=float, default=60.0, metavar="SECONDS", help="how long to wait for the scheduler and for a worker (default 60)"
    )


def add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--protocol", action="append", default=[], metavar="NAME", help="open (default) or paper (docs/evaluation.md); may be repeated"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda: where the networks that measure run")


def pipeline_request(arguments: argparse.Namespace, manifest: str, run: str, keep: Keep) -> Request:
    from flows.plan import Request

    return Request(
        manifest=manifest,
        run=run,
        profile=arguments.profile,
        stages=arguments.stage,
        changes=arguments.set,
        device=arguments.device,
        keep=keep,
        store=arguments.store,
        chunk=arguments.chunk,
        workers=arguments.workers,
        source_face=arguments.source_face,
        target_face=arguments.face,
        max_pixels=arguments.max_pixels,
        fail_fast=arguments.fail_fast,
        verify=arguments.verify,
        retry=arguments.retry,
        max_attempts=arguments.max_attempts,
        dask=arguments.dask,
        dask_wait=arguments.dask_wait,
        threads=arguments.threads,
    )
