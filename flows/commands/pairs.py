"""`e4s pairs`: every pair of a manifest."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from flows.commands.options import EXIT_CODES, add_dask, add_pipeline, pipeline_request

if TYPE_CHECKING:
    from flows.commands.options import Commands


def add(commands: Commands) -> None:
    pairs = commands.add_parser("pairs", help="swap every pair of a manifest; the same command continues", epilog=EXIT_CODES)
    pairs.add_argument(
        "manifest", help="pairs.csv or pairs.parquet with columns source and target, a folder holding one, or SOURCES:TARGETS"
    )
    pairs.add_argument("--run", required=True, help="run folder: outputs, manifest, report, intermediates")
    pairs.add_argument("--no-report", action="store_true", help="do not write report/index.html at the end")
    pairs.add_argument("--metrics", action="store_true", help="measure the results at the end, as `e4s report` does")
    add_pipeline(pairs)
    pairs.add_argument("--chunk", type=int, default=16, help="pairs per chunk, 16 if not given: what is in memory at once")
    pairs.add_argument("--workers", type=int, default=0, help="pairs that a stage works on at once where it can (default: one per core)")
    add_dask(pairs, "chunks")
    pairs.add_argument("--fail-fast", action="store_true", help="stop after the first chunk in which a pair failed")
    pairs.add_argument("--verify", action="store_true", help="check the digest of everything finished before going on")
    pairs.add_argument(
        "--retry",
        action="append",
        default=[],
        choices=("failed", "quarantined"),
        help="failed: try pairs again whose failure is remembered; quarantined: those that failed too often (may be given twice)",
    )
    pairs.add_argument("--max-attempts", type=int, default=3, help="failed attempts after which a pair is quarantined (default 3)")
    pairs.add_argument("--why", action="store_true", help="say what would be computed and why, and stop")
    pairs.set_defaults(command=_pairs, continues=True)


def _pairs(arguments: argparse.Namespace) -> int:
    from flows.engine import check_weights
    from flows.plan import make_plan, record
    from flows.progress import opening, terminal_progress
    from flows.server import prefect_api
    from flows.status import tries
    from flows.why import headline, print_why

    request = pipeline_request(arguments, arguments.manifest, arguments.run, arguments.keep)
    if arguments.why:
        return print_why(make_plan(request, dry=True))
    plan = make_plan(request)
    try:
        if sentence := headline(plan):
            print(f"e4s: {sentence}", file=sys.stderr)
        if plan.todo:
            check_weights(plan)
            with prefect_api(plan.folder.path / "prefect.log"):
                from flows.pairs import run_planned

                code = run_planned(plan, terminal_progress()).exit_code
        else:
            print(opening(plan), file=sys.stderr)
            record(plan)
            code = 2 if any(row.status == "failed" for row in plan.rows.values()) else 0
        for row in plan.rows.values():
            if row.status == "failed":
                print(f"e4s: pair {row.id} failed: {row.stage}: {row.reason}{tries(row)}", file=sys.stderr)
        page = plan.folder.path / "report/index.html"
        if arguments.metrics and any(row.status == "done" for row in plan.rows.values()):
            from flows.progress import counted
            from flows.report import evaluate_and_report

            with counted("pairs measured") as progress:
                evaluate_and_report(plan.folder, device=arguments.device, progress=progress)
        elif not arguments.no_report and (plan.rows != plan.before or not page.exists()):
            from flows.report import write_report

            if as_of := write_report(plan.folder).as_of:
                print(f"e4s: {page}: {as_of}", file=sys.stderr)
        print(f"outputs: {plan.folder.outputs}" + (f", report: {page}" if arguments.metrics or not arguments.no_report else ""))
        return code
    finally:
        plan.close()
