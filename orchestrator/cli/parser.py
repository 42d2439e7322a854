"""Parser of the command line."""

import argparse
from typing import Any

from orchestrator.cli.verbs import VERBS
from orchestrator.version import version_lines


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line; its result contains `command` and the given flags."""
    parser = argparse.ArgumentParser(
        prog="orchestrator",
        description="Compresses large language models on a Ray cluster.",
        epilog="Exit codes: 0 done, 2 usage, 3 infeasible, 4 model or data invalid, "
        "75 stopped and resumable, 1 other.",
    )
    parser.add_argument(
        "--version",
        action=VersionAction,
        nargs=0,
        default=argparse.SUPPRESS,
        help="show the versions of orchestrator, Python, ray, torch and transformers, and exit",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for verb in VERBS.values():
        verb.add_parser(commands)
    # the command of a job is checked before it is submitted
    commands.choices["submit"].set_defaults(parse=parser.parse_args)
    commands.choices["completion"].set_defaults(parser=parser)
    return parser


class VersionAction(argparse.Action):
    """Flag that prints versions; metadata are read only when it is given."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        print("\n".join(version_lines()))
        parser.exit()
