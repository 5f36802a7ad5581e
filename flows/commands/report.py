"""`e4s report`: measure a run, or compare two."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flows.commands.options import EXIT_CODES, add_measuring
from storage.run import RunFolder
from tasks.graph import UsageError

if TYPE_CHECKING:
    from flows.commands.options import Commands
    from storage.video_run import VideoRunFolder


def add(commands: Commands) -> None:
    report = commands.add_parser("report", help="measure a run and write report/index.html, or compare two runs", epilog=EXIT_CODES)
    report.add_argument("run", help="run folder")
    report.add_argument("other", nargs="?", default="", help="a second run: compare it with the first, write OTHER/report/compare-RUN.html")
    report.add_argument(
        "--no-metrics",
        action="store_true",
        help="measure nothing: contact sheet, times, failures, earlier numbers that hold",
    )
    report.add_argument("--limit", type=int, default=24, help="how many pairs to show on the contact sheet")
    add_measuring(report)
    report.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
    from evaluation.compare import summary
    from flows.progress import counted
    from flows.report import PAGE, evaluate_and_report, exit_code, told, write_comparison, write_report
    from storage.video_run import VideoRunFolder, open_run

    if arguments.limit < 0:
        raise UsageError(f"--limit must be at least 0, got {arguments.limit}")
    if isinstance(videos := open_run(arguments.run), VideoRunFolder):
        return _report_videos(arguments, videos)
    folder, protocols = RunFolder(arguments.run), arguments.protocol or ["open"]
    if arguments.other:
        if arguments.no_metrics:
            raise UsageError("--no-metrics: two runs are compared by their metrics; leave it out")
        with counted("pairs measured") as progress:
            compared = write_comparison(folder, RunFolder(arguments.other), protocols, arguments.device, progress)
        for line in (*summary(compared.comparison), f"comparison: {compared.page}", f"numbers: {compared.data}"):
            print(line)
        return 0
    if arguments.no_metrics or ((rows := folder.read_rows()) and all(row.status == "failed" for row in rows)):
        report = write_report(folder, None, arguments.limit)
        if not arguments.no_metrics:
            print("every pair failed: nothing was measured")
        print(f"report: {folder.path / PAGE}")
    else:
        with counted("pairs measured") as progress:
            report = evaluate_and_report(folder, protocols, arguments.device, arguments.limit, progress)
        for line in told(folder, report):
            print(line)
    return exit_code(folder, report)


def _report_videos(arguments: argparse.Namespace, folder: VideoRunFolder) -> int:
    from flows.progress import counted
    from flows.report import exit_code
    from flows.video_report import report_videos

    if arguments.other:
        raise UsageError(f"{arguments.run} is a run of videos: two of them cannot be compared; give one")
    with counted("videos measured") as progress:
        said = report_videos(folder, measure=not arguments.no_metrics, device=arguments.device, limit=arguments.limit, progress=progress)
    for line in said:
        print(line)
    return exit_code(folder)
