"""`e4s swap`: one pair, without a server."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from flows.commands.options import EXIT_CODES, add_pipeline, pipeline_request
from storage.run import RunFolder, check_writable
from tasks.graph import UsageError

if TYPE_CHECKING:
    from flows.commands.options import Commands


def add(commands: Commands) -> None:
    swap = commands.add_parser("swap", help="swap one face: SOURCE's face into TARGET's picture", epilog=EXIT_CODES)
    swap.add_argument("source", help="picture of the person whose face is wanted")
    swap.add_argument("target", help="picture whose pose, expression, light, hair and background are kept")
    swap.add_argument("-o", "--output", required=True, help="the result: a .png, .jpg or .webp file")
    swap.add_argument("--run", default="", help="keep the intermediates in this run folder (default: a temporary one)")
    add_pipeline(swap)
    swap.set_defaults(command=_swap, chunk=1, workers=0, fail_fast=False, verify=False, retry=[], max_attempts=3, dask="", dask_wait=0.0)


def _swap(arguments: argparse.Namespace) -> int:
    from flows.engine import execute
    from flows.pictures import require_picture
    from flows.plan import make_plan
    from flows.progress import terminal_progress
    from storage.store import write_atomic
    from tasks.properties import convert_result

    output = Path(arguments.output)
    suffix = output.suffix.lower()
    if suffix not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UsageError(f"{output}: the result is a .png, .jpg or .webp file; name it so")
    if output.is_dir() or not output.parent.is_dir():
        raise UsageError(f"{output}: not a file name in an existing folder")
    check_writable(output.parent, "-o")
    for path in (arguments.source, arguments.target):
        require_picture(path)
    with tempfile.TemporaryDirectory(prefix="e4s-") as temporary:
        run = Path(arguments.run or temporary)
        manifest = run / "pair.csv"
        if run.is_dir() and any(run.iterdir()) and not manifest.exists():
            raise UsageError(f"{run}: a folder with other things in it; choose another --run for this swap")
        RunFolder(run).create()
        write_atomic(manifest, _one_pair(Path(arguments.source), Path(arguments.target)))
        request = pipeline_request(arguments, str(manifest), str(run), arguments.keep if arguments.run else "final")
        plan = make_plan(request, temporary=not arguments.run)
        try:
            if plan.todo:
                execute(plan, terminal_progress())
            row = next(iter(plan.rows.values()))
            if row.status == "done":
                data = (run / row.output).read_bytes()
                lost: list[str] = []
                if suffix != ".png":
                    data, lost = convert_result(data, suffix)
                write_atomic(output, data)
                for sentence in lost:
                    print(f"e4s: {sentence}", file=sys.stderr)
                print(f"{output}")
                return 0
            if row.status == "failed":
                print(f"e4s: {row.stage}: {row.reason}", file=sys.stderr)
                return 2
            return 1
        finally:
            plan.close()


def _one_pair(source: Path, target: Path) -> bytes:
    import csv
    import io

    text = io.StringIO()
    csv.writer(text).writerows([("id", "source", "target"), ("swap", source.absolute(), target.absolute())])
    return text.getvalue().encode(errors="surrogateescape")
