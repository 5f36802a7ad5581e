"""`e4s models`: weights and networks."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flows.commands.options import EXIT_CODES, Parser
from tasks.graph import UsageError

if TYPE_CHECKING:
    from flows.commands.options import Commands


def add(commands: Commands) -> None:
    models = commands.add_parser("models", help="weights: list, pull, verify, add, convert, check-reference", epilog=EXIT_CODES)
    actions = models.add_subparsers(required=True, metavar="ACTION", parser_class=Parser)
    listing = actions.add_parser(
        "list", help="what there is and what can be added: state, size, licence, origin, what uses it", epilog=EXIT_CODES
    )
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
