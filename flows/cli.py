"""The `e4s` command: arguments in, one sentence per error, documented exit codes out (`flows/commands/options.py: EXIT_CODES`).

A command is a module of `flows.commands`.
"""

from __future__ import annotations

import argparse
import errno
import functools
import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from types import FrameType

from e4s_models.weights import WeightsError
from flows.commands import cache, doctor, invert, manifest, models, pairs, report, settings, stage, status, swap, synth, train, videos
from flows.commands.options import EXIT_CODES, EXIT_INTERRUPTED, Parser
from flows.tables import printable
from storage.run import RunError
from storage.store import StoreError
from tasks.graph import UsageError
from tasks.runner import DiskFull
from tasks.stage import ItemError

GRACE = 6.0  # s after SIGTERM for ending in order

COMMANDS = (swap, invert, pairs, videos, manifest, synth, status, report, stage, settings, models, train, cache, doctor)
"""In the order of `e4s --help`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:
        # a shell asks for completions (optional extra `completion`)
        import argcomplete

        argcomplete.autocomplete(parser)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # as stderr does: a path that is not UTF-8 can be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    parsed = parser.parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    signal.signal(signal.SIGTERM, _interrupt)
    _end_after_sigterm()
    try:
        return command(parsed)
    except (UsageError, RunError, StoreError, WeightsError, ItemError, DiskFull) as error:
        print(f"e4s: {error}", file=sys.stderr)
        return 1
    except UnicodeEncodeError as error:
        if error.reason != "surrogates not allowed":
            raise
        print(f"e4s: {printable(error.object)}: a name that is not UTF-8; rename it and repeat the command", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = "what is finished is kept, the same command continues" if getattr(parsed, "continues", False) else "repeat the command"
        print(f"\ne4s: interrupted; {kept}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 1
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # no file's fault
        remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "correct the path or its rights"
        print(f"e4s: {error.filename or 'the disk'}: {error.strerror}; {remedy}, then repeat the command", file=sys.stderr)
        return 1


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@functools.cache
def _end_after_sigterm() -> None:
    """End this process GRACE seconds after a SIGTERM at the latest, whatever it is at; what is finished is in the store.

    The Python handler runs only when the main thread is between two bytecodes: a long call of a library, or one that waits for a dead
    server in spite of interrupts, would hold it up. The system's handler writes the signal's number to a socket at once.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_wait_for_sigterm, args=(reader, writer), name="e4s-sigterm", daemon=True).start()


def _wait_for_sigterm(reader: socket.socket, writer: socket.socket) -> None:
    """`writer` is held open as long as this thread lives."""
    while signal.SIGTERM not in reader.recv(64):
        pass
    time.sleep(GRACE)
    print("e4s: ended, since it did not stop in time; what is finished is kept, the same command continues", file=sys.stderr, flush=True)
    os._exit(EXIT_INTERRUPTED)


def _parser() -> Parser:
    parser = Parser(
        prog="e4s", description="Fine-grained face swapping by regional GAN inversion, as a resumable batch pipeline.", epilog=EXIT_CODES
    )
    parser.add_argument("--version", action="version", version=f"e4s {version('e4s')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
