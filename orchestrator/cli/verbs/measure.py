"""`measure`: the speed of this machine."""

import argparse
from typing import Any

from orchestrator.cli.flags import FIELDS, add_machine, add_verb


def add_parser(commands: Any) -> None:
    parser = add_verb(commands, "measure", "measure the speed of this machine, for plan --rates")
    parser.add_argument("output", metavar="FILE", help="JSON file to write")
    add_machine(parser)


def run(options: argparse.Namespace) -> None:
    from orchestrator import api

    given = {name: value for name, value in vars(options).items() if name in FIELDS}
    print(api.measure(options.output, **given))
