"""`e4s videos`: every video of a manifest."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from flows.commands.options import EXIT_CODES, add_dask, add_settings

if TYPE_CHECKING:
    from flows.commands.options import Commands


def add(commands: Commands) -> None:
    videos = commands.add_parser("videos", help="swap a face into every video of a manifest; the same command continues", epilog=EXIT_CODES)
    videos.add_argument("manifest", help="videos.csv or videos.parquet with columns source and video, maybe id, source_face and face")
    videos.add_argument("--run", required=True, help="run folder: outputs, manifest, frames, intermediates")
    add_settings(videos)
    videos.add_argument(
        "--face",
        default="largest",
        metavar="WHO",
        help="who is swapped where the manifest does not say: largest, a number (0 fills most of the video), or a picture of the person",
    )
    videos.add_argument("--source-face", type=int, default=0, help="which face of the source picture, 0 = largest")
    videos.add_argument("--codec", default="", help="libx264 (default), libx265, libsvtav1, libvpx-vp9, ffv1: output.codec")
    videos.add_argument("--quality", type=int, help="constant rate factor, 18 if not given, 0 is best: output.quality")
    videos.add_argument("--pixel-format", default="", help="yuv420p (default), or same as the input: output.pixel_format")
    videos.add_argument("--container", default="", help="mp4, mkv, or auto (default): output.container")
    videos.add_argument(
        "--keep",
        choices=("all", "final"),
        default="final",
        help="final (default): what lets the run go on; all: every stage's pictures of every frame, too",
    )
    videos.add_argument("--store", default="", help="artifact store, a folder or URL (default: RUN/store); share one between runs")
    videos.add_argument("--threads", type=int, default=0, help="threads of the computing libraries; bytes are promised for one count")
    videos.add_argument("--chunk", type=int, default=16, help="frames that go through the stages together: what is in memory at once")
    videos.add_argument("--workers", type=int, default=0, help="frames that a stage works on at once where it can (default: one per core)")
    add_dask(videos, "stretches and groups of frames")
    videos.add_argument("--fail-fast", action="store_true", help="stop after the first video that failed")
    videos.add_argument("--verify", action="store_true", help="check the digest of finished outputs")
    videos.add_argument("--retry", action="append", default=[], choices=("failed", "quarantined"), help="as for pairs")
    videos.add_argument("--max-attempts", type=int, default=3, help="failed attempts after which a video is quarantined (default 3)")
    videos.add_argument("--why", action="store_true", help="say what would be computed and why, and stop")
    videos.set_defaults(command=_videos, continues=True)


def _videos(arguments: argparse.Namespace) -> int:
    from flows.progress import counted, plural
    from flows.server import prefect_api
    from flows.status import tries
    from flows.video_plan import VideoRequest, make_video_plan
    from flows.video_why import print_video_why, video_headline

    output = {name: getattr(arguments, name) for name in ("codec", "quality", "pixel_format", "container")}
    changes = [*arguments.set, *(f"output.{name}={value}" for name, value in output.items() if value not in ("", None))]
    names = ("manifest", "run", "profile", "device", "keep", "store", "chunk", "workers", "source_face", "face", "max_pixels")
    more = ("fail_fast", "verify", "retry", "max_attempts", "dask", "dask_wait", "threads")
    given = {name: getattr(arguments, name) for name in (*names, *more)}
    request = VideoRequest(**given, stages=arguments.stage, changes=changes)
    if arguments.why:
        return print_video_why(make_video_plan(request, dry=True))
    plan = make_video_plan(request)
    try:
        if sentence := video_headline(plan):
            print(f"e4s: {sentence}", file=sys.stderr)
        failed = sum(row.status == "failed" for row in plan.rows.values())
        text = f"{plural(len(plan.rows), 'video')}: {plan.done_before} done before, {len(plan.todo)} to do"
        print(text + (f", {failed} cannot be done" if failed else ""), file=sys.stderr)
        if plan.todo:
            with prefect_api(plan.folder.path / "prefect.log"), counted("frames") as progress:
                from flows.videos import run_planned

                code = run_planned(plan, progress).exit_code
        else:
            plan.record()
            code = 2 if failed else 0
        for row in plan.rows.values():
            if row.status == "failed":
                print(f"e4s: video {row.id} failed: {row.stage}: {row.reason}{tries(row)}", file=sys.stderr)
            elif row.status == "done":
                shown = f"{plural(row.frames, 'frame')}: {row.swapped} swapped, {row.passed} without the face, {row.failed} failed"
                print(f"{plan.folder.path / row.output}: {shown}" + (f"; {row.note}" if row.note else ""))
        return code
    finally:
        plan.close()
