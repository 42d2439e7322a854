"""`export`: a checkpoint for other programs."""

import argparse
from typing import Any

from orchestrator.cli.flags import add_verb


def add_parser(commands: Any) -> None:
    parser = add_verb(commands, "export", "convert a compressed checkpoint for other programs")
    parser.add_argument("out", metavar="OUT", help="compressed checkpoint")
    parser.add_argument("dense_dir", metavar="DENSE_DIR", help="directory to write")
    parser.add_argument(
        "--format", choices=("dense",), default="dense", help="dense: multiply the factors"
    )


def run(options: argparse.Namespace) -> None:
    from orchestrator import api

    print(api.export(options.out, options.dense_dir, format=options.format))
