"""`e4s manifest`: pairs of a data set."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flows.commands.options import EXIT_CODES, Parser

if TYPE_CHECKING:
    from flows.commands.options import Commands


def add(commands: Commands) -> None:
    manifest = commands.add_parser("manifest", help="write a manifest of pairs of a data set", epilog=EXIT_CODES)
    celebamask = manifest.add_subparsers(required=True, metavar="DATASET", parser_class=Parser).add_parser(
        "celebamask-hq", help="pairs of test pictures of CelebAMask-HQ, drawn by a seed (docs/benchmark.md)", epilog=EXIT_CODES
    )
    celebamask.add_argument("folder", help="the data set as unpacked, with CelebA-HQ-img and CelebA-HQ-to-CelebA-mapping.txt")
    celebamask.add_argument("--out", required=True, help="the manifest, a .parquet file")
    celebamask.add_argument("--pairs", type=int, default=500, help="how many (default 500)")
    celebamask.add_argument("--seed", type=int, default=0, help="decides which pictures meet (default 0)")
    celebamask.set_defaults(command=_manifest_celebamask)


def _manifest_celebamask(arguments: argparse.Namespace) -> int:
    from flows.manifests import celebamask_hq
    from flows.progress import plural

    drawn = celebamask_hq(arguments.folder, arguments.out, pairs=arguments.pairs, seed=arguments.seed)
    print(f"{drawn.path}: {plural(arguments.pairs, 'pair')} of {plural(drawn.pictures, 'picture')}; {drawn.split}")
    print(f"sha256 of the rows, for comparison with other machines: {drawn.rows_sha256}")
    return 0
