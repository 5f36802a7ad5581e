"""The `e4s` command: arguments in, one sentence per error, documented exit codes out.

Exit codes: 0 all done, 1 usage or program error, 2 some items failed (listed), 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from e4s_models.weights import WeightsError
from storage.run import RunError, RunFolder
from storage.store import StoreError
from tasks.graph import UsageError
from tasks.runner import DiskFull, Keep
from tasks.stage import ItemError

if TYPE_CHECKING:
    from flows.plan import Request
    from storage.video_run import VideoRunFolder

EXIT_CODES = "exit codes: 0 all done, 1 usage or program error, 2 some items failed (listed), 130 interrupted"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"e4s: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return command(parsed)
    except (UsageError, RunError, StoreError, WeightsError, ItemError, DiskFull) as error:
        print(f"e4s: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = "what is finished is kept, the same command continues" if getattr(parsed, "run", "") else "repeat the command"
        print(f"\ne4s: interrupted; {kept}", file=sys.stderr)
        return 130
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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="e4s", description="Fine-grained face swapping by regional GAN inversion, as a resumable batch pipeline.", epilog=EXIT_CODES
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    swap = commands.add_parser("swap", help="swap one face: SOURCE's face into TARGET's picture", epilog=EXIT_CODES)
    swap.add_argument("source", help="picture of the person whose face is wanted")
    swap.add_argument("target", help="picture whose pose, expression, light, hair and background are kept")
    swap.add_argument("-o", "--output", required=True, help="the result, a .png file")
    swap.add_argument("--run", default="", help="keep the intermediates in this run folder (default: a temporary one)")
    _add_pipeline(swap)
    swap.set_defaults(command=_swap, chunk=1, workers=0, fail_fast=False, verify=False, retry=[], max_attempts=3, dask="", dask_wait=0.0)

    invert = commands.add_parser("invert", help="a picture -> style codes -> the picture again, with metrics", epilog=EXIT_CODES)
    invert.add_argument("image", help="picture with a face")
    invert.add_argument(
        "-o", "--output", required=True, help="folder for face.png, reconstruction.png, side_by_side.png, codes.npz, metrics.json"
    )
    _add_settings(invert)
    invert.add_argument("--face", type=int, default=0, help="which face of the picture, 0 = largest")
    invert.set_defaults(command=_invert)

    pairs = commands.add_parser("pairs", help="swap every pair of a manifest; the same command continues", epilog=EXIT_CODES)
    pairs.add_argument(
        "manifest", help="pairs.csv or pairs.parquet with columns source and target, a folder holding one, or SOURCES:TARGETS"
    )
    pairs.add_argument("--run", required=True, help="run folder: outputs, manifest, report, intermediates")
    pairs.add_argument("--no-report", action="store_true", help="do not write report/index.html at the end")
    pairs.add_argument("--metrics", action="store_true", help="measure the results at the end, as `e4s report` does")
    _add_pipeline(pairs)
    pairs.add_argument("--chunk", type=int, default=16, help="pairs per chunk, 16 if not given: what is in memory at once")
    pairs.add_argument("--workers", type=int, default=0, help="pairs that a stage works on at once where it can (default: one per core)")
    _add_dask(pairs, "chunks")
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
    pairs.set_defaults(command=_pairs)

    videos = commands.add_parser("videos", help="swap a face into every video of a manifest; the same command continues", epilog=EXIT_CODES)
    videos.add_argument("manifest", help="videos.csv or videos.parquet with columns source and video, maybe id, source_face and face")
    videos.add_argument("--run", required=True, help="run folder: outputs, manifest, frames, intermediates")
    _add_settings(videos)
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
    videos.add_argument("--threads", type=int, default=0, help="as for pairs: of the computing libraries; bytes are promised for one count")
    videos.add_argument("--chunk", type=int, default=16, help="frames that go through the stages together: what is in memory at once")
    videos.add_argument("--workers", type=int, default=0, help="frames that a stage works on at once where it can (default: one per core)")
    _add_dask(videos, "stretches and groups of frames")
    videos.add_argument("--fail-fast", action="store_true", help="stop after the first video that failed")
    videos.add_argument("--verify", action="store_true", help="check the digest of finished outputs")
    videos.add_argument("--retry", action="append", default=[], choices=("failed", "quarantined"), help="as for pairs")
    videos.add_argument("--max-attempts", type=int, default=3, help="failed attempts after which a video is quarantined (default 3)")
    videos.set_defaults(command=_videos)

    manifest = commands.add_parser("manifest", help="write a manifest of pairs of a data set", epilog=EXIT_CODES)
    celebamask = manifest.add_subparsers(required=True, metavar="DATASET", parser_class=_Parser).add_parser(
        "celebamask-hq", help="pairs of test pictures of CelebAMask-HQ, drawn by a seed (docs/benchmark.md)", epilog=EXIT_CODES
    )
    celebamask.add_argument("folder", help="the data set as unpacked, with CelebA-HQ-img and CelebA-HQ-to-CelebA-mapping.txt")
    celebamask.add_argument("--out", required=True, help="the manifest, a .parquet file")
    celebamask.add_argument("--pairs", type=int, default=500, help="how many (default 500)")
    celebamask.add_argument("--seed", type=int, default=0, help="decides which pictures meet (default 0)")
    celebamask.set_defaults(command=_manifest_celebamask)

    synth = commands.add_parser("synth", help="make synthetic people to try it on", epilog=EXIT_CODES)
    synth.add_argument("--out", required=True, help="folder (people, pairs) or .mp4 file (--clip)")
    synth.add_argument("--count", type=int, help="how many people (default: as many as --pairs, at least 8)")
    synth.add_argument("--pairs", type=int, default=0, help="also write pairs.parquet with this many pairs of them")
    synth.add_argument("--clip", action="store_true", help="make a moving, sounding clip of one person instead")
    synth.add_argument("--seconds", type=float, default=3.0, help="length of the clip, s")
    synth.add_argument("--seed", type=int, default=0, help="first person's seed")
    synth.add_argument("--truncation", type=float, default=0.7, help="0 = the mean face, 1 = full variety")
    synth.set_defaults(command=_synth)

    status = commands.add_parser("status", help="how far a run is, what failed and why", epilog=EXIT_CODES)
    status.add_argument("run", help="run folder")
    status.add_argument("--failed", action="store_true", help="list failed pairs with every attempt: time, stage, reason")
    status.add_argument("--follow", action="store_true", help="show the run as it goes on, until it ends or Ctrl-C")
    status.add_argument(
        "--why",
        nargs="?",
        const="",
        metavar="MANIFEST",
        help="say what repeating the run's command would compute, per stage, and why; nothing is changed",
    )
    status.add_argument("--profile", default="", help="with --why: another profile than the run's")
    status.add_argument("--stage", action="append", default=[], metavar="STAGE=BACKEND", help="with --why: another backend")
    status.add_argument("--set", action="append", default=[], metavar="STAGE.SETTING=VALUE", help="with --why: another setting")
    status.add_argument("--verify", action="store_true", help="with --why: check the digest of everything finished")
    status.set_defaults(command=_status)

    report = commands.add_parser("report", help="measure a run and write report/index.html, or compare two runs", epilog=EXIT_CODES)
    report.add_argument("run", help="run folder")
    report.add_argument("other", nargs="?", default="", help="a second run: compare it with the first, write OTHER/report/compare-RUN.html")
    report.add_argument("--no-metrics", action="store_true", help="measure nothing: contact sheet, times and failures only")
    report.add_argument("--limit", type=int, default=24, help="how many pairs to show on the contact sheet")
    _add_measuring(report)
    report.set_defaults(command=_report)

    stage = commands.add_parser("stage", help="run one stage alone on one item's stored inputs", epilog=EXIT_CODES)
    stage.add_argument("run", help="run folder, made with --keep all")
    stage.add_argument("node", help="the stage (align, parse, swap, ...; parse_driven for the driven face)")
    stage.add_argument("item", help="id of the pair")
    stage.add_argument("-o", "--output", required=True, help="folder for what the stage writes")
    stage.add_argument("--role", choices=("source", "target"), default="target", help="whose picture, for per-image stages")
    stage.add_argument("--stage", action="append", default=[], metavar="STAGE=BACKEND", help="another backend")
    stage.add_argument("--set", action="append", default=[], metavar="STAGE.SETTING=VALUE", help="another setting")
    stage.set_defaults(command=_stage)

    models = commands.add_parser("models", help="weights: list, pull, verify, add, convert, check-reference", epilog=EXIT_CODES)
    actions = models.add_subparsers(required=True, metavar="ACTION", parser_class=_Parser)
    listing = actions.add_parser("list", help="what there is: size, licence, origin, where it is used", epilog=EXIT_CODES)
    listing.set_defaults(command=_models_list)
    pull = actions.add_parser("pull", help="download and verify", epilog=EXIT_CODES)
    pull.add_argument("names", nargs="*", help="names from `e4s models list` (default: those of the default profile)")
    pull.add_argument("--from", dest="folder", default="", help="take the files from this folder (for machines without network)")
    pull.set_defaults(command=_models_pull)
    verify = actions.add_parser("verify", help="check the digests of what is there, what was added too", epilog=EXIT_CODES)
    verify.add_argument("names", nargs="*", help="names from `e4s models list` (default: all, and everything added)")
    verify.set_defaults(command=_models_verify)

    add = actions.add_parser(
        "add",
        help="convert the authors' checkpoint files, or register your own evaluation network; verified ever after",
        epilog=EXIT_CODES,
    )
    add.add_argument("names", nargs="*", help="networks (default: all that the folder holds)")
    add.add_argument("--from", dest="folder", default="", help="the authors' checkpoint folder")
    add.add_argument("--network", default="", metavar="ROLE", help="what --file is: cosface, deep3d or inception")
    add.add_argument("--file", default="", help="its ONNX or TorchScript file")
    add.add_argument(
        "--convention",
        default="",
        metavar="FILE.toml",
        help="entries that differ from the published network's: height, width, colour, layout, mean, std, crop, dimensions, meaning, "
        "output (default: the .toml file beside --file, if there is one)",
    )
    add.add_argument("--replace", action="store_true", help="accept a file that differs from the one first imported")
    add.set_defaults(command=_models_add)
    convert = actions.add_parser("convert", help="convert one published file to safetensors without registering it", epilog=EXIT_CODES)
    convert.add_argument("file", help="the authors' checkpoint file")
    convert.add_argument("--as", dest="name", required=True, metavar="NAME", help="the network it holds, such as bisenet or rgi")
    convert.add_argument("-o", "--output", required=True, help="the result, a .safetensors file")
    convert.set_defaults(command=_models_convert)
    check = actions.add_parser(
        "check-reference", help="compare our networks with vectors of the published code; exit 1 if any differs", epilog=EXIT_CODES
    )
    check.add_argument("folder", help="folder with NAME.json and NAME_case0.npz")
    check.set_defaults(command=_models_check)

    train = commands.add_parser("train", help="train the project's own networks", epilog=EXIT_CODES)
    rgi = train.add_subparsers(required=True, metavar="NETWORK", parser_class=_Parser).add_parser(
        "rgi", help="the regional encoder, on synthetic people; the same command continues", epilog=EXIT_CODES
    )
    rgi.add_argument("--out", required=True, help="folder for data, checkpoints, curves, samples and the result")
    rgi.add_argument("--people", type=int, default=4096, help="synthetic people to learn from, two pictures each")
    rgi.add_argument("--head-steps", type=int, default=1500, help="steps for the 128 px head")
    rgi.add_argument("--teach-steps", type=int, default=4000, help="steps on known codes")
    rgi.add_argument("--objective-steps", type=int, default=1000, help="steps by the paper's objective, through the generator")
    rgi.add_argument("--teach-minutes", type=float, default=0.0, help="end that part by then (0: no limit)")
    rgi.add_argument("--objective-minutes", type=float, default=0.0, help="end that part by then (0: no limit)")
    rgi.add_argument("--seed", type=int, default=0, help="decides people, augmentation and order")
    rgi.add_argument("--device", default="auto", help="auto, cpu or cuda")
    rgi.set_defaults(command=_train_rgi)

    cache = commands.add_parser("cache", help="artifacts of a store: list, verify, prune, compact", epilog=EXIT_CODES)
    cache_actions = cache.add_subparsers(required=True, metavar="ACTION", parser_class=_Parser)
    for name, text in (
        ("list", "count and size by stage, and the runs that use it"),
        ("verify", "check every digest; what is damaged will be computed again"),
        ("compact", "merge the index into few large parts (happens by itself when many small ones have piled up)"),
        ("prune", "make room: show what would go, remove it with --yes; what a running run needs stays"),
    ):
        action = cache_actions.add_parser(name, help=text, epilog=EXIT_CODES)
        action.add_argument("store", help="store URL or folder, or a run folder")
        action.set_defaults(command=_cache, action=name)
    action.description = (
        "Artifacts go that meet every condition given; with none given, only what crashed writers left. "
        "What was pruned is computed again when needed."
    )
    action.add_argument("--older-than", default="", metavar="AGE", help="made longer ago than this: 30d, 12h, 2w")
    action.add_argument("--stage", action="append", default=[], help="of this stage (may be given again)")
    action.add_argument("--run", default="", metavar="RUN", help="used by this run folder and by no other run")
    action.add_argument("--with-shared", action="store_true", help="with --run: also what other runs use")
    action.add_argument("--failed", action="store_true", help="remembered failures only: their items will be tried again")
    action.add_argument("--max-size", default="", metavar="SIZE", help="what leaves at most this (50GB), the oldest first")
    action.add_argument("--yes", action="store_true", help="do it")

    doctor = commands.add_parser("doctor", help="what is installed, what is missing", epilog=EXIT_CODES)
    doctor.set_defaults(command=_doctor)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        default="mobile",
        help="mobile (default, 1024 px), fast (256 px, for tests), paper (the authors' checkpoints), or a .toml file",
    )
    parser.add_argument("--stage", action="append", default=[], metavar="STAGE=BACKEND", help="another backend, such as swap=composite")
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.SETTING=VALUE", help="a setting, such as blend.levels=6")
    parser.add_argument(
        "--refine",
        type=int,
        metavar="STEPS",
        help="steps of optimization after the encoder, of the source's codes (default 20): encode_driven.steps",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; cuda without a GPU is an error")
    parser.add_argument("--max-pixels", type=int, default=120_000_000, help="pictures with more pixels are refused")


def _add_dask(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--dask",
        default="",
        metavar="WHERE",
        help=f"carry {what} on Dask workers: tcp://HOST:PORT of a running scheduler (docs/cluster.md), or local:N for N processes here",
    )
    parser.add_argument(
        "--dask-wait", type=float, default=60.0, metavar="SECONDS", help="how long to wait for the scheduler and for a worker (default 60)"
    )


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--protocol", action="append", default=[], metavar="NAME", help="open (default) or paper (docs/evaluation.md); may be repeated"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda: where the networks that measure run")


def _changes(arguments: argparse.Namespace) -> list[str]:
    """`--set` and what stands for one."""
    refine: int | None = arguments.refine
    return [*arguments.set, *([] if refine is None else [f"encode_driven.steps={refine}"])]


def _add_pipeline(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser)
    parser.add_argument(
        "--keep",
        choices=("all", "resume", "final"),
        default="all",
        help="intermediates that are stored: all (default); resume: per-image work and results; final: results only",
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


def _swap(arguments: argparse.Namespace) -> int:
    from flows.engine import execute
    from flows.plan import make_plan
    from flows.progress import terminal_progress
    from storage.store import write_atomic

    output = Path(arguments.output)
    if output.suffix.lower() != ".png":
        raise UsageError(f"{output}: the result is a .png file; name it so")
    if output.is_dir() or not output.parent.is_dir():
        raise UsageError(f"{output}: not a file name in an existing folder")
    with tempfile.TemporaryDirectory(prefix="e4s-") as temporary:
        run = Path(arguments.run or temporary)
        manifest = run / "pair.csv"
        if run.is_dir() and any(run.iterdir()) and not manifest.exists():
            raise UsageError(f"{run}: a folder with other things in it; choose another --run for this swap")
        RunFolder(run).create()
        write_atomic(manifest, _one_pair(Path(arguments.source), Path(arguments.target)))
        request = _request(arguments, str(manifest), str(run), arguments.keep if arguments.run else "final")
        plan = make_plan(request)
        try:
            if plan.todo:
                execute(plan, terminal_progress())
            row = next(iter(plan.rows.values()))
            if row.status == "done":
                write_atomic(output, (run / row.output).read_bytes())
                print(f"{output}")
                return 0
            if row.status == "failed":
                print(f"e4s: {row.stage}: {row.reason}", file=sys.stderr)
                return 2
            return 1
        finally:
            plan.close()


def _invert(arguments: argparse.Namespace) -> int:
    from flows.invert import invert

    if Path(arguments.output).is_file():
        raise UsageError(f"{arguments.output}: a file; give a folder for what invert writes")
    try:
        metrics = invert(
            arguments.image,
            arguments.output,
            profile=arguments.profile,
            stages=arguments.stage,
            changes=_changes(arguments),
            device=arguments.device,
            face=arguments.face,
            max_pixels=arguments.max_pixels,
        )
    except ItemError as error:
        print(f"e4s: {error}", file=sys.stderr)
        return 2
    print(f"{Path(arguments.output) / 'side_by_side.png'}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    return 0


def _train_rgi(arguments: argparse.Namespace) -> int:
    from flows.plan import pick_device
    from flows.server import prefect_api

    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    with prefect_api(folder / "prefect.log"):
        from flows.train_rgi import train_rgi

        train_rgi(
            out=str(folder),
            people=arguments.people,
            head_steps=arguments.head_steps,
            teach_steps=arguments.teach_steps,
            objective_steps=arguments.objective_steps,
            teach_minutes=arguments.teach_minutes,
            objective_minutes=arguments.objective_minutes,
            seed=arguments.seed,
            device=pick_device(arguments.device),
        )
    print(f"{folder / 'code_encoder.safetensors'}, curves: {folder / 'curves.png'}, samples: {folder / 'samples'}")
    return 0


def _one_pair(source: Path, target: Path) -> bytes:
    import csv
    import io

    text = io.StringIO()
    csv.writer(text).writerows([("id", "source", "target"), ("swap", source.absolute(), target.absolute())])
    return text.getvalue().encode()


def _request(arguments: argparse.Namespace, manifest: str, run: str, keep: Keep) -> Request:
    from flows.plan import Request

    return Request(
        manifest=manifest,
        run=run,
        profile=arguments.profile,
        stages=arguments.stage,
        changes=_changes(arguments),
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


def _pairs(arguments: argparse.Namespace) -> int:
    from flows.engine import check_weights
    from flows.plan import make_plan, record
    from flows.progress import opening, terminal_progress
    from flows.server import prefect_api
    from flows.status import tries
    from flows.why import headline, print_why

    request = _request(arguments, arguments.manifest, arguments.run, arguments.keep)
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
        elif not arguments.no_report and (plan.todo or not page.exists()):
            from flows.report import write_report

            write_report(plan.folder)
        print(f"outputs: {plan.folder.outputs}" + (f", report: {page}" if arguments.metrics or not arguments.no_report else ""))
        return code
    finally:
        plan.close()


def _videos(arguments: argparse.Namespace) -> int:
    from flows.progress import counted, plural
    from flows.server import prefect_api
    from flows.status import tries
    from flows.video_plan import VideoRequest, make_video_plan

    output = {name: getattr(arguments, name) for name in ("codec", "quality", "pixel_format", "container")}
    changes = [*_changes(arguments), *(f"output.{name}={value}" for name, value in output.items() if value not in ("", None))]
    names = ("manifest", "run", "profile", "device", "keep", "store", "chunk", "workers", "source_face", "face", "max_pixels")
    more = ("fail_fast", "verify", "retry", "max_attempts", "dask", "dask_wait", "threads")
    given = {name: getattr(arguments, name) for name in (*names, *more)}
    plan = make_video_plan(VideoRequest(**given, stages=arguments.stage, changes=changes))
    try:
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


def _manifest_celebamask(arguments: argparse.Namespace) -> int:
    from flows.manifests import celebamask_hq
    from flows.progress import plural

    drawn = celebamask_hq(arguments.folder, arguments.out, pairs=arguments.pairs, seed=arguments.seed)
    print(f"{drawn.path}: {plural(arguments.pairs, 'pair')} of {plural(drawn.pictures, 'picture')}; {drawn.split}")
    print(f"sha256 of the rows, for comparison with other machines: {drawn.rows_sha256}")
    return 0


def _synth(arguments: argparse.Namespace) -> int:
    from flows.progress import counted
    from flows.synth import make_clip, make_people

    out, seed, truncation = arguments.out, arguments.seed, arguments.truncation
    try:
        with counted("frames" if arguments.clip else "people") as progress:
            if arguments.clip:
                make_clip(seed, out, seconds=arguments.seconds, truncation=truncation, progress=progress)
            else:
                count = max(8, arguments.pairs) if arguments.count is None else arguments.count
                make_people(count, seed, out, truncation=truncation, pairs=arguments.pairs, progress=progress)
    except ValueError as error:
        raise UsageError(str(error)) from None
    what = "a clip" if arguments.clip else f"{count} people" + (f" and {arguments.pairs} pairs" if arguments.pairs else "")
    print(f"{what} in {arguments.out}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from flows.status import follow, print_failed, print_status

    if arguments.why is not None:
        from flows.why import why_again
        from storage.video_run import VideoRunFolder, open_run

        if isinstance(open_run(arguments.run), VideoRunFolder):
            raise UsageError(f"{arguments.run}: a run of videos, for which --why is not there yet; leave it out")
        return why_again(
            arguments.run, arguments.why, profile=arguments.profile, stages=arguments.stage, changes=arguments.set, verify=arguments.verify
        )
    if arguments.failed:
        return print_failed(arguments.run)
    return follow(arguments.run) if arguments.follow else print_status(arguments.run)


def _report(arguments: argparse.Namespace) -> int:
    from evaluation.compare import summary
    from flows.progress import counted
    from flows.report import PAGE, evaluate_and_report, told, write_comparison, write_report
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
    elif arguments.no_metrics:
        write_report(folder, None, arguments.limit)
        print(f"report: {folder.path / PAGE}")
    else:
        with counted("pairs measured") as progress:
            report = evaluate_and_report(folder, protocols, arguments.device, arguments.limit, progress)
        for line in told(folder, report):
            print(line)
    return 0


def _report_videos(arguments: argparse.Namespace, folder: VideoRunFolder) -> int:
    from flows.progress import counted
    from flows.video_report import report_videos

    if arguments.other:
        raise UsageError(f"{arguments.run} is a run of videos: two of them cannot be compared; give one")
    with counted("videos measured") as progress:
        said = report_videos(folder, measure=not arguments.no_metrics, device=arguments.device, limit=arguments.limit, progress=progress)
    for line in said:
        print(line)
    return 0


def _stage(arguments: argparse.Namespace) -> int:
    from flows.single import run_stage

    for path in run_stage(
        arguments.run, arguments.node, arguments.item, arguments.output, role=arguments.role, stages=arguments.stage, changes=arguments.set
    ):
        print(path)
    return 0


def _models_list(arguments: argparse.Namespace) -> int:
    from flows.models import print_list

    return print_list()


def _models_pull(arguments: argparse.Namespace) -> int:
    from flows.models import pull_weights

    return pull_weights(arguments.names, arguments.folder)


def _models_verify(arguments: argparse.Namespace) -> int:
    from flows.models import verify_weights

    return verify_weights(arguments.names)


def _models_add(arguments: argparse.Namespace) -> int:
    from flows.models import add_network, add_published

    if bool(arguments.folder) == bool(arguments.network) or bool(arguments.network) != bool(arguments.file):
        raise UsageError("give either --from FOLDER (the authors' checkpoints) or --network ROLE --file FILE (your own evaluation network)")
    if arguments.folder and arguments.convention:
        raise UsageError("--convention goes with --network ROLE --file FILE")
    if arguments.network:
        if arguments.names:
            raise UsageError(f"{arguments.names[0]}: --network ROLE --file FILE adds one network and takes no other names")
        return add_network(arguments.network, arguments.file, arguments.convention, arguments.replace)
    return add_published(arguments.folder, arguments.names, arguments.replace)


def _models_convert(arguments: argparse.Namespace) -> int:
    from flows.models import convert_published

    return convert_published(arguments.file, arguments.name, arguments.output)


def _models_check(arguments: argparse.Namespace) -> int:
    from flows.reference import check_all

    return check_all(arguments.folder)


def _cache(arguments: argparse.Namespace) -> int:
    from flows.cache import compact_store, print_store, prune_store, verify_store

    if arguments.action == "prune":
        return prune_store(
            arguments.store,
            older_than=arguments.older_than,
            stages=arguments.stage,
            run=arguments.run,
            shared_too=arguments.with_shared,
            failed=arguments.failed,
            max_size=arguments.max_size,
            really=arguments.yes,
        )
    return {"list": print_store, "verify": verify_store, "compact": compact_store}[arguments.action](arguments.store)


def _doctor(arguments: argparse.Namespace) -> int:
    from flows.doctor import examine

    return examine()


if __name__ == "__main__":
    raise SystemExit(main())
